"""
A model family as other programs know it: what they call its weights and its settings, and what they keep in
another order. So far the one family is GPT-2's.

Our names of weights are those of transformers, so this table has what differs.
"""

import torch

from kqv.errors import UserError

ARCHITECTURE = "GPT2LMHeadModel"  # the class in transformers


LAYER_NORM_EPSILON = 1e-5  # nn.LayerNorm's default


# Key of transformers' config.json: field of GPTConfig.
CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}


DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")  # three rates there, one here


# What a config.json may set and our model never varies: (our value, other spellings of it).
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function, two names
    "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}


# OpenAI's code stores these matrices as (in, out), torch's nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


MASKS = (".attn.bias", ".attn.masked_bias")  # not weights: old files carry the causal mask


NOT_BIASED = ("wte.weight", "wpe.weight", "lm_head.weight")


def model_args_of(config, source):
    """
    A config.json's content -> the `model_args` of a GPT. Raises UserError, which names `source`, for another
    architecture, and KeyError, TypeError or AttributeError for what is no config.
    """
    fixed = {**FIXED, "n_inner": (None, 4 * config["n_embd"])} if "n_embd" in config else FIXED
    for name, allowed in fixed.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{source} is not GPT-2's architecture ({name} is {config[name]}, not {allowed[0]}): "
                "use one that is"
            )
    return {ours: config[theirs] for theirs, ours in CONFIG_FIELDS.items()} | {"bias": True}


def config_of(model_args):
    """The inverse: a GPT's `model_args` -> the architecture's part of config.json."""
    return {
        "architectures": [ARCHITECTURE],
        **{name: allowed[0] for name, allowed in FIXED.items()},
        **{theirs: model_args[ours] for theirs, ours in CONFIG_FIELDS.items()},
        **dict.fromkeys(DROPOUTS, model_args["dropout"]),
    }


def our_weights(theirs):
    """{transformers' name: tensor} -> {our name: tensor}. Old files lack the prefix `transformer.`."""
    ours = {}
    for name, tensor in theirs.items():
        if name.endswith(MASKS):
            continue
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    ours["lm_head.weight"] = ours["transformer.wte.weight"]  # tied
    return ours


def their_weights(ours):
    """The inverse: {our name: tensor} -> {transformers' name: tensor}, without the tied head."""
    return {
        name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()
        for name, tensor in with_biases(ours).items()
        if name != "lm_head.weight"
    }


def with_biases(ours):
    """Our weights with a bias of zeros wherever GPT-2 has a bias and they have none: it is the same model."""
    whole = dict(ours)
    for name, tensor in ours.items():
        if name.endswith(".weight") and not name.endswith(NOT_BIASED):
            bias = torch.zeros(tensor.size(0), dtype=tensor.dtype)
            whole.setdefault(name.removesuffix("weight") + "bias", bias)
    return whole
