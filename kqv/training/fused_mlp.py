"""MLPs that train by the kernels of kqv/kernels/mlp.py, put into a model from outside."""

import importlib.util
from dataclasses import dataclass

import torch

from kqv.errors import UserError
from kqv.formats.lora import is_adapted
from kqv.settings import setting

# The GPUs with a copy engine for tiles (TMA), and memory enough for them on the chip: the H100 and H200, the
# B200, the B300.
HAVE_KERNELS = (9, 0), (10, 0), (10, 3)


@dataclass(frozen=True)
class KernelSettings:
    """Kernels"""

    fused_mlp: bool = setting(
        False, "MLPs with their activation inside the matrix products; for an H100 or B200, not yet measured"
    )


def fuse_mlps(gpt, device, dtype):
    """
    Let each MLP of `gpt` be a FusedMLP with the same parameters. Raises UserError where its kernels can't
    train this model on that device, in that dtype.
    """
    if is_adapted(gpt.transformer.h[0].mlp):
        raise UserError(
            "--fused_mlp=True can't train the adapters of an MLP: leave it out, or use --lora_targets=c_attn"
        )
    if reason := not_fused(gpt.config, device, dtype):
        raise UserError(f"--fused_mlp=True {reason}: use --fused_mlp=False")
    from kqv.kernels.mlp import FusedMLP  # needs Triton

    for block in gpt.transformer.h:
        block.mlp.__class__ = FusedMLP


def not_fused(config, device, dtype):
    """Why FusedMLP can't be used, in words; None where it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in HAVE_KERNELS:
        return "needs an NVIDIA GPU such as the H100, H200 or B200"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if dtype == torch.float32:
        return "needs --dtype=bfloat16 or --dtype=float16"
    if config.activation == "swiglu":
        return "has no kernel for --activation=swiglu"
    if config.n_embd % 8 or config.inner_channels % 8:
        return f"needs multiples of 8, not n_embd={config.n_embd} and n_inner={config.inner_channels}"
