"""Tokenizers of other programs, with the real `tokenizers` and transformers as the judges."""

import json
import subprocess
import sys
import unicodedata
from functools import cache

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from others import llama2, llama3, qwen2, unigram

from kqv.errors import UserError
from kqv.text import encoding, huggingface
from kqv.text.huggingface import HuggingFaceTokenizer
from kqv.text.sources import Piece
from kqv.text.text_stream import TextStream
from kqv.text.tokenizers import ChatTokenizer, from_json

pytest.importorskip("tokenizers")

ENDS = {qwen2: ["<|im_end|>", "<|endoftext|>"], llama3: ["<|eot_id|>"], llama2: ["</s>"], unigram: ["</s>"]}


@cache
def pair(make):
    """(ours, transformers') of one tokenizer."""
    transformers = pytest.importorskip("transformers")
    whole = make()
    ends = [whole.token_to_id(name) for name in ENDS[make]]
    definition = {"kind": "huggingface", "files": {"tokenizer.json": whole.to_str()}, "ends": ends}
    ours = from_json(json.loads(json.dumps(definition)))
    assert ours.to_json() == definition and ours.separator == ends[0]
    return ours, transformers.PreTrainedTokenizerFast(tokenizer_object=whole, split_special_tokens=True)


PARTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "e\u0301",
    "é",
    "\u1e9b\u0323",
    "ﬁ",
    "क्वेरी",
    "कि",
    "🔑",
    "👩‍🚀",
    "12345",
    "½",
]
PARTS += [
    "'S",
    "'re",
    "ſ",
    "\x00",
    "\u2028",
    "\u00a0",
    "▁",
    "Ġ",
    "<0x0A>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
]
PARTS += [
    "<|endoftext|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<tool_call>",
    "</think>",
    "keys",
    "a" * 50,
    " " * 50,
]

TEXTS = st.one_of(st.lists(st.sampled_from(PARTS)).map("".join), st.text())


@pytest.mark.parametrize("make", [qwen2, llama3, llama2], ids=lambda make: make.__name__)
def test_any_text_has_the_ids_and_any_ids_the_text_of_transformers(make):
    ours, theirs = pair(make)
    special = set(ours.specials().values())

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    @example("".join(PARTS))
    @example("")
    def check(text):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
        assert not special & set(ids.tolist())
        assert ours.decode(ids) == theirs.decode(ids.tolist())
        blank = " " if make is llama2 and text else ""
        meant = unicodedata.normalize("NFC", text) if make is qwen2 else text
        meant = meant.replace("▁", " ") if make is llama2 else meant
        assert ours.decode_bytes(ids).decode() == blank + meant
        stream = TextStream(ours)
        assert "".join(map(stream.feed, ids.tolist())) + stream.finish() == blank + meant

    check()


@pytest.mark.parametrize("make", ENDS, ids=lambda make: make.__name__)
def test_ids_that_no_text_has_are_decoded_as_transformers_does(make):
    ours, theirs = pair(make)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, ours.vocab_size + 2), max_size=20))
    def check(ids):
        known = [number for number in ids if number < ours.vocab_size]
        assert ours.decode(ids) == theirs.decode(known, skip_special_tokens=True)

    check()


def test_a_unigram_takes_no_text_for_a_special_id_and_refuses_what_it_does_not_know():
    ours, theirs = pair(unigram)
    for text in ("The keys", "  they're: 'masks'", "values"):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text, add_special_tokens=False))
    assert 1 in theirs.encode("s<s>s", add_special_tokens=False)  # so it would be with the file as it is
    assert ours.decode(ours.encode("s<s>s")) == "s<s>s" and 1 not in ours.encode("s<s>s")
    with pytest.raises(UserError, match="no id for 'Ω' at position 4"):
        ours.encode("key Ω")
    assert ours.decode(ours.encode("key Ωs", "skip")) == "key s"


def test_a_text_is_not_cut_short_or_padded_and_nothing_is_lost_unsaid():
    content = json.loads(qwen2().to_str())
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    ours = HuggingFaceTokenizer({"tokenizer.json": json.dumps({**content, "truncation": truncation})})
    assert ours.decode(ours.encode("keys and values " * 9)) == "keys and values " * 9
    model = content["model"]
    kept = {name: number for name, number in model["vocab"].items() if name != "z"}
    less = {**content, "model": {**model, "vocab": kept}}
    ours = HuggingFaceTokenizer({"tokenizer.json": json.dumps(less)})
    with pytest.raises(UserError, match="no id for 'z' at position 1"):
        ours.encode("az")
    assert ours.decode(ours.encode("az<tool_call>", "skip")) == "a<tool_call>"
    assert ours.encode("<tool_call>").tolist() == pair(qwen2)[0].encode("<tool_call>").tolist()


def test_marked_texts_have_special_ids():
    ours, _ = pair(qwen2)
    start, end = ours.specials()["<|im_start|>"], ours.specials()["<|im_end|>"]
    ids = ours.encode_marked("<|im_start|>user\nWhy?<|im_end|>\n").tolist()
    assert ids == [start, *ours.encode("user\nWhy?"), end, *ours.encode("\n")]
    assert start not in ours.encode("<|im_start|>user")


def test_what_tokenizer_config_adds_counts():
    text = qwen2().to_str()
    settings_text = json.dumps(
        {
            "eos_token": {"content": "<tool_call>"},
            "bos_token": None,
            "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}],
            "added_tokens_decoder": {"337": {"content": "<new>", "special": True}},
        }
    )
    ours = HuggingFaceTokenizer({"tokenizer.json": text, "tokenizer_config.json": settings_text})
    assert ours.chat_template == "y" and ours.roles == {"eos_token": "<tool_call>"}
    assert ours.specials()["<new>"] == 337 and ours.vocab_size == 338
    assert "<tool_call>" in ours.specials() and ours.encode("<tool_call>").size > 1
    ours = HuggingFaceTokenizer(
        {**ours.files, "chat_template.jinja": "z", "special_tokens_map.json": '{"bos_token": "<|im_start|>"}'}
    )
    assert ours.chat_template == "z" and ours.roles["bos_token"] == "<|im_start|>"


def test_every_id_that_ends_a_text_ends_it():
    ours, _ = pair(qwen2)
    for end in ours.ends:
        stream = TextStream(ours)
        assert stream.feed(ours.encode("a")[0]) == "a" and stream.feed(end) == ""
        assert stream.ended == "end_of_text"
    chat = ChatTokenizer(ours)
    assert from_json(chat.to_json()).specials() == chat.specials()
    assert chat.specials().items() >= ours.specials().items() and set(chat.ends) == set(ours.ends)


def test_documents_begin_and_end_with_their_ids():
    ours, theirs = pair(llama3)
    documents = [Piece("train", True, "keys"), Piece("train", False, " and"), Piece("train", True, "é", "\n")]
    ((split, ids, _, size, _),) = encoding.encode(documents, ours, "error")
    parts = [*theirs("keys")["input_ids"], *ours.encode(" and"), ours.separator, *theirs("é")["input_ids"]]
    assert (split, ids.tolist(), size) == ("train", parts, len("keys andé".encode()))


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, []),
        ({"other": "{}"}, []),
        ({"tokenizer.json": "{}", "../x": "{}"}, []),
        ({"tokenizer.json": "{}"}, []),
    ],
)
def test_a_definition_that_is_none_is_refused(files, ends):
    with pytest.raises(UserError):
        from_json({"kind": "huggingface", "files": files, "ends": ends})
    with pytest.raises(UserError, match="without the id 9999"):
        from_json({**pair(qwen2)[0].to_json(), "ends": [9999]})


def test_a_text_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface, "TIME_LIMIT", 0.2)
    content = json.loads(qwen2().to_str())
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    words = {"type": "Sequence", "pretokenizers": [slow, content["pre_tokenizer"]]}
    ours = HuggingFaceTokenizer({"tokenizer.json": json.dumps({**content, "pre_tokenizer": words})})
    with pytest.raises(UserError, match="took more than 0.2 s"):
        ours.encode(("a" * 20 + "!") * 30)


def test_without_the_package_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    huggingface.loaded.cache_clear()
    with pytest.raises(UserError, match="pip install tokenizers"):
        from_json(DEFINITION)


DEFINITION = {"kind": "huggingface", "files": {"tokenizer.json": qwen2().to_str()}}


def test_torch_is_not_loaded():
    code = "import sys, json; from kqv.text.tokenizers import from_json; d = json.load(sys.stdin); "
    code += "from_json(d).encode('keys'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], input=json.dumps(DEFINITION), text=True, check=True)
