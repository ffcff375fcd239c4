"""What training computes: the model with its loss, and what is put into both from outside, to be fast."""

import os
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from kqv.kernels.attention import attend_within_examples
from kqv.training.distillation import Distilled
from kqv.training.float8 import require_float8
from kqv.training.fused_mlp import fuse_mlps
from kqv.training.loss import next_token_loss
from model import NextToken


def make_objective(gpt, config, data, device, dtype, teacher=None):
    """
    The NextToken of `gpt`, to train on the Dataset `data` as the settings say, and if there is one from a
    Teacher. Raises UserError where the device can't do what is asked for.
    """
    for one in (gpt, teacher.gpt.to(device)) if teacher else (gpt,):
        narrow_stream(one)
        if data.is_chat:
            attend_within_examples(one, data.most_in_row(config.block_size), device, dtype)
    if config.fused_mlp:
        fuse_mlps(gpt, device, dtype)
    float8 = config.dtype_head == "float8"
    if float8:
        require_float8(gpt.lm_head.weight, dtype, device)
    loss = loss_of(gpt, config.label_smoothing, float8)
    if teacher:
        return Distilled(gpt, loss, data.tokenizer.vocab_size, teacher.gpt, config)
    return NextToken(gpt, loss, data.tokenizer.vocab_size)


def loss_of(gpt, label_smoothing=0.0, float8=False):
    """next_token_loss for a GPT, in the form that NextToken calls."""
    new_rows = getattr(gpt.lm_head, "new_rows", None)  # which learn while the others are frozen
    return partial(next_token_loss, label_smoothing=label_smoothing, float8=float8, new_rows=new_rows)


def checkpoint_activations(gpt):
    """
    Keep only what goes into each block, and compute the block again for its backward pass (Chen et al. 2016).
    """
    for block in gpt.transformer.h:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def narrow_stream(gpt):
    """
    Let the residual stream have bfloat16 where autocast computes in it, as in a sharded model: every norm and
    every addition reads and writes half as much. It is cast once, before the first block. (In float16, whose
    largest number is 65,504, single channels could overflow.)
    """

    def narrowed(drop, arguments, x):  # x (B, T, C)
        device = x.device.type
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return x.bfloat16() if low else x

    gpt.transformer.drop.register_forward_hook(narrowed)


def compile_blocks(gpt):
    """
    Compile each block of a sharded model by itself: what gathers a block's weights before it can't be
    compiled.
    """
    for block in gpt.transformer.h:
        block.forward = torch.compile(block.forward)


def set_precision(config, device):
    """
    How float32 products and attention are computed, and with --deterministic that every operation repeats bit
    for bit. These switches hold for the whole process.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # in TF32
    if device.type == "cpu":
        # Over few tokens the CPU's fused attention is slower than plain products, in bfloat16 by far. The
        # switch is CUDA's by name only.
        torch.backends.cuda.enable_flash_sdp(config.block_size > 128)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
        torch.use_deterministic_algorithms(True)
