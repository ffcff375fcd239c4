"""
Processes of train.py, as torchrun starts them on one node or several. They are forked from a process that has
imported torch already: importing it takes seconds, a training of a few steps a tenth of one.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from unittest import mock

from conftest import ROOT, free_port, process_environment

WAIT = 100  # seconds, for processes that take ten
PRELOADED = [
    "train",
    "kqv.training.sharded_saver",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "ranks",
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


class Process:
    """A function in a process of its own, with what it prints kept in files."""

    def __init__(self, function, *arguments, cwd=None, environment=None):
        self.folder = Path(tempfile.mkdtemp())
        how = (self.folder, str(cwd or os.getcwd()), environment or {})
        self.process = context.Process(target=call, args=(function, arguments, *how))
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/training")])
        server = process_environment(PYTHONPATH=path, TORCH_CPP_LOG_LEVEL="FATAL", CUDA_VISIBLE_DEVICES="")
        with mock.patch.dict(os.environ, server):  # of the process that forks, should this start it
            self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def end(self, deadline):
        """(status, output, errors), when it has ended."""
        self.process.join(max(1, deadline - time.monotonic()))
        assert self.poll() is not None, f"process {self.pid} goes on: {self.read('err')}"
        out = "".join(line for line in self.read("out").splitlines(True) if not line.startswith("[Gloo]"))
        return self.poll(), out, self.read("err")  # [Gloo]: of torch 2.9

    def read(self, name):
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def close(self):
        """End it at once, if it has not ended."""
        if self.poll() is None:
            self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def call(function, arguments, folder, cwd, environment):
    """What the process does."""
    os.chdir(cwd)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    function(*arguments)


def train_main(*argv):
    """train.py, as its first lines run it."""
    import torch

    import train
    from kqv.errors import run

    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    run(train.main)


def train_and_save_late(*argv):
    """train.py, which goes on training for a while before a save begins to write."""
    from kqv.training import sharded_saver

    save = sharded_saver.dcp.save

    def late(*arguments, **settings):
        time.sleep(0.3)
        save(*arguments, **settings)

    with mock.patch.object(sharded_saver.dcp, "save", late):
        train_main(*argv)


def elastic(count, restarts, argv):
    """torchrun's agent, which starts train.py `count` times, and again when one of them dies."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting = {"run_id": str(uuid.uuid4()), "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, count, **meeting, max_restarts=restarts, start_method="fork")
    record(elastic_launch(config, train_main))(*argv)


class Ranks:
    """`count` processes of train.py with the same arguments, and to each of them its `own`."""

    def __init__(
        self, count, *argv, node_size=None, address="127.0.0.1", main=train_main, folders=(), own=()
    ):
        port = free_port()
        self.processes = []
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank % (node_size or count)),
                "LOCAL_WORLD_SIZE": str(node_size or count),
                "MASTER_ADDR": address,
                "MASTER_PORT": port,
            }
            arguments = [*map(str, argv), *(own[rank] if own else ())]
            where = folders[rank] if folders else None
            self.processes.append(Process(main, *arguments, cwd=where, environment=environment))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.close()

    def ends(self, *ranks):
        """(status, output, errors) of each, or of these ranks, when they have ended."""
        deadline = time.monotonic() + WAIT
        return [self.processes[rank].end(deadline) for rank in ranks or range(len(self.processes))]

    def wait_for(self, text, path, seconds=60):
        """Until a file has a text in it."""
        deadline = time.monotonic() + seconds
        while not (path.exists() and text in path.read_text()):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes)
            time.sleep(0.02)

    def send_signal(self, rank, name):
        os.kill(self.processes[rank].pid, signal.Signals[name])


def run_ranks(count, *argv, **how):
    """What the main process printed, when all have succeeded and the others have printed nothing."""
    with Ranks(count, *argv, **how) as ranks:
        ends = ranks.ends()
    assert [(status, err) for status, _, err in ends] == [(0, "")] * count, ends
    assert [out for _, out, _ in ends[1:]] == [""] * (count - 1)
    return ends[0][1]
