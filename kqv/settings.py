"""
Typed settings, declared once as a frozen dataclass and filled in this order: defaults < config files <
command line.

    python train.py config/a.py config/b.py --batch_size=32 --dtype float32 --eval_only

A config file is the user's own Python, run in an empty namespace; the plain values that it leaves behind are
settings.
"""

import dataclasses
import difflib
import inspect
import math
import sys
import types
import typing

from kqv.errors import UsageError

PLAIN = (bool, int, float, str)


def setting(default, help, at_least=None, below=None):
    """A dataclass field with a line of help and, for a number, bounds: `at_least <= value < below`."""
    return dataclasses.field(default=default, metadata={"help": help, "at_least": at_least, "below": below})


@dataclasses.dataclass(frozen=True)
class Given:
    """A setting that the user gave; as text, where and how: "--n_layer=4", "mine.py: n_layer = 4"."""

    value: object
    where: str

    def __str__(self):
        return self.where


def parse(cls, argv, saved=None):
    """
    The settings that a command line asks for, as an instance of the frozen dataclass `cls`: `fill`, with what
    `read_given` finds there.
    """
    return fill(cls, read_given(cls, argv), saved)


def read_given(cls, argv):
    """
    What a command line gives -> {name: Given}, without defaults and without what a checkpoint says.

    Arguments that begin with `--` are settings: `--name=value`, `--name value`, and `--name` alone for a
    bool; one of type tuple[str, ...] may be given many times. The others are config files, or, where `cls`
    has a field of that type without `setting`, that field's values. `--help` prints every setting and exits.
    Raises UsageError.
    """
    types_of = typing.get_type_hints(cls)
    many = positional_name(cls)
    types_of.pop(many, None)
    positional, texts = split_arguments(cls, types_of, argv)
    given = {}
    if many and positional:
        given[many] = Given(tuple(positional), " ".join(positional))
    for path in [] if many else positional:
        for name, value in read_config_file(path).items():
            require_known(name, types_of, where=f"{path}: ")
            value = convert(name, value, types_of[name], where=f"{path}: ")
            given[name] = Given(value, f"{path}: {name} = {value!r}")
    for name, text in texts.items():
        value = convert(name, text, types_of[name], where="--", from_text=True)
        given[name] = Given(value, " ".join(f"--{name}={part}" for part in always_tuple(text)))
    return given


def fill(cls, given, saved=None):
    """
    An instance of `cls` with {name: Given}, and defaults for the rest; `saved`, {name: value}, replaces
    defaults (a checkpoint's settings on resume) where it is not None. Raises UsageError.
    """
    types_of = typing.get_type_hints(cls)
    types_of.pop(positional_name(cls), None)
    saved = saved or {}
    values = {
        name: convert(name, saved[name], types_of[name], where="the checkpoint's ")
        for name in saved
        if name in types_of and name not in given and saved[name] is not None
    }
    values |= {name: given[name].value for name in given}
    for field in dataclasses.fields(cls):
        if field.name in values:
            check_bounds(field, values[field.name])
    return cls(**values)


def override(config, values, where):
    """`config` with {name: Python value} in place of its own. Raises UsageError, beginning with `where`."""
    types_of = typing.get_type_hints(type(config))
    converted = {name: convert(name, value, types_of[name], where) for name, value in values.items()}
    for field in dataclasses.fields(config):
        if field.name in converted:
            check_bounds(field, converted[field.name])
    return dataclasses.replace(config, **converted)


def is_positional(field, types_of):
    """Whether a field takes the arguments without a name."""
    return types_of[field.name] == tuple[str, ...] and "help" not in field.metadata


def positional_name(cls):
    """The name of the field of `cls` that takes the arguments without a name; None: there is none."""
    types_of = typing.get_type_hints(cls)
    return next((field.name for field in dataclasses.fields(cls) if is_positional(field, types_of)), None)


def always_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def split_arguments(cls, types_of, argv):
    """
    Command line -> (positional arguments, {name: text}); a bool named alone has the text "True". --help
    prints the help and exits.
    """
    positional, given = [], {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h"):
            print(help_text(cls))
            sys.exit(0)
        if argument.startswith("--"):
            name, text = take_setting(argument, rest, types_of)
            given[name] = (*given.get(name, ()), text) if types_of[name] == tuple[str, ...] else text
        elif argument.startswith("-") and len(argument) > 1:
            raise UsageError(f"{argument} is not understood: settings are written --name=value (see --help)")
        else:
            positional.append(argument)
    return positional, given


def take_setting(argument, rest, types_of):
    """
    "--name=value", or "--name" and its value, which is taken from `rest`, the arguments that follow ->
    (name, text). Raises UsageError.
    """
    name, equals, text = argument[2:].partition("=")
    require_known(name, types_of, where="--")
    if equals:
        return name, text
    if types_of[name] is bool:
        return name, rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "True"
    if rest and not rest[0].startswith("--"):
        return name, rest.pop(0)
    raise UsageError(f"--{name} needs a value: --{name}={kind_name(types_of[name])}")


def read_config_file(path):
    """
    The plain values that a config file leaves behind, as {name: value}. Names that begin with _ are its own.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            source = file.read()
    except OSError as error:
        raise UsageError(
            f"config file {path}: {error.strerror} (settings are written --name=value)"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"config file {path} is not UTF-8 text") from None
    namespace = {"__name__": "config", "__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's code raises, SystemExit too, is an error in it
        raise UsageError(
            f"config file {path}{line_of(error, path)}: {type(error).__name__}: {error}"
        ) from None
    values = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, (types.ModuleType, type)) or callable(value):
            continue
        if not isinstance(value, PLAIN):
            raise UsageError(
                f"{path}: {name} is a {type(value).__name__}, but a setting is a plain value "
                f"(bool, int, float or str): rename a helper to _{name}"
            )
        values[name] = value
    return values


def line_of(error, path):
    """Where in the file at `path` an exception came from, as ", line N"; "" where that is not known."""
    if isinstance(error, SyntaxError) and error.filename == path and error.lineno:
        return f", line {error.lineno}"
    lines = []
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def require_known(name, types_of, where):
    """Raise UsageError for a name that is no setting, with the nearest one that is."""
    if name not in types_of:
        near = difflib.get_close_matches(name, types_of, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
        raise UsageError(f"{where}{name} is not a setting: {hint}")


def convert(name, value, kind, where, from_text=False):
    """
    `value` as the declared type, from a config file (a Python value) or from the command line (a string).
    """
    converted = from_string(value, kind) if from_text else from_value(value, kind)
    if converted is None:
        shown = f"{where}{name}={value}" if from_text else f"{where}{name} = {value!r}"
        raise UsageError(f"{shown} is not {article(kind_name(kind))}")
    return converted


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


def check_bounds(field, value):
    """Raise UsageError for a value outside the bounds of its setting."""
    at_least, below = field.metadata.get("at_least"), field.metadata.get("below")
    if at_least is not None and value < at_least:
        raise UsageError(f"{field.name} is {value}, but it must be at least {at_least}")
    if below is not None and value >= below:
        raise UsageError(f"{field.name} is {value}, but it must be below {below}")


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


def help_text(cls):
    """
    What --help prints: the docstring of `cls`, then each group's settings with type, help and default.
    """
    lines = [cls.__doc__.strip()]
    types_of = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for group in reversed(cls.__mro__):  # a base class is a group, titled by its docstring's first line
        own = [fields[name] for name in inspect.get_annotations(group) if name in fields]
        own = [field for field in own if not is_positional(field, types_of)]
        if own:
            title = "settings" if group is cls else group.__doc__.strip().splitlines()[0]
            lines += ["", f"{title}:"]
        for field in own:
            head = f"  --{field.name}={kind_name(types_of[field.name])}"
            lines.append(f"{head:<52} {field.metadata['help']} [{field.default!r}]")
    return "\n".join(lines)


def group(name, title, source, without=(), at_least=1, **defaults):
    """
    A settings group made of another dataclass's fields, which are Annotated[type, "help"], so that a field
    that is added there is a setting here: all of `source` but `without`, with `defaults` in place of its own.
    A whole number must be `at_least` that.
    """
    fields = []
    for field in dataclasses.fields(source):
        if field.name not in without:
            hint = typing.get_type_hints(source, include_extras=True)[field.name]
            kind, help = hint.__origin__, hint.__metadata__[0]
            default = defaults.get(field.name, field.default)
            bound = at_least if kind is int else None
            fields.append((field.name, kind, setting(default, help, at_least=bound)))
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": title})
