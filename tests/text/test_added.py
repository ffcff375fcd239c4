"""Words that were added to a tokenizer."""

import pytest

from kqv.errors import UserError
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer, from_json

BYTE = {"kind": "byte"}


def added(words, base=BYTE):
    return from_json({"kind": "added", "base": base, "words": words})


def test_a_word_is_one_id_wherever_a_text_has_it():
    tokenizer = added({"key": 257, "keys": 258, "a b": 259})
    assert tokenizer.encode("xkeysxkey").tolist() == [120, 258, 120, 257]
    assert tokenizer.encode("a b").tolist() == [259] and tokenizer.encode("").tolist() == []
    for text in ("xkeysxkey", "ké键 a b\n", "keykeys"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.separator, tokenizer.vocab_size) == (256, 260)
    assert from_json(tokenizer.to_json()).encode("keys").tolist() == [258]


def test_a_word_may_be_a_piece_of_the_base():
    assert added({"a": 97, "ab": 257}).encode("abac").tolist() == [257, 97, 99]


def test_unknown_characters_are_refused_or_left_out_between_words():
    tokenizer = added({"xyz": 2}, CharTokenizer("ab").to_json())
    assert tokenizer.encode("axyz?b", unknown="skip").tolist() == [0, 2, 1]
    with pytest.raises(UserError, match=r"'\?'"):
        tokenizer.encode("axyz?b")


@pytest.mark.parametrize(
    "words",
    [
        {},
        [],
        None,
        {"": 257},
        {"a": 98},
        {"a": 258},
        {"a": 257, "b": 257},
        {"a": -1},
        {"a": "257"},
        {"a": 1e3},
    ],
)
def test_a_definition_that_is_none_is_refused(words):
    with pytest.raises(UserError, match="unknown tokenizer definition"):
        added(words)


def test_added_words_are_over_plain_text_alone():
    chat = {"kind": "chat", "base": {"kind": "added", "base": BYTE, "words": {"key": 257}}}
    assert from_json(chat).encode_chat([("user", "key")]).tolist() == [258, 259, 257, 260]
    with pytest.raises(UserError):
        from_json({"kind": "added", "base": chat, "words": {"a": 300}})
    assert ByteTokenizer().to_json() == BYTE
