"""Files written whole or not at all, hashed, and unpickled without running any code."""

import hashlib
import io
import json
import os
import pickle
import shutil

from kqv.errors import UserError


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder):
    """Make renames in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    """Write a JSON file beside its name first, so that it is there whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def sha256_of_file(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
        return digest.hexdigest()
