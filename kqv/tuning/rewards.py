"""
Rewards: the user's own function, and what a group of completions of one prompt learns from it.

Shapes: G groups, n completions in each.
"""

import math
import runpy
from pathlib import Path

import numpy as np

from kqv.config_files import line_of
from kqv.errors import UserError, first_line
from kqv.printable import one_line


def load_reward(path):
    """
    The function `reward` of a Python file, which is run: def reward(prompt, completion, answer) -> float.
    Raises UserError.
    """
    if not Path(path).is_file():
        raise UserError(
            f"--reward={path} is no file: name a Python file with def reward(prompt, completion, answer)"
        )
    try:
        found = runpy.run_path(path).get("reward")
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}{line_of(error, path)}: {described(error)}") from None
    if not callable(found):
        raise UserError(f"{path} has no function: def reward(prompt, completion, answer)")
    return found


def score(reward, rollouts, path):
    """
    The reward of each Rollout, (N,) float64. Raises UserError, which names prompt and completion, where the
    function fails or gives no finite number.
    """
    found = np.zeros(len(rollouts))
    for place, rollout in enumerate(rollouts):
        prompt, completion = rollout.prompt.text, rollout.text
        about = f"for the prompt {one_line(prompt)!r} and the completion {one_line(completion)!r}"
        try:
            value = reward(prompt, completion, rollout.prompt.answer)
        except (Exception, SystemExit) as error:
            raise UserError(f"{path}{line_of(error, path)}: {described(error)}, {about}") from None
        try:
            found[place] = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{path}: the reward is {value!r:.60}, not a number, {about}") from None
        if not math.isfinite(found[place]):
            raise UserError(f"{path}: the reward is {found[place]}, not a finite number, {about}")
    return found


def described(error):
    return f"{type(error).__name__}: {first_line(error)}"


def differ(rewards):
    """rewards (G, n) -> (G, 1): whether a group has completions of different rewards, to learn from."""
    return rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)


def highest(rewards):
    """rewards (G, n) -> (G, n): which completions have the highest reward of a group that differs."""
    return differ(rewards) & (rewards == rewards.max(axis=1, keepdims=True))


def advantages(rewards):
    """
    rewards (G, n) -> (G, n): how much better than its group's mean each is (Shao et al. 2024, without the
    division by the standard deviation, as Liu et al. 2025). Exactly 0 in a group of equal rewards.
    """
    return np.where(differ(rewards), rewards - rewards.mean(axis=1, keepdims=True), 0.0)
