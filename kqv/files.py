"""Files written whole or not at all, hashed, and read where they are files and not too large."""

import hashlib
import json
import os
import shutil
import stat
from contextlib import contextmanager

from kqv.errors import UserError

MOST_JSON = 2**25  # bytes of a file of JSON; a value of JSON can take 25 times as much memory


@contextmanager
def replacing(path, previous=None):
    """
    A path beside `path` (a Path), to write a file or a folder to:

        with replacing(path) as beside:
            beside.write_text("...")

    When the block ends, what was written goes to the disk and then takes the place of `path`. When the block
    raises, or the process is killed in it, `path` is as it was. What was at `path` before is kept as
    `previous` (a Path) if that is given. Two processes must not replace the same path at the same time.
    """
    beside = path.with_name(f".{path.name}.new")
    remove(beside)  # a killed process may have left one
    try:
        yield beside
        for written in (*beside.rglob("*"), beside):
            sync(written)
        put_in_place(beside, path, previous)
    finally:
        remove(beside)


def put_in_place(beside, path, previous=None):
    """
    Rename `beside`, a file or folder that is whole and on the disk, to `path`. What was at `path` before is
    kept as `previous` if that is given. No rename replaces a folder: it is moved to `previous`, or aside,
    first, so a process that is killed in between leaves nothing at `path`.
    """
    earlier = previous or aside_of(path)
    moved = path.exists() and (previous or path.is_dir() or beside.is_dir())
    if moved:
        remove(earlier)
        os.replace(path, earlier)
    try:
        os.replace(beside, path)
    except OSError:
        if moved:
            os.replace(earlier, path)
        raise
    sync(path.parent)
    if not previous:
        remove(earlier)


def aside_of(path):
    """Where put_in_place moves a folder that it replaces, until the new one is in its place."""
    return path.with_name(f".{path.name}.old")


def put_back(path):
    """Undo a put_in_place that was killed after it had moved aside what was at `path`."""
    if not path.exists() and aside_of(path).exists():
        os.replace(aside_of(path), path)


def require_no_dangling_link(path):
    """Raise UserError where a path (a Path), or a folder on the way to it, is a link to what is not there."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(
                f"{part.absolute()} is a link to {os.readlink(part)}, which is not there: make that, or "
                "remove the link"
            )


def sync(path):
    """Make a file's content, or a folder's renames, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_file(path):
    """
    Raise UserError where a path names something else than a file: reading a pipe that nobody writes to, or a
    device without an end, would never end. What is not there is left to the one who opens it.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise UserError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file: put a file there")


def read_file(path, most=MOST_JSON):
    """The bytes of a file. Raises UserError where there are more than `most`, or it is no file; OSError."""
    require_file(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most / 2**20:.0f} MiB, too many for what it should be")
    return content


def read_json(path):
    """The value in a file of JSON. Raises UserError as `read_file`, ValueError, RecursionError, OSError."""
    return json.loads(read_file(path).decode("utf-8"))


def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def sha256_of_file(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
        return digest.hexdigest()
