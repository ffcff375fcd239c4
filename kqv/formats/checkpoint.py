"""
Checkpoints of one file: their names in a run's folder, how they are written, and how they are read without
running any code that is in them.
"""

import warnings
import zipfile
from pathlib import Path

import torch

from kqv.errors import UserError, first_line
from kqv.files import replacing

NEWEST = "ckpt.pt"


PREVIOUS = "ckpt.prev.pt"  # what ckpt.pt was before


BEST = "best.pt"  # of the lowest validation loss


REST = "rest.pt"  # in the folder of a sharded model's checkpoint, see kqv/formats/sharded.py


ONLY_TO_TRAIN = ("optimizer", "scaler")  # best.pt has all but these


def save(path, contents):
    """
    Write `contents`, a dict of tensors and plain values, to the file `path`. A crash at any moment leaves the
    file as it was before or as it is to be. torch.save stores a CRC-32 of every record, which `read` checks.
    """
    path = Path(path)
    with replacing(path, previous_of(path)) as beside, open(beside, "wb") as file:
        torch.save(contents, file)


def previous_of(path):
    """Where a replaced checkpoint is kept: ckpt.pt as ckpt.prev.pt, others nowhere (None)."""
    return path.with_name(PREVIOUS) if path.name == NEWEST else None


def read(path, mapped=False):
    """
    What torch.save wrote to the file `path` (a Path), on the CPU. `mapped`: only what is used takes memory.

    Only tensors and plain values are read (`weights_only`), and every record's checksum is checked. Raises
    UserError for a file that is missing, damaged or anything else.
    """
    try:
        path.open("rb").close()  # a file that can't be opened is not a damaged file
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
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except UserError:
        raise
    except Exception as error:  # a damaged or foreign file can raise any error
        raise UserError(
            f"{path} is damaged or not a checkpoint of kqv or nanoGPT: {first_line(error)}"
        ) from None


def is_checkpoint(contents):
    """Whether a loaded object has a checkpoint's form; GPT.from_weights checks whether its weights fit."""
    if not isinstance(contents, dict):
        return False
    parts = (contents.get("model"), contents.get("model_args"), contents.get("config", {}))
    return all(isinstance(part, dict) for part in parts) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in parts[0].items()
    )


def plain_names(weights):
    """
    Weights under the model's own names, without torch.compile's prefix. Causal masks, which old nanoGPT saved
    as buffers, are left out.
    """
    names = {name: name.removeprefix("_orig_mod.") for name in weights}
    return {plain: weights[name] for name, plain in names.items() if not plain.endswith(".attn.bias")}
