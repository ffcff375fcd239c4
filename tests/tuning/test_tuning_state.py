"""When a tuning run has nothing to gain by more steps."""

import pytest
import torch

from kqv.tuning.state import PATIENCE, TuningState


def state(rewards, dead=False):
    made = TuningState(None, None, None, torch.zeros(()))
    for reward in rewards:
        made.note_rewards([reward], dead)
    return made


def test_a_run_goes_on_while_rewards_are_good():
    assert state([0.1] * 5 + [0.9] * 30).why_ended == ""
    assert state([-5.0] * 5 + [-0.5] * 30).why_ended == ""
    assert state([0.9] + [0.5] * 30).why_ended == ""  # half of it, and more
    assert state([0.5] * (PATIENCE - 1), dead=True).why_ended == ""


@pytest.mark.parametrize(
    "rewards",
    [
        [0.2] * 5 + [0.9] * 20 + [0.4] * PATIENCE,
        [-5.0] * 20 + [-0.5] * 20 + [-5.5] * PATIENCE,
        [0.5] + [0.0] * PATIENCE,
    ],
)
def test_a_run_ends_where_the_reward_has_fallen(rewards):
    assert "below" in state(rewards).why_ended and "best.pt" in state(rewards).why_ended
    assert state(rewards[:-1]).why_ended == ""


def test_a_run_ends_where_no_group_differs():
    assert "nothing to learn" in state([1.0] * PATIENCE, dead=True).why_ended
