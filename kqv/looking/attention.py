"""
The attention of model.py spelled out: every matrix of the formula is there to be seen, and to be changed.

Shapes: B texts, nh heads of queries, nkv heads of keys and values, T tokens, hs head size. Scores and weights
are (B, nh, T, T): row t has what token t asks, column s which token is asked.
"""

import copy
import math
from dataclasses import dataclass

import torch

from model import CausalSelfAttention

SCORES = {  # what a score is, of q, k (B, nh, T, hs) -> (B, nh, T, T)
    "product": lambda q, k: q @ k.transpose(-2, -1),
    "squared": lambda q, k: (q @ k.transpose(-2, -1)).square(),
    "of_squares": lambda q, k: q.square() @ k.square().transpose(-2, -1),
    "reversed": lambda q, k: -(q @ k.transpose(-2, -1)),
    "swapped": lambda q, k: k @ q.transpose(-2, -1),
}

MASKS = {  # of the number t of a token and s of another: may t look at s?
    "causal": lambda t, s: s <= t,
    "none": lambda t, s: (s <= t) | (s > t),
    "flipped": lambda t, s: s >= t,
}


@dataclass(frozen=True)
class WhatIf:
    """What is changed in a model's attention; by default nothing."""

    score: str = "product"  # one of SCORES
    mask: str = "causal"  # one of MASKS
    scaled: bool = True  # scores are divided by sqrt(hs)
    positions: bool = True  # False: all tokens are at place 0
    heads: torch.Tensor | None = None  # (B, n_layer, nh): each head's result is multiplied by this
    hidden: torch.Tensor | None = None  # (B, T, T) bool: True where token t must not look at token s


PLAIN = WhatIf()


def may_look(T, what_if, device=None):
    """(B or 1, 1, T, T) bool: True where token t may look at token s."""
    order = torch.arange(T, device=device)
    allowed = MASKS[what_if.mask](order[:, None], order)[None]  # (1, T, T)
    if what_if.hidden is not None:
        allowed = allowed & ~what_if.hidden
    return allowed[:, None]


def attention(q, k, v, what_if=PLAIN):
    """
    q (B, nh, T, hs), k and v (B, nkv, T, hs) -> each head's result (B, nh, T, hs), scores and weights
    (B, nh, T, T). A token that may look at none receives zeros.
    """
    group = q.size(1) // k.size(1)  # heads of queries that share a head of keys and values
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # 2 x (B, nh, T, hs)
    scores = SCORES[what_if.score](q, k)  # (B, nh, T, T): how well query t matches key s
    if what_if.scaled:
        scores = scores / math.sqrt(q.size(-1))
    allowed = may_look(q.size(2), what_if, q.device)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)  # each row sums to 1
    weights = weights.masked_fill(~allowed, 0.0)  # where nothing is left to look at, it is 0 / 0
    return weights @ v, scores, weights


class ReadableAttention(CausalSelfAttention):
    """model.py's attention with the formula above in place of the fused kernel. It keeps what it computed."""

    def attend(self, q, k, v, mask):
        what_if = self.shared.what_if
        y, scores, weights = attention(q, k, v, what_if)
        if what_if.heads is not None:
            y = y * what_if.heads[:, self.layer, :, None, None]
        self.kept = {"q": q, "k": k, "v": v, "scores": scores, "weights": weights, "y": y}
        return y


class Shared:
    """What all attention layers of one readable model know."""

    what_if = PLAIN


def readable(gpt):
    """
    A copy of a GPT on the same weights, in evaluation mode, whose attention is spelled out. Its `shared`
    says what is changed.
    """
    twin = copy.deepcopy(gpt, {id(parameter): parameter for parameter in gpt.parameters()}).eval()
    twin.shared, embed = Shared(), twin.embed

    def embed_at(idx, positions):
        return embed(idx, positions if twin.shared.what_if.positions else positions * 0)

    twin.embed = embed_at
    for layer, block in enumerate(twin.transformer.h):
        block.attn.__class__ = ReadableAttention
        block.attn.shared, block.attn.layer = twin.shared, layer
    return twin
