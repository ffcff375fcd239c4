"""
An exercise: a copy of the project without one function, and a grade of what a learner writes there.

What the learner wrote is called on small inputs. If it gives what the project's own function gives, the
project's tests run on the copy. If it gives what a known mistake gives, the line of that mistake is printed.
"""

import ast
import importlib.util
import shutil
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "model.py",
    "train.py",
    "sample.py",
    "prepare.py",
    "export.py",
    "bench.py",
    "look.py",
    "pyproject.toml",
)
FOLDERS = ("kqv", "tests", "exercises", "config")
MISSING = "raise NotImplementedError"
SECONDS = 30  # that a learner's function may take


@dataclass(frozen=True)
class Exercise:
    """One exercise. `names` are functions of `file`, "Class.method" too."""

    title: str
    file: str
    names: tuple
    task: str  # what is missing, with shapes
    calls: object  # (module) -> a list of results on small inputs
    tests: tuple  # arguments of pytest
    mistakes: dict = field(default_factory=dict)  # {line that helps: (text of the function, wrong text)}


# The copy


def folder_of(number):
    return ROOT / "out" / "exercises" / f"{number:02}"


def make_copy(exercise, folder):
    """A copy of the project in `folder`, without the bodies of the exercise's functions."""
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / exercise.file
    path.write_text(without_bodies(path.read_text("utf-8"), exercise.names), "utf-8")


def functions_in(source, names):
    """The nodes of the functions of these names, in the order of the file."""
    found = []
    for node in ast.parse(source).body:
        inner = [(node.name, node)] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef):
            inner = [
                (f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef)
            ]
        found += [one for name, one in inner if name in names]
    if len(found) != len(names):
        raise ValueError(f"{', '.join(names)}: not all are in the file")
    return found


def without_bodies(source, names):
    """The source with `raise NotImplementedError` after the docstring of each function."""
    lines = source.splitlines(keepends=True)
    for node in reversed(functions_in(source, names)):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        indent = " " * body[0].col_offset
        first = body[0].lineno - 1
        while lines[first - 1].lstrip().startswith("#"):  # a comment that tells the answer
            first -= 1
        lines[first : node.end_lineno] = [f"{indent}{MISSING}  # write this function\n"]
    return "".join(lines)


def text_of(source, name):
    (node,) = functions_in(source, (name,))
    return ast.get_source_segment(source, node)


def line_of(path):
    """The number of the first line that is still to be written; None: there is none."""
    lines = path.read_text("utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if line.strip().startswith(MISSING)), None)


# The grade


def module_from(source, name, path):
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look there
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def original(exercise):
    path = ROOT / exercise.file
    spec = importlib.util.spec_from_file_location("original_of_exercise", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mistaken(exercise, right, wrong):
    """The module of the exercise with a mistake in it."""
    path = ROOT / exercise.file
    source = path.read_text("utf-8")
    if source.count(right) != 1:
        raise ValueError(f"{exercise.title}: {right!r} is there {source.count(right)} times")
    return module_from(source.replace(right, wrong), "mistake_of_exercise", path)


def outcome(exercise, module):
    """The results of an exercise's calls, or the error of one."""
    torch.manual_seed(0)
    try:
        with torch.no_grad(), seconds(SECONDS):
            return list(exercise.calls(module))
    except Exception as error:
        return error


@contextmanager
def seconds(limit):
    """A context that ends in TimeoutError after so many seconds."""

    def stop(number, frame):
        raise TimeoutError(f"it did not end in {limit} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain(result):
    """A result as nested lists of numbers, with the shape of an array."""
    if isinstance(result, torch.Tensor):
        result = result.detach().double().numpy() if result.is_floating_point() else result.numpy()
    if isinstance(result, (np.ndarray, np.generic)):
        return result
    if isinstance(result, (list, tuple)):
        return [plain(one) for one in result]
    return result


def same(a, b):
    if isinstance(a, list) or isinstance(b, list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (np.ndarray, np.generic, float, int)) and isinstance(
        b, (np.ndarray, np.generic, float, int)
    ):
        return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True))
    return a == b


def difference(found, wanted):
    """One line on how a result differs from the one that is wanted."""
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            count = len(found) if isinstance(found, list) else "no list"
            return f"it gives {count} results, and {len(wanted)} are wanted"
        return next(difference(a, b) for a, b in zip(found, wanted, strict=True) if not same(a, b))
    if np.shape(found) != np.shape(wanted):
        return f"it gives the shape {np.shape(found)}, and {np.shape(wanted)} is wanted"
    if np.shape(wanted):
        place = np.argwhere(~np.isclose(found, wanted, rtol=1e-5, atol=1e-7, equal_nan=True))[0].tolist()
        a, b = np.asarray(found)[tuple(place)], np.asarray(wanted)[tuple(place)]
        return f"the shape is right, but at {place} it gives {a:.6g}, and {b:.6g} is wanted"
    return f"it gives {found}, and {wanted} is wanted"


def fault(exercise, path):
    """What is wrong with the learner's function in the file at `path`, in one line; None: nothing."""
    try:
        module = module_from(path.read_text("utf-8"), "learner_of_exercise", path)
    except Exception as error:
        return f"the file can't be run: {type(error).__name__}: {error}"
    found, wanted = outcome(exercise, module), outcome(exercise, original(exercise))
    if isinstance(found, Exception):
        return f"it raises {type(found).__name__}: {found}"
    found, wanted = plain(found), plain(wanted)
    if same(found, wanted):
        return None
    for hint, (right, wrong) in exercise.mistakes.items():
        result = outcome(exercise, mistaken(exercise, right, wrong))
        if not isinstance(result, Exception) and same(found, plain(result)):
            return hint
    return difference(found, wanted)


def run_tests(exercise, folder):
    """Run the project's tests on the copy -> (whether they pass, their last lines)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *exercise.tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    return done.returncode == 0, done.stdout.strip().splitlines()[-3:]
