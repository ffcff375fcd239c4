"""A process's batches of a training step."""

from dataclasses import dataclass
from typing import Literal

import torch

from kqv.settings import setting


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    dataset: str = setting("openwebtext", "a prepared set: the folder data/<dataset>, or an absolute path")
    batch_size: int = setting(12, "sequences in one micro-batch", at_least=1, below=2**50)
    gradient_accumulation_steps: int = setting(
        5 * 8, "micro-batches in one step, over all processes", at_least=1
    )
    block_size: int = setting(1024, "the longest context, in tokens", at_least=1)
    sampling: Literal["random", "epoch"] = setting(
        "random", "windows of the text: drawn with replacement, or each once before any comes again"
    )


def tokens_per_step(config):
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def micro_batches(data, config, world, step):
    """
    This process's share of a step: (the model's arguments, seed) each. Rank r takes every size-th, beginning
    with the r-th.
    """
    count = config.gradient_accumulation_steps
    for index in range(world.rank, count, world.size):
        batch, seed = data.training_batch(
            config.batch_size, config.block_size, config.seed, step, index, config.sampling, count
        )
        yield to_device(batch, world.device), seed


def to_device(batch, device):
    """A Batch's arrays as tensors; to a CUDA device through pinned memory, so that computing goes on."""
    tensors = [torch.from_numpy(array) for array in batch if array is not None]
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]
