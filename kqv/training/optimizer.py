"""The optimizer and its learning rate."""

import math
from dataclasses import dataclass

import torch

from kqv.settings import setting
from kqv.training.sharding import shard_like


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer (AdamW) and learning rate"""

    learning_rate: float = setting(6e-4, "the largest learning rate", at_least=0.0)
    max_iters: int = setting(600000, "training steps", at_least=0)
    weight_decay: float = setting(1e-1, "on matrices and embeddings", at_least=0.0)
    beta1: float = setting(0.9, "momentum", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "momentum of the squares", at_least=0.0, below=1.0)
    max_bad_steps: int = setting(
        20, "skipped steps in a row (non-finite gradient) that end the run", at_least=1
    )
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", at_least=0.0)
    decay_lr: bool = setting(True, "warm up, then decay along a cosine; False: constant")
    warmup_iters: int = setting(2000, "steps to warm up for", at_least=0)
    lr_decay_iters: int = setting(600000, "the step at which min_lr is reached", at_least=0)
    min_lr: float = setting(6e-5, "the learning rate at the end of the decay", at_least=0.0)


def make_optimizer(gpt, config):
    """
    AdamW (Loshchilov & Hutter 2017) as one fused kernel, which can leave out a bad step without asking the
    host.
    """
    groups = gpt.parameter_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def training_bytes(num_parameters):
    """Bytes of float32 that training holds of a model: weights, gradients and AdamW's two moments."""
    return 4 * num_parameters * (1 + 1 + 2)


def learning_rate_at(step, config):
    """
    The learning rate of a step: linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters.
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


def load_optimizer(optimizer, saved):
    """
    AdamW's state for the optimizer's parameters, from the contents of a checkpoint: where they are sharded,
    each process takes its part. Raises ValueError or UserError where it does not fit.
    """
    if "folder" in saved:
        from kqv.formats import sharded

        return sharded.load_moments(optimizer, saved["folder"])
    settings = optimizer.state_dict()["param_groups"]  # the run's own, not the checkpoint's
    moments = {number: dict(state) for number, state in saved["optimizer"]["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[number][name].shape != parameter.shape:  # the fused kernel trusts these shapes
                raise ValueError(f"{name} of parameter {number} has another shape than the parameter")
            moments[number][name] = shard_like(parameter, moments[number][name])
    optimizer.load_state_dict({"state": moments, "param_groups": settings})
