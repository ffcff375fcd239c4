"""
Attention to examples that stand side by side in a row, on a GPU: by a kernel that is told where each begins,
so that no token is compared with those of another one. With a mask, all T x T places of a row are computed.

Shapes: B rows, T tokens, nh heads of queries, nkv of keys and values, hs channels of a head.
"""

import inspect
from functools import partial

import torch

from model import GPT, CausalSelfAttention

MOST_BORDERS = 65535  # how many sequences a launch on a GPU may have


def attend_within_examples(gpt, most, device, dtype):
    """
    Let `gpt` attend by that kernel where it is given `positions`, if the kernel exists: for a CUDA device of
    compute capability 8.0, in half precision, without dropout, with torch 2.11. Elsewhere the mask stays.
    `most` is the largest number of examples in a row. Returns whether it does.
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    hs = gpt.config.head_channels
    if dtype not in (torch.bfloat16, torch.float16) or gpt.config.dropout or hs % 8 or hs > 192:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # a slow import: only where it is used
    except ImportError:
        return False
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return False
    groups = {"enable_gqa": True} if "enable_gqa" in known else {}  # before that, they need no permission
    kernel = partial(varlen_attn, window_size=(-1, 0), **groups)  # each token looks back: causal
    gpt.mask_of_examples = partial(borders_of_examples, most)
    for block in gpt.transformer.h:
        block.attn.attend = partial(attend, block.attn, kernel)
    return True


def borders_of_examples(most, positions):
    """
    positions (B, T), from 0 in each example of a row -> (B most + 1,) int32: where each example begins among
    all B T tokens, then B T for those that are not there. The size does not depend on how many there are.
    """
    if len(positions) * most > MOST_BORDERS:
        return GPT.mask_of_examples(positions)
    number = (positions == 0).flatten().cumsum(0)  # (B T,): 1 in the first example, 2 in the next one, ...
    return torch.searchsorted(
        number, torch.arange(1, len(positions) * most + 2, device=number.device), out_int32=True
    )


def attend(attention, kernel, q, k, v, mask):
    """`CausalSelfAttention.attend`, where `mask` may be the borders of examples."""
    if mask is None or mask.dim() > 1:
        return CausalSelfAttention.attend(attention, q, k, v, mask)
    B, T = q.size(0), q.size(2)
    q, k, v = (part.transpose(1, 2).flatten(0, 1).to(v.dtype) for part in (q, k, v))  # (B T, heads, hs)
    y = kernel(q, k, v, mask, mask, T, T)  # (B T, nh, hs)
    return y.unflatten(0, (B, T)).transpose(1, 2)  # (B, nh, T, hs)
