"""
LoRA (Hu et al. 2021): a linear layer learns the product of two small matrices beside its weight, which stays.

    y = x W^T + b + alpha / rank * (x A^T) B^T

W (out, in) and b are frozen. A (rank, in) begins at random and B (out, rank) at 0, so the model begins as its
*base*. A frozen weight needs neither a gradient nor the optimizer's moments: 4 bytes instead of 16.

Ids that the base does not know, such as the marks of a chat, have rows of the embedding and of the head that
nobody has trained. These last rows of both learn whole.

Shapes: V rows of the head, n of them new, C channels, N tokens.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

LAYERS = ("c_attn", "c_proj", "c_fc", "c_gate")  # names of the linear layers of a block

A, B, ROWS = "lora_A", "lora_B", "new_rows"  # names of what learns


class LoraLinear(nn.Linear):
    """A Linear that is frozen, with what it learns: lora_A (rank, in) and lora_B (out, rank)."""

    is_on = True

    def forward(self, x):
        y = super().forward(x)
        if not self.is_on:
            return y
        low = self.scale * F.linear(x, self.lora_A)  # (..., rank)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.T).view_as(y)

    def adapt(self, rank, alpha):
        """Add the two matrices. Raises ValueError where the rank is above the smaller side of the weight."""
        if not 1 <= rank <= min(self.weight.shape):
            raise ValueError(f"rank {rank} is not within 1 to {min(self.weight.shape)}, its smaller side")
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in the paper's code, and nn.Linear

    def change(self):
        """alpha / rank * B A (out, in), what is added to the weight."""
        return self.scale * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merge(self):
        """Become a Linear whose weight has the change in it."""
        self.weight += self.change()
        del self.lora_A, self.lora_B, self.scale
        self.__class__ = nn.Linear


class NewRows(nn.Module):
    """
    A frozen weight (V, C) whose last n rows learn: `new_rows` (n, C), a parameter in the weight's own memory.
    So whoever reads the weight reads what was learnt.
    """

    def _apply(self, fn, recurse=True):  # what `to(device)` does gives each parameter memory of its own
        super()._apply(fn, recurse)
        self.new_rows.data = self.weight.data[-len(self.new_rows) :]
        return self


class GrownHead(NewRows, nn.Linear):
    def forward(self, x):
        logits = super().forward(x)  # (..., V)
        known = logits[..., : -len(self.new_rows)]
        return torch.cat((known, F.linear(x, self.new_rows)), dim=-1)


class GrownEmbedding(NewRows, nn.Embedding):
    def forward(self, idx):
        place = idx - (len(self.weight) - len(self.new_rows))  # (B, T), below 0: a known id
        new = F.embedding(place.clamp(min=0), self.new_rows)  # (B, T, C)
        return torch.where(place[..., None] < 0, super().forward(idx), new)


def adapt(gpt, rank, alpha, targets=LAYERS, new_ids=0):
    """
    Freeze a GPT, and let the blocks' linear layers called one of `targets` learn as LoRA does, and the rows
    of the last `new_ids` ids whole. Random numbers come from torch's generator. Returns the GPT. Raises
    ValueError where no layer has such a name, and for a rank that is too large.
    """
    gpt.requires_grad_(False)
    found = layers_called(gpt, targets)
    if not found:
        raise ValueError(f"no layer is called {' or '.join(targets)}")
    for name, layer in found.items():
        layer.__class__ = LoraLinear
        try:
            layer.adapt(rank, alpha)
        except ValueError as error:
            raise ValueError(f"{name.partition('.')[2]}: {error}") from None
    if new_ids:
        head, wte = gpt.lm_head, gpt.transformer.wte
        head.__class__, wte.__class__ = GrownHead, GrownEmbedding
        wte.new_rows = nn.Parameter(wte.weight.data[-new_ids:])
        tied = head.weight is wte.weight
        head.new_rows = wte.new_rows if tied else nn.Parameter(head.weight.data[-new_ids:])
    return gpt


def layers_called(gpt, names):
    """{name within the blocks: layer} of the blocks' linear layers with these last names."""
    layers = gpt.transformer.h.named_modules()
    return {
        name: layer
        for name, layer in layers
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in names
    }


def lora_layers(gpt):
    return [layer for layer in gpt.modules() if isinstance(layer, LoraLinear)]


def is_adapted(gpt):
    """Whether a GPT, or a module with one in it, learns as `adapt` says."""
    return bool(lora_layers(gpt))


@contextmanager
def without_adapter(gpt):
    """
    A context in which an adapted GPT computes what its base does. (New rows stay as they are: the base has
    none. A GPT that is not adapted computes what it always does.)
    """
    layers = lora_layers(gpt)
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def merge(gpt):
    """An adapted GPT -> the same as a plain one, of which all is trained again; in the same memory."""
    for layer in lora_layers(gpt):
        layer.merge()
    for module, kind in ((gpt.lm_head, nn.Linear), (gpt.transformer.wte, nn.Embedding)):
        if isinstance(module, NewRows):
            del module.new_rows  # the weight has them
            module.__class__ = kind
    return gpt.requires_grad_(True)


# What is saved


def learnt(gpt):
    """{name: parameter} of what learns."""
    return {name: weight for name, weight in gpt.named_parameters() if weight.requires_grad}


def contents_of(gpt):
    """
    A GPT's part of a checkpoint's contents: all weights; of an adapted one those that learn, and `base`, as
    kqv/formats/base.py says.
    """
    if not is_adapted(gpt):
        return {"model": gpt.state_dict()}
    return {"model": {name: weight.detach() for name, weight in learnt(gpt).items()}, "base": gpt.base}


def rank_in(weights):
    """The rank of saved weights {name: tensor}. Raises ValueError where there is none."""
    ranks = {len(weight) for name, weight in weights.items() if name.endswith(A) and weight.dim()}
    if len(ranks) != 1:
        raise ValueError("it has no lora_A" if not ranks else f"its layers have the ranks {sorted(ranks)}")
    return ranks.pop()


def targets_in(weights):
    """The names of layers that saved weights {name: tensor} adapt, in the order of LAYERS."""
    names = {name.split(".")[-2] for name in weights if name.endswith(f".{A}")}
    return tuple(name for name in LAYERS if name in names)


@torch.no_grad()
def adapt_as_saved(gpt, weights, alpha, new_ids):
    """
    `adapt` the base `gpt`, and fill in the saved weights {name: tensor}. Raises ValueError where they are not
    those of this base.
    """
    adapt(gpt, rank_in(weights), alpha, targets_in(weights), new_ids)
    parameters = learnt(gpt)
    if other := sorted(parameters.keys() ^ weights.keys()):
        raise ValueError(f"{other[0]} is {'missing' if other[0] in parameters else 'no part of it'}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            shapes = tuple(weights[name].shape), tuple(parameter.shape)
            raise ValueError(f"{name} has the shape {shapes[0]}, not {shapes[1]}")
        parameter.copy_(weights[name])
    return gpt


# Counts


def parameters_in_words(gpt):
    """How many parameters a GPT has, without positions, and of an adapted one how many of them learn."""
    rows = sum(weight.numel() for name, weight in gpt.named_parameters() if name.endswith(ROWS))
    text = f"{(gpt.num_parameters() - rows) / 1e6:.2f}M parameters"
    trained = sum(weight.numel() for weight in learnt(gpt).values())
    return f"{text}, {trained:,} of them trained" if is_adapted(gpt) else text


def flops_per_token(gpt):
    """GPT.flops_per_token, without the gradients of frozen weights: two of six for each."""
    embeddings = ["transformer.wpe.weight"] + ["transformer.wte.weight"] * (not gpt.config.tied_head)
    frozen = sum(
        weight.numel()
        for name, weight in gpt.named_parameters()
        if not weight.requires_grad and name not in embeddings
    )
    return gpt.flops_per_token() - 2 * frozen
