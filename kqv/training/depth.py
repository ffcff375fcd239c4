"""
One number for a whole run: from the depth of a model and the tokens for each of its weights to its width,
heads, batch, learning rates and steps, as in nanochat (Karpathy 2025). docs/modern.md has the rules.
"""

import math
from dataclasses import dataclass

from kqv.errors import UsageError
from kqv.settings import setting

CHANNELS = 64  # for each block, and in a head
LARGEST = 200  # blocks


@dataclass(frozen=True)
class DepthSettings:
    """All at once"""

    depth: int = setting(
        0, "blocks of a modern model, from which all that is not given follows; 0: none", at_least=0
    )
    tokens_per_parameter: float = setting(
        10.0, "depth: tokens to train on for each weight of the blocks", at_least=1e-3
    )


def settings_of_depth(config, given, processes):
    """
    The settings that follow from config.depth, {name: value}, also from the block_size and the batch_size
    that are `given`. Each process has as many micro-batches. Raises UsageError for a depth that no machine
    can train.
    """
    if config.depth > LARGEST:
        raise UsageError(f"depth is {config.depth}, but it must be at most {LARGEST}")
    width = CHANNELS * config.depth
    inner = 8 * math.ceil(width / 3)  # 8/3 of the width: with its gate, SwiGLU has the weights of 4 n_embd
    weights = config.depth * (4 * width**2 + 3 * width * inner)  # of the blocks' matrices
    tokens = config.tokens_per_parameter * weights
    # The best batch grows about as the square root of the tokens; 2,048 tokens were good for 2.5 million.
    sequences = max(processes, round(1.3 * math.sqrt(tokens) / config.block_size))
    fits = config.batch_size if "batch_size" in given else sequences // processes
    micro_batch = min(config.batch_size, fits)
    accumulation = processes * max(1, round(sequences / micro_batch / processes))
    tokens_per_step = accumulation * micro_batch * config.block_size
    narrower = math.sqrt(128 / width)  # for AdamW; a step of Muon does not depend on the width
    return {
        "n_layer": config.depth,
        "n_embd": width,
        "n_head": config.depth,
        "n_inner": inner,
        "batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_iters": max(1, round(tokens / tokens_per_step)),
        "bias": False,
        "norm": "rmsnorm",
        "positions": "rotary",
        "qk_norm": True,
        "activation": "swiglu",
        "tied_head": False,
        "zero_projections": True,
        "optimizer": "muon",
        "muon_learning_rate": 0.02,
        "learning_rate": 0.008 * narrower,
        "min_lr": 0.008 * narrower / 50,
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.0,
        "schedule": "wsd",
        "warmup_iters": 0,
        "cooldown_iters": 0.7,
    }
