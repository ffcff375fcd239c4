"""
The names and the order of weights in transformers -> ours, and back.

Our names are those of GPT-2 there. The families that came after it have names in common, and keep the rows of
Q, K and V in three matrices.
"""

import re
from dataclasses import replace

import torch

from kqv.errors import UserError
from kqv.formats.families import ARCEE, GPT2, LLAMA, family_of
from model import angles_of

# OpenAI's code stores these matrices as (in, out), torch's nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

NOT_BIASED = ("wte.weight", "wpe.weight", "lm_head.weight")

# transformers' name of a part, in all families but GPT-2 -> ours
OUTSIDE = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}

IN_BLOCK = {
    "input_layernorm": "ln_1",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.gate_proj": "mlp.c_gate",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}

Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # together attn.c_attn

FREQUENCIES = ".rotary_emb.inv_freq"  # not weights: old files carry them


def our_weights(theirs, family):
    """
    Plain {transformers' name: tensor} -> {our name: tensor}. Names that are none of the family's stay. Old
    files of GPT-2 lack the prefix `transformer.`.
    """
    ours, rows = {}, {}
    for name, tensor in theirs.items():
        part, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part)
        if family is GPT2:
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
        elif block and block[2] in Q_K_V:
            rows.setdefault(f"transformer.h.{block[1]}.attn.c_attn.{kind}", {})[block[2]] = tensor
        elif block and block[2] in IN_BLOCK:
            ours[f"transformer.h.{block[1]}.{IN_BLOCK[block[2]]}.{kind}"] = tensor
        elif not name.endswith(FREQUENCIES):
            ours[f"{OUTSIDE.get(part, part)}.{kind}"] = tensor
    for name, parts in rows.items():
        if missing := set(Q_K_V) - parts.keys():
            raise ValueError(f"it has no {min(missing)} for {name}")
        ours[name] = torch.cat([parts[part] for part in Q_K_V])
    return ours


def their_weights(ours, config):
    """The inverse: {our name: tensor} -> {transformers' name: tensor}, without a tied head."""
    if config.tied_head:
        ours = {name: tensor for name, tensor in ours.items() if name != "lm_head.weight"}
    if family_of(config) is GPT2:
        return {
            name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()
            for name, tensor in with_biases(ours).items()
        }
    outside, inside = ({name: theirs for theirs, name in table.items()} for table in (OUTSIDE, IN_BLOCK))
    theirs = {}
    for name, tensor in ours.items():
        part, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", part)
        if not block:
            theirs[f"{outside[part]}.{kind}"] = tensor.contiguous()
        elif block[2] == "attn.c_attn":
            for names, rows in zip(Q_K_V, q_k_v(tensor, config), strict=True):
                theirs[f"model.layers.{block[1]}.{names}.{kind}"] = rows.clone()
        else:
            theirs[f"model.layers.{block[1]}.{inside[block[2]]}.{kind}"] = tensor.contiguous()
    return theirs


def for_gguf(ours, config):
    """
    {our name: tensor} -> {transformers' name: tensor} as llama.cpp computes with them. Its `llama` rotates
    neighbouring channels of a head, so the rows of Q and K are put in that order; its `gpt2` keeps matrices
    as torch does. Raises UserError for a scaling of rotary positions that llama.cpp has for `llama` alone.
    """
    family = family_of(config)
    if family is GPT2:
        kept = {name: tensor for name, tensor in with_biases(ours).items() if name != "lm_head.weight"}
        return kept if config.tied_head else {**kept, "lm_head.weight": ours["lm_head.weight"]}
    theirs = their_weights(ours, config)
    if family in (LLAMA, ARCEE):
        for name, tensor in theirs.items():
            if name.rpartition(".")[0].endswith(Q_K_V[:2]):
                theirs[name] = interleaved(tensor, config.head_channels)
    if config.rope_factor != 1:
        if family is not LLAMA:
            raise UserError(
                f"llama.cpp scales rotary positions (rope_factor={config.rope_factor}) of a llama alone, "
                f"and this is a {family.name}: export with --format=hf"
            )
        one = torch.ones(1)  # the position at which an angle is its frequency
        shapes = replace(config, rope_factor=1.0), config
        plain, scaled = (angles_of(one, config.head_channels, shape)[0] for shape in shapes)
        theirs["rope_freqs.weight"] = plain / scaled
    return theirs


def named_for_gguf(ours, config):
    """
    {our name: tensor} -> {llama.cpp's name: (transformers' name, tensor)}, as `for_gguf`. Needs gguf. Raises
    UserError.
    """
    import gguf

    family, found = family_of(config), {}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.name.upper()), config.n_layer)
    for theirs, tensor in for_gguf(ours, config).items():
        found[names.get_name(theirs, try_suffixes=(".weight", ".bias")) or theirs] = theirs, tensor
    return found


def from_gguf(theirs, config):
    """The inverse of `for_gguf`, without the factors of rotary positions."""
    family = family_of(config)
    if family is GPT2:
        return theirs  # our names, too
    if family in (LLAMA, ARCEE):
        for name, tensor in theirs.items():
            if name.rpartition(".")[0].endswith(Q_K_V[:2]):
                theirs[name] = in_halves(tensor, config.head_channels)
    return our_weights(theirs, family)


def interleaved(rows, size):
    """Rows of heads of `size` rows: the halves of a head, one after the other -> row by row in turn."""
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def in_halves(rows, size):
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def q_k_v(rows, config):
    """The rows of attn.c_attn, a weight or a bias -> those of Q, K and V."""
    heads = config.n_head, config.kv_heads, config.kv_heads
    return rows.split([count * config.head_channels for count in heads])


def with_biases(ours):
    """GPT-2's weights with a bias of zeros where they have none: it is the same model."""
    whole = dict(ours)
    for name, tensor in ours.items():
        if name.endswith(".weight") and not name.endswith(NOT_BIASED):
            bias = torch.zeros(tensor.size(0), dtype=tensor.dtype)
            whole.setdefault(name.removesuffix("weight") + "bias", bias)
    return whole
