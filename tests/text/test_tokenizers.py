"""Tokenizers: any text comes back, no text is read as a special id, no definition on disk runs code."""

import collections
import functools
import json
import os
import pickle
import time

import pytest
from conftest import LEARNT_FROM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kqv.errors import UsageError, UserError
from kqv.text import token_files
from kqv.text.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    by_name,
    from_json,
    from_nanogpt,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


BYTES = [chr(byte) for byte in range(256)]


@pytest.fixture(params=["byte", "gpt2", "bpe"], scope="module")
def tokenizer(request):
    """Each tokenizer that takes any text."""
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


# Text -> ids -> text


@UNHURRIED
@given(text=TEXT)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.ndim == 1 and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")


@UNHURRIED
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.data())
def test_any_text_in_its_alphabet_comes_back_from_characters(alphabet, data):
    tokenizer = CharTokenizer.trained_on([alphabet[:2], alphabet[2:]])
    text = data.draw(st.text(st.sampled_from(alphabet)))
    ids = tokenizer.encode(text)
    assert ids.tolist() == [sorted(set(alphabet)).index(char) for char in text]  # nanoGPT's ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(set(alphabet))


@UNHURRIED
@given(text=TEXT, cuts=st.lists(st.integers(0, 30)))
def test_a_stream_may_be_cut_between_any_two_ids(tokenizer, text, cuts):
    ids = tokenizer.encode(text)
    ends = [0, *sorted(cuts), len(ids)]
    parts = [tokenizer.decode_bytes(ids[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    assert b"".join(parts) == tokenizer.decode_bytes(ids)


@UNHURRIED
@given(alphabet=st.text(min_size=1), text=TEXT)
def test_characters_that_are_not_known_are_left_out_where_asked(alphabet, text):
    tokenizer = CharTokenizer.trained_on([alphabet])
    known = "".join(char for char in text if char in alphabet)
    assert tokenizer.decode(tokenizer.encode(text, unknown="skip")) == known
    if known == text:
        assert tokenizer.encode(text).tolist() == tokenizer.encode(text, unknown="skip").tolist()
    else:
        with pytest.raises(UserError, match="--unknown=skip"):
            tokenizer.encode(text)


@UNHURRIED
@given(text=TEXT)
def test_a_tokenizer_of_any_text_skips_nothing(tokenizer, text):
    assert tokenizer.encode(text, unknown="skip").tolist() == tokenizer.encode(text).tolist()


def test_half_a_character_becomes_a_replacement_character(tokenizer):
    ids = tokenizer.encode("𝄞")
    assert len(ids) > 1 and tokenizer.decode(ids[:1]) == "\ufffd"


@UNHURRIED
@given(before=TEXT, after=TEXT)
def test_a_special_token_in_a_text_is_text(tokenizer, before, after):
    text = f"{before}<|endoftext|>{after}"
    ids = tokenizer.encode(text)
    assert tokenizer.separator not in ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text, position", [("ab☃", 2), ("☃", 0), ("abbam", 4), ("a\nb", 1), ("z😀", 1), ("ab\udcff", 2)]
)
def test_characters_name_the_one_they_do_not_know_and_where_it_is(text, position):
    with pytest.raises(UserError) as error:
        CharTokenizer("abz").encode(text)
    assert repr(text[position]) in str(error.value) and f"position {position}" in str(error.value)
    assert "'abz'" in str(error.value)


@pytest.mark.parametrize("text", ["ab\ud800", "ab\udcff"])
def test_text_that_is_no_unicode_is_refused(tokenizer, text):
    with pytest.raises(UserError, match="position 2"):
        tokenizer.encode(text)


def made(name, *texts):
    cls, options = by_name(name)
    return cls.trained_on(texts, **options)


@pytest.mark.parametrize(
    "name", ["bpe", "bpe:", "bpe:256", "bpe:1048577", "bpe:-5", "bpe:4k", "char:9", "Byte", "", "bpe:٣٠٠"]
)
def test_a_name_that_makes_no_tokenizer_is_refused(name):
    with pytest.raises(UsageError, match="bpe:4096"):
        by_name(name)


def test_names_make_their_tokenizers(gpt2):
    kinds = {name: made(name, "ab").kind for name in ("char", "byte", "gpt2", "bpe:257")}
    assert kinds == {"char": "char", "byte": "byte", "gpt2": "gpt2", "bpe:257": "bpe"}
    assert made("bpe:258", "ab ab ab").vocab_size == 258


# On disk


@UNHURRIED
@given(alphabet=TEXT.filter(bool))
def test_characters_come_back_from_json(alphabet):
    saved = json.loads(json.dumps(CharTokenizer.trained_on([alphabet]).to_json()))
    assert (
        from_json(saved).encode(alphabet).tolist()
        == CharTokenizer.trained_on([alphabet]).encode(alphabet).tolist()
    )
    assert from_json(saved).to_json() == saved


def test_the_others_come_back_from_json(tokenizer):
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert (type(again), again.vocab_size, again.separator) == (
        type(tokenizer),
        tokenizer.vocab_size,
        tokenizer.separator,
    )
    assert [again.encode(text).tolist() for text in LEARNT_FROM] == [
        tokenizer.encode(text).tolist() for text in LEARNT_FROM
    ]


@pytest.mark.parametrize(
    "definition",
    [
        None,
        [],
        {},
        5,
        "char",
        {"chars": "ab"},
        {"kind": "char"},
        {"kind": "char", "chars": ""},
        {"kind": "char", "chars": ["a", "b"]},
        {"kind": "char", "chars": 5},
        {"kind": "char", "chars": "a\ud800"},
        {"kind": "bpe"},
        {"kind": "bpe", "pattern": BPETokenizer.pattern},
        {"kind": "bpe", "pattern": BPETokenizer.pattern, "pieces": BYTES[1:]},
        {"kind": "bpe", "pattern": BPETokenizer.pattern, "pieces": [*BYTES, "ab", "ab"]},
        {"kind": "bpe", "pattern": BPETokenizer.pattern, "pieces": [*BYTES, ""]},
        {"kind": "bpe", "pattern": BPETokenizer.pattern, "pieces": [*BYTES, "\u0100"]},
        {"kind": "bpe", "pattern": BPETokenizer.pattern, "pieces": [*BYTES, 5]},
        {"kind": "bpe", "pattern": BPETokenizer.pattern, "pieces": {"a": 0}},
        {"kind": "bpe", "pattern": "(a*)*b", "pieces": BYTES},
        {"kind": ["char"]},
        {"kind": None, "chars": "ab"},
        {"kind": "chat"},
        {"kind": "chat", "base": None},
        {"kind": "chat", "base": "char"},
        {"kind": "chat", "base": {"kind": "word"}},
        {"kind": "chat", "base": {"kind": "char"}},
        {"kind": "chat", "base": {"kind": "bpe", "pattern": "(a*)*b", "pieces": BYTES}},
        {"kind": "chat", "base": {"kind": "chat", "base": {"kind": "byte"}}},
        functools.reduce(lambda base, _: {"kind": "chat", "base": base}, range(100_000), {"kind": "byte"}),
    ],
    ids=lambda definition: repr(definition)[:40] if not isinstance(definition, dict) else None,
)
def test_a_damaged_definition_is_refused(definition):
    with pytest.raises(UserError, match="prepare"):
        from_json(definition)


def nanogpt_meta(chars):
    """What nanoGPT's prepare.py puts into meta.pkl."""
    return {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }


def read(folder, content):
    (folder / "meta.pkl").write_bytes(content)
    return token_files.read_meta(folder).tokenizer


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_meta_is_read(protocol, tmp_path):
    tokenizer = read(tmp_path, pickle.dumps(nanogpt_meta("\nb a☃"), protocol))
    assert tokenizer.encode("☃ b\n").tolist() == [4, 2, 1, 0]
    assert (tokenizer.vocab_size, tokenizer.decode([1, 3, 4])) == (5, "ba☃")


class Calls:
    """Unpickled, it calls `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "hostile",
    [
        lambda flag: Calls(os.system, f"touch {flag}"),
        lambda flag: Calls(os.mkdir, flag),
        lambda flag: Calls(eval, f"open({flag!r}, 'w').close()"),
        lambda flag: Calls(open, flag, "w"),
        lambda flag: {**nanogpt_meta("ab"), "more": Calls(os.mkdir, flag)},
    ],
    ids=["system", "mkdir", "eval", "open", "beside good content"],
)
def test_a_pickle_that_calls_a_function_is_refused_and_calls_none(hostile, protocol, tmp_path):
    flag = tmp_path / "flag"
    content = pickle.dumps(hostile(str(flag)), protocol)
    with pytest.raises(UserError, match="meta.pkl"):
        read(tmp_path, content)
    assert not flag.exists()
    pickle.loads(content)
    assert flag.exists()  # so the pickle was a hostile one


@pytest.mark.parametrize(
    "content", [collections.OrderedDict(nanogpt_meta("ab")), print, dict, time.struct_time]
)
def test_a_pickle_that_names_a_class_or_a_function_is_refused(content, tmp_path):
    with pytest.raises(UserError, match="meta.pkl"):
        read(tmp_path, pickle.dumps(content))


def test_a_truncated_pickle_is_refused(tmp_path):
    content = pickle.dumps(nanogpt_meta("\n ab☃"))
    for length in range(len(content)):
        with pytest.raises(UserError, match="meta.pkl"):
            read(tmp_path, content[:length])


@pytest.mark.parametrize(
    "meta",
    [
        None,
        [],
        {},
        {"itos": {}},
        {"itos": ["a", "b"]},
        {"itos": {1: "a", 2: "b"}},
        {"itos": {0: "a", "1": "b"}},
        {"itos": {0: "a", 1: "bc"}},
        {"itos": {0: "a", 1: 2}},
        {"itos": {0: "a", 1: "\ud800"}},
    ],
)
def test_a_meta_without_one_character_for_each_id_is_refused(meta):
    with pytest.raises(UserError, match="prepare"):
        from_nanogpt(meta)
