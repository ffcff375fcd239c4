"""A run's folder has one owner at a time."""

import errno
import fcntl
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from kqv.errors import UserError, warn

LOCK = ".lock"  # in the folder, while a run owns it
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def own_folder(config, world):
    """
    A context in which all processes of this run together own the folder config.out_dir, which is made if it
    is not there. A run that only evaluates writes nothing, and owns nothing.

    Raises UserError, in every process, where another run owns the folder, or the folder can't be written to.
    """
    if config.eval_only:
        yield
        return
    folder, lock, problem = Path(config.out_dir), None, None
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        if world.is_main:
            try:
                lock = take(folder)
            except UserError as error:
                problem = str(error)
        if problem := world.share(problem):
            raise UserError(problem)
        yield
    finally:
        if lock:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)
        if world.is_main:
            remove_empty(new)


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
