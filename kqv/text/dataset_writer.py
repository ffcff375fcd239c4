"""Writes a set's token files and meta.json."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress

import numpy as np

from kqv.errors import UserError
from kqv.files import sha256_of_file, write_json
from kqv.text.dataset import FORMAT, SPLITS, file_names


def smallest_dtype(tok):
    """The type that holds every id of a tokenizer."""
    return np.dtype("uint16" if tok.vocab_size <= 2**16 else "uint32")


class Writer:
    """
    Writes a set in parts, each with a file for each split, into a hidden folder of the set's; `finish` puts
    them in place.

    Each part is on disk, and in progress.json, before the next begins. So a Writer that is made again after a
    crash, for the same `about` and tokenizer, has in `parts` what was finished, checked against its sha256.
    """

    def __init__(self, folder, tok, about):
        self.folder, self.new = folder, folder / ".new"
        self.dtype = smallest_dtype(tok)
        self.about = {
            "format": FORMAT,
            "tokenizer": tok.to_json(),
            "vocab_size": tok.vocab_size,
            "dtype": self.dtype.name,
            "separator": tok.separator,
            **about,
        }
        self.new.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.new / "lock", "w")  # until this process ends or leaves
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being prepared by another process: wait for that, or give another --name"
            ) from None
        self.parts = self.finished_parts()
        self.files, self.digests, self.tokens = {}, {}, dict.fromkeys(SPLITS, 0)

    def finished_parts(self):
        with suppress(OSError, ValueError, KeyError, TypeError):
            progress = json.loads((self.new / "progress.json").read_text("utf-8"))
            if {**progress, "parts": []} == {**self.about, "parts": []}:
                parts = progress["parts"]
                whole = [self.is_whole(number, part) for number, part in enumerate(parts)]
                return parts[: [*whole, False].index(False)]
        return []

    def is_whole(self, number, part):
        with suppress(FileNotFoundError):
            return all(sha256_of_file(self.path(split, number)) == part["sha256"][split] for split in SPLITS)
        return False

    def path(self, split, number):
        return self.new / f"{split}_{number:04d}.bin"

    def count(self, split):
        """How many ids a split has so far."""
        return self.tokens[split] + sum(part["tokens"][split] for part in self.parts)

    def append(self, split, ids):
        """Add ids to a split of the part that is being written."""
        if not self.files:
            self.files = {split: open(self.path(split, len(self.parts)), "wb") for split in SPLITS}
            self.digests = {split: hashlib.sha256() for split in SPLITS}
        content = ids.astype(self.dtype).tobytes()
        self.files[split].write(content)
        self.digests[split].update(content)
        self.tokens[split] += len(ids)

    def end_part(self, **facts):
        """The part is complete; `facts` about it are kept beside its numbers of tokens."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        digests = {split: digest.hexdigest() for split, digest in self.digests.items()}
        self.parts.append({"tokens": self.tokens, "sha256": digests, **facts})
        self.tokens = dict.fromkeys(SPLITS, 0)
        write_json(self.new / "progress.json", {**self.about, "parts": self.parts})

    def close(self):
        for file in self.files.values():
            with suppress(OSError):  # the disk is full, so the part is not finished either
                file.close()
        self.files = {}

    def leave(self):
        """Keep finished parts for another Writer; where there are none, leave nothing behind."""
        self.close()
        self.lock.close()
        if not self.parts:
            shutil.rmtree(self.new, ignore_errors=True)
            with suppress(OSError):  # it has other files
                self.folder.rmdir()
                self.folder.parent.rmdir()

    def finish(self, **facts):
        """
        Put the set in place of an older one. The first file of the training split goes before the rest is
        replaced and comes back last, so a folder that was left at any moment is either the old set, the new
        set, or visibly no set.
        """
        names = {split: file_names(split, len(self.parts)) for split in SPLITS}
        totals = {split: sum(part["tokens"][split] for part in self.parts) for split in SPLITS}
        write_json(self.new / "meta.json", {**self.about, "tokens": totals, **facts, "parts": self.parts})
        for split in SPLITS:
            for number, name in enumerate(names[split]):
                os.rename(self.path(split, number), self.new / name)
        old = sorted(path for path in self.folder.glob("*.bin") if is_set_file(path.name))
        for path in sorted(old, key=lambda path: not path.name.startswith("train")):
            path.unlink()
        for name in ("meta.json", *names["val"], *reversed(names["train"])):
            os.replace(self.new / name, self.folder / name)
        shutil.rmtree(self.new)


def is_set_file(name):
    return re.fullmatch(rf"({'|'.join(SPLITS)})(_[0-9]+)?\.bin", name)


def write(folder, splits, tok, about):
    """Write a set at once: `splits` is {"train": (N,) ids, "val": (N,) ids}, `about` goes into meta.json."""
    shutil.rmtree(folder / ".new", ignore_errors=True)
    writer = Writer(folder, tok, about)
    for split, ids in splits.items():
        writer.append(split, ids)
    writer.end_part()
    writer.finish()
    writer.leave()
