"""
Two matrix products of the MLP, each with the work on every element of its result done before that leaves the
chip. As kernels of their own, these passes would read and write the result again.

    forward:   h = x @ weight.T + bias, then f(h) and f'(h), the slope: `linear_activation`. h is not kept.
    backward:  dh = (dy @ weight) * slope: `product_times`

A kernel works on tiles of its result. For each it adds up, in float32, products of tiles of its factors,
which the copy engine (TMA) brings to the chip. What is outside of a matrix is read as 0 and not written.

Shapes: N tokens, C channels, D channels inside the MLP.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from model import MLP

# A tile of the result has ROWS x COLUMNS numbers; DEPTH terms of each of its sums are on the chip at once.
# For an H100, the largest that fits: 147 KB of factors in three stages, and up to 64 KB for what is written.
ROWS, COLUMNS, DEPTH = tl.constexpr(128), tl.constexpr(256), tl.constexpr(64)
HALF = tl.constexpr(128)  # of the columns: what is written in two parts needs half the room
LAUNCH = {"num_warps": 8, "num_stages": 3}


@triton.jit
def gelu(h):
    """h -> GELU in GPT-2's form, and its slope: h (1 + tanh u) / 2 = h sigmoid(2 u), 2 u = h (b + c h^2)."""
    b: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    c: tl.constexpr = 0.07135481627159536  # 0.044715 b
    square = h * h
    share = tl.sigmoid(h * (b + c * square))
    value = h * share
    return value, share + value * (1 - share) * (b + 3 * c * square)


@triton.jit
def relu2(h):
    """h -> the square of ReLU, and its slope."""
    positive = tl.maximum(h, 0.0)
    return positive * positive, 2 * positive


@triton.jit
def halves(tile):
    """(ROWS, COLUMNS) -> its left and its right half, 2 x (ROWS, HALF)."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def write_activation(h, a, slope, bias, row, column, D, f: tl.constexpr):
    """Write f and its slope at h + bias, of half a tile (ROWS, HALF)."""
    if bias is not None:
        at = column + tl.arange(0, HALF)
        h += tl.load(bias + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
    if f == "gelu":
        value, derivative = gelu(h)
    else:
        value, derivative = relu2(h)
    a.store([row, column], value.to(a.dtype))
    slope.store([row, column], derivative.to(slope.dtype))


@triton.jit
def linear_activation_kernel(x, weight, a, slope, bias, N, C, D, f: tl.constexpr, programs):
    """x (N, C), weight (D, C), a and slope (N, D) as descriptors; bias (D,) or None."""
    columns = tl.cdiv(D, COLUMNS)
    tiles = tl.cdiv(N, ROWS) * columns
    # Programs work side by side on a row of tiles, so x is read once; the weight stays in the GPU's cache.
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        row, column = tile // columns * ROWS, tile % columns * COLUMNS
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        for channel in range(0, C, DEPTH):  # (ROWS, DEPTH) @ (DEPTH, COLUMNS)
            h = tl.dot(x.load([row, channel]), weight.load([column, channel]).T, h)
        left, right = halves(h)
        write_activation(left, a, slope, bias, row, column, D, f)
        write_activation(right, a, slope, bias, row, column + HALF, D, f)


@triton.jit
def product_times_kernel(dy, weight, slope, dh, N, C, D, programs):
    """dy (N, C), weight (C, D), slope and dh (N, D) as descriptors."""
    columns = tl.cdiv(D, COLUMNS)
    tiles = tl.cdiv(N, ROWS) * columns
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        row, column = tile // columns * ROWS, tile % columns * COLUMNS
        da = tl.zeros((ROWS, COLUMNS), tl.float32)
        for channel in range(0, C, DEPTH):  # (ROWS, DEPTH) @ (DEPTH, COLUMNS)
            da = tl.dot(dy.load([row, channel]), weight.load([channel, column]), da)
        left, right = halves(da)
        dh.store([row, column], (left * slope.load([row, column])).to(dh.dtype))
        dh.store([row, column + HALF], (right * slope.load([row, column + HALF])).to(dh.dtype))


def in_tiles(matrix, rows, columns):
    return TensorDescriptor.from_tensor(matrix, [rows.value, columns.value])


def launch(kernel, device, *arguments):
    """Run a kernel with a program for each multiprocessor, which does every so many-th tile."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    kernel[(programs,)](*arguments, programs, **LAUNCH)


@torch.library.custom_op("kqv::linear_activation", mutates_args=())
def linear_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    x (N, C), weight (D, C), bias (D,) -> f(h) and f'(h) of h = x @ weight.T + bias, both (N, D). `activation`
    names f: "gelu" or "relu2".
    """
    (N, C), D = x.shape, len(weight)
    a, slope = x.new_empty(N, D), x.new_empty(N, D)
    factors = in_tiles(x, ROWS, DEPTH), in_tiles(weight, COLUMNS, DEPTH)
    results = in_tiles(a, ROWS, HALF), in_tiles(slope, ROWS, HALF)
    launch(linear_activation_kernel, x.device, *factors, *results, bias, N, C, D, activation)
    return a, slope


@linear_activation.register_fake
def _(x, weight, bias, activation):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@torch.library.custom_op("kqv::product_times", mutates_args=())
def product_times(dy: torch.Tensor, weight: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """dy (N, C), weight (C, D), slope (N, D) -> (dy @ weight) * slope (N, D)."""
    (N, C), D = dy.shape, weight.size(1)
    dh = torch.empty_like(slope)
    factors = in_tiles(dy, ROWS, DEPTH), in_tiles(weight, DEPTH, COLUMNS)
    ends = in_tiles(slope, ROWS, HALF), in_tiles(dh, ROWS, HALF)
    launch(product_times_kernel, dy.device, *factors, *ends, N, C, D)
    return dh


@product_times.register_fake
def _(dy, weight, slope):
    return torch.empty_like(slope)


class MLPProducts(torch.autograd.Function):
    """The MLP's products and what is between: x (N, C) -> (N, C). It keeps slopes for backward, not h."""

    @staticmethod
    def forward(ctx, x, up, up_bias, down, down_bias, activation):
        a, slope = linear_activation(x, up, up_bias, activation)  # 2 x (N, D)
        ctx.save_for_backward(x, up, down, a, slope)
        return F.linear(a, down, down_bias)  # (N, D) @ (D, C) -> (N, C)

    @staticmethod
    def backward(ctx, dy):
        x, up, down, a, slope = ctx.saved_tensors
        dh = product_times(dy.contiguous(), down, slope)  # (N, D)
        return (
            dh @ up,  # (N, D) @ (D, C) -> (N, C)
            dh.T @ x,  # (D, N) @ (N, C) -> (D, C)
            dh.sum(dim=0) if ctx.needs_input_grad[2] else None,  # (D,)
            dy.T @ a,  # (C, N) @ (N, D) -> (C, D)
            dy.sum(dim=0) if ctx.needs_input_grad[4] else None,  # (C,)
            None,
        )


class FusedMLP(MLP):
    """model.py's MLP with the same parameters, faster to train. Without a gradient it is model.py's."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        given = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
        weights = (None if weight is None else weight.to(dtype) for weight in given)
        y = MLPProducts.apply(x.to(dtype).flatten(0, -2).contiguous(), *weights, self.activation)
        return self.dropout(y.view(x.shape))  # (N, C) -> (B, T, C)
