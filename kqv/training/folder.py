"""A run's folder has one owner at a time, and the checkpoints of one run at a time."""

import errno
import fcntl
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from kqv.errors import UserError, warn
from kqv.files import put_in_place, remove, sync
from kqv.formats.checkpoint import BEST, NEWEST, PREVIOUS

METRICS = "metrics.jsonl"
OLDER_METRICS = "metrics.prev.jsonl"  # of an earlier run, until a new one replaces its checkpoints

LOCK = ".lock"  # in the folder, while a run owns it
WHOLE = f".{NEWEST}.whole"  # the first checkpoint of a new run, whole and on the disk
FIRST = f".{NEWEST}.first"  # the same, from when it is to replace what another run left, until it has

# What a run leaves in its folder is kept under these names when another run saves there. ckpt.pt is the last
# to be renamed.
OLD = {BEST: "best.old.pt", OLDER_METRICS: "metrics.old.jsonl", NEWEST: "ckpt.old.pt"}

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def own_folder(config, world):
    """
    A context in which all processes of this run together own the folder config.out_dir, which is made if it
    is not there. It gives the OwnFolder in the main process, else None. A run that only evaluates writes
    nothing, and owns nothing.

    Raises UserError, in every process, where another run owns the folder, or the folder can't be written to.
    """
    if config.eval_only:
        yield None
        return
    folder, owned, problem = Path(config.out_dir), None, None
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        if world.is_main:
            try:
                owned = OwnFolder(folder)
            except UserError as error:
                problem = str(error)
        if problem := world.share(problem):
            raise UserError(problem)
        yield owned
    finally:
        if owned:
            owned.leave()
        if world.is_main:
            remove_empty(new)


class OwnFolder:
    """A folder that this process owns. Raises UserError where another run owns it, or nobody can."""

    def __init__(self, path):
        self.path, self.lock = path, take(path)
        self.number = os.open(path, os.O_RDONLY)  # of the folder, whatever becomes of its name
        try:
            finish_replacing(path)
        except OSError as error:
            self.leave()
            raise UserError(
                f"{path} can't be written to ({error.strerror}): give another --out_dir"
            ) from None

    def take_again(self):
        """
        Own the folder again where somebody has removed it, replaced it or freed it. Returns whether it is
        another one now: what lies in it is not this run's.
        """
        if is_at(self.lock, self.path / LOCK):
            return False
        lock = take(self.path)
        os.close(self.lock)
        self.lock = lock
        if is_at(self.number, self.path):
            return False
        os.close(self.number)
        self.number = os.open(self.path, os.O_RDONLY)
        if (self.path / METRICS).exists():
            os.replace(self.path / METRICS, self.path / OLDER_METRICS)
        warn(f"{self.path} was removed or replaced during the run: the run goes on in the new one")
        return True

    def leave(self):
        """Own it no longer."""
        if is_at(self.lock, self.path / LOCK):
            with suppress(OSError):
                (self.path / LOCK).unlink()
        os.close(self.lock)
        os.close(self.number)


def is_at(number, path):
    """Whether the open file or folder of this number is the one at `path`."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(number), path.stat())
    return False


def take(folder):
    """
    Own a folder, by a lock on a file in it -> the file's number. The system frees the lock of a process that
    ends. Raises UserError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made ({error.strerror}): give another --out_dir") from None
    path = folder / LOCK
    try:
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    break
            os.close(lock)  # its owner removed the file while this process opened it
    except BlockingIOError:
        owner = os.read(lock, 200).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(
            f"{folder} is in use by another run ({owner}): wait for its end, or give another --out_dir"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(
                f"{folder} can't be written to ({error.strerror}): give another --out_dir"
            ) from None
        warn(f"the file system of {folder} has no locks: take care that no other run writes there")
        return lock
    with suppress(OSError):  # the disk is full
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def remove_empty(folders):
    """Remove folders, inner ones first, that have nothing in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def begin_replacing(folder):
    """
    Decide that the first checkpoint of a new run, which is whole in the folder, replaces what an earlier run
    left there. What an even earlier run left under a name of OLD is removed if nothing else gets that name.
    """
    for name, old in OLD.items():
        was = (name, PREVIOUS) if name == NEWEST else (name,)
        if not any((folder / each).exists() for each in was):
            remove(folder / old)
    os.replace(folder / WHOLE, folder / FIRST)


def finish_replacing(folder):
    """
    Where a first checkpoint is to replace what an earlier run left: rename that as in OLD, then the first
    checkpoint to ckpt.pt. The process may be killed, or a rename may fail, at any moment of this: the next
    call goes on.
    """
    if not (folder / FIRST).exists():
        return
    sync(folder)
    if (folder / NEWEST).exists():
        remove(folder / PREVIOUS)
    elif (folder / PREVIOUS).exists():
        os.replace(folder / PREVIOUS, folder / NEWEST)
    for name, old in OLD.items():
        if (folder / name).exists():
            put_in_place(folder / name, folder / old)
    put_in_place(folder / FIRST, folder / NEWEST)
