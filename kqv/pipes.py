"""What a user names that is no file but can be read: a pipe, a terminal. A read of it always ends."""

import os
import select
import stat
import time

from kqv.errors import UserError


def content_of(path):
    """The bytes of a file, a pipe or a terminal. Raises UserError where reading would not end; OSError."""
    file, first = opened(path)
    with file:
        require_end(file, path)
        return first + file.read()


def opened(path, seconds=5):
    """(file, its first bytes, which were read). Raises UserError for a pipe that nobody writes to so long."""
    if not stat.S_ISFIFO(os.stat(path).st_mode) or os.path.realpath(path).startswith("/proc/"):
        return open(path, "rb"), b""  # <(COMMAND) and /dev/stdin have a writer, or had one
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    first, end = b"", time.monotonic() + seconds
    while not first and not select.select([file], [], [], 0.1)[0]:
        try:
            first = os.read(file.fileno(), 1)
        except BlockingIOError:  # a program has it open
            break
        if not first and time.monotonic() > end:
            raise UserError(f"{path} is a pipe that no program writes to: start that program first")
    os.set_blocking(file.fileno(), True)
    return file, first


def require_end(file, name):
    """Raise UserError for a device that is neither a terminal nor empty: /dev/zero has no end."""
    try:
        status = os.fstat(file.fileno())
    except OSError:  # no file is behind it
        return
    is_device = stat.S_ISBLK(status.st_mode) or (stat.S_ISCHR(status.st_mode) and not file.isatty())
    if is_device and status.st_rdev != os.stat(os.devnull).st_rdev:
        raise UserError(f"{name} is a device, which may have no end: give a file, or a pipe")
