"""
Saving checkpoints while training goes on.

At every moment, also after a kill and after a write that failed, ckpt.pt says what best.pt holds, or it is of
the best step itself; kqv/training/best.py then lets a resumed run write best.pt.
"""

import math
import threading
import time
from pathlib import Path

import torch

from kqv.errors import UserError, reason_of, warn
from kqv.files import put_in_place
from kqv.formats.checkpoint import BEST, NEWEST, ONLY_TO_TRAIN, save
from kqv.training.folder import OLD, WHOLE, begin_replacing, finish_replacing

SAID = ("best_val_loss", "best_step")  # what a checkpoint says about the best


class Saver:
    """
    Saves checkpoints while training goes on: training waits for a copy in host memory, which a thread writes.
    """

    def __init__(self, out_dir, older=(), newest=None, folder=None):
        """
        `older` names files in the folder that are not this run's: at its first save they are renamed, as in
        OLD. `newest` is the step of this run's checkpoint there, if it has one. `folder` is the OwnFolder.
        """
        self.out_dir, self.older, self.newest, self.folder = Path(out_dir), older, newest, folder
        self.failed = {}  # name of a file -> why its last save failed
        self.best = None  # the contents of best.pt while they are not on the disk
        self.held = dict(zip(SAID, (math.inf, -1), strict=True))  # what ckpt.pt says of the best.pt there
        self.copies = {}  # (address, shape, type) of a tensor -> its copy, used again at the next save
        self.thread = None

    def save(self, contents, best):
        """
        Copy a checkpoint's contents and begin to write them to ckpt.pt, and to best.pt if they are the best.
        Returns how many seconds the caller waited.
        """
        before = time.perf_counter()
        self.wait()
        if self.best:
            self.release_copies()
        copy = self.stage(contents)
        if any(tensor.is_pinned() for tensor in self.copies.values()):
            torch.cuda.synchronize()
        thread = threading.Thread(target=self.write, args=(copy, best), name="saver")
        try:
            thread.start()
            self.thread = thread
        except RuntimeError:  # the system has no more threads
            self.write(copy, best)
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
        return self.copies[key].copy_(value, non_blocking=value.is_cuda)  # MPS would not be waited for

    def release_copies(self):
        """Let the next copy take memory of its own: a best.pt that could not be written is in this one."""
        self.copies = {}

    def write(self, contents, is_best):
        """
        Write ckpt.pt, then best.pt if the contents are the best. A best.pt that could not be written before
        comes first: ckpt.pt of a later step names only a best that is on the disk.
        """
        if is_best:
            self.best = {name: value for name, value in contents.items() if name not in ONLY_TO_TRAIN}
        elif self.best and NEWEST not in self.older:
            self.attempt(BEST, self.write_best)
        said = {name: contents.get(name) for name in SAID}
        if not self.best:
            self.held = said
        elif not is_best:
            contents = {**contents, **self.held}
        self.attempt(NEWEST, self.write_newest, contents)
        if is_best and NEWEST not in self.older:  # no file of this run beside those of another one
            self.attempt(BEST, self.write_best)

    def attempt(self, name, write, *arguments):
        """Write a file. Where that is not possible, for whatever reason: a warning, and noted in `failed`."""
        self.failed[name] = "it was not written"
        try:
            write(*arguments)
            del self.failed[name]
        except BaseException as error:  # of any kind: training goes on, and the next save tries again
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failed[name] = reason_of(cause)
            warn(f"{self.out_dir / name} can't be saved ({self.failed[name]}): the last one stays")

    def write_newest(self, contents):
        self.older = self.in_main_process(self.require_folder)
        if NEWEST in self.older:
            self.save_file(self.out_dir / WHOLE, contents)
            self.in_main_process(begin_replacing, self.out_dir)
            self.older = ()
            self.in_main_process(finish_replacing, self.out_dir)
        else:
            self.save_file(self.out_dir / NEWEST, contents)
        self.newest = contents["iter_num"]

    def write_best(self):
        self.older = self.in_main_process(self.require_folder)
        if BEST in self.older:
            self.in_main_process(self.rename_best)
            self.older = ()
        self.save_file(self.out_dir / BEST, self.best)
        self.held = {name: self.best.get(name) for name in SAID}
        self.best = None

    def save_file(self, path, contents):
        """Write one file, whole or not at all."""
        save(path, contents)

    def in_main_process(self, do, *arguments):
        """
        Do something in the main process alone, and return in every process what it returned. Where it fails,
        raises an error in every process.
        """
        return do(*arguments)

    def require_folder(self):
        """
        Own the folder also where it was removed or replaced, and finish what was begun there. Returns the
        names in it that are not this run's.
        """
        is_another = self.folder and self.folder.take_again()
        finish_replacing(self.out_dir)
        return tuple(OLD) if is_another else self.older

    def rename_best(self):
        """Rename a best.pt whose loss was measured on something else than this run's."""
        if (self.out_dir / BEST).exists():
            put_in_place(self.out_dir / BEST, self.out_dir / OLD[BEST])

    def wait(self):
        """Wait until the files are on disk."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def require_saved(self, step):
        """Wait, and raise UserError if the last save, of `step`, has failed."""
        self.wait()
        if reason := self.failed.get(NEWEST):
            saved = "nothing" if self.newest is None else f"step {self.newest}"
            raise UserError(
                f"the run ends at step {step}, but {self.out_dir / NEWEST} can't be saved ({reason}); the "
                f"last that is saved of this run: {saved}; make room, or give another --out_dir"
            )
        if self.best:
            reason = self.failed.get(BEST, "it was not written")
            way = "make room, and --init_from=resume writes it" if self.best["iter_num"] == step else ""
            raise UserError(
                f"the run ends at step {step}, but {self.out_dir / BEST}, of step {self.best['iter_num']}, "
                f"can't be saved ({reason}): {way or 'the best before that stays'}"
            )
