"""
What a model does when its attention is changed: the loss, the likeliest next tokens, a continuation.

Shapes: B texts, T tokens, L layers, nh heads.
"""

from dataclasses import replace

import torch

from kqv.looking.attention import PLAIN, WhatIf

WHAT_IFS = {
    "as_trained": PLAIN,
    "no_mask": WhatIf(mask="none"),
    "flipped_mask": WhatIf(mask="flipped"),
    "unscaled": WhatIf(scaled=False),
    "squared": WhatIf(score="squared"),
    "of_squares": WhatIf(score="of_squares"),
    "reversed": WhatIf(score="reversed"),
    "swapped": WhatIf(score="swapped"),
    "no_positions": WhatIf(positions=False),
}

AT_ONCE = 2**22  # numbers of attention weights of one layer that a pass over many changes may hold

MOST_EDGES = 600  # passes in which one edge is cut


def measured(looker, ids, what_if):
    """
    A text, a list of ids, read by a changed model -> {"loss": mean of its tokens, in nats; "last_loss": of
    the last token alone, which a model without a mask can't see either; "top": the 5 likeliest next tokens
    [[id, probability], ...]; "continuation": ids}.
    """
    idx = torch.tensor([ids], device=looker.device)
    losses = looker.losses(idx, what_if)[0]
    top = looker.logits(idx, what_if)[0, -1].float().softmax(dim=-1).topk(5)
    return {
        "loss": losses.mean().item(),
        "last_loss": losses[-1].item(),
        "top": [list(pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
        "continuation": looker.continuation(ids, 12, what_if),
    }


def passes_of(looker, ids, changes, run):
    """
    run(idx (n, T), WhatIf) over rows of one text, each with its own of the `changes`, a WhatIf whose tensors
    have a row for each: the results one after another, (rows, ...).
    """
    field = "heads" if changes.heads is not None else "hidden"
    rows = getattr(changes, field).to(looker.device)
    n = max(1, AT_ONCE // (looker.gpt.config.n_head * len(ids) ** 2))
    idx = torch.tensor([ids], device=looker.device)
    found = [run(idx.expand(len(some), -1), replace(changes, **{field: some})) for some in rows.split(n)]
    return torch.cat(found)


def loss_without_heads(looker, ids):
    """A list of ids -> (L, nh): how much the mean loss grows, in nats, where that head adds nothing."""
    config = looker.gpt.config
    L, nh = config.n_layer, config.n_head
    heads = 1 - torch.eye(L * nh).view(L * nh, L, nh)  # row i: head i is off
    losses = passes_of(looker, ids, WhatIf(heads=heads), looker.losses).mean(dim=-1)  # (L nh,)
    whole = looker.losses(torch.tensor([ids], device=looker.device)).mean()
    return (losses - whole).view(L, nh).cpu()


def cut_edges(looker, ids, rows):
    """
    Cut one edge in all heads: token t must not look at token s. -> {t: (t + 1,) of the change of
    log p(token that t predicts), one for each s <= t}, for the tokens t in `rows`. What the last token
    predicts is its likeliest next token.
    """
    T, idx = len(ids), torch.tensor([ids], device=looker.device)
    whole = looker.logits(idx)[0].float().log_softmax(dim=-1)  # (T, V)
    found = {}
    for t in rows:
        target = ids[t + 1] if t + 1 < T else int(whole[t].argmax())
        hidden = torch.zeros(t + 1, T, T, dtype=torch.bool)
        hidden[torch.arange(t + 1), t, torch.arange(t + 1)] = True

        def of_target(idx, what_if, t=t, target=target):
            return looker.logits(idx, what_if)[:, t].float().log_softmax(dim=-1)[:, target]

        found[t] = (passes_of(looker, ids, WhatIf(hidden=hidden), of_target) - whole[t, target]).cpu()
    return found


def rows_to_cut(T):
    """The tokens whose edges are cut: all of a short text, else the last ones, within MOST_EDGES passes."""
    rows = []
    for t in reversed(range(T)):
        if rows and sum(row + 1 for row in rows) + t + 1 > MOST_EDGES:
            break
        rows.append(t)
    return rows[::-1]


def other_endings(looker, ids, what_if=PLAIN):
    """
    A list of T ids -> (T - 1,): for each token t, how far its rows of weights, in any head, are from those in
    a text that begins alike and ends otherwise: the tokens after t are in the reverse order, each id plus 1.
    """
    idx, V = torch.tensor([ids], device=looker.device), looker.gpt.config.vocab_size
    weights = torch.stack(looker.trace(idx, what_if).weights)[:, 0]  # (L, nh, T, T)
    far = []
    for t in range(len(ids) - 1):
        ending = [(one + 1) % V for one in reversed(ids[t + 1 :])]
        other = looker.trace(torch.tensor([ids[: t + 1] + ending], device=looker.device), what_if)
        rows = torch.stack(other.weights)[:, 0, :, t]  # (L, nh, T)
        far.append((rows - weights[:, :, t]).abs().max().item())
    return far
