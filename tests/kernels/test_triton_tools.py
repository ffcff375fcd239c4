"""The tools themselves: a kernel runs on a CPU's tensors, and its code for an H100 is known."""

import sys

import pytest
import torch
from triton_tools import compiled_for_h100, interpreting, triton

tl = triton.language


@triton.jit
def doubled(x):
    return x * 2


@triton.jit
def softmax_kernel(x, y, width, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    row = tl.load(x + tl.program_id(0) * width + columns, mask=columns < width, other=-float("inf"))
    row = tl.exp(doubled(row) - tl.max(doubled(row), axis=0))
    tl.store(y + tl.program_id(0) * width + columns, row / tl.sum(row, axis=0), mask=columns < width)


@triton.jit
def spilling_kernel(x, y, WIDTH: tl.constexpr):
    block = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    square = tl.load(x + block)
    tl.store(y + block, square + tl.sum(square, axis=0)[None, :] + tl.sum(square, axis=1)[:, None])


def test_a_kernel_runs_on_a_cpu():
    x = torch.randn(3, 5)
    y = torch.full_like(x, torch.nan)
    with interpreting(sys.modules[__name__]):
        softmax_kernel[(3,)](x, y, 5, WIDTH=8)
    torch.testing.assert_close(y, (2 * x).softmax(dim=-1))
    assert isinstance(softmax_kernel, triton.JITFunction) and isinstance(tl.sum, triton.JITFunction)


def test_the_code_for_an_h100_tells_registers_and_spills():
    signature = {"x": "*fp32", "y": "*fp32", "width": "i32"}
    code = compiled_for_h100(softmax_kernel, signature, {"WIDTH": 1024}, num_warps=4)
    assert 8 <= code.registers <= 64 and code.spills == 0 and 0 < code.shared < 1024
    assert ".target sm_90" in code.ptx
    code = compiled_for_h100(spilling_kernel, {"x": "*fp32", "y": "*fp32"}, {"WIDTH": 256}, num_warps=4)
    assert code.spills > 0


@triton.jit
def square_kernel(x, y, WIDTH: tl.constexpr):
    block = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y + block, tl.dot(tl.load(x + block), tl.load(x + block)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_of_every_precision_runs_on_a_cpu(dtype):
    x, y = torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    with interpreting(sys.modules[__name__]):
        square_kernel[(1,)](x, y, WIDTH=16)
    torch.testing.assert_close(y, x.float() @ x.float())
