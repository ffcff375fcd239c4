"""The loss of the policy gradient: its value, its gradient, and the divergence from the start."""

import copy

import pytest
import torch
from conftest import FAMILIES, SHAPES, random_gpt, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from kqv.tuning.policy import PolicyGradient, divergence
from kqv.tuning.prompts import Prompt
from kqv.tuning.rollouts import Rollout, micro_batches, rows_of
from kqv.tuning.start import Start

IDS = 17  # of the tokenizer; the model has more rows


def rows(seed=0):
    """(idx, targets, advantages): three rows, of which some places are learnt."""
    idx, targets = random_ids(3, 8, below=IDS, seed=seed), random_ids(3, 8, below=IDS, seed=seed + 1)
    targets[0, :4] = targets[1, 6:] = targets[2, ::2] = -1
    return idx, targets, torch.tensor([0.75, -0.25, -0.5], dtype=torch.float64)


def naive_loss(gpt, start, idx, targets, advantages, temperature, kl_weight, scale):
    """The same, a token at a time."""
    total = 0
    for row in range(len(idx)):
        logits, first = gpt(idx[row : row + 1])[0], start(idx[row : row + 1])[0]
        for place in range(idx.size(1)):
            if targets[row, place] < 0:
                continue
            p = (logits[place, :IDS] / temperature).softmax(0)
            q = (first[place, :IDS] / temperature).softmax(0).detach()
            total = total - advantages[row] * p[targets[row, place]].log()
            total = total + kl_weight * sum(p[i] * (p[i].log() - q[i].log()) for i in range(IDS))
    return total * scale


@given(FAMILIES, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.3]), st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_value_and_gradient_are_those_of_a_naive_loop(family, temperature, kl_weight, seed):
    gpt, start = (random_gpt(seed=seed + i, **SHAPES[family]).double() for i in (0, 1))
    idx, targets, gains = rows(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda x: x)  # else something is rounded to float32
        model = PolicyGradient(gpt, Start(start, {}), IDS, temperature, kl_weight)
        ours = model(idx, targets, gains, 0.1)
        naive = naive_loss(gpt, start, idx, targets, gains, temperature, kl_weight, 0.1)
        gradients = [torch.autograd.grad(loss, list(gpt.parameters())) for loss in (ours, naive)]
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_divergence_and_its_gradient_are_0_at_the_start():
    gpt = random_gpt()
    start = Start(copy.deepcopy(gpt), {})
    idx, targets, _ = rows()
    loss = PolicyGradient(gpt, start, IDS, 1.0, kl_weight=1.0)(idx, targets, torch.zeros(3), 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert max(parameter.grad.abs().max() for parameter in gpt.parameters()) < 1e-4


def test_the_start_does_not_change_with_the_model_nor_belongs_to_it():
    gpt = random_gpt()
    start = Start(copy.deepcopy(gpt), {})
    model = PolicyGradient(gpt, start, IDS, kl_weight=0.1)
    assert {name for name, _ in model.named_parameters()} == {f"gpt.{n}" for n, _ in gpt.named_parameters()}
    idx, targets, _ = rows()
    before = start(idx, targets >= 0, IDS)
    with torch.no_grad():
        gpt.transformer.wte.weight.add_(1.0)
    assert torch.equal(start(idx, targets >= 0, IDS), before)


def test_a_divergence_is_at_least_0():
    p, q = (random_gpt(seed=i)(random_ids(2, 5, below=IDS)).log_softmax(-1).flatten(0, 1) for i in (0, 1))
    assert (divergence(p, q) > 0).all() and divergence(p, p).abs().max() < 1e-6


def test_rows_read_prompts_and_learn_completions():
    rollouts = [
        Rollout(Prompt("", [1, 2, 3], ""), [4, 5], "", []),
        Rollout(Prompt("", [6], ""), [7, 8, 9], "", []),
        Rollout(Prompt("", [1], ""), [2], "", []),
    ]
    idx, targets = rows_of(rollouts, [1, 0], torch.device("cpu"))
    assert idx.tolist() == [[6, 7, 8, 0], [1, 2, 3, 4]]
    assert targets.tolist() == [[7, 8, 9, -1], [-1, -1, 4, 5]]
    assert [part.tolist() for part in micro_batches(rollouts, [0, 1, 2], 2)] == [[2, 1], [0]]
