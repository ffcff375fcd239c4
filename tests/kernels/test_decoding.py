"""The decoding kernels: the numbers that the model itself computes, few launches, and code without spills."""

import copy
import importlib.util
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import MODERN, SHAPES, random_gpt, random_ids
from triton_tools import compiled_for_h100, interpreting

from kqv.kernels import decoding
from kqv.kernels.decoding import KernelDecoder, why_not
from model import GPT, GPTConfig, KVCache

pytest.importorskip("triton", reason="triton is missing")
from kqv.kernels import decode_kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the logarithm of 0

VARIANTS = {  # what SHAPES leave out
    **SHAPES,
    "llama3": {**MODERN, "rope_factor": 8.0, "rope_original": 6, "bias": True},
    "sinusoidal": {"positions": "sinusoidal", "n_embd": 18, "activation": "relu2", "norm": "rmsnorm"},
    "qwen2": {**MODERN, "qkv_bias": True, "n_head": 3, "n_embd": 24},
    "layernorm of heads": {"bias": False, "qk_norm": True, "n_embd": 20, "n_head": 1},
}
REAL = {
    "124M": GPTConfig(),
    "SmolLM2-135M": GPTConfig(
        **{**MODERN, "n_kv_head": 3}, n_layer=30, n_head=9, n_embd=576, n_inner=1536, vocab_size=49152
    ),
    "Qwen3-0.6B": GPTConfig(
        **{**MODERN, "n_kv_head": 8},
        **{"n_layer": 28, "n_head": 16, "n_embd": 1024, "n_inner": 3072, "vocab_size": 151936},
        **{"head_size": 128, "qk_norm": True},
    ),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one program after another, in milliseconds each."""
    monkeypatch.setattr(decoding, "PROCESSORS", 1)
    monkeypatch.setattr(decoding, "ROWS", 16)


def caches_of(gpt, lengths, count, slots=None):
    """`count` equal KVCaches with rows of `lengths` tokens. Past a row's length they hold NaN."""
    dtype = gpt.lm_head.weight.dtype
    caches = [KVCache(gpt.config, len(lengths), slots, dtype=dtype) for _ in range(count)]
    for cache in caches:
        torch.manual_seed(0)
        for kept in cache.buffers():
            if kept.dim() == 4:
                kept.normal_()
                for row, length in zip(kept, lengths, strict=True):
                    row[length:] = torch.nan
        cache.length.copy_(torch.tensor(lengths))
    return caches


@torch.no_grad()
def decoded(gpt, tokens, cache):
    """Logits (B, V) of the kernels, by the interpreter."""
    with interpreting(decode_kernels):
        return KernelDecoder(gpt)(tokens, cache)


@torch.no_grad()
def check_step(gpt, lengths, span=None, slots=None):
    """One step of the kernels does what the model does: to the logits, the cache and the lengths."""
    expected, found = caches_of(gpt, lengths, 2, slots)
    for cache in (expected, found):
        cache.span = span or cache.span
        for kept in cache.buffers():
            kept.nan_to_num_() if cache is expected and kept.dim() == 4 else None  # the mask is a sum there
    tokens = random_ids(len(lengths), 1, below=gpt.config.vocab_size)
    logits = gpt(tokens, cache=expected)[:, 0]
    torch.testing.assert_close(decoded(gpt, tokens, found), logits, rtol=1e-5, atol=1e-5)
    assert found.length.tolist() == expected.length.tolist() == [length + 1 for length in lengths]
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        for row, length in enumerate(lengths):
            for name in ("k", "v"):
                kept = getattr(mine, name)[row]
                torch.testing.assert_close(kept[: length + 1], getattr(theirs, name)[row][: length + 1])
                assert kept[length + 1 :].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_the_models(variant):
    check_step(random_gpt(**VARIANTS[variant]), [5, 0, 7])


@pytest.mark.parametrize("family", SHAPES)
def test_the_kernels_write_the_models_tokens(family):
    gpt = random_gpt(**SHAPES[family])
    expected, found = (KVCache(gpt.config, 2) for _ in range(2))
    tokens = other = torch.tensor([[3], [11]])
    written = []
    for _ in range(4):
        with torch.no_grad():
            tokens = gpt(tokens, cache=expected)[:, 0].argmax(dim=-1, keepdim=True)
        other = decoded(gpt, other, found).argmax(dim=-1, keepdim=True)
        assert other.tolist() == tokens.tolist()
        written += tokens.flatten().tolist()
    assert len(set(written)) > 1


@pytest.mark.parametrize("span", [130, 192, 200])
def test_attention_in_splits_is_attention(span, monkeypatch):
    monkeypatch.setattr(decoding, "PROCESSORS", 99)
    assert decoding.splits_of(span, 6) == {130: (4, 64), 192: (4, 64), 200: (4, 64)}[span]
    gpt = random_gpt(block_size=200, n_layer=1, n_kv_head=1)
    check_step(gpt, [64, 129, 3], span, slots=192 if span < 200 else 200)  # past one split, past two, in one


SIZES = {
    "heads of 16 and of no power of two": {"head_size": 20, "n_head": 3, "n_kv_head": 3, "n_inner": 50},
    "heads of 128": {"head_size": 128, "n_head": 1, "n_kv_head": 1},
    "124M's channels": {"n_embd": 768, "n_head": 12, "n_inner": 64, "std": 0.03},
    "SmolLM2's channels": {**MODERN, "n_embd": 576, "n_head": 9, "n_kv_head": 3, "n_inner": 100, "std": 0.03},
    "GPT-2's ids": {"vocab_size": 50257},
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_are_no_powers_of_two(size, monkeypatch):
    monkeypatch.setattr(decoding, "ROWS", 512)  # or as many as the channels allow
    check_step(random_gpt(**{"n_layer": 1, **SIZES[size]}), [3])


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in SHAPES), ("gpt2", torch.float16)]
)
def test_half_precision_is_near_float64(family, dtype):
    gpt = random_gpt(**SHAPES[family]).to(dtype)
    cache, exact = caches_of(gpt, [6], 1)[0], caches_of(gpt, [6], 1)[0].double()
    tokens = random_ids(1, 1)
    with torch.no_grad():
        for kept in exact.buffers():
            kept.nan_to_num_() if kept.is_floating_point() else None
        expected = copy.deepcopy(gpt).double()(tokens, cache=exact)[:, 0]
    found = decoded(gpt, tokens, cache)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_model_that_is_not_finite_says_so():
    gpt = random_gpt()
    gpt.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.nan
    assert decoded(gpt, torch.tensor([[1]]), KVCache(gpt.config, 1)).isnan().all()


def test_more_texts_than_the_kernels_read_are_refused():
    gpt = random_gpt()
    with pytest.raises(ValueError, match=r"one token of at most 8 texts, not \(9, 1\)"):
        KernelDecoder(gpt)(torch.zeros(9, 1, dtype=torch.long), KVCache(gpt.config, 9))


# What an H100 would run


def launches_of(config, dtype=torch.bfloat16, texts=1, span=1024):
    """The launches of a step, as (kernel, {argument: value}, warps). Nothing is computed."""
    found = []

    def recorded(kernel):
        def launch(*given, num_warps=4, **named):
            found.append((kernel, dict(zip(kernel.arg_names, given, strict=False)) | named, num_warps))

        return defaultdict(lambda: launch)  # for each grid

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(decode_kernels) if name.endswith("_kernel")]:
            patch.setattr(decode_kernels, name, recorded(getattr(decode_kernels, name)))
        cache = KVCache(config, texts, span, dtype=dtype)
        KernelDecoder(GPT(config).to(dtype))(torch.zeros(texts, 1, dtype=torch.long), cache)
    return found


def compiled(kernel, given, warps):
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or type(value) is int and value == 1:
            constants[parameter.name] = value
        elif type(value) is int:
            signature[parameter.name] = "i32:16" if value % 16 == 0 else "i32"
        else:
            signature[parameter.name] = types[value.dtype]
    return compiled_for_h100(kernel, signature, constants, num_warps=warps)


@pytest.mark.parametrize("model", REAL)
def test_a_step_has_five_launches_a_layer_and_two(model):
    assert len(launches_of(REAL[model])) == 5 * REAL[model].n_layer + 2


@pytest.mark.parametrize("texts", [1, 8])
@pytest.mark.parametrize("model", REAL)
def test_what_the_kernels_compute_with_fits_into_registers(model, texts, monkeypatch):
    monkeypatch.undo()
    code = {}
    for kernel, given, warps in launches_of(replace(REAL[model], n_layer=1), texts=texts):
        code[kernel.__name__, given.get("ACTIVATION"), given.get("N")] = compiled(kernel, given, warps)
    assert len(code) == 7
    assert {name: found.spills for name, found in code.items() if found.spills} == {}
    assert max(found.registers for found in code.values()) <= 168


def test_why_not_says_what_is_missing(monkeypatch):
    gpt, gpu = random_gpt(), torch.device("cuda", 0)
    assert why_not(gpt, torch.device("cpu")) == "the kernels need an NVIDIA GPU, but the device is cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not(gpt, gpu) == "the kernels need compute capability 8.0, but the GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_not(gpt, gpu) is None
    assert "not float64" in why_not(random_gpt().double(), gpu)
    assert "32768 channels at most, but the model has 40000" in why_not(random_gpt(n_inner=40000), gpu)
    assert "heads of 256 channels at most, not 300" in why_not(random_gpt(head_size=300), gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not(gpt, gpu) == "Triton is not installed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_a_cuda_graph_is_the_models(variant, monkeypatch):
    monkeypatch.undo()
    gpt = random_gpt(**VARIANTS[variant]).cuda()
    if reason := why_not(gpt, gpt.lm_head.weight.device):
        pytest.skip(reason)
    expected, found, other = (cache.cuda() for cache in caches_of(gpt, [5, 0, 7], 3))
    for kept in (*expected.buffers(), *found.buffers()):
        kept.nan_to_num_() if kept.is_floating_point() else None
    tokens, decoder, graph = random_ids(3, 1).cuda(), KernelDecoder(gpt), torch.cuda.CUDAGraph()
    decoder(tokens, other)  # compiles
    with torch.cuda.graph(graph):
        logits = decoder(tokens, found)
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(logits, gpt(tokens, cache=expected)[:, 0], rtol=1e-4, atol=1e-4)
    assert found.length.tolist() == [6, 1, 8]
    for mine, theirs in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
