"""
The names and the order of weights in transformers -> ours, and back; and as llama.cpp computes with them.

Our names are those of GPT-2 there. The families that came after it have names in common, and keep the rows of
Q, K and V in three matrices.

Shapes: C = n_embd channels, nh heads of queries, nkv heads of keys and values, hs head size.
"""

import re
from dataclasses import replace

import torch

from kqv.errors import UserError
from kqv.formats import size
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

HEAD = {"lm_head.weight"}

IN_LAYER = re.compile(r"^(transformer\.h\.|model\.layers\.)(\d+)\.")

NOT_WEIGHTS = ".rotary_emb.inv_freq"  # old files carry the angles

# A part of transformers' names of weights -> the fields of GPTConfig that make their shapes.
MADE_OF = {
    "attn.": ("n_embd", "n_head", "n_kv_head", "head_size"),
    "mlp.": ("n_embd", "n_inner"),
    "wpe.": ("block_size", "n_embd"),
    "norm.": ("n_embd",),
    "ln_": ("n_embd",),
    "": ("vocab_size", "n_embd"),
}


def usual_names(theirs, family):
    """
    Plain {transformers' name: tensor} without what is no weight, and with the prefix `transformer.` that old
    files of GPT-2 lack.
    """
    usual = {name: tensor for name, tensor in theirs.items() if not name.endswith(NOT_WEIGHTS)}
    if family is not GPT2:
        return usual
    whole = ("transformer.", "lm_head.")
    return {name if name.startswith(whole) else f"transformer.{name}": usual[name] for name in usual}


def require_shapes(theirs, config, keys, source):
    """
    Raise UserError unless {transformers' usual name: tensor} are the weights, of the right shapes, of a model
    of that GPTConfig. `keys` are those of its family, for the message. Whether there is a head is left to
    `checkpoint.tie_head`.
    """
    layers = {match[2] for match in map(IN_LAYER.match, theirs) if match}
    if len(layers) != config.n_layer:
        key = keys["n_layer"][0][0]
        raise UserError(f"{source} has {key}={config.n_layer}, but weights of {key}={len(layers)}")
    planned = their_weights(size.plan(config, n_layer=1).state_dict(), config)
    first = {name: tuple(tensor.shape) for name, tensor in planned.items()}
    in_layer = {name for name in first if IN_LAYER.match(name)}
    needed = first.keys() - in_layer
    needed |= {IN_LAYER.sub(rf"\g<1>{layer}.", name) for name in in_layer for layer in range(config.n_layer)}
    if missing := sorted(needed - theirs.keys() - HEAD):
        raise UserError(f"{source} lacks the weight {missing[0]}, which its config.json means it to have")
    if others := sorted(theirs.keys() - needed - HEAD):
        raise UserError(
            f"{source} has a weight {others[0]}, which no model has that is as its config.json says"
        )
    for name, tensor in theirs.items():
        shape, wanted = tuple(tensor.shape), first.get(IN_LAYER.sub(r"\g<1>0.", name))
        if wanted and shape != wanted:
            fields = next(MADE_OF[part] for part in MADE_OF if part in name)
            says = ", ".join(
                f"{keys[field][0][0]}={getattr(config, field)}" for field in fields if field in keys
            )
            raise UserError(
                f"{source} has a weight {name} of shape {shape}, but its config.json has {says}, "
                f"which make it {wanted}: they belong to different models"
            )


def our_weights(theirs, family):
    """
    {transformers' usual name: tensor} -> {our name: tensor}. Weights that the family doesn't have keep their
    names. Raises ValueError where a layer lacks a part of Q, K and V.
    """
    if family is GPT2:
        return {
            name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
            for name, tensor in theirs.items()
        }
    ours, rows = {}, {}
    for name, tensor in theirs.items():
        part, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part)
        if block and block[2] in Q_K_V:
            rows.setdefault(f"transformer.h.{block[1]}.attn.c_attn.{kind}", {})[block[2]] = tensor
        elif block and block[2] in IN_BLOCK:
            ours[f"transformer.h.{block[1]}.{IN_BLOCK[block[2]]}.{kind}"] = tensor
        else:
            ours[f"{OUTSIDE.get(part, part)}.{kind}"] = tensor
    for name, parts in rows.items():
        if missing := set(Q_K_V) - parts.keys():
            raise ValueError(f"it has no {min(missing)} for {name}")
        ours[name] = torch.cat([parts[part] for part in Q_K_V])  # ((nh + 2 nkv) hs, C), or without C: a bias
    return ours


def their_weights(ours, config):
    """
    The inverse: {our name: tensor} of a GPTConfig -> {transformers' name: tensor}, without a tied head.
    Raises UserError where no family has that shape.
    """
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
    {our name: tensor} of a GPTConfig -> {transformers' name: tensor} as llama.cpp computes with them. Its
    `llama` and `arcee` rotate neighbouring channels of a head, so the rows of Q and K are put in that order.
    Its `gpt2` keeps matrices as torch does. Raises UserError where llama.cpp has no scaling of rotary
    positions, and where no family has that shape.
    """
    family = family_of(config)
    if family is GPT2:
        kept = {name: tensor for name, tensor in with_biases(ours).items() if name not in HEAD}
        return kept if config.tied_head else {**kept, "lm_head.weight": ours["lm_head.weight"]}
    theirs = their_weights(ours, config)
    if family in (LLAMA, ARCEE):
        for name, tensor in theirs.items():
            if name.rpartition(".")[0].endswith(Q_K_V[:2]):
                theirs[name] = interleaved(tensor, config.head_channels)
    if config.rope_factor != 1:
        if family not in (LLAMA, ARCEE):
            raise UserError(
                f"llama.cpp has no {family.name} with scaled rotary positions "
                f"(rope_factor={config.rope_factor:g}): export with --format=hf"
            )
        theirs["rope_freqs.weight"] = frequency_factors(config)
    return theirs


def frequency_factors(config):
    """What a GPTConfig's scaling of rotary positions divides each frequency by, (hs / 2,)."""
    plain, scaled = (frequencies(shape) for shape in (replace(config, rope_factor=1.0), config))
    return plain / scaled


def frequencies(config):
    """The angles (hs / 2,) by which the pairs of channels turn from one position to the next."""
    return angles_of(torch.ones(1), config.head_channels, config)[0]


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
    """
    Rows of heads (nh hs, ...) of `size` = hs rows each, whose rows i and i + hs / 2 rotate together -> the
    same rows in the order 0, hs / 2, 1, hs / 2 + 1, ...: neighbours rotate together, as in Su et al. 2021.
    """
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def in_halves(rows, size):
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def q_k_v(rows, config):
    """The rows of attn.c_attn, ((nh + 2 nkv) hs, ...) -> those of Q (nh hs, ...), K and V (nkv hs, ...)."""
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
