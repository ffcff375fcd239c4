"""
Text as it can be shown. Names in files of strangers may hold characters that a terminal takes for commands
(ESC moves its cursor, U+202E reverses a line) or that nobody sees. They are written out, as in Python:
\\x1b, \\u202e.
"""

LONGEST = 2000  # characters of a message: a value in it may have many more

JOINERS = "\u200c\u200d"  # they join letters of Hindi and Persian, and emoji

BLACK_FLAG = "\U0001f3f4"  # the tags after it say whose flag it is

HIDDEN = (  # control codes, lone surrogates, ends of lines, and the format characters that have no form
    *("\x00\x1f", "\x7f\x9f", "\xad\xad", "\u061c\u061c", "\u180e\u180e", "\u200b\u200f", "\u2028\u202e"),
    *("\u2060\u206f", "\ud800\udfff", "\ufeff\ufeff", "\ufff9\ufffb", "\U0001bca0\U0001bca3"),
    *("\U0001d173\U0001d17a", "\U000e0000\U000e007f"),
)


def printable(text, stays="\n\t", before=""):
    """
    The text with every hidden character written out, but those in `stays`. `before` is the text that it
    follows, of which the last character counts: a joiner stays after a letter that is not ASCII.
    """
    if text.isprintable():
        return text
    shown = [before]
    for char in text:
        seen = char in stays or char.isprintable() or is_seen(char, shown[-1][-1:])
        shown.append(char if seen else ascii(char)[1:-1])
    return "".join(shown[1:])


def one_line(text):
    """The text as a line of a message: with its newlines written out, too, and without the middle if long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return printable(text.strip(), stays="")


def is_seen(char, before):
    """Whether a reader sees the character, or what it makes of the one `before` it ("": there is none)."""
    if char in JOINERS:
        return before > "\x7f" and before not in JOINERS
    if "\U000e0020" <= char <= "\U000e007f":
        return before == BLACK_FLAG or "\U000e0020" <= before <= "\U000e007f"
    return not any(first <= char <= last for first, last in HIDDEN)


def without_commands(text, before=""):
    """
    `printable` for what libraries write on standard error: they draw progress bars, and their commands to
    move to the beginning of a line, or to an earlier line, stay. Colours are left out.
    """
    if "\x1b" not in text and "\r" not in text:
        return printable(text, before=before)
    import re  # slow, and a command that draws nothing needs no `re`

    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    if re.fullmatch(r"(\r|\n|\x1b\[Am?|\x1b\[2K)*", text):
        return text
    start = "\r" if text.startswith("\r") else ""
    return start + printable(text.removeprefix(start), before=start or before)
