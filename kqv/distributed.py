"""
One process or many: `torchrun` starts the processes, and this is the one place that knows how many there are.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kqv.device import find_device


@dataclass(frozen=True)
class World:
    """This process's place among all of them. Everything here is a no-op in a world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None  # to agree on the CPU, without waiting for a GPU

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, values):
        """The sum of a tensor over all processes; each gets it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values):
        """The mean of a tensor over all processes; each gets it."""
        return self.sum(values) / self.size

    def any(self, flag):
        """Whether the flag is set in any process; all get the same answer."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, group=self.control)
        return votes.item() > 0

    def share(self, value):
        """The main process's value, any plain one; each gets it."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def wrap(self, model):
        """The model whose backward averages gradients over all processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def reduce_gradients(self, model, last):
        """
        A context for one micro-batch's forward and backward: gradients are averaged only at a step's last
        one.
        """
        return nullcontext() if self.size == 1 or last else model.no_sync()


@contextmanager
def join_world(device_name, backend):
    """
    The World that `torchrun` describes in the environment, left again at the end; a world of one without
    torchrun.
    """
    if not dist.is_torchelastic_launched():
        yield World(find_device(device_name))
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{local_rank}"
    device = find_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        control = dist.new_group(backend="gloo")
        yield World(device, dist.get_rank(), dist.get_world_size(), control)
    finally:
        dist.destroy_process_group()
