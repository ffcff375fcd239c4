"""
GPT-2's weights as Hugging Face stores them -> ours. Knows both sides' names and shapes, and nothing of the
model.
"""

import json
from pathlib import Path

from kqv.errors import UserError, first_line

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "model.safetensors")
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


def load(source):
    """
    A folder in Hugging Face's form, or one of NAMES, as the contents of a checkpoint: `model`, `model_args`,
    `tokenizer`.

    Raises UserError where a package is missing, the hub is out of reach, or the folder holds another
    architecture.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(
            "reading Hugging Face weights needs: pip install safetensors huggingface_hub"
        ) from None
    config_path, weights_path = (local_file(source, name) for name in FILES)
    try:
        config = json.loads(config_path.read_text("utf-8"))
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
        contents = {"model": our_weights(load_file(weights_path)), "model_args": model_args}
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{source} is damaged or not GPT-2's architecture: {type(error).__name__} {error}"
        ) from None
    if config["vocab_size"] == 50257:
        contents["tokenizer"] = {"kind": "gpt2"}
    return contents


def local_file(source, name):
    """
    The path of one file of a local folder or of a model on the hub (fetched once, kept in Hugging Face's
    cache).
    """
    if (Path(source) / "config.json").exists():
        path = Path(source) / name
        if not path.exists():
            raise UserError(
                f"{source} has no {name}, the weights in one file: load it with transformers' "
                "GPT2LMHeadModel.from_pretrained and save it with save_pretrained"
            )
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"fetching {source} needs: pip install safetensors huggingface_hub") from None
    try:
        return Path(hf_hub_download(f"openai-community/{source}", name))
    except Exception as error:  # offline, refused, timed out: each library below has an error of its own
        raise UserError(
            f"cannot fetch {source} from the Hugging Face hub ({first_line(error, 120)}): give a local "
            "folder with config.json and model.safetensors, as --init_from=FOLDER"
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
