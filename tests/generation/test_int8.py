"""Weights in 8 bits: what a matrix loses, what is computed with it, and what memory it takes."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SHAPES, TINY_RUN, random_gpt, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.nn import functional as F

import bench
import export
import sample
import train
from kqv.device import cannot_compile
from kqv.errors import UserError
from kqv.generation.beams import beam_search
from kqv.generation.cpu_decoding import compiled_for_decoding
from kqv.generation.engine import Engine
from kqv.generation.int8 import Int8Linear, float_weights, keep_in_int8, quantised
from kqv.generation.sampling import PLAIN
from kqv.generation.stream import ContextWindow, generate
from model import GPT

GREEDY = replace(PLAIN, temperature=0)


def in_int8(dtype=torch.float32, **shape):
    """(A small GPT in int8, one whose matrices have the same numbers in float32)."""
    gpt = random_gpt(**shape)
    keep_in_int8(gpt, dtype)
    return gpt, GPT.from_weights(gpt.config, float_weights(gpt))


def random_numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_a_number_is_off_by_half_a_scale_at_most(numbers):
    int8, scale = quantised(torch.from_numpy(numbers))
    assert int8.dtype == torch.int8 and int8.abs().max() <= 127 and scale.dtype == torch.float32
    off = (int8.double() * scale.double()[:, None] - torch.from_numpy(numbers).double()).abs()
    assert (off <= scale.double()[:, None] * (0.5 + 1e-4)).all()
    assert torch.allclose(scale, torch.from_numpy(numbers).abs().amax(dim=1) / 127, rtol=0.004, atol=1.2e-38)
    assert torch.equal(scale, scale.bfloat16().float())


def test_a_row_of_zeros_stays_one_and_a_row_spoils_no_other():
    weight = torch.tensor([[0.0, 0.0], [1e30, -1e30], [1e-30, 6e-31]])
    int8, scale = quantised(weight)
    assert int8.tolist() == [[0, 0], [127, -127], [127, 76]]
    torch.testing.assert_close(int8 * scale[:, None], weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_noticed_as_they_are_without_int8(value):
    gpt = random_gpt()
    with torch.no_grad():
        gpt.transformer.h[0].mlp.c_fc.weight[3, 5] = value
    keep_in_int8(gpt, torch.float32)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(Engine(gpt), [[1, 2]], 3)


@pytest.mark.parametrize("compiling", [False, True], ids=["plain", "compiling"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [16, 24, 64, 192])
@pytest.mark.parametrize("shape", [(), (1, 1), (2,), (2, 3), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_product_is_that_of_the_same_numbers(monkeypatch, dtype, shape, width, bias, compiling):
    gpt = random_gpt(n_layer=1, n_embd=width, bias=bias)
    keep_in_int8(gpt, dtype)
    linear, x = gpt.transformer.h[0].mlp.c_fc, random_numbers(*shape, width).to(dtype)
    weight = linear.int8.double() * linear.scale.double()[:, None]
    expected = F.linear(x.double(), weight, linear.bias.double() if bias else None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    found = linear(x)
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = max(1e-5, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_sums_larger_than_any_number_of_float16_are_none_of_its_results():
    gpt = random_gpt(n_embd=1024, n_head=2, n_layer=1)
    keep_in_int8(gpt, torch.float16)
    linear = gpt.transformer.h[0].mlp.c_fc
    for rows in (1, 2, 50):
        assert linear(torch.full((rows, 1024), 50.0).half() * linear.int8[0].sign()).isfinite().all()


@settings(deadline=None, max_examples=20)
@given(family=FAMILIES, length=st.integers(1, 8))
def test_every_family_computes_what_it_does_with_the_same_numbers_in_float32(family, length):
    gpt, same = in_int8(**SHAPES[family])
    idx = random_ids(2, length)
    with torch.no_grad():
        torch.testing.assert_close(gpt(idx), same(idx), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("every_shape")
def test_texts_are_those_of_the_same_numbers_in_float32():
    gpt, same = in_int8()
    for texts in ([[1, 2, 3]], [[1], [2, 3, 4, 5], [6, 7]]):
        expected = generate(Engine(same), texts, 20, sampling=GREEDY)
        assert generate(Engine(gpt), texts, 20, sampling=GREEDY) == expected
    found, expected = (beam_search(Engine(model), [[1, 2]], 9, beams=3) for model in (gpt, same))
    assert [[h.ids for h in some] for some in found] == [[h.ids for h in some] for some in expected]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("every_shape")
def test_compiled_on_a_cpu_the_logits_are_the_plain_ones(dtype):
    if cannot_compile(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    gpt = random_gpt(std=0.2)
    keep_in_int8(gpt, dtype)
    for texts in ([[1, 2, 3]], [[1], [2, 3, 4, 5], [6, 7]]):
        logits = []
        for engine in (Engine(gpt), Engine(gpt, "compiled")):
            window = ContextWindow(engine, texts, 3)
            with torch.no_grad():
                logits += window.step(window.refill(), lambda logits: (logits,))
        tolerance = 1e-5 if dtype == torch.float32 else 0.05 * logits[0].abs().max().item()
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=tolerance)


# Memory


@pytest.mark.parametrize("tied", [True, False])
def test_the_matrices_take_a_byte_a_number_and_those_in_float32_are_freed(tied):
    gpt = random_gpt(n_embd=64, vocab_size=500, tied_head=tied)
    parameters, freed = gpt.num_parameters(), [weakref.ref(m.weight) for m in linears(gpt)]
    keep_in_int8(gpt, torch.bfloat16)
    gc.collect()
    assert not any(weight() is not None for weight in freed)
    assert all(type(module) is Int8Linear for module in linears(gpt)) and len(linears(gpt)) == 9
    assert gpt.num_parameters() == parameters
    matrices = 2 * 12 * 64**2 + 500 * 64
    rows = 2 * (3 + 1 + 4 + 1) * 64 + 500
    others = parameters - matrices + gpt.transformer.wpe.weight.numel()
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in (*gpt.parameters(), *gpt.buffers())}
    assert sum(kept.values()) == matrices + 4 * rows + 2 * others
    wte, head = gpt.transformer.wte, gpt.lm_head
    assert wte.int8 is head.int8 if tied else wte.weight.dtype == torch.bfloat16


def test_a_compiled_twin_has_the_same_numbers():
    gpt, _ = in_int8()
    twin = compiled_for_decoding(gpt)
    for ours, theirs in zip(linears(gpt), linears(twin), strict=True):
        assert ours.int8 is theirs.int8 and ours.scale is theirs.scale


def linears(gpt):
    return [module for module in gpt.modules() if isinstance(module, nn.Linear)]


# The commands


def test_a_trained_model_loses_little_and_writes_what_it_wrote(cli, tiny_set):
    assert cli(train.main, *TINY_RUN, "--dataset=tiny", "--max_iters=100", "--lr_decay_iters=100")[0] == 0
    losses = []
    for weights in ("float", "int8"):
        argv = ["--device=cpu", "--dtype=float32", "--evaluate=val", "--format=jsonl", f"--weights={weights}"]
        status, out, err = cli(sample.main, *argv)
        assert (status, err) == (0, "")
        losses.append(json.loads(out)["loss"])
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.005
    argv = ["--device=cpu", "--weights=int8", "--start=keys", "--max_new_tokens=30"]
    for more in (["--num_samples=3"], ["--beams=2"], ["--dtype=bfloat16"], ["--dtype=float16"]):
        status, out, err = cli(sample.main, *argv, *more)
        assert (status, err) == (0, "") and "keys" in out


def test_training_and_exporting_know_no_weights_in_int8(refusal):
    for main in (train.main, export.main):
        assert "weights" in refusal(main, "--weights=int8", status=2)


def test_bench_measures_generation_in_int8(cli):
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--vocab_size=100"]
    sizes = ["--batch_sizes=1,2", "--prompt_length=8", "--max_new_tokens=8", "--prefill_length=16"]
    status, out, err = cli(
        bench.main, "sample", *shape, *sizes, "--rounds=1", "--weights=int8", "--engine=plain"
    )
    assert (status, err) == (0, "")
    assert "weights int8" in out and "batch 2: " in out
