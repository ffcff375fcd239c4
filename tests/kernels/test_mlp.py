"""The MLP's kernels by Triton's interpreter: numbers are those of float64, and a model learns the same."""

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_RUN, random_gpt, random_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from triton_tools import interpreting

import train
from kqv.errors import UserError
from kqv.kernels import mlp
from kqv.training.fused_mlp import fuse_mlps
from kqv.training.sharding import full_tensor
from model import MLP, GPTConfig, NextToken

SHAPES = [(1, 8, 16), (130, 64, 264), (257, 96, 384), (5, 768, 3072)]  # N, C, D: also with parts of tiles
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def interpreted():
    with interpreting(mlp):
        yield


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def draw(*shape, dtype=torch.float32, std=1.0):
    return torch.randn(shape).mul_(std).to(dtype)


def activated(h, activation):
    return F.gelu(h, approximate="tanh") if activation == "gelu" else F.relu(h).square()


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# The most that rounding a number changes it. (The interpreter rounds to bfloat16 towards 0.)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize("N, C, D", SHAPES)
def test_a_product_with_its_activation_is_that_of_float64(N, C, D, activation, dtype):
    torch.manual_seed(0)
    x, weight = draw(N, C, dtype=dtype), draw(D, C, dtype=dtype, std=C**-0.5)
    for bias in (None, draw(D, dtype=dtype)):
        h = F.linear(x.double(), weight.double(), bias if bias is None else bias.double()).requires_grad_()
        exact = activated(h, activation)
        (exact_slope,) = torch.autograd.grad(exact.sum(), h)
        a, slope = mlp.linear_activation(x, weight, bias, activation)
        assert a.dtype == slope.dtype == dtype
        assert error(a, exact) < ROUNDING[dtype] and error(slope, exact_slope) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("N, C, D", SHAPES)
def test_a_product_times_slopes_is_that_of_float64(N, C, D, dtype):
    torch.manual_seed(0)
    dy, weight, slope = draw(N, C, dtype=dtype), draw(C, D, dtype=dtype), draw(N, D, dtype=dtype)
    found = mlp.product_times(dy, weight, slope)
    assert error(found, dy.double() @ weight.double() * slope.double()) < ROUNDING[dtype]


def test_gelu_is_finite_and_flat_far_from_zero():
    x, one = torch.tensor([[-1e4], [-30.0], [30.0], [1e4]]).repeat(1, 8), torch.eye(8)
    a, slope = mlp.linear_activation(x, one, None, "gelu")
    assert a.tolist() == x.relu().tolist() and slope.tolist() == (x > 0).float().tolist()


def pair(**shape):
    """An MLP and the same one, fused."""
    torch.manual_seed(1)
    plain = MLP(GPTConfig(n_embd=96, **shape))
    fused = MLP(GPTConfig(n_embd=96, **shape))
    fused.load_state_dict(plain.state_dict())
    fused.__class__ = mlp.FusedMLP
    return plain, fused


def gradients(module, x, dy):
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_under_autocast_the_fused_mlp_is_as_exact_as_the_plain_one(activation, bias):
    plain, fused = pair(activation=activation, bias=bias)
    x, dy = draw(2, 70, 96), draw(2, 70, 96)
    exact = gradients(plain.double(), x.double(), dy.double())
    plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = [gradients(module, x, dy.bfloat16()) for module in (fused, plain)]
    for ours, usual, right in zip(*found, exact, strict=True):
        assert ours.dtype == usual.dtype and error(ours, right) < 2 * error(usual, right) + 1e-6


def test_compiled_it_is_one_graph_with_the_same_gradients():
    _, fused = pair()
    x, dy = draw(2, 70, 96), draw(2, 70, 96)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for ours, usual in zip(gradients(compiled, x, dy), gradients(fused, x, dy), strict=True):
        torch.testing.assert_close(ours, usual)


@pytest.mark.parametrize("shape", [{}, {"bias": False, "activation": "relu2", "dropout": 0.2}], ids=str)
def test_a_model_with_fused_mlps_has_the_loss_and_gradients_of_the_plain_one(h100, shape):
    idx, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    found, calls = [], []
    for fused in (False, True):
        gpt = random_gpt(**shape).train()
        names = list(gpt.state_dict())
        if fused:
            fuse_mlps(gpt, CUDA, torch.bfloat16)
        assert list(gpt.state_dict()) == names
        for again in (False, True):
            block = gpt.transformer.h[0]
            if again:
                usual = block.forward
                block.forward = lambda *given: checkpoint(usual, *given, use_reentrant=False)  # noqa: B023
            torch.manual_seed(2)
            loss = NextToken(gpt)(idx, targets)
            found.append([loss, *torch.autograd.grad(loss, list(gpt.parameters()))])
            calls.append(fused)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(gpt.eval()(idx), random_gpt(**shape)(idx))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_many_processes_have_the_gradients_of_the_plain_model(h100, parallel):
    idx, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    gpt = random_gpt()
    expected = torch.autograd.grad(NextToken(gpt)(idx, targets), list(gpt.parameters()))
    fuse_mlps(gpt, CUDA, torch.bfloat16)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = NextToken(gpt)
        if parallel == "ddp":
            model = DistributedDataParallel(model)
        else:
            for part in (*gpt.transformer.h, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        model(idx, targets).backward()
        for parameter, gradient in zip(gpt.parameters(), expected, strict=True):
            torch.testing.assert_close(full_tensor(parameter.grad), gradient, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_what_it_cannot_train_is_refused_in_one_line(refusal, tiny_set, monkeypatch):
    line = refusal(train.main, *TINY_RUN, "--dataset=tiny", "--fused_mlp=True")
    assert "--fused_mlp=True needs an NVIDIA GPU such as the H100" in line and "--fused_mlp=False" in line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="needs an NVIDIA GPU such as"):
        fuse_mlps(random_gpt(), CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ({"activation": "swiglu"}, torch.bfloat16, "no kernel for --activation=swiglu"),
        ({"n_embd": 36}, torch.bfloat16, "multiples of 8, not n_embd=36 and n_inner=144"),
        ({}, torch.float32, "--dtype=bfloat16"),
    ],
)
def test_a_model_without_kernels_is_refused(h100, shape, dtype, words):
    with pytest.raises(UserError, match=words):
        fuse_mlps(random_gpt(**shape), CUDA, dtype)
