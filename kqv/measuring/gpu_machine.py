"""What a GPU and its software are: versions, the attention kernels that torch picks, the ceilings."""

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.nn import functional as F

from kqv.errors import first_line
from kqv.measuring.machine import Machine
from kqv.measuring.report import profiled

PACKAGES = ("triton", "numpy", "tiktoken", "flash_attn", "flash_attn_3", "transformers", "xdist")


def versions(job):
    """Lines of the software, the device, and the kernels behind F.scaled_dot_product_attention."""
    packages = {name: version_of(name) for name in PACKAGES}
    job.emit("software", python=platform.python_version(), torch=torch.__version__, **packages)
    job.emit("device", **description(job.device))
    job.emit("compilers", **compilers())
    job.emit("attention, switches", **switches())
    for what, case in attention_cases(job).items():
        try:
            job.emit(f"attention, {what}", **attention_kernels(*case))
        except RuntimeError as error:
            job.emit(f"attention, {what}", failed=first_line(error, 300))


def version_of(package):
    """The version of an installed package, or "not there"."""
    try:
        return importlib.metadata.version("pytest-xdist" if package == "xdist" else package)
    except importlib.metadata.PackageNotFoundError:
        return "not there"


def description(device):
    """{name: value} of the device."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GB": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver(),
        "bfloat16": torch.cuda.is_bf16_supported(),
        "threads": torch.get_num_threads(),
    }


def driver():
    """The version of NVIDIA's driver, as Linux knows it, or "not known"."""
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.exists() else "not known"


def compilers():
    """Where the compilers are that torch.compile and Triton need, and whether Python.h is there."""
    named = {name: os.environ.get(name, "") for name in ("CC", "CXX")}
    found = {name: shutil.which(name) or "not there" for name in ("gcc", "g++", "clang", "nvcc", "ptxas")}
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return {**named, **found, "Python.h": str(header) if header.exists() else "not there"}


def switches():
    """{name: whether torch may use that attention}, and the order in which it tries them."""
    names = ("flash", "mem_efficient", "cudnn", "math")
    found = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled", bool)() for name in names}
    if order := getattr(torch._C, "_get_sdp_priority_order", None):
        found["order"] = [torch.nn.attention.SDPBackend(number).name for number in order()]
    return found


def attention_cases(job):
    """
    {what: arguments of `attention_kernels`}: training's two forms; one of a length and with scores for which
    cuDNN's gradients were NaN (pytorch #196678); and a step of decoding.
    """
    B, nh, T, hs = (2, 2, 192, 16) if job.quick else (16, 12, 1024, 64)
    dtype = torch.bfloat16

    def tensors(T, S, **options):
        make = {"device": job.device, "dtype": dtype, **options}
        return [torch.randn(B, nh, length, hs, **make) for length in (T, S, S)]

    def examples(T):
        order = torch.arange(T, device=job.device)
        number = order // (T // 3)  # of the example that a token belongs to
        return ((number == number[:, None]) & (order <= order[:, None])).expand(B, 1, T, T)

    low = tensors(192, 192)
    low[0], low[1] = low[0] + 8, low[1] - 8  # scores far below -88.7
    low = [part.requires_grad_() for part in low]
    seen = torch.arange(T, device=job.device) < T // 2
    return {
        "causal": (*tensors(T, T, requires_grad=True), None),
        "masked": (*tensors(T, T, requires_grad=True), examples(T)),
        "masked, 192 tokens, low scores": (*low, examples(192)),
        "decoding": (*tensors(1, T), seen.expand(B, 1, 1, T)),
    }


def attention_kernels(q, k, v, mask):
    """
    {"forward": kernels' names, "backward": the same, "gradient": whether it is finite} of torch's own choice
    for q (B, nh, T, hs), k and v (B, nh, S, hs), causal where `mask` is None.
    """

    def forward():
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    y = forward()  # what is set up at the first call does not count
    found = {"forward": kernels_of(forward, q.device)}
    if q.requires_grad:
        grad = torch.ones_like(y)
        found["backward"] = kernels_of(lambda: y.backward(grad), q.device)
        finite = all(part.grad.isfinite().all() for part in (q, k, v))
        found["gradient"] = "finite" if finite else "not finite"
    return found


def kernels_of(work, device):
    """The names of the kernels that `work()` runs on the device, by the profiler."""
    with profiled(device) as found:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in found.events() if event.device_type == on_device]
    names = dict.fromkeys(event.name for event in events)
    if device.type != "cuda":
        names = [name for name in names if "attention" in name]
    return [name[:100] for name in names]


def ceilings(job):
    """Lines of the device's speed in matrix products and of its memory."""
    machine = Machine(job.device, torch.bfloat16, 3 if job.quick else 10)
    job.emit(f"matmul bfloat16 {machine.matrix_size}^3", **{"TFLOP/s": machine.matmul() / 1e12})
    copies = machine.median(lambda: machine.numbers.clone())
    job.emit(
        "memory",
        **{
            "read GB/s": machine.bandwidth() / 1e9,
            "copied GB/s": 2 * machine.numbers.nbytes / copies / 1e9,
        },
    )
