"""
Generation in plain loops that keep nothing, in NumPy and float64, to compare the engine, the sampler and beam
search with.
"""

from dataclasses import replace

import numpy as np
import torch
from conftest import logits_of, random_gpt, random_ids

from kqv.generation.sampling import PLAIN

MODES = {
    "greedy": replace(PLAIN, temperature=0),
    "plain": PLAIN,
    "temperature": replace(PLAIN, temperature=1.7),
    "top_k": replace(PLAIN, top_k=5),
    "top_p": replace(PLAIN, top_p=0.7),
    "min_p": replace(PLAIN, min_p=0.2),
    "repetition_penalty": replace(PLAIN, repetition_penalty=1.8),
    "repetitions wanted": replace(PLAIN, repetition_penalty=0.6),
    "greedy, repetition_penalty": replace(PLAIN, temperature=0, repetition_penalty=1.8),
    "all": replace(PLAIN, temperature=1.5, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
}


def exact_gpt(**shape):
    """In float64, where a batch's other sums can't move a draw across the boundary between two ids."""
    return random_gpt(**shape).double()


def texts_of(*lengths, below=19, seed=0):
    """Texts of these lengths, lists of random ids."""
    return [random_ids(length, below=below, seed=seed + row).tolist() for row, length in enumerate(lengths)]


def positions_read(gpt):
    """A list that grows with each forward of the model: (rows, positions)."""
    shapes = []
    gpt.transformer.wte.register_forward_hook(lambda module, ids, output: shapes.append(tuple(ids[0].shape)))
    return shapes


def window(text, prompt_length, block_size):
    """What of a text is read for its next token: when the window is full, its oldest quarter is forgotten."""
    first = 0
    for length in range(prompt_length, len(text) + 1):
        if length - first > block_size:
            first = length - max(1, block_size - max(1, block_size // 4))
    return text[first:]


def next_logits(gpt, text, prompt_length, vocab_size=None):
    """What the model says about the token after a text: logits (V,) in float64."""
    seen = window(text, prompt_length, gpt.config.block_size)
    return logits_of(gpt, torch.tensor([seen]))[0, -1, :vocab_size].double().numpy()


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def probabilities(logits, sampling, slack=0.0):
    """
    Probabilities (V,) in float64, zero for what is left out. A token within `slack` of a boundary stays, and
    so does one as likely as the last that stays.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if sampling.temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(float)
    with np.errstate(over="ignore"):
        p = np.exp((logits - logits.max()) / sampling.temperature)
    likeliest = np.sort(p)[::-1][: sampling.top_k or None]
    p = np.where(p >= likeliest[-1], p, 0) / likeliest.sum()
    likeliest = likeliest / likeliest.sum()
    before = np.array([likeliest[likeliest > one].sum() for one in p])
    kept = (before < sampling.top_p + slack) & (p >= sampling.min_p * p.max() * (1 - slack)) | (p == p.max())
    return np.where(kept, p, 0) / p[kept].sum()
