"""A training step as most would write it in PyTorch: what train.py's step is compared with."""

import numpy as np
import torch
from torch.nn import functional as F

from kqv.text import dataset
from kqv.training.batches import to_device
from kqv.training.optimizer import parameter_groups
from model import GPT, NextToken


def cross_entropy_of_all(x, head, targets, vocab_size=None):
    """The loss from all logits at once, in float32: x (N, C), head (V, C), targets (N,); any `vocab_size`."""
    return F.cross_entropy(F.linear(x, head).float(), targets)


def plain_step(settings, shape, machine, compiled):
    """
    A function without arguments that does a training step and returns the loss: autocast on a GPU, float32 on
    a CPU, the attention that torch chooses, a batch stacked from random windows.
    """
    device, dtype = machine.device, machine.dtype
    torch.manual_seed(settings.seed)
    gpt = GPT(shape).to(device)
    objective = NextToken(gpt, cross_entropy_of_all)
    model = torch.compile(objective) if compiled else objective
    optimizer = torch.optim.AdamW(
        parameter_groups(gpt, settings.weight_decay), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    tokens = dataset.Dataset(settings.dataset).splits["train"]
    length = shape.block_size
    half = device.type != "cpu" and dtype != torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=half)

    def batch():
        starts = torch.randint(len(tokens) - length, (settings.batch_size,)).tolist()
        x, y = (
            np.stack([tokens[i + shift : i + shift + length].astype(np.int64) for i in starts])
            for shift in (0, 1)
        )
        return to_device((x, y), device)

    def step():
        torch.backends.cuda.enable_flash_sdp(True)
        with autocast:
            loss = model(*batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
