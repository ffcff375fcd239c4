"""
What a file must say, declared as a form and checked in one place: the file may be damaged, or a stranger's.

    range(1, 10)                a whole number in that range (True is none)
    Numbers(0, 1)               a number from 0 to 1, both included; NaN is in no range
    str, bool, dict, list       a value of exactly that type; `object`: any value
    re.compile("[a-z]+")        a text that the whole pattern matches
    None, "uint16"              that value
    (str, None)                 one of several forms
    [form]                      a list of values of that form
    {str: form}                 a dict whose names have that type, and whose values that form
    {"n": form, "m?": form}     a dict that has at least the names `n` and, if it is there, `m`
"""

import re
import reprlib
from typing import NamedTuple


class Numbers(NamedTuple):
    """The form of a number that may have a fraction: `least <= number <= most`."""

    least: float
    most: float


WHOLE = range(2**63)  # what counts something: 0, 1, 2, ...
SIGNED = range(-(2**63), 2**63)  # any whole number that a computer counts with


def require_form(value, form, name=""):
    """
    Raise ValueError, which says where, where `value`, as it was read from a file, is not of its form. `name`
    says what `value` is; without one it is the whole of the file.
    """
    if isinstance(form, list) and type(value) is list:
        for number, item in enumerate(value):
            require_form(item, form[0], f"{name}[{number}]")
    elif isinstance(form, dict) and type(value) is dict:
        for key, part in parts_of(value, form, name):
            require_form(value[key], part, f"{name}.{key}" if name else str(key))
    elif not fits(value, form):
        raise ValueError(f"{name or 'it'} is {shown(value)}, not {described(form)}")


def parts_of(value, form, name):
    """The keys of a dict that its form, a dict, declares, and the form of each. Raises ValueError."""
    for key, part in form.items():
        if isinstance(key, type):
            if wrong := [other for other in value if type(other) is not key]:
                raise ValueError(f"{name or 'it'} has the name {shown(wrong[0])}, not {described(key)}")
            yield from ((other, part) for other in value)
        elif (plain := key.removesuffix("?")) in value:
            yield plain, part
        elif plain == key:
            raise ValueError(f"{name or 'it'} has no {key}")


def fits(value, form):
    """Whether a value is of a form."""
    match form:
        case tuple() if not isinstance(form, Numbers):
            return any(is_of(value, one) for one in form)
        case range():
            return type(value) is int and value in form
        case Numbers(least, most):
            return (type(value) is float or fits(value, SIGNED)) and least <= value <= most
        case re.Pattern():
            return type(value) is str and form.fullmatch(value) is not None
        case type():
            return form is object or type(value) is form
    return type(value) is type(form) and value == form and not isinstance(form, list | dict)


def is_of(value, form):
    """As `require_form`, but the answer is a bool."""
    try:
        require_form(value, form)
    except ValueError:
        return False
    return True


def described(form):
    """A form in words."""
    match form:
        case tuple() if not isinstance(form, Numbers):
            return " or ".join(dict.fromkeys(map(described, form)))
        case range():
            return f"a whole number from {form.start} to {form.stop - 1}"
        case Numbers(least, most):
            return f"a number from {least:g} to {most:g}"
        case re.Pattern():
            return f"a text as {form.pattern}"
        case type():
            names = {str: "a text", bool: "true or false", dict: "a dict", list: "a list", int: "a number"}
            return names.get(form, form.__name__)
        case list() | dict():
            return described(type(form))
    return repr(form)


def shown(value):
    """A value for a message, cut to a short text: a number with many digits, too, and a tensor."""
    try:
        return " ".join(reprlib.repr(value).split())[:80]
    except Exception:  # a stranger's value: more digits than Python prints, or a tensor without numbers
        return f"a {type(value).__name__} that can't be shown"
