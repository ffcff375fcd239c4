"""The learning rate; and what holds for any optimizer: bad steps are skipped, and its state is resumed."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import random_gpt, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kqv.errors import UserError
from kqv.settings import parse
from kqv.training.muon import MuonSettings, directions, orthogonalise
from kqv.training.optimizer import (
    OptimizerSettings,
    limit_bad_steps,
    load_optimizer,
    make_optimizer,
    norm_of_gradients,
    parameters_of,
    set_learning_rates,
    step_unless,
)
from kqv.training.schedule import ScheduleSettings, learning_rate_at, momentum_at
from kqv.training.world import World

ONE = World(torch.device("cpu"))


@dataclass(frozen=True)
class Settings(MuonSettings, ScheduleSettings, OptimizerSettings):
    pass


def settings(**values):
    return parse(Settings, [f"--{name}={value}" for name, value in values.items()])


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


SCHEDULES = ["cosine", "linear", "wsd", "inverse_sqrt", "constant"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_and_never_rises_again(schedule):
    config = settings(schedule=schedule, learning_rate=1.0, warmup_iters=4, max_iters=20, min_lr=0.1)
    rates = [learning_rate_at(step, config) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    ends = {"inverse_sqrt": 0.1 + 0.9 * math.sqrt(4 / 20), "constant": 1.0}
    assert rates[20] == pytest.approx(ends.get(schedule, 0.1))


def test_schedules_by_hand():
    linear = settings(schedule="linear", learning_rate=1.0, warmup_iters=0, max_iters=10, min_lr=0)
    assert [learning_rate_at(step, linear) for step in (0, 1, 5, 10, 11)] == [1, 0.9, 0.5, 0, 0]
    wsd = settings(
        schedule="wsd", learning_rate=1.0, warmup_iters=0, cooldown_iters=4, max_iters=10, min_lr=0
    )
    assert [learning_rate_at(step, wsd) for step in (0, 6, 7, 9, 10)] == [1, 1, 0.75, 0.25, 0]
    paper = settings(schedule="inverse_sqrt", learning_rate=1.0, warmup_iters=4, max_iters=10)
    assert [learning_rate_at(step, paper) for step in (4, 16, 100)] == [1, 0.5, 0.2]


@given(step=st.integers(0, 200), schedule=st.sampled_from(SCHEDULES))
def test_a_share_of_the_run_is_as_many_steps(step, schedule):
    shares = settings(schedule=schedule, warmup_iters=0.25, cooldown_iters=0.5, max_iters=160)
    steps = settings(schedule=schedule, warmup_iters=40, cooldown_iters=80, max_iters=160)
    assert learning_rate_at(step, shares) == learning_rate_at(step, steps)


@given(step=st.integers(0, 200), schedule=st.sampled_from(SCHEDULES), peak=st.floats(0, 10))
def test_all_groups_follow_one_schedule(step, schedule, peak):
    config = settings(schedule=schedule, learning_rate=0.5, min_lr=0.1, warmup_iters=10, max_iters=160)
    share = learning_rate_at(step, config) / 0.5
    assert learning_rate_at(step, config, peak) == pytest.approx(share * peak)


def test_momentum_warms_up():
    config = settings(muon_momentum=0.95, momentum_warmup_iters=10)
    assert [momentum_at(step, config) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    shares, steps = settings(momentum_warmup_iters=0.25, max_iters=40), settings(momentum_warmup_iters=10)
    assert [momentum_at(step, shares) for step in range(12)] == [
        momentum_at(step, steps) for step in range(12)
    ]
    assert momentum_at(0, settings(muon_momentum=0.5, momentum_warmup_iters=10)) == 0.5


# Muon


@given(
    rows=st.integers(1, 24),
    cols=st.integers(1, 24),
    n=st.integers(1, 3),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(rows, cols, n, seed, scale):
    stack = scale * torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(seed))
    U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
    lengths = U.mT @ orthogonalise(stack) @ Vh.mT  # (n, k, k): the new singular values on the diagonal
    diagonal = lengths.diagonal(dim1=1, dim2=2)
    assert torch.allclose(lengths, torch.diag_embed(diagonal), atol=1e-3)
    assert (diagonal < 1.3).all()
    assert (diagonal[S > 0.02 * S.square().sum(dim=1, keepdim=True).sqrt()] > 0.6).all()


def test_muon_is_torchs_muon(monkeypatch):
    """All but Q, K and V, which ours orthogonalises apart. Theirs is in float32 here, as ours is on a CPU."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    gpt, other = (random_gpt(n_layer=2, activation="swiglu", tied_head=False) for _ in range(2))
    config = settings(
        optimizer="muon", muon_learning_rate=0.02, muon_weight_decay=0.1, learning_rate=0.01, decay_lr=False
    )
    ours = make_optimizer(gpt, config, ONE.spread)
    blocks = {
        name: p for name, p in other.named_parameters() if name.startswith("transformer.h.") and p.dim() > 1
    }
    rest = [p for name, p in other.named_parameters() if name not in blocks]
    muon = torch.optim.Muon(list(blocks.values()), lr=0.02, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    start = copy.deepcopy(gpt.state_dict())
    for seed in range(3):
        for model in (gpt, other):
            idx, targets = random_ids(2, 8, seed=seed), random_ids(2, 8, seed=seed + 100)
            F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).backward()
        for p, q in zip(gpt.parameters(), other.parameters(), strict=True):
            p.grad.copy_(q.grad)
        set_learning_rates(ours, 10**6, config)  # after the warm-up of the momentum
        ours.step()
        muon.step()
        adamw.step()
        gpt.zero_grad()
        other.zero_grad()
    expected = other.state_dict()
    for name, weight in gpt.state_dict().items():
        moved, wanted = weight - start[name], expected[name] - start[name]
        if name in blocks and "c_attn" not in name:
            assert (moved - wanted).norm() < 1e-4 * wanted.norm(), name
        elif name not in blocks:
            assert torch.allclose(weight, expected[name], atol=1e-6), name


def test_queries_keys_and_values_are_orthogonalised_apart(every_shape):
    gpt = random_gpt()
    rows = [heads * gpt.config.head_channels for heads in gpt.transformer.h[0].attn.heads]
    stack = torch.randn(2, sum(rows), gpt.config.n_embd)
    steps = directions(stack, rows)
    for part, step in zip(stack.split(rows, dim=1), steps.split(rows, dim=1), strict=True):
        longer = max(1, part.size(1) / part.size(2)) ** 0.5
        assert torch.allclose(step, orthogonalise(part) * longer)
    (group,) = [
        g
        for g in make_optimizer(gpt, settings(optimizer="muon"), ONE.spread).param_groups
        if g["rows"] == rows
    ]
    assert group["params"] == [block.attn.c_attn.weight for block in gpt.transformer.h]


def test_every_parameter_of_every_shape_is_in_one_group(every_shape):
    gpt = random_gpt()
    config = settings(
        optimizer="muon", embedding_learning_rate=0.3, head_learning_rate=0.2, learning_rate=0.1
    )
    optimizer = make_optimizer(gpt, config, ONE.spread)
    found = [id(parameter) for parameter in parameters_of(optimizer)]
    assert sorted(found) == sorted(map(id, gpt.parameters())) and len(set(found)) == len(found)
    peaks = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert peaks[id(gpt.transformer.wte.weight)] == 0.3
    assert peaks[id(gpt.lm_head.weight)] == (0.3 if gpt.config.tied_head else 0.2)
    assert peaks[id(gpt.transformer.ln_f.weight)] == 0.1
    assert peaks[id(gpt.transformer.h[0].mlp.c_proj.weight)] == 0.02


# Any optimizer

OPTIMIZERS = {
    "the default": lambda gpt: make_optimizer(gpt, settings(learning_rate=0.01), ONE.spread),
    "our Muon": lambda gpt: make_optimizer(
        gpt, settings(optimizer="muon", muon_weight_decay=0.1), ONE.spread
    ),
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


def step(gpt, optimizer, seed, bad=False, scaler=None, grad_clip=1.0):
    """A step on random tokens, with a gradient that is not finite in one number if it is `bad`."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    idx, targets = random_ids(2, 8, seed=seed), random_ids(2, 8, seed=seed + 100)
    logits = F.linear(gpt.hidden(idx), gpt.lm_head.weight)
    scaler.scale(F.cross_entropy(logits.flatten(0, 1), targets.flatten())).backward()
    if bad:
        gpt.lm_head.weight.grad[3, 2] = math.nan
    scaler.unscale_(optimizer)
    norm = norm_of_gradients(parameters_of(optimizer))
    step_unless(~norm.isfinite(), optimizer, norm, grad_clip)
    scaler.update()
    gpt.zero_grad()
    return norm


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


class OnMPS(torch.Tensor):
    """A stand-in for a tensor on MPS, whose fused optimizers ignore `found_inf`."""

    is_mps = True


def test_on_mps_a_bad_step_is_not_left_to_the_optimizer(make, monkeypatch):
    gpt = random_gpt(n_layer=1)
    optimizer = make(gpt)
    for seed, bad in enumerate([False, True, False]):
        before, taken = state_of(gpt, optimizer), optimizer.step
        steps = []
        monkeypatch.setattr(optimizer, "step", lambda: steps.append(taken()))  # noqa: B023
        for parameter in gpt.parameters():
            parameter.grad = torch.full_like(parameter, seed + 1.0)
        step_unless(torch.tensor(bad).as_subclass(OnMPS), optimizer)
        assert len(steps) == (not bad) and not hasattr(optimizer, "found_inf")
        assert same(before, state_of(gpt, optimizer)) == bad
        monkeypatch.undo()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("grad_clip", [0.05, 1e3, 0.0])
def test_gradients_are_clipped_as_torch_clips_them(make, grad_clip, scaled):
    gpt, other = random_gpt(n_layer=1, std=0.1), random_gpt(n_layer=1, std=0.1)
    optimizer, plain = make(gpt), make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    for seed in range(3):  # the first one makes the state
        norm = step(gpt, optimizer, seed, scaler=scaler, grad_clip=grad_clip)
        F.cross_entropy(
            F.linear(other.hidden(random_ids(2, 8, seed=seed)), other.lm_head.weight).flatten(0, 1),
            random_ids(2, 8, seed=seed + 100).flatten(),
        ).backward()
        expected = torch.nn.utils.clip_grad_norm_(parameters_of(plain), grad_clip or math.inf)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-4) and 0.05 < norm < 1e3
        plain.step()
        other.zero_grad()
    atol = 1e-3 if isinstance(plain, torch.optim.Muon) else 1e-5  # it computes in bfloat16
    for ours, theirs in zip(state_of(gpt, optimizer), state_of(other, plain), strict=True):
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=atol)


def flat(values):
    """All tensors in lists and dicts of them."""
    if isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from flat(value)
    elif isinstance(values, torch.Tensor):
        yield values.detach()


def test_a_resumed_optimizer_goes_on_bit_for_bit(make):
    gpt = random_gpt(n_layer=1)
    optimizer = make(gpt)
    step(gpt, optimizer, 0)
    step(gpt, optimizer, 1)
    resumed = copy.deepcopy(gpt)
    again = make(resumed)
    load_optimizer(again, {"optimizer": copy.deepcopy(optimizer.state_dict())})
    assert same(state_of(gpt, optimizer), state_of(resumed, again))
    assert [group["lr"] for group in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
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
    optimizer = make_optimizer(gpt, settings(beta2=0.9), ONE.spread)
    step(gpt, optimizer, 0)
    again = make_optimizer(gpt, settings(beta2=0.8), ONE.spread)
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
