"""Writes a set's token files and meta.json."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress

from kqv.errors import UserError
from kqv.files import require_no_dangling_link, sha256_of_file, write_json
from kqv.forms import WHOLE, require_form
from kqv.text.token_files import FORMAT, MARKS, META, SPLITS, file_names, smallest_dtype

PROGRESS = "progress.json"

PART = {  # of a set, in progress.json
    "tokens": {split: WHOLE for split in SPLITS},
    "sha256": {split: str for split in SPLITS},
    "bytes?": {split: WHOLE for split in SPLITS},
    "documents?": WHOLE,
    "learnt?": {split: WHOLE for split in SPLITS},
    "text_sha256?": str,
}


class Writer:
    """
    Writes a set in parts into the hidden folder `.new` of the set's folder; `finish` puts them in place. A
    part has a file for each split.

    Each part is on the disk, and in progress.json, before the next begins. So a Writer that is made again
    after a crash, for the same tokenizer and `about`, has in `parts` what was finished, checked against its
    sha256. Raises UserError where another process writes this set.
    """

    def __init__(self, folder, tokenizer, about):
        self.folder, self.new = folder, folder / ".new"
        self.vocab_size = tokenizer.vocab_size
        self.dtype = smallest_dtype(tokenizer)
        marks = [f"{split}{MARKS}" for split in SPLITS] if tokenizer.stores_marks else []
        self.streams = (*SPLITS, *marks)  # what there is a file of in each part
        self.about = {
            "format": FORMAT,
            "tokenizer": tokenizer.to_json(),
            "vocab_size": tokenizer.vocab_size,
            "dtype": self.dtype.name,
            "separator": tokenizer.separator,
            **about,
        }
        require_no_dangling_link(folder)
        self.new.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.new / "lock", "w")  # held until `leave`, or until this process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being prepared by another process: wait for that, or give another --name"
            ) from None
        self.parts = self.finished_parts()
        self.files, self.digests, self.tokens = {}, {}, dict.fromkeys(self.streams, 0)

    def finished_parts(self):
        """The parts that a Writer of the same set finished, up to the first that is damaged."""
        with suppress(OSError, ValueError, RecursionError):
            progress = json.loads((self.new / PROGRESS).read_text("utf-8"))
            require_form(progress, {"parts": [PART]})
            if {**progress, "parts": []} == {**self.about, "parts": []}:
                parts = progress["parts"]
                whole = [self.is_whole(number, part) for number, part in enumerate(parts)]
                return parts[: [*whole, False].index(False)]
        return []

    def is_whole(self, number, part):
        with suppress(FileNotFoundError):
            return all(
                sha256_of_file(self.path(stream, number)) == part["sha256"][stream] for stream in self.streams
            )
        return False

    def path(self, split, number):
        return self.new / f"{split}_{number:04d}.bin"

    def count(self, split):
        """How many ids a split has so far."""
        return self.tokens[split] + sum(part["tokens"][split] for part in self.parts)

    def append(self, split, ids, marks=None):
        """
        Add (N,) ids, and their marks (N,) where the tokenizer stores them, to a split of the part that is
        being written. Raises ValueError for an id that the
        tokenizer lacks, so a Dataset need not look for one.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids are from 0 to {self.vocab_size - 1}: {ids.min()} to {ids.max()}")
        if not self.files:
            self.files = {name: open(self.path(name, len(self.parts)), "wb") for name in self.streams}
            self.digests = {name: hashlib.sha256() for name in self.streams}
        self.write(split, ids.astype(self.dtype))
        if marks is not None:
            self.write(f"{split}{MARKS}", marks)

    def write(self, stream, numbers):
        content = numbers.tobytes()
        self.files[stream].write(content)
        self.digests[stream].update(content)
        self.tokens[stream] += len(numbers)

    def end_part(self, **facts):
        """Put the part on the disk and note it, with `facts` about it, in progress.json."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        digests = {split: digest.hexdigest() for split, digest in self.digests.items()}
        self.parts.append({"tokens": self.tokens, "sha256": digests, **facts})
        self.tokens = dict.fromkeys(self.streams, 0)
        write_json(self.new / PROGRESS, {**self.about, "parts": self.parts})

    def close(self):
        for file in self.files.values():
            with suppress(OSError):  # the disk is full; the part is not finished anyway
                file.close()
        self.files = {}

    def leave(self):
        """Close all files. Finished parts stay for another Writer; where there are none, nothing stays."""
        self.close()
        self.lock.close()
        if not self.parts:
            shutil.rmtree(self.new, ignore_errors=True)
            with suppress(OSError):  # it has other files
                self.folder.rmdir()
                self.folder.parent.rmdir()

    def finish(self, **facts):
        """
        Put the set in place of an older one, with `facts` about it in meta.json. The first file of the
        training split is removed first and comes last, so after a crash the folder is the old set, the new
        set, or no set (train.bin is missing).
        """
        names = {name: file_names(name, len(self.parts)) for name in self.streams}
        totals = {split: sum(part["tokens"][split] for part in self.parts) for split in SPLITS}
        write_json(self.new / META, {**self.about, "tokens": totals, **facts, "parts": self.parts})
        for stream in self.streams:
            for number, name in enumerate(names[stream]):
                os.rename(self.path(stream, number), self.new / name)
        old = sorted(path for path in self.folder.glob("*.bin") if is_set_file(path.name))
        for path in sorted(old, key=lambda path: not path.name.startswith("train")):
            path.unlink()
        others = [name for stream in self.streams if stream != "train" for name in names[stream]]
        for name in (META, *others, *reversed(names["train"])):
            os.replace(self.new / name, self.folder / name)
        shutil.rmtree(self.new)


def is_set_file(name):
    return re.fullmatch(rf"({'|'.join(SPLITS)})({MARKS})?(_[0-9]+)?\.bin", name)


def write(folder, splits, tokenizer, about):
    """Write a set at once: `splits` is {"train": (N,) ids, "val": (M,) ids}; `about` goes into meta.json."""
    shutil.rmtree(folder / ".new", ignore_errors=True)
    writer = Writer(folder, tokenizer, about)
    for split, ids in splits.items():
        writer.append(split, ids)
    writer.end_part()
    writer.finish()
    writer.leave()
