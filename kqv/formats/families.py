"""
Model families as other programs know them: what transformers' config.json says of a model, and what of it
ours can be. One table for each family. Their weights are in renaming.py.
"""

import re
from dataclasses import asdict, dataclass, fields

from kqv.errors import UserError
from model import GPTConfig

# What the settings of all families after GPT-2 share.
MODERN = {
    "bias": False,
    "norm": "rmsnorm",
    "positions": "rotary",
    "activation": "swiglu",
    "qkv_bias": False,
    "qk_norm": False,
}

ROPE = ("rope_theta", "rope_factor", "rope_slow", "rope_fast", "rope_original")

ROPE_SCALING = {  # our field: the key in `rope_scaling` and `rope_parameters`
    "rope_factor": "factor",
    "rope_slow": "low_freq_factor",
    "rope_fast": "high_freq_factor",
    "rope_original": "original_max_position_embeddings",
}


@dataclass(frozen=True, eq=False)
class Family:
    """
    Models that transformers has one class for. `shape`: fields of GPTConfig that they share. `keys`: other
    fields -> (keys of config.json, the usual one first; the value where none is there). `fixed`: keys ->
    the values, the usual one first, with which our model computes the same.
    """

    name: str  # `model_type` in config.json, `general.architecture` in GGUF
    architecture: str  # the class in transformers
    shape: dict
    keys: dict
    fixed: dict

    def lacks(self, config):
        """The fields of a GPTConfig that a model of this family can't have so, {name: value}."""
        usual = {field.name: field.default for field in fields(GPTConfig)} | self.shape
        known = {*self.keys, "dropout", *(ROPE if self.shape.get("positions") == "rotary" else ())}
        if self is GPT2:
            known.add("bias")  # without biases it is the same model as with zeros
        found = {name: getattr(config, name) for name in usual if name not in known}
        if "n_kv_head" in found and config.kv_heads == config.n_head:
            del found["n_kv_head"]
        if "head_size" in found and config.head_channels * config.n_head == config.n_embd:
            del found["head_size"]
        return {name: value for name, value in found.items() if value != usual[name]}


def modern_keys(vocab, layers, heads, kv_heads, width, inner, context, eps, head_size=0):
    """The `keys` of a family after GPT-2; the arguments are transformers' values where a key is missing."""
    return {
        "vocab_size": (("vocab_size",), vocab),
        "block_size": (("max_position_embeddings",), context),
        "n_embd": (("hidden_size",), width),
        "n_layer": (("num_hidden_layers",), layers),
        "n_head": (("num_attention_heads",), heads),
        "n_kv_head": (("num_key_value_heads",), kv_heads),
        "head_size": (("head_dim",), head_size),
        "n_inner": (("intermediate_size",), inner),
        "norm_eps": (("rms_norm_eps",), eps),
        "tied_head": (("tie_word_embeddings",), False),
    }


NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}

SILU = {"hidden_act": ("silu", "swish")}

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    shape={"bias": True},
    keys={
        "vocab_size": (("vocab_size",), 50257),
        "block_size": (("n_positions", "max_position_embeddings"), 1024),
        "n_embd": (("n_embd", "hidden_size"), 768),
        "n_layer": (("n_layer", "num_hidden_layers"), 12),
        "n_head": (("n_head", "num_attention_heads"), 12),
        "n_inner": (("n_inner",), 0),
        "norm_eps": (("layer_norm_epsilon",), 1e-5),
        "tied_head": (("tie_word_embeddings",), True),
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function, two names
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": (None, {}),
    },
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    MODERN,
    modern_keys(32000, 32, 32, 0, 4096, 11008, 2048, 1e-6),
    {**SILU, **NO_BIAS},
)

# Read as Llama; written as Llama, too.
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    MODERN,
    modern_keys(32000, 32, 32, 8, 4096, 14336, 131072, 1e-6),
    {**SILU, "sliding_window": (None,)},
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    {**MODERN, "qkv_bias": True},
    modern_keys(151936, 32, 32, 32, 4096, 22016, 32768, 1e-6),
    SILU,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    {**MODERN, "qk_norm": True},
    modern_keys(151936, 32, 32, 32, 4096, 22016, 32768, 1e-6, head_size=128),
    {**SILU, "attention_bias": (False,)},
)

ARCEE = Family(
    "arcee",
    "ArceeForCausalLM",
    {**MODERN, "activation": "relu2"},
    modern_keys(32000, 32, 32, 0, 2560, 18432, 4096, 1e-5),
    {"hidden_act": ("relu2",), **NO_BIAS},
)

FAMILIES = {family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, ARCEE)}

DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")  # of GPT-2: three rates there, one here

# Keys that change what some model computes. Where a family does not know one, it must say "none".
COMPUTING = re.compile(
    r"window|expert|moe|softcap|rotary|rope|alibi|bias|quantization|sparse|multiplier|residual|"
    r"logit.*scal|logits_.*|attn_.*|attention_.*|.*_norm$|norm_type|layer_types|n_group|mtp|parallel_attn"
)

INERT = (*DROPOUTS, "attention_dropout", "max_window_layers", "attn_implementation", "_attn_implementation")

NONE = (None, False, 0, 1, {}, [], "eager", "sdpa", "flash_attention_2")


def family_in(config, source):
    """The Family that a config.json's content names. Raises UserError for another one."""
    name = config.get("model_type")
    by_class = {family.architecture: family for family in FAMILIES.values()}
    architectures = config.get("architectures") or ()
    named = [by_class.get(architecture) for architecture in architectures]
    family = FAMILIES.get(name, named[0] if named and name is None else GPT2 if name is None else None)
    if family is None or any(other not in (family, None) for other in named):
        what = f"model_type={name!r}, architectures={list(architectures)!r}"
        raise UserError(f"{source} is of another family ({what}): use a model of {', '.join(FAMILIES)}")
    if named and None in named:
        raise UserError(
            f"{source} is a {architectures[0]}, which is not {family.architecture}: use a model that "
            "predicts the next token"
        )
    return family


def family_of(config):
    """The Family of a GPTConfig. Raises UserError, which names the fields, where there is none."""
    written = [family for family in FAMILIES.values() if family is not MISTRAL]
    lacking = {family: family.lacks(config) for family in written}
    nearest = min(written, key=lambda family: len(lacking[family]))
    if lacking[nearest]:
        what = ", ".join(f"{name}={value}" for name, value in lacking[nearest].items())
        raise UserError(
            f"no model of other programs has this shape: the nearest, {nearest.name}, can't have {what}"
        )
    return nearest


def model_args_of(config, source):
    """
    A config.json's content -> the `model_args` of a GPT. Raises UserError, which names `source`, for another
    architecture and for a shape that is none, and TypeError or AttributeError for what is no config.
    """
    family = family_in(config, source)
    args = {**family.shape, **{ours: value_of(config, family, ours, source) for ours in family.keys}}
    for name, allowed in family.fixed.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{source} has {name}={config[name]!r} in its config.json, but kqv's {family.name} computes "
                f"as with {allowed[0]!r}: use a model with that"
            )
    if family.shape.get("positions") == "rotary":
        args |= rope_of(config, source)
    require_known(config, family, source)
    try:
        whole = asdict(GPTConfig(**args))
    except ValueError as error:
        raise UserError(f"{source} has in its config.json a shape that can't be: {error}") from None
    return {name: value for name, value in whole.items() if name != "dropout"}


def value_of(config, family, ours, source):
    """What a config.json's content says of one field of GPTConfig. Raises UserError."""
    names, default = family.keys[ours]
    given = {name: config[name] for name in names if name in config}
    given = {name: value for name, value in given.items() if value is not None or default != 0}
    for name, value in given.items():
        if type(default) is float and type(value) is int:
            value = given[name] = float(value)
        if type(value) is not type(default) or type(default) is int and value < 1 or value < 0:
            what = {int: "a whole number above 0", float: "a number", bool: "true or false"}[type(default)]
            raise UserError(f"{source} has {name}={value!r} in its config.json, not {what}")
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{source} has {both} in its config.json, two names of one number: keep one of them")
    return next(iter(given.values()), default)


def rope_of(config, source):
    """The rotary positions in a config.json, as transformers 5 writes them or as those before it."""
    given = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = given.pop("rope_type", given.pop("type", "default")) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", config.get("rope_theta", 10000.0))
    if "rope_theta" in config and config["rope_theta"] != theta:
        raise UserError(f"{source} has two values of rope_theta in its config.json: keep one of them")
    if given.get("partial_rotary_factor") in NONE:
        given.pop("partial_rotary_factor", None)
    wanted = sorted(ROPE_SCALING.values()) if kind == "llama3" else []
    if kind not in ("default", "llama3") or sorted(given) != wanted:
        raise UserError(
            f"{source} has rope_type={kind!r} with {', '.join(sorted(given)) or 'nothing'} in its "
            "config.json, but kqv knows 'default' and 'llama3' with all four of its numbers"
        )
    args = {"rope_theta": theta, **{ours: given[key] for ours, key in ROPE_SCALING.items() if given}}
    for name, value in args.items():
        if type(value) not in (int, float) or not 0 < value < 2**31:
            raise UserError(f"{source} has {ROPE_SCALING.get(name, name)}={value!r}, not a number above 0")
        args[name] = int(value) if name == "rope_original" else float(value)
    return args


def require_known(config, family, source):
    """Raise UserError for a key of config.json that changes what is computed, in a way that we don't know."""
    known = {name for names, _ in family.keys.values() for name in names} | {*family.fixed, *INERT}
    rope = ("rope_theta", "rope_scaling", "rope_parameters")
    known |= set(rope) if family.shape.get("positions") == "rotary" else set()
    if family in (QWEN2, QWEN3) and not config.get("use_sliding_window", False):
        known.add("sliding_window")
    for name, value in config.items():
        full = name == "layer_types" and set(value or ()) <= {"full_attention"}
        if name not in known and COMPUTING.search(name) and value not in NONE and not full:
            raise UserError(
                f"{source} has {name}={value!r} in its config.json, which kqv's {family.name} does not have: "
                "use a model without"
            )


def require_shape(weights, args, config, source):
    """Raise UserError, which names the key of config.json, where our weights are not of the shape `args`."""
    embedding = weights["transformer.wte.weight"]
    blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    sizes = {"vocab_size": len(embedding), "n_embd": embedding.size(-1), "n_layer": len(blocks)}
    if "transformer.wpe.weight" in weights:
        sizes["block_size"] = len(weights["transformer.wpe.weight"])
    if inner := {len(weights[name]) for name in weights if name.endswith("mlp.c_fc.weight")}:
        sizes["n_inner"] = max(inner)
    args = {**args, "n_inner": GPTConfig(**args).inner_channels}
    family = family_in(config, source)
    for ours, size in sizes.items():
        names, _ = family.keys[ours]
        name = next((name for name in names if name in config), None)
        if args[ours] != size:
            says = f"{name}={args[ours]}" if name else f"no {names[0]}, which means {args[ours]},"
            raise UserError(f"{source} has {says} in its config.json, but weights of {names[0]}={size}")


def config_of(config):
    """The inverse: a GPTConfig -> the architecture's part of config.json. Raises UserError."""
    family = family_of(config)
    found = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{name: allowed[0] for name, allowed in family.fixed.items() if allowed[0] is not None},
        **{names[0]: getattr(config, ours) for ours, (names, _) in family.keys.items()},
    }
    if family is GPT2:
        return {**found, "n_inner": config.n_inner or None, **dict.fromkeys(DROPOUTS, config.dropout)}
    sizes = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_channels,
        "intermediate_size": config.inner_channels,
        "attention_dropout": config.dropout,
    }
    scaling = None
    if config.rope_factor != 1:
        scaling = {key: getattr(config, ours) for ours, key in ROPE_SCALING.items()} | {"rope_type": "llama3"}
    rope = {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
    }
    return {**found, **sizes, **rope}
