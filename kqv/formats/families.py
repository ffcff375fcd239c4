"""
Model families as other programs know them: transformers' config.json <-> our GPTConfig, one table for each
family. Their weights are in renaming.py.

A config.json is read as transformers reads it: a key that is missing has the value that it has there. What
changes the numbers that a model computes is known here or refused, never ignored.
"""

import re
from dataclasses import asdict, dataclass, field, fields

from kqv.errors import UserError
from kqv.forms import Numbers, described, fits, shown
from model import GPTConfig

# What the shapes of all families after GPT-2 have in common; Llama's is just this.
MODERN = {
    "bias": False,
    "norm": "rmsnorm",
    "positions": "rotary",
    "activation": "swiglu",
    "qkv_bias": False,
    "qk_norm": False,
}

ROPE_SCALING = {  # our field: the key in `rope_scaling` and `rope_parameters`
    "rope_factor": "factor",
    "rope_slow": "low_freq_factor",
    "rope_fast": "high_freq_factor",
    "rope_original": "original_max_position_embeddings",
}

ROPE = ("rope_theta", *ROPE_SCALING)  # they mean something with rotary positions alone

# What a value in config.json must be, by the type of its field.
FORMS = {int: range(1, 2**31), float: Numbers(0, 1e30), bool: bool}

OPTIONAL = ("n_kv_head", "head_size", "n_inner")  # null for them means what 0 means in GPTConfig


@dataclass(frozen=True, eq=False)
class Family:
    """
    Models that transformers has one class for.

    `shape`: fields of GPTConfig that all of them have in common.
    `keys`: other fields -> (keys of config.json, the usual one first; the value where none is there).
    `fixed`: keys -> the values, the usual one first, with which our model computes the same.
    `missing`: keys -> what transformers takes where they are missing, if that is not what our model does.
    `inert`: keys that change nothing, though COMPUTING finds their names.
    """

    name: str  # `model_type` in config.json, `general.architecture` in GGUF
    architecture: str  # the class in transformers
    shape: dict
    keys: dict
    fixed: dict
    missing: dict = field(default_factory=dict)
    inert: tuple = ()

    def lacks(self, config):
        """The fields of a GPTConfig with which it is no model of this family, {name: value}."""
        free = {*self.keys, *ROPE, "dropout"}
        usual = {field.name: field.default for field in fields(GPTConfig) if field.name not in free}
        usual |= self.shape
        same = {  # a field with which the model computes as without it
            "n_kv_head": config.kv_heads == config.n_head,
            "head_size": config.head_channels * config.n_head == config.n_embd,
            "bias": self is GPT2,  # without biases it is the same as with zeros
            "qkv_bias": self is GPT2,
        }
        found = {name: getattr(config, name) for name in usual if not same.get(name)}
        return {name: value for name, value in found.items() if value != usual[name]}


def modern_keys(vocab, layers, heads, kv_heads, width, inner, context, eps, head_size=0):
    """The `keys` of a family after GPT-2; the arguments are the values without them."""
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


SILU = {"hidden_act": ("silu", "swish")}
QWENS = ("sliding_window", "max_window_layers")  # what use_sliding_window would do, which is refused

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
    },
    inert=("attn_pdrop",),
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    MODERN,
    modern_keys(32000, 32, 32, 0, 4096, 11008, 2048, 1e-6),
    SILU,
)

MISTRAL = Family(  # without a window it is a Llama, and is written as one
    "mistral",
    "MistralForCausalLM",
    MODERN,
    modern_keys(32000, 32, 32, 8, 4096, 14336, 131072, 1e-6),
    SILU,
    missing={"sliding_window": 4096},
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    {**MODERN, "qkv_bias": True},
    modern_keys(151936, 32, 32, 32, 4096, 22016, 32768, 1e-6),
    SILU,
    inert=QWENS,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    {**MODERN, "qk_norm": True},
    modern_keys(151936, 32, 32, 32, 4096, 22016, 32768, 1e-6, head_size=128),
    SILU,
    inert=QWENS,
)

ARCEE = Family(
    "arcee",
    "ArceeForCausalLM",
    {**MODERN, "activation": "relu2"},
    modern_keys(32000, 32, 32, 0, 2560, 18432, 4096, 1e-5),
    {"hidden_act": ("relu2",)},
)

FAMILIES = {family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, ARCEE)}

WRITTEN = [family for family in FAMILIES.values() if family is not MISTRAL]

# Names of keys that change what some model computes. Where they are none of the family's own, the value must
# be one that changes nothing: null, false, an empty list or dict, 0, or 1 for what is multiplied with.
COMPUTING = re.compile(
    r"window|expert|moe|softcap|rotary|rope|original_max|alibi|bias|quantization|sparse|multiplier|residual|"
    r"logit.*scal|logits_|attn_|attention_|_norm$|norm_type|layer_types|per_layer|n_group|mtp|parallel_attn|"
    r"pruned|clip|encoder_decoder|cross_attention"
)

FACTORS = re.compile(r"multiplier|scal|factor")

INERT = ("attention_dropout", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset")


def family_in(config, source):
    """
    The Family that a config.json's content, a dict, names by `model_type`, else by `architectures`; GPT-2 if
    it names none. Raises UserError for another one, and for a model with another head.
    """
    name, architectures = config.get("model_type"), config.get("architectures")
    what = f"model_type={shown(name)}, architectures={shown(architectures)}"
    named = architectures if isinstance(architectures, list) else [architectures] if architectures else []
    by_class = {family.architecture: family for family in FAMILIES.values()}
    of_classes = [by_class.get(architecture) for architecture in map(str, named)]
    of_name = FAMILIES.get(str(name)) if name else next(iter(of_classes), GPT2)
    if of_name is None or any(other not in (None, of_name) for other in of_classes):
        raise UserError(f"{source} is of another family ({what}): use a model of {', '.join(FAMILIES)}")
    if None in of_classes:
        raise UserError(
            f"{source} is no {of_name.architecture} ({what}): use a model that predicts the next token"
        )
    return of_name


def family_of(config):
    """The Family of a GPTConfig. Raises UserError, which names the fields, where there is none."""
    lacking = {family: family.lacks(config) for family in WRITTEN}
    nearest = min(WRITTEN, key=lambda family: len(lacking[family]))
    if lacking[nearest]:
        what = ", ".join(f"{name}={value}" for name, value in lacking[nearest].items())
        raise UserError(
            f"no model of other programs has this shape: the nearest, {nearest.name}, can't have {what}"
        )
    return nearest


def model_args_of(config, source):
    """
    A config.json's content -> the `model_args` of a GPT. Raises UserError, which names `source` and the key,
    for another architecture, for a shape that is none, and for what is no config.
    """
    if not isinstance(config, dict):
        raise UserError(f"{source} has in its config.json {shown(config)}, not {described(dict)}")
    family = family_in(config, source)
    require_known({**family.missing, **config}, family, source)
    args = {**family.shape, **{ours: value_of(config, family, ours, source) for ours in family.keys}}
    if family.shape.get("positions") == "rotary":
        args |= rope_of(config, source)
    try:
        whole = asdict(GPTConfig(**args))
    except ValueError as error:
        theirs = {**ROPE_SCALING, **{ours: names[0] for ours, (names, _) in family.keys.items()}}
        why = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise UserError(f"{source} has in its config.json a shape that can't be: {why}") from None
    return {name: value for name, value in whole.items() if name != "dropout"}


def value_of(config, family, ours, source):
    """
    What a config.json's content says of one field of GPTConfig, `ours`. Raises UserError where that is no
    value for it, and where two keys for it differ.
    """
    names, value = family.keys[ours]
    given = {name: config[name] for name in names if name in config}
    for name, other in given.items():
        value = 0 if other is None and ours in OPTIONAL else number(name, other, type(value), source)
        if value != next(iter(given.values())) and len(given) > 1:
            both = " and ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"{source} has {both} in its config.json, two names of one number: keep one of them"
            )
    return value


def number(name, value, kind, source):
    """A value of config.json as `kind`: int, float (it may be whole there) or bool. Raises UserError."""
    if not fits(value, FORMS[kind]):
        raise UserError(
            f"{source} has {name}={shown(value)} in its config.json, not {described(FORMS[kind])}"
        )
    return kind(value)


def rope_of(config, source):
    """
    The rotary positions in a config.json -> fields of GPTConfig. Before transformers 5 they are in
    `rope_theta` and `rope_scaling`, since then in `rope_parameters`; where both are, they must agree.
    """
    given = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    for part in ("rope_scaling", "rope_parameters"):
        values = config.get(part) or {}
        if not isinstance(values, dict):
            raise UserError(f"{source} has {part}={shown(values)} in its config.json, not {described(dict)}")
        for name, value in values.items():
            name = "rope_type" if name == "type" else name
            if given.setdefault(name, value) != value:
                raise UserError(f"{source} has two values of {name} in its config.json: keep one of them")
    kind, theta = given.pop("rope_type", "default"), given.pop("rope_theta", 10000.0)
    if given.get("partial_rotary_factor") in (None, 1):
        given.pop("partial_rotary_factor", None)
    wanted = sorted(ROPE_SCALING.values()) if kind == "llama3" else []
    if kind not in ("default", "llama3") or sorted(given) != wanted:
        raise UserError(
            f"{source} has rope_type={shown(kind)} with {shown(sorted(given))} in its "
            f"config.json, but kqv has 'default' alone and 'llama3' with {', '.join(ROPE_SCALING.values())}"
        )
    values = {"rope_theta": theta, **{ours: given[key] for ours, key in ROPE_SCALING.items() if given}}
    args = {}
    for ours, value in values.items():
        name = ROPE_SCALING.get(ours, ours)
        args[ours] = number(name, value, type(getattr(GPTConfig, ours)), source)
    return args


def require_known(config, family, source):
    """Raise UserError for a key of config.json that changes what is computed, in a way that we don't have."""
    known = {name for names, _ in family.keys.values() for name in names} | {*INERT, *family.inert}
    if family.shape.get("positions") == "rotary":
        known |= {"rope_theta", "rope_scaling", "rope_parameters"}
    for name, value in config.items():
        if name in family.fixed:
            right = value in family.fixed[name]
        else:
            right = name in known or not COMPUTING.search(name) or changes_nothing(name, value)
        if not right:
            raise UserError(
                f"{source} has {name}={shown(value)} in its config.json, which kqv's {family.name} does not "
                "have: use a model without"
            )


def changes_nothing(name, value):
    """Whether a model computes with this value of the key `name`, which COMPUTING finds, as without it."""
    if name == "layer_types" and isinstance(value, list):
        return all(kind == "full_attention" for kind in value)
    if type(value) in (int, float):
        return value == (1 if FACTORS.search(name) else 0)
    return value is None or value is False or value in ([], {})


def config_of(config):
    """
    The inverse of `model_args_of`: a GPTConfig -> the architecture's part of config.json, as transformers 5
    and those before it read it. Raises UserError where no family has that shape.
    """
    family = family_of(config)
    found = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{name: allowed[0] for name, allowed in family.fixed.items()},
        **{names[0]: getattr(config, ours) for ours, (names, _) in family.keys.items()},
    }
    if family is GPT2:
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        return {**found, "n_inner": config.n_inner or None, **dropouts}
    if family in (LLAMA, ARCEE) and config.n_embd % config.n_head:
        raise UserError(
            f"transformers has no {family.name} whose n_embd={config.n_embd} is not divisible by "
            f"n_head={config.n_head}, whatever its head_size: export with --format=gguf"
        )
    scaling = None
    if config.rope_factor != 1:
        scaling = {key: getattr(config, ours) for ours, key in ROPE_SCALING.items()} | {"rope_type": "llama3"}
    return {
        **found,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_channels,
        "intermediate_size": config.inner_channels,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
    }
