"""
Small models that are trained with a change of their attention, beside those that were changed afterwards.

Shapes: B texts, T tokens, V vocabulary.
"""

import torch
from torch.nn import functional as F

from kqv.looking.attention import readable
from kqv.looking.what_if import WHAT_IFS
from model import GPT, GPTConfig

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "bias": False}  # GPT-2's kind, 0.1M
STEPS, BATCH_SIZE, LEARNING_RATE = 1000, 32, 3e-3
VAL_BATCHES = 20


def train_with(what_if, data, seed=0, steps=STEPS):
    """A GPT of the shape SMALL, trained for `steps` on the Dataset `data` with the WhatIf `what_if`."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size=data.tokenizer.vocab_size, **SMALL))
    twin = readable(gpt)  # on the same weights
    twin.shared.what_if = what_if
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch, _ = data.training_batch(BATCH_SIZE, SMALL["block_size"], seed, step, 0, "random", 1, None)
        idx, targets = torch.from_numpy(batch.idx), torch.from_numpy(batch.targets)  # 2 x (B, T)
        F.cross_entropy(twin(idx).flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return gpt


@torch.no_grad()
def losses(gpt, data, what_if):
    """
    {"loss": the mean loss of validation texts in nats, "last_loss": that of their last tokens alone}, of a
    GPT with the change `what_if`.
    """
    twin, T = readable(gpt), SMALL["block_size"]
    twin.shared.what_if = what_if
    found = []
    for index in range(VAL_BATCHES):
        batch = data.evaluation_batch("val", BATCH_SIZE, T, index, VAL_BATCHES)
        logits = twin(torch.from_numpy(batch.idx))  # (B, T, V)
        targets = torch.from_numpy(batch.targets)
        found.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))  # (B, T)
    found = torch.cat(found)
    return {"loss": found.mean().item(), "last_loss": found[:, -1].mean().item()}


def compared(data, seeds, steps=STEPS, names=tuple(WHAT_IFS), tell=print):
    """
    {name: {"operated": losses of models trained plainly and changed afterwards, "trained": losses of models
    trained with the change}}, means over the seeds.
    """
    plain = {seed: train_with(WHAT_IFS["as_trained"], data, seed, steps) for seed in seeds}
    table = {}
    for name in names:
        changed = WHAT_IFS[name]
        trained = plain
        if name != "as_trained":
            trained = {seed: train_with(changed, data, seed, steps) for seed in seeds}
        both = {"operated": plain, "trained": trained}
        table[name] = {
            kind: mean_of([losses(gpt, data, changed) for gpt in models.values()])
            for kind, models in both.items()
        }
        tell(f"{name}: {table[name]}")
    return table


def mean_of(results):
    return {name: sum(result[name] for result in results) / len(results) for name in results[0]}
