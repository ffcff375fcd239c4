"""How large a model is, before it is built."""

import math
from contextlib import contextmanager
from dataclasses import replace

import torch

from kqv.device import machine_memory, out_of_memory_as
from kqv.errors import UserError
from model import GPT


def excess(shape):
    """Why a GPT of that GPTConfig does not fit into this machine's memory, in words; "" where it may fit."""
    try:
        one, two = (plan(shape, n_layer).num_parameters(False) for n_layer in (1, 2))
        count = one + (shape.n_layer - 1) * (two - one)
    except (RuntimeError, TypeError):  # a tensor larger than torch can describe
        count = math.inf
    memory = machine_memory()
    if 4 * count <= memory:
        return ""
    return (
        f"n_layer={shape.n_layer} and n_embd={shape.n_embd} make {count:.1e} parameters, more than the "
        f"{memory / 2**30:.0f} GiB of this machine hold"
    )


@contextmanager
def fitting(shape, source):
    """
    A context in which the weights of a GPT of that GPTConfig are made from `source`. Raises UserError where
    the machine has too little memory for them, before the block or in it.
    """
    if found := excess(shape):
        raise UserError(f"{source} is too large: {found}: take a smaller model, or a larger machine")
    with out_of_memory_as(f"{source} does not fit into the memory that is free: end other programs"):
        yield


def require_names(shape, weights):
    """Raise ValueError unless plain weights {name: tensor} have the names of a GPT of that GPTConfig."""
    blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(blocks) != shape.n_layer:
        raise ValueError(f"n_layer is {shape.n_layer}, but there are weights of {len(blocks)} blocks")
    needed = set()
    for name in plan(shape, n_layer=1).state_dict():
        needed |= {name.replace(".h.0.", f".h.{layer}.") for layer in range(shape.n_layer)}
    if missing := sorted(needed - weights.keys()):
        raise ValueError(f"{one_of(missing)} missing")
    if others := sorted(weights.keys() - needed):
        raise ValueError(f"{one_of(others)} no part of its shape")


def one_of(names):
    """The first of some names, for a message, with how many more there are."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} other weights are"


def plan(shape, n_layer):
    """A GPT with shapes, but no numbers. A layer stands for many, which take long to make."""
    with torch.device("meta"):
        return GPT(replace(shape, n_layer=n_layer))
