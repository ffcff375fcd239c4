"""Saving checkpoints while training goes on."""

import threading
import time
from pathlib import Path

import torch

from kqv.errors import warn
from kqv.files import remove
from kqv.formats.checkpoint import BEST, NEWEST, ONLY_TO_TRAIN, PREVIOUS, save


class Saver:
    """
    Saves checkpoints while training goes on: training waits for a copy in host memory, which a thread writes.
    """

    def __init__(self, out_dir, is_new_run):
        self.out_dir = Path(out_dir)
        self.older = (PREVIOUS, BEST) if is_new_run else ()  # files that another run may have left here
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
        files = {NEWEST: copy}
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
        """Write {name: contents}. A file that can't be written is a warning: training goes on."""
        for name, contents in files.items():
            try:
                self.save_file(self.out_dir / name, contents)
                self.forget_older_run()
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer, when the disk is full
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                warn(f"{self.out_dir / name} can't be saved ({reason}): training goes on, the last one stays")

    def save_file(self, path, contents):
        """Write one file, whole or not at all."""
        save(path, contents)

    def forget_older_run(self):
        """Remove the checkpoints that another run left in the folder, now that this run has one."""
        for name in self.older:
            remove(self.out_dir / name)
        self.older = ()

    def wait(self):
        """Wait until the files are on disk."""
        if self.thread:
            self.thread.join()
            self.thread = None
