"""
Checkpoints on disk: saved atomically and without stalling, loaded without running any code that is in them.
"""

import os
import warnings
import zipfile
from pathlib import Path

import torch

from kqv.errors import UserError, first_line
from kqv.files import remove, sync

NEWEST = "ckpt.pt"


PREVIOUS = "ckpt.prev.pt"


BEST = "best.pt"


REST = "rest.pt"  # in a folder that a sharded model's checkpoint is: see kqv/sharded.py


ONLY_TO_TRAIN = ("optimizer", "scaler")  # what best.pt leaves out


def save(path, contents):
    """
    Write `contents` (tensors and plain values) beside `path`, then rename: a crash at any byte leaves a file
    that is whole. ckpt.pt's predecessor stays as ckpt.prev.pt. torch.save stores a CRC-32 of every record,
    which `load` checks.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def put_in_place(beside, path):
    """Rename `beside`, a whole file or folder, to `path`; ckpt.pt's predecessor stays as ckpt.prev.pt."""
    earlier = path.with_name(PREVIOUS if path.name == NEWEST else f".{path.name}.old")
    if path.exists() and (path.name == NEWEST or path.is_dir() or beside.is_dir()):
        remove(earlier)
        os.replace(path, earlier)
    os.replace(beside, path)
    sync(path.parent)
    if earlier.name != PREVIOUS:
        remove(earlier)


def read(path, mapped=False):
    """What torch.save wrote into a file, with its checksums checked. Raises UserError."""
    try:
        path.open("rb").close()  # what the system refuses is no damage to the file
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train one, or name another with --out_dir") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name it as --out_dir, or a file with --checkpoint") from None
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if torn := archive.testzip():
                    raise UserError(f"{path} is damaged: the checksum of its record {torn} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has some to say of foreign pickles
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except UserError:
        raise
    except Exception as error:  # a torn or foreign file raises nearly anything
        raise UserError(
            f"{path} is damaged or not a checkpoint of kqv or nanoGPT: {first_line(error)}"
        ) from None


def is_checkpoint(contents):
    """Whether a loaded object has a checkpoint's form; whether its weights fit is for the model to say."""
    if not isinstance(contents, dict):
        return False
    parts = (contents.get("model"), contents.get("model_args"), contents.get("config", {}))
    return all(isinstance(part, dict) for part in parts) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in parts[0].items()
    )


def plain_names(weights):
    """
    Weights under the model's own names: without torch.compile's prefix and old nanoGPT's causal-mask buffers.
    """
    names = {name: name.removeprefix("_orig_mod.") for name in weights}
    return {plain: weights[name] for name, plain in names.items() if not plain.endswith(".attn.bias")}
