"""Sharded tensors: of each parameter every process holds a part (FSDP), some of its rows."""

import torch
import torch.distributed as dist


def is_sharded(model):
    """Whether each process holds only a part of the model's parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def full_tensor(tensor):
    """The whole of a tensor that may be sharded, in every process; all processes must call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor):
    """This process's part of a tensor that may be sharded, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_like(parameter, tensor):
    """This process's part of a full tensor if the parameter is sharded, else the tensor itself."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow import: only when sharding

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def work_on_some(work, stack, rank, size):
    """
    work(stack) for a stack (n, rows, cols) that every process has, where each does n / size of the matrices.
    `work` gives a stack of the same shape. Every process gets all of it.
    """
    share = -(-len(stack) // size)
    mine = stack[rank * share : (rank + 1) * share]
    done = stack.new_zeros(share, *stack.shape[1:])
    if len(mine):
        done[: len(mine)] = work(mine)
    every = stack.new_empty(size, *done.shape)
    dist.all_gather(list(every), done)
    return every.flatten(0, 1)[: len(stack)]


def work_on_whole(work, stack, parameter):
    """
    The same where each process has only its rows of the n matrices, sharded as `parameter` is: a stack
    (n, its rows, cols). The processes exchange rows, so that each has n / size whole matrices, and back.
    """
    dim = next(dim for dim, placement in enumerate(parameter.placements) if placement.is_shard())
    group, size = parameter.device_mesh.get_group(dim), parameter.device_mesh.size(dim)
    rows, cols = parameter.shape
    share, most = -(-len(stack) // size), -(-rows // size)  # matrices and rows of a process, at most
    parts = stack.new_zeros(size, share, most, cols)  # for each process the rows of its matrices
    parts.flatten(0, 1)[: len(stack), : stack.size(1)] = stack
    whole = exchange(parts, group).transpose(0, 1).flatten(1, 2)  # (share, size * most, cols)
    done = torch.zeros_like(whole)
    done[:, :rows] = work(whole[:, :rows])
    parts = exchange(done.unflatten(1, (size, most)).transpose(0, 1), group)
    return parts.flatten(0, 1)[: len(stack), : stack.size(1)]


def exchange(parts, group):
    """parts[i] goes to process i of the group; what comes from process i is parts[i] of the result."""
    arrived = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(arrived, parts.contiguous(), group=group)
    return arrived
