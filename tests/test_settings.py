"""
Settings: where a value comes from, what is refused and in which words, that nanoGPT's own config files run.
"""

import dataclasses
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import typing
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import export
import prepare
import sample
import train
from kqv.errors import UsageError, UserError
from kqv.settings import fill, parse, read_given, setting
from kqv.training.depth import settings_of_depth
from kqv.values import as_utf8
from train import TrainSettings
from tune import TuneSettings

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy
FIELDS = {field.name: field for field in dataclasses.fields(TrainSettings)}
TYPES = typing.get_type_hints(TrainSettings)


def config_file(folder, source, name="a.py"):
    path = folder / name
    path.write_text(source, "utf-8")
    return str(path)


@pytest.fixture
def refused(refusal):
    """Run train.py with settings that must be refused -> the one line that it prints."""
    return partial(refusal, train.main, status=2)


# Where a value comes from


def test_without_arguments_every_setting_has_its_default():
    assert parse(TrainSettings, []) == TrainSettings()


@pytest.mark.parametrize("order", list(itertools.permutations(["a.py", "b.py", "--seed=3"])))
def test_later_config_files_beat_earlier_ones_and_the_command_line_beats_both_wherever_it_stands(
    order, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, "seed = 1; n_layer = 1; n_head = 1", "a.py")
    config_file(tmp_path, "seed = 2; n_layer = 2; n_embd = 2", "b.py")
    last = 1 if order.index("a.py") > order.index("b.py") else 2
    assert parse(TrainSettings, order) == TrainSettings(seed=3, n_layer=last, n_head=1, n_embd=2)


def test_the_last_of_two_values_on_the_command_line_counts():
    assert parse(TrainSettings, ["--seed=1", "--seed", "2"]).seed == 2


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--max_iters=5"], {"max_iters": 5}),
        (["--max_iters", "5"], {"max_iters": 5}),
        (["--max_iters=1e4"], {"max_iters": 10000}),
        (["--max_iters=5.0"], {"max_iters": 5}),
        (["--learning_rate=1"], {"learning_rate": 1.0}),
        (["--learning_rate", "6e-4"], {"learning_rate": 6e-4}),
        (["--eval_only"], {"eval_only": True}),
        (["--eval_only", "False"], {"eval_only": False}),
        (["--decay_lr", "false", "--bias"], {"decay_lr": False, "bias": True}),
        (["--decay_lr=False"], {"decay_lr": False}),
        (["--eval_only", "--bias=true"], {"eval_only": True, "bias": True}),
        (["--compile=auto"], {"compile": "auto"}),
        (["--compile=True"], {"compile": True}),
        (["--compile", "False"], {"compile": False}),
        (["--dtype=bfloat16"], {"dtype": "bfloat16"}),
    ],
)
def test_the_ways_to_write_a_value_on_the_command_line(argv, expected):
    config = parse(TrainSettings, argv)
    assert config == TrainSettings(**expected)
    assert {name: type(getattr(config, name)) for name in expected} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    "text", ["1+1=", "", " two  words ", "'quoted'", '"', "True", "1e4", "--x", "é\n\t$HOME"]
)
def test_text_stays_as_it_was_typed(text, tmp_path):
    assert parse(sample.SampleSettings, [f"--start={text}"]).start == text
    path = config_file(tmp_path, f"wandb_project = {text!r}")
    assert parse(TrainSettings, [path]).wandb_project == text


@pytest.mark.parametrize("text", ["two words", "", "-5 degrees", "a=b", "-"])
def test_text_may_follow_its_name_as_an_argument_of_its_own(text):
    assert parse(sample.SampleSettings, ["--start", text, "--seed=2"]).start == text


def test_a_config_file_is_python_and_only_its_plain_values_are_settings(tmp_path):
    source = """
import math
import os
from dataclasses import dataclass
def heads(layers):
    return 2 * layers
@dataclass
class Helper:
    size: int = 3
_sizes = [64, 128]
n_layer = Helper().size
n_head = heads(n_layer)
n_embd = _sizes[-1] * 3 + math.floor(0.5)
max_iters = 1e4
dropout = 0
eval_only = not True
compile = "auto"
if __name__ == "__main__":
    raise SystemExit("a config file is not a script")
"""
    config = parse(TrainSettings, [config_file(tmp_path, source)])
    assert config == TrainSettings(n_layer=3, n_head=6, n_embd=384, max_iters=10000, dropout=0.0)
    assert type(config.max_iters) is int and type(config.dropout) is float


def test_saved_settings_replace_defaults_and_give_way_to_all_else(tmp_path):
    saved = {"n_layer": 4, "n_head": 4, "n_embd": 64, "compile": True, "of_another_program": [1]}
    config = parse(TrainSettings, [config_file(tmp_path, "n_head = 2"), "--n_embd=32"], saved)
    assert config == TrainSettings(n_layer=4, n_head=2, n_embd=32, compile=True)


def test_settings_can_not_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(TrainSettings, []).seed = 1


# Which settings were given


def test_what_was_given_is_known_with_its_place(tmp_path):
    path = config_file(tmp_path, "n_layer = 2\nn_head = 4\nseed = 1337", "mine.py")
    found = read_given(TrainSettings, [path, "--n_layer=3", "--max_iters", "1e3", "--bias"])
    assert {name: setting.value for name, setting in found.items()} == {
        "n_layer": 3,
        "n_head": 4,
        "seed": 1337,  # as the default, but given
        "max_iters": 1000,
        "bias": True,
    }
    assert [str(found[name]) for name in ("n_layer", "n_head", "max_iters", "bias")] == [
        "--n_layer=3",
        f"{path}: n_head = 4",
        "--max_iters=1e3",
        "--bias=True",
    ]
    found = read_given(sample.SampleSettings, ["--stop=a", "--stop=b"])
    assert found["stop"].value == ("a", "b") and str(found["stop"]) == "--stop=a --stop=b"
    assert read_given(prepare.PrepareSettings, ["a", "b"])["sources"].value == ("a", "b")
    assert read_given(prepare.PrepareSettings, []) == {}


def test_what_a_checkpoint_says_is_not_given(tmp_path):
    found = read_given(TrainSettings, [config_file(tmp_path, "n_head = 2"), "--n_embd=32"])
    config = fill(TrainSettings, found, saved={"n_layer": 4, "n_head": 8})
    assert (config.n_layer, config.n_head, config.n_embd) == (4, 2, 32) and "n_layer" not in found


def test_a_config_file_is_read_once_for_any_number_of_fillings(tmp_path):
    """A pipe, as bash's <(...) is one, has its content once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("n_layer = 3",))
    writer.start()
    found = read_given(TrainSettings, [str(pipe)])
    writer.join()
    assert fill(TrainSettings, found).n_layer == fill(TrainSettings, found, {"n_layer": 5}).n_layer == 3


# A setting that may be given many times


@pytest.mark.parametrize(
    "argv, stop",
    [
        ([], ()),
        (["--stop=a"], ("a",)),
        (["--stop", "a"], ("a",)),
        (["--stop=a", "--seed=2", "--stop", "b c", "--stop=a"], ("a", "b c", "a")),
        (["--stop=a,b", "--stop="], ("a,b", "")),
        (["--stop=--seed=3", "--stop", "-x", "--stop==\n"], ("--seed=3", "-x", "=\n")),
    ],
)
def test_a_setting_may_be_given_many_times(argv, stop):
    config = parse(sample.SampleSettings, argv)
    assert config.stop == stop and config.seed == (2 if "--seed=2" in argv else 1337)


def test_a_config_file_gives_one_of_them_and_the_command_line_replaces_it(tmp_path):
    path = config_file(tmp_path, "stop = 'a b'")
    assert parse(sample.SampleSettings, [path]).stop == ("a b",)
    assert parse(sample.SampleSettings, ["--stop=c", path, "--stop=d"]).stop == ("c", "d")
    assert parse(sample.SampleSettings, [], {"stop": ("a", "b")}).stop == ("a", "b")
    assert parse(sample.SampleSettings, ["--stop=c"], {"stop": ("a", "b")}).stop == ("c",)


def test_what_is_no_text_to_give_many_times_is_refused(refusal, tmp_path):
    refused = partial(refusal, sample.main, status=2)
    assert "stop = 3 is not text" in refused(config_file(tmp_path, "stop = 3"))
    assert "stop is a list" in refused(config_file(tmp_path, "stop = ['a', 'b']"))
    assert "--stop=text" in refused("--stop=a", "--stop")
    assert "--stop=text" in refused("--stop", "--seed=3")
    assert "did you mean stop?" in refused("--stops=a")
    for saved in (["a"], ("a", 3), None, True):
        with pytest.raises(UserError, match="stop"):
            parse(sample.SampleSettings, [], {"stop": saved})


def test_help_shows_what_may_be_given_many_times(cli):
    status, out, err = cli(sample.main, "--help")
    assert (status, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("  --stop="))
    assert line.startswith("  --stop=text ") and "many times" in line and line.endswith("[()]")


def test_arguments_without_a_name_are_no_setting(cli, refusal):
    assert parse(prepare.PrepareSettings, ["a", "--name=x", "b*"]).sources == ("a", "b*")
    line = refusal(prepare.main, "a", "--sources=b", status=2)
    assert "--sources is not a setting" in line
    assert parse(prepare.PrepareSettings, ["a"], {"sources": ["b"], "name": "x"}).sources == ("a",)
    assert "--sources" not in cli(prepare.main, "--help")[1]


def test_a_setting_may_be_given_many_times_beside_arguments_without_a_name():
    @dataclasses.dataclass(frozen=True)
    class Both:
        """usage"""

        stop: tuple[str, ...] = setting((), "given many times")
        files: tuple[str, ...] = ()

    assert parse(Both, ["x", "--stop=a", "y", "--stop", "b"]) == Both(stop=("a", "b"), files=("x", "y"))


# Paths


PATHS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
    for kind in (TrainSettings, sample.SampleSettings, export.ExportSettings, prepare.PrepareSettings)
    for field in dataclasses.fields(kind)
    if field.metadata.get("path")
]
paths = pytest.mark.parametrize("kind, name", PATHS)


@paths
def test_the_home_folder_is_expanded_in_every_path(kind, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    given = {"~/a b": f"{tmp_path}/me/a b", "~": f"{tmp_path}/me", "a/~": "a/~", "./~/a": "./~/a"}
    given |= {"~no_such_user/a": "~no_such_user/a", "~root": os.path.expanduser("~root")}
    (tmp_path / "me").mkdir()
    for text, path in given.items():
        for argv in ([f"--{name}={text}"], [f"--{name}", text]):
            assert getattr(parse(kind, argv), name) == path
        if kind is not prepare.PrepareSettings:
            file = config_file(tmp_path / "me", f"{name} = {text!r}")
            assert getattr(parse(kind, ["~/a.py"]), name) == getattr(parse(kind, [file]), name) == path


def test_sources_and_files_of_prompts_are_paths_too(tmp_path, monkeypatch, refusal):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    sources = parse(prepare.PrepareSettings, ["~/*.txt", "a~"]).sources
    assert sources == (f"{tmp_path}/me/*.txt", "a~")
    assert "--start=FILE:~/a can't be read" in refusal(sample.main, "--start=FILE:~/a", "--device=cpu")
    assert parse(sample.SampleSettings, ["--start=~/a"]).start == "~/a"  # a text, not a path


def test_a_home_folder_that_is_not_known_is_refused(refused, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(
        "pwd.getpwuid", lambda number: {}[number]
    )  # as in a container, for a user without a name
    assert "~/a: the home folder is not known" in refused("--out_dir=~/a")
    assert "~: the home folder is not known" in refused("~")


@paths
def test_an_empty_path_is_refused(kind, name, tmp_path):
    """An unset shell variable makes one."""
    for argv in ([f"--{name}="], [f"--{name}", " "]):
        with pytest.raises(UsageError, match=f"--{name} is empty.*shell variable"):
            parse(kind, argv)
    file = config_file(tmp_path, f"{name} = ''")
    if kind is not prepare.PrepareSettings and getattr(kind, name):
        with pytest.raises(UsageError, match=f"a.py: {name} is empty"):
            parse(kind, [file])
    elif kind is not prepare.PrepareSettings:  # the default, said aloud
        assert getattr(parse(kind, [file]), name) == ""


def test_text_from_a_locale_of_ascii_alone_is_what_was_typed():
    """Python hands over the bytes of UTF-8 as surrogates there."""
    dash = "A—".encode().decode("ascii", "surrogateescape")
    argv = [f"--start={dash}", "--stop", dash, f"--stop={dash}", f"--out_dir={dash}"]
    config = parse(sample.SampleSettings, argv)
    assert (config.start, config.stop) == ("A—", ("A—", "A—"))
    assert config.out_dir == dash  # the system's own name of the file
    assert parse(sample.SampleSettings, ["--start=\udcff"]).start == "\udcff"  # no UTF-8


# What is refused, and in which words


@pytest.mark.parametrize(
    "argv, parts",
    [
        ("--max_iters=1.5", ["--max_iters=1.5", "whole number"]),
        ("--max_iters=True", ["--max_iters=True", "whole number"]),
        ("--max_iters=ten", ["--max_iters=ten", "whole number"]),
        ("--max_iters=", ["--max_iters=", "whole number"]),
        ("--max_iters=inf", ["--max_iters=inf", "whole number"]),
        ("--max_iters=nan", ["--max_iters=nan", "whole number"]),
        ("--max_iters=1\n2", ["--max_iters=1", "whole number"]),
        ("--learning_rate=nan", ["--learning_rate=nan", "finite"]),
        ("--learning_rate=inf", ["--learning_rate=inf", "finite"]),
        ("--learning_rate=1e999", ["--learning_rate=1e999", "finite"]),
        ("--learning_rate=" + "9" * 400, ["--learning_rate=9", "finite"]),
        ("--bias=yes", ["--bias=yes", "True|False"]),
        ("--bias=1", ["--bias=1", "True|False"]),
        ("--dtype=float64", ["--dtype=float64", "bfloat16"]),
        ("--compile=maybe", ["--compile=maybe", "auto"]),
        ("--seed=-1", ["seed", "-1", "at least 0"]),
        ("--seed -1", ["seed", "-1", "at least 0"]),
        ("--learning_rate -1e-3", ["learning_rate", "-0.001", "at least 0"]),
        ("--batch_size=0", ["batch_size", "0", "at least 1"]),
        ("--dropout=1", ["dropout", "1.0", "below 1"]),
        ("--max_iters", ["--max_iters", "needs a value", "--max_iters="]),
        ("--max_iters --bias", ["--max_iters", "needs a value"]),
        ("--max_itrs=3", ["max_itrs", "did you mean max_iters?"]),
        ("--n_layers 3", ["n_layers", "did you mean n_layer?"]),
        ("--batch-size=3", ["batch-size", "did you mean batch_size?"]),
        ("--quite_unlike=3", ["quite_unlike", "--help"]),
        ("-x", ["-x", "--name=value", "--help"]),
        ("--", ["--help"]),
        ("--=3", ["--help"]),
        ("max_iters=3", ["max_iters=3", "did you mean --max_iters=3?"]),
        ("-max_iters=3", ["-max_iters=3", "did you mean --max_iters=3?"]),
        ("-n_layer", ["-n_layer", "did you mean --n_layer?"]),
        ("max_itrs=3", ["max_itrs=3", "No such file", "--name=value"]),
        ("–max_iters=3", ["–max_iters=3 begins with –", "no hyphen", "did you mean --max_iters=3?"]),
        ("—max_iters=3", ["—max_iters=3 begins with —", "no hyphen", "did you mean --max_iters=3?"]),
        ("−−max_iters=3", ["−−max_iters=3 begins with −", "did you mean --max_iters=3?"]),
        ("–unlike=3", ["–unlike=3 begins with –", "--name=value"]),
        ("--max–iters=3", ["max–iters", "did you mean max_iters?"]),
        ("--learning_rate=1e−3", ["--learning_rate=1e−3", "did you mean 1e-3?"]),
        ("--max_iters=5,000", ["--max_iters=5,000", "did you mean 5000?"]),
        ("--max_iters = 3", ["--max_iters =", "blanks", "--max_iters=int"]),
        ("--max_iters =3", ["--max_iters==3", "did you mean 3?"]),
        ("--max_iters= 3", ["--max_iters=", "whole number"]),
        ("--dataset = plays", ["--dataset =", "blanks", "--dataset=text"]),
        ("--dtype=bfloat", ["--dtype=bfloat", "did you mean bfloat16?"]),
        ("--bias=yes", ["--bias=yes", "did you mean True?"]),
        ("--bias=0", ["--bias=0", "did you mean False?"]),
        ("--no_bias", ["no_bias", "write bias=False"]),
        ("--no-decay-lr", ["no-decay-lr", "write decay_lr=False"]),
        ("--config=mine.py", ["config is not a setting", "train.py config/mine.py"]),
        ("--config mine.py", ["config is not a setting", "train.py config/mine.py"]),
        ("plays", ["plays", "No such file", "--dataset=plays"]),
        ("my_plays --seed=x", ["--seed=x"]),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_value_and_the_way_out(argv, parts, refused):
    line = refused(*argv.split(" "))
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "source, parts",
    [
        ("max_itrs = 3", ["max_itrs", "did you mean max_iters?"]),
        ("betas = [0.9, 0.95]", ["betas", "list", "_betas"]),
        ("n_layer = None", ["n_layer", "NoneType"]),
        ("max_iters = 1.5", ["max_iters = 1.5", "whole number"]),
        ("max_iters = True", ["max_iters = True", "whole number"]),
        ("max_iters = '5'", ["max_iters = '5'", "whole number"]),
        ("learning_rate = float('nan')", ["learning_rate = nan", "finite"]),
        ("learning_rate = -float('inf')", ["learning_rate = -inf", "finite"]),
        ("learning_rate = 10**400", ["learning_rate = 1000", "finite"]),
        ("learning_rate = False", ["learning_rate = False", "finite"]),
        ("out_dir = 3", ["out_dir = 3", "text"]),
        (r"out_dir = '\0'", ["out_dir", "text"]),
        ("bias = 1", ["bias = 1", "True|False"]),
        ("compile = 1", ["compile = 1", "auto"]),
        ("dtype = 'float64'", ["dtype = 'float64'", "bfloat16"]),
        ("seed = -1", ["seed", "-1", "at least 0"]),
        ("dropout = 1.0", ["dropout", "1.0", "below 1"]),
        ("seed = 1\n1 / 0", ["line 2", "ZeroDivisionError"]),
        ("def f():\n    raise KeyError('no')\n\nf()", ["line 2", "KeyError"]),
        ("import json\nn_layer = json.loads('{')", ["line 2", "JSONDecodeError"]),
        ("import no_such_module", ["line 1", "no_such_module"]),
        ("seed = 1\nif True", ["line 2", "SyntaxError"]),
        ("seed = 1\nraise SyntaxError('mine')", ["line 2", "mine"]),
        ("import sys\nsys.exit(0)", ["line 2", "SystemExit"]),
        ("raise ValueError('of two\\nlines')", ["line 1", "of two"]),
        ("n_layer = n_head", ["line 1", "n_head"]),
        (f"n_layer = {'-' * 3000}1", ["RecursionError"]),
        (f"n_layer = {'(' * 300}1", ["SyntaxError"]),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_name_and_the_line(source, parts, refused, tmp_path):
    line = refused(config_file(tmp_path, source, "mine.py"))
    in_file = [] if "at least" in parts[-1] or "below" in parts[-1] else ["mine.py"]
    assert all(part in line for part in [*parts, *in_file]), line


def test_a_config_file_that_can_not_be_read_is_refused(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.py").touch()
    (tmp_path / "latin.py").write_bytes("out_dir = 'é'".encode("latin-1"))
    (tmp_path / "null.py").write_bytes(b"seed = 1\0")
    assert "missing.py" in refused("missing.py")
    assert "did you mean latin.py?" in refused("latin1.py")
    assert "did you mean folder/a.py?" in refused("folder/b.py")
    assert "--dataset=folder" in refused("folder/") and "--out_dir=folder" in refused("folder")
    assert "did you mean" not in refused("nowhere/a.py")
    assert "folder" in refused("folder")
    assert "latin.py is not UTF-8" in refused("latin.py")
    assert "null.py" in refused("null.py")


@pytest.mark.parametrize(
    "source, parts",
    [
        ("", ["sets nothing", "name = value"]),
        ("# n_layer = 4\n", ["sets nothing"]),
        ('"""n_layer = 4"""\nimport math\n_n_layer = 4\n', ["sets nothing"]),
        ('{"n_layer": 4}', ["sets nothing"]),
        ("n_layer: 4\nout_dir: out/mine\n", ["line 1", "write n_layer = 4"]),
        ("n_head = 4\nn_layer: 4", ["line 2", "write n_layer = 4"]),
        ("n_layer = 2\nn_layer == 4", ["line 2", "write n_layer = 4"]),
        ("class Config:\n    n_layer = 4", ["line 2", "n_layer", "class Config"]),
        ("n_head = 2\nclass Config:\n    class Model:\n        n_layer: int = 4", ["line 4", "class Model"]),
        ("seed = 1\ndef mine():\n    if True:\n        n_layer = 4", ["line 4", "function mine"]),
        ("seed = 1\nif __name__ == '__main__':\n    n_layer = 4", ["line 3", "if __name__ == '__main__'"]),
        ("seed = 1\ndef n_layer():\n    return 4", ["n_layer is a function", "n_layer = "]),
        ("seed = 1\ndtype = float", ["dtype is a type", "dtype = "]),
        ("import math as device", ["device is a module", "device = "]),
    ],
)
def test_what_seems_to_set_something_and_does_not_is_refused(source, parts, refused, tmp_path):
    line = refused(config_file(tmp_path, source, "mine.py"))
    assert all(part in line for part in ["mine.py", *parts]), line


def test_what_a_config_file_calls_its_own_is_left_alone(tmp_path):
    source = """
class _Base:
    n_layer = 2
    n_head: int

def _times(n_layer):
    dropout = 0.5
    return n_layer * 2

def double(x):
    n_layer = x
    return n_layer

def put():
    global seed
    seed = 5

put()
n_layer = _times(_Base.n_layer) + double(1)
if n_layer > 100:
    n_head = 3
n_embd: int = 64
"""
    config = parse(TrainSettings, [config_file(tmp_path, source)])
    assert config == TrainSettings(n_layer=5, seed=5, n_embd=64)


def test_config_files_do_not_see_each_other(refused, tmp_path):
    first, second = (
        config_file(tmp_path, "n_layer = 2", "a.py"),
        config_file(tmp_path, "n_head = n_layer", "b.py"),
    )
    assert "NameError" in refused(first, second)


# --help


def test_help_shows_every_setting_in_its_group_with_type_default_and_meaning(cli):
    status, out, err = cli(train.main, "--help")
    assert (status, err) == (0, "")
    group_of = {}
    for line in out.splitlines():
        if line and not line.startswith(" "):
            title = line
        elif named := re.match(r"  --(\w+)=(\S+)", line):
            assert named[1] not in group_of
            group_of[named[1]] = title
            field, kind = FIELDS[named[1]], TYPES[named[1]]
            words = [*typing.get_args(kind)] or [{bool: "True|False", str: "text"}.get(kind) or kind.__name__]
            assert all(str(word) in named[2] for word in words), line
            assert field.metadata["help"] in line and repr(field.default) in line
    assert group_of == {
        name: f"{base.__doc__.strip().splitlines()[0]}:"
        for base in TrainSettings.__mro__[1:-1]
        for name in inspect.get_annotations(base)
    }


@pytest.mark.parametrize("argv", [["-h"], ["--seed=1", "--help"], ["missing.py", "--help"]])
def test_help_is_given_wherever_it_is_asked_for(argv, cli):
    status, out, err = cli(train.main, *argv)
    assert (status, err) == (0, "") and "--learning_rate=" in out


def test_help_is_the_same_where_python_leaves_docstrings_out(tmp_path):
    """`python -OO` does."""
    (tmp_path / "mine.py").write_text(
        """
import dataclasses
from kqv.settings import help_text, setting

@dataclasses.dataclass(frozen=True)
class Part:
    \"\"\"A group\"\"\"

    a: int = setting(1, "a number")

@dataclasses.dataclass(frozen=True)
class Whole(Part):
    \"\"\"
    usage: mine

    Do something.
    \"\"\"

print(help_text(Whole))
""",
        "utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    plain, stripped = (
        subprocess.check_output(
            [sys.executable, *options, "mine.py"], cwd=tmp_path, env=environment, text=True
        )
        for options in ([], ["-OO"])
    )
    assert plain == stripped and plain.startswith("usage: mine\n\nDo something.\n\nA group:\n  --a=int ")


# Any value, any argument


# What an operating system hands over: any character but NUL, and bytes that are no UTF-8 as lone surrogates.
ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.just("\udcff"))


def values_of(field):
    """A strategy for the values that a setting may have."""
    kind = TYPES[field.name]
    at_least, below, at_most = map(field.metadata.get, ("at_least", "below", "at_most"))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(at_least, None if below is None else below - 1)
    if kind is float:
        bounds = {"exclude_max": below is not None, "allow_nan": False, "allow_infinity": False}
        if at_most is not None:
            return st.floats(at_least, at_most)
        return st.floats(at_least, below, **bounds) | st.integers(
            math.ceil(at_least or 0), 2**53 if below is None else int(below) - 1
        )
    return any_text(field) if kind is str else st.sampled_from(typing.get_args(kind))


def any_text(field):
    """A strategy for text that stays as it is given; not every path does."""
    if field.metadata["path"]:
        return ANY_TEXT.filter(lambda text: text.strip() and not text.startswith("~"))
    return ANY_TEXT.filter(lambda text: as_utf8(text) == text)


ANY_SETTINGS = st.fixed_dictionaries({}, optional={name: values_of(field) for name, field in FIELDS.items()})


def assert_has(config, values):
    """`values` and no others were given to `config`, and each setting is of its declared type."""
    assert config == TrainSettings(**values)
    for name, kind in TYPES.items():
        value = getattr(config, name)
        assert (
            typing.get_origin(kind) is typing.Literal or type(value) is kind or value is FIELDS[name].default
        )


@UNHURRIED
@given(ANY_SETTINGS)
def test_any_values_come_through_the_command_line(values):
    assert_has(parse(TrainSettings, [f"--{name}={value}" for name, value in values.items()]), values)


@UNHURRIED
@given(ANY_SETTINGS.filter(len))
def test_any_values_come_through_a_config_file(values):
    with tempfile.TemporaryDirectory() as folder:
        source = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        assert_has(parse(TrainSettings, [config_file(Path(folder), source)]), values)


NAMES = st.sampled_from([*FIELDS, "help", "max_itrs"]) | ANY_TEXT
ANY_ARGUMENT = ANY_TEXT | NAMES.map("--{}".format) | st.builds("--{}={}".format, NAMES, ANY_TEXT)


@settings(UNHURRIED, max_examples=300)
@given(st.lists(ANY_ARGUMENT))
def test_any_arguments_parse_or_are_refused(argv):
    try:
        assert isinstance(parse(TrainSettings, argv), TrainSettings)
    except UsageError as error:
        assert str(error)
    except SystemExit as stop:
        assert stop.code == 0 and {"--help", "-h"} & set(argv)


# Config files that exist

NANOGPT = {
    "train_gpt2": (
        """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
        {
            "wandb_log": True,
            "wandb_run_name": "gpt2-124M",
            "gradient_accumulation_steps": 40,
            "max_iters": 600000,
            "eval_interval": 1000,
            "log_interval": 10,
            "weight_decay": 0.1,
        },
    ),
    "train_shakespeare_char": (
        """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
        {
            "out_dir": "out-shakespeare-char",
            "dataset": "shakespeare_char",
            "always_save_checkpoint": False,
            "block_size": 256,
            "n_embd": 384,
            "dropout": 0.2,
            "learning_rate": 1e-3,
            "beta2": 0.99,
            "warmup_iters": 100,
        },
    ),
    "finetune_shakespeare": (
        """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
        {
            "init_from": "gpt2-xl",
            "dataset": "shakespeare",
            "learning_rate": 3e-5,
            "decay_lr": False,
            "max_iters": 20,
        },
    ),
    "eval_gpt2": (
        """
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = 'gpt2'
""",
        {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False, "init_from": "gpt2"},
    ),
}


@pytest.mark.parametrize(
    "saved",
    [{"batch_size": -4}, {"dtype": "float31"}, {"dropout": math.nan}, {"n_layer": [1]}, {"seed": 0.5}],
)
def test_a_wrong_value_in_a_checkpoint_is_no_fault_of_the_command(saved):
    (name,) = saved
    with pytest.raises(UserError, match=f"in the checkpoint, {name} .*--{name}=") as caught:
        fill(TrainSettings, {}, saved)
    assert caught.value.status == 1
    own = read_given(TrainSettings, [f"--{name}={getattr(TrainSettings(), name)}"])
    assert fill(TrainSettings, own, saved) == TrainSettings()


@pytest.mark.parametrize("digits", [200, 400, 5000])
def test_a_number_of_many_digits_is_refused_in_a_short_line(refusal, digits):
    line = refusal(train.main, "--max_iters=" + "9" * digits, status=2)
    assert "max_iters" in line and len(line) < 2200


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_config_files_run_unchanged(name, tmp_path):
    source, expected = NANOGPT[name]
    config = parse(
        TrainSettings, [config_file(tmp_path, source, f"{name}.py"), "--compile=False", "--device=cpu"]
    )
    assert {setting: getattr(config, setting) for setting in expected} == expected
    assert (config.compile, config.device) == (False, "cpu")
    if name == "finetune_shakespeare":
        assert re.fullmatch(r"ft-\d+\.\d+", config.wandb_run_name)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_every_config_file_of_this_repository_is_one_for_training_or_tuning(path):
    kind = TuneSettings if path.stem.startswith("tune_") else TrainSettings
    assert parse(kind, [str(path)]) != kind()


OF_SIZE = {"n_layer", "n_embd", "n_head", "n_inner", "batch_size", "gradient_accumulation_steps", "max_iters"}


@pytest.mark.parametrize("name", ["train_plays_char", "train_shakespeare_char_modern", "train_gpt2_modern"])
def test_the_modern_config_files_are_of_one_recipe(name):
    config = parse(TrainSettings, [str(ROOT / f"config/{name}.py")])
    recipe = settings_of_depth(parse(TrainSettings, ["--depth=2"]), {}, 1)
    common = recipe.keys() - OF_SIZE - {"learning_rate", "min_lr"}
    assert {name: getattr(config, name) for name in common} == {name: recipe[name] for name in common}
    assert config.min_lr == config.learning_rate / 50
