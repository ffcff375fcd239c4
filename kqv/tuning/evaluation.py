"""
How good a tuned model is on prompts that it does not learn from, and what that has cost.

Shapes: B rows, T tokens, N tokens of completions, G prompts, n completions of each.
"""

from dataclasses import replace

import numpy as np
import torch

from kqv.generation.engine import evaluating
from kqv.tuning.policy import divergence, logprobs
from kqv.tuning.rewards import score
from kqv.tuning.rollouts import micro_batches, rows_of, sample

DRAW = 2**62  # no step has this number


def evaluate_prompts(run):
    """
    ({name: number}, Rollouts of the first two prompts) of the held-out prompts of a TuningRun:

    val_reward        mean reward
    exact_match       share of prompts whose likeliest completion is the set's answer; of conversations alone
    pass_at_1         share of completions whose reward is at least pass_reward
    pass_at_k         share of prompts with such a completion among num_samples
    kl                KL(model || start) a token of the completions, in nats
    start_nats        nats a token that the start gives to the completions: what it finds unlikely
    distinct_4grams   share of different ones among all sequences of 4 tokens; it falls where texts repeat
    length            tokens of a completion
    """
    config, prompts = run.config, run.held_out
    rollouts = sample(run.engine, run.tokenizer, prompts, config.num_samples, config, DRAW)
    rewards = score(run.reward, rollouts, config.reward).reshape(len(prompts), -1)  # (G, n)
    passed = rewards >= config.pass_reward
    kl, start_nats = cost(run, rollouts)
    numbers = {
        "val_reward": rewards.mean(),
        "pass_at_1": passed.mean(),
        "pass_at_k": passed.any(axis=1).mean(),
        "kl": kl,
        "start_nats": start_nats,
        "distinct_4grams": distinct([rollout.ids for rollout in rollouts]),
        "length": np.mean([len(rollout.ids) for rollout in rollouts]),
    }
    if run.data.is_chat:
        likeliest = sample(run.engine, run.tokenizer, prompts, 1, replace(config, temperature=0.0), DRAW)
        right = [rollout.text.strip() == rollout.prompt.answer.strip() for rollout in likeliest]
        numbers["exact_match"] = np.mean(right)
    return {name: float(number) for name, number in numbers.items()}, rollouts[:: config.num_samples][:2]


@torch.no_grad()
def cost(run, rollouts):
    """(KL(model || start), nats of the completions' tokens under the start), means over all tokens."""
    kl = nats = count = 0
    for part in micro_batches(rollouts, range(len(rollouts)), run.config.batch_size):
        idx, targets = rows_of(rollouts, part, run.device)
        learnt = targets >= 0
        where = idx, learnt, run.tokenizer.vocab_size
        with evaluating(run.state.model), run.autocast:
            logp, start = logprobs(run.state.model, *where), run.start(*where)  # (N, V)
        kl += divergence(logp, start).sum().item()
        nats -= start.gather(1, targets[learnt][:, None]).sum().item()
        count += len(start)
    return kl / count, nats / count


def distinct(completions, n=4):
    """The share of different ones among all sequences of n ids in the completions; 1 where there are none."""
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
