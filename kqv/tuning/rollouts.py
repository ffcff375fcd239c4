"""
Completions that the model itself draws, and the rows that it learns from them.

Shapes: B rows, T tokens.
"""

from typing import NamedTuple

import numpy as np
import torch

from kqv.generation.sampling import Sampling
from kqv.generation.stream import stream
from kqv.text.text_stream import TextStream
from kqv.tuning.prompts import Prompt


class Rollout(NamedTuple):
    """A prompt with one completion, as the model drew it."""

    prompt: Prompt
    ids: list  # of the completion, with the id that ends it
    text: str  # of the completion
    logprobs: list  # log-probability of each id when it was drawn, in nats, without the temperature


def sample(engine, tokenizer, prompts, copies, config, draw):
    """
    `copies` completions of each prompt, one prompt after the other: a list of Rollouts. At most
    config.batch_size are drawn at once. Each depends on (config.seed, draw, its place in the list): `draw` is
    the step, or another number that no step has.
    """
    rows, found = [prompt for prompt in prompts for _ in range(copies)], []
    for first in range(0, len(rows), config.batch_size):
        part = rows[first : first + config.batch_size]
        found += draw_rows(engine, tokenizer, part, config, [(draw, first + row) for row in range(len(part))])
    return found


def draw_rows(engine, tokenizer, prompts, config, rows):
    """A Rollout of each prompt, all drawn together; `rows` says by which numbers."""
    room = engine.gpt.config.block_size + 1 - max(len(prompt.ids) for prompt in prompts)
    texts = [TextStream(tokenizer) for _ in prompts]
    found = [Rollout(prompt, [], "", []) for prompt in prompts]
    drawn_text = [""] * len(prompts)
    steps = stream(
        engine,
        [prompt.ids for prompt in prompts],
        min(config.max_new_tokens, room),
        sampling=Sampling(temperature=config.temperature, top_k=0, logprobs=True),
        seed=config.seed,
        rows=rows,
        vocab_size=tokenizer.vocab_size,
    )
    for drawn in steps:
        for row, text in enumerate(texts):
            if not text.ended:
                found[row].ids.append(drawn.ids[row])
                found[row].logprobs.append(drawn.logprobs[row])
                drawn_text[row] += text.feed(drawn.ids[row])
        if all(text.ended for text in texts):
            break
    return [
        rollout._replace(text=text + rest.finish())
        for rollout, text, rest in zip(found, drawn_text, texts, strict=True)
    ]


def rows_of(rollouts, places, device):
    """
    (idx, targets), both (B, T), of B places in a list of rollouts: what the model reads, and the ids of the
    completions; -1 elsewhere.
    """
    rollouts = [rollouts[place] for place in places]
    T = max(len(rollout.prompt.ids) + len(rollout.ids) for rollout in rollouts) - 1
    idx, targets = torch.zeros(len(rollouts), T, dtype=torch.long), torch.full((len(rollouts), T), -1)
    for row, (prompt, ids, *_) in enumerate(rollouts):
        whole = [*prompt.ids, *ids]
        idx[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        targets[row, len(prompt.ids) - 1 : len(whole) - 1] = torch.tensor(ids)
    return idx.to(device), targets.to(device)


def micro_batches(rollouts, places, batch_size):
    """
    The `places` in a list of rollouts as arrays of at most batch_size; rollouts of similar length are
    together, with little padding.
    """
    lengths = np.array([len(rollout.prompt.ids) + len(rollout.ids) for rollout in rollouts])
    ordered = np.asarray(places)[np.argsort(lengths[places], kind="stable")]
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
