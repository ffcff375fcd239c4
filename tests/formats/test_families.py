"""
Models of every family, random and small, in the real transformers and here: folders read, written, refused.
"""

import json
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import TINY_RUN, logits_of, random_gpt, random_ids, randomise, write_text
from exports import assert_one_line, save_run, write_json
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import export
import prepare
import sample
import train
from kqv.errors import UserError
from kqv.formats import families, huggingface, loading
from kqv.generation.engine import Engine
from kqv.text.tokenizers import ByteTokenizer
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}

GPT2 = {
    **{"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    **{"bos_token_id": None, "eos_token_id": None},
}

MODELS = {  # name: model_type, changes of SMALL
    "llama": ("llama", {}),
    "llama, tied, heads of their own size": ("llama", {"tie_word_embeddings": True, "head_dim": 10}),
    "llama 3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "num_key_value_heads": 1}),
    "llama, of many keys": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 0.1}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "arcee": ("arcee", {}),
    "arcee, tied": ("arcee", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 0.1}),
}


def theirs_of(model_type, seed=0, **changes):
    """A random model of transformers, whose every number counts."""
    small = GPT2 if model_type == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(model_type, **{**small, **changes})
    torch.manual_seed(seed)
    return randomise(transformers.AutoModelForCausalLM.from_config(config), std=0.3).eval()


@cache
def model_and_folder(name):
    """One of MODELS in transformers, and the folder that it wrote; tests only read both."""
    model_type, changes = MODELS[name]
    model, temporary = theirs_of(model_type, **changes), TemporaryDirectory(prefix="kqv-family-")
    model.save_pretrained(temporary.name)
    model.temporary = [temporary]  # it lives as long as the model
    return model, Path(temporary.name)


def ours_of(folder):
    """The GPT in a folder."""
    return loading.model_of(huggingface.load(str(folder)), folder)


def written(path, gpt, *options):
    """The folder that export.py writes of a GPT."""
    run = path.with_name(f"{path.name}-run")
    save_run(run, ByteTokenizer(), gpt)
    export.main([f"--out_dir={run}", f"--to={path}", *options])
    return path


@torch.no_grad()
def assert_same_logits(gpt, theirs, idx, atol=1e-4):
    torch.testing.assert_close(logits_of(gpt, idx), theirs(idx).logits, atol=atol, rtol=0)


# In


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_logits_of_transformers(name):
    theirs, folder = model_and_folder(name)
    gpt, idx = ours_of(folder), random_ids(2, 128, below=61)
    assert_same_logits(gpt, theirs, idx)
    assert logits_of(gpt, idx).std() > 0.5


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_transformers(name):
    theirs, folder = model_and_folder(name)
    gpt = ours_of(folder)
    ids = random_ids(1, 9, below=61)
    options = {"do_sample": False, "max_new_tokens": 100, "attention_mask": torch.ones_like(ids)}
    expected = theirs.generate(ids, pad_token_id=0, **options)[0, 9:].tolist()
    found = []
    for step in Engine(gpt).generate([ids[0].tolist()], 100, temperature=0):
        found += step
    assert found == expected


# Out


@pytest.mark.parametrize("name", MODELS)
def test_what_came_in_goes_out_and_in_again_bit_for_bit(name, tmp_path):
    theirs, folder = model_and_folder(name)
    first = huggingface.load(str(folder))
    gpt = loading.model_of(first, folder)
    huggingface.save(tmp_path / "hf", "it", gpt, ByteTokenizer(), "f32", {})
    second = huggingface.load(str(tmp_path / "hf"))
    assert first["model_args"] == second["model_args"]
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(second["model"][key], weight) for key, weight in first["model"].items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(again) is type(theirs) or name == "mistral"
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert all(torch.equal(again.state_dict()[key], value) for key, value in theirs.state_dict().items())
    assert_same_logits(gpt, again, random_ids(2, 20, below=61), atol=0)
