"""The texts to continue: read from the command line, a file or standard input, and turned into ids."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kqv.errors import UserError
from kqv.settings import setting
from kqv.values import expand_home


@dataclass(frozen=True)
class PromptSettings:
    """The text to continue"""

    start: str = setting(
        "", "the text to continue; FILE:path reads a file, - standard input; empty: ask, or a newline"
    )
    prompts: str = setting("", "a file of texts to continue, one a line", path=True)
    chat: bool = setting(False, "talk, on a terminal or a line of standard input a message; it remembers")
    system: str = setting("", "the instructions that a conversation begins with")
    unknown: Literal["error", "skip"] = setting("error", "what becomes of characters the tokenizer lacks")


def read_prompts(config):
    """
    The texts to continue, a list: the lines of the file --prompts, or the one text of --start, by default a
    newline. Raises UserError for what can't be read, is not UTF-8, or has an empty line.
    """
    if not config.prompts:
        return [read_start(config.start or "\n")]
    content = read_file(config.prompts, f"--prompts={config.prompts}")
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if "" in lines:
        raise UserError(f"{config.prompts} has no text in line {lines.index('') + 1}: give one in each line")
    return lines


def read_start(start):
    """The text that --start names: FILE:path, - for standard input, or the text itself."""
    if start == "-":
        return decode_utf8(sys.stdin.buffer.read(), "standard input")
    if start.startswith("FILE:"):
        return read_file(expand_home(start.removeprefix("FILE:")), f"--start={start}")
    return start


def read_file(path, setting):
    """The text of a file. `setting` is what the user gave, for the message of the UserError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{setting} can't be read: {error.strerror}") from None
    return decode_utf8(content, path)


def decode_utf8(content, name):
    """Bytes -> str. Raises UserError, which begins with `name`, where they are not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start})"
        ) from None


def encode_prompt(text, tokenizer, config, history=()):
    """
    The ids that the model continues: those of the text; for a model of conversations those of a conversation
    that begins with --system, goes on with `history`, [(role, text), ...], and ends with the user's `text`.
    """
    if tokenizer.kind != "chat":
        return tokenizer.encode(text, config.unknown).tolist()
    messages = [("system", config.system), *history, ("user", text)]
    return tokenizer.encode_chat(messages, config.unknown).tolist()


def require_length(text, ids, config, block_size):
    """Raise UserError unless 1 <= len(ids) <= block_size, which is what the model can read of a prompt."""
    if not 1 <= len(ids) <= block_size:
        text = config.system + text
        excerpt = text if len(text) <= 40 else f"{text[:40]}..."
        raise UserError(
            f"the prompt {excerpt!r} has {len(ids)} tokens, but the model takes 1 to {block_size}: "
            + ("shorten it" if ids else "give a --start")
        )
