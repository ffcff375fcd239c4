"""The device that computes, its precision, and whether to compile."""

import importlib.metadata
import os
import re
import resource
import shutil
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kqv.errors import UserError, first_line, is_out_of_memory, warn
from kqv.settings import setting


@dataclass(frozen=True)
class PlacementSettings:
    """Device"""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision; auto: what the device is fast in"
    )


@dataclass(frozen=True)
class DeviceSettings(PlacementSettings):
    """Compilation"""

    compile: Literal["auto", True, False] = setting("auto", "torch.compile; auto: on a CUDA device")


# {pattern of the name that the driver reports: peak in TFLOP/s}, of dense bfloat16 and float16 products on
# tensor cores, from the makers' data sheets. The whole name must match: an H100 NVL or a laptop's RTX 4090 is
# another chip with another peak.
PEAK_TFLOPS = {
    r"NVIDIA B200": 2250,
    r"NVIDIA H200": 989,
    r"NVIDIA H100 80GB HBM3": 989,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA A100.*": 312,
    r"NVIDIA A40": 149.7,
    r"NVIDIA A10G": 70,
    r"NVIDIA A10": 125,
    r"NVIDIA L40S": 362,
    r"NVIDIA L4": 121,
    r"NVIDIA RTX 6000 Ada Generation": 364.2,
    r"NVIDIA RTX A6000": 154.8,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"NVIDIA GeForce RTX 3090": 71,
    r"Tesla V100-SXM2.*": 125,
    r"Tesla T4": 65,
}


def find_device(name):
    """
    A device's name, or "auto": the fastest that this machine has -> torch.device. A GPU becomes the current
    one. Raises UserError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "gpu":
        raise UserError("device gpu is not known: use --device=cuda, or --device=auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend has errors of its own
        reason = first_line(error).split(". ")[0]
        raise UserError(
            f"device {name} can't be used ({reason}): use --device=auto or --device=cpu"
        ) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name} holds no numbers to compute with: use --device=auto or --device=cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events, streams and synchronize() belong to the current one
    return device


def find_dtype(name, device):
    """
    A dtype's name -> torch.dtype. "auto": bfloat16 on GPUs and CPUs that compute in it, float16 on older
    GPUs, float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else torch.float32


def peak_flops(device_name, dtype):
    """
    The peak of the GPU of that name, in FLOP/s, for matrix products in `dtype`. None where no data sheet
    says it.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if re.fullmatch(name, device_name)), None)


@contextmanager
def out_of_memory_as(message):
    """Within this context, running out of memory, on any device, is a UserError with that message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from None


def machine_memory():
    """How many bytes of memory this machine has, or this process may use of it where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    try:
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # of a container
    except (OSError, ValueError):  # there is none
        pass
    return min([memory, *(limit for limit in limits if limit > 0)])  # -1: no limit


def find_compile(choice, device):
    """
    Whether to use torch.compile: True, False, or "auto", which is True on a CUDA device. Where compiling
    can't work, "auto" is False, with a warning, and True raises UserError.
    """
    asked = choice is True
    if choice == "auto":
        choice = device.type == "cuda"
    reason = cannot_compile(device) if choice else None
    if reason and asked:
        raise UserError(f"--compile=True can't work: {reason}, or use --compile=False")
    if reason:
        warn(f"the model is not compiled, and so slower: {reason}, or say --compile=False")
    return choice and not reason


def cannot_compile(device):
    """Why torch.compile can't work on the device, and what to install; None where it can."""
    if device.type == "cuda":
        # Triton compiles the kernels, and builds the functions that launch them with a C compiler.
        if (capability := torch.cuda.get_device_capability(device)) < (7, 0):
            return (
                f"the GPU's compute capability is {'.'.join(map(str, capability))}: take one of at least 7.0"
            )
        if reason := cannot_use_triton():
            return reason
        if not any(map(is_program, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
            return "no C compiler is found: install gcc"
    elif not is_program(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        return "no C++ compiler is found: install g++"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.exists():
        return f"Python's header {header} is not there: install python3-dev"
    return None


def cannot_use_triton():
    """Why Triton can't be used, and what to install; None where it can. A torch is made for one version."""
    try:
        required = " ".join(importlib.metadata.requires("torch") or ())
    except importlib.metadata.PackageNotFoundError:  # a torch that was built here says nothing
        required = ""
    found = re.search(r"[\w-]*triton[\w-]*[~=]=(\d+\.\d+)[\w.]*", required)
    wanted = found[0] if found else "triton"
    try:
        import triton  # a slow import: only to compile
    except Exception as error:  # also what its libraries raise
        return f"Triton can't be imported ({first_line(error)}): pip install '{wanted}'"
    if found and not f"{triton.__version__}.".startswith(f"{found[1]}."):
        return f"triton {triton.__version__} is not for torch {torch.__version__}: pip install '{wanted}'"
    return None


def is_program(command):
    """Whether the first word of a command is a program that is there."""
    return any(map(shutil.which, command.split()[:1]))


def cpu_has_bfloat16():
    """Whether the CPU has instructions for bfloat16. False where torch is too old to tell."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
