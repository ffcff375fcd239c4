"""
The base of a checkpoint that holds only an adapter (kqv/formats/lora.py): the weights that it was trained on.

Such a checkpoint says in `base` which those are: {"source": what train.py's --init_from named, "sha256": that
of the weights, as `sha256_of` computes it, "alpha": LoRA's}.
"""

import hashlib
import re

from kqv.errors import UsageError, UserError
from kqv.formats.checkpoint import EMBEDDING, HEAD
from kqv.forms import Numbers

ALPHA = Numbers(1e-6, 1e6)

FORM = {"source": re.compile("[^\0]{1,4096}"), "sha256": re.compile("[0-9a-f]{64}"), "alpha": ALPHA}

SHOWN = 12  # digits of a hash


def sha256_of(weights):
    """
    The SHA-256 of plain weights {name: tensor}: of their names in order, shapes, and numbers in float32. So
    it is the same whatever file they come from. A head that is the embedding does not count.
    """
    digest = hashlib.sha256()
    tied = {HEAD, EMBEDDING} <= weights.keys() and weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr()
    for name in sorted(weights.keys() - {HEAD} if tied else weights):
        tensor = weights[name].detach().float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy())
    return digest.hexdigest()


def require_whole(contents, source, way_out):
    """Raise UserError where a checkpoint's contents are those of an adapter, which can't be a base."""
    if "base" in contents:
        raise UserError(f"{source} holds an adapter, not whole weights: {way_out}")


def require_same(contents, source, sha256, adapter):
    """Raise UserError where the weights of `source` are not those of that SHA-256, the base of `adapter`."""
    if (found := sha256_of(contents["model"])) != sha256:
        raise UserError(
            f"{source} is not the base of {adapter}: its weights have the SHA-256 {found[:SHOWN]}..., "
            f"those of the base {sha256[:SHOWN]}...: name the right one by --base=PATH"
        )


def moved(contents, path, place):
    """
    The contents of the checkpoint `path`, with its base at `place`, if that is not "". Raises UsageError
    where it has none.
    """
    if not place:
        return contents
    if "base" not in contents:
        raise UsageError(f"--base={place} means nothing for {path}, which holds whole weights: leave it out")
    return {**contents, "base": {**contents["base"], "source": place}}
