"""
A save is killed, or fails, at each of its system calls, one after the other: a resumed run ends as one that
was never stopped.
"""

import builtins
import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import pytest
from conftest import TINY_RUN, results
from test_survival import same, weights

import train
from kqv.errors import run as run_main
from kqv.formats import loading

RUN = [*TINY_RUN, "--dataset=tiny", "--n_layer=1", "--eval_iters=1", "--eval_interval=1"]
RUN += ["--learning_rate=0.05", "--max_iters=4"]


class Moments:
    """Counts what this process writes, renames, removes and syncs, and strikes at one of these."""

    def __init__(self, folder, strike_at, how):
        self.folder, self.strike_at, self.how, self.count = folder, strike_at, how, 0
        self.lock = threading.Lock()

    def __call__(self, what):
        if self.how == "surprise" and threading.current_thread() is threading.main_thread():
            return  # what nobody foresaw in the main thread is a traceback
        with self.lock:
            self.count += 1
            if self.count != self.strike_at:
                return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "fail":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ZeroDivisionError("what nobody foresaw")

    def watch(self):
        """Call this before every system call of Python that changes a file or a folder."""
        for name in ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir", "truncate"):
            setattr(os, name, self.before(getattr(os, name), name))

        moments = self

        class Raw(io.FileIO):
            def write(self, data):
                moments("write")
                return super().write(data)

        plain = builtins.open

        def watched(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest):
            if isinstance(file, int) or not set(mode) & set("wax") or moments.folder not in str(file):
                return plain(file, mode, buffering, encoding, errors, newline, *rest)
            moments("open")
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        builtins.open = io.open = watched

    def before(self, call, name):
        def watched(*arguments, **options):
            self(name)
            return call(*arguments, **options)

        return watched


def in_a_fork(function):
    """The exit status of `function()` in a fork of this process, or minus the signal; and its errors."""
    with tempfile.TemporaryFile("w+") as errors:
        if (child := os.fork()) == 0:
            status = 70
            try:
                sys.stdout, sys.stderr = io.StringIO(), errors
                function()
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                for thread in threading.enumerate():
                    if thread is not threading.main_thread() and not thread.daemon:
                        thread.join()
                errors.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return status, errors.read()


def train_here(*argv, strike=None, folder=None):
    def function():
        sys.argv = ["train.py", *argv]
        if strike:
            moments = Moments(folder, *strike)
            moments.watch()
        try:
            run_main(train.main)
        finally:
            if strike:
                print(f"moments: {moments.count}", file=sys.stderr)

    return in_a_fork(function)


def is_of_the_new_run(folder):
    """Whether --init_from=resume goes on with the new run there."""
    if (folder / ".ckpt.pt.first").exists():
        return True
    path = next(path for path in (folder / "ckpt.pt", folder / "ckpt.prev.pt") if path.exists())
    return loading.load(path)["config"]["seed"] == 1337


@pytest.fixture
def older(cli, tiny_set):
    """A folder with what another run left; one with the new run, never stopped."""
    assert cli(train.main, *RUN, "--seed=2", "--max_iters=2", "--out_dir=older")[0] == 0
    shutil.copytree("older", "straight")
    assert cli(train.main, *RUN, "--out_dir=straight")[0] == 0


@pytest.mark.parametrize("how", ["kill", "fail", "surprise"])
@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_struck_at_any_of_its_moments_is_made_good(older, how, stride):
    shutil.copytree("older", "out")
    _, err = train_here(*RUN, "--out_dir=out", strike=(0, how), folder="out")
    count = int(err.split("moments: ")[1])
    print(count)
    for moment in range(1, count + 1, stride):
        shutil.rmtree("out")
        shutil.copytree("older", "out")
        status, err = train_here(*RUN, "--out_dir=out", strike=(moment, how), folder="out")
        where = f"moment {moment}: {err}"
        assert "Traceback" not in err, where
        if how == "kill":
            assert status == -signal.SIGKILL, where
        else:
            assert status in (0, 1), where
        if status:
            start = ["--init_from=resume"] if is_of_the_new_run(Path("out")) else []
            status, err = train_here(*RUN, *start, "--out_dir=out")
            assert status == 0 and (not err or "using out/ckpt.prev.pt" in err), where + err
        for name in ("ckpt.pt", "best.pt"):
            assert same(weights("out", name), weights("straight", name)), where + name
        if "metrics.jsonl can't be written" not in where:  # that record is lost, and a note says so
            assert results("out") == results("straight"), where
        for name in ("ckpt", "best"):
            assert same(weights("out", f"{name}.old.pt"), weights("older", f"{name}.pt")), where + name
        assert results_of("out/metrics.old.jsonl") == results_of("older/metrics.jsonl"), where
        assert not [path for path in Path("out").iterdir() if path.name.startswith(".ckpt.pt.")], where


def results_of(path):
    return Path(path).read_text()
