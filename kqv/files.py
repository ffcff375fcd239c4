"""Files written whole or not at all, hashed, and unpickled without running any code."""

import hashlib
import io
import json
import os
import pickle
import shutil
from contextlib import contextmanager

from kqv.errors import UserError


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


class PlainUnpickler(pickle.Unpickler):
    """
    Admits strings, numbers and plain containers; any class or function that a pickle names is refused, but
    those in `harmless`, {module: names}.
    """

    harmless = {}

    def find_class(self, module, name):
        if name in self.harmless.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path):
    try:
        return PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(
            f"{path} is refused, since only plain containers are read from a pickle: {error}"
        ) from None


def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def sha256_of_file(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
        return digest.hexdigest()
