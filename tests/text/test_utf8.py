"""A text in stretches: nothing is lost, and tokens stay what they are."""

import io
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kqv.errors import UserError
from kqv.text import utf8
from kqv.text.tokenizers import BPETokenizer

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@contextmanager
def pieces_of(size):
    """Texts in pieces of so many bytes, within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utf8, "PIECE", size)
        yield


SCRIPTS = st.text(st.sampled_from("ab  \n\n\r\té☃😀\ufeff\u3000")).map(lambda text: text.encode("utf-8"))


def after_byte(data, cut):
    """Where the first character, of which \\r\\n is one, begins at or after a byte."""
    while cut < len(data) and (data[cut] & 0xC0 == 0x80 or data[cut - 1 : cut + 1] == b"\r\n"):
        cut += 1
    return cut


@settings(UNHURRIED, max_examples=300)
@given(data=SCRIPTS, size=st.integers(1, 12), cut=st.none() | st.integers(0, 60), at_once=st.integers(1, 9))
def test_stretches_join_to_the_text_and_never_cut_a_character(data, size, cut, at_once):
    class Slow(io.BytesIO):
        def read(self, size):
            return super().read(min(size, at_once))

    with pieces_of(size):
        found = list(utf8.stretches(Slow(data), "a", cut))
    text = data.decode("utf-8")
    assert "".join(stretch for _, stretch in found) == text.removeprefix("\ufeff")
    assert all(0 < len(stretch.encode("utf-8")) <= size + 3 for _, stretch in found)
    tail = "".join(stretch for is_tail, stretch in found if is_tail).encode("utf-8")
    whole = len(data) if cut is None else after_byte(data, cut)
    assert tail.decode() == data[whole:].decode().removeprefix("" if whole else "\ufeff")
    assert [is_tail for is_tail, _ in found] == sorted(is_tail for is_tail, _ in found)


@settings(UNHURRIED, max_examples=300)
@given(data=SCRIPTS, size=st.integers(1, 12))
def test_a_stretch_ends_between_two_words_where_it_can(data, size):
    with pieces_of(size):
        found = [stretch for _, stretch in utf8.stretches(io.BytesIO(data), "a")]

    def border(rest):
        places = [i for i in range(1, min(size, len(rest) - 1) + 1) if not rest[i - 1 : i].isspace()]
        before_space = [i for i in places if rest[i : i + 1] == b" "]
        lines = [i + 1 for i in places if rest[i : i + 1] == b"\n" and rest[i + 1 : i + 2].strip()]
        return max(before_space or [i for i in lines if i <= size] or [after_byte(rest, size)])

    expected = []
    while data:
        end = len(data) if len(data) <= size else border(data)
        expected, data = [*expected, data[:end].decode("utf-8")], data[end:]
    if expected:
        expected[0] = expected[0].removeprefix("\ufeff")
    assert found == list(filter(None, expected))


@pytest.fixture(scope="module")
def learnt():
    return BPETokenizer.trained_on([PROSE], 700)


PROSE = Path(ROOT, "README.md").read_text("utf-8")


CODE = Path(ROOT, "model.py").read_text("utf-8")


def in_pieces(tokenizer, text):
    found = utf8.stretches(io.BytesIO(text.encode("utf-8")), "a")
    return [tokenizer.encode(stretch).tolist() for _, stretch in found]


TEXTS = [PROSE, CODE, PROSE.replace("\n", " "), CODE.replace("\n", "\r\n\r\n")]


@pytest.mark.parametrize("size", [100, 1000, 5000])
@pytest.mark.parametrize("text", TEXTS, ids=["prose", "code", "one line", "empty lines"])
def test_tokens_of_a_text_in_pieces_are_those_of_the_whole_text(gpt2, learnt, text, size):
    for tokenizer in (gpt2, learnt):
        with pieces_of(size):
            found = in_pieces(tokenizer, text)
        assert len(found) >= len(text) / size
        assert sum(found, []) == tokenizer.encode(text).tolist()


ENDS = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n", "\n    ", "\t", ".\n", "...\n\n", ":\n\t", ""])


WORDS = st.sampled_from(["key", " key", "key's", "1234", "é", " (", "_", "\u00a0a", "क्वे"])


@settings(UNHURRIED, max_examples=300)
@given(words=st.lists(st.tuples(WORDS, ENDS).map("".join), max_size=60), size=st.integers(20, 60))
def test_tokens_of_any_words_in_pieces_are_those_of_the_whole_text(gpt2, learnt, words, size):
    text = "".join(words)
    longest = max(len(part.encode("utf-8")) for part in re.split(r"(?<=[^\s])(?= )", text))
    for tokenizer in (gpt2, learnt):
        with pieces_of(size):
            found = sum(in_pieces(tokenizer, text), [])
        assert tokenizer.decode(found) == text
        if longest < size:  # so that in each piece there is a space between two words
            assert found == tokenizer.encode(text).tolist()


@settings(UNHURRIED, max_examples=200)
@given(before=SCRIPTS, after=SCRIPTS, size=st.integers(1, 12), cut=st.none() | st.integers(0, 60))
def test_a_byte_that_is_no_utf8_is_found_wherever_pieces_end(before, after, size, cut):
    with pieces_of(size), pytest.raises(UserError) as error:
        list(utf8.stretches(io.BytesIO(before + b"\xff" + after), "a.txt", cut))
    line, offset = before.count(b"\n") + 1, len(before) - before.rfind(b"\n") - 1
    assert f"a.txt is not UTF-8 text (byte 0xff at offset {offset} of line {line})" in str(error.value)
