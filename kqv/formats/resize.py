"""A GPT with a shorter context, or with more or fewer ids than it was made for."""

from dataclasses import asdict, replace

import torch
from torch import nn

from model import GPT


def crop_block_size(gpt, block_size):
    """Shorten the longest context, for fine-tuning at less. Raises ValueError where it would grow."""
    if not 1 <= block_size <= gpt.config.block_size:
        raise ValueError(
            f"block_size={block_size} is not within 1 to {gpt.config.block_size}, what the model has"
        )
    gpt.config = replace(gpt.config, block_size=block_size)
    if gpt.config.positions == "learned":
        kept = gpt.transformer.wpe.weight[:block_size].detach().clone()  # a view is saved with its base
        gpt.transformer.wpe.weight = nn.Parameter(kept)
        gpt.transformer.wpe.num_embeddings = block_size


def grow_vocab_size(gpt, vocab_size):
    """Add ids after the known ones, which stay as they are; the rows of new ids begin at random."""
    if vocab_size == gpt.config.vocab_size:
        return
    new = torch.empty(vocab_size - gpt.config.vocab_size, gpt.config.n_embd)
    gpt.config = replace(gpt.config, vocab_size=vocab_size)
    for part in (gpt.lm_head,) if gpt.config.tied_head else (gpt.lm_head, gpt.transformer.wte):
        nn.init.normal_(new, mean=0.0, std=0.02)
        part.weight = nn.Parameter(torch.cat([part.weight.detach(), new]))  # (V, C)
    gpt.tie_head()
    gpt.lm_head.out_features = gpt.transformer.wte.num_embeddings = vocab_size


def to_shape(gpt, shape, new_ids):
    """
    Let `gpt`, a base, have the shorter context and the more ids of `shape`, the GPTConfig of its adapter. The
    base need not know the last `new_ids` ids. Raises ValueError where the two differ in more.
    """
    if not 0 <= shape.vocab_size - new_ids <= gpt.config.vocab_size <= shape.vocab_size:
        raise ValueError(
            f"it has {shape.vocab_size} ids, {new_ids} of them new, and the base {gpt.config.vocab_size}"
        )
    crop_block_size(gpt, shape.block_size)
    grow_vocab_size(gpt, shape.vocab_size)
    mine, other = (asdict(config) for config in (gpt.config, shape))
    if differing := [name for name in mine if name != "dropout" and mine[name] != other[name]]:
        name = differing[0]
        raise ValueError(f"its {name} is {other[name]}, and that of the base {mine[name]}")


def without_padding(gpt, vocab_size):
    """
    The GPT of `vocab_size` ids: without the last rows of its embedding, which pad the vocabulary.
    """
    weights = gpt.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size]  # (V, C)
    return GPT.from_weights(replace(gpt.config, vocab_size=vocab_size), weights, copy=False)


@torch.no_grad()
def with_end(gpt):
    """
    The GPT with one more id, the last, whose probability is almost 0: for programs that need an id that ends
    a text or pads the texts of a batch, where the tokenizer has none.

    The id's row of the head is the least-squares solution for a logit of -100 after random ids. So the
    probabilities of the other ids stay the same.
    """
    T, C = gpt.config.block_size, gpt.config.n_embd
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(gpt.config.vocab_size, (1 + 8 * C // T, T), generator=random)
    x = gpt.eval().hidden(idx).flatten(0, 1).double()  # (B, T, C) -> (B T, C)
    x = x[x.isfinite().all(-1)]
    squares = x.T @ x + 1e-3 * (1 + len(x)) * torch.eye(C)  # (C, C)
    row = torch.linalg.solve(squares, -100 * x.sum(0)).float()  # (C,)
    weights = gpt.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], row[None]])  # (V + 1, C)
    return GPT.from_weights(replace(gpt.config, vocab_size=gpt.config.vocab_size + 1), weights)
