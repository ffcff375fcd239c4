"""Checkpoints on disk: saved atomically, loaded without running any code that is in them."""

import os
from pathlib import Path

import torch

from kqv import dataset, huggingface, tokenizer
from kqv.errors import UserError

NEWEST = "ckpt.pt"
BEST = "best.pt"


def save(path, contents):
    """
    Write `contents` (tensors and plain values) beside `path` and rename: a crash leaves the old file or the
    new one.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path):
    """
    A checkpoint of kqv or nanoGPT as a dict on the CPU: `model`, `model_args`, `config`, and more as it was
    saved.

    Only tensors and plain values are read (`weights_only`). Raises UserError for a file that is anything
    else.
    """
    path = Path(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train one, or name another with --out_dir") from None
    except OSError:
        raise
    except Exception as error:  # a torn or foreign file raises nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path} is damaged or not a checkpoint of kqv or nanoGPT: {reason}") from None
    if not isinstance(contents, dict) or not {"model", "model_args"} <= contents.keys():
        raise UserError(
            f"{path} is of another program: a checkpoint of kqv or nanoGPT has `model` and `model_args`"
        )
    contents["model"] = plain_names(contents["model"])
    return contents


def plain_names(weights):
    """
    Weights under the model's own names: without torch.compile's prefix and old nanoGPT's causal-mask buffers.
    """
    names = {name: name.removeprefix("_orig_mod.") for name in weights}
    return {plain: weights[name] for name, plain in names.items() if not plain.endswith(".attn.bias")}


def find(out_dir, which):
    """
    The path of a run's "best" or "newest" checkpoint (best falls back to newest), or of a file that `which`
    names.
    """
    if which not in ("best", "newest"):
        return Path(which)
    best, newest = Path(out_dir) / BEST, Path(out_dir) / NEWEST
    return best if which == "best" and best.exists() else newest


def load_start(source):
    """
    Weights to start from, in the form of a checkpoint: from `source`, a checkpoint file, a run's folder (its
    best), a Hugging Face folder with GPT-2's architecture, or gpt2, gpt2-medium, gpt2-large, gpt2-xl. Raises
    UserError where it is none.
    """
    path = Path(source)
    if source in huggingface.NAMES or (path / "config.json").exists():
        return huggingface.load(source)
    if not path.exists():
        known = ", ".join(("scratch", "resume", *huggingface.NAMES))
        raise UserError(f"init_from={source} is no file or folder, nor one of {known}")
    return load(find(path, "best") if path.is_dir() else path)


def tokenizer_of(contents):
    """
    A checkpoint's own tokenizer; for nanoGPT's, which carry none, that of the data folder it was trained on.
    """
    if "tokenizer" in contents:
        return tokenizer.from_json(contents["tokenizer"])
    name = contents.get("config", {}).get("dataset", "")
    folder = Path("data") / str(name)
    if name and (folder / "meta.pkl").exists() or (folder / "meta.json").exists():
        return dataset.read_meta(folder)[0]
    vocab_size = contents["model_args"].get("vocab_size")
    if vocab_size in (50257, 50304):
        return tokenizer.GPT2Tokenizer()
    raise UserError(
        f"the checkpoint has no tokenizer, nor has {folder} for its {vocab_size} ids: put its meta.pkl there"
    )
