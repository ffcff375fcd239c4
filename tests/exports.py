"""
What tests of formats share: runs of random models with every kind of tokenizer, what export.py makes of them,
and folders as transformers writes them.
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import random_gpt, random_ids, randomise

import export
from kqv.formats import checkpoint
from kqv.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, ChatTokenizer, GPT2Tokenizer

# Letters of several scripts, punctuation, runs of spaces.
TEXT = "The queries and keys of 3 heads aren't values,\n\n  they're: 'masks' -- é, ½ क्वेरी कुंजी 键值 🔑!\t" * 40


BASES = ["char", "byte", "bpe", "gpt2"]


CHATS = [*(f"chat-{kind}" for kind in BASES[:3]), pytest.param("chat-gpt2", marks=pytest.mark.slow)]


KINDS = [*BASES, *CHATS]


SHAPE = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 32}


TRICKY = [
    "",
    " ",
    "hello  world's 12345\n\n\t x",
    "'S we'LL 'ſ don't",
    "\x1c\x85\u2028 \u00a0x\x00",
    "a ?!.. ,b  .  ",
    "क्वेरी कुंजी 键值键 🔑é",
    "<|endoftext|>",
    "<|endoftext|>x<|user|>\n<|system|>",
    "a" * 3000 + " " * 3000 + "\n" * 300,
]


def assert_one_line(result, *named):
    """A user's error: status 1, one line that names the values, no traceback."""
    status, out, err = result
    assert (status, out) == (1, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for name in named:
        assert str(name) in err


def make_tokenizer(kind):
    if kind.startswith("chat-"):
        return ChatTokenizer(make_tokenizer(kind.removeprefix("chat-")))
    if kind == "gpt2":
        return GPT2Tokenizer()
    return {
        "char": lambda: CharTokenizer.trained_on([TEXT]),
        "byte": ByteTokenizer,
        "bpe": lambda: BPETokenizer.trained_on([TEXT], 400),
    }[kind]()


def save_run(folder, tokenizer, gpt=None, **contents):
    """A run's folder with one checkpoint of a random model, its vocabulary padded; returns that model."""
    padded = -(-tokenizer.vocab_size // 64) * 64
    gpt = gpt or random_gpt(vocab_size=padded, **{"bias": False, **SHAPE})
    folder.mkdir(exist_ok=True)
    whole = {"model": gpt.state_dict(), "model_args": asdict(gpt.config), "tokenizer": tokenizer.to_json()}
    checkpoint.save(folder / "ckpt.pt", {**whole, **contents})
    return gpt


class Exported:
    """A random model with a tokenizer of some kind: its run, and the Hugging Face folder made of it."""

    def __init__(self, kind):
        self.temporary = TemporaryDirectory(prefix=f"kqv-{kind}-")
        folder = Path(self.temporary.name)
        self.run, self.folder = folder / "run", folder / "hf"
        self.tokenizer = make_tokenizer(kind)
        self.gpt = save_run(self.run, self.tokenizer)
        export.main([f"--out_dir={self.run}", f"--to={self.folder}"])

    def greedy(self, ids, count):
        return greedy(self.gpt, self.tokenizer, ids, count)

    def clear(self, count, least):
        return clear(self.gpt, self.tokenizer, count, least)


@torch.no_grad()
def greedy(gpt, tokenizer, ids, count):
    """(the `count` likeliest ids after `ids`, fewer if one ends the text; the smallest lead of one)"""
    new, leads = [], []
    while len(new) < count and (not new or new[-1] != tokenizer.separator):
        x = gpt.hidden(torch.tensor([[*ids, *new]]))[0, -1]  # (C,)
        (first, second), best = gpt.lm_head(x)[: tokenizer.vocab_size].topk(2)
        new.append(best[0].item())
        leads.append((first - second).item())
    return new, min(leads)


def clear(gpt, tokenizer, count, least):
    """(prompt, continuation) of ids: at least `least` follow, each clearly the likeliest."""
    for seed in range(200):
        ids = random_ids(20, below=tokenizer.vocab_size - 4, seed=seed).tolist()
        new, lead = greedy(gpt, tokenizer, ids, count)
        if lead > 2e-4 and len(new) >= least:
            yield ids, new


@cache
def exported(kind):
    """The Exported of a kind of tokenizer, made once for all tests; they only read it."""
    return Exported(kind)


@cache
def in_transformers(kind):
    """(model, tokenizer) as transformers loads the folder of that kind, once for all tests."""
    transformers = pytest.importorskip("transformers")
    folder = exported(kind).folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


CONVERSATIONS = [
    [("user", "What is a key?")],
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "")],
    [("user", "a\n"), ("assistant", " b ")],
    [("system", "a"), ("assistant", "b")],
    [("system", " a ")],
    [("assistant", "é")],
]


def as_dicts(messages):
    return [{"role": role, "content": text} for role, text in messages]


def random_gpt2(vocab_size=50257, **options):
    """GPT-2's architecture in transformers, small, every number random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 24, **options}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, **shape))
    return randomise(gpt2, std=0.3).eval()


def a_folder(path, vocab_size, end=None, **options):
    """A folder as transformers writes it, of a random model, without a tokenizer; returns the model."""
    shape = {"n_embd": 32, "n_positions": 128, "bos_token_id": end, "eos_token_id": end}
    model = random_gpt2(vocab_size, **shape)
    model.save_pretrained(path, **options)
    return model


def another_tokenizer(specials=("<|endoftext|>",), size=330, **options):
    """A byte-level BPE as the field trains them, special ids first."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(**options)
    tokenizer.train_from_iterator([TEXT], vocab_size=size, show_progress=False, special_tokens=list(specials))
    return tokenizer


def edited(content, **changes):
    return {**content, **changes}


def write_json(path, content):
    path.write_text(json.dumps(content), "utf-8")
