"""Prompts of prepared sets, and completions that depend on nothing but the seed, the step and their place."""

from types import SimpleNamespace

import pytest
from conftest import random_gpt, write_sums

from kqv.errors import UserError
from kqv.generation.engine import Engine
from kqv.text.dataset import Dataset
from kqv.tuning.prompts import Prompts
from kqv.tuning.rollouts import sample


@pytest.fixture
def sums(tmp_path, prepared):
    """A set of conversations: a sum -> its result."""
    prepared(write_sums(tmp_path / "sums.jsonl"), "--name=sums")
    return Dataset("sums")


def test_a_conversation_is_a_prompt_with_its_answer(sums):
    prompts = Prompts(sums, "train", 16, prompt_tokens=4, answer_tokens=4)
    assert len(prompts) == 88
    for prompt in (prompts[0], prompts[87]):
        a, b = prompt.text.rstrip("=").split("+")
        assert int(prompt.answer) == int(a) + int(b)
        assert sums.tokenizer.decode(prompt.ids).endswith(prompt.text)


def test_each_prompt_comes_once_before_any_comes_again(sums):
    prompts = Prompts(sums, "train", 16, 4, 4)
    texts = [prompt.text for step in range(11) for prompt in prompts.of_step(8, seed=3, step=step)]
    assert len(set(texts)) == 88
    again = [prompt.text for step in range(11, 22) for prompt in prompts.of_step(8, seed=3, step=step)]
    assert set(again) == set(texts) and again != texts
    assert [prompt.text for prompt in prompts.of_step(8, seed=3, step=4)] == texts[32:40]
    assert [prompt.text for prompt in prompts.of_step(8, seed=4, step=4)] != texts[32:40]


def test_held_out_prompts_are_spread_over_the_split_and_each_is_there_once(sums):
    prompts = Prompts(sums, "val", 16, 4, 4)
    assert len({prompt.text for prompt in prompts.spread(5)}) == 5
    assert len(prompts.spread(1000)) == len(prompts) == 12


def test_a_text_is_cut_into_a_prompt_and_how_it_goes_on(tiny_set, tmp_path):
    text = (tmp_path / "text.txt").read_text("utf-8")
    prompts = Prompts(Dataset(tiny_set), "train", 16, prompt_tokens=5, answer_tokens=7)
    assert (prompts[10].text, prompts[10].answer) == (text[10:15], text[15:22])
    assert len(prompts[10].ids) == 5


def test_what_does_not_fit_is_refused(sums, tiny_set):
    with pytest.raises(UserError, match="block_size=3"):
        Prompts(sums, "train", 3, 4, 4)
    with pytest.raises(UserError, match="prompt_tokens=16"):
        Prompts(Dataset(tiny_set), "train", 16, 16, 4)


def drawn(sums, batch_size, draw=7, seed=1):
    gpt = random_gpt(block_size=16, vocab_size=sums.tokenizer.vocab_size)
    config = SimpleNamespace(batch_size=batch_size, max_new_tokens=6, temperature=1.0, seed=seed)
    prompts = Prompts(sums, "train", 16, 4, 4).of_step(4, seed=0, step=0)
    return sample(Engine(gpt), sums.tokenizer, prompts, 3, config, draw)


def test_a_completion_does_not_depend_on_what_is_drawn_beside_it(sums):
    whole = drawn(sums, 12)
    assert [rollout.ids for rollout in drawn(sums, 5)] == [rollout.ids for rollout in whole]
    assert len({tuple(rollout.ids) for rollout in whole}) > 6
    for other in (drawn(sums, 12, draw=8), drawn(sums, 12, seed=2)):
        assert [rollout.ids for rollout in other] != [rollout.ids for rollout in whole]


def test_a_completion_ends_with_the_id_that_ends_it_and_fits_into_the_context(sums):
    ends, longest = sums.tokenizer.ends, 0
    for seed in range(5):
        for rollout in drawn(sums, 12, seed=seed):
            assert 1 <= len(rollout.ids) == len(rollout.logprobs) <= 6 and max(rollout.logprobs) <= 0
            assert not set(rollout.ids[:-1]) & set(ends)
            assert len(rollout.prompt.ids) + len(rollout.ids) - 1 <= 16
            text = [i for i in rollout.ids if i not in ends]
            assert rollout.text == sums.tokenizer.decode(text)
            longest = max(longest, len(rollout.ids))
    assert longest == 6
