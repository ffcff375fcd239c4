"""
A GGUF file -> the contents of a checkpoint: the way back of gguf.py. What in its metadata changes what is
computed is known, or refused by name.
"""

import math
from dataclasses import asdict, replace

import numpy as np
import torch

from kqv.errors import UserError
from kqv.formats import families, gguf_tokenizer, renaming, size
from kqv.formats.gguf_file import GGUFFile
from kqv.forms import described, fits, shown
from model import GPTConfig

SUFFIX = ".gguf"

HEADS, KV_HEADS = "attention.head_count", "attention.head_count_kv"
EPS = {True: "attention.layer_norm_epsilon", False: "attention.layer_norm_rms_epsilon"}  # of GPT-2?
LENGTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # of a head

# {key after the architecture: our field}
FIELDS = {
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    HEADS: "n_head",
    KV_HEADS: "n_kv_head",
    "rope.freq_base": "rope_theta",
}

# Keys that change nothing here, with any value.
INERT = ("vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")

NOTHING = (0, False, "none", "")  # values with which any other key changes nothing

EMBEDDING = "token_embd.weight"

FREQUENCIES = "rope_freqs.weight"

HEAD = "output.weight"


def load(path):
    """The contents of a checkpoint (`model`, `model_args`, `tokenizer`) of a GGUF file. Raises UserError."""
    file = GGUFFile(path)
    family, definition = family_in(file), tokenizer_in(file)
    try:
        config = shape_of(file, family)
    except ValueError as error:
        raise UserError(f"{path} has in its metadata a shape that can't be: {error}") from None
    with size.fitting(config, path):
        weights = weights_of(file, family, config)
    model_args = {name: value for name, value in asdict(config).items() if name != "dropout"}
    contents = {"model": weights, "model_args": model_args, "tokenizer": definition}
    return contents if gguf_tokenizer.OURS in file.metadata else {**contents, "from_huggingface": str(path)}


def tokenizer_in(file):
    """The definition of a GGUFFile's tokenizer, read without its weights. Raises UserError."""
    if EMBEDDING not in file.places:
        raise UserError(f"{file.path} has no {EMBEDDING}: use a whole model")
    return gguf_tokenizer.definition_of(file.metadata, file.path, file.places[EMBEDDING].shape[0])


def family_in(file):
    """The Family of a file's architecture. Raises UserError for another, and for what is no whole model."""
    name, kind = file.metadata.get("general.architecture"), file.metadata.get("general.type", "model")
    known = [other for other in families.FAMILIES if other != families.MISTRAL.name]
    if name not in known:
        raise UserError(
            f"{file.path} has general.architecture={name!r}: use a model of {', '.join(known)}"[:300]
        )
    if kind != "model":
        raise UserError(f"{file.path} has general.type={kind!r}: use a whole model")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{file.path} is one of several files (split.count={file.metadata['split.count']}): join them "
            "with llama-gguf-split --merge"
        )
    return families.FAMILIES[name]


def shape_of(file, family):
    """The GPTConfig of a file of that family. Raises UserError, and ValueError where it can't be."""
    prefix = f"{family.name}."
    given = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    eps = EPS[family is families.GPT2]
    fields = {**FIELDS, eps: "norm_eps"}
    if family is families.GPT2:
        del fields["rope.freq_base"]
    args = {**family.shape, "tied_head": HEAD not in file.places}
    args["vocab_size"] = file.places[EMBEDDING].shape[0]
    for key, field in fields.items():
        if key in given:
            args[field] = number_of(
                given[key], key, float if field in ("norm_eps", "rope_theta") else int, file
            )
        elif key not in (KV_HEADS, "rope.freq_base"):
            raise UserError(f"{file.path} has no {prefix}{key} in its metadata: convert it again")
    if args["n_layer"] > len(file.places):
        raise UserError(f"{file.path} has {prefix}block_count={args['n_layer']}, but fewer tensors")
    usual = args["n_embd"] // max(args["n_head"], 1)
    lengths = {number_of(given.get(key, usual), key, int, file) for key in LENGTHS}
    if len(lengths) > 1:
        what = ", ".join(f"{prefix}{key}={given.get(key, usual)}" for key in LENGTHS)
        raise UserError(f"{file.path} has {what}, but kqv's heads have one size: use another model")
    if (length := lengths.pop()) != usual or args["n_embd"] % max(args["n_head"], 1):
        args["head_size"] = length
    for key, value in given.items():
        inert = (
            isinstance(value, (int, float, str))
            and value in NOTHING
            or key == "rope.scaling.factor"
            and value == 1
        )
        if key not in (*fields, *LENGTHS, *INERT) and not inert:
            raise UserError(
                f"{file.path} has {prefix}{key}={value!r}"[:150]
                + f", which kqv's {family.name} does not have: use a model without"
            )
    config = GPTConfig(**args)
    return scaled(config, file) if FREQUENCIES in file.places else config


def number_of(value, key, kind, file):
    """A number of the metadata as `kind`, int or float. Raises UserError."""
    form = families.FORMS[kind]
    if not fits(value, form):
        raise UserError(f"{file.path} has {key}={shown(value)}, not {described(form)}")
    return float(str(np.float32(value))) if kind is float else value  # 1e-05, of float32's 9.99999975e-06


# Llama 3's scaling


def scaled(config, file):
    """
    `config` with the scaling of rotary positions that the factors in a file are: how much slower each pair of
    channels turns. Raises UserError where they are no scaling as Llama 3's.
    """
    place = file.places[FREQUENCIES]
    refusal = UserError(
        f"{file.path} has a {FREQUENCIES} that is not Llama 3's scaling of rotary positions: use another"
    )
    if config.positions != "rotary" or place.shape != (config.head_channels // 2,):
        raise refusal
    factors = torch.from_numpy(file.array(FREQUENCIES))
    for candidate in candidates(factors.double(), renaming.frequencies(config).double(), config):
        if torch.allclose(renaming.frequency_factors(candidate), factors, rtol=1e-5, atol=0):
            return candidate
    raise refusal


def candidates(factors, plain, config):
    """
    GPTConfigs that may have these factors (hs / 2,) over angles `plain` (hs / 2,). Llama 3's own numbers come
    first. The factors decide rope_slow, rope_fast and rope_original up to one number, so rope_slow is 1 else.
    """
    factor = factors.max().item()
    if not 1 < factor < 2**31:
        return
    factor = float(str(np.float32(factor)))
    usual = replace(config, rope_factor=factor)
    yield from (replace(usual, rope_original=2**power) for power in range(13, 8, -1))
    between = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    if between.sum() >= 2:
        fast = (1 / factors - 1 / factor) / (1 - 1 / factor)  # 0: slow, 1: fast; linear in the angle
        x, y = plain[between], fast[between]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        start = (y.mean() - slope * x.mean()).item()
        if start < 0 < slope:
            rope_fast = round(1 - 1 / start, 3)
            original = round(slope.item() * 2 * math.pi * (rope_fast - 1))
            if 1 < rope_fast < 2**31 and 1 <= original < 2**31:
                yield replace(usual, rope_fast=rope_fast, rope_original=original)


# Weights


def weights_of(file, family, config):
    """{our name: tensor in float32}. Raises UserError where the tensors are not those of the shape."""
    planned = size.plan(config, config.n_layer).state_dict()
    expected = renaming.named_for_gguf(planned, config)
    if others := sorted(file.places.keys() - expected.keys() - {FREQUENCIES}):
        raise UserError(
            f"{file.path} has a tensor {others[0]!r}, which kqv's {family.name} of its shape does not have"[
                :300
            ]
        )
    if missing := sorted(expected.keys() - file.places.keys()):
        raise UserError(f"{file.path} has no tensor {missing[0]}: fetch or convert it again")
    for name, (_, planned) in expected.items():
        if file.places[name].shape != tuple(planned.shape):
            raise UserError(
                f"{file.path} has {name} of the shape {file.places[name].shape}, but its metadata means "
                f"{tuple(planned.shape)}: convert it again"
            )
    theirs = {
        other: torch.from_numpy(file.array(name))
        for name, (other, _) in expected.items()
        if name != FREQUENCIES
    }
    weights = renaming.from_gguf(theirs, config)
    if config.tied_head:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights
