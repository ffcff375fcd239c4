"""Whether weights are numbers, and fit into a precision."""

import torch

from kqv.errors import UserError

# The largest number of a weight -> what it is in that precision; q8_0 keeps a 127th of it, in half precision.
KEPT = {
    "f32": lambda largest: largest,
    "bf16": lambda largest: largest.to(torch.bfloat16),
    "f16": lambda largest: largest.to(torch.float16),
    "q8_0": lambda largest: (largest / 127).to(torch.float16),
}


def rounded(weight, dtype):
    """The numbers of a weight (rows, cols) in float32 as they are after they were kept in `dtype`."""
    if dtype == "q8_0" and weight.size(1) % 32 == 0:  # a block of 32 numbers has one scale
        blocks = weight.reshape(-1, 32)
        scale = blocks.abs().amax(dim=1, keepdim=True) / 127
        return ((blocks / scale.clamp(min=1e-30)).round() * scale.half().float()).view_as(weight)
    return KEPT["f16" if dtype == "q8_0" else dtype](weight).float()


def require_numbers(gpt):
    """Raise UserError where a weight of `gpt` has anything but numbers."""
    for name, tensor in gpt.state_dict().items():
        largest = tensor.abs().max()
        if not largest.isfinite():
            raise UserError(
                f"the weight {name} holds {'nan' if largest.isnan() else 'inf'}, as after a training that "
                "diverged: export another checkpoint, with --checkpoint=newest, best or the path of a file"
            )


def require_held(name, tensor, dtype, dtypes):
    """
    Raise UserError where the weight `name`, a float32 tensor, has a number that is too large for `dtype`; it
    names those of `dtypes` that hold all of them.
    """
    largest = tensor.abs().max()
    if not KEPT[dtype](largest).isfinite():
        fit = [other for other in dtypes if KEPT[other](largest).isfinite()]
        raise UserError(
            f"the weight {name} goes up to {largest:.3g}, more than {dtype} holds: use "
            f"--dtype={' or '.join(fit)}"
        )
