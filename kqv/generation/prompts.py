"""The texts to continue, from the command line, a file or standard input."""

import sys
from pathlib import Path

from kqv.errors import UserError


def read_texts(config):
    """The texts to continue."""
    if not config.prompts:
        return [read_prompt(config.start or "\n")]
    content = read_file(config.prompts, f"--prompts={config.prompts}")
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if "" in lines:
        raise UserError(f"{config.prompts} has no text in line {lines.index('') + 1}: give one in each line")
    return lines


def read_prompt(start):
    """The prompt that --start names: the text itself, FILE:path, or - for standard input."""
    if start == "-":
        return decoded(sys.stdin.buffer.read(), "standard input")
    if start.startswith("FILE:"):
        return read_file(start.removeprefix("FILE:"), f"--start={start}")
    return start


def read_file(path, setting):
    """The text of a file that a setting names."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{setting} can't be read: {error.strerror}") from None
    return decoded(content, path)


def decoded(content, name):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start})"
        ) from None
