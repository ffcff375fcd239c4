"""A run survives signals, kills, torn files, full disks, bad numbers and odd command lines."""

import errno
import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import ROOT, TINY_RUN, process_environment
from ranks import Ranks, run_ranks, train_main
from torch.nn.modules.module import register_module_forward_hook

import prepare
import sample
import train
from kqv.errors import UserError
from kqv.formats import loading
from kqv.settings import parse
from kqv.text.dataset import Dataset
from kqv.training.batches import micro_batches
from kqv.training.folder import own_folder
from kqv.training.saver import Saver
from kqv.training.start import build_model
from kqv.training.state import start_state
from kqv.training.world import World
from model import NextToken

WAIT = 120  # seconds, for what takes one
RUN = [*TINY_RUN, "--dataset=tiny", "--dropout=0.1", "--gradient_accumulation_steps=2", "--log_interval=1"]


def weights(out_dir, name="ckpt.pt"):
    return torch.load(Path(out_dir) / name, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(out_dir):
    """{(step, kind): number} of everything in metrics.jsonl that does not depend on the clock."""
    numbers = {}
    for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for kind in ("loss", "lr", "grad_norm", "train_loss", "val_loss"):
            if kind in entry:
                assert (entry["step"], kind) not in numbers, "logged twice"
                numbers[entry["step"], kind] = entry[kind]
    return numbers


def start(cwd, *arguments, launcher=()):
    """A real training process, in a process group of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *RUN, *arguments]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def has_logged(out_dir, step, until=math.inf):
    """Whether metrics.jsonl reaches a step, at the latest at the time `until`."""
    path = Path(out_dir) / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_resume_continues_bit_for_bit(cli, tiny_set, tmp_path):
    assert cli(train.main, *RUN, "--out_dir=straight", "--max_iters=7")[0] == 0
    for stop_at in (1, 3, 5):  # one of them at an evaluation, two between
        shutil.rmtree("stopped", ignore_errors=True)
        first = ["--out_dir=stopped", f"--max_iters={stop_at}", "--eval_interval=3"]
        assert cli(train.main, *RUN, *first)[0] == 0
        torch.manual_seed(stop_at)  # as random as a new process
        status, out, err = cli(train.main, "--init_from=resume", "--out_dir=stopped", "--max_iters=7")
        assert status == 0, err
        assert f"max_iters {stop_at} -> 7" in out
        assert same(weights("stopped"), weights("straight"))
        assert metrics("straight").items() <= metrics("stopped").items()


def test_resume_continues_the_gradient_scaler(cli, tiny_set):
    half = [*RUN, "--dtype=float16"]
    assert cli(train.main, *half, "--out_dir=straight")[0] == 0
    assert cli(train.main, *half, "--out_dir=stopped", "--max_iters=3")[0] == 0
    assert loading.load("stopped/ckpt.pt")["scaler"]["_growth_tracker"] == 3
    assert cli(train.main, "--init_from=resume", "--out_dir=stopped", "--max_iters=6")[0] == 0
    assert same(weights("stopped"), weights("straight"))


def test_resume_takes_changed_optimizer_settings_and_says_so(cli, tiny_set):
    assert cli(train.main, *RUN, "--out_dir=a", "--max_iters=3")[0] == 0
    changed = ["--weight_decay=0.5", "--beta2=0.9", "--max_iters=4"]
    status, out, _ = cli(train.main, "--init_from=resume", "--out_dir=a", *changed)
    assert status == 0
    assert "weight_decay 0.1 -> 0.5" in out and "beta2 0.95 -> 0.9" in out
    groups = loading.load("a/ckpt.pt")["optimizer"]["param_groups"]
    assert groups[0]["weight_decay"] == 0.5 and groups[0]["betas"] == (0.9, 0.9)


def test_deterministic_runs_repeat(cli, tiny_set):
    try:
        for name in "ab":
            assert cli(train.main, *RUN, f"--out_dir={name}", "--deterministic=True")[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights("a"), weights("b"))


@pytest.mark.parametrize("name, status", [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGHUP", 0), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(cli, tiny_set, name, status):
    sender = threading.Thread(
        target=signal_at_step, args=(getattr(signal, name), 5, Path("stopped").absolute())
    )
    sender.start()
    ended, out, err = cli(train.main, *RUN, "--out_dir=stopped", "--max_iters=100000", "--eval_interval=1000")
    sender.join()
    assert ended == status, err
    assert f"stopped by {name}" in out and "Traceback" not in err
    step = loading.load("stopped/ckpt.pt")["iter_num"]
    assert max(key[0] for key in metrics("stopped")) == step - 1  # nothing done was lost
    further = [f"--max_iters={step + 2}", "--eval_interval=1000"]
    assert cli(train.main, "--init_from=resume", "--out_dir=stopped", *further)[0] == 0
    assert cli(train.main, *RUN, "--out_dir=straight", *further)[0] == 0
    assert same(weights("stopped"), weights("straight"))
    assert metrics("straight") == metrics("stopped")


def test_a_run_under_nohup_ignores_that_the_terminal_goes(cli, tiny_set):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sender = threading.Thread(target=signal_at_step, args=(signal.SIGHUP, 2, Path("out").absolute()))
    try:
        sender.start()
        status, out, err = cli(train.main, *RUN, "--max_iters=12", "--eval_interval=1000")
        sender.join()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == 0 and "done: step 12" in out, err


def signal_at_step(number, step, out_dir):
    """Send this process a signal when the run has logged a step."""
    if has_logged(out_dir, step, until=time.monotonic() + WAIT):
        os.kill(os.getpid(), number)


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(cli, tiny_set):
    often = ["--max_iters=100000", "--lr_decay_iters=20", "--eval_interval=1000", "--checkpoint_interval=3"]
    process = start(Path.cwd(), *often, "--out_dir=killed")
    assert has_logged("killed", 7, until=time.monotonic() + WAIT)
    process.kill()
    process.communicate()
    saved = loading.load("killed/ckpt.pt")["iter_num"]
    assert saved >= 3 and saved % 3 == 0
    with open("killed/metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that is cut off
    further = [*often[1:], f"--max_iters={saved + 4}"]
    assert cli(train.main, "--init_from=resume", "--out_dir=killed", *further)[0] == 0
    assert cli(train.main, *RUN, "--out_dir=straight", *further)[0] == 0
    assert same(weights("killed"), weights("straight"))
    assert metrics("killed") == metrics("straight")


def test_a_second_ctrl_c_is_answered_and_a_third_quits_at_once(cli, tiny_set, tmp_path):
    # The first evaluation reads the whole text in single windows: long enough to be interrupted twice.
    slow = ["--out_dir=out", "--batch_size=1", "--eval_iters=1000000", "--n_layer=12"]
    process = start(tmp_path, *slow)
    while not (tmp_path / "out" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    warning, error = err.splitlines()
    assert warning.startswith("warning: SIGINT: the run stops already") and error == "error: interrupted"


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_and_resume(cli, tiny_set, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(
        tmp_path, "--out_dir=stopped", "--max_iters=100000", "--eval_interval=1000", launcher=launcher
    )
    assert has_logged(tmp_path / "stopped", 5, until=time.monotonic() + 120), process.communicate()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    step = loading.load("stopped/ckpt.pt")["iter_num"]
    further = [f"--max_iters={step + 3}", "--eval_interval=1000"]
    command = [sys.executable, *launcher, str(ROOT / "train.py")]
    resumed = [*command, "--init_from=resume", "--out_dir=stopped", *further]
    subprocess.run(resumed, cwd=tmp_path, env=process_environment(), check=True, capture_output=True)
    straight = [*command, *RUN, "--out_dir=straight", *further]
    subprocess.run(straight, cwd=tmp_path, env=process_environment(), check=True, capture_output=True)
    assert same(weights("stopped"), weights("straight"))
    assert metrics("stopped") == metrics("straight")


def steps_logged(out_dir):
    """How many steps a run has logged whole lines of."""
    path = Path(out_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return sum('"loss"' in line and line.endswith("}\n") for line in lines)


@pytest.mark.slow
def test_twenty_kills_change_nothing(cli, tiny_set, tmp_path):
    """A run that saves every third step, killed at random moments and resumed, ends as one never killed."""
    steps = ["--max_iters=1500", "--lr_decay_iters=1500", "--eval_interval=50", "--checkpoint_interval=3"]
    assert cli(train.main, *RUN, *steps, "--out_dir=straight")[0] == 0
    moment, out_dir, lost, saved = random.Random(7), tmp_path / "killed", [], 0
    log = out_dir / "metrics.jsonl"
    for _ in range(20):
        old_log = log.stat().st_ino if log.exists() else None
        process = start(
            tmp_path, *steps, "--out_dir=killed", f"--init_from={'resume' if saved else 'scratch'}"
        )
        # Until this run has replaced the log of the one before and logged a step of its own.
        while process.poll() is None and (
            not log.exists() or log.stat().st_ino == old_log or steps_logged(out_dir) <= saved
        ):
            time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.4))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        if (out_dir / "ckpt.pt").exists() or (out_dir / "ckpt.prev.pt").exists():
            saved = loading.load(out_dir / "ckpt.pt")["iter_num"]
        lost.append(steps_logged(out_dir) - saved)
    process = start(tmp_path, *steps, "--out_dir=killed", "--init_from=resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert same(weights("killed"), weights("straight"))
    assert same(weights("killed", "best.pt"), weights("straight", "best.pt"))
    assert metrics("killed") == metrics("straight")
    print(f"20 kills survived up to step {saved}; steps lost at each: {lost}")


# Disks that are full


@contextmanager
def files_up_to(size):
    """A limit on the size of files stands in for the full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("start, saved", [("resume", "step 3"), ("scratch", "nothing")])
@pytest.mark.parametrize("best_fits", [True, False])
def test_a_run_whose_last_state_is_not_on_the_disk_ends_with_an_error(cli, tiny_set, start, saved, best_fits):
    assert cli(train.main, *RUN, "--max_iters=3")[0] == 0
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.pt")}
    size = Path("out/ckpt.pt").stat().st_size - 1000
    with files_up_to(size if best_fits else 50_000):
        argv = ["--max_iters=9"] if start == "resume" else [*RUN, "--max_iters=9"]
        status, out, err = cli(train.main, f"--init_from={start}", *argv)
    assert status == 1 and "step 6: loss" in out and "done" not in out and "sample.py" not in out
    *warnings, error = err.splitlines()
    assert all(line.startswith("warning: out/") for line in warnings) and len(warnings) >= 2
    assert error.startswith("error: the run ends at step 9, but out/ckpt.pt can't be saved (File too large)")
    assert f": {saved}; " in error
    left = {path.name: path.read_bytes() for path in Path("out").glob("*.pt")}
    assert left["ckpt.pt"] == before["ckpt.pt"]
    if start == "scratch":  # no file of it beside those of the other run
        assert left == before
    assert not list(Path("out").glob(".*")), "something half-written was left"


def test_a_run_whose_disk_was_full_for_a_while_ends_well(cli, tiny_set):
    assert cli(train.main, *RUN, "--max_iters=3")[0] == 0
    size = Path("out/ckpt.pt").stat().st_size
    saver = Saver("out", newest=3)
    contents = {"model": {"x": torch.zeros(size)}, "model_args": {}, "iter_num": 6}
    with files_up_to(size):
        saver.save(contents, best=True)
        with pytest.raises(UserError, match="ends at step 6, but out/ckpt.pt .* step 3;"):
            saver.require_saved(6)
    saver.save({**contents, "iter_num": 9}, best=False)
    saver.require_saved(9)
    assert loading.load("out/ckpt.pt")["iter_num"] == 9 and loading.load("out/best.pt")["iter_num"] == 6


def test_an_error_of_any_kind_in_the_thread_that_saves_is_a_line_and_status_1(cli, tiny_set, monkeypatch):
    def broken(*_):
        raise KeyError("what nobody foresaw")

    monkeypatch.setattr(torch, "save", broken)
    status, out, err = cli(train.main, *RUN, "--max_iters=3")
    *warnings, error = err.splitlines()
    assert (
        status == 1 and warnings and all(line.startswith("warning: out/ckpt.pt can't") for line in warnings)
    )
    assert error.startswith("error: the run ends at step 3, but out/ckpt.pt can't be saved ('what nobody")


@pytest.mark.parametrize("becomes", ["nothing", "an empty folder", "a file", "another run's"])
def test_a_folder_that_is_removed_during_the_run_is_made_anew(cli, tiny_set, becomes):
    assert cli(train.main, *RUN, "--seed=2", "--max_iters=3", "--out_dir=other")[0] == 0
    assert cli(train.main, *RUN, "--out_dir=straight")[0] == 0
    out = Path("out")

    def strike(module, _, loss):
        if isinstance(module, NextToken) and module.training and not Path("gone").exists():
            if '"step": 3,' in (out / "metrics.jsonl").read_text():
                for thread in threading.enumerate():
                    if thread.name == "saver":  # else it might make the folder before this test does
                        thread.join()
                out.rename("gone")
                if becomes == "an empty folder":
                    out.mkdir()
                elif becomes == "a file":
                    out.write_text("")
                elif becomes == "another run's":
                    shutil.copytree("other", out)

    hook = register_module_forward_hook(strike)
    try:
        status, _, err = cli(train.main, *RUN)
    finally:
        hook.remove()
    *warnings, last = err.splitlines()
    if becomes == "a file":
        assert status == 1 and last.startswith(
            "error: the run ends at step 6, but out/ckpt.pt can't be saved"
        )
        return
    assert status == 0 and "out was removed or replaced during the run" in err
    assert all("can't be saved" in line or "was removed" in line for line in (*warnings, last))
    assert same(weights("out"), weights("straight")) and metrics("out") == metrics("straight")
    if becomes == "another run's":
        assert same(weights("out", "ckpt.old.pt"), weights("other"))
        assert Path("out/metrics.old.jsonl").read_text() == Path("other/metrics.jsonl").read_text()


@pytest.mark.parametrize("argv", [[], ["--init_from=resume"]])
def test_a_folder_in_the_place_of_the_metrics_is_named(cli, refusal, tiny_set, argv):
    assert cli(train.main, *RUN, "--max_iters=1")[0] == 0
    Path("out/metrics.jsonl").unlink()
    Path("out/metrics.jsonl").mkdir()
    assert "out/metrics.jsonl is no file" in refusal(train.main, *RUN, *argv)


def test_a_signal_after_the_last_step_changes_no_status(tiny_set, tmp_path):
    script = "import atexit, os, signal, sys; sys.path.insert(0, sys.argv[1]); sys.argv[:2] = ['train.py']\n"
    script += "atexit.register(lambda: [os.kill(os.getpid(), n) for n in (2, 15, 1, 10)])\n"
    script += "from kqv.errors import run_command; run_command(os.environ['TRAIN'])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), *RUN, "--max_iters=1"],
        cwd=tmp_path,
        env=process_environment(TRAIN=str(ROOT / "train.py")),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and "done: step 1" in done.stdout


# Output that nobody reads


@pytest.mark.parametrize("why", ["No space left on device", "Broken pipe"])
def test_a_run_goes_on_when_its_output_can_not_be_written(cli, tiny_set, monkeypatch, why):
    if why == "Broken pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        status, _, err = cli(train.main, *RUN, "--sample_tokens=3")
    assert (status, err) == (0, "")
    assert loading.load("out/ckpt.pt")["iter_num"] == 6 and len(metrics("out")) == 6 * 3 + 3 * 2
    notes = [
        json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines() if "note" in line
    ]
    assert [note["note"] for note in notes] == [
        f"standard output can't be written ({why}): the run goes on without it"
    ]


def test_what_is_evaluated_and_can_not_be_written_is_an_error(cli, tiny_set, monkeypatch):
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        status, _, err = cli(train.main, *RUN, "--eval_only")
    assert status == 1 and "standard output can't be written" in err


# Two runs in one folder


@contextmanager
def owned(out_dir):
    with own_folder(parse(train.TrainSettings, [f"--out_dir={out_dir}"]), World(torch.device("cpu"))):
        yield


@pytest.mark.parametrize("start", ["scratch", "resume", "auto"])
def test_a_second_run_in_a_folder_is_refused(cli, refusal, tiny_set, start):
    assert cli(train.main, *RUN, "--max_iters=3")[0] == 0
    with owned("out"):
        before = {path: path.read_bytes() for path in Path("out").iterdir()}
        line = refusal(train.main, *RUN, f"--init_from={start}")
        assert f"out is in use by another run (process {os.getpid()} on " in line and "--out_dir" in line
        assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
        assert cli(train.main, "--eval_only", "--init_from=resume")[0] == 0  # it writes nothing
    assert cli(train.main, "--init_from=resume", "--max_iters=4")[0] == 0
    assert not Path("out/.lock").exists()


def test_a_killed_run_owns_its_folder_no_longer(cli, tiny_set):
    argv = ["--max_iters=100000", "--eval_interval=1000", "--checkpoint_interval=1"]
    process = start(Path.cwd(), *argv)
    assert has_logged("out", 3, until=time.monotonic() + WAIT)
    assert "in use" in cli(train.main, *RUN)[2]
    process.kill()
    process.communicate()
    assert Path("out/.lock").exists()
    status, out, err = cli(train.main, *RUN, "--init_from=auto", "--max_iters=1")
    assert (status, err) == (0, "") and "done: step" in out


def test_a_lock_that_its_owner_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(number, how):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(number, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with owned(tmp_path), pytest.raises(UserError, match="in use"), owned(tmp_path):
        pass


def test_where_the_file_system_has_no_locks_a_run_says_so(cli, tiny_set, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    status, out, err = cli(train.main, *RUN)
    assert status == 0 and "done: step 6" in out
    assert err.count("\n") == 1 and err.startswith("warning: the file system of out has no locks")


def test_a_run_that_does_not_begin_leaves_no_folder(refusal, tiny_set):
    Path("a").mkdir()
    for argv in (["--dataset=missing"], ["--init_from=resume"], ["--init_from=nowhere"]):
        refusal(train.main, *RUN, "--out_dir=a/b/c", *argv)
        assert Path("a").exists() and not list(Path("a").iterdir())


def test_all_processes_of_a_run_own_its_folder_together(cli, tiny_set):
    with owned("out"), Ranks(2, *RUN, "--max_iters=1") as ranks:
        ends = ranks.ends()
    assert [status for status, _, _ in ends] == [1, 1]
    assert "".join(out + err for _, out, err in ends).count("out is in use by another run") == 1
    assert "done: step 1" in run_ranks(2, *RUN, "--max_iters=1")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_many_processes_that_can_not_save_end_with_one_error(cli, tiny_set, parallel):
    with Ranks(
        2, *RUN, f"--parallel={parallel}", "--max_iters=1", main=train_with_files_up_to_20_kb
    ) as ranks:
        ends = ranks.ends()
    assert 1 in [status for status, _, _ in ends] and "Traceback" not in "".join(err for _, _, err in ends)
    errors = [line for _, _, err in ends for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the run ends at step 1, but out/ckpt.pt can't be saved" in errors[0], ends
    assert not list(Path("out").glob("*.pt"))


def train_with_files_up_to_20_kb(*argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    train_main(*argv)


# Bad numbers


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(cli, tiny_set):
    assert cli(train.main, *RUN, "--out_dir=out", "--max_iters=3")[0] == 0
    before = weights("out")
    broken = ["--learning_rate=1e30", "--decay_lr=False", "--max_iters=1000", "--max_bad_steps=5"]
    status, out, err = cli(train.main, "--init_from=resume", "--out_dir=out", "--eval_interval=1000", *broken)
    assert status == 1
    assert err.count("\n") == 1 and "5 steps in a row" in err and "--learning_rate" in err
    assert same(weights("out"), before)


@pytest.mark.parametrize("eval_interval", [1000, 4])
def test_bad_steps_that_no_log_line_saw_end_the_run_and_spoil_no_checkpoint(cli, tiny_set, eval_interval):
    assert cli(train.main, *RUN, "--out_dir=out", "--max_iters=3")[0] == 0
    before = weights("out")
    argv = ["--learning_rate=1e30", "--decay_lr=False", "--log_interval=1000", "--max_iters=24"]
    argv += [f"--eval_interval={eval_interval}", "--checkpoint_interval=5"]
    status, out, err = cli(train.main, "--init_from=resume", *argv)
    assert status == 1 and "done" not in out
    *warnings, error = err.splitlines()
    assert error.startswith("error: 20 steps in a row up to step 23")
    assert all(line.startswith("warning: the train loss is nan") for line in warnings)
    assert same(weights("out"), before)


def test_a_save_waits_for_a_step_that_is_good(cli, tiny_set):
    calls = Counter()

    def spoil(module, _, loss):
        if isinstance(module, NextToken) and module.training:
            calls["step"] += 1
            return loss * (math.nan if calls["step"] in (6, 7) else 1)
        return None

    hook = register_module_forward_hook(spoil)
    one = ["--gradient_accumulation_steps=1", "--max_iters=10", "--eval_interval=1000"]
    try:
        assert cli(train.main, *RUN, *one, "--checkpoint_interval=3")[0] == 0
    finally:
        hook.remove()
    records = map(json.loads, Path("out/metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if record["kind"] == "save"] == [3, 8, 9, 10]


def test_a_skipped_step_changes_no_weight_and_no_moment(cli, tiny_set):
    config = parse(train.TrainSettings, [*RUN, "--dropout=0.0"])
    data = Dataset("tiny")
    config, gpt = build_model(config, None, data)
    world = World(torch.device("cpu"))
    state = start_state(config, gpt, None, torch.float32, world)

    def step(number):
        batches = micro_batches(data, config, world, number)
        train.train_step(NextToken(gpt), state, batches, config, world, nullcontext())
        return [p.detach().clone() for p in gpt.parameters()], state.optimizer.state_dict()["state"][0][
            "step"
        ].clone()

    before, count = step(0)
    hook = gpt.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    after, same_count = step(1)
    assert all(map(torch.equal, before, after)) and count == same_count
    assert state.bad_steps == 1
    hook.remove()
    further, _ = step(2)
    assert not any(map(torch.equal, before, further)) and state.bad_steps == 0
    assert all(p.isfinite().all() for p in further)


def test_out_of_memory_proposes_a_smaller_batch_of_the_same_total(cli, tiny_set):
    enormous = 3 * 10**14
    status, _, err = cli(train.main, *RUN, f"--batch_size={enormous}")
    assert status == 1
    assert err.count("\n") == 1 and "Traceback" not in err
    smaller = f"--batch_size={enormous // 2} --gradient_accumulation_steps=4"
    assert f"try --activation_checkpointing=True or {smaller}" in err
    status, _, again = cli(
        train.main, *RUN, f"--batch_size={enormous}", "--activation_checkpointing=True", "--out_dir=again"
    )
    assert (status, again) == (1, err.replace("--activation_checkpointing=True or ", ""))


VALUES = [
    "",
    "0",
    "1",
    "2",
    "-1",
    "1e1",
    "1.5",
    "nan",
    "inf",
    "1e999",
    "None",
    "True",
    "auto",
    "cpu",
    "cuda:99",
    "é\x00",
]
VALUES += [
    "../..",
    "/",
    "tiny",
    "resume",
    "scratch",
    "[1]",
    "'",
    "float16",
    "best",
    "FILE:",
    "-",
    " ",
    "\udcff",
]


def random_value(choice, kind):
    """Half of the time a value that the setting's type admits, else anything."""
    if choice.random() < 0.5:
        return choice.choice(VALUES)
    return str(
        choice.choice(get_args(kind) or {bool: [True, False], str: ["out", "tiny", "a"]}.get(kind, [1, 2, 3]))
    )


def random_arguments(choice, types):
    for _ in range(choice.randint(1, 5)):
        name = choice.choice(list(types)) if choice.random() < 0.95 else choice.choice(["lr", "", "-", "="])
        value = random_value(choice, types.get(name, str)).rstrip("\0")
        form = choice.random()
        yield from [f"--{name}={value}"] if form < 0.7 else [f"--{name}", value] if form < 0.95 else [value]


def test_odd_command_lines_end_without_a_traceback(cli, tiny_set, tmp_path, monkeypatch):
    assert cli(train.main, *RUN, "--out_dir=out", "--max_iters=1")[0] == 0
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))
    choice = random.Random(3)
    small_train = [*TINY_RUN, "--dataset=tiny", "--max_iters=1"]
    scripts = [
        (train.main, train.TrainSettings, small_train),
        (sample.main, sample.SampleSettings, ["--max_new_tokens=2"]),
        (prepare.main, prepare.PrepareSettings, ["text.txt"]),
    ]
    statuses = Counter()
    for number in range(400):
        main, cls, arguments = scripts[number % 3]
        untouched = ("wandb_log", "backend", "compile", "device", "sources", "deterministic")
        types = {name: kind for name, kind in get_type_hints(cls).items() if name not in untouched}
        arguments = [*arguments, *random_arguments(choice, types)]
        if number % 2 and main is not prepare.main:  # by way of a config file too
            names = choice.sample(list(types), 3)
            lines = [f"{name} = {random_value(choice, types[name])!r}" for name in names]
            lines.append(choice.choice(["", "", "x = [", "1/0"]))
            (tmp_path / "odd.py").write_text("\n".join(lines), "utf-8", errors="surrogatepass")
            arguments.append("odd.py")
        status, _, err = cli(main, *arguments)  # an exception would end the test here
        statuses[status] += 1
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert status == 0 or len(lines) == 1 and lines[0].startswith("error: "), (arguments, err)
    assert set(statuses) == {0, 1, 2}, statuses
    print(statuses)


def test_a_hostile_checkpoint_runs_nothing(cli, tiny_set, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    for where in ("model", "optimizer", "config"):
        contents = {
            "model": {},
            "model_args": {},
            "optimizer": {"state": {}},
            "iter_num": 1,
            "best_val_loss": 1.0,
        }
        contents[where] = Hostile()
        Path("out").mkdir(exist_ok=True)
        torch.save(contents, "out/ckpt.pt")
        for main, arguments in ((train.main, [*RUN, "--init_from=resume"]), (sample.main, [])):
            status, _, err = cli(main, *arguments)
            assert status == 1 and err.count("\n") == 1 and "ckpt.pt" in err
    assert not (tmp_path / "owned").exists()


class LateSaver(Saver):
    """A Saver whose thread begins to write when it is told to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.begin = threading.Event()

    def save_file(self, path, contents):
        assert self.begin.wait(10)
        super().save_file(path, contents)


def test_what_is_written_beside_training_is_the_state_of_its_step(tmp_path):
    """Weights change while the thread writes, and tied ones are stored once."""
    weight = torch.zeros(100_000)
    tied = {"transformer.wte.weight": weight, "lm_head.weight": weight}
    contents = {"model": tied, "model_args": {}, "optimizer": [weight + 5]}
    saver = LateSaver(tmp_path)
    for step in range(2):
        saver.begin.clear()
        saver.save({**contents, "iter_num": step}, best=True)
        weight += 1
        saver.begin.set()
        saver.wait()
        saved = loading.load(tmp_path / "ckpt.pt")
        assert saved["iter_num"] == step and saved["model"]["lm_head.weight"].eq(step).all()
        assert "optimizer" in saved and "optimizer" not in loading.load(tmp_path / "best.pt")
    assert (tmp_path / "best.pt").stat().st_size < 500_000  # 100,000 numbers, not twice that


def test_an_older_checkpoint_whose_best_is_not_there_says_that_the_best_begins_anew(cli, tiny_set):
    assert cli(train.main, *RUN, "--max_iters=3")[0] == 0
    older = torch.load("out/ckpt.pt", weights_only=True)
    del older["best_step"]  # the best may be that of step 0, which is never saved
    torch.save({**older, "best_val_loss": 0.5}, "out/ckpt.pt")
    Path("out/best.pt").unlink()
    status, _, err = cli(train.main, "--init_from=resume", "--max_iters=4")
    assert status == 0 and "out/best.pt is not there" in err and "the best begins anew" in err
    assert loading.load(Path("out/best.pt"))["best_val_loss"] > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_any_family_goes_on_bit_for_bit(cli, tiny_set, every_shape, dtype):
    run = [*RUN, *every_shape, f"--dtype={dtype}"]
    assert cli(train.main, *run, "--out_dir=straight")[0] == 0
    assert cli(train.main, *run, "--out_dir=parts", "--max_iters=3")[0] == 0
    assert cli(train.main, "--init_from=resume", "--out_dir=parts", "--max_iters=6")[0] == 0
    assert same(weights("parts"), weights("straight"))


def test_saves_at_every_step_are_logged_and_change_nothing(cli, tiny_set):
    often = ["--checkpoint_interval=1", "--eval_interval=1000", "--max_iters=5"]
    assert cli(train.main, *RUN, *often, "--out_dir=often")[0] == 0
    entries = [json.loads(line) for line in Path("often/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "save_stall_ms" in entry] == [1, 2, 3, 4, 5]
    assert cli(train.main, *RUN, "--out_dir=straight", "--eval_interval=1000", "--max_iters=4")[0] == 0
    assert same(weights("often", "ckpt.prev.pt"), weights("straight"))
