"""A run's evaluation: the losses of both splits, and a sample of what the model writes."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.generation.stream import generate
from kqv.settings import setting
from kqv.text.dataset import SPLITS
from kqv.text.text_stream import TextStream
from kqv.training.batches import to_device
from kqv.training.sharding import full_tensor, is_sharded
from model import GPT


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation"""

    eval_interval: int = setting(2000, "steps between evaluations", at_least=1)
    eval_iters: int = setting(200, "most batches for a split; a small one is read once", at_least=1)
    sample_tokens: int = setting(0, "tokens of a text written at each evaluation; 0: none", at_least=0)


@torch.no_grad()
def evaluate(model, data, config, world, autocast):
    """
    {split: mean loss in nats per token} over the learnt tokens of batches that are the same at every
    evaluation; NaN where a split has no such token. The processes share the batches; each gets the mean over
    all. `model` gives the loss, as in training; its dropout is off meanwhile.
    """
    model.eval()
    losses = {}
    for split in SPLITS:
        count = min(config.eval_iters, data.batches(split, config.batch_size, config.block_size))
        total, weights = torch.zeros((), device=world.device), 0.0
        rounds = -(-count // world.size)  # the same in each process: sharded, they compute together
        for index in range(world.rank, rounds * world.size, world.size):
            batch = data.evaluation_batch(split, config.batch_size, config.block_size, index % count, count)
            with autocast:
                loss = model(*to_device(batch, world.device))
            weight = float((batch.targets >= 0).mean())  # 1 for texts, of which every token is learnt
            if index < count and weight:
                total += loss * weight
                weights += weight
        weights = world.sum(torch.tensor(weights, device=world.device)).item()
        losses[split] = world.sum(total).item() / weights if weights else math.nan
    model.train()
    return losses


def write_sample(gpt, data, config, world):
    """
    A text that the model writes after the beginning of the validation split, or its answer to the split's
    first question. The main process returns it, the others "". A sharded model is gathered whole for it.
    """
    if is_sharded(gpt):
        weights = {name: full_tensor(weight) for name, weight in gpt.state_dict().items()}
        gpt = GPT.from_weights(gpt.config, weights, copy=False)
    if not world.is_main:
        return ""
    if data.is_chat:
        ids, learnt = next(data.marked_conversations("val"))
        prompt = ids[: int(np.argmax(learnt)) if learnt.any() else len(ids)]
    else:
        prompt = data.splits["val"][:16]
    prompt = prompt[-config.block_size :].tolist()
    gpt.eval()
    (ids,) = generate(
        Engine(gpt),
        [prompt],
        config.sample_tokens,
        sampling=Sampling(temperature=0.8, top_k=200),
        seed=config.seed,
        vocab_size=data.tokenizer.vocab_size,
    )
    gpt.train()
    text = TextStream(data.tokenizer)
    return data.tokenizer.decode(prompt) + "".join(map(text.feed, ids[len(prompt) :])) + text.finish()
