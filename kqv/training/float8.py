"""
The products of the head in 8 bits: the logits, and the gradient of what goes into the head.

A GPU multiplies numbers of 8 bits twice as fast as bfloat16 (Micikevicius et al. 2022). Weights and what goes
into the head have 3 bits of mantissa (e4m3) and one scale a tensor, by which its largest number is the type's
largest. The gradient has more bits of exponent (e5m2). Its scale is known before: for a logit, a token's
cross-entropy has the gradient p, a probability, or p - 1. The gradient of the head itself stays in bfloat16:
in 8 bits, its product would need the gradient of all logits transposed. (modded-nanogpt, Jordan et al. 2024,
has fixed scales, and 8 bits in all three products.)

Shapes: n tokens, C channels, V rows of the head.
"""

import torch

from kqv.errors import UserError

GRADIENT_SCALE = 2.0**15  # times 1, below e5m2's largest, 57,344


class Head:
    """The weight (V, C) of the head in its products, in its own type."""

    def __init__(self, weight):
        self.weight = weight

    def logits(self, x, out):
        """x (n, C) -> (n, V)"""
        return torch.mm(x, self.weight.T, out=out)

    def grad_x(self, gradient, out):
        """gradient (n, V) -> out (n, C)"""
        torch.mm(gradient, self.weight, out=out)


class Float8Head(Head):
    """The same in float8. Numbers of tokens, channels and rows are multiples of 16."""

    def __init__(self, weight):
        self.weight, self.scale = in_float8(weight)
        self.columns = self.weight.T.contiguous().T  # (V, C), as _scaled_mm wants its second factor
        self.gradient_scale = self.scale.new_tensor(1 / GRADIENT_SCALE)

    def logits(self, x, out):
        low, scale = in_float8(x)
        how = {"out_dtype": x.dtype, "use_fast_accum": True}
        return torch._scaled_mm(low, self.weight.T, scale, self.scale, **how)

    def grad_x(self, gradient, out):
        """`gradient` is what `gradient_in_float8` returns."""
        product = torch._scaled_mm(
            gradient, self.columns, self.gradient_scale, self.scale, out_dtype=out.dtype
        )
        out.copy_(product)


def in_float8(tensor):
    """(tensor / scale in e4m3, scale)"""
    scale = tensor.abs().amax().float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn), scale


def gradient_in_float8(gradient):
    """A gradient of logits, summed over tokens, times GRADIENT_SCALE in e5m2."""
    return (gradient * GRADIENT_SCALE).to(torch.float8_e5m2)


def require_float8(head, dtype, device):
    """Raise UserError where the products of a head (V, C) can't be in float8."""
    reason = None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        reason = f"{torch.cuda.get_device_name(device)} has no products in it (from Ada and Hopper on)"
    elif device.type not in ("cuda", "cpu"):
        reason = f"{device} has no products in it"
    elif dtype != torch.bfloat16:
        reason = f"it goes with --dtype=bfloat16, not with {str(dtype).removeprefix('torch.')}"
    elif any(size % 16 for size in head.shape):
        rows, channels = head.shape
        reason = f"the head has {rows} rows of {channels} channels, not multiples of 16"
    if reason:
        raise UserError(f"dtype_head=float8 can't be used: {reason}; leave it out")
