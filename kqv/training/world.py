"""
One process or many: the World is the one place that knows how many there are.

Every process (a *rank*) trains on its own micro-batches, and the gradient of a step is the mean over all:

    ddp   every process holds the whole model, gradient and optimizer; gradients are averaged (Li et al. 2020)
    fsdp  every process holds a part of each, and gathers a block's weights while it computes that block
          (Zhao et al. 2023; ZeRO stage 3, Rajbhandari et al. 2019). With several GPUs on each of several
          nodes, a model is sharded within a node, over its fast links, and nodes average their gradients
          (HSDP, hybrid sharding).
"""

import socket
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kqv.errors import UserError
from kqv.formats.lora import is_adapted
from kqv.training.optimizer import training_bytes
from kqv.training.sharding import is_sharded, work_on_some, work_on_whole


@dataclass(frozen=True)
class World:
    """This process and all others of the run. With one process every method is a no-op."""

    device: torch.device
    rank: int = 0
    size: int = 1  # processes in all
    node_size: int = 1  # processes on each node
    control: dist.ProcessGroup | None = None  # for decisions, on the CPU: they never wait for a GPU
    saving: dist.ProcessGroup | None = None  # for the thread that saves

    @property
    def is_main(self):
        return self.rank == 0

    def __str__(self):
        return f"{self.size} x {self.device.type if self.size > 1 else self.device}"

    def sum(self, values):
        """The sum of a tensor over all processes, in each of them. Changes `values` in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values):
        """The mean of a tensor over all processes, in each of them. Changes `values` in place."""
        return self.sum(values) / self.size

    def any(self, *flags):
        """For each flag, whether it is set in any process: the same answers in each of them."""
        if self.size == 1:
            return flags
        votes = torch.tensor(list(map(int, flags)))
        dist.all_reduce(votes, group=self.control)
        return [count > 0 for count in votes.tolist()]

    def share(self, value):
        """The main process's value, of any plain type, in each process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def spread(self, work, stack, parameter):
        """
        work(stack), where `stack` (n, rows, cols) is of n parameters like this one and `work` treats each by
        itself: processes share the work. Where parameters are sharded, it is this process's part of both.
        """
        if hasattr(parameter, "device_mesh"):
            return work_on_whole(work, stack, parameter)
        return work(stack) if self.size == 1 else work_on_some(work, stack, self.rank, self.size)

    def require_same(self, values):
        """Raise UserError, in every process, if {name: plain value} is not the same in all of them."""
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
        Move the model to the device or, with `parallel="fsdp"`, shard it: each of its `layers` is gathered by
        itself, all other parameters together. A sharded model computes in `dtype`. Returns the model.

        Raises UserError where nodes have different numbers of processes, and where LoRA would be sharded.
        """
        if self.size == 1 or self.find_parallel(parallel, model) == "ddp":
            return model.to(self.device)
        if is_adapted(model):
            raise UserError(
                "a model that learns by LoRA can't be sharded: use --parallel=ddp, or train all weights"
            )
        # Slow imports: only when sharding.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if self.size % self.node_size:
            raise UserError(
                f"{self.node_size} of {self.size} processes are on this machine: to shard a model, start as "
                "many on each (--nproc_per_node)"
            )
        if 1 < self.node_size < self.size:
            shape, names = (self.size // self.node_size, self.node_size), ("nodes", "node")
        else:
            shape, names = (self.size,), ("world",)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        # The embedding has `dtype`, and so has what goes from block to block. The cosines and sines of rotary
        # positions go into the blocks, too: they stay in float32.
        precision = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*layers, model):
            fully_shard(part, mesh=mesh, mp_policy=precision)
        return model

    def find_parallel(self, choice, model):
        """ "ddp" or "fsdp"; for "auto", ddp where training the whole model takes at most half of a GPU."""
        if choice != "auto":
            return choice
        if self.device.type != "cuda":
            return "ddp"
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return "ddp" if training_bytes(model) <= memory / 2 else "fsdp"

    def wrap(self, model):
        """The model that `place` returned, compiled or not, with gradients that are averaged."""
        if self.size == 1 or is_sharded(model):
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # each gradient is stored once
        )

    def reduce_gradients(self, model, last):
        """
        A context for the forward and backward of one micro-batch of `model`, as `wrap` returned it: processes
        average their gradients in the `last` one of a step only.
        """
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
        elif self.size > 1 and not last:
            return model.no_sync()
        return nullcontext()

    def frees_gradients(self, model):
        """Whether gradients may be freed between steps: DDP's are views of its buckets, which stay."""
        return self.size == 1 or is_sharded(model)
