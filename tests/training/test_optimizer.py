"""The learning rate; and what holds for any optimizer: bad steps are skipped, and its state is resumed."""

import copy
import math

import pytest
import torch
from conftest import random_gpt, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kqv.errors import UserError
from kqv.settings import parse
from kqv.training.optimizer import (
    OptimizerSettings,
    learning_rate_at,
    limit_bad_steps,
    load_optimizer,
    make_optimizer,
    parameters_of,
    step_unless,
)


def settings(**values):
    return parse(OptimizerSettings, [f"--{name}={value}" for name, value in values.items()])


# The learning rate


def nanogpt_learning_rate(step, config):
    """nanoGPT's get_lr, as it stands there."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step > config.lr_decay_iters:
        return config.min_lr
    decay_ratio = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


def test_learning_rate_warms_up_and_decays_along_a_cosine():
    config = settings(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14)
    rates = [learning_rate_at(step, config) for step in range(30)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.55)  # half-way down
    assert rates[4:15] == sorted(rates[4:15], reverse=True)
    assert rates[14:] == pytest.approx([0.1] * 16)


def test_learning_rate_is_constant_without_decay():
    config = settings(learning_rate=0.5, decay_lr=False, warmup_iters=4, lr_decay_iters=8)
    assert {learning_rate_at(step, config) for step in (0, 3, 5, 8, 100)} == {0.5}


def test_learning_rate_needs_neither_warm_up_nor_decay():
    config = settings(learning_rate=1.0, min_lr=0.1, warmup_iters=0, lr_decay_iters=0)
    assert learning_rate_at(0, config) == 0.1
    config = settings(learning_rate=1.0, min_lr=0.1, warmup_iters=5, lr_decay_iters=5)
    assert learning_rate_at(5, config) == 0.1


@given(
    step=st.integers(0, 300),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 200),
    peak=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_learning_rate_is_nanogpts(step, warmup, decay, peak, end):
    config = settings(learning_rate=peak, min_lr=end, warmup_iters=warmup, lr_decay_iters=warmup + decay)
    assert learning_rate_at(step, config) == pytest.approx(nanogpt_learning_rate(step, config), abs=1e-12)


# Any optimizer

OPTIMIZERS = {
    "the default": lambda gpt: make_optimizer(gpt, settings(learning_rate=0.01)),
    "AdamW fused": lambda gpt: torch.optim.AdamW(gpt.parameters(), lr=0.01, fused=True),
    "AdamW foreach": lambda gpt: torch.optim.AdamW(gpt.parameters(), lr=0.01, foreach=True),
    "AdamW plain": lambda gpt: torch.optim.AdamW(gpt.parameters(), lr=0.01, foreach=False),
    "AMSGrad": lambda gpt: torch.optim.AdamW(gpt.parameters(), lr=0.01, amsgrad=True),
    "SGD": lambda gpt: torch.optim.SGD(gpt.parameters(), lr=0.01),
    "SGD with momentum": lambda gpt: torch.optim.SGD(gpt.parameters(), lr=0.01, momentum=0.9),
    "SGD fused": lambda gpt: torch.optim.SGD(gpt.parameters(), lr=0.01, momentum=0.9, fused=True),
    "Muon": lambda gpt: torch.optim.Muon([p for p in gpt.parameters() if p.dim() == 2], lr=0.01),
    "Adafactor": lambda gpt: torch.optim.Adafactor(gpt.parameters(), lr=0.01),
}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def make(request):
    """A function from a GPT to its optimizer."""
    return request.param


def step(gpt, optimizer, seed, bad=False, scaler=None):
    """A step on random tokens, with a gradient that is not finite in one number if it is `bad`."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    idx, targets = random_ids(2, 8, seed=seed), random_ids(2, 8, seed=seed + 100)
    logits = F.linear(gpt.hidden(idx), gpt.lm_head.weight)
    scaler.scale(F.cross_entropy(logits.flatten(0, 1), targets.flatten())).backward()
    if bad:
        gpt.lm_head.weight.grad[3, 2] = math.nan
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), 1.0)
    step_unless(~norm.isfinite(), optimizer)
    scaler.update()
    gpt.zero_grad()


def state_of(gpt, optimizer):
    """All that a step changes."""
    return copy.deepcopy([list(gpt.parameters()), list(optimizer.state.values())])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
def test_a_bad_step_changes_neither_weights_nor_state(make, scaled):
    gpt, other = random_gpt(n_layer=1), random_gpt(n_layer=1)
    optimizer, undisturbed = make(gpt), make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    for seed, bad in enumerate([True, False, True, True, False]):  # the first one too may be bad
        before = state_of(gpt, optimizer)
        step(gpt, optimizer, seed, bad, scaler)
        assert same(before, state_of(gpt, optimizer)) == bad
        if not bad:
            step(other, undisturbed, seed)
    assert same(state_of(gpt, optimizer), state_of(other, undisturbed))
    assert scaler.get_scale() == 1.0  # 8, halved at each of three bad steps


def test_a_resumed_optimizer_goes_on_bit_for_bit(make):
    gpt = random_gpt(n_layer=1)
    optimizer = make(gpt)
    step(gpt, optimizer, 0)
    step(gpt, optimizer, 1)
    resumed = copy.deepcopy(gpt)
    again = make(resumed)
    load_optimizer(again, {"optimizer": copy.deepcopy(optimizer.state_dict())})
    assert same(state_of(gpt, optimizer), state_of(resumed, again))
    assert again.param_groups[0]["lr"] == 0.01
    step(gpt, optimizer, 2)
    step(resumed, again, 2)
    assert same(state_of(gpt, optimizer), state_of(resumed, again))


def test_an_optimizer_saved_before_its_first_update_begins_anew(make):
    gpt = random_gpt(n_layer=1)
    optimizer = make(gpt)
    load_optimizer(optimizer, {"optimizer": optimizer.state_dict()})
    assert not optimizer.state


def test_settings_are_the_runs_and_not_the_checkpoints():
    gpt = random_gpt(n_layer=1)
    optimizer = make_optimizer(gpt, settings(beta2=0.9))
    step(gpt, optimizer, 0)
    again = make_optimizer(gpt, settings(beta2=0.8))
    load_optimizer(again, {"optimizer": optimizer.state_dict()})
    assert again.param_groups[0]["betas"] == (0.9, 0.8)


def test_state_of_another_shape_or_optimizer_is_refused():
    """A fused kernel would read and write past the end of such a tensor."""
    gpt = random_gpt(n_layer=1)
    optimizers = {name: make(gpt) for name, make in OPTIMIZERS.items()}
    for optimizer in optimizers.values():
        step(gpt, optimizer, 0)
    wrong = copy.deepcopy(optimizers["AdamW fused"].state_dict())
    wrong["state"][0]["exp_avg_sq"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 0 has the shape \(1,\), not \(19, 16\)"):
        load_optimizer(OPTIMIZERS["AdamW plain"](gpt), {"optimizer": wrong})
    with pytest.raises(ValueError, match="keeps momentum_buffer of a parameter, but the checkpoint has step"):
        load_optimizer(
            OPTIMIZERS["SGD with momentum"](gpt), {"optimizer": optimizers["AdamW fused"].state_dict()}
        )


def test_too_many_bad_steps_end_the_run():
    config = settings(max_bad_steps=3, learning_rate=0.5)
    limit_bad_steps(2, 10, config)
    with pytest.raises(UserError, match="3 steps in a row up to step 11 .* below 0.5"):
        limit_bad_steps(3, 11, config)
