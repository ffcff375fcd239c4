"""
Drawing among the k likeliest ids without a sort of all, by Triton kernels.

The first kernel reads all logits and keeps the largest of each group of neighbours. The k-th largest of those
is a bound: at least k logits reach it, so the k largest logits are in the k groups that reach it. The second
kernel looks at those groups alone. Both search by bisection: count the numbers above the middle, halve.

Floats are compared by *keys*: their bits as integers, mirrored for negative numbers, have the order of the
numbers, -inf and inf among them. (NaN is beyond both.)

Shapes: B rows, V ids, G groups of GROUP neighbouring ids. A size that ends in _P is a power of two.
"""

import torch
import triton
import triton.language as tl

from kqv.kernels.sizes import power_of_two

MOST_K = 256  # groups of that many hold the k likeliest
MOST_GROUPS = 8192  # of a row: their keys are held in registers
LEAST = tl.constexpr(-(2**31))  # the key of no number
GREATEST = tl.constexpr(2**31 - 1)


@triton.jit
def mirrored(bits):
    """int32 bits of floats -> their keys, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def keys_of(logits, at, inside):
    """The keys of the logits `at`; LEAST where they are not `inside`."""
    bits = tl.load(logits + at, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(inside, mirrored(bits), LEAST)


@triton.jit
def middle_of(low, high):
    """(low + high) / 2 rounded up, without an overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def kth_largest(keys, k):
    """The k-th largest of the keys (N,), N >= k: the greatest number that at least k of them reach."""
    low, high = tl.min(keys, axis=0), tl.max(keys, axis=0)
    while low < high:
        middle = middle_of(low, high)
        found = tl.sum((keys >= middle).to(tl.int32), axis=0)
        if found == k:  # then it is the smallest of those found
            low = tl.min(tl.where(keys >= middle, keys, GREATEST), axis=0)
            high = low
        elif found > k:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def maxima_kernel(logits, maxima, stride, V, G, GROUP: tl.constexpr, TILE: tl.constexpr):
    """
    maxima (B, G), the largest key of each group of logits (B, V), GREATEST where a logit of the group is not
    finite; a program makes TILE of a row.
    """
    logits += tl.program_id(1) * stride
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (TILE, GROUP)
    keys = keys_of(logits, at, at < V)
    infinite = (mirrored(keys) & 0x7F800000) == 0x7F800000  # all bits of the exponent
    keys = tl.where(infinite & (at < V), GREATEST, keys)
    tl.store(maxima + tl.program_id(1) * G + group, tl.max(keys, axis=1), mask=group < G)


@triton.jit
def likeliest(logits, maxima, groups, k, V, G, G_P: tl.constexpr, GROUP: tl.constexpr, MOST: tl.constexpr):
    """
    The logits of a row (V,) in the k groups with the largest `maxima` (G,), or in all groups where those are
    fewer, in the order of ids: the ids and the keys, (MOST * GROUP,). The k largest logits are among them.
    `groups` (MOST,) is room for their numbers.
    """
    at, number = tl.arange(0, G_P), tl.arange(0, MOST)
    keys = tl.load(maxima + at, mask=at < G, other=LEAST)
    k = tl.minimum(k, G)
    bound = kth_largest(keys, k)
    above, level = keys > bound, (keys == bound) & (at < G)  # of the level ones, the first are enough
    wanted = k - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= wanted))
    tl.store(groups + tl.cumsum(kept.to(tl.int32), axis=0) - 1, at, mask=kept)
    tl.debug_barrier()  # what one thread wrote, others read
    group = tl.load(groups + number, mask=number < k, other=0)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (MOST, GROUP)
    found = keys_of(logits, ids, (number < k)[:, None] & (ids < V))
    return tl.reshape(ids, (MOST * GROUP,)), tl.reshape(found, (MOST * GROUP,))


@triton.jit
def draw_kernel(
    logits,
    maxima,
    groups,
    ks,
    temperature,
    min_p,
    uniform,
    drawn,
    stride,
    k_stride,
    V,
    G,
    G_P: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
):
    """drawn (B,), ids as `draw_top_k` says. A program is a row."""
    row = tl.program_id(0)
    logits += row * stride
    k = tl.minimum(tl.maximum(tl.load(ks + row * k_stride).to(tl.int32), 1), tl.minimum(MOST, V))
    ids, found = likeliest(logits, maxima + row * G, groups + row * MOST, k, V, G, G_P, GROUP, MOST)
    highest = tl.max(found, axis=0)
    value = mirrored(found).to(tl.float32, bitcast=True)
    p = (value - mirrored(highest).to(tl.float32, bitcast=True)) / tl.load(temperature)
    p = tl.where(found >= kth_largest(found, k), tl.exp(p), 0.0)  # the largest is 1
    p = tl.where(p >= tl.load(min_p), p, 0.0)
    cdf = tl.cumsum(p, axis=0)
    reached = (cdf > tl.load(uniform + row) * tl.max(cdf, axis=0)) & (p > 0)
    chosen = tl.min(tl.where(reached, ids, V), axis=0)
    finite = tl.load(maxima + row * G + tl.arange(0, G_P), mask=tl.arange(0, G_P) < G, other=LEAST)
    tl.store(drawn + row, tl.where(tl.max(finite, axis=0) == GREATEST, -1, chosen).to(tl.int64))


def maxima_of(logits):
    """logits (B, V), float32 -> the maxima (B, G) of `maxima_kernel`, and what the next kernel takes."""
    B, V = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be rows of float32, not {str(logits.dtype)[6:]} {logits.stride()}")
    group = max(16, power_of_two(V) // MOST_GROUPS)
    G, tile = -(-V // group), 1024 // group
    maxima = torch.empty(B, G, dtype=torch.int32, device=logits.device)
    maxima_kernel[(-(-G // tile), B)](
        logits, maxima, logits.stride(0), V, G, GROUP=group, TILE=tile, num_warps=4
    )
    sizes = {"V": V, "G": G, "G_P": power_of_two(G), "GROUP": group, "MOST": MOST_K}
    return maxima, {"stride": logits.stride(0), **sizes, "num_warps": 8 if G <= 4096 else 16}


def on_device(number, logits, dtype):
    """A number, or a tensor of one or B of them, as a tensor that is where the logits are."""
    if isinstance(number, torch.Tensor):
        return number.flatten()
    return torch.full((1,), number, dtype=dtype, device=logits.device)


def draw_top_k(logits, uniform, temperature, k, min_p=0.0):
    """
    Draw one id for each row, as a Sampler does with temperature, top_k and min_p: logits (B, V) in float32,
    numbers from [0, 1) (B, 1) -> ids (B, 1); -1 where a row's logits are not all finite.

    temperature (above 0), k (from 1 to MOST_K) and min_p are numbers, or tensors of one; k may be (B,). Among
    logits equal to the k-th largest, the first in the order of ids may all stay, so more than k.
    """
    maxima, sizes = maxima_of(logits)
    k = on_device(k, logits, torch.int32)
    temperature, min_p = (on_device(number, logits, torch.float32) for number in (temperature, min_p))
    groups = torch.empty(len(logits), MOST_K, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(len(logits), 1, dtype=torch.int64, device=logits.device)
    draw_kernel[(len(logits),)](
        logits, maxima, groups, k, temperature, min_p, uniform, drawn, k_stride=int(len(k) > 1), **sizes
    )
    return drawn
