"""llama.cpp beside our own generation: whose weights it has, what is timed, and what is refused."""

import pytest
import torch
from conftest import SHAPES, random_gpt
from exports import clear

from kqv.errors import UserError
from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.measuring import llama_cpp
from kqv.measuring.machine import Machine
from kqv.text.tokenizers import ByteTokenizer

GREEDY = Sampling(temperature=0.0, top_k=1)


@pytest.fixture
def the_real_one():
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")


@pytest.mark.parametrize("family", SHAPES)
def test_it_writes_what_the_measured_weights_write(the_real_one, tmp_path, family):
    shape = {"vocab_size": 257, "block_size": 64, "n_embd": 64, "n_head": 4}
    gpt = random_gpt(**{**SHAPES[family], **shape}, std=0.2)
    llama_cpp.write_gguf(tmp_path / "it.gguf", gpt, "f32")
    other = llama_cpp.LlamaCpp(tmp_path / "it.gguf", 64)
    ids, expected = next(clear(gpt, ByteTokenizer(), 16, least=16))
    written = other.write(ids, 16, GREEDY)["choices"][0]["text"]
    assert [ord(char) - llama_cpp.FIRST_CHAR for char in written] == expected


def test_both_are_measured_in_each_round(the_real_one):
    gpt = random_gpt(vocab_size=100, block_size=64, n_embd=32).bfloat16()
    machine = Machine(torch.device("cpu"), torch.bfloat16, rounds=2)
    with torch.no_grad():
        found = llama_cpp.measure_in_turns(
            Engine(gpt), ["bf16", "q8_0"], [1] * 8, [2] * 55, 8, GREEDY, machine
        )
    assert list(found) == ["kqv", "llama.cpp bf16", "llama.cpp q8_0"]
    for figures in found.values():
        assert list(figures) == ["prefill tokens/s", "tokens/s"] and min(figures.values()) > 0


def test_it_writes_all_tokens_that_are_timed(the_real_one, tmp_path):
    """Also where the id that ends a text is the likeliest."""
    gpt = random_gpt(vocab_size=20, block_size=64, n_embd=32)
    with torch.no_grad():
        gpt.lm_head.weight[:-1] = 0
        gpt.transformer.ln_f.bias.copy_(gpt.lm_head.weight[-1] * 100)
    llama_cpp.write_gguf(tmp_path / "it.gguf", gpt, "f32")
    answer = llama_cpp.LlamaCpp(tmp_path / "it.gguf", 64).write([1] * 8, 24, GREEDY)
    assert (answer["timings"]["prompt_n"], answer["timings"]["predicted_n"]) == (8, 24)


@pytest.mark.parametrize(
    ("kinds", "shape", "device", "says"),
    [
        (["f32", "q3"], {}, "cpu", "'q3' is none of f32, f16, bf16, q8_0"),
        (["f32"], {}, "meta", "--device=cpu"),
        (["f32"], {"positions": "sinusoidal"}, "cpu", "sinusoidal"),
    ],
)
def test_what_it_can_not_run_is_said_first(kinds, shape, device, says):
    if "positions" in shape:
        pytest.importorskip("gguf")
        pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    with pytest.raises(UserError, match=says):
        llama_cpp.require_llama_cpp(kinds, random_gpt(**shape).config, torch.device(device))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install xllamacpp gguf"):
        llama_cpp.require_llama_cpp(["f32"], random_gpt().config, torch.device("cpu"))
