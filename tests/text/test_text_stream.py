"""Text out of ids as they come: it ends where it should, and shows all that is certain."""

import codecs

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kqv.text.text_stream import TextStream
from kqv.text.tokenizer import Tokenizer
from kqv.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    ChatTokenizer,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(params=["byte", "gpt2", "bpe"], scope="module")
def tokenizer(request):
    """Each tokenizer that takes any text."""
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


class Pieces(Tokenizer):
    """Token i stands for the i-th of some pieces of bytes; -1 ends a text."""

    separator = -1

    def __init__(self, pieces):
        self.pieces = pieces

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


@st.composite
def cut(draw, contents):
    """Bytes, cut into pieces anywhere; some may be empty."""
    content = draw(contents)
    ends = [0, *sorted(draw(st.lists(st.integers(0, len(content)), max_size=12))), len(content)]
    return [content[start:end] for start, end in zip(ends, ends[1:], strict=False)]


FEW = st.text(st.sampled_from("aab€é\ufffd"))  # so that strings are found in each other; the last is replaced


STOPS = st.lists(st.text(st.sampled_from("aab€é\ufffd"), min_size=1, max_size=4), max_size=4)


BROKEN = st.lists(st.sampled_from([b"a", b"b", b"\xe2", b"\x82", b"\xac", b"\xc3", b"\xff"])).map(b"".join)


CONTENTS = FEW.map(str.encode) | BROKEN


def until_stop(text, stops):
    """The text up to the first stop to be complete, of several the longest; and whether there is one."""
    for end in range(len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


@settings(UNHURRIED, max_examples=300)
@given(cut(CONTENTS), STOPS)
@example([b"babe"], ["babe", "ab"])  # the second begins later and is complete sooner
@example([b"ba", b"be"], ["abe", "babe"])  # both are complete at once
@example([b"b", b"\xe2", b"be"], ["\ufffdb"])
def test_a_stream_ends_before_the_first_stop_wherever_its_tokens_are_cut(pieces, stops):
    stream = TextStream(Pieces(pieces), stops)
    shown = "".join(map(stream.feed, range(len(pieces)))) + stream.finish()
    text, stopped = until_stop(b"".join(pieces).decode(errors="replace"), stops)
    assert (shown, stream.ended) == (text, "stop" if stopped else None)
    assert stream.finish() == "" and not (stopped and stream.feed(0))


@settings(UNHURRIED, max_examples=300)
@given(cut(CONTENTS), STOPS)
def test_a_stream_shows_all_that_no_stop_can_take_back_and_nothing_else(pieces, stops):
    stream, shown = TextStream(Pieces(pieces), stops), ""
    for number in range(len(pieces)):
        shown += stream.feed(number)
        if stream.ended:
            break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(pieces[: number + 1]))  # the characters that are whole
        begun = [stop[:length] for stop in stops for length in range(1, len(stop))]
        longest = max((len(start) for start in begun if text.endswith(start)), default=0)
        assert shown == text[: len(text) - longest]


@UNHURRIED
@given(cut(CONTENTS), STOPS, CONTENTS)
@example([b"a\xe2"], ["\ufffd"], b"a")  # a stop that only the end completes
def test_nothing_comes_after_the_end_of_text(pieces, stops, after):
    stream = TextStream(Pieces([*pieces, after]), stops)
    shown = "".join(map(stream.feed, [*range(len(pieces)), -1, len(pieces)])) + stream.finish()
    text, stopped = until_stop(b"".join(pieces).decode(errors="replace"), stops)
    assert (shown, stream.ended) == (text, "stop" if stopped else "end_of_text")


@UNHURRIED
@given(text=TEXT)
def test_a_stream_of_any_text_is_the_text(tokenizer, text):
    stream = TextStream(tokenizer)
    assert "".join(map(stream.feed, tokenizer.encode(text).tolist())) == text
    assert stream.feed(tokenizer.separator) == "" and stream.ended == "end_of_text"


def test_a_tokenizer_without_an_end_of_text_ends_none():
    stream = TextStream(CharTokenizer("ab"), ["ba"])
    assert [stream.feed(token) for token in [0, 1, 1]] == ["a", "", "b"] and stream.ended is None
    assert stream.finish() == "b"


def test_a_stream_shows_a_character_when_it_is_whole():
    stream = TextStream(ByteTokenizer())
    assert [stream.feed(token) for token in "a€😀".encode()] == ["a", "", "", "€", "", "", "", "😀"]
    assert stream.feed(0xE2) == "" and stream.finish() == "\ufffd"


@pytest.fixture(params=["char", "byte", "gpt2", "bpe"], scope="module")
def chat(request):
    """Conversations on each tokenizer; the characters know only a few."""
    made = {"char": CharTokenizer("ab <|>é"), "byte": ByteTokenizer()}
    return ChatTokenizer(made.get(request.param) or request.getfixturevalue(request.param))


def test_a_stream_of_an_answer_ends_at_its_separator(chat):
    ids = chat.encode_chat([("user", "a"), ("assistant", "b a")]).tolist()
    stream = TextStream(chat)
    answer = ids[ids.index(chat.assistant) + 1 :]
    assert "".join(map(stream.feed, [*answer, *ids])) == "b a" and stream.ended == "end_of_text"
