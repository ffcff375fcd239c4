"""What a checkpoint says beside its weights, and whether weights and tokenizer belong together."""

import re
from typing import get_type_hints

import torch

from kqv.errors import UserError
from kqv.formats import base
from kqv.forms import SIGNED, WHOLE, Numbers, require_form
from kqv.text import tokenizers
from model import GPTConfig

PLAIN = (None, bool, SIGNED, float, str, list, tuple, dict)  # a setting of any program

FINITE = Numbers(-1e308, 1e308)

NUMBERS = {  # nanoGPT, for one, saves some of them as tensors
    "iter_num?": WHOLE,
    "windows?": WHOLE,
    "evaluated?": range(-1, 2**63),
    "bad_steps?": WHOLE,
    "best_val_loss?": Numbers(-float("inf"), float("inf")),  # below 0 where it is minus a reward
    "ids_in_loss?": range(1, 2**31),
    "threads?": range(1, 2**31),
}

SWITCHES = {f"{name}?": bool for name, kind in get_type_hints(GPTConfig).items() if kind is bool}

FORM = {
    **NUMBERS,
    "model_args": {str: object, **SWITCHES, "dropout?": Numbers(0, 1)},
    "config?": {str: PLAIN, "dataset?": re.compile("[^\0]*"), "teacher?": re.compile("[^\0]*")},
    "belongs_to?": {str: str},
    "history?": {"rewards": [FINITE], "dead": [bool]},  # see kqv/tuning/state.py
    "start?": {name: base.FORM[name] for name in ("source", "sha256")},  # see kqv/tuning/start.py
    "teacher?": str,
    "wandb_id?": (re.compile(r"[^/\\\s\0]{1,128}"), None),  # wandb makes names of files of it
    "tokenizer?": object,  # see tokenizers.require_definition
    "base?": base.FORM,  # of an adapter
}

OF_READERS = ("folder", "from_huggingface")  # what a reader says of a checkpoint, and no checkpoint itself


def require_contents(contents, source):
    """
    Make plain numbers of one-element tensors in the contents of a checkpoint, and leave out what only a
    reader may say. Raises UserError where something is not of its form.
    """
    for name in OF_READERS:
        contents.pop(name, None)
    for name in (name.removesuffix("?") for name in NUMBERS):
        value = contents.get(name)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            contents[name] = value.item()
    try:
        require_form(contents, FORM)
    except ValueError as error:
        raise UserError(f"{source} is damaged or not a checkpoint of kqv or nanoGPT: {error}") from None
    if "tokenizer" in contents:
        tokenizers.require_definition(contents["tokenizer"])


def require_agreement(contents, source, rows, ids):
    """
    Raise UserError where weights of so many rows, one for each id, do not belong to a tokenizer of so many
    ids. More rows than ids may be padding: up to a multiple of 64, as GPT-2's 50304 rows for 50257 ids; of
    any number in a Hugging Face folder, whose reader has compared both, or where the checkpoint says how many
    ids its loss knew.
    """
    known = contents.get("ids_in_loss")
    right = known == ids if known else rows <= -(-ids // 64) * 64 or "from_huggingface" in contents
    if rows < ids or not right:
        trained = f" and were trained on {known}" if known and rows >= ids else ""
        raise UserError(
            f"the tokenizer has {ids} ids, but the weights of {source} have {rows} rows, one for each id"
            f"{trained}: use their own tokenizer (of a checkpoint of nanoGPT, the meta.pkl of its set)"
        )


def padded(vocab_size):
    """A large vocabulary rounded up to a multiple of 64, which tensor cores like; a small one as it is."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64
