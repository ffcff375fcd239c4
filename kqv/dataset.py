"""
Token files on disk <-> batches.

A set is a folder: `train.bin` and `val.bin` (raw token ids) and `meta.json` (what they are). nanoGPT's
folders, with `meta.pkl` or nothing beside the .bin files, are read as they are. A batch is a pure function of
(seed, step, index): nothing is drawn from a global random state, so a resumed run or another number of
processes sees the same data.
"""

import io
import json
import math
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from kqv import sources, tokenizer
from kqv.errors import UsageError, UserError

SPLITS = ("train", "val")
FORMAT = 1


class Dataset:
    """A prepared set: the tokenizer, and each split as a (N,) array of ids mapped from disk."""

    def __init__(self, name):
        """
        Open `data/<name>`, or the folder `name` where it is an absolute path. Raises UserError where it is no
        set.
        """
        self.folder = Path("data") / name
        missing = [f"{split}.bin" for split in SPLITS if not (self.folder / f"{split}.bin").is_file()]
        if missing:
            raise UserError(f"{self.folder} has no {' and no '.join(missing)}: {how_to_prepare(name)}")
        self.tokenizer, dtype, tokens, self.bytes = read_meta(self.folder)
        self.splits = {split: self.map_file(split, dtype, tokens.get(split)) for split in SPLITS}

    def map_file(self, split, dtype, tokens):
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize or tokens not in (None, size // dtype.itemsize):
            raise UserError(f"{path} has {size} bytes, which is not what its set says: run prepare.py again")
        return np.memmap(path, dtype=dtype, mode="r")

    def require_length(self, block_size):
        for split, tokens in self.splits.items():
            if len(tokens) <= block_size:
                raise UserError(
                    f"the {split} split of {self.folder} has {len(tokens)} tokens, but "
                    f"block_size={block_size} needs {block_size + 1}: use more text or "
                    f"--block_size={max(1, len(tokens) - 1)}"
                )

    def bits_per_byte(self, split, loss):
        """
        A mean loss in nats per token as bits for each byte of text, in which tokenizers compare; None where
        the bytes of the split are not known.
        """
        if not self.bytes.get(split):
            return None
        return loss / math.log(2) * len(self.splits[split]) / self.bytes[split]

    def training_batch(self, batch_size, block_size, seed, step, index):
        """
        Micro-batch `index` of a training step: windows drawn with replacement.

        Returns (x, y), both (B, T) int64, where y is x shifted by one token, and a number for seeding
        whatever else is random in this micro-batch. The same arguments give the same result, always.
        """
        random = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, index, step]))
        starts = random.integers(0, len(self.splits["train"]) - block_size, size=batch_size)  # (B,)
        return *self.windows("train", starts, block_size), int(random.integers(2**63))

    def evaluation_batch(self, split, batch_size, block_size, index, count):
        """
        Batch `index` of `count`: windows spread evenly over the split, the same at every evaluation. (x, y)
        as above.
        """
        tokens = self.splits[split]
        spread = np.linspace(0, len(tokens) - block_size - 1, count * batch_size)
        return self.windows(split, spread[index::count].astype(np.int64), block_size)

    def windows(self, split, starts, block_size):
        """(x, y), both (B, T) int64: x[b] = tokens[starts[b] : starts[b] + T], y one token further on."""
        picked = self.splits[split][starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
        if picked.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.folder}/{split}.bin has the id {picked.max()}, but its tokenizer has only "
                f"{self.tokenizer.vocab_size}: run prepare.py again"
            )
        picked = torch.from_numpy(picked.astype(np.int64))
        return picked[:, :-1].contiguous(), picked[:, 1:].contiguous()


def read_meta(folder):
    """
    (tokenizer, dtype of the ids, {split: number of tokens}, {split: bytes of text}) of a set's folder, the
    numbers as far as they are known.
    """
    ours, nanogpt = folder / "meta.json", folder / "meta.pkl"
    if ours.exists():
        try:
            meta = json.loads(ours.read_text("utf-8"))
            if meta["format"] != FORMAT:
                raise UserError(f"{ours} has format {meta['format']}, not {FORMAT}: run prepare.py again")
            if meta["dtype"] not in ("uint16", "uint32"):  # "O" would read the file as addresses
                raise ValueError(f"dtype {meta['dtype']!r}")
            sizes = {split: int(size) for split, size in meta.get("bytes", {}).items()}
            return (
                tokenizer.from_json(meta["tokenizer"]),
                np.dtype(meta["dtype"]),
                dict(meta["tokens"]),
                sizes,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{ours} is damaged ({error}): run prepare.py again") from None
    if nanogpt.exists():
        return tokenizer.from_nanogpt(load_plain_pickle(nanogpt)), np.dtype("uint16"), {}, {}
    return tokenizer.GPT2Tokenizer(), np.dtype("uint16"), {}, {}


def how_to_prepare(name):
    if name in sources.BUILT_IN:
        return f"make it with: python prepare.py {name}"
    source, _, kind = str(name).rpartition("_")
    kind = re.sub("^bpe(?=[0-9])", "bpe:", kind)
    if source in sources.BUILT_IN:
        with suppress(UsageError):
            tokenizer.maker(kind)
            return f"make it with: python prepare.py {source} --tokenizer={kind} --name={name}"
    return f"make it with: python prepare.py YOUR_TEXT.txt --name={name}"


class PlainUnpickler(pickle.Unpickler):
    """Admits strings, numbers and plain containers; any class or function that a pickle names is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path):
    try:
        return PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(
            f"{path} is refused, since only plain containers are read from a pickle: {error}"
        ) from None


def write(folder, splits, tok, about):
    """
    Write a set: `splits` is {"train": (N,) ids, "val": (N,) ids}, `about` goes into meta.json beside the
    usual entries.

    Every file is written beside its final name first. train.bin goes before the rest is replaced and comes
    back last, so a folder that was left at any moment is either the old set, the new set, or visibly no set.
    """
    dtype = "uint16" if tok.vocab_size <= 2**16 else "uint32"
    meta = {
        "format": FORMAT,
        "tokenizer": tok.to_json(),
        "vocab_size": tok.vocab_size,
        "dtype": dtype,
        "tokens": {split: len(ids) for split, ids in splits.items()},
        "separator": tok.separator,
        **about,
    }
    contents = {f"{split}.bin": ids.astype(dtype).tobytes() for split, ids in splits.items()}
    contents["meta.json"] = (json.dumps(meta, indent=1) + "\n").encode("utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f".{name}.new" for name in contents}
    try:
        for name, content in contents.items():
            with open(beside[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        (folder / "train.bin").unlink(missing_ok=True)
        for name in ("meta.json", "val.bin", "train.bin"):
            os.replace(beside[name], folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
