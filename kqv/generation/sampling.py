"""
From logits to the next token.

Shapes: B rows of text, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

TOP = 5  # how many alternatives are reported with log-probabilities


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's probabilities; the defaults leave them as they are."""

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # among the k likeliest; 0: all
    top_p: float = 1.0  # among the likeliest that together have probability top_p (Holtzman et al. 2019)
    min_p: float = 0.0  # among those with min_p times the likeliest one's probability (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides the odds of tokens that are in the text (Keskar et al. 2019)
    logprobs: bool = False  # report log-probabilities


def draw(logits, uniform, sampling):
    """
    One id for each row: logits (B, V) and numbers from [0, 1) (B, 1) -> (B, 1).

    Top-k, top-p and min-p each keep the first few tokens of a ranking by probability. The draw walks through
    those in the order of their ids (where rounding can't swap two that are equally likely) until their
    probabilities add up to the row's number: the inverse of the cumulative distribution. That number is all
    the chance there is, so a row's text does not depend on the rows beside it.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # the largest is 0: no temperature makes it overflow
    logits = logits / max(sampling.temperature, 1e-30)  # below that, 1/temperature is no float32
    ids = None  # all of them, in order
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        k = min(sampling.top_k or logits.size(-1), logits.size(-1))
        logits, ids = logits.topk(k)  # (B, V) -> (B, k), the likeliest first
        p = F.softmax(logits, dim=-1)
        before = p.cumsum(dim=-1) - p  # what the likelier ones have together; 0 for the first, which stays
        p = p * ((before < max(sampling.top_p, 1e-30)) & (p >= min(sampling.min_p, 1) * p[:, :1]))
        ids, order = ids.sort(dim=-1)
        p = p.gather(1, order)
    else:
        p = F.softmax(logits, dim=-1)  # (B, V)
    cdf = p.cumsum(dim=-1)
    reached = (cdf > uniform * cdf[:, -1:]) & (p > 0)  # True from the drawn one on
    choice = reached.int().argmax(dim=-1, keepdim=True)  # the first True
    return choice if ids is None else ids.gather(1, choice)


class Sampler(nn.Module):
    """From logits to the next tokens, with what a row's past has to do with it."""

    def __init__(self, sampling, texts, vocab_size, device):
        super().__init__()
        self.sampling, self.vocab_size = sampling, vocab_size
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
            for row, text in zip(seen, texts, strict=True):
                row[text] = True
        self.register_buffer("seen", seen)  # (B, V): the ids in each row's text

    def forward(self, logits, uniform):
        """logits (B, V), uniform (B, 1) -> ids (B, 1); with logprobs (B, 1), top ids (B, 5) and theirs."""
        logits = scores = logits[:, : self.vocab_size]
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self.seen, penalised, scores)
        ids = draw(scores, uniform, self.sampling)
        if self.seen is not None:
            self.seen.scatter_(1, ids, True)
        if not self.sampling.logprobs:
            return (ids,)
        logprobs = logits.log_softmax(dim=-1)  # the model's own, whatever the settings made of them
        top, top_ids = logprobs.topk(min(TOP, logprobs.size(-1)))
        return ids, logprobs.gather(1, ids), top_ids, top


def uniforms(seed, rows, device):
    """Numbers from [0, 1) for ever, as tensors (B, 1): row r's are a function of (seed, rows[r]) alone."""
    generators = [np.random.default_rng((seed, row)) for row in rows]
    while True:
        numbers = np.stack([generator.random(256) for generator in generators], axis=1)  # (256, B)
        # The factor keeps the largest number below 1 after rounding to float32.
        yield from torch.from_numpy(numbers * (1 - 1e-6)).float()[:, :, None].to(device, non_blocking=True)
