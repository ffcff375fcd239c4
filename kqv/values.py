"""A setting's value: from text or a Python value to the type that the setting declares."""

import difflib
import math
import os
import typing

from kqv.errors import UsageError

# Signs that web pages and word processors put in the place of -
HYPHENS = str.maketrans(dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"))


def convert(name, value, kind, where, from_text=False):
    """
    `value` as the declared type, from a config file (a Python value) or from the command line (a string).
    """
    converted = from_string(value, kind) if from_text else from_value(value, kind)
    if converted is None:
        shown = f"{where}{name}={value}" if from_text else f"{where}{name} = {value!r}"
        raise UsageError(f"{shown} is not {article(kind_name(kind))}{nearest(value, kind)}")
    return converted


def nearest(value, kind):
    """What a wrong value of that kind may stand for, as ": did you mean ...?", or ""."""
    text = str(value).lower()
    if kind is bool:
        near = {"yes": "True", "on": "True", "1": "True", "no": "False", "off": "False", "0": "False"}.get(
            text
        )
    elif typing.get_origin(kind) is typing.Literal:
        near = next(iter(difflib.get_close_matches(text, map(str, typing.get_args(kind)), n=1)), None)
    else:
        plain = text.translate(HYPHENS).lstrip("= ").replace(",", "")
        near = plain if plain != text and from_string(plain, kind) is not None else None
    return f": did you mean {near}?" if near else ""


def from_string(text, kind):
    """A command-line string as `kind`, or None where it is not one."""
    if kind is str or kind == tuple[str, ...]:
        return from_value(text, kind)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if typing.get_origin(kind) is typing.Literal:
        return next((choice for choice in typing.get_args(kind) if str(choice).lower() == text.lower()), None)
    for number in (int, float):  # 1e4 is a whole number too
        try:
            return from_value(number(text), kind)
        except ValueError:
            continue
    return None


def from_value(value, kind):
    """A Python value as `kind`, or None where it is not one: an int serves as a float, 1e4 as an int."""
    if typing.get_origin(kind) is typing.Literal:
        same = (choice for choice in typing.get_args(kind) if type(choice) is type(value) and choice == value)
        return next(same, None)
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind is int:
            return int(value) if isinstance(value, int) or value.is_integer() else None
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None
    if kind == tuple[str, ...]:
        values = (value,) if type(value) is str else value
        return values if isinstance(values, tuple) and all(type(text) is str for text in values) else None
    if kind is str and type(value) is str and "\0" in value:
        return None  # no file name or command line can hold it
    return value if type(value) is kind else None


def kind_name(kind):
    """A type as --help writes it: int, float, True|False, auto|float32|..., text."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    names = {bool: "True|False", str: "text", tuple[str, ...]: "text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def article(kind):
    """A kind_name in a sentence: "a whole number", "one of True|False"."""
    return {"int": "a whole number", "float": "a finite number"}.get(
        kind, kind if kind == "text" else f"one of {kind}"
    )


def require_path(text, name, where):
    """`text` as the name of a file or folder, as a shell would expand it. Raises UsageError."""
    if not text.strip():
        raise UsageError(
            f"{where}{name} is empty: give it a value, or leave it out (is a shell variable not set?)"
        )
    return expand_home(text)


def expand_home(path):
    """A path with ~ and ~user replaced as a shell does it. Raises UsageError where there is no home."""
    expanded = os.path.expanduser(path)
    if expanded.partition("/")[0] == "~":
        raise UsageError(f"{path}: the home folder is not known (HOME is not set): write the whole path")
    return expanded


def as_utf8(text):
    """
    An argument, or each of a tuple of them, read as UTF-8. In an ASCII locale, Python turns each byte of
    other characters into a surrogate; this turns them back.
    """
    if isinstance(text, tuple):
        return tuple(map(as_utf8, text))
    try:
        return os.fsencode(text).decode("utf-8") if any("\ud800" <= c <= "\udfff" for c in text) else text
    except UnicodeError:  # not UTF-8: the code that uses the text reports it
        return text
