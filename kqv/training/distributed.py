"""
One process or many: `torchrun` starts the processes, and this is the one place that knows how many there are.

Every process (a *rank*) trains on its own micro-batches, and the gradient of a step is the mean over all:

    ddp   every process holds the whole model, gradient and optimizer; gradients are averaged (Li et al. 2020)
    fsdp  every process holds a part of each, and a block's weights are gathered for as long as it computes
          (Zhao et al. 2023; ZeRO stage 3, Rajbhandari et al. 2019). On several nodes of several GPUs the
          parts are those of a node, and nodes average their gradients: the fast links within a node gather.
"""

import os
import socket
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from kqv.device import find_device
from kqv.errors import UsageError, UserError, first_line, warn
from kqv.settings import setting

BYTES_A_PARAMETER = 16  # the float32 weight, its gradient and AdamW's two moments


GRACE = 2  # seconds that a process has to show that it lives


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


@dataclass(frozen=True)
class World:
    """This process's place among all of them. Everything here is a no-op in a world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    node_size: int = 1  # processes on each node
    store: dist.Store | None = None  # a small table that all can read and write, beside any computation
    control: dist.ProcessGroup | None = None  # to agree on the CPU, without waiting for a GPU
    saving: dist.ProcessGroup | None = None  # for the thread that saves

    @property
    def is_main(self):
        return self.rank == 0

    def __str__(self):
        return f"{self.size} x {self.device.type if self.size > 1 else self.device}"

    def sum(self, values):
        """The sum of a tensor over all processes; each gets it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values):
        """The mean of a tensor over all processes; each gets it."""
        return self.sum(values) / self.size

    def any(self, *flags):
        """For each flag, whether it is set in any process; all get the same answers."""
        if self.size == 1:
            return flags
        votes = torch.tensor(list(map(int, flags)))
        dist.all_reduce(votes, group=self.control)
        return [count > 0 for count in votes.tolist()]

    def share(self, value):
        """The main process's value, any plain one; each gets it."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def require_same(self, values):
        """Raise UserError, in every process, where {name: plain value} is not the same in all of them."""
        if self.size == 1:
            return
        everyone = [None] * self.size
        dist.all_gather_object(everyone, (socket.gethostname(), values), group=self.control)
        first_host, first = everyone[0]
        for rank, (host, others) in enumerate(everyone):
            for name in first:
                if others.get(name) != first[name]:
                    raise UserError(
                        f"{name} is {first[name]!s:.50} in process 0 on {first_host} and "
                        f"{others.get(name)!s:.50} in process {rank} on {host}: give all processes the "
                        "same command, code, data and out_dir"
                    )

    def place(self, model, layers, parallel, dtype):
        """
        Put the model on the device, with `parallel="fsdp"` this process's part of it: of each of the `layers`
        by itself and of the rest together, computing in `dtype`.
        """
        if self.size == 1 or self.find_parallel(parallel, model) == "ddp":
            return model.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh  # half a second, for those who need it
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if self.size % self.node_size:
            raise UserError(
                f"{self.node_size} of {self.size} processes are on this machine: to shard a model, start as "
                "many on each (--nproc_per_node)"
            )
        nodes = self.size // self.node_size
        if 1 < self.node_size < self.size:
            shape, names = (nodes, self.node_size), ("nodes", "node")
        else:
            shape, names = (self.size,), ("world",)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        precision = MixedPrecisionPolicy()
        if dtype != torch.float32:
            precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (*layers, model):
            fully_shard(part, mesh=mesh, mp_policy=precision)
        return model

    def find_parallel(self, choice, model):
        """ "auto": ddp where all that a process then holds of the model fits in half of its GPU."""
        if choice != "auto":
            return choice
        if self.device.type != "cuda":
            return "ddp"
        count = sum(parameter.numel() for parameter in model.parameters())
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return "ddp" if BYTES_A_PARAMETER * count <= memory / 2 else "fsdp"

    def wrap(self, model):
        """The form of a placed model, compiled or not, whose backward pass averages gradients."""
        if self.size == 1 or is_sharded(model):
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # a gradient is held once
        )

    def reduce_gradients(self, model, last):
        """
        A context for one micro-batch's forward and backward: gradients are averaged only at a step's last
        one.
        """
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
        elif self.size > 1 and not last:
            return model.no_sync()
        return nullcontext()

    def frees_gradients(self, model):
        """Whether gradients take no memory between steps: DDP's stay, as parts of its buckets."""
        return self.size == 1 or is_sharded(model)

    def why_lost(self, error, waited, word):
        """
        What to say when others do not answer, as `error` says, for `waited` seconds at most: what one of them
        left word of (`word` has it, where it came before the store ended), or who it is.
        """
        try:
            self.store.set(f"waits {self.rank}", "")
            late = "timeout" in str(error) or "imed out" in str(error)
            if late:
                self.store.set("late", "")
            before = self.read_all("beat")
            time.sleep(GRACE + late * waited / 20)  # others may have begun to wait later
            if self.store.check(["error"]):
                return self.store.get("error").decode()
            late = self.store.check(["late"])
            beats, waiting = self.read_all("beat"), self.read_all("waits")
        except RuntimeError:
            if word:
                return word[0]
            return f"process 0 of {self.size}, or the torchrun that started it, has ended: look at its output"
        ranks = range(self.size)
        silent = [r for r in ranks if beats[r] == before[r]] or [r for r in ranks if waiting[r] is None]
        if not silent:
            return f"the processes lost each other within {waited:g} s: look at the network between them"
        numbers = ", ".join(map(str, silent))
        return (
            f"process {numbers} of {self.size} "
            + (f"has not answered for {waited:g} s" if late else "has ended")
            + ": look at its output and its machine; --init_from=auto goes on from the last save"
        )

    def read_all(self, name):
        """What each process has in the store under a name, None where that is nothing."""
        keys = [f"{name} {rank}" for rank in range(self.size)]
        return [self.store.get(key) if self.store.check([key]) else None for key in keys]


@contextmanager
def heart(store, rank):
    """
    While this is open, a thread shows in the store that the process lives, whatever it waits for. Gives a
    list for the first word that a process leaves of its end, which outlives the store.
    """
    stop, word = threading.Event(), []

    def beat():
        with suppress(RuntimeError):  # the store has ended, which others will say
            while not stop.wait(GRACE / 4):
                store.set(f"beat {rank}", str(time.monotonic()))
                if not word and store.check(["error"]):
                    word.append(store.get("error").decode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield word
    finally:
        stop.set()
        thread.join(GRACE)


def is_sharded(model):
    """Whether each process holds a part of the model (FSDP)."""
    return hasattr(next(model.parameters()), "device_mesh")


def whole(tensor):
    """A tensor that may be sharded, whole in every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter, tensor):
    """This process's part of a whole tensor, where the parameter is sharded; elsewhere the tensor itself."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def join_world(config):
    """
    The World that torchrun describes in the environment, left again at the end; a world of one without
    torchrun. `config` has DeviceSettings and ParallelSettings.

    Raises UserError where the other processes can't be reached, or later one of them is lost.
    """
    if "RANK" not in os.environ:
        yield World(find_device(config.device))
        return
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UsageError(f"RANK is set in the environment but {missing[0]} is not: start it by torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    waited = 60 * config.timeout_minutes
    timeout = timedelta(seconds=waited)
    store = connect(rank, size, waited)
    world = World(torch.device("cpu"), rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), store)
    with heart(store.clone(), rank) as word:
        try:
            device = find_own_device(config.device, int(os.environ["LOCAL_RANK"]))
            backend = config.backend
            if backend == "auto":
                backend = "nccl" if device.type == "cuda" else "gloo"
            # NCCL waits longer, so that it is the processes that notice who is late.
            patience = 2 * timeout if backend == "nccl" else timeout
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
            control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
            if has_agent() and is_to_restart_machines():
                warn(
                    "to start several machines again, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
                    "its environment, as launch/multinode.sh sets it"
                )
            yield replace(world, device=device, control=control, saving=saving)
        except UserError as error:
            error.is_said = tell(store, str(error))
            raise
        except RuntimeError as error:
            if not is_about_processes(error):
                tell(store, f"process {rank} of {size} failed: {first_line(error)}")
                raise
            lost = UserError(world.why_lost(error, waited, word))
            lost.is_said = tell(store, str(lost))
            raise lost from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def find_own_device(name, local_rank):
    """The device of this process among those of its machine: each takes a GPU of its own."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank} of this machine finds only {torch.cuda.device_count()} GPUs: "
                "start as many processes as there are (--nproc_per_node=gpu), or use --device=cpu"
            )
        name = f"cuda:{local_rank}"
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def connect(rank, size, waited):
    """
    The store that torchrun, or where it is not used the first process, keeps for all. Raises UserError where
    nobody answers for `waited` seconds.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + waited
    while True:  # asked in Python, since torch's own answers are pages long
        try:
            if keeps_store():
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=waited).close()
            store = dist.TCPStore(host, port, is_master=keeps_store(), timeout=timedelta(seconds=waited))
            start = os.environ["TORCHELASTIC_RESTART_COUNT"] if has_agent() else 0
            return dist.PrefixStore(f"kqv, start {start}", store)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline or isinstance(error, RuntimeError):
                raise UserError(
                    f"process {rank} of {size} found nobody at {host}:{port} for {waited:g} s "
                    f"({first_line(error)}): check that address, and that the first machine has started"
                ) from None
            time.sleep(min(1, waited / 10))


def has_agent():
    """Whether torchrun keeps the store, which then outlives the processes and their restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_to_restart_machines():
    """Whether torchrun, on several machines, is to start processes again that have ended."""
    machines, restarts = (
        int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    )
    return machines > 1 and restarts > 0


def keeps_store():
    """Whether this process does."""
    return os.environ["RANK"] == "0" and not has_agent()


def is_about_processes(error):
    """Whether an exception says that another process is late or gone."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def tell(store, message):
    """Leave word for the others of what ends this process. Returns whether one of them said so before."""
    try:
        store.set("error", message)
        is_said = store.add(f"said {message}", 1) > 1
    except RuntimeError:  # the store is no more
        return False
    if keeps_store():
        time.sleep(GRACE)  # it ends with this process
    return is_said


def in_one_voice(main):
    """
    A script's main as one of many processes runs it: torchrun learns of its errors, and what several have to
    say one of them says.
    """

    @record
    def recorded(argv):
        try:
            main(argv)
        except UserError as error:  # its line says all; torchrun would print where in the code it came from
            return error

    def once(argv):
        if error := recorded(argv):
            if error.is_said is None:  # before the processes met
                error.is_said = os.environ.get("LOCAL_RANK", "0") != "0"
            raise error

    return once
