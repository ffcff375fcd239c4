"""
The files of a prepared set, in its folder: `train.bin` and `val.bin` (token ids) and `meta.json` (what they
are); of a large set `train_0000.bin`, `train_0001.bin` and so on, which are read as one. nanoGPT's folders,
with `meta.pkl` or nothing beside the .bin files, are read as they are.
"""

import os
from typing import NamedTuple

import numpy as np

from kqv.errors import UserError, first_line
from kqv.files import read_json
from kqv.forms import WHOLE, require_form, shown
from kqv.pickles import load_plain_pickle
from kqv.text import tokenizers
from kqv.text.tokenizer import Tokenizer

SPLITS = ("train", "val")

MARKS = "_marks"  # behind the name of a split: its marks, as of kqv/text/marks.py

META, NANOGPT_META = "meta.json", "meta.pkl"

FORMAT = 2  # of meta.json

WHICH = {"format": object}  # what every format of meta.json has

PARTS = [{"tokens": {split: WHOLE for split in SPLITS}}]

FORM = {
    "dtype": ("uint16", "uint32"),  # "O" would read the file as addresses
    "vocab_size": range(1, 2**32 + 1),
    "tokenizer": dict,
    "bytes?": {str: WHOLE},
    "parts": PARTS,
}

AT_ONCE = 2**22  # ids read at once where a whole split is read


class Tokens:
    """
    The ids of a split, in files that are read as one sequence: `tokens[a:b]` is a (b - a,) array.

    Files are read, not mapped to memory: what was read would count as the process's memory. Raises UserError
    for an id from `vocab_size` on, which only a damaged file has.
    """

    def __init__(self, paths, dtype, vocab_size):
        self.paths, self.dtype, self.vocab_size = paths, np.dtype(dtype), vocab_size
        self.files = []
        self.files += (open(path, "rb", buffering=0) for path in paths)
        sizes = [os.fstat(file.fileno()).st_size // self.dtype.itemsize for file in self.files]
        self.ends = np.cumsum(sizes)  # of each file, in ids

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        ids = np.empty(max(0, stop - start), self.dtype)
        number, filled = int(np.searchsorted(self.ends, start, "right")), 0
        while filled < len(ids):
            offset = start + filled - (self.ends[number] - self.length(number))
            count = min(len(ids) - filled, self.length(number) - offset)
            target = memoryview(ids[filled : filled + count]).cast("B")
            if os.preadv(self.files[number].fileno(), [target], offset * self.dtype.itemsize) < len(target):
                raise UserError(f"{self.paths[number]} became shorter: run prepare.py again")
            filled, number = filled + count, number + 1
        if len(ids) and ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.paths[0]} has the id {ids.max()}, but its tokenizer has only {self.vocab_size}: "
                "run prepare.py again"
            )
        return ids

    def length(self, number):
        """How many ids file `number` has."""
        return int(self.ends[number] - (self.ends[number - 1] if number else 0))

    def __del__(self):
        for file in self.files:
            file.close()

    def blocks(self):
        """All ids, in order, as arrays of at most AT_ONCE."""
        return (self[start : start + AT_ONCE] for start in range(0, len(self), AT_ONCE))

    def check(self):
        """Read all ids. Raises UserError where one is not the tokenizer's."""
        for _ in self.blocks():
            pass


class Meta(NamedTuple):
    """What the files of a set are."""

    tokenizer: Tokenizer
    dtype: np.dtype  # of the ids
    parts: list  # of each part {split: number of tokens}, as far as they are known
    bytes: dict  # {split: bytes of text}, as far as they are known
    is_ours: bool  # whether prepare.py wrote it, and so checked each id


def read_meta(folder):
    """What a set's folder says of its files. Raises UserError."""
    ours, nanogpt = folder / META, folder / NANOGPT_META
    if ours.exists():
        try:
            meta = read_json(ours)
            require_form(meta, WHICH)
            if meta["format"] != FORMAT:
                raise UserError(
                    f"{ours} has format {shown(meta['format'])}, not {FORMAT}: run prepare.py again"
                )
            require_form(meta, FORM)
            if not meta["parts"]:
                raise ValueError("it has no parts")
            tokenizer = tokenizers.from_json(meta["tokenizer"])
            if meta["vocab_size"] != tokenizer.vocab_size:
                raise ValueError(f"{meta['vocab_size']} ids, but a tokenizer with {tokenizer.vocab_size}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{ours} is damaged ({first_line(error)}): run prepare.py again") from None
        parts = [part["tokens"] for part in meta["parts"]]
        return Meta(tokenizer, np.dtype(meta["dtype"]), parts, meta.get("bytes", {}), is_ours=True)
    if nanogpt.exists():
        tokenizer = tokenizers.from_nanogpt(load_plain_pickle(nanogpt))
    else:
        tokenizer = tokenizers.GPT2Tokenizer()
    return Meta(tokenizer, np.dtype("uint16"), [{}], {}, is_ours=False)


def is_set(folder):
    """Whether a folder says what tokenizer its files are made with."""
    return (folder / META).exists() or (folder / NANOGPT_META).exists()


def file_names(split, parts):
    """The files of a split of a set that was written in so many parts."""
    return [f"{split}.bin"] if parts == 1 else [f"{split}_{number:04d}.bin" for number in range(parts)]


def smallest_dtype(tokenizer):
    """The type that holds every id of a tokenizer."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
