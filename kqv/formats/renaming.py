"""
The names and the order of weights in transformers -> ours, and back.

Our names are those of GPT-2 there. The families that came after it have names in common, and keep the rows of
Q, K and V in three matrices.
"""

import re

import torch

from kqv.formats.families import GPT2, family_of

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
