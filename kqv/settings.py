"""
Typed settings, declared once as a frozen dataclass and filled in this order: defaults < config files <
command line.

    python train.py config/a.py config/b.py --batch_size=32 --dtype float32 --eval_only

A config file is the user's own Python, run in an empty namespace; the plain values that it leaves behind are
settings.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import sys
import typing

from kqv.config_files import read_config_file, require_config_file
from kqv.errors import UsageError, UserError
from kqv.values import HYPHENS, as_utf8, convert, expand_home, kind_name, require_path


def setting(default, help, at_least=None, below=None, at_most=None, path=False):
    """
    A dataclass field with a line of help and, for a number, bounds: `at_least <= value < below`, and
    `value <= at_most`. A `path` is text that is, or may be, the name of a file or folder.
    """
    metadata = {"help": help, "at_least": at_least, "below": below, "at_most": at_most, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Given:
    """A setting that the user gave; as text, where and how: "--n_layer=4", "mine.py: n_layer = 4"."""

    value: object
    where: str

    def __str__(self):
        return self.where


def refuse_unused(table, config, given):
    """
    Raise UsageError where the user gave a setting that means nothing. A row of the table: names of settings,
    a function of the config that says whether they mean nothing, and that in words.
    """
    for names, mean_nothing, reason in table:
        if mean_nothing(config):
            refuse(given, names, reason)


def refuse(given, names, reason):
    """Raise UsageError where one of the settings was given. (A given False is accepted.)"""
    for name in names:
        if name in given and given[name].value is not False:
            raise UsageError(f"{given[name]} means nothing {reason}: leave it out")


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
    paths = {field.name for field in dataclasses.fields(cls) if field.metadata.get("path")}
    positional, texts = split_arguments(cls, types_of, argv)
    positional = [expand_home(path) for path in positional]
    named = {}
    for name, text in texts.items():
        text = require_path(text, "--" + name, "") if name in paths else as_utf8(text)
        value = convert(name, text, types_of[name], where="--", from_text=True)
        named[name] = Given(value, " ".join(f"--{name}={part}" for part in always_tuple(text)))
    if many:
        return named | ({many: Given(tuple(positional), " ".join(positional))} if positional else {})
    given = {}
    for path in positional:
        require_config_file(path, types_of)
        for name, value in read_config_file(path, known=types_of.keys()).items():
            require_known(name, types_of, where=f"{path}: ")
            value = convert(name, value, types_of[name], where=f"{path}: ")
            if name in paths and value != getattr(cls, name):
                value = require_path(value, name, f"{path}: ")
            given[name] = Given(value, f"{path}: {name} = {value!r}")
    return given | named


def fill(cls, given, saved=None):
    """
    An instance of `cls` with {name: Given}, and defaults for the rest. `saved`, {name: value}, replaces
    defaults (a checkpoint's settings on resume); a saved None is ignored where the default is None. Raises
    UsageError, and UserError where a saved value is wrong.
    """
    types_of = typing.get_type_hints(cls)
    types_of.pop(positional_name(cls), None)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {name: given[name].value for name in given}
    for name, value in values.items():
        check_bounds(fields[name], value)
    for name, value in (saved or {}).items():
        if name in types_of and name not in given and (value is not None or fields[name].default is not None):
            try:
                values[name] = convert(name, value, types_of[name], where="")
                check_bounds(fields[name], values[name])
            except UsageError as error:  # it is the checkpoint that is wrong, not the command
                raise UserError(f"in the checkpoint, {error}: give your own, --{name}=...") from None
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
        else:
            require_no_setting(argument, types_of)
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
    if rest[:1] == ["="]:
        raise UsageError(f"--{name} = is cut at the blanks: write --{name}={kind_name(types_of[name])}")
    if rest and not rest[0].startswith("--"):
        return name, rest.pop(0)
    raise UsageError(f"--{name} needs a value: --{name}={kind_name(types_of[name])}")


def require_known(name, types_of, where):
    """Raise UsageError for a name that is no setting, with the nearest one that is."""
    if name in types_of:
        return
    negated = name.removeprefix("no").lstrip("-_").replace("-", "_")
    near = difflib.get_close_matches(name, types_of, n=1)
    if name == "config":
        hint = "a config file is named without it, as in train.py config/mine.py"
    elif name == "compile" and "engine" in types_of:
        hint = "here it is --engine=compiled or --engine=plain"
    elif name.startswith("no") and types_of.get(negated) is bool:
        hint = f"write {negated}=False"
    else:
        hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
    raise UsageError(f"{where}{name} is not a setting: {hint}")


def require_no_setting(argument, types_of):
    """Raise UsageError for an argument that is meant as a setting and does not begin with two hyphens."""
    plain = argument.translate(HYPHENS)
    name = plain.lstrip("-").partition("=")[0]
    meant = plain.startswith("-") and len(plain) > 1 or "=" in plain and name in types_of
    if not meant or os.path.exists(argument) and argument[0] != "-":
        return
    if argument[0] not in plain:
        reason = f"begins with {argument[0]}, which is no hyphen"
    else:
        reason = "is not understood"
    way = f"did you mean --{plain.lstrip('-')}?" if name in types_of else "settings are written --name=value"
    raise UsageError(f"{argument} {reason}: {way} (see --help)")


def check_bounds(field, value):
    """Raise UsageError for a value outside the bounds of its setting."""
    if isinstance(value, int) and abs(value) >= 10**100:  # past 10**308 it can't be compared with a float
        raise UsageError(f"{field.name} has {len(str(abs(value)))} digits: give a smaller number")
    at_least, below, at_most = map(field.metadata.get, ("at_least", "below", "at_most"))
    if at_least is not None and not value >= at_least:  # `not`, since NaN fails every comparison
        raise UsageError(f"{field.name} is {value}, but it must be at least {at_least}")
    if below is not None and not value < below:
        raise UsageError(f"{field.name} is {value}, but it must be below {below}")
    if at_most is not None and not value <= at_most:
        raise UsageError(f"{field.name} is {value}, but it must be at most {at_most}")


def help_text(cls):
    """
    What --help prints: the docstring of `cls`, then each group's settings with type, help and default.
    """
    lines = [docstring(cls)]
    types_of = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for group in reversed(cls.__mro__):  # a base class is a group, titled by its docstring's first line
        own = [fields.pop(name) for name in inspect.get_annotations(group) if name in fields]
        own = [field for field in own if not is_positional(field, types_of)]
        if own:
            title = "settings" if group is cls else docstring(group).splitlines()[0]
            lines += ["", f"{title}:"]
        for field in own:
            head = f"  --{field.name}={kind_name(types_of[field.name])}"
            lines.append(f"{head:<52} {field.metadata['help']} [{field.default!r}]")
    return "\n".join(lines)


def docstring(cls):
    """A class's docstring; under `python -OO`, which leaves it out, read from the source."""
    if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):  # what a dataclass puts there instead
        tree = ast.parse(inspect.cleandoc(inspect.getsource(cls)))
        return ast.get_docstring(tree.body[0])
    return inspect.cleandoc(cls.__doc__)


def group(name, title, source, without=(), at_least=1, **defaults):
    """
    A settings group made of the fields of another dataclass, `source`, which are Annotated[type, "help"]. So
    a field that is added there is a setting here. Fields in `without` are left out; `defaults` replace those
    of the source. `at_least` is the lower bound of whole numbers.
    """
    fields = []
    for field in dataclasses.fields(source):
        if field.name not in without:
            hint = typing.get_type_hints(source, include_extras=True)[field.name]
            kind, help = hint.__origin__, hint.__metadata__[0]
            default = defaults.get(field.name, field.default)
            bound = min(at_least, default) if kind is int else None
            fields.append((field.name, kind, setting(default, help, at_least=bound)))
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": title})
