"""Join the processes that torchrun, or anything that sets the same environment variables, has started."""

import os
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from kqv.device import find_device
from kqv.errors import UsageError, UserError, first_line, warn
from kqv.settings import setting
from kqv.training.failures import FailureDetector
from kqv.training.world import World


@dataclass(frozen=True)
class ParallelSettings:
    """Many processes (torchrun)"""

    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto", "ddp: the whole model in each; fsdp: a part in each; auto: ddp where it fits easily"
    )
    backend: Literal["auto", "nccl", "gloo"] = setting("auto", "what processes talk through")
    timeout_minutes: float = setting(
        10.0, "how long processes wait for one that does not answer", at_least=0.01, below=10**6
    )


@contextmanager
def join_world(config):
    """
    A context with the World that torchrun describes in the environment; without torchrun, a World of one
    process. The processes part when the context closes. `config` has DeviceSettings and ParallelSettings.

    Raises UserError if the other processes can't be reached, or if one of them is lost later.
    """
    if "RANK" not in os.environ:
        yield World(find_device(config.device))
        return
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UsageError(f"RANK is set in the environment but {missing[0]} is not: start it by torchrun")
    rank, size = number_in("RANK"), number_in("WORLD_SIZE")
    timeout = 60 * config.timeout_minutes
    store = connect(rank, size, timeout)
    with FailureDetector(store, rank, size, hosts_store()) as detector:
        try:
            with detector.reporting(timeout):
                yield start_process_group(config, store, rank, size, timedelta(seconds=timeout))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def start_process_group(config, store, rank, size, timeout):
    """The World of this process, which can communicate with all others."""
    device = find_own_device(config.device, number_in("LOCAL_RANK"))
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    # NCCL waits longer, so that the control group times out first: its error can be caught, NCCL's can't.
    patience = 2 * timeout if backend == "nccl" else timeout
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    if has_agent() and is_to_restart_machines():
        warn(
            "to start several machines again, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "its environment, as launch/multinode.sh sets it"
        )
    return World(device, rank, size, number_in("LOCAL_WORLD_SIZE", 1), control, saving)


def find_own_device(name, local_rank):
    """This process's own device: of a machine's GPUs each process takes one. Raises UsageError."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank} of this machine finds only {torch.cuda.device_count()} GPUs: "
                "start as many processes as there are (--nproc_per_node=gpu), or use --device=cpu"
            )
        name = f"cuda:{local_rank}"
    return find_device(name)


def connect(rank, size, timeout):
    """
    The store that torchrun, or without it the first process, hosts for all. Raises UserError if nobody
    answers for `timeout` seconds.
    """
    host, port = os.environ["MASTER_ADDR"], number_in("MASTER_PORT")
    deadline = time.monotonic() + timeout
    while True:  # tried in Python first: what torch prints about a failure is pages long
        try:
            if hosts_store():
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=timeout).close()
            store = dist.TCPStore(host, port, is_master=hosts_store(), timeout=timedelta(seconds=timeout))
            start = os.environ["TORCHELASTIC_RESTART_COUNT"] if has_agent() else 0
            return dist.PrefixStore(f"kqv, start {start}", store)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline or isinstance(error, RuntimeError):
                raise UserError(
                    f"process {rank} of {size} found nobody at {host}:{port} for {timeout:g} s "
                    f"({first_line(error)}): check that address, and that the first machine has started"
                ) from None
            time.sleep(min(1, timeout / 10))


def number_in(name, default=None):
    """The whole number in an environment variable. Raises UsageError for anything else."""
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"{name}={text} in the environment is not a whole number: unset it, or use torchrun"
        ) from None


def has_agent():
    """Whether torchrun hosts the store, which then outlives the processes and their restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def hosts_store():
    """Whether this process hosts the store."""
    return os.environ["RANK"] == "0" and not has_agent()


def is_to_restart_machines():
    """Whether torchrun, on several machines, starts processes again that have ended."""
    machines, restarts = (number_in(name, 0) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    return machines > 1 and restarts > 0
