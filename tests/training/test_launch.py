"""The launch scripts: machines meet, train as one, stop together and go on; Slurm queues a job again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, free_port, process_environment, train_in

import train
from kqv.formats import loading

RUN = ["--dataset=tiny", "--dtype=float32", "--dropout=0.1", "--gradient_accumulation_steps=4"]
# Ends only by a signal.
ENDLESS = [
    *RUN,
    "--max_iters=1000000",
    "--eval_interval=40",
    "--lr_decay_iters=100",
    "--checkpoint_interval=5",
]
# Seconds long, so that there is time to kill one of its processes.
LONG = [*RUN, "--max_iters=120", "--eval_interval=40", "--lr_decay_iters=120", "--checkpoint_interval=5"]
LONG += ["--gradient_accumulation_steps=40"]
MULTINODE, SLURM = (str(ROOT / "launch" / name) for name in ("multinode.sh", "slurm.sh"))
WAIT = 100  # seconds, for what takes ten


class Machines:
    """Scripts that run side by side, each as if on a machine of its own, and all that they have started."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = process_environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        self.environment |= {"OF_TEST": str(folder), "HEAD": "127.0.0.1", "PORT": free_port(), "WAIT": "60"}

    def start(self, script, *argv, cwd=None, **environment):
        return subprocess.Popen(
            [script, *argv],
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *argv, **how):
        """(status, output, errors), when it has ended."""
        return ends(self.start(script, *argv, **how))[0]

    def processes(self, *marks):
        """Process ids of what the scripts have started with all these in its environment or command."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                text = (folder / "environ").read_bytes() + b"\0" + (folder / "cmdline").read_bytes()
                words = [word.decode(errors="replace") for word in text.split(b"\0")]
                if all(mark in words for mark in (f"OF_TEST={self.folder}", *marks)):
                    found.append(int(folder.name))
        return found

    def kill(self, *marks):
        for pid in self.processes(*marks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for_port(port):
    """Until something answers there."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", int(port))).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def ends(*processes):
    """(status, output, errors) of each, when all have ended."""
    deadline, found = time.monotonic() + WAIT, []
    for process in processes:
        out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
        found.append((process.returncode, out, err))
    return found


def wait_for_step(folder, step, *processes):
    """Until a run has logged a step."""
    log, deadline = Path(folder, "metrics.jsonl"), time.monotonic() + WAIT
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_run(found, expected):
    """What the two logged of training and evaluation, and their last weights."""
    records = []
    for folder in (found, expected):
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        numbers = ("step", "loss", "lr", "grad_norm", "train_loss", "val_loss")
        records.append([{name: line[name] for name in numbers if name in line} for line in lines])
        records[-1] = [line for line in records[-1] if line.keys() != {"step"}]
    for one, other in zip(*records, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    weights = [loading.load(Path(folder, "ckpt.pt"))["model"] for folder in (found, expected)]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, atol=1e-5, rtol=0, msg=name)


def assert_one_line(end, *says):
    status, out, err = end
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, end
    assert all(word in err for word in says), err


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with a prepared set, and what one process makes of RUN in `short`, of half of it in `half`."""
    folder = tmp_path_factory.mktemp("straight")
    train_in(folder, *RUN, "--out_dir=short")
    train_in(folder, *RUN, "--out_dir=half", "--max_iters=3")
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """What one process makes of LONG."""
    folder = tmp_path_factory.mktemp("long")
    train_in(folder, *LONG, "--out_dir=long")
    return folder / "long"


@pytest.fixture
def machines(straight, tmp_path):
    """Machines whose current folder has the prepared set; they end with the test."""
    (tmp_path / "data").symlink_to(straight / "data")
    machines = Machines(tmp_path)
    yield machines
    machines.kill()


def two(machines, *argv, processes=1):
    """The same command on two machines."""
    how = {"NODES": "2", "PROCESSES": str(processes)}
    return [machines.start(MULTINODE, *TINY_RUN, *argv, "--out_dir=out", **how) for _ in range(2)]


# Machines with torchrun


@pytest.mark.parametrize("start, processes", [("half", 1), pytest.param(None, 2, marks=pytest.mark.slow)])
def test_two_machines_train_as_one_from_the_start_or_from_the_last_save(machines, straight, start, processes):
    if start:
        shutil.copytree(straight / start, machines.folder / "out")
    found = ends(*two(machines, *RUN, processes=processes))
    assert [status for status, _, _ in found] == [0, 0], found
    out = "".join(out for _, out, _ in found)
    assert f"{2 * processes} x cpu, float32, ddp" in out and out.count("done: step 6") == 1
    assert_same_run(machines.folder / "out", straight / "short")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_machine_stops_all_and_the_same_command_goes_on(machines, long, number):
    processes = two(machines, *LONG)
    wait_for_step(machines.folder / "out", 7, *processes)
    processes[1].send_signal(number)
    found = ends(*processes)
    assert [status for status, _, _ in found] == [0, 0], found
    assert "".join(out for _, out, _ in found).count("stopped by ") == 1
    assert not any("error: " in err or "Traceback" in err for _, _, err in found), found
    assert 7 < loading.load(machines.folder / "out/ckpt.pt")["iter_num"] < 120
    assert [status for status, _, _ in ends(*two(machines, *LONG))] == [0, 0]
    assert_same_run(machines.folder / "out", long)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_goes_on(machines, long, rank):
    processes = two(machines, *LONG)
    wait_for_step(machines.folder / "out", 12, *processes)
    machines.kill(f"RANK={rank}")
    found = ends(*processes)
    assert [status for status, _, _ in found] == [0, 0], found
    assert "".join(out for _, out, _ in found).count("2 x cpu") == 2
    assert_same_run(machines.folder / "out", long)


@pytest.mark.slow
def test_a_machine_that_dies_may_come_back(machines, long):
    how = {"NODES": "2", "PROCESSES": "1", "WAIT": "60"}
    argv = [*TINY_RUN, *LONG, "--out_dir=out"]
    head = machines.start(MULTINODE, *argv, **how)
    wait_for_port(machines.environment["PORT"])  # so that it is the head
    other = machines.start(MULTINODE, *argv, **how, WHO="other")
    wait_for_step(machines.folder / "out", 12, head, other)
    machines.kill("WHO=other")
    ends(other)
    again = machines.start(MULTINODE, *argv, **how)
    found = ends(head, again)
    assert [status for status, _, _ in found] == [0, 0], found
    assert_same_run(machines.folder / "out", long)


@pytest.mark.parametrize(
    "head, says",
    [
        ("nowhere.invalid", ["HEAD", "nowhere.invalid"]),
        ("127.0.0.1", ["2 machines", "127.0.0.1", "NODES"]),  # this machine alone
    ],
)
def test_machines_that_do_not_meet_say_so_in_one_line(machines, head, says):
    before = time.monotonic()
    assert_one_line(machines.run(MULTINODE, *RUN, HEAD=head, NODES="2", WAIT="2"), *says)
    assert time.monotonic() - before < 40
    assert not machines.processes()


def test_an_address_where_nobody_answers_is_said_in_one_line(machines):
    """In a network of its own, with one other address, which is kept free for examples."""
    network = "ip link add name here type veth peer name there && ip link set here up && ip link set there up"
    network += " && ip address add 192.0.2.2/24 dev here"
    alone = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", f'{network} && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a network")
    before = time.monotonic()
    end = machines.run(alone[0], *alone[1:], MULTINODE, *RUN, HEAD="192.0.2.1", NODES="2", WAIT="2")
    assert_one_line(end, "HEAD=192.0.2.1", "2 s")
    assert time.monotonic() - before < 40


def test_a_port_that_is_taken_is_said(machines):
    with socket.socket(type=socket.SOCK_DGRAM) as probe, socket.socket() as taken:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
        taken.bind((own, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line(machines.run(MULTINODE, HEAD=own, PORT=port), "PORT", port, own, "in use")


@pytest.mark.parametrize(
    "name, value",
    [
        ("HEAD", ""),
        ("NODES", "0"),
        ("NODES", "two"),
        ("PORT", "29500x"),
        ("WAIT", "-1"),
        ("PROCESSES", "many"),
        ("RESTARTS", "1.5"),
    ],
)
def test_a_variable_that_makes_no_sense_is_refused(machines, name, value):
    assert_one_line(machines.run(MULTINODE, **{name: value}), name, value)


def test_a_python_without_torch_is_refused(machines):
    bare = machines.folder / "python"
    bare.write_text('#!/bin/sh\nexec /usr/bin/env -u PYTHONPATH python3 -S -E "$@"\n')
    bare.chmod(0o755)
    path = f"{machines.folder}:{machines.environment['PATH']}"
    assert_one_line(machines.run(MULTINODE, PATH=path), "PyTorch", ".venv/bin/activate")


# Slurm, whose commands are small scripts here


def write_script(path, text):
    """A bash script's path, as a string."""
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def slurm(machines):
    """Run slurm.sh in a job of one machine: slurm(*argv) -> its process."""
    folder = machines.folder / "commands"
    folder.mkdir()
    commands = {
        "srun": 'while [[ $1 == -* ]]; do shift; done\nexec ${STEP:-"$@"}\n',
        "scontrol": 'echo "$*" >> scontrol.log\n[[ $1 != show ]] || echo 127.0.0.1\n',
    }
    for name, text in commands.items():
        write_script(folder / name, text)
    (machines.folder / "launch").symlink_to(ROOT / "launch")
    machines.environment |= {
        "PATH": f"{folder}:{machines.environment['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-1]",
        "PROCESSES": "1",
    }
    return lambda *argv, **how: machines.start(SLURM, *argv, **how)


def requeues(machines):
    calls = (machines.folder / "scontrol.log").read_text().splitlines()
    assert "show hostnames node[1-1]" in calls
    return [call for call in calls if "show" not in call]


def test_a_job_near_its_time_limit_saves_what_a_run_goes_on_from_and_is_queued_again(machines, slurm, cli):
    argv = [*TINY_RUN, *ENDLESS, "--out_dir=out"]
    job = slurm(*argv)
    wait_for_step(machines.folder / "out", 7, job)
    job.send_signal(signal.SIGUSR1)
    ((status, out, err),) = ends(job)
    assert (status, err) == (0, "") and "stopped by SIGUSR1" in out
    stopped = loading.load(machines.folder / "out/ckpt.pt")["iter_num"]
    assert stopped > 7
    assert requeues(machines) == ["requeue 77"]
    argv += [f"--max_iters={stopped + 3}"]
    status, out, _ = cli(train.main, *argv, "--init_from=auto")  # what the script starts
    assert status == 0 and f"done: step {stopped + 3}" in out
    assert cli(train.main, *argv, "--out_dir=one")[0] == 0
    assert_same_run(machines.folder / "out", machines.folder / "one")


@pytest.mark.slow
def test_a_job_that_fails_says_why_once(machines, slurm):
    ((status, _, err),) = ends(slurm(*TINY_RUN, "--learning_rat=1", RESTARTS="0", PROCESSES="2"))
    assert status == 1
    assert err.count("--learning_rat is not a setting: did you mean learning_rate?") == 1


def test_a_job_that_fails_is_not_queued_again(machines, slurm):
    step = write_script(machines.folder / "step", "echo error: bad >&2\nexit 1\n")
    assert ends(slurm(STEP=step)) == [(1, "", "error: bad\n")]
    assert requeues(machines) == []


@pytest.mark.parametrize(
    "number, ends_with, environment, expected",
    [
        (signal.SIGUSR1, 0, {}, ["requeue 77"]),
        (signal.SIGUSR1, 3, {}, []),  # it failed to save, for example
        (signal.SIGUSR1, 0, {"MAX_REQUEUES": "5", "SLURM_RESTART_COUNT": "4"}, ["requeue 77"]),
        (signal.SIGUSR1, 0, {"MAX_REQUEUES": "5", "SLURM_RESTART_COUNT": "5"}, []),
        (signal.SIGTERM, 0, {}, []),  # preempted: Slurm itself queues it again
    ],
)
def test_a_job_is_queued_again_if_its_step_has_saved_before_the_time_limit(
    machines, slurm, number, ends_with, environment, expected
):
    lines = f"trap 'sleep 1; exit {ends_with}' USR1\ntouch on\nwhile :; do sleep 0.1; done\n"
    job = slurm(STEP=write_script(machines.folder / "step", lines), **environment)
    deadline = time.monotonic() + WAIT
    while not (machines.folder / "on").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(3):
        job.send_signal(number)
        time.sleep(0.2)
    ((status, _, err),) = ends(job)
    assert requeues(machines) == expected
    if environment.get("SLURM_RESTART_COUNT") == "5":
        assert_one_line((status, "", err), "77", "MAX_REQUEUES")
    else:
        assert (status, err) == (ends_with, "")
