"""
A prepared set -> batches. A batch is a pure function of (seed, step, index): no global random state is used,
so a resumed run, or one on another number of processes, sees the same data.

Shapes: B rows, T = block_size tokens.
"""

import hashlib
import json
import math
from typing import NamedTuple

import numpy as np

from kqv.errors import UserError
from kqv.files import require_no_dangling_link
from kqv.text.chat import BEGINS, LEARNT
from kqv.text.marks import MarksOfIds, StoredMarks
from kqv.text.names import folder_of, how_to_prepare
from kqv.text.order import packed, shuffled
from kqv.text.token_files import MARKS, META, SPLITS, Tokens, file_names, read_meta


class Batch(NamedTuple):
    """What a model is trained on, as its arguments."""

    idx: np.ndarray  # (B, T) int64 ids
    targets: np.ndarray  # (B, T) int64: the ids that come next; -1 where they are not learnt
    positions: np.ndarray | None = None  # (B, T) int64, of rows of conversations: the position within each


class Dataset:
    """A prepared set: the tokenizer, and each split as Tokens."""

    def __init__(self, name):
        """
        Open `data/<name>`, or the folder `name` where that is a path. Raises UserError where the set is not
        complete.
        """
        if not name:
            raise UserError("no set is named: --dataset=NAME, of a folder in data")
        self.folder = folder_of(str(name))
        if not (self.folder / META).is_file():
            self.require_files("train.bin", "val.bin")
        self.tokenizer, dtype, parts, self.bytes, is_ours = read_meta(self.folder)
        self.splits = {split: self.open_split(split, dtype, parts) for split in SPLITS}
        if not is_ours:  # prepare.py has checked each id
            for tokens in self.splits.values():
                tokens.check()
        self.conversation_starts, self.learnt_before, self.marks = {}, {}, {}  # of splits of conversations
        for split in SPLITS if self.is_chat else ():
            self.marks[split] = self.open_marks(split, parts)
            found = self.marks[split].conversations(f"the {split} split of {self.folder}")
            self.conversation_starts[split], self.learnt_before[split] = found
        self.packed = {}  # (split, block_size) -> rows

    @property
    def is_chat(self):
        """Whether it is a set of conversations."""
        return self.tokenizer.kind == "chat"

    def require_files(self, *names):
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            require_no_dangling_link(self.folder)
            raise UserError(
                f"{self.folder.absolute()} has no {' and no '.join(missing[:2])}: "
                f"{how_to_prepare(self.folder.name)}"
            )

    def open_marks(self, split, parts):
        """The marks of a split of conversations."""
        if not self.tokenizer.stores_marks:
            return MarksOfIds(self.splits[split], self.tokenizer)
        marks = self.open_split(f"{split}{MARKS}", np.dtype(np.uint8), parts, LEARNT + BEGINS + 1)
        if len(marks) != len(self.splits[split]):
            raise UserError(
                f"{marks.paths[0]} has {len(marks)} marks for {len(self.splits[split])} ids: run prepare.py "
                "again"
            )
        return StoredMarks(marks)

    def open_split(self, split, dtype, parts, vocab_size=None):
        names = file_names(split, len(parts))
        self.require_files(*names)
        for name, part in zip(names, parts, strict=True):
            size = (self.folder / name).stat().st_size
            if size % dtype.itemsize or part.get(split, size // dtype.itemsize) != size // dtype.itemsize:
                raise UserError(
                    f"{self.folder / name} has {size} bytes, which is not what its set says: run prepare.py "
                    "again"
                )
        tokens = Tokens(
            [self.folder / name for name in names], dtype, vocab_size or self.tokenizer.vocab_size
        )
        if len(tokens) == 0:
            raise UserError(f"{self.folder / names[0]} has 0 bytes: run prepare.py again")
        return tokens

    def fingerprint(self, splits=SPLITS):
        """
        A hash of the tokenizer, and of these splits' sizes and ids at 256 places: enough to tell sets apart.
        """
        digest = hashlib.sha256(json.dumps(self.tokenizer.to_json(), sort_keys=True).encode())
        for split in splits:
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
                if not self.learnt_in(split, self.rows(split, block_size)):
                    raise UserError(
                        f"the {split} split of {self.folder} has no answer of the assistant that fits into "
                        f"block_size={block_size}, so nothing to learn: run prepare.py with answers"
                    )
            elif len(tokens) <= block_size:
                raise UserError(
                    f"the {split} split of {self.folder} has {len(tokens)} tokens, but "
                    f"block_size={block_size} needs {block_size + 1}: use more text or "
                    f"--block_size={max(1, len(tokens) - 1)}"
                )

    def left_out(self, block_size):
        """Warnings: a line for each split with conversations that are longer than `block_size`."""
        for split in self.conversation_starts:
            needed = self.lengths(split)
            if needed.max() > block_size:
                yield (
                    f"{(needed > block_size).sum()} conversations of the {split} split are longer than "
                    f"block_size={block_size} and left out; the longest needs --block_size={needed.max()}"
                )

    def lengths(self, split):
        """(N,) how many ids a model reads of each conversation of a split: all but the last."""
        return np.diff(self.conversation_starts[split]) - 1

    def bits_per_byte(self, split, loss):
        """
        A mean loss in nats per token -> bits per byte of text, which does not depend on the tokenizer; None
        where the bytes of the split are not known.
        """
        if not self.bytes.get(split):
            return None
        return loss / math.log(2) * len(self.splits[split]) / self.bytes[split]

    # Which windows are in a batch

    def training_batch(
        self, batch_size, block_size, seed, step, index, order="random", micro_batches=1, before=None
    ):
        """
        Micro-batch `index` of the `micro_batches` of a training step: a Batch, and a seed for whatever else
        is random in it (dropout). The same arguments always give the same result.

        order="random" draws windows with replacement. "epoch" takes every window once before any comes
        again, in a new order each time; `before` is how many windows the steps before have taken, if not each
        as many as this one.
        """
        windows, random = self.training_windows(
            batch_size, block_size, seed, step, index, order, micro_batches, before
        )
        return self.batch("train", windows, block_size), int(random.integers(2**63))

    def training_windows(
        self, batch_size, block_size, seed, step, index, order="random", micro_batches=1, before=None
    ):
        """The windows (B,) of a micro-batch, and the generator of its further random numbers."""
        random = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, index, step]))
        if order == "random":
            choices = self.windows("train", block_size, anywhere=True)
            return random.integers(0, choices, size=batch_size), random
        before = step * micro_batches * batch_size if before is None else before
        return self.in_epochs(before + index * batch_size, batch_size, block_size, seed), random

    def learnt_tokens(self, batch_size, block_size, *which):
        """How many tokens are learnt of the `training_batch` of the same arguments, without reading it."""
        if not self.is_chat:
            return batch_size * block_size
        windows, _ = self.training_windows(batch_size, block_size, *which)
        return self.learnt_in("train", self.rows("train", block_size)[windows])

    def in_epochs(self, first, batch_size, block_size, seed):
        """(B,) windows `first` to first + B - 1 of all epochs, one epoch after another."""
        count, found = self.windows("train", block_size), []
        for epoch in range(first // count, (first + batch_size - 1) // count + 1):
            begin = max(first - epoch * count, 0)
            places = np.arange(begin, min(first + batch_size - epoch * count, count))
            random = np.random.default_rng((seed, epoch))
            windows = shuffled(places, count, random.integers(2**63, size=6, dtype=np.uint64))
            if not self.is_chat:  # side by side, beginning elsewhere in each epoch
                slack = (len(self.splits["train"]) - 1) % block_size
                windows = windows * block_size + random.integers(slack + 1)
            found.append(windows)
        return np.concatenate(found)

    def evaluation_batch(self, split, batch_size, block_size, index, count):
        """
        Batch `index` of `count`: windows spread evenly over the split, the same at every evaluation. A row of
        conversations that comes again, since there are fewer rows than windows, counts once.
        """
        last = self.windows(split, block_size, anywhere=True) - 1
        spread = np.linspace(0, last, count * batch_size).astype(np.int64)
        batch = self.batch(split, spread[index::count], block_size)
        if self.is_chat:
            comes_again = np.diff(spread, prepend=-1) == 0
            batch.targets[comes_again[index::count]] = -1
        return batch

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
        """The Batch of the windows (B,): of text, by where they begin; of conversations, by their row."""
        if self.is_chat:
            return self.chat_batch(split, windows, block_size)
        picked = [self.splits[split][start : start + block_size + 1] for start in windows.tolist()]
        picked = np.stack(picked).astype(np.int64)  # (B, T + 1)
        return Batch(np.ascontiguousarray(picked[:, :-1]), np.ascontiguousarray(picked[:, 1:]))

    def chat_batch(self, split, windows, block_size):
        """
        Rows of whole conversations. What the assistant says is learnt. Positions begin at 0 in each
        conversation.
        """
        ranges = self.rows(split, block_size)[windows]  # (B, 2)
        # A row is filled up with one more conversation, of which nothing is learnt.
        picked = np.full((len(windows), block_size + 1), self.tokenizer.filling, np.int64)  # (B, T + 1)
        marks = np.zeros(picked.shape, np.uint8)
        for row, (start, end) in enumerate(ranges.tolist()):
            ids = self.splits[split][start:end]
            picked[row, : end - start], marks[row, : end - start] = ids, self.marks[split].of(ids, start)
            marks[row, end - start :][:1] = BEGINS
        targets = np.where(marks & LEARNT, picked, -1)[:, 1:]
        places = np.arange(block_size)
        starts = np.maximum.accumulate(np.where(marks[:, :-1] & BEGINS, places, 0), axis=1)  # (B, T)
        return Batch(np.ascontiguousarray(picked[:, :-1]), np.ascontiguousarray(targets), places - starts)

    def learnt_in(self, split, rows):
        """How many ids are learnt in rows of conversations (rows, 2)."""
        places = np.searchsorted(self.conversation_starts[split], rows)
        return int(np.diff(self.learnt_before[split][places]).sum())

    def most_in_row(self, block_size):
        """The most conversations that a row has, with the one that fills it up."""
        places = (
            np.searchsorted(self.conversation_starts[split], self.rows(split, block_size)) for split in SPLITS
        )
        return 1 + max(int(np.diff(place).max(initial=0)) for place in places)

    def rows(self, split, block_size):
        """(rows, 2) where each row of conversations begins and ends in the ids of a split."""
        if (split, block_size) not in self.packed:
            self.packed[split, block_size] = packed(self.conversation_starts[split], block_size + 1)
        return self.packed[split, block_size]

    def conversations(self, split):
        """The ids of each conversation of a split, in order."""
        return (ids for ids, _ in self.marked_conversations(split))

    def marked_conversations(self, split):
        """The `conversation` of each number, in order."""
        count = len(self.conversation_starts[split]) - 1
        return (self.conversation(split, number) for number in range(count))

    def conversation(self, split, number):
        """(the (T,) ids, (T,) bool which ones are learnt) of a conversation of a split."""
        start, end = self.conversation_starts[split][number : number + 2].tolist()
        ids = self.splits[split][start:end]
        return ids, (self.marks[split].of(ids, start) & LEARNT) > 0
