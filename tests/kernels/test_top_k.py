"""The kernels that search the k-th largest logit, and that draw among the k largest."""

from dataclasses import replace

import pytest
import torch
from triton_tools import compiled_for_h100, interpreting

from kqv.generation.sampling import PLAIN, draw

pytest.importorskip("triton", reason="triton is missing")
from kqv.kernels import top_k  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what a mask leaves out


def threshold(logits, k):
    with interpreting(top_k):
        return top_k.top_k_threshold(logits, k)


def drawn(logits, uniform, *settings):
    with interpreting(top_k):
        return top_k.draw_top_k(logits, uniform, *settings)


def rows(kind, V):
    torch.manual_seed(0)
    x = torch.randn(2, V) * 3
    return {
        "random": x,
        "with ties": x.round(),
        "all equal": torch.full_like(x, -1.5),
        "in order": x.sort(dim=-1).values,  # all of the largest stand side by side
        "of both infinities": torch.where(x.abs() < 1, x.sign() * torch.inf, x),
        "of the least and the greatest floats": torch.cat((x[:, 1:] * 1e38, x[:, :1] * 1e-45), dim=1),
    }[kind]


KINDS = ["random", "with ties", "all equal", "in order", "of both infinities"]
KINDS += ["of the least and the greatest floats"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_is_the_kth_largest(kind):
    for V, k in [(3000, 100), (65, 3), (65, 200), (17, 17), (400, 300)]:
        x = rows(kind, V)
        assert torch.equal(threshold(x, k), x.topk(min(k, V)).values[:, -1:]), (V, k)


def test_each_row_has_its_k():
    x, k = rows("random", 500)[:, :490], torch.tensor([1, 490])  # a slice: what is past it does not count
    assert threshold(x, k).flatten().tolist() == [x[0].max(), x[1].min()]
    assert torch.equal(threshold(x, torch.tensor(7)), x.topk(7).values[:, -1:])


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
        top_k.top_k_threshold(torch.zeros(1, 9, dtype=torch.bfloat16), 3)


@pytest.mark.parametrize("V", [50257, 151936])
def test_a_row_fits_into_registers(V):
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "maxima_kernel", {(-(-V // 1024), 1): lambda *given, **named: None})
        sizes = top_k.maxima_of(torch.empty(1, V), finite=True)[1]
    warps, constants = sizes["num_warps"], {name: sizes[name] for name in ("G_P", "GROUP", "MOST")}
    types = dict.fromkeys(("logits", "temperature", "min_p", "uniform", "threshold"), "*fp32")
    types |= dict.fromkeys(("maxima", "groups", "ks"), "*i32") | {"drawn": "*i64"}
    for kernel in (top_k.threshold_kernel, top_k.draw_kernel):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        code = compiled_for_h100(kernel, signature, constants, num_warps=warps)
        assert code.spills == 0
    signature = {"logits": "*fp32", "maxima": "*i32", "stride": "i32:16", "V": "i32", "G": "i32"}
    constants = {"GROUP": 16, "TILE": 64, "FINITE": True}
    code = compiled_for_h100(top_k.maxima_kernel, signature, constants, num_warps=4)
    assert code.spills == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_and_draws_the_same(kind):
    x, uniform = rows(kind, 50257).cuda(), torch.rand(2, 1, device="cuda")
    for k in (1, 200, 1000):
        assert torch.equal(top_k.top_k_threshold(x, k), x.topk(k).values[:, -1:])
    if kind in ("random", "in order"):
        sampling = replace(PLAIN, temperature=0.8, top_k=200)
        assert torch.equal(top_k.draw_top_k(x, uniform, 0.8, 200), draw(x, uniform, sampling))
