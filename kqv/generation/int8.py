"""
Weights in 8 bits, for generation alone: a matrix is kept as whole numbers, with one scale for each row.

Decoding waits until every weight has been read, and these are half as many bytes as in bfloat16. Activations
stay as they are (absmax, a scale a row: Dettmers et al. 2022, section 2).

Shapes: a matrix (out, in) has `int8` (out, in) and `scale` (out,) in float32. Its numbers are int8 x scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from kqv.generation.cpu_decoding import matvec
from kqv.settings import setting

FEW_ROWS = 8  # up to so many, torch's product with int8 on a CPU is faster than one with a bfloat16 copy
PACKED = 64  # that product reads past a row's end where `in` is no multiple of it


@dataclass(frozen=True)
class PrecisionSettings:
    """Precision of the weights"""

    weights: Literal["float", "int8"] = setting(
        "float", "float: in --dtype; int8: matrices in 8 bits: less memory, and faster where it is compiled"
    )


class Int8Linear(nn.Linear):
    """A Linear whose matrix is kept in int8."""

    weight = property(lambda self: dequantised(self))

    def forward(self, x):
        rows = x.numel() // self.in_features
        if rows == 1 and torch.compiler.is_compiling():
            y = matvec(self.int8, x.reshape(-1)).view(*x.shape[:-1], -1)  # the only copy is in registers
        elif is_for_packed(x, rows):
            ones = x.new_ones(self.out_features)
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.int8, ones).view(*x.shape[:-1], -1)
        elif x.dtype == torch.float16:  # whose largest number is too small for sums of whole numbers
            return super().forward(x)
        else:
            y = F.linear(x, self.int8.to(x.dtype))
        if torch.compiler.is_compiling():
            y = y.float()  # scaled in bfloat16, the compiler would make it torch's product, whatever the size
        scale = self.scale.to(y.dtype)  # (..., out) times (out,)
        y = y * scale if self.bias is None else torch.addcmul(self.bias.to(y.dtype), y, scale)
        return y.to(x.dtype)


class Int8Embedding(nn.Embedding):
    """The Embedding that a tied head of int8 is, too."""

    weight = property(lambda self: dequantised(self))

    def forward(self, idx):
        return (self.int8[idx] * self.scale[idx][..., None]).to(self.dtype)  # (..., C)


def is_for_packed(x, rows):
    """Whether torch's product of bfloat16 with int8 is the fastest for x (..., in) of so many rows."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()  # the compiler can't take it here
    return on_cpu and rows <= FEW_ROWS and x.dtype == torch.bfloat16 and x.size(-1) % PACKED == 0


def dequantised(module):
    """The matrix of an Int8Linear or Int8Embedding in the dtype of the activations, (out, in)."""
    return (module.int8 * module.scale[:, None]).to(module.dtype)


def quantised(weight):
    """
    A matrix (out, in) in float32 -> (int8 (out, in), scale (out,)). A number is off by half a scale at most.
    A row with a number that is not finite has such a scale, so what it computes is not finite either.
    """
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # a row may be zeros
    scale = scale.bfloat16().float()  # so that it is the same number in every dtype
    return (weight / scale[:, None]).round().to(torch.int8), scale


def keep_in_int8(gpt, dtype):
    """
    Keep the matrices of the blocks and of the head in int8, and with the head an embedding that is tied to
    it; all else in `dtype`, that of activations. The matrices in float32 are let go of: the GPT can't be
    trained or saved any more.
    """
    wte, found = gpt.transformer.wte, {}
    for module in gpt.modules():
        if isinstance(module, nn.Linear):
            int8, scale = quantised(module.weight.detach())
            found[module] = nn.Parameter(int8, requires_grad=False), scale
            del module.weight
    if gpt.config.tied_head:
        found[wte] = found[gpt.lm_head]
        del wte.weight
    gpt.to(dtype)
    for module, (int8, scale) in found.items():
        module.__class__ = Int8Embedding if module is wte else Int8Linear
        module.int8, module.dtype = int8, dtype
        module.register_buffer("scale", scale)


def to_device(gpt, device, dtype, weights):
    """Bring a GPT in float32 to a device, to compute in `dtype`; `weights` is PrecisionSettings.weights."""
    if weights == "int8":
        keep_in_int8(gpt, dtype)
        return gpt.to(device)
    return gpt.to(device, dtype)


def float_weights(gpt):
    """{parameter name: tensor} of a GPT, also of one that is kept in int8."""
    weights = gpt.state_dict()
    for name, module in gpt.named_modules():
        if isinstance(module, (Int8Linear, Int8Embedding)):
            del weights[f"{name}.int8"], weights[f"{name}.scale"]
            weights[f"{name}.weight"] = module.weight
    return weights
