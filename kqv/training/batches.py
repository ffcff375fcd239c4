"""A process's batches of a training step."""

from dataclasses import dataclass
from typing import Literal

import torch

from kqv.errors import warn
from kqv.settings import setting


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    dataset: str = setting(
        "openwebtext", "a prepared set: the folder data/<dataset>, or an absolute path", path=True
    )
    batch_size: int = setting(12, "sequences in one micro-batch", at_least=1, below=2**50)
    gradient_accumulation_steps: int = setting(
        5 * 8, "micro-batches in one step, over all processes", at_least=1
    )
    block_size: int = setting(1024, "the longest context, in tokens", at_least=1)
    data_order: Literal["random", "epoch"] = setting(
        "random", "windows of the text: drawn with replacement, or each once before any comes again"
    )


def windows_per_step(config):
    """How many windows all processes together train on in a step."""
    return config.gradient_accumulation_steps * config.batch_size


def tokens_per_step(config):
    """How many tokens all processes together train on in a step."""
    return windows_per_step(config) * config.block_size


def micro_batches(data, config, world, step, before=None):
    """
    This process's micro-batches of a step: for each the model's arguments, on the device, its weight, and a
    seed for dropout. Of n processes, process r takes the micro-batches r, r + n, r + 2n, ... `before` is how
    many windows the steps before have read; None: each read as many as this one.

    A micro-batch's weight is the number of tokens that it learns, as a multiple of the mean over all
    micro-batches of the step: 1 for texts, of which every token is learnt. So the mean of the weighted losses
    is the mean over all tokens, however they are split. A step with nothing to learn has no micro-batches.
    """
    count = config.gradient_accumulation_steps
    which = [
        (config.batch_size, config.block_size, config.seed, step, index, config.data_order, count, before)
        for index in range(count)
    ]
    learnt = [data.learnt_tokens(*arguments) for arguments in which]
    mean = sum(learnt) / count
    if not mean:
        warn(f"step {step} is skipped: none of its rows has an answer to learn")
        return
    for index in range(world.rank, count, world.size):
        batch, seed = data.training_batch(*which[index])
        if not learnt[index]:
            batch.targets[:] = 0  # a mean over no token would be NaN; this batch's weight is 0
        yield to_device(batch, world.device), learnt[index] / mean, seed


def to_device(batch, device):
    """A Batch's arrays as tensors; to a CUDA device through pinned memory, so that the host need not wait."""
    tensors = [torch.from_numpy(array) for array in batch if array is not None]
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]
