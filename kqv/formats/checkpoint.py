"""
Checkpoints of one file: their names in a run's folder, how they are written, and how they are read without
running any code that is in them.
"""

from dataclasses import fields
from pathlib import Path

import torch

from kqv.errors import UserError, first_line
from kqv.files import replacing, require_file
from kqv.formats import torch_files
from model import GPTConfig

NEWEST = "ckpt.pt"

PREVIOUS = "ckpt.prev.pt"  # what ckpt.pt was before

BEST = "best.pt"  # of the lowest validation loss

REST = "rest.pt"  # in the folder of a sharded model's checkpoint, see kqv/formats/sharded.py

# Parts of weights' names that wrappers add: torch.compile, DistributedDataParallel, FSDP, recomputation.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

MASKS = (".attn.bias", ".attn.masked_bias")  # not weights: old files carry the causal mask

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"  # one tensor

ONLY_TO_TRAIN = ("optimizer", "scaler")  # best.pt has all but these


def save(path, contents):
    """
    Write `contents`, a dict of tensors and plain values, to the file `path`. After a crash at any moment the
    file is the old one or the new one, whole. torch.save stores a CRC-32 of every record; `read` checks it.
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

    Only plain values and tensors are read, each tensor as `tensors.dense` says, and every record's checksum
    is checked. Raises UserError for a file that is missing, damaged or anything else.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name it as --out_dir, or a file with --checkpoint")
    require_file(path)
    try:
        with open(path, "rb") as file:
            return torch_files.load(file, mapped=path if mapped else None)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train one, or name another with --out_dir") from None
    except (UserError, UnicodeEncodeError):  # torch can't map a file whose name is no UTF-8
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


def shape_in(args):
    """The GPTConfig in a checkpoint's `model_args`; names that are no part of a shape are ignored."""
    known = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**{name: value for name, value in args.items() if name in known})


def plain_weights(weights, source):
    """
    The weights {name: tensor} of `source` under the model's own names, without what torch.compile and the
    wrappers of many processes put before and into them. Causal masks, which old files have, are left out.
    Raises UserError for two weights of one name, and for whole numbers, as quantised weights are.
    """
    plain = {}
    for name, tensor in weights.items():
        ours = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if ours.endswith(MASKS):
            continue
        if ours in plain:
            raise UserError(f"{source} has two weights {ours}, one of them as {name}: keep one")
        if not tensor.is_floating_point():
            raise UserError(
                f"the weight {name} of {source} is of {tensor.dtype}, as of a quantised model: use the model "
                "before it was quantised"
            )
        plain[ours] = tensor
    require_own_memory(plain, source)
    return plain


def require_own_memory(weights, source):
    """Raise UserError where two weights are one in memory, but for the embedding and the head."""
    owners = {}
    for name, tensor in weights.items():
        owner = owners.setdefault(tensor.data_ptr(), name)
        if tensor.numel() and owner != name and {owner, name} != {EMBEDDING, HEAD}:
            raise UserError(
                f"{source} has one tensor as {owner} and as {name}: save a clone() as one of them"
            )


def tie_head(weights, source, tied):
    """
    Where they are `tied`, let the embedding and the head of plain weights be one tensor, as in the model:
    a file may have only one of them, or both with the same numbers. Raises UserError where they differ, and
    where one is missing that is not tied.
    """
    if tied is False:
        if missing := [name for name in (EMBEDDING, HEAD) if name not in weights]:
            raise UserError(
                f"{source} has tie_word_embeddings=false, but no {missing[0]}: set it to true if the head is "
                "the embedding"
            )
        if weights[EMBEDDING].data_ptr() == weights[HEAD].data_ptr():
            weights[HEAD] = weights[HEAD].clone()
        return
    one = weights.get(EMBEDDING, weights.get(HEAD))
    other = weights.get(HEAD, one)
    if one is None:
        return
    alike = one.shape == other.shape and one.dtype == other.dtype
    if not alike or not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
        raise UserError(
            f"{source} has a {HEAD} that differs from its {EMBEDDING}, but says that the two are tied: set "
            "tie_word_embeddings to false if they are not"
        )
    weights[EMBEDDING] = weights[HEAD] = one
