"""
A model as a Hugging Face folder, on disk or on the hub: read as the contents of a checkpoint, and written for
transformers. What differs there is in families.py (config.json) and renaming.py (weights).
"""

import re
import shutil
from pathlib import Path

import torch

from kqv.errors import UserError, first_line, is_out_of_memory
from kqv.files import read_json, require_file
from kqv.formats import families, renaming, tokenizer_json, tokenizer_reading, torch_files
from kqv.formats.card import card
from kqv.formats.checkpoint import plain_weights, shape_in, tie_head
from kqv.formats.precision import require_held
from kqv.formats.tensors import dense
from kqv.text.tokenizer_files import FILES as OF_TOKENIZER

HELP = "a Hugging Face folder"

SUFFIX = ""  # of its name

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Where weights may be, the best first: in one file, or in several that an index names.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")

BESIDE = (
    "config.json",
    "generation_config.json",
    *OF_TOKENIZER,
    *tokenizer_reading.OLD,
    *tokenizer_reading.OTHERS,
)

EXPORTED = "exported_by"  # this key in config.json says that a later export may replace the folder

FILES = ("config.json", "generation_config.json", "model.safetensors", "README.md")

FILES += OF_TOKENIZER


def load(source):
    """
    The contents of a checkpoint (`model`, `model_args`, `tokenizer`) from a Hugging Face folder or a model on
    the hub: one of NAMES, or ORG/NAME.

    Raises UserError if a package is missing, the hub is out of reach, the family is none of ours, or weights
    and config.json don't belong together.
    """
    try:
        from safetensors import SafetensorError
    except ImportError:
        raise UserError(
            "reading Hugging Face weights needs: pip install safetensors huggingface_hub"
        ) from None
    folder = local_folder(source)
    try:
        config = read_json(folder / "config.json")
        model_args = families.model_args_of(config, source)
        family = families.family_in(config, source)
        theirs = renaming.usual_names(plain_weights(read_weights(folder, source), source), family)
        renaming.require_shapes(theirs, shape_in(model_args), family.keys, source)
        weights = renaming.our_weights(theirs, family)
        tie_head(weights, source, model_args["tied_head"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{source} is damaged or no model of kqv's families: {type(error).__name__} {first_line(error)}"
        ) from None
    contents = {"model": weights, "model_args": model_args, "from_huggingface": str(source)}
    rows = len(weights["lm_head.weight"])
    definition = tokenizer_reading.from_huggingface(folder, config, rows)
    if definition is None and model_args["vocab_size"] == 50257:
        definition = {"kind": "gpt2"}
    if definition:
        contents["tokenizer"] = definition
    return contents


def local_folder(source):
    """The path of a local folder, or of a model on the hub, fetched once into Hugging Face's cache."""
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
    except Exception as error:  # offline, refused, timed out: each library underneath has its own error
        raise UserError(
            f"{source} is no file or folder here, and can't be fetched from the Hugging Face hub "
            f"({first_line(error, 120)}): give a local folder with config.json and model.safetensors, "
            "as --init_from=FOLDER"
        ) from None
    if not (folder / "config.json").exists():
        raise UserError(
            f"{source} on the Hugging Face hub has no config.json: use a model of "
            f"{', '.join(families.FAMILIES)}"
        )
    return folder


def read_weights(folder, source):
    """{transformers' name: tensor} from all files of a folder's weights. Raises UserError."""
    found = next((name for name in (*WEIGHTS, *OLD_WEIGHTS) if (folder / name).exists()), None)
    if found is None:
        raise UserError(
            f"{source} has no {WEIGHTS[0]}, nor the weights in another form: load it with transformers' "
            "AutoModelForCausalLM.from_pretrained and save it with save_pretrained"
        )
    if not found.endswith(".json"):
        return read_part(folder / found, source)
    places = read_json(folder / found)["weight_map"]  # {name: file}
    weights = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{source} lacks {file}, a part of its weights that {found} names: copy it there")
        for name, tensor in read_part(folder / file, source).items():
            if name in weights or places.get(name, file) != file:
                raise UserError(f"{source} has {name} in {file} and in another part: keep one of them")
            weights[name] = tensor
    if missing := sorted(places.keys() - weights.keys()):
        raise UserError(f"{source} lacks {missing[0]}, a weight that {found} names: save it again")
    return weights


def read_part(path, source):
    """{transformers' name: tensor} from one file; nothing but tensors is read. Raises UserError."""
    require_file(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: dense(tensor) for name, tensor in load_file(path).items()}
    try:
        with open(path, "rb") as file:
            weights = torch_files.load(file)
        if any(not isinstance(tensor, torch.Tensor) for tensor in weights.values()):
            raise ValueError("not every value is a tensor")
        return weights
    except UserError:
        raise
    except Exception as error:  # a damaged or foreign file can raise any error
        raise UserError(
            f"{source} is damaged, or its {path.name} holds more than weights: {first_line(error)}"
        ) from None


def save(folder, name, gpt, tokenizer, dtype, contents):
    """
    Write a folder for `from_pretrained`: the weights of `gpt` in `dtype`, one of DTYPES, their tokenizer, and
    a model card with `name` and what the checkpoint's `contents` say of the training. Raises UserError if a
    package is missing or the tokenizer can't be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("writing a Hugging Face folder needs: pip install safetensors") from None
    ids = tokenizer_json.ids_of_roles(tokenizer)
    config = {
        **families.config_of(gpt.config),
        **ids,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        EXPORTED: "kqv",
    }
    texts = {
        **tokenizer_json.to_huggingface(tokenizer, gpt.config.block_size),
        "config.json": tokenizer_json.to_text(config),
        "generation_config.json": tokenizer_json.to_text(ids),
        "README.md": card(name, gpt, tokenizer, contents),
    }
    folder.mkdir()
    for file, text in texts.items():
        (folder / file).write_text(text, "utf-8")
    weights = renaming.their_weights(gpt.state_dict(), gpt.config)
    for name, weight in weights.items():
        require_held(name, weight, dtype, DTYPES)
        weights[name] = weight.to(DTYPES[dtype])
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(first_line(error)) from None
    # save_file makes a file that only its owner can read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def is_ours(path):
    """Whether an export may replace `path`: a folder with nothing but what `save` wrote, or an empty one."""
    try:
        names = {file.name for file in path.iterdir()}
        if not names:
            return True
        return names <= set(FILES) and EXPORTED in read_json(path / "config.json")
    except (OSError, UserError, ValueError, TypeError, RecursionError):
        return False
