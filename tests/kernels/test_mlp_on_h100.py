"""The MLP's kernels on an H100: nothing spills, and the passes over (N, D) numbers are gone."""

import re
from types import SimpleNamespace

import pytest
import torch
from h100_code import H100, h100_code, in_own_process
from torch.nn import functional as F
from triton_tools import compiled_for_h100

from kqv.kernels import mlp
from kqv.training.fused_mlp import HAVE_KERNELS

ROWS, COLUMNS, DEPTH, HALF = (size.value for size in (mlp.ROWS, mlp.COLUMNS, mlp.DEPTH, mlp.HALF))
WRITTEN = dict.fromkeys(("a", "slope", "dh"), (ROWS, HALF))
TILES = {
    mlp.linear_activation_kernel: {"x": (ROWS, DEPTH), "weight": (COLUMNS, DEPTH), **WRITTEN},
    mlp.product_times_kernel: {"dy": (ROWS, DEPTH), "weight": (DEPTH, COLUMNS), **WRITTEN},
}


@pytest.mark.parametrize(
    "kernel, types, constants",
    [
        (mlp.linear_activation_kernel, {}, {"bias": None, "f": "gelu"}),
        (mlp.linear_activation_kernel, {"bias": "*bf16"}, {"f": "gelu"}),
        (mlp.linear_activation_kernel, {"bias": "*bf16"}, {"f": "relu2"}),
        (mlp.product_times_kernel, {}, {}),
    ],
    ids=["gelu", "gelu with bias", "relu2 with bias", "backward"],
)
def test_nothing_spills_and_products_overlap_with_copies(kernel, types, constants):
    sizes = dict.fromkeys(("N", "C", "D"), "i32:16")
    tiles = {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in TILES[kernel].items()}
    signature = {**tiles, **types, **sizes, "programs": "i32"}
    code = compiled_for_h100(kernel, signature, constants, **mlp.LAUNCH)
    assert code.spills == 0 and code.registers <= 224 and code.shared <= H100.shared_memory_per_block_optin
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in code.ptx  # the largest there are
    assert "wgmma.wait_group.sync.aligned 1;" in code.ptx.replace("\t", " ")  # the last one may still run
    assert re.search(r"cp\.async\.bulk\.tensor\.2d\.shared::\w+\.global", code.ptx)  # factors come by TMA


N, C, D = 64 * 1024, 768, 3072  # a micro-batch of 124M


def plain(x, norm, up, down):
    """The MLP's half of a block, and the gradients of |y|^2 / 2."""
    y = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (C,), norm), up), approximate="tanh"), down)
    return y, *torch.autograd.grad(y, (x, norm, up, down), y)


def fused(x, norm, up, down):
    y = x + mlp.MLPProducts.apply(F.layer_norm(x, (C,), norm), up, None, down, None, "gelu")
    return y, *torch.autograd.grad(y, (x, norm, up, down), y)


def both():
    """In a process of its own: what an H100 would run for the plain and the fused MLP's half of a block."""
    shapes = (N, C), (C,), (D, C), (C, D)
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    return SimpleNamespace(plain=h100_code(plain, tensors), fused=h100_code(fused, tensors))


def test_the_passes_of_gelu_are_gone():
    found = in_own_process(both)
    wide = 2 * N * D / 1e9  # GB of (N, D) numbers in bfloat16
    # Forward reads h and writes GELU's value, backward reads h and da and writes dh.
    assert found.plain.gigabytes - found.fused.gigabytes == pytest.approx(5 * wide, rel=0.01)
    assert found.plain.launches - found.fused.launches == 2
    # LayerNorm, its backward with the residual's gradient, and a sum that is left of its weight's gradient
    assert found.fused.launches <= 3 and found.fused.gigabytes < 0.61
    assert len(found.fused.calls) == len(found.plain.calls) == 6  # products


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, C, D", [(1, 8, 16), (257, 96, 384), (8192, 768, 3072)])
def test_on_the_device_the_numbers_are_those_of_float64(N, C, D, dtype):
    if torch.cuda.get_device_capability() not in HAVE_KERNELS:
        pytest.skip("the kernels are for an H100 or a B200")
    with torch.device("cuda"):
        x, weight, bias = torch.randn(N, C), torch.randn(D, C) / C**0.5, torch.randn(D)
        down = torch.randn(C, D)
    x, weight, bias, down = (tensor.to(dtype) for tensor in (x, weight, bias, down))
    h = F.linear(x.double(), weight.double(), bias.double()).requires_grad_()
    exact = F.gelu(h, approximate="tanh")
    (exact_slope,) = torch.autograd.grad(exact.sum(), h)
    a, slope = mlp.linear_activation(x, weight, bias, "gelu")
    dh = mlp.product_times(x, down, slope)
    for found, right in ((a, exact), (slope, exact_slope), (dh, x.double() @ down.double() * slope.double())):
        assert (found - right).norm() < torch.finfo(dtype).eps / 2 * right.norm()
