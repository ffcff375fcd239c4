"""Which engine writes, and in which precision."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kqv.device import cannot_compile, find_dtype
from kqv.errors import UserError, warn
from kqv.settings import setting

# Decoding steps from which recording a CUDA graph, or compiling, saves more time than it takes. On a GPU they
# are predicted, not measured.
GRAPH_FROM = 64
COMPILE_FROM = {"cpu": 2000, "cuda": 500_000}


@dataclass(frozen=True)
class EngineSettings:
    """Engine"""

    engine: Literal["auto", "plain", "graph", "compiled", "kernels"] = setting(
        "auto",
        "how a token is computed. plain: on every device; graph: a CUDA graph; compiled: by torch.compile; "
        "kernels: by own kernels, in a CUDA graph; auto: by the device and the number of tokens",
    )


def choose_engine(name, device, gpt, steps, rows):
    """
    The engine of that name, or for "auto" one that fits so many decoding steps of so many rows -> a kind of
    Engine. Raises UserError for one that can't run here. "auto" never takes the project's own kernels, which
    have not run on a GPU yet.
    """
    if name != "auto":
        if reason := cannot_run(name, device, gpt, rows):
            raise UserError(f"--engine={name} can't be used: {reason}. Or use --engine=auto")
        return name
    if steps >= COMPILE_FROM.get(device.type, math.inf) and (device.type == "cuda" or is_large(gpt)):
        if not (reason := cannot_compile(device)):
            return "compiled"
        warn(f"the model is not compiled, and so slower: {reason}")
    return "graph" if device.type == "cuda" and steps >= GRAPH_FROM else "plain"


def cannot_run(name, device, gpt, rows):
    """Why that engine can't write `rows` texts at once on the device; None where it can."""
    if name in ("graph", "kernels") and device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, not {device}"
    if name == "compiled":
        return cannot_compile(device) if device.type != "mps" else "torch.compile is not used on mps"
    if name == "kernels":
        from kqv.kernels.decoding import MOST_TEXTS, why_not  # here, since it loads Triton

        few = f"the kernels write at most {MOST_TEXTS} texts at once, not {rows}: use a smaller --batch_size"
        return why_not(gpt, device) or (few if rows > MOST_TEXTS else None)
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
