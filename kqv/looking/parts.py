"""
The scores of the first layer, taken apart: what comes from tokens, and what from positions.

A score is a product of a query and a key, and both are linear in what goes into the first block, once the
statistics of the norms are fixed at those of the pass. That input is a token's vector plus a place's vector,
so a query is a sum, Q = Q_token + Q_place + Q_rest (biases), and so is a key.

Shapes: T tokens, nh heads of queries, nkv heads of keys, hs head size, C channels.
"""

import math

import torch
from torch import nn


def fixed(norm, x):
    """
    A norm of model.py with its statistics fixed at those of `x` (..., n) -> (its linear part, a function of
    (..., n), and its constant part, (n,) or 0.0).
    """
    if isinstance(norm, nn.Identity):
        return lambda part: part, 0.0
    if isinstance(norm, nn.LayerNorm):
        spread = (x.var(dim=-1, keepdim=True, correction=0) + norm.eps).sqrt()
        constant = 0.0 if norm.bias is None else norm.bias
        return lambda part: (part - part.mean(dim=-1, keepdim=True)) / spread * norm.weight, constant
    root = (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return lambda part: part / root * norm.weight, 0.0


@torch.no_grad()
def parts_of_first_layer(gpt, idx):
    """
    idx (1, T) -> {"q": {...}, "k": {...}} with the parts "token", "place" and "rest" of the queries
    (nh, T, hs) and keys (nkv, T, hs) of the first layer, before rotation; they add up.
    """
    block, positions = gpt.transformer.h[0], torch.arange(idx.size(1), device=idx.device)[None]
    x, _ = gpt.embed(idx, positions)  # (1, T, C)
    token = gpt.transformer.wte(idx) * (math.sqrt(x.size(-1)) if gpt.config.positions == "sinusoidal" else 1)
    norm, shift = fixed(block.ln_1, x)
    product = block.attn.c_attn
    inner = {"token": norm(token) @ product.weight.T, "place": norm(x - token) @ product.weight.T}
    inner["rest"] = (torch.zeros_like(x) + shift) @ product.weight.T
    if product.bias is not None:
        inner["rest"] = inner["rest"] + product.bias
    heads = {name: part[0].unflatten(-1, (-1, block.attn.head_size)) for name, part in inner.items()}
    found = {}
    for name, first, norm in (("q", 0, block.attn.q_norm), ("k", 1, block.attn.k_norm)):
        split = {part: vectors.split(block.attn.heads, dim=1)[first] for part, vectors in heads.items()}
        linear, constant = fixed(norm, sum(split.values()))
        split = {part: linear(vectors).transpose(0, 1) for part, vectors in split.items()}
        split["rest"] = split["rest"] + constant
        found[name] = split
    return found
