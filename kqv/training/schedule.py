"""How the learning rates, and Muon's momentum, change during a run."""

import math
from dataclasses import dataclass
from typing import Literal

from kqv.settings import setting


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate"""

    learning_rate: float = setting(6e-4, "the largest learning rate", at_least=0.0)
    max_iters: int = setting(600000, "training steps", at_least=0)
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = setting(
        "cosine", "how learning rates fall after the warm-up; wsd: not before the cool-down"
    )
    decay_lr: bool = setting(True, "False: learning rates are constant, without a warm-up or a schedule")
    warmup_iters: float = setting(
        2000, "steps to warm up for, or, below 1, a share of max_iters", at_least=0.0
    )
    cooldown_iters: float = setting(
        0.2, "wsd: steps to cool down for, or, below 1, a share of max_iters", at_least=0.0
    )
    lr_decay_iters: int = setting(
        None, "the step at which min_lr is reached; not given: max_iters", at_least=0
    )
    min_lr: float = setting(
        None,
        "the learning rate at the end; not given: learning_rate / 10, and 0 for inverse_sqrt",
        at_least=0.0,
    )


def progress(step, begin, end):
    """The share of the way from step `begin` to step `end` that is done, 0 to 1."""
    return min(max((step - begin) / (end - begin), 0.0), 1.0) if begin < end else float(step >= end)


# Each gives a learning rate from the end of the warm-up on, between that of the end (0) and the largest (1).
SCHEDULES = {
    # Half a period: slow, fast, slow (Loshchilov & Hutter 2016).
    "cosine": lambda step, warmup, cooldown, end: 0.5 * (1 + math.cos(math.pi * progress(step, warmup, end))),
    "linear": lambda step, warmup, cooldown, end: 1 - progress(step, warmup, end),
    # Warm up, stay, decay (Hu et al. 2024): a longer run needs no other beginning.
    "wsd": lambda step, warmup, cooldown, end: 1 - progress(step, max(warmup, end - cooldown), end),
    # Vaswani et al. 2017, section 5.3: it needs no end.
    "inverse_sqrt": lambda step, warmup, cooldown, end: math.sqrt(max(warmup, 1) / max(step, warmup, 1)),
    "constant": lambda step, warmup, cooldown, end: 1.0,
}

# The settings that a schedule has no use for.
UNUSED = {
    "cosine": ("cooldown_iters",),
    "linear": ("cooldown_iters",),
    "wsd": (),
    "inverse_sqrt": ("cooldown_iters", "lr_decay_iters"),
    "constant": ("cooldown_iters", "lr_decay_iters", "min_lr"),
}


def in_steps(value, config):
    """A number of steps that may be given as a share of the run."""
    return value * config.max_iters if value < 1 else value


def last_learning_rate(config):
    """The learning rate that the schedule tends to."""
    if config.schedule == "constant":
        return config.learning_rate
    if config.min_lr is not None:
        return config.min_lr
    return 0.0 if config.schedule == "inverse_sqrt" else config.learning_rate / 10


def learning_rate_at(step, config, peak=None):
    """
    The learning rate of a step: a linear warm-up to learning_rate, then the schedule down to min_lr, which it
    reaches at step lr_decay_iters. That of parameters whose largest is not learning_rate but `peak` is the
    same share of it.
    """
    share = 1.0  # of learning_rate
    if peak is None:
        peak = config.learning_rate
    elif peak != config.learning_rate:
        share = peak / config.learning_rate if config.learning_rate else 0.0
    if not config.decay_lr:
        return peak
    warmup, cooldown = in_steps(config.warmup_iters, config), in_steps(config.cooldown_iters, config)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    last = share * last_learning_rate(config)
    return last + SCHEDULES[config.schedule](step, warmup, cooldown, end) * (peak - last)


def momentum_at(step, config):
    """Muon's momentum, which begins at 0.85: the first gradients are soon of another model."""
    first = min(0.85, config.muon_momentum)
    return first + progress(step, 0, in_steps(config.momentum_warmup_iters, config)) * (
        config.muon_momentum - first
    )
