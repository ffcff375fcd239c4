"""The texts to continue, as they are read and turned into ids."""

import io
import sys

import pytest

from kqv.errors import UserError
from kqv.generation.prompts import PromptSettings, encode_prompt, read_prompts, require_length
from kqv.text.tokenizers import CharTokenizer, ChatTokenizer

TEXTS = CharTokenizer("abc é")
TALK = ChatTokenizer(CharTokenizer("abc "))


@pytest.fixture
def in_file(tmp_path):
    """The texts that are read from a file of prompts: in_file("a\\nb\\n") -> ["a", "b"]."""

    def read(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(PromptSettings(prompts=str(path)))

    return read


# Reading


def test_a_text_is_itself_or_a_newline():
    assert read_prompts(PromptSettings(start="keys\nand ")) == ["keys\nand "]
    assert read_prompts(PromptSettings()) == ["\n"]


def test_a_text_from_a_file_is_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_bytes("tokens é\r\n\n".encode())
    for path in ("prompt.txt", tmp_path / "prompt.txt"):
        assert read_prompts(PromptSettings(start=f"FILE:{path}")) == ["tokens é\r\n\n"]


def test_a_text_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("masks é\n".encode())))
    assert read_prompts(PromptSettings(start="-")) == ["masks é\n"]


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
            read_prompts(PromptSettings(**dict([setting.split("=")])))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xe9")))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 text \(byte 0xe9 at offset 2\)"):
        read_prompts(PromptSettings(start="-"))


# Ids


def test_a_model_of_texts_reads_the_text():
    assert encode_prompt("ab é", TEXTS, PromptSettings()) == TEXTS.encode("ab é").tolist()


def test_a_model_of_conversations_reads_all_that_was_said():
    history = [("user", "a"), ("assistant", "bb")]
    found = encode_prompt("c", TALK, PromptSettings(system="cab"), history)
    expected = TALK.encode_chat([("system", "cab"), *history, ("user", "c")]).tolist()
    assert found == expected and found[-1] == TALK.assistant
    assert encode_prompt("c", TALK, PromptSettings()) == [TALK.system, TALK.user, 2, TALK.assistant]


@pytest.mark.parametrize("tokenizer", [TEXTS, TALK])
def test_characters_that_the_tokenizer_lacks_are_refused_or_left_out(tokenizer):
    with pytest.raises(UserError, match="'X' at position 1.*--unknown=skip"):
        encode_prompt("aXb", tokenizer, PromptSettings())
    skip = PromptSettings(unknown="skip")
    assert encode_prompt("aXbX", tokenizer, skip) == encode_prompt("ab", tokenizer, skip)


def test_a_prompt_has_1_token_to_block_size():
    for length in (1, 16):
        require_length("keys", [0] * length, PromptSettings(), 16)
    with pytest.raises(UserError, match="'keys' has 17 tokens, but the model takes 1 to 16: shorten it"):
        require_length("keys", [0] * 17, PromptSettings(), 16)
    with pytest.raises(UserError, match="'' has 0 tokens, but the model takes 1 to 16: give a --start"):
        require_length("", [], PromptSettings(), 16)


@pytest.mark.parametrize("system", ["", "keys "])
def test_a_long_prompt_is_shown_in_part_from_the_system_text_on(system):
    for length, shown in [(40, "keys " * 8), (41, "keys " * 8 + "...")]:
        text = ("keys " * 9)[len(system) : length]
        with pytest.raises(UserError) as error:
            require_length(text, [0] * 17, PromptSettings(system=system), 16)
        assert f"the prompt {shown!r} has 17 tokens" in str(error.value)
