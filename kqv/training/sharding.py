"""Sharded tensors: of each parameter every process holds a part (FSDP)."""


def is_sharded(model):
    """Whether each process holds only a part of the model's parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def full_tensor(tensor):
    """The whole of a tensor that may be sharded, in every process; all processes must call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter, tensor):
    """This process's part of a full tensor if the parameter is sharded, else the tensor itself."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow import: only when sharding

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
