"""How a command ends: one line and a status, whatever fails, and whatever its streams are."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, process_environment, script, train_in, write_text

import bench
import export
import prepare
import sample
import train
import tune
from kqv import errors

COMMANDS = ["train.py", "sample.py", "prepare.py", "export.py", "tune.py", "bench.py"]
MAINS = [train.main, sample.main, prepare.main, export.main, tune.main]
MAINS += [lambda argv: bench.main(["train", *argv])]
IDS = ["train", "sample", "prepare", "export", "tune", "bench"]

commands = pytest.mark.parametrize("name", COMMANDS, ids=IDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a prepared set and a run on it, made once."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, "--max_iters=3")
    return folder


def broken_pipe():
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """Run a main with other streams -> (status, standard error): ended(main, *argv, stdout=stream)."""
    monkeypatch.chdir(tmp_path)

    def end(main, *argv, **streams):
        monkeypatch.setattr(sys, "argv", ["command.py", *map(str, argv)])
        status = 0
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            try:
                errors.run(main)
            except SystemExit as stop:
                status = stop.code
        for stream in filter(None, streams.values()):
            stream.close()  # as the interpreter does when it ends: no error may be left for it
        return status, capsys.readouterr().err

    return end


# What fails


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, line",
    [
        (errors.UserError("a\nb"), 1, r"a\nb"),
        (errors.UsageError("a"), 2, "a"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "out/a"), 1, "out/a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),  # another pipe than standard output
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), 1, "nested too deeply"),
        (ImportError("libcudart.so.12: cannot open shared object file"), 1, "libcudart.so.12"),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), 1, "test_errors.py, line"),
    ],
    ids=repr,
)
def test_an_error_ends_in_one_line_and_a_status(error, status, line, ended):
    found, err = ended(raising(error))
    assert found == status and err.startswith("error: ") and line in err and err.count("\n") == 1


def test_memory_that_is_not_there_is_one_line(ended):
    assert "out of memory" in ended(lambda argv: np.zeros(2**60, np.uint8))[1]


def test_what_nobody_foresaw_keeps_its_traceback(ended):
    """It is a fault of the program, and whoever mends it needs to know the place."""
    with pytest.raises(ZeroDivisionError):
        ended(lambda argv: 1 / 0)
    with pytest.raises(RuntimeError, match="another"):
        ended(raising(RuntimeError("another")))


@commands
def test_without_its_packages_a_command_says_what_to_run(name, tmp_path):
    command = [sys.executable, "-S", str(ROOT / name), "--help"]  # -S: no installed packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and " is not installed for " in done.stderr
    assert ".venv/bin/python" in done.stderr or "requirements.txt" in done.stderr


@commands
def test_control_c_while_a_command_is_imported_is_one_line(name, tmp_path):
    first = "numpy" if name == "prepare.py" else "torch"
    (tmp_path / f"{first}.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(60)")
    done = subprocess.run(
        [sys.executable, str(ROOT / name), "--help"],
        env=process_environment(PYTHONPATH=str(tmp_path)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@commands
def test_a_working_folder_that_was_deleted_is_one_line(name, tmp_path):
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    command = ["bash", "-c", script, "bash", sys.executable, str(ROOT / name), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: the working folder has been deleted")
    assert done.stderr.count("\n") == 1


def test_a_copy_of_a_command_is_that_copy(tmp_path):
    """Whoever changes a line of a copy runs the copy."""
    copy = tmp_path / "my prepare.v2.py"
    copy.write_text((ROOT / "prepare.py").read_text("utf-8").replace("no source:", "nothing:"), "utf-8")
    done = script(copy, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing: ")


# Streams


@pytest.mark.parametrize("main", MAINS, ids=IDS)
def test_help_survives_any_standard_output(main, ended):
    assert ended(main, "--help", stdout=broken_pipe()) == (0, "")
    assert ended(main, "--help", stdout=None) == (0, "")
    assert ended(main, "--help", stdout=io.StringIO()) == (0, "")  # as in a notebook, without `reconfigure`
    status, err = ended(main, "--help", stdout=full_disk())
    assert (status, err) == (1, "error: standard output can't be written: No space left on device\n")


@pytest.mark.parametrize(
    "open_stream", [broken_pipe, full_disk, lambda: None], ids=["pipe", "full", "closed"]
)
def test_an_error_keeps_its_status_where_nobody_reads_it(open_stream, ended):
    for main in MAINS:
        assert ended(main, "--no_such_setting", stderr=open_stream()) == (2, "")
        assert ended(main, "--no_such_setting", stdout=open_stream())[0] == 2


STREAMS = {"closed": ">&-", "full": ">/dev/full", "all closed": "<&- >&- 2>&-", "no reader": "| true"}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_set_is_whole_whatever_becomes_of_standard_output(streams, buffered, tmp_path):
    write_text(tmp_path / "text.txt", words=300)
    command = f"{sys.executable} {ROOT / 'prepare.py'} text.txt {streams}; echo ${{PIPESTATUS[0]}} >&3"
    done = subprocess.run(
        ["bash", "-c", f"exec 3>status; {command}"],
        cwd=tmp_path,
        env=process_environment(PYTHONUNBUFFERED=buffered),
        capture_output=True,
        text=True,
    )
    full = "full" in streams
    assert (tmp_path / "status").read_text() == ("1\n" if full else "0\n")
    assert done.stderr == (
        "error: standard output can't be written: No space left on device\n" if full else ""
    )
    assert {path.name for path in (tmp_path / "data/text").iterdir()} == {"meta.json", "train.bin", "val.bin"}
    for path in (tmp_path / "data/text").iterdir():
        assert b"train on it" not in path.read_bytes()  # what is printed went into no file


@pytest.mark.parametrize(
    "main, argv",
    [
        (sample.main, ["--start=keys", "--device=cpu", "--max_new_tokens=100000000"]),
        (export.main, ["--to=exported"]),
        (MAINS[-1], ["--presets=tiny", "--device=cpu", "--steps=1", "--rounds=1"]),
    ],
    ids=["sample", "export", "bench"],
)
def test_a_command_ends_quietly_where_its_reader_has_gone(main, argv, ended, trained):
    os.chdir(trained)
    assert ended(main, *argv, stdout=broken_pipe()) == (0, "")
    if main is export.main:
        assert Path("exported/model.safetensors").exists()
        return
    status, err = ended(main, *argv, stdout=full_disk())
    assert (status, err) == (1, "error: standard output can't be written: No space left on device\n")


def test_warnings_that_can_not_be_written_stop_nothing(ended):
    done = []

    def main(argv):
        errors.warn("something")
        print("something", file=sys.stderr, flush=True)
        done.append(True)

    for stream in (broken_pipe(), full_disk(), None):
        assert ended(main, stderr=stream) == (0, "")
    assert len(done) == 3


def test_a_command_may_go_on_without_its_reader(ended):
    done = []

    def main(argv):
        errors.output_may_be_lost()
        for _ in range(1000):
            print("a line " * 100, flush=True)
        done.append(sys.stdout.lost)

    assert ended(main, stdout=broken_pipe()) == (0, "") and ended(main, stdout=full_disk()) == (0, "")
    assert [type(error) for error in done] == [BrokenPipeError, OSError]


def test_text_of_a_locale_of_ascii_alone(trained):
    done = script(
        "sample.py",
        *["--start=keysé", "--device=cpu", "--max_new_tokens=1", "--unknown=skip"],
        cwd=trained,
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("keys\\xe9")


def test_a_name_that_can_not_be_written_is_one_line(ended):
    def main(argv):
        "a\udcff".encode("utf-8")

    status, err = ended(main)
    assert status == 1 and err.count("\n") == 1 and r"'a\udcff' can't be written in utf-8" in err
