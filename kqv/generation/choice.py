"""Which engine writes, and in which precision."""

from dataclasses import dataclass
from typing import Literal

import torch

from kqv.device import find_dtype, has_compiler
from kqv.errors import UserError
from kqv.settings import setting

GRAPH_FROM = (
    64  # decoding steps from which recording a CUDA graph saves more time than it takes, as predicted
)
COMPILE_FROM = {"cpu": 2000, "cuda": 200_000}  # the same of compiling; on a GPU it is predicted, not measured


@dataclass(frozen=True)
class EngineSettings:
    """Engine"""

    engine: Literal["auto", "plain", "graph", "compiled", "kernels"] = setting(
        "auto",
        "how a token is computed. plain: on every device; graph: a CUDA graph; compiled: by torch.compile; "
        "kernels: by own kernels, in a CUDA graph; auto: by the device and the number of tokens",
    )


def choose_engine(name, device, gpt, steps):
    """
    The engine of that name, or for "auto" one that fits so many decoding steps -> a kind of Engine. Raises
    UserError for one that can't run here. "auto" never takes the project's own kernels, which have not run on
    a GPU yet.
    """
    if name != "auto":
        if reason := cannot_run(name, device, gpt):
            raise UserError(f"--engine={name} can't be used: {reason}. Use --engine=auto")
        return name
    compile_from = COMPILE_FROM.get(device.type)
    if compile_from and steps >= compile_from and (device.type == "cuda" or is_large(gpt)):
        if not cannot_run("compiled", device, gpt):
            return "compiled"
    return "graph" if device.type == "cuda" and steps >= GRAPH_FROM else "plain"


def cannot_run(name, device, gpt):
    """Why that engine can't run on the device, or None."""
    if name == "graph" and device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, not {device}"
    if name == "compiled":
        if device.type == "mps":
            return "torch.compile is used on cuda and cpu, not on mps"
        return None if has_compiler() else "torch.compile needs a C++ compiler, and none is found (g++)"
    if name == "kernels":
        from kqv.kernels.decoding import why_not  # here, since it loads Triton

        return why_not(gpt, device)
    return None


def is_large(gpt):
    """Whether the weights are larger than a CPU's caches, so that decoding waits for memory."""
    return gpt.num_parameters() > 16e6


def generation_dtype(name, device, gpt):
    """
    The precision of the weights. "auto" on a CPU is float32 for a small model, whose decoding does not wait
    for memory.
    """
    if name == "auto" and device.type == "cpu" and not is_large(gpt):
        return torch.float32
    return find_dtype(name, device)
