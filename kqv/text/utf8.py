"""A UTF-8 file -> text, in stretches of at most about a megabyte."""

import re

from kqv.errors import UserError

PIECE = 2**20  # bytes of text that are read at once


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
    """Where the first character begins at or after byte `at`."""
    while at < len(data) and 0x80 <= data[at] < 0xC0:
        at += 1
    return at


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
            ": convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from None
    return text.removeprefix("\ufeff") if place == (1, 0) else text


def place_after(content, place):
    """The place in a file, (line, byte of the line), after `content` that begins at `place`."""
    line, offset = place
    lines = content.count(b"\n")
    return line + lines, len(content) - (content.rfind(b"\n") + 1) + (0 if lines else offset)
