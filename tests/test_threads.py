"""How many threads compute: as many as cores are free, and in a resumed run as many as before."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_RUN, process_environment
from test_train import same, saved

import train
from kqv import threads

CPU = torch.device("cpu")
# Large enough that the number of threads changes the last bits of the weights.
RUN = [*TINY_RUN, "--dataset=tiny", "--n_embd=64", "--block_size=64", "--batch_size=12", "--dtype=float32"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Stand in for a machine on which other processes run: machine(cores=4, free=2)."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "SHARE", str(tmp_path / "cpu.max"))
    usual = torch.get_num_threads()

    def stand_in(cores=2, free=2.0, later=None, since=1):
        """After reading number `since`, so many are free as `later` says."""
        now = [10.0, 500.0, 0.1]

        def readings():
            for number in itertools.count():
                yield tuple(now)
                others = cores - (free if number < since or later is None else later)
                now[:] = now[0] + 2, now[1] + 2 * others + 1.7, now[2] + 1.7

        monkeypatch.setattr(threads, "own_cores", lambda: range(cores))
        monkeypatch.setattr(threads, "reading", readings().__next__)
        monkeypatch.setattr(threads, "begun", threads.reading())
        torch.set_num_threads(cores)  # what torch does by itself

    yield stand_in
    torch.set_num_threads(usual)


@pytest.mark.parametrize(
    "cores, free, count",
    [(2, 2.0, 2), (2, 1.9, 2), (2, 1.1, 1), (2, 0.6, 1), (2, 0.0, 1), (8, 5.2, 5), (1, 1.0, 1), (2, 3.7, 2)],
)
def test_one_thread_a_free_core(cores, free, count, machine):
    machine(cores, free)
    lines = threads.choose(CPU)
    assert torch.get_num_threads() == count
    assert len(lines) == (count < cores) and all(f"OMP_NUM_THREADS={cores}" in line for line in lines)


def test_the_environment_decides(machine, monkeypatch):
    machine(cores=4, free=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.choose(CPU) == [] and torch.get_num_threads() == 4
    (line,) = threads.choose(CPU, saved=2)
    assert "had 2 threads and has 4" in line and torch.get_num_threads() == 4


def test_a_gpu_leaves_torch_its_threads(machine):
    machine(cores=4, free=1)
    assert threads.choose(torch.device("cuda"), saved=2) == [] and torch.get_num_threads() == 4


def test_torch_may_use_fewer_threads_than_there_are_cores(machine):
    """As where two of them share the units that compute."""
    machine(cores=8, free=7)
    torch.set_num_threads(4)
    assert threads.choose(CPU) == [] and torch.get_num_threads() == 4


@pytest.mark.parametrize("share, count", [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
def test_a_container_has_its_share(share, count, machine, tmp_path):
    machine(cores=4, free=4)
    (tmp_path / "cpu.max").write_text(share + "\n")
    assert threads.choose(CPU) == [] and torch.get_num_threads() == count


def test_a_deterministic_run_does_not_depend_on_what_else_runs(machine, cli, tiny_set):
    machine(cores=2, free=1)
    try:
        status, out, err = cli(train.main, *RUN, "--deterministic=True")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (status, err) == (0, "")
    assert "2 threads, so that results repeat bit for bit; OMP_NUM_THREADS=1" in out


def test_a_run_of_more_threads_than_there_are_cores_has_fewer_here(machine):
    machine(cores=2, free=2)
    (line,) = threads.choose(CPU, saved=4)
    assert torch.get_num_threads() == 2 and "had 4 threads and has 2" in line


def test_only_the_cores_that_the_process_may_run_on_count(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text(
        "cpu 0 0\ncpu0 100 200 300 999 999 1 2 3 5 5\ncpu1 7 0 0 9 9 0 0 0\ncpu10 5 0 0 9 9 0 0 0\nintr 1\n"
    )
    monkeypatch.setattr(threads, "STAT", str(tmp_path / "stat"))
    monkeypatch.setattr(threads, "own_cores", lambda: {0, 10})
    assert threads.reading()[1] == pytest.approx((606 + 5) / os.sysconf("SC_CLK_TCK"))


def test_all_cores_are_free_where_the_system_does_not_tell(machine, monkeypatch, tmp_path):
    """No /proc, or zeros in it, or a notebook, where nothing was noted at the start."""
    machine(cores=2)
    monkeypatch.setattr(threads, "begun", (10.0, 0.0, 0.1))
    monkeypatch.setattr(threads, "reading", lambda: (12.0, 0.0, 1.8))
    assert threads.choose(CPU) == [] and torch.get_num_threads() == 2
    monkeypatch.undo()
    monkeypatch.setattr(threads, "STAT", str(tmp_path / "none"))
    assert threads.reading()[1] == 0
    monkeypatch.setattr(threads, "begun", None)
    assert threads.free_cores() == len(threads.own_cores())


@pytest.mark.parametrize("then, now", [(1, 2), (2, 1)])
def test_a_resumed_run_repeats_the_bits_whatever_else_runs(then, now, machine, cli, tiny_set):
    def run(free, *argv):
        machine(cores=2, free=free)
        status, out, err = cli(train.main, *RUN, *argv)
        assert (status, err) == (0, "")
        return out

    out = run(then, "--out_dir=whole")
    assert f", float32, {then} thread" in out and ("other processes" in out) == (then == 1)
    run(then, "--out_dir=parts", "--max_iters=3")
    out = run(now, "--out_dir=parts", "--init_from=resume", "--max_iters=6")
    assert f"{then} thread" in out and f"OMP_NUM_THREADS={now} may be faster" in out
    run(now, "--out_dir=other")
    whole, parts, other = (saved(f"{folder}/ckpt.pt") for folder in ("whole", "parts", "other"))
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    assert not same(whole["model"], other["model"])  # so the number of threads does matter here
    assert (whole["threads"], parts["threads"], other["threads"]) == (then, then, now)


@pytest.mark.parametrize("later, crowded", [(2, False), (1, True)])
def test_a_run_says_that_another_process_came_later(later, crowded, machine, cli, tiny_set):
    machine(cores=2, free=2, later=later)
    status, out, err = cli(train.main, *RUN)
    assert (status, err) == (0, "") and "2 threads" in out.splitlines()[0]
    assert ("resume it with OMP_NUM_THREADS=1" in out) == crowded


def test_what_other_processes_did_long_ago_does_not_count(machine):
    machine(cores=2, free=2, later=1, since=9)
    threads.choose(CPU)
    found = [threads.crowded(CPU) for _ in range(12)]
    assert found[0] == [] and "OMP_NUM_THREADS=1" in found[-1][0]


@pytest.mark.skipif(len(threads.own_cores()) < 2, reason="needs two cores")
def test_beside_a_busy_process_one_of_two_cores_is_free(tiny_set):
    """A process that never sleeps keeps one core busy; train.py may run on that and another one."""
    one, other = sorted(threads.own_cores())[:2]
    environment = process_environment()
    del environment["OMP_NUM_THREADS"]
    endless = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(endless, preexec_fn=lambda: os.sched_setaffinity(0, {one})) as neighbour:
        try:
            done = subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *TINY_RUN, "--dataset=tiny"],
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, {one, other}),
                capture_output=True,
                text=True,
                timeout=300,
            )
        finally:
            neighbour.kill()
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 thread, as other processes keep cores busy; OMP_NUM_THREADS=2 overrules that" in done.stdout
