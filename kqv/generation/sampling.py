"""
From logits to the next token.

Shapes: B rows of text, V vocabulary, k the tokens that top_k keeps.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kqv.errors import UserError
from kqv.kernels.sizes import power_of_two
from kqv.settings import check_bounds, setting

N_ALTERNATIVES = 5  # how many of the likeliest tokens are reported with log-probabilities


@dataclass(frozen=True)
class Sampling:
    """
    How tokens are drawn

    Raises UsageError for a value outside of its bounds, from Python too.
    """

    temperature: float = setting(
        0.8, "below 1: likelier tokens more often; 0: always the likeliest", at_least=0.0
    )
    top_k: int = setting(200, "draw among the k likeliest tokens; 0: among all", at_least=0)
    top_p: float = setting(
        1.0, "draw among the likeliest that have this probability together", at_least=0.0, at_most=1.0
    )
    min_p: float = setting(
        0.0, "draw among those with this share of the likeliest's probability", at_least=0.0, at_most=1.0
    )
    repetition_penalty: float = setting(
        1.0, "above 1: tokens of the text become less likely", at_least=1e-9, at_most=1e9
    )
    logprobs: bool = setting(False, "print a JSON object a line for each token, with its log-probability")

    def __post_init__(self):
        for field in fields(Sampling):
            check_bounds(field, getattr(self, field.name))


PLAIN = Sampling(temperature=1.0, top_k=0)  # draws with the model's own probabilities


class Work(NamedTuple):
    """
    Which operations a Sampling asks for, with V ids. Its other numbers are in tensors, so that a step which
    is compiled or recorded for one Sampling serves every other one that asks for the same work.
    """

    greedy: bool
    kept: int  # how many of the likeliest ids are looked for; 0: all are drawn from, in their order
    rounded: bool  # whether `kept` is top_k rounded up to a power of two, and the rest is left out later
    penalty: bool
    logprobs: bool

    @classmethod
    def of(cls, sampling, V, rounded=False):
        greedy, kept = sampling.temperature == 0, 0
        if not greedy and (sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0):
            kept = min(sampling.top_k or V, V)
            kept = min(power_of_two(kept), V) if rounded else kept
        return cls(greedy, kept, rounded, sampling.repetition_penalty != 1, sampling.logprobs)


class Sampler(nn.Module):
    """
    Draws the next token of each of B rows, as `begin` says. It keeps the set of ids in each row's text for
    the repetition penalty, which divides positive logits of those ids and multiplies negative ones (Keskar et
    al. 2019). Ids from vocab_size on are never drawn.
    """

    def __init__(self, work, batch_size, vocab_size, device):
        super().__init__()
        self.work, self.vocab_size = work, vocab_size
        for name in ("temperature", "top_k", "top_p", "min_p", "penalty"):
            self.register_buffer(name, torch.ones((), device=device))
        if work.penalty:
            seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device)
            self.register_buffer("seen", seen)  # (B, V): the ids in each row's text
            self.register_buffer("penalised", torch.ones_like(seen[0]))  # (V,): ids that the penalty is for

    def begin(self, sampling, texts, exempt=()):
        """Draw by `sampling`, of the sampler's Work, after B texts. The ids `exempt` are not penalised."""
        self.temperature.fill_(min(max(sampling.temperature, 1e-30), 1e30))  # beyond, no float32, or 1/it
        self.top_k.fill_(min(sampling.top_k or self.vocab_size, self.vocab_size))
        self.top_p.fill_(max(sampling.top_p, 1e-30))
        self.min_p.fill_(sampling.min_p)
        self.penalty.fill_(sampling.repetition_penalty)
        if self.work.penalty:
            self.seen.fill_(False)
            for row, text in zip(self.seen, texts, strict=True):
                row[[token for token in text if token < self.vocab_size]] = True
            self.penalised.fill_(True)
            self.penalised[[token for token in exempt if token < self.vocab_size]] = False

    def forward(self, logits, uniform):
        """
        logits (B, V), uniform (B, 1) -> ids (B, 1); the id is -1 where the logits of a row are not finite,
        so that the host learns it from the ids, without another copy from the device. With
        sampling.logprobs also their log-probabilities (B, 1), the ids of the 5 likeliest tokens (B, 5) and
        the log-probabilities of those (B, 5).
        """
        logits = scores = logits[:, : self.vocab_size]
        if self.work.penalty:
            lowered = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
            scores = torch.where(self.seen & self.penalised, lowered, scores)
        ids = self.draw(scores, uniform)
        if self.work.penalty:
            self.seen.scatter_(1, ids, True)
        said = torch.where(are_finite(logits), ids, -1)
        if not self.work.logprobs:
            return (said,)
        logprobs = logits.log_softmax(dim=-1)  # of the model itself, before penalty and temperature
        top_logprobs, top_ids = logprobs.topk(min(N_ALTERNATIVES, logprobs.size(-1)))
        return said, logprobs.gather(1, ids), top_ids, top_logprobs

    def draw(self, logits, uniform):
        """
        Draw one id for each row: logits (B, V) and numbers from [0, 1) (B, 1) -> ids (B, 1).

        The steps: divide the logits by the temperature; keep the top_k likeliest tokens; of those, the fewest
        whose probability together reaches top_p (nucleus sampling, Holtzman et al. 2019), and only tokens
        with at least min_p times the probability of the likeliest (Nguyen et al. 2024); draw one by inverting
        the cumulative distribution of what is left. `uniform` is the only random input, one number a row, so
        a row's text does not depend on the rows beside it.
        """
        if self.work.greedy:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits - logits.amax(dim=-1, keepdim=True)  # the largest is 0: dividing it does not overflow
        logits = logits / self.temperature
        ids = None  # all of them, in order
        if self.work.kept:
            logits, ids = logits.topk(self.work.kept)  # (B, V) -> (B, k), the likeliest first
            if self.work.rounded:
                rank = torch.arange(self.work.kept, device=logits.device)  # (k,)
                logits = logits.masked_fill(rank >= self.top_k, -math.inf)
            p = F.softmax(logits, dim=-1)
            before = p.cumsum(dim=-1) - p  # of all likelier tokens together; 0 for the first, which stays
            p = p * ((before < self.top_p) & (p >= self.min_p * p[:, :1]))
            ids, order = ids.sort(dim=-1)  # by id: rounding may swap two tokens in an order by probability
            p = p.gather(1, order)
        else:
            p = F.softmax(logits, dim=-1)  # (B, V)
        cdf = p.cumsum(dim=-1)
        reached = (cdf > uniform * cdf[:, -1:]) & (p > 0)  # True from the drawn token on
        choice = reached.int().argmax(dim=-1, keepdim=True)  # the first True
        return choice if ids is None else ids.gather(1, choice)


def are_finite(logits):
    """logits (B, V) -> (B, 1) bool: whether all of a row are finite numbers."""
    return logits.isfinite().all(dim=-1, keepdim=True)


def not_finite():
    """The UserError for a model whose logits are not finite."""
    return UserError(
        "the model's logits are not finite (NaN or infinity): its weights are damaged, or too large for the "
        "dtype. Try --dtype=float32, or another checkpoint"
    )


def uniforms(seed, rows, device):
    """
    An endless iterator of tensors (B, 1), numbers from [0, 1). Row b's depend on (seed, rows[b]) alone.
    """
    generators = [np.random.default_rng((seed, row)) for row in rows]
    while True:
        numbers = np.stack([generator.random(256) for generator in generators], axis=1)  # (256, B)
        # The factor keeps the largest number below 1 after rounding to float32.
        yield from torch.from_numpy(numbers * (1 - 1e-6)).float()[:, :, None].to(device, non_blocking=True)
