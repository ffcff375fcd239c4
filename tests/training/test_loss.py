"""loss.py: in chunks the same numbers as at once, without the memory for all logits, and no product more."""

import functools
import shutil
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import random_gpt, random_ids
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kqv.training import loss
from kqv.training.float8 import GRADIENT_SCALE, gradient_in_float8
from model import NextToken
from model import next_token_loss as model_loss

N, V, C = 64, 128, 8  # tokens, vocabulary, channels
IN_CHUNKS = N * V // 8


@contextmanager
def logits_at_once(count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS_AT_ONCE", count)
        patch.setattr(loss, "LOGITS_AT_ONCE_COMPILED", count)
        patch.setattr(loss, "ROWS", 1)
        yield


def inputs(N=N, V=V, C=C, uncounted=(), scale=1.0):
    """x (N, C), weight (V, C), both of which want a gradient, and targets (N,)."""
    numbers = torch.Generator().manual_seed(N + 100 * V + 10000 * C)
    x = torch.randn(N, C, generator=numbers, requires_grad=True)
    weight = (scale * torch.randn(V, C, generator=numbers)).requires_grad_()
    targets = torch.randint(V, (N,), generator=numbers)
    targets[list(uncounted)] = -1
    return x, weight, targets


def plain_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)


def with_gradients(function, x, weight, targets, upstream=1.0, context=None):
    """The loss, and upstream times its gradients of x and weight."""
    with context or nullcontext():
        found = function(x, weight, targets)
    return [found.detach(), *torch.autograd.grad(found * upstream, (x, weight))]


def error(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 9)),  # N, V, C
    at_once=st.integers(1, 400),
    uncounted=st.sets(st.integers(0, 28)),
)
@example(shape=(7, 10, 3), at_once=20, uncounted={0, 1, 2})  # none counts in the first chunk
@example(shape=(3, 40, 3), at_once=1, uncounted=set())  # not even one token's logits fit
def test_loss_and_gradients_are_those_of_all_logits_at_once(shape, at_once, uncounted):
    x, weight, targets = inputs(*shape, uncounted=[n for n in uncounted if n < shape[0] - 1])  # never all
    with logits_at_once(at_once):
        found = with_gradients(loss.next_token_loss, x, weight, targets, upstream=3.0)
    expected = with_gradients(plain_loss, x, weight, targets, upstream=3.0)
    for tensor, expectation in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, expectation, rtol=1e-5, atol=2e-6)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(2, 40), st.integers(1, 9)),  # N, V, C
    padding=st.integers(0, 5),
    at_once=st.integers(1, 400),
    smoothing=st.sampled_from([0.1, 0.5, 0.9]),
    uncounted=st.sets(st.integers(0, 18)),
)
def test_label_smoothing_is_torchs_over_the_ids_that_are_no_padding(
    shape, padding, at_once, smoothing, uncounted
):
    N, V, C = shape
    ids = max(1, V - padding)
    x, weight, targets = inputs(N, V, C, uncounted=[n for n in uncounted if n < N - 1])
    targets = targets.clamp(max=ids - 1)

    def ours(x, weight, targets):
        return loss.next_token_loss(x, weight, targets, ids, smoothing)

    def plain(x, weight, targets):
        logits = F.linear(x, weight)[:, :ids]
        return F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing)

    with logits_at_once(at_once):
        found = with_gradients(ours, x, weight, targets, upstream=3.0)
        with torch.no_grad():
            evaluated = ours(x, weight, targets)
    expected = with_gradients(plain, x, weight, targets, upstream=3.0)
    for tensor, expectation in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, expectation, rtol=1e-5, atol=2e-6)
    plain_logits = F.linear(x, weight)[:, :ids]
    torch.testing.assert_close(evaluated, F.cross_entropy(plain_logits, targets, ignore_index=-1).detach())


def test_the_gradient_of_a_bfloat16_weight_is_summed_in_float32():
    """As sharded training has it: its weights are gathered in bfloat16."""
    x, weight, targets = (tensor.detach() for tensor in inputs(N=2048, V=50, C=16))
    truth = with_gradients(plain_loss, x.requires_grad_(), weight.requires_grad_(), targets)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, weight)]
    errors = {}
    for chunks in (2, 512):
        with logits_at_once(2048 * 50 // chunks):
            found = with_gradients(loss.next_token_loss, *low, targets)
        assert found[2].dtype == torch.bfloat16
        errors[chunks] = error(found[2], truth[2])
    assert errors[512] < 1.1 * errors[2]


def test_in_bfloat16_the_gradients_are_as_near_to_the_truth_as_without_chunks():
    x, weight, targets = inputs(N=512, V=200, C=32, uncounted=[3, 100], scale=0.3)
    truth = with_gradients(plain_loss, x, weight, targets)
    autocast = torch.autocast("cpu", torch.bfloat16)
    plain = with_gradients(plain_loss, x, weight, targets, context=autocast)
    with logits_at_once(512 * 200 // 8):
        found = with_gradients(loss.next_token_loss, x, weight, targets, context=autocast)
    assert found[0].dtype == found[1].dtype == found[2].dtype == torch.float32
    assert found[0].item() == pytest.approx(truth[0].item(), abs=1e-2)
    assert 1e-4 < error(plain[2], truth[2]) < 1e-2  # it did compute in bfloat16
    for tensor, without_chunks, exact in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert 1e-4 < error(tensor, exact) < 1.5 * error(without_chunks, exact)


def test_many_chunks_are_summed_in_the_precision_of_the_weights():
    x, weight, targets = inputs(N=4096, V=16, C=8)
    truth = with_gradients(plain_loss, x, weight, targets)
    with logits_at_once(4 * 16):  # 1024 chunks: a sum in bfloat16 would soon take no more of them
        autocast = torch.autocast("cpu", torch.bfloat16)
        found = with_gradients(loss.next_token_loss, x, weight, targets, context=autocast)
    assert error(found[2], truth[2]) < 1e-2
    assert found[0].item() == pytest.approx(truth[0].item(), abs=1e-2)


def test_in_float16_no_gradient_is_too_small():
    """The mean over 4096 tokens of probabilities of 1/1024: 2e-7, where float16 has three values left."""
    x, weight, targets = inputs(N=4096, V=1024, C=16, scale=0.02)
    targets %= 512  # the other half of the vocabulary gets the small gradients alone
    truth = with_gradients(plain_loss, x, weight, targets)
    with logits_at_once(4096 * 1024 // 8):
        autocast = torch.autocast("cpu", torch.float16)
        found = with_gradients(loss.next_token_loss, x, weight, targets, 65536.0, autocast)
    assert found[0].item() == pytest.approx(truth[0].item(), abs=1e-2)
    assert error(found[1] / 65536, truth[1]) < 1e-2
    assert error(found[2][512:] / 65536, truth[2][512:]) < 1e-2
    assert error(found[2] / 65536, truth[2]) < 1e-2


def products(function, *arguments):
    """(floating-point operations in matrix products, what the function returned)"""
    with FlopCounterMode(display=False) as counter:
        found = function(*arguments)
    return counter.get_total_flops(), found


def test_chunks_cost_no_product_more():
    arguments = inputs()
    assert products(with_gradients, plain_loss, *arguments)[0] == 3 * 2 * N * V * C
    with logits_at_once(IN_CHUNKS):
        assert products(with_gradients, loss.next_token_loss, *arguments)[0] == 3 * 2 * N * V * C


def test_without_a_backward_pass_no_gradient_is_computed_or_kept():
    arguments = inputs()
    with logits_at_once(IN_CHUNKS), torch.no_grad(), Allocations() as made:
        count, found = products(loss.next_token_loss, *arguments)
    assert count == 2 * N * V * C
    assert not found.requires_grad and found.grad_fn is None
    assert (V, C) not in made.shapes and (N, C) not in made.shapes  # as gradients would be
    assert found.item() == pytest.approx(plain_loss(*arguments).item(), rel=1e-5)


class Allocations(TorchDispatchMode):
    """The shapes of all tensors that operations make, other than views of a tensor that was there."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            tensors = result if isinstance(result, (tuple, list)) else [result]
            self.shapes += [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_as_large_as_all_logits(dtype):
    arguments = inputs(uncounted=[5])
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    largest = {}
    for function in (plain_loss, loss.next_token_loss):
        with logits_at_once(IN_CHUNKS), Allocations() as made:
            with_gradients(function, *arguments, context=autocast)
        largest[function] = max(torch.Size(shape).numel() for shape in made.shapes)
    assert largest == {plain_loss: N * V, loss.next_token_loss: IN_CHUNKS}


@settings(deadline=None, max_examples=50)
@given(ids=st.integers(1, 40), rows=st.integers(0, 30), at_once=st.sampled_from([1, 100, 10**9]))
@example(ids=19, rows=0, at_once=10**9)
def test_rows_that_pad_the_vocabulary_have_no_part_in_the_loss(ids, rows, at_once):
    x, weight, targets = inputs(20, ids, 5, uncounted=[3])
    expected = with_gradients(plain_loss, x, weight, targets)
    padded = torch.cat([weight.detach(), torch.full((rows, 5), 9.0)]).requires_grad_()
    for function in (loss.next_token_loss, model_loss):
        with logits_at_once(at_once):
            found = with_gradients(lambda *args: function(*args, ids), x, padded, targets)  # noqa: B023
        assert not found[2][ids:].any()
        for tensor, expectation in zip((*found[:2], found[2][:ids]), expected, strict=True):
            torch.testing.assert_close(tensor, expectation, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_padding_has_no_part_in_lower_precision_too(dtype):
    x, weight, targets = inputs(20, 60, 5)
    padded = torch.cat([weight.detach(), torch.full((4, 5), 9.0)]).requires_grad_()
    for at_once in (300, 10**9):
        with logits_at_once(at_once), torch.autocast("cpu", dtype):
            found = with_gradients(lambda *args: loss.next_token_loss(*args, 60), x, padded, targets)
        assert not found[2][60:].any() and found[2].isfinite().all()
        assert found[0].item() == pytest.approx(plain_loss(x, weight, targets).item(), abs=2e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_learns_from_chunks_what_it_learns_from_all_logits(bias):
    gpt, idx, targets = random_gpt(bias=bias).train(), random_ids(3, 8), random_ids(3, 8, seed=1)
    targets[0, :3] = targets[2, 7] = -1
    expected, objective = NextToken(gpt)(idx, targets), NextToken(gpt, loss.next_token_loss)
    with logits_at_once(100), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", None)  # the plain way
        found = objective(idx, targets)
    assert found.shape == () and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(one, list(gpt.parameters())) for one in (found, expected))
    for name, gradient, expectation in zip(dict(gpt.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(gradient, expectation, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_compiled_the_chunks_give_what_they_give_eagerly(monkeypatch, backend, dtype, tolerance):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    of_chunk = CompileCounterWithBackend(backend)  # graphs of the work on one chunk's logits
    of_model = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss.cross_entropy, backend=of_chunk)
    monkeypatch.setattr(loss, "compiled_cross_entropy", lambda: compiled)
    gpt, idx, targets = random_gpt(n_layer=1), random_ids(3, 8), random_ids(3, 8, seed=1)
    targets[1, 2] = -1
    objective = NextToken(gpt, loss.next_token_loss)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    found = []
    with logits_at_once(100):  # 24 tokens in 5 chunks of 5
        for model in (objective, torch.compile(objective, backend=of_model)):
            assert of_chunk.frame_count == 0  # uncompiled, the model compiles nothing
            with autocast:
                mean = model(idx, targets)
            with torch.no_grad(), autocast:
                assert model(idx, targets).item() == pytest.approx(mean.item(), rel=tolerance)
            found.append([mean, *torch.autograd.grad(mean, list(gpt.parameters()))])
    # With and without gradients: all chunks have one shape, and the model is one graph around them.
    assert of_chunk.frame_count == of_model.frame_count == 2
    torch._dynamo.reset()  # this code was compiled for another LOGITS_AT_ONCE
    for eager, compiled in zip(*found, strict=True):
        assert error(compiled, eager) < tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_are_alike_and_of_whole_tiles_and_hold_no_more_logits_than_they_may(compiled):
    V, most = 50304, loss.LOGITS_AT_ONCE_COMPILED if compiled else loss.LOGITS_AT_ONCE
    for N in (1, 1000, 64 * 1024, 63 * 1000, 8 * 2048 + 1):
        chunks, rows = loss.split(N, V, compiled)
        assert (chunks - 1) * rows < N <= chunks * rows  # none is empty
        assert chunks == 1 or rows % 128 == 0
        assert rows * V <= most + 128 * V
    assert loss.split(64 * 1024, V, compiled) == ((4, 16384) if compiled else (13, 5120))


@pytest.fixture
def float8():
    """next_token_loss in float8, where this torch has such products on a CPU."""
    low = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(low, low.T, torch.ones(()), torch.ones(()), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no products in float8 on a CPU: {error}")
    return functools.partial(loss.next_token_loss, float8=True)


@pytest.mark.parametrize("at_once", [10**9, 128 * 320])
def test_in_float8_the_loss_and_its_gradients_are_near_the_truth(float8, at_once):
    """A number in e4m3 is off by 2.2% on average, one in e5m2 by 4.5%, and many are added up."""
    x, weight, targets = inputs(N=500, V=320, C=64, uncounted=[3, 100], scale=0.1)
    truth = with_gradients(plain_loss, x, weight, targets)
    with logits_at_once(at_once), torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(float8, x, weight, targets)
        with torch.no_grad():  # an evaluation has no product in float8
            evaluated, plain = float8(x, weight, targets), loss.next_token_loss(x, weight, targets)
    assert torch.equal(evaluated, plain)
    assert found[0].item() == pytest.approx(truth[0].item(), abs=1e-2)
    assert 0.01 < error(found[1], truth[1]) < 0.06
    assert error(found[2], truth[2]) < 0.01
    assert not found[1][3].any()  # a token that does not count


def test_float8_holds_a_gradient_of_any_size():
    """From that of the right id to the probability of one of 50,000, and far below."""
    gradient = torch.tensor([-1.0, 1.0, 1 / 50304, 1e-8])
    found = gradient_in_float8(gradient).float() / GRADIENT_SCALE
    torch.testing.assert_close(found, gradient, rtol=0.125, atol=0)


class OnCUDA(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_on_a_gpu_no_part_of_the_sum_is_rounded(monkeypatch):
    """There, torch.addmm can add the product of two bfloat16 matrices to a float32 one."""

    def addmm(total, a, b, out_dtype, out):
        assert total is out and out_dtype == torch.float32
        out.copy_(total + a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 64, generator=numbers).bfloat16() for _ in range(2))
    errors = []
    for total in (torch.zeros(64, 64), torch.zeros(64, 64).as_subclass(OnCUDA)):
        for start in range(0, 512, 8):
            loss.add_product(total, a[start : start + 8].T, b[start : start + 8])
        errors.append(error(total.as_subclass(torch.Tensor), a.double().T @ b.double()))
    assert errors[0] > 1e-3 and errors[1] < 1e-6


GPU = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(GPU < (8, 0), reason="needs a CUDA device with bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_on_a_real_gpu(dtype):
    a, b = (torch.randn(4096, 256, device="cuda", dtype=dtype) for _ in range(2))
    total = torch.zeros(256, 256, device="cuda")
    for start in range(0, 4096, 128):
        loss.add_product(total, a[start : start + 128].T, b[start : start + 128])
    assert error(total, a.double().T @ b.double()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(GPU < (8, 9), reason="needs a CUDA device with products in float8")
@pytest.mark.parametrize("compiled", [False, True])
def test_float8_on_a_real_gpu(compiled):
    arguments = inputs(N=1000, V=50304, C=256, uncounted=[3], scale=0.02)
    x, weight, targets = (tensor.detach().cuda() for tensor in arguments)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    truth = with_gradients(plain_loss, x, weight, targets)
    ours = functools.partial(loss.next_token_loss, float8=True)
    ours = torch.compile(ours) if compiled else ours
    found = with_gradients(ours, x, weight, targets, context=torch.autocast("cuda", torch.bfloat16))
    assert found[0].item() == pytest.approx(truth[0].item(), abs=1e-2)
    assert error(found[1], truth[1]) < 0.06 and error(found[2], truth[2]) < 0.02
