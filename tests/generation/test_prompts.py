"""The texts to continue, as they are read and turned into ids."""

import io
import sys

import pytest

from kqv.errors import UserError
from kqv.generation.prompts import completed, encode_prompt, fitted, read_prompts
from kqv.settings import parse
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer, ChatTokenizer
from sample import SampleSettings

TEXTS = CharTokenizer("abc é")
TALK = ChatTokenizer(CharTokenizer("abc "))


def settings(**values):
    return parse(SampleSettings, [f"--{name}={value}" for name, value in values.items()])


@pytest.fixture
def in_file(tmp_path):
    """The texts that are read from a file of prompts: in_file("a\\nb\\n") -> ["a", "b"]."""

    def read(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(settings(prompts=str(path)))

    return read


# Reading


def test_a_text_is_itself():
    assert read_prompts(settings(start="keys\nand ")) == ["keys\nand "]
    assert read_prompts(settings()) == [""]


def test_where_nothing_is_given_the_text_begins_with_what_the_tokenizer_knows():
    for tokenizer in (CharTokenizer("\nabc"), ByteTokenizer()):
        assert completed("", tokenizer) == "\n"
        assert completed("ab\n", tokenizer) == "ab\n"
    assert completed("", CharTokenizer("ACGT")) == completed("\n", CharTokenizer("ACGT")) == "A"
    assert completed("", TALK) == completed("\r\n", TALK) == ""
    assert completed("", ChatTokenizer(CharTokenizer("\nabc"))) == ""


def test_the_newline_that_ends_a_file_is_left_out_where_it_is_unknown():
    assert completed("GAT\n", CharTokenizer("ACGT")) == completed("GAT\r\n", CharTokenizer("ACGT")) == "GAT"
    assert completed("GA\nT\n\n", CharTokenizer("ACGT")) == "GA\nT\n"  # those are of the text


def test_a_text_from_a_file_is_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_bytes("tokens é\r\n\n".encode())
    for path in ("prompt.txt", tmp_path / "prompt.txt"):
        assert read_prompts(settings(start=f"FILE:{path}")) == ["tokens é\r\n\n"]


def test_a_text_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("masks é\n".encode())))
    assert read_prompts(settings(start="-")) == ["masks é\n"]


def test_each_line_of_a_file_is_a_text(in_file):
    assert in_file("keys and v\nk\né\n") == ["keys and v", "k", "é"]
    assert in_file("keys") == in_file("keys\n") == in_file("keys\r\n") == ["keys"]
    assert in_file("keys\r\nva\r\n") == ["keys", "va"]
    assert in_file("a\u2028b\x0cc\x1d\n") == ["a\u2028b\x0cc\x1d"]  # only a line end ends a line


@pytest.mark.parametrize(
    "content, says",
    [
        ("", ["line 1"]),
        ("\n", ["line 1"]),
        ("keys\n\nand\n", ["line 2"]),
        ("keys\nand\n\n", ["line 3"]),
        ("keys\r\n\r\n", ["line 2"]),
        (b"keys\n\xff", ["0xff", "offset 5"]),
    ],
)
def test_files_of_prompts_that_can_not_be_continued(in_file, content, says):
    with pytest.raises(UserError) as error:
        in_file(content)
    assert all(part in str(error.value) for part in ["prompts.txt", *says])


def test_what_can_not_be_read_is_named(tmp_path, monkeypatch):
    for setting in ("prompts=nope.txt", "start=FILE:nope.txt", f"prompts={tmp_path}"):
        with pytest.raises(UserError, match=f"--{setting} can't be read: "):
            read_prompts(settings(**dict([setting.split("=")])))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xe9")))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 text \(byte 0xe9 at offset 2\)"):
        read_prompts(settings(start="-"))


# Ids


def test_a_model_of_texts_reads_the_text():
    assert encode_prompt("ab é", TEXTS, settings()) == TEXTS.encode("ab é").tolist()


def test_a_model_of_conversations_reads_all_that_was_said():
    history = [("user", "a"), ("assistant", "bb")]
    found = encode_prompt("c", TALK, settings(system="cab"), history)
    expected = TALK.encode_chat([("system", "cab"), *history, ("user", "c")]).tolist()
    assert found == expected and found[-1] == TALK.assistant
    assert encode_prompt("c", TALK, settings()) == [TALK.system, TALK.user, 2, TALK.assistant]


@pytest.mark.parametrize("tokenizer", [TEXTS, TALK])
def test_characters_that_the_tokenizer_lacks_are_refused_or_left_out(tokenizer):
    with pytest.raises(UserError, match="'X' at position 1.*--unknown=skip"):
        encode_prompt("aXb", tokenizer, settings())
    skip = settings(unknown="skip")
    assert encode_prompt("aXbX", tokenizer, skip) == encode_prompt("ab", tokenizer, skip)


def fit(text, tokenizer=TEXTS, block_size=16, **values):
    config = settings(**values)
    (ids,) = fitted([text], [encode_prompt(text, tokenizer, config)], tokenizer, config, block_size)
    return ids


def test_a_prompt_of_1_token_to_block_size_is_read_whole(capsys):
    assert fit("a") == [0] and fit("ab c" * 4) == TEXTS.encode("ab c" * 4).tolist()
    assert len(fit("a" * 12, TALK, system="b")) == 16
    assert capsys.readouterr().err == ""
    with pytest.raises(
        UserError, match="'' has 0 tokens, but the model continues at least 1: give a --start"
    ):
        fit("")


@pytest.mark.parametrize("length", [17, 18, 100])
def test_of_a_longer_prompt_the_end_is_read_and_a_warning_says_it(capsys, length):
    text = ("abc " * 25)[:length]
    assert fit(text) == TEXTS.encode(text[-16:]).tolist()
    (line,) = capsys.readouterr().err.splitlines()
    shown = repr(text if length <= 40 else f"{text[:40]}...")
    assert line == (
        f"warning: the prompt {shown} has {length} tokens, more than block_size=16: only its end is read"
    )


def test_many_long_prompts_have_one_warning(capsys):
    texts = ["a" * 17, "b", "c" * 18]
    config = settings()
    prompts = [encode_prompt(text, TEXTS, config) for text in texts]
    assert fitted(texts, prompts, TEXTS, config, 16) == [[0] * 16, [1], [2] * 16]
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 prompts" in line and f"{texts[0]!r}" in line and "block_size=16" in line


@pytest.mark.parametrize("tokens, room", [(3, 3), (100, 4), (0, 0)])
@pytest.mark.parametrize("history", [(), [("user", "a"), ("assistant", "b")]])
def test_of_a_long_message_the_end_is_read_after_all_that_comes_before(capsys, tokens, room, history):
    config = settings(system="c", max_new_tokens=tokens)
    text = "abc " * 9 + "ab"
    ids = encode_prompt(text, TALK, config, history)
    (found,) = fitted([text], [ids], TALK, config, 16)
    before = TALK.encode_chat([("system", "c"), *history, ("user", "")]).tolist()[:-1]
    said = found[len(before) : -1]
    assert len(found) == 16 - room and found[: len(before)] == before and found[-1] == TALK.assistant
    assert said and TALK.decode(said) == text[-len(said) :]
    assert "only its end is read" in capsys.readouterr().err


def test_a_system_text_that_leaves_no_room_is_refused():
    for text in ("b" * 40, "a"):
        with pytest.raises(
            UserError, match="'aaaaaaaaaaaaaa.* leave no room for it in block_size=16: shorten --system"
        ):
            fit(text, TALK, system="a" * 14)
