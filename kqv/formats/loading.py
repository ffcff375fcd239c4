"""From the name of a run, a checkpoint, a folder or a model on the hub to its weights and tokenizer."""

from dataclasses import dataclass, replace
from pathlib import Path

from kqv.errors import UserError, warn
from kqv.formats import huggingface
from kqv.formats.checkpoint import BEST, NEWEST, PREVIOUS, REST, is_checkpoint, plain_names, read
from kqv.settings import setting
from kqv.text import dataset, tokenizers
from model import GPT, GPTConfig


@dataclass(frozen=True)
class WeightsSettings:
    """Which weights"""

    out_dir: str = setting("out", "the folder of a training run")
    checkpoint: str = setting("best", "best (lowest validation loss), newest, or the path of a file")
    init_from: str = setting(
        "resume", "resume: from out_dir; or gpt2, gpt2-medium|large|xl, a Hugging Face folder"
    )


def load(path, mapped=False):
    """
    A checkpoint of kqv or nanoGPT as a dict on the CPU: `model`, `model_args`, `config`, and more as it was
    saved. Of a sharded model's, `model` is whole, and `folder` stands for the `optimizer` that is in parts.
    `mapped`: of a file, only what is used takes memory.

    Only tensors and plain values are read (`weights_only`). Where ckpt.pt is torn or missing and its
    predecessor is whole, that one is returned, with a warning. Raises UserError for a file that is anything
    else.
    """
    path = Path(path)
    try:
        return load_file(path, mapped)
    except UserError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != NEWEST or not previous.exists():
            raise
        contents = load_file(previous, mapped)
        warn(f"{error}; using {previous}, of step {contents.get('iter_num', 'unknown')}")
        return contents


def load_file(path, mapped):
    if (path / REST).is_file():
        contents = load_folder(path)
    else:
        contents = read(path, mapped)
    if not is_checkpoint(contents):
        raise UserError(
            f"{path} is of another program: a checkpoint of kqv or nanoGPT has `model` and `model_args`"
        )
    contents["model"] = plain_names(contents["model"])
    return contents


def load_folder(path):
    """The contents of a sharded model's checkpoint. Raises UserError."""
    from kqv.formats import sharded

    rest = read(path / REST)
    sharded.require_metadata(path, rest.pop("metadata_sha256", None))
    return {**rest, "model": sharded.load_full(path, "model"), "folder": path}


def find(out_dir, which):
    """
    The path of a run's "best" or "newest" checkpoint (best falls back to newest), or of a file that `which`
    names.
    """
    if which not in ("best", "newest"):
        return Path(which)
    best, newest = Path(out_dir) / BEST, Path(out_dir) / NEWEST
    return best if which == "best" and best.exists() else newest


def load_chosen(config):
    """(name, contents) of the weights that the settings `init_from`, or `out_dir` and `checkpoint`, name."""
    if config.init_from != "resume":
        return config.init_from, load_start(config.init_from)
    path = find(config.out_dir, config.checkpoint)
    return path, load(path)


def load_start(source):
    """
    Weights to start from, in the form of a checkpoint: from `source`, a checkpoint file, a run's folder (its
    best), a Hugging Face folder with GPT-2's architecture, or a model on the Hugging Face hub: gpt2,
    gpt2-medium, gpt2-large, gpt2-xl or ORG/NAME. Raises UserError where it is none.
    """
    path = Path(source)
    on_hub = source in huggingface.NAMES or (huggingface.HUB_ID.fullmatch(source) and not path.exists())
    if on_hub or (path / "config.json").exists():
        return huggingface.load(source)
    if not path.exists():
        known = ", ".join(("scratch", "resume", *huggingface.NAMES))
        raise UserError(f"init_from={source} is no file or folder, nor one of {known}")
    return load(find(path, "best") if path.is_dir() and not (path / REST).exists() else path)


def model_of(contents, path, dropout=None):
    """
    The GPT of a checkpoint's contents (`model`, `model_args`); `dropout`, if given, in place of its own.
    Raises UserError, which names `path`, where the contents are not those of a GPT.
    """
    try:
        config = GPTConfig.from_args(contents["model_args"])
        if dropout is not None:
            config = replace(config, dropout=dropout)
        return GPT.from_weights(config, contents["model"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no weights of a GPT: {error}") from None


def tokenizer_of(contents):
    """
    A checkpoint's own tokenizer; for nanoGPT's, which carry none, that of the data folder it was trained on.
    """
    definition = contents.get("tokenizer")
    if isinstance(definition, dict) and definition.get("kind") == "foreign":  # of a Hugging Face folder
        raise UserError(f"{definition['why']}: use a model with a byte-level BPE, as GPT-2's")
    if "tokenizer" in contents:
        return tokenizers.from_json(definition)
    folder = Path("data") / str(contents.get("config", {}).get("dataset", "unnamed"))
    if any((folder / name).exists() for name in ("meta.json", "meta.pkl")):
        return dataset.read_meta(folder)[0]
    vocab_size = contents["model_args"].get("vocab_size")
    if vocab_size in (50257, 50304):
        return tokenizers.GPT2Tokenizer()
    raise UserError(
        f"the checkpoint has no tokenizer, nor has {folder} for its {vocab_size} ids: put its meta.pkl there"
    )
