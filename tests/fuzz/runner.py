"""One case: a mutated copy of the originals, a command on it in its own process, and what is wrong then."""

import hashlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from mutators import unchanged
from targets import TARGETS, make_originals

import export
import prepare
import sample
import train
import tune
from kqv import errors

MAINS = {"train": train.main, "sample": sample.main, "export": export.main, "prepare": prepare.main}
MAINS |= {"tune": tune.main}
SECONDS = 10  # of the CPU; more on the clock, since other work may go on beside
MEMORY = 500 << 20  # that a command may take besides three times the file
PRINTED = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]*")


class End(NamedTuple):
    """How a command ended."""

    status: int  # below 0: by that signal
    out: str
    err: str
    result: str  # a digest of what it made of the file
    growth: int  # bytes of memory beyond those of the process before it
    seconds: float  # on the clock


@contextmanager
def originals():
    """A folder with the original files, made in its own process: one that has trained can't be forked."""
    with tempfile.TemporaryDirectory(prefix="kqv-fuzz-") as folder:
        end = forked(lambda: make_originals(Path(folder)), folder, seconds=300)
        if end.status:
            raise RuntimeError(end.err)
        yield Path(folder)


def run_case(name, folder):
    """
    Run the case "TARGET/MUTATOR:NUMBER" on the originals in `folder`. Returns what is wrong ("" for nothing),
    the End, the command, and the folder in which it ran, which is the caller's to remove.
    """
    target_name, mutator_name = parts_of(name)
    target = TARGETS[target_name]
    mutate = next(mutator for mutator in target.mutators if mutator.__name__ == mutator_name)
    chance = random.Random(name)
    command = chance.choice(target.commands)
    place = Path(tempfile.mkdtemp(prefix="kqv-case-"))
    try:
        rewrite = mutated(folder, place, target, mutate, chance)
        end = run(command, place)
        expected = None
        if rewrite or (target.checked and mutator_name in ("change_bytes", "change_a_file")):
            with tempfile.TemporaryDirectory() as plain:
                copy_originals(folder, Path(plain), target)
                if rewrite:
                    shutil.copy(place / target.path, Path(plain, target.path))
                    rewrite(Path(plain, target.path))
                expected = run(command, Path(plain)) if not end.status else None
        problem = what_is_wrong(end, expected, size_of(place / target.path), place)
        if mutate is unchanged and end.status:
            problem = problem or f"an unchanged file is refused: {end.err.strip()}"
        return problem, end, command, place
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def mutated(folder, place, target, mutate, chance):
    """Copy the originals to `place` and mutate them there -> what `mutate` returns."""
    for _ in range(20):
        copy_originals(folder, place, target)
        try:
            return mutate(place / target.path, chance)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            failed = error  # not every tensor can be of every kind, nor every value be written
            shutil.rmtree(place)
            place.mkdir()
    raise failed


def parts_of(name):
    """The target and the mutator of a case's name."""
    target, _, rest = name.rpartition("/")
    return target, rest.partition(":")[0]


def copy_originals(folder, place, target):
    for name in {target.path, *target.needs}:
        source, copy = folder / name, place / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copy(source, copy)


def size_of(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def run(command, place):
    name, *argv = command

    def do():
        sys.argv = [f"{name}.py", *argv]
        errors.run(MAINS[name])
        Path("result").write_text(result_of(name))

    return forked(do, place)


def forked(do, place, seconds=SECONDS):
    """Call `do` in a child process, whose working folder is `place`, within limits -> its End."""
    streams = [Path(place, name) for name in ("stdout", "stderr")]
    before, start = memory_now(), time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        in_child(do, place, streams, seconds)
    deadline = start + 2 * seconds
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    status = os.waitstatus_to_exitcode(status)
    out, err = (path.read_text("utf-8", "replace") for path in streams)
    result = Path(place, "result")
    unit = 1 if sys.platform == "darwin" else 1024
    growth = usage.ru_maxrss * unit - before
    digest = result.read_text() if result.is_file() else ""
    return End(status, out, err, digest, growth, time.monotonic() - start)


def in_child(do, place, streams, seconds):
    """The child's whole life."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(place)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(0),
            open(1, "w", encoding="utf-8"),
            open(2, "w", encoding="utf-8"),
        )
        for limit, value in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 1 << 30),
            (resource.RLIMIT_DATA, 8 << 30),
        ):
            resource.setrlimit(limit, (value, value + 2 if limit == resource.RLIMIT_CPU else value))
        do()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def memory_now():
    """Bytes of this process's memory: a forked child begins with as many."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def result_of(command):
    """What a command made, as a digest."""
    digest = hashlib.sha256()
    if command == "train":
        newest = next((path for path in (Path("new/ckpt.pt"), Path("out/ckpt.pt")) if path.exists()), None)
        if newest and newest.is_file():
            contents = torch.load(newest, weights_only=True)
            for value in numbers_in(
                (contents["model"], contents["optimizer"]["state"], contents["iter_num"])
            ):
                digest.update(value)
    elif command == "sample":
        digest.update(Path("stdout").read_bytes())
    else:
        for path in sorted(
            [*Path("exported").rglob("*"), *Path(".").glob("*.gguf"), *Path("data/new").glob("*.bin")]
        ):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def numbers_in(value):
    """The bytes of all tensors and numbers in a tree."""
    if isinstance(value, torch.Tensor):
        yield (
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if value.dim()
            else repr(value).encode()
        )
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    else:
        yield repr(value).encode()


def what_is_wrong(end, expected, size, place):
    """One line, "" where a command ended as it must."""
    if end.status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it did not end in {SECONDS} seconds"
    if end.status < 0:
        return f"it ended by {signal.Signals(-end.status).name}"
    if Path(place, "ran").exists():
        return "code in the file was run"
    if "Traceback (most recent call last)" in end.err:
        return f"a traceback: {end.err.strip().splitlines()[-1][:200]}"
    if end.growth > 3 * size + MEMORY:
        return f"it took {end.growth >> 20} MB of memory for a file of {size:,} bytes"
    if not PRINTED.fullmatch(end.err):
        return f"control codes in its message: {end.err!a:.300}"
    if end.status not in (0, 1, 2):
        return f"its status is {end.status}"
    errors_said = [line for line in end.err.splitlines() if line.startswith("error: ")]
    if len(errors_said) != (end.status > 0) or (end.status and end.err.splitlines()[-1:] != errors_said):
        return f"status {end.status}, but its message is {end.err!a:.300}"
    if "error: out of memory" in end.err:
        return f"it wants all memory for a file of {size:,} bytes"
    if len(end.err) > 3000:
        return f"its message has {len(end.err)} characters: {end.err!a:.100}"
    if expected and not end.status and end.result != expected.result:
        return "it reads the file as something else, silently"
    return ""
