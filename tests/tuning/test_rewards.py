"""The user's reward function, and what a group of completions learns from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kqv.errors import UserError
from kqv.tuning.prompts import Prompt
from kqv.tuning.rewards import advantages, highest, load_reward, score
from kqv.tuning.rollouts import Rollout

GROUPS = st.integers(1, 5).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, -7.5]), min_size=n, max_size=n), min_size=1, max_size=4
    )
)


def rollout(text="4", prompt="2+2=", answer="4"):
    return Rollout(Prompt(prompt, [1], answer), [2], text, [-0.5])


def function(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source, "utf-8")
    return str(path)


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-1.0, -3.0, -1.0, -3.0]])
    expected = [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [1, -1, 1, -1]]
    assert advantages(rewards).tolist() == expected


@given(GROUPS)
def test_advantages_sum_to_0_and_equal_rewards_give_exactly_0(groups):
    rewards = np.array(groups)
    found = advantages(rewards)
    assert np.allclose(found.sum(axis=1), 0)
    for row, of_row in zip(rewards, found, strict=True):
        assert (of_row == 0).all() or len(set(row)) > 1


@given(GROUPS)
def test_the_highest_of_a_group_that_differs_are_kept(groups):
    for row, kept in zip(groups, highest(np.array(groups)).tolist(), strict=True):
        assert kept == [len(set(row)) > 1 and value == max(row) for value in row]


def test_the_users_function_gets_prompt_completion_and_answer(tmp_path):
    path = function(tmp_path, "def reward(prompt, completion, answer):\n    return completion == answer\n")
    reward = load_reward(path)
    assert score(reward, [rollout("4"), rollout("5")], path).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'much'", "[1]"])
def test_what_is_no_finite_number_is_refused(tmp_path, value):
    path = function(tmp_path, f"def reward(prompt, completion, answer):\n    return {value}\n")
    with pytest.raises(UserError, match="number") as error:
        score(load_reward(path), [rollout("five")], path)
    assert "'2+2='" in str(error.value) and "'five'" in str(error.value)


def test_an_exception_names_the_line_the_prompt_and_the_completion(tmp_path):
    path = function(tmp_path, "def reward(prompt, completion, answer):\n    return int(completion)\n")
    with pytest.raises(UserError) as error:
        score(load_reward(path), [rollout("fi\nve")], path)
    for part in (path, "line 2", "ValueError", "'2+2='", "fi", "ve"):
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n", "has no function"),
        ("reward = 1\n", "has no function"),
        ("def reward(:\n", "SyntaxError"),
        ("import no_such_module\n", "no_such_module"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_a_file_without_the_function_is_refused(tmp_path, source, says):
    with pytest.raises(UserError, match=says) as error:
        load_reward(function(tmp_path, source))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="is no file"):
        load_reward(str(tmp_path / name))
