"""
What a pass of a model leaves behind: queries, keys, values, the residual stream, logits.

Shapes: B texts, T tokens, L layers, C channels, nh and nkv heads, hs head size, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from kqv.looking.attention import PLAIN, readable


@dataclass
class Trace:
    """One pass. Lists have an entry a layer."""

    q: list  # (B, nh, T, hs), after norms and rotation: what is multiplied
    k: list  # (B, nkv, T, hs)
    v: list  # (B, nkv, T, hs)
    weights: list  # (B, nh, T, T)
    stream: list  # L + 1 of (B, T, C): what goes into each block, and what comes out of the last
    attended: list  # (B, T, C): what attention adds to the stream
    computed: list  # (B, T, C): what the MLP adds
    logits: torch.Tensor  # (B, T, V)


class Looker:
    """Runs a GPT with its attention spelled out, changed as asked. The GPT itself is not changed."""

    def __init__(self, gpt):
        self.gpt, self.twin = gpt, readable(gpt)
        self.device = gpt.lm_head.weight.device

    @torch.no_grad()
    def logits(self, idx, what_if=PLAIN):
        """idx (B, T) -> logits (B, T, V), of the model changed as `what_if` says."""
        self.twin.shared.what_if = what_if
        try:
            return self.twin(idx)
        finally:
            self.twin.shared.what_if = PLAIN

    def trace(self, idx, what_if=PLAIN):
        """idx (B, T) -> Trace"""
        blocks = self.twin.transformer.h
        kept = {"stream": [], "attended": [], "computed": []}

        def keep(name, of):
            return lambda module, given, result: kept[name].append(of(given, result))

        hooks = [block.register_forward_hook(keep("stream", lambda g, r: g[0])) for block in blocks]
        hooks += [block.attn.register_forward_hook(keep("attended", lambda g, r: r)) for block in blocks]
        hooks += [block.mlp.register_forward_hook(keep("computed", lambda g, r: r)) for block in blocks]
        hooks.append(self.twin.transformer.ln_f.register_forward_hook(keep("stream", lambda g, r: g[0])))
        try:
            logits = self.logits(idx, what_if)
        finally:
            for hook in hooks:
                hook.remove()
        matrices = [block.attn.kept for block in blocks]
        of_layers = {name: [kept[name] for kept in matrices] for name in ("q", "k", "v", "weights")}
        return Trace(**of_layers, **kept, logits=logits)

    @torch.no_grad()
    def lens(self, stream):
        """The stream (B, T, C) after any block -> logits (B, T, V), as if it were the last one."""
        return self.gpt.lm_head(self.gpt.transformer.ln_f(stream))

    def losses(self, idx, what_if=PLAIN):
        """idx (B, T) -> (B, T - 1): the loss in nats of tokens 1 to T - 1, each from those before it."""
        logits = self.logits(idx[:, :-1], without_last(what_if))
        return F.cross_entropy(logits.transpose(1, 2), idx[:, 1:], reduction="none")

    def continuation(self, ids, count, what_if=PLAIN):
        """The `count` likeliest tokens after the list `ids`, one after another, a list."""
        ids, added = list(ids), []
        for _ in range(min(count, self.gpt.config.block_size - len(ids))):
            logits = self.logits(torch.tensor([ids], device=self.device), replace(what_if, hidden=None))
            added.append(int(logits[0, -1].argmax()))
            ids.append(added[-1])
        return added


def without_last(what_if):
    """The WhatIf for a text without its last token."""
    hidden = what_if.hidden
    return what_if if hidden is None else replace(what_if, hidden=hidden[:, :-1, :-1])
