"""The kernels that search the k-th largest logit, and that draw among the k largest."""

from dataclasses import replace

import pytest
import torch
from triton_tools import compiled_for_h100, interpreting

from kqv.generation.sampling import PLAIN, Sampler, Sampling, Work

pytest.importorskip("triton", reason="triton is missing")
from kqv.generation.kernel_sampler import KernelSampler, kind_for  # noqa: E402
from kqv.kernels import top_k  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what a mask leaves out


def drawn(logits, uniform, *settings):
    with interpreting(top_k):
        return top_k.draw_top_k(logits, uniform, *settings)


def draw(logits, uniform, sampling):
    """The ids that the sampler draws."""
    B, V = logits.shape
    sampler = Sampler(Work.of(sampling, V), B, V, logits.device)
    sampler.begin(sampling, [[]] * B)
    return sampler.draw(logits, uniform)


@pytest.mark.parametrize("settings", [(0.8, 40, 0.0), (1.7, 5, 0.05), (0.3, 256, 0.0), (1.0, 1, 0.0)])
def test_what_is_drawn_is_what_the_sampler_draws(settings):
    temperature, k, min_p = settings
    sampling = replace(PLAIN, temperature=temperature, top_k=k, min_p=min_p)
    torch.manual_seed(1)
    for V in (1500, 65):
        x, uniform = torch.randn(6, V + 3)[:, :V] * 2, torch.rand(6, 1)
        uniform[0], uniform[1] = 0, 0.999
        assert torch.equal(drawn(x, uniform, *settings), draw(x, uniform, sampling)), V
        tensors = torch.tensor([temperature]), torch.tensor(k), torch.tensor([min_p])
        assert torch.equal(drawn(x, uniform, *tensors), draw(x, uniform, sampling))


def test_equal_logits_are_drawn_alike():
    x, uniform = torch.zeros(20, 640), torch.arange(20)[:, None] / 20
    ids = drawn(x, uniform, 1.0, 40).flatten()
    assert len(ids.unique()) == 20 and ids.min() >= 0 and ids.max() < 640


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_draws_no_id(wrong):
    x = torch.randn(2, 100)
    x[1, 77] = wrong
    assert (drawn(x, torch.full((2, 1), 0.5), 1.0, 10).flatten() >= 0).tolist() == [True, False]


def test_logits_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="rows of float32, not bfloat16"):
        top_k.draw_top_k(torch.zeros(1, 9, dtype=torch.bfloat16), torch.zeros(1, 1), 1.0, 3)


@pytest.mark.parametrize("V", [50257, 151936])
def test_a_row_fits_into_registers(V):
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "maxima_kernel", {(-(-V // 1024), 1): lambda *given, **named: None})
        sizes = top_k.maxima_of(torch.empty(1, V))[1]
    warps, constants = sizes["num_warps"], {name: sizes[name] for name in ("G_P", "GROUP", "MOST")}
    types = dict.fromkeys(("logits", "temperature", "min_p", "uniform", "threshold"), "*fp32")
    types |= dict.fromkeys(("maxima", "groups", "ks"), "*i32") | {"drawn": "*i64"}
    kernel = top_k.draw_kernel
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    code = compiled_for_h100(kernel, signature, constants, num_warps=warps)
    assert code.spills == 0
    signature = {"logits": "*fp32", "maxima": "*i32", "stride": "i32:16", "V": "i32", "G": "i32"}
    constants = {"GROUP": 16, "TILE": 64}
    code = compiled_for_h100(top_k.maxima_kernel, signature, constants, num_warps=4)
    assert code.spills == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same():
    torch.manual_seed(0)
    x, uniform = 3 * torch.randn(4, 50257, device="cuda"), torch.rand(4, 1, device="cuda")
    for k in (1, 40, 200):
        sampling = replace(PLAIN, temperature=0.8, top_k=k)
        assert torch.equal(top_k.draw_top_k(x, uniform, 0.8, k), draw(x, uniform, sampling))


SETTINGS = [
    {"top_k": 40},
    {"top_k": 40, "min_p": 0.05},
    {"top_k": 0},
    {"top_k": 400},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 40, "temperature": 0.0},
    {"top_k": 40, "repetition_penalty": 1.3},
    {"top_k": 40, "logprobs": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_engine_with_kernels_samples_as_the_others(settings):
    sampling, given = Sampling(**{"temperature": 0.8, **settings}), []
    torch.manual_seed(2)
    logits, uniform = 2 * torch.randn(5, 700), torch.rand(5, 1)
    logits[3, 5] = torch.nan
    work = Work.of(sampling, 650, rounded=True)
    for kind in (Sampler, kind_for(sampling, work)):
        sampler = kind(work, 5, 650, logits.device)
        sampler.begin(sampling, [[1, 2, 3]] * 5)
        with interpreting(top_k):
            given.append(sampler(logits, uniform))
    assert given[0][0].flatten()[3] == -1
    assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(*given, strict=True))


def test_the_kernels_draw_where_they_can(monkeypatch):
    kinds = [kind_for(s, Work.of(s, 650, rounded=True)) for s in (Sampling(**one) for one in SETTINGS)]
    assert [kind is KernelSampler for kind in kinds] == [True, True] + [False] * 6
    sampling = Sampling(temperature=0.8, top_k=40)
    sampler = KernelSampler(Work.of(sampling, 650, rounded=True), 2, 650, "cpu")
    sampler.begin(sampling, [[1]] * 2)
    monkeypatch.setattr(torch.Tensor, "topk", None)
    with interpreting(top_k):
        assert sampler(torch.randn(2, 650), torch.rand(2, 1))[0].shape == (2, 1)
