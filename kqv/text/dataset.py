"""
Token files on disk <-> batches.

A set is a folder: `train.bin` and `val.bin` (raw token ids) and `meta.json` (what they are); of a large set,
`train_0000.bin`, `train_0001.bin` and so on, which are read as one. nanoGPT's folders, with `meta.pkl` or
nothing beside the .bin files, are read as they are. A batch is a pure function of (seed, step, index): no
global random state is asked, so a resumed run or another number of processes sees the same data.

Shapes: B rows, T = block_size tokens.
"""

import hashlib
import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kqv.errors import UsageError, UserError
from kqv.files import load_plain_pickle
from kqv.text import tokenizers
from kqv.text.built_in import BUILT_IN

SPLITS = ("train", "val")


FORMAT = 2


AT_ONCE = 2**22  # ids, where a whole split is read


class Batch(NamedTuple):
    """What a model learns from, as its arguments."""

    idx: np.ndarray  # (B, T) int64 ids
    targets: np.ndarray  # (B, T) int64: the ids that come next; -1 where the model need not know
    positions: np.ndarray | None = None  # (B, T) int64, where rows hold several examples: places within each


class Tokens:
    """
    The ids of a split, in files that are read as one sequence: `tokens[a:b]` is a (b - a,) array.

    Files are read, not mapped, so that what was looked at does not count as the process's memory.
    """

    def __init__(self, paths, dtype):
        self.paths, self.dtype = paths, np.dtype(dtype)
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
        return ids

    def length(self, number):
        return int(self.ends[number] - (self.ends[number - 1] if number else 0))

    def __del__(self):
        for file in self.files:
            file.close()

    def blocks(self):
        """All ids, in order, as arrays of at most AT_ONCE."""
        return (self[start : start + AT_ONCE] for start in range(0, len(self), AT_ONCE))


class Dataset:
    """A prepared set: the tokenizer, and each split as Tokens."""

    def __init__(self, name):
        """
        Open `data/<name>`, or the folder `name` where it is an absolute path. Raises UserError where it is no
        set.
        """
        self.folder = Path("data") / name
        if not (self.folder / "meta.json").is_file():
            self.require_files("train.bin", "val.bin")
        self.tokenizer, dtype, parts, self.bytes = read_meta(self.folder)
        self.splits = {split: self.open_split(split, dtype, parts) for split in SPLITS}
        for split in SPLITS:
            self.require_known_ids(split)
        self.is_chat = self.tokenizer.kind == "chat"
        self.borders = {split: self.find_borders(split) for split in SPLITS if self.is_chat}
        self.packed = {}  # (split, block_size) -> rows

    def require_files(self, *names):
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise UserError(
                f"{self.folder} has no {' and no '.join(missing[:2])}: {how_to_prepare(self.folder.name)}"
            )

    def open_split(self, split, dtype, parts):
        names = file_names(split, len(parts))
        self.require_files(*names)
        for name, part in zip(names, parts, strict=True):
            size = (self.folder / name).stat().st_size
            if size % dtype.itemsize or part.get(split, size // dtype.itemsize) != size // dtype.itemsize:
                raise UserError(
                    f"{self.folder / name} has {size} bytes, which is not what its set says: run prepare.py "
                    "again"
                )
        tokens = Tokens([self.folder / name for name in names], dtype)
        if len(tokens) == 0:
            raise UserError(f"{self.folder / names[0]} has 0 bytes: run prepare.py again")
        return tokens

    def require_known_ids(self, split):
        """Raise UserError where a split has ids that are not the tokenizer's."""
        tokens, known = self.splits[split], self.tokenizer.vocab_size
        if known > np.iinfo(tokens.dtype).max:
            return
        for block in tokens.blocks():
            if block.max() >= known:
                raise UserError(
                    f"the {split} split of {self.folder} has the id {block.max()}, but its tokenizer has "
                    f"only {known}: run prepare.py again"
                )

    def fingerprint(self):
        """A hash of the tokenizer, and of the sizes and 256 places of the splits: other sets have another."""
        digest = hashlib.sha256(json.dumps(self.tokenizer.to_json(), sort_keys=True).encode())
        for split in SPLITS:
            tokens = self.splits[split]
            digest.update(f"{split} {len(tokens)} {tokens.dtype}".encode())
            for start in np.linspace(0, max(0, len(tokens) - 64), 256, dtype=np.int64).tolist():
                digest.update(tokens[start : start + 64].tobytes())
        return digest.hexdigest()[:16]

    def require_length(self, block_size):
        """Raise UserError where a split has no window of `block_size` tokens."""
        for split, tokens in self.splits.items():
            if self.is_chat:
                needed = self.lengths(split)
                if needed.min() > block_size:
                    raise UserError(
                        f"no conversation of the {split} split of {self.folder} fits into block_size="
                        f"{block_size}: the shortest needs --block_size={needed.min()}, the longest "
                        f"{needed.max()}"
                    )
            elif len(tokens) <= block_size:
                raise UserError(
                    f"the {split} split of {self.folder} has {len(tokens)} tokens, but "
                    f"block_size={block_size} needs {block_size + 1}: use more text or "
                    f"--block_size={max(1, len(tokens) - 1)}"
                )

    def left_out(self, block_size):
        """What to warn of: for each split with conversations that are longer than `block_size`, a line."""
        for split in self.borders:
            needed = self.lengths(split)
            if needed.max() > block_size:
                yield (
                    f"{(needed > block_size).sum()} conversations of the {split} split are longer than "
                    f"block_size={block_size} and left out; the longest needs --block_size={needed.max()}"
                )

    def lengths(self, split):
        """(N,) how many ids a model reads of each conversation of a split: all but the last."""
        return np.diff(self.borders[split]) - 1

    def bits_per_byte(self, split, loss):
        """
        A mean loss in nats per token as bits for each byte of text, in which tokenizers compare; None where
        the bytes of the split are not known.
        """
        if not self.bytes.get(split):
            return None
        return loss / math.log(2) * len(self.splits[split]) / self.bytes[split]

    # Which windows are in a batch

    def training_batch(self, batch_size, block_size, seed, step, index, sampling="random", micro_batches=1):
        """
        Micro-batch `index` of the `micro_batches` of a training step: a Batch, and a number for seeding
        whatever else is random in it. The same arguments give the same result, always.

        sampling="random" draws windows with replacement. "epoch" takes every window once before any comes
        again, in a new order each time.
        """
        random = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, index, step]))
        if sampling == "random":
            choices = self.windows("train", block_size, anywhere=True)
            windows = random.integers(0, choices, size=batch_size)  # (B,)
        else:
            first = (step * micro_batches + index) * batch_size
            windows = self.in_epochs(first, batch_size, block_size, seed)
        return self.batch("train", windows, block_size), int(random.integers(2**63))

    def in_epochs(self, first, batch_size, block_size, seed):
        """(B,) the windows that come at places `first` to first + B of all epochs, one behind another."""
        count, found = self.windows("train", block_size), []
        for epoch in range(first // count, (first + batch_size - 1) // count + 1):
            begin = max(first - epoch * count, 0)
            places = np.arange(begin, min(first + batch_size - epoch * count, count))
            random = np.random.default_rng((seed, epoch))
            windows = shuffled(places, count, random.integers(2**63, size=6, dtype=np.uint64))
            if not self.is_chat:  # stretches side by side, with borders that are elsewhere in each epoch
                slack = (len(self.splits["train"]) - 1) % block_size
                windows = windows * block_size + random.integers(slack + 1)
            found.append(windows)
        return np.concatenate(found)

    def evaluation_batch(self, split, batch_size, block_size, index, count):
        """
        Batch `index` of `count`: windows spread evenly over the split, the same at every evaluation.
        """
        last = self.windows(split, block_size, anywhere=True) - 1
        spread = np.linspace(0, last, count * batch_size)
        return self.batch(split, spread[index::count].astype(np.int64), block_size)

    def batches(self, split, batch_size, block_size):
        """How many batches read a split once."""
        rows = len(self.rows(split, block_size)) if self.is_chat else len(self.splits[split]) / block_size
        return math.ceil(rows / batch_size)

    def windows(self, split, block_size, anywhere=False):
        """How many windows a split has: rows of conversations, or of text side by side or `anywhere`."""
        if self.is_chat:
            return len(self.rows(split, block_size))
        if anywhere:
            return len(self.splits[split]) - block_size
        return (len(self.splits[split]) - 1) // block_size

    # What is in a window

    def batch(self, split, windows, block_size):
        """The Batch of the windows (B,): of text by where they begin, of conversations by their row."""
        if self.is_chat:
            return self.chat_batch(split, windows, block_size)
        picked = [self.splits[split][start : start + block_size + 1] for start in windows.tolist()]
        picked = np.stack(picked).astype(np.int64)  # (B, T + 1)
        return Batch(np.ascontiguousarray(picked[:, :-1]), np.ascontiguousarray(picked[:, 1:]))

    def chat_batch(self, split, windows, block_size):
        """
        Rows of whole conversations, side by side. What the assistant says is to be learnt; positions begin
        anew with each conversation.
        """
        tok, ranges = self.tokenizer, self.rows(split, block_size)[windows]  # (B, 2)
        # A row is filled up with conversations of a mark alone: nothing of them is learnt.
        picked = np.full((len(windows), block_size + 1), tok.system, np.int64)  # (B, T + 1)
        for row, (start, end) in zip(picked, ranges.tolist(), strict=True):
            row[: end - start] = self.splits[split][start:end]
        targets = np.where(tok.is_learnt(picked), picked, -1)[:, 1:]
        places = np.arange(block_size)
        first = np.maximum.accumulate(np.where(picked[:, :-1] == tok.system, places, 0), axis=1)  # (B, T)
        return Batch(np.ascontiguousarray(picked[:, :-1]), np.ascontiguousarray(targets), places - first)

    def find_borders(self, split):
        """(N + 1,) where each of the N conversations of a split begins, and where the last one ends."""
        tokens, found, done = self.splits[split], [], 0
        for block in tokens.blocks():
            found.append(np.flatnonzero(block == self.tokenizer.system) + done)
            done += len(block)
        borders = np.concatenate([*found, [done]])
        if borders[0] != 0:
            raise UserError(
                f"the {split} split of {self.folder} begins with no conversation: run prepare.py again"
            )
        return borders

    def rows(self, split, block_size):
        """(rows, 2) the range of ids of each row of conversations."""
        if (split, block_size) not in self.packed:
            self.packed[split, block_size] = packed(self.borders[split], block_size + 1)
        return self.packed[split, block_size]

    def conversations(self, split):
        """The ids of each conversation of a split, in order."""
        borders = self.borders[split].tolist()
        return (self.splits[split][start:end] for start, end in zip(borders, borders[1:], strict=False))


def packed(borders, longest):
    """
    (rows, 2) ranges of ids: as many conversations as fit into `longest` ids, in order; those that are longer
    are in none.
    """
    rows, first = [], 0
    while first < len(borders) - 1:
        after = int(np.searchsorted(borders, borders[first] + longest, "right")) - 1
        if after > first:
            rows.append((borders[first], borders[after]))
        first = max(after, first + 1)
    return np.array(rows, np.int64).reshape(-1, 2)


def shuffled(numbers, count, keys):
    """
    Where each of `numbers` goes in a random order of range(count): (n,) -> (n,). It takes no memory, whatever
    the count, and `keys` (k,) of uint64 decide it.

    A Feistel network permutes the numbers of as many bits, a round for each key; what lands outside the range
    is permuted again until it is inside (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    numbers = np.array(numbers, np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(29)) & mask)
        numbers[outside] = left << half | right
        outside = numbers >= count
    return numbers.astype(np.int64)


def file_names(split, parts):
    """The files of a split of a set that was written in so many parts."""
    return [f"{split}.bin"] if parts == 1 else [f"{split}_{number:04d}.bin" for number in range(parts)]


def read_meta(folder):
    """
    (tokenizer, dtype of the ids, [{split: number of tokens}, ...] of each part, {split: bytes of text}) of a
    set's folder, the numbers as far as they are known.
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
            parts = [{split: int(part["tokens"][split]) for split in SPLITS} for part in meta["parts"]]
            if not parts:
                raise ValueError("no parts")
            return tokenizers.from_json(meta["tokenizer"]), np.dtype(meta["dtype"]), parts, sizes
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{ours} is damaged ({error}): run prepare.py again") from None
    if nanogpt.exists():
        return tokenizers.from_nanogpt(load_plain_pickle(nanogpt)), np.dtype("uint16"), [{}], {}
    return tokenizers.GPT2Tokenizer(), np.dtype("uint16"), [{}], {}


def how_to_prepare(name):
    if name in BUILT_IN:
        return f"make it with: python prepare.py {name}"
    source, _, kind = str(name).rpartition("_")
    kind = re.sub("^bpe(?=[0-9])", "bpe:", kind)
    if source in BUILT_IN and kind in BUILT_IN:
        return f"make it with: python prepare.py {source} --tokenizer=data/{kind} --name={name}"
    if source in BUILT_IN:
        with suppress(UsageError):
            tokenizers.maker(kind)
            return f"make it with: python prepare.py {source} --tokenizer={kind} --name={name}"
    return f"make it with: python prepare.py YOUR_TEXT.txt --name={name}"
