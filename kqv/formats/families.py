"""
A model family as other programs know it: what they call its weights and its settings, and what they keep in
another order. So far the one family is GPT-2's.

Our names of weights are those of transformers, so this table has what differs.
"""

import torch

from kqv.errors import UserError

ARCHITECTURE = "GPT2LMHeadModel"  # the class in transformers

LAYER_NORM_EPSILON = 1e-5  # nn.LayerNorm's default

# Field of GPTConfig: keys of transformers' config.json for it, the usual one first, and what it is without.
CONFIG_FIELDS = {
    "vocab_size": (("vocab_size",), 50257),
    "block_size": (("n_positions", "max_position_embeddings"), 1024),
    "n_embd": (("n_embd", "hidden_size"), 768),
    "n_layer": (("n_layer", "num_hidden_layers"), 12),
    "n_head": (("n_head", "num_attention_heads"), 12),
}

DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")  # three rates there, one here

# What a config.json may set and our model never varies: (our value, other spellings of it).
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function, two names
    "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}

# OpenAI's code stores these matrices as (in, out), torch's nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

NOT_BIASED = ("wte.weight", "wpe.weight", "lm_head.weight")


def model_args_of(config, source):
    """
    A config.json's content -> the `model_args` of a GPT. Raises UserError, which names `source`, for another
    architecture and for a shape that is none, and TypeError or AttributeError for what is no config.
    """
    args = {ours: shape_of(config, ours, source) for ours in CONFIG_FIELDS}
    for name, allowed in {**FIXED, "n_inner": (None, 4 * args["n_embd"])}.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{source} is not GPT-2's architecture ({name} is {config[name]}, not {allowed[0]}): "
                "use one that is"
            )
    return {**args, "bias": True}


def shape_of(config, ours, source):
    """What a config.json's content says of one field of GPTConfig. Raises UserError."""
    names, default = CONFIG_FIELDS[ours]
    given = {name: config[name] for name in names if name in config}
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{source} has {name}={value!r} in its config.json, not a whole number above 0")
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{source} has {both} in its config.json, two names of one number: keep one of them")
    return next(iter(given.values()), default)


def require_shape(weights, args, config, source):
    """Raise UserError, which names the key of config.json, where our weights are not of the shape `args`."""
    embedding, positions = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    sizes = {"vocab_size": len(embedding), "block_size": len(positions), "n_embd": embedding.size(-1)}
    for ours, size in {**sizes, "n_layer": len(blocks)}.items():
        names, _ = CONFIG_FIELDS[ours]
        name = next((name for name in names if name in config), None)
        if args[ours] != size:
            says = f"{name}={args[ours]}" if name else f"no {names[0]}, which means {args[ours]},"
            raise UserError(f"{source} has {says} in its config.json, but weights of {names[0]}={size}")


def config_of(model_args):
    """The inverse: a GPT's `model_args` -> the architecture's part of config.json."""
    return {
        "architectures": [ARCHITECTURE],
        **{name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None},
        "tie_word_embeddings": True,
        **{theirs: model_args[ours] for ours, ((theirs, *_), _) in CONFIG_FIELDS.items()},
        **dict.fromkeys(DROPOUTS, model_args["dropout"]),
    }


def our_weights(theirs):
    """Plain {transformers' name: tensor} -> {our name: tensor}. Old files lack the prefix `transformer.`."""
    ours = {}
    for name, tensor in theirs.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
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
