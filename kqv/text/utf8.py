"""A UTF-8 file -> text: in stretches of at most about a megabyte, or in lines."""

import re

from kqv.errors import UserError
from kqv.text.opening import likely_conversion

PIECE = 2**20  # bytes of text that are read at once

ROW = 16 * 2**20  # the most bytes of a row, of a table or of JSON; one of JSON can take 25 times as many


def stretches(file, name, cut=None):
    """
    (whether it comes after byte `cut`, text) for all of a UTF-8 file, at most PIECE bytes at a time. `name`
    is the file's, for messages. Raises UserError.

    A stretch ends before the space between two words where it can. Then its tokens are those of the whole
    text, since no token goes from a word into the space after it.
    """
    rest, ended, done, place = b"", False, 0, (1, 0)
    while True:
        while not ended and len(rest) < PIECE + 4:
            more = file.read(PIECE)
            rest, ended = rest + more, not more
        if not rest:
            return
        end = len(rest) if ended and len(rest) <= PIECE else end_of_stretch(rest)
        if cut is not None and done < cut < done + end:
            end = next_character(rest, cut - done)
        text = decode(rest[:end], name, place)
        if text:
            yield cut is not None and done >= cut, text
        done, rest, place = done + end, rest[end:], place_after(rest[:end], place)


def end_of_stretch(data):
    """Where to end a stretch of at most PIECE bytes."""
    for last in (rb"\S(?= )", rb"\S\n(?=\S)"):
        if found := re.match(rb"(?s).*" + last, data[: PIECE + 1]):
            return found.end()
    return next_character(data, PIECE)


def next_character(data, at):
    """Where the first character begins at or after byte `at`; \\r\\n counts as one."""
    while at < len(data) and (0x80 <= data[at] < 0xC0 or data[at - 1 : at + 1] == b"\r\n"):
        at += 1
    return at


def lines(file, name, most=ROW):
    """
    (number, text without its end) of each line, which ends in \\n, \\r\\n or \\r. Raises UserError, also for
    a line of more than `most` bytes, of which no more is read.
    """
    number, beginning, size, rest = 1, [], 0, b""
    while block := rest + file.read(PIECE):
        rest = file.read(1) if block.endswith(b"\r") else b""
        if rest == b"\n":
            block, rest = block + rest, b""
        # Without \r, a plain split is ten times as fast.
        first, *others = re.split(rb"\r\n|\r|\n", block) if b"\r" in block else block.split(b"\n")
        beginning.append(first)
        size += len(first)
        require_short(size, most, f"{name}, line {number}")
        for part in others:
            yield number, decode(b"".join(beginning), name, (number, 0))
            number, beginning, size = number + 1, [part], len(part)
    if last := b"".join(beginning):
        yield number, decode(last, name, (number, 0))


def require_short(size, most, where):
    """Raise UserError where a row, which is held in memory whole, has more bytes than `most`."""
    if size > most:
        raise UserError(
            f"{where} has more than {most / 2**20:g} MB: divide what is so long, or give --max_row_mb="
            f"{2 * most / 2**20:g}, which needs up to {50 * most / 2**30:.1f} GB of memory"
        )


def with_newlines(text):
    """A text whose lines end in \\n, where they ended in \\r\\n or \\r."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode(content, name, place):
    """
    UTF-8 bytes -> text, without the byte order mark that a file may begin with. `place` is where the bytes
    begin in the file, (line, byte of the line), for the message. Raises UserError.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number, offset = place_after(content[: error.start], place)
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {offset} of line {number})"
            f": {likely_conversion(content)}"
        ) from None
    return text.removeprefix("\ufeff") if place == (1, 0) else text


def place_after(content, place):
    """The place in a file, (line, byte of the line), after `content` that begins at `place`."""
    line, offset = place
    lines = content.count(b"\n")
    return line + lines, len(content) - (content.rfind(b"\n") + 1) + (0 if lines else offset)
