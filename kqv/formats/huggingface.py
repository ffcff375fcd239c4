"""
GPT-2's weights as Hugging Face stores them <-> ours. Knows both sides' names and shapes, and nothing of the
model.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import torch

from kqv.errors import UserError, first_line
from kqv.formats import tokenizer_json

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


# Where weights may be, the best first: whole, or in parts that an index names.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


BESIDE = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")


# OpenAI's code keeps these matrices as (in, out), torch's nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


# What a GPT-2 config may say otherwise and the model here is always: (the default, its other spellings).
AS_TRAINED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function, two names
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}


EXPORTED = "exported_by"  # in config.json, so that a later export may take the folder's place


FILES = ("config.json", "generation_config.json", "model.safetensors", "README.md")


FILES += ("tokenizer.json", "tokenizer_config.json")


def load(source):
    """
    A folder in Hugging Face's form, or a model of the hub (one of NAMES, or ORG/NAME), as the contents of a
    checkpoint: `model`, `model_args`, `tokenizer`.

    Raises UserError where a package is missing, the hub is out of reach, or the folder holds another
    architecture.
    """
    try:
        from safetensors import SafetensorError
    except ImportError:
        raise UserError(
            "reading Hugging Face weights needs: pip install safetensors huggingface_hub"
        ) from None
    folder = local_folder(source)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model_args = {
            "block_size": config["n_positions"],
            "vocab_size": config["vocab_size"],
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "n_embd": config["n_embd"],
            "bias": True,
        }
        for name, allowed in {**AS_TRAINED, "n_inner": (None, 4 * config["n_embd"])}.items():
            if config.get(name, allowed[0]) not in allowed:
                raise UserError(
                    f"{source} is not GPT-2's architecture ({name} is {config[name]}, not {allowed[0]}): "
                    "use one that is"
                )
        weights = our_weights(read_weights(folder, source))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{source} is damaged or not GPT-2's architecture: {type(error).__name__} {error}"
        ) from None
    contents = {"model": weights, "model_args": model_args}
    rows = weights["lm_head.weight"]
    definition, order = tokenizer_json.from_huggingface(folder, config.get("eos_token_id", 50256), len(rows))
    if order:  # our ids are others: the rows of the embedding move with them
        weights["lm_head.weight"] = weights["transformer.wte.weight"] = rows[order]
    if definition is None and config["vocab_size"] == 50257:
        definition = {"kind": "gpt2"}
    if definition:
        contents["tokenizer"] = definition
    return contents


def local_folder(source):
    """A local folder, or that of a model on the hub (fetched once, kept in Hugging Face's cache)."""
    folder = Path(source)
    if (folder / "config.json").exists():
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder {source} with a config.json, and fetching it from the Hugging Face hub "
            "needs: pip install safetensors huggingface_hub"
        ) from None
    hub_id = f"openai-community/{source}" if source in NAMES else source
    try:
        for weights in ((*WEIGHTS, "model-*.safetensors"), (*OLD_WEIGHTS, "pytorch_model-*.bin")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*BESIDE, *weights]))
            if any((folder / name).exists() for name in weights):
                break
    except Exception as error:  # offline, refused, timed out: each library below has an error of its own
        raise UserError(
            f"{source} is no file or folder here, and can't be fetched from the Hugging Face hub "
            f"({first_line(error, 120)}): give a local folder with config.json and model.safetensors, "
            "as --init_from=FOLDER"
        ) from None
    if not (folder / "config.json").exists():
        raise UserError(
            f"{source} on the Hugging Face hub has no config.json: use a model in GPT-2's architecture"
        )
    return folder


def read_weights(folder, source):
    """{their name: tensor} of all files of a folder's weights."""
    found = next((name for name in (*WEIGHTS, *OLD_WEIGHTS) if (folder / name).exists()), None)
    if found is None:
        raise UserError(
            f"{source} has no {WEIGHTS[0]}, nor the weights in another form: load it with transformers' "
            "GPT2LMHeadModel.from_pretrained and save it with save_pretrained"
        )
    if not found.endswith(".json"):
        return read_part(folder / found, source)
    weights = {}
    for name in sorted(set(json.loads((folder / found).read_text("utf-8"))["weight_map"].values())):
        if Path(name).name != name or not (folder / name).exists():
            raise UserError(f"{source} lacks {name}, a part of its weights that {found} names: copy it there")
        weights |= read_part(folder / name, source)
    return weights


def read_part(path, source):
    """{name: tensor} of one file, which can hold nothing else."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has some to say of foreign pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file raises nearly anything
        raise UserError(
            f"{source} is damaged, or its {path.name} holds more than weights: {first_line(error)}"
        ) from None


def our_weights(theirs):
    """{their name: tensor} -> {our name: tensor}."""
    ours = {}
    for name, tensor in theirs.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old files carry the causal mask
        ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    ours["lm_head.weight"] = ours["transformer.wte.weight"]  # tied
    return ours


def their_weights(ours):
    """The inverse: {our name: tensor} -> {their name: tensor}, without the head, which is wte again."""
    return {
        name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()
        for name, tensor in with_biases(ours).items()
        if name != "lm_head.weight"
    }


def with_biases(ours):
    """Our weights with a bias of zeros wherever GPT-2 has one that they lack: it is the same model."""
    whole = dict(ours)
    for name, tensor in ours.items():
        if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
            bias = torch.zeros(tensor.size(0), dtype=tensor.dtype)
            whole.setdefault(name.removesuffix("weight") + "bias", bias)
    return whole


def save(folder, weights, shape, tokenizer, card):
    """
    Write `weights` (of ours) and their tokenizer into an empty folder, for `from_pretrained`; `shape` is the
    model's (a GPTConfig's fields) and `card` the text of its README. Raises UserError where a package is
    missing or the tokenizer has no counterpart.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("writing a Hugging Face folder needs: pip install safetensors") from None
    dtype = str(weights["lm_head.weight"].dtype).removeprefix("torch.")
    ids = {name: tokenizer.separator for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **{name: allowed[0] for name, allowed in AS_TRAINED.items()},
        "vocab_size": len(weights["lm_head.weight"]),
        "n_positions": shape["block_size"],
        "n_embd": shape["n_embd"],
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        **{name: shape["dropout"] for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")},
        **ids,
        "torch_dtype": dtype,
        EXPORTED: "kqv",
    }
    texts = tokenizer_json.to_huggingface(tokenizer, shape["block_size"])
    texts["config.json"] = tokenizer_json.to_text(config)
    texts["generation_config.json"] = tokenizer_json.to_text(ids)
    texts["README.md"] = card
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    try:
        save_file(their_weights(weights), folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it came for the owner alone
    except SafetensorError as error:  # a full disk, for one
        raise OSError(first_line(error)) from None


def is_our_export(folder):
    """Whether a folder holds what `save` wrote, and nothing else."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return EXPORTED in config and {path.name for path in folder.iterdir()} <= set(FILES)
    except (OSError, ValueError, TypeError):
        return False
