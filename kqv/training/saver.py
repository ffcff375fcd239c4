"""Saving checkpoints while training goes on."""

import threading
import time
from pathlib import Path

import torch

from kqv.errors import UserError, reason_of, warn
from kqv.files import put_in_place, remove
from kqv.formats.checkpoint import BEST, NEWEST, ONLY_TO_TRAIN, PREVIOUS, save
from kqv.training.metrics import OLDER_METRICS

# What a run leaves in its folder is kept under these names when another run saves there.
OLD = {PREVIOUS: "ckpt.old.pt", BEST: "best.old.pt", OLDER_METRICS: "metrics.old.jsonl"}


class Saver:
    """
    Saves checkpoints while training goes on: training waits for a copy in host memory, which a thread writes.
    """

    def __init__(self, out_dir, older=(), newest=None):
        """
        `older` names files in the folder that are not this run's: at its first save they are renamed, as in
        OLD. `newest` is the step of this run's checkpoint there, if it has one.
        """
        self.out_dir, self.older, self.newest = Path(out_dir), older, newest
        self.failed = {}  # name of a file -> why its last save failed
        self.copies = {}  # (address, shape, type) of a tensor -> its copy, used again at the next save
        self.thread = None

    def save(self, contents, best):
        """
        Copy a checkpoint's contents and begin to write them to ckpt.pt, and to best.pt if they are the best.
        Returns how many seconds the caller waited.
        """
        before = time.perf_counter()
        self.wait()
        copy = self.stage(contents)
        if any(tensor.is_pinned() for tensor in self.copies.values()):
            torch.cuda.synchronize()
        files = {NEWEST: copy}  # in this order
        if best:
            files[BEST] = {name: value for name, value in copy.items() if name not in ONLY_TO_TRAIN}
        self.thread = threading.Thread(target=self.write, args=(files,))
        self.thread.start()
        return time.perf_counter() - before

    def stage(self, contents):
        """A copy of the contents, which training does not change."""
        return self.copy(contents)

    def copy(self, value):
        """A copy in host memory; tensors that share memory (tied weights) share it there too."""
        if isinstance(value, dict):
            return {name: self.copy(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy(part) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.shape, value.dtype)
        if key not in self.copies:
            self.copies[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.copies[key].copy_(value, non_blocking=True)

    def write(self, files):
        """Write {name: contents}. A file that can't be written is a warning, and noted in `failed`."""
        for name, contents in files.items():
            self.failed[name] = "it was not written"
            try:
                self.save_file(self.out_dir / name, contents)
                if name == NEWEST:
                    self.newest = contents["iter_num"]
                    self.rename_older()
                del self.failed[name]
            except (OSError, RuntimeError, MemoryError) as error:  # torch's writer raises RuntimeError
                cause = error.__context__ if isinstance(error.__context__, OSError) else error
                self.failed[name] = reason_of(cause)
                warn(f"{self.out_dir / name} can't be saved ({self.failed[name]}): the last one stays")
                if self.older:  # no file of this run beside those of another one
                    self.failed |= dict.fromkeys(files, self.failed[name])
                    break

    def save_file(self, path, contents):
        """Write one file, whole or not at all."""
        save(path, contents)

    def rename_older(self):
        """Rename the files in the folder that are not this run's, now that it has a checkpoint."""
        for name in self.older:
            if (self.out_dir / name).exists():
                put_in_place(self.out_dir / name, self.out_dir / OLD[name])
            else:
                remove(self.out_dir / OLD[name])  # of a run before that one
        self.older = ()

    def wait(self):
        """Wait until the files are on disk."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def has_lost_best(self):
        """Whether the last best.pt could not be written. True once: the next call returns False."""
        busy = self.thread and self.thread.is_alive()
        return not busy and self.failed.pop(BEST, None) is not None

    def require_saved(self, step):
        """Wait, and raise UserError if the last save, of `step`, has failed."""
        self.wait()
        if reason := self.failed.get(NEWEST):
            saved = "nothing" if self.newest is None else f"step {self.newest}"
            raise UserError(
                f"the run ends at step {step}, but {self.out_dir / NEWEST} can't be saved ({reason}); the "
                f"last that is saved of this run: {saved}; make room, or give another --out_dir"
            )
