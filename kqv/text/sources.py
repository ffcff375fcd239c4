"""
Where raw text comes from: the user's files, standard input, the Hugging Face hub and what is built in.

A `Source` is read as a stream of pieces of at most about a megabyte, so memory does not grow with the text.
It can be read again, and gives the same pieces in the same order.

A text file is one document. So is each line of a .jsonl file and each row of a .parquet file or a hub's set:
a text, or a conversation of `messages` or of a `prompt` and its `completion`. A line of a .tsv file is a
prompt, a tab and its completion.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError, first_line
from kqv.text.built_in import BUILT_IN, prompted

PIECE = 2**20  # bytes of text at once


FEW = 100  # text files of which each is cut in two, rather than being in one split as a whole


ROLES = ("system", "user", "assistant")


STANDARD_INPUT = "standard input"


class Piece(NamedTuple):
    """A stretch of a document, or a whole conversation [(role, text), ...]."""

    split: str  # "train" or "val"
    begins: bool  # whether it is a document's first piece
    content: str | list


class Source:
    """
    What paths, folders, globs, - (standard input), hf:ORG/NAME[:CONFIG] or the name of a built-in set hold,
    as an iterable of Pieces.

    The validation split is the last part of each text, where those are a few books. It is those documents
    whose hash says so, where they are many or rows of a table: then a document's split depends on nothing but
    itself, a conversation's on what the user asks first. Raises UserError where something can't be used.
    """

    def __init__(self, patterns, text_column="text", val_fraction=0.1):
        self.patterns, self.text_column, self.val_fraction = patterns, text_column, val_fraction
        self.built_in = BUILT_IN.get(patterns[0]) if len(patterns) == 1 else None
        if self.built_in and isinstance(self.built_in.documents, str):
            self.built_in, patterns = None, [self.built_in.documents]
        self.paths = [] if self.built_in else [path for pattern in patterns for path in files_of(pattern)]
        self.spool = spooled_standard_input() if "-" in self.paths else None
        texts = [path for path in self.paths if reader_of(path) is None]
        self.cut = len(texts) < FEW
        self.seen = {}  # path -> what the system said of the file when it was read first
        # Bytes on disk, all and those read so far, to show progress; None where that is not known.
        self.size = None
        from_hub = [path for path in self.paths if path.startswith("hf:")]
        self.is_on_hub = not all(os.path.isdir(name_on_hub(path)[0]) for path in from_hub)
        if self.paths and not from_hub:
            self.size = sum(self.status(path).st_size for path in self.paths)
        self.position = 0

    def __iter__(self):
        self.position = 0
        kind = name = None
        for name, piece in self.read():
            kind = kind or type(piece.content)
            if type(piece.content) is not kind:
                raise UserError(
                    f"{name} mixes texts and conversations with what came before: prepare each apart"
                )
            yield piece
        if kind is None:
            shown = self.paths[0] if len(self.paths) == 1 else " ".join(self.patterns)
            raise UserError(
                f"{STANDARD_INPUT if shown == '-' else shown} is empty: there is nothing to train on"
            )

    def read(self):
        """(where it is from, piece) of all documents in order."""
        if self.built_in:
            for document in self.built_in.documents():
                for piece in self.pieces(document, cut=self.cut):
                    yield self.patterns[0], piece
        done = 0
        for path in self.paths:
            name = STANDARD_INPUT if path == "-" else path
            for piece in self.pieces_in(path, name):
                yield name, piece
            if self.size is not None:
                done += self.status(path).st_size
                self.position = done

    def pieces_in(self, path, name):
        if path.startswith("hf:"):
            for row, where in hub_rows(path):
                yield from self.pieces(document_of(row, self.text_column, where))
            return
        before = self.seen.setdefault(path, changes_of(self.status(path)))
        done = self.position
        try:
            with self.opened(path) as (file, raw):
                reader = reader_of(path)
                if reader:
                    for document in reader(file, name, self.text_column):
                        yield from self.pieces(document)
                        self.position = done + raw.tell()
                else:
                    size = self.length(path) if self.cut else None
                    for piece in self.text_pieces(file, name, size):
                        yield piece
                        self.position = done + raw.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{name} is a damaged or truncated gzip file ({first_line(error)}): fetch it or compress it "
                "again"
            ) from None
        except OSError as error:
            raise unreadable(name, error) from None
        if changes_of(self.status(path)) != before:
            raise UserError(
                f"{name} changed while it was read: prepare it when nothing writes to it any more"
            )

    def pieces(self, document, cut=False):
        """One document that is in memory, as pieces; none where it is empty."""
        if isinstance(document, list):
            question = next(text for role, text in document if role == "user")
            yield Piece(self.split_of(question), True, document)
        elif document and (cut or len(document) > PIECE):
            content = document.encode("utf-8")
            yield from self.text_pieces(io.BytesIO(content), "text", len(content) if cut else None)
        elif document:
            yield Piece(self.split_of(document), True, document)

    def text_pieces(self, file, name, size):
        """A file's pieces, cut in two where its `size` is given, else in one split; none of a blank file."""
        beginning = file.read(PIECE)
        if len(beginning) < PIECE and not beginning.removeprefix(codecs.BOM_UTF8).strip():
            return
        file.seek(0)
        cut = None if size is None else int(size * (1 - self.val_fraction))
        split = None
        for tail, text in stretches(file, name, cut):
            begins, split = split is None, split or self.split_of(text)
            yield Piece(split if cut is None else "val" if tail else "train", begins, text)

    def split_of(self, text):
        """The split of a document that is, or begins with, this text."""
        number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
        return "val" if number < self.val_fraction * 2**64 else "train"

    @contextmanager
    def opened(self, path):
        """(decompressed bytes, bytes on disk) of a file or of standard input."""
        with self.raw(path) as raw:
            if path.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file, raw
            else:
                yield raw, raw

    def raw(self, path):
        if path == "-":
            self.spool.seek(0)
            return open(os.dup(self.spool.fileno()), "rb")
        return open(path, "rb")

    def length(self, path):
        """How many bytes of text a file has, decompressed."""
        if not path.lower().endswith(".gz"):
            return self.status(path).st_size
        with self.opened(path) as (file, _):
            return sum(map(len, iter(lambda: file.read(PIECE), b"")))

    def status(self, path):
        try:
            return os.fstat(self.spool.fileno()) if path == "-" else os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None


def changes_of(status):
    """What changes when a file is written."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def spooled_standard_input():
    """Standard input as a file on disk, which can be read twice."""
    if sys.stdin is None:
        raise UserError(f"{STANDARD_INPUT} is closed: pipe a text into it")
    spool = tempfile.TemporaryFile()
    shutil.copyfileobj(sys.stdin.buffer, spool, PIECE)
    spool.flush()
    return spool


def files_of(pattern):
    """The paths that one source names; those of a folder or a glob sorted."""
    if os.path.isdir(pattern):
        return files_in(pattern)
    if pattern == "-" or pattern.startswith("hf:") or os.path.exists(pattern):
        return [pattern]
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not paths:
        raise UserError(
            f"{pattern} names no file: give a text file, a folder, a glob in quotes, hf:ORG/NAME, or a "
            f"built-in set ({', '.join(BUILT_IN)})"
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


def stretches(file, name, cut=None):
    """
    (whether it lies behind byte `cut`, text) for all of a UTF-8 file, at most PIECE bytes at a time.

    A stretch ends before the space between two words where it can: there the tokens are the same as those of
    the whole text, since none goes from a word into the space behind it.
    """
    rest, ended, done, place = b"", False, 0, (1, 0)
    while True:
        while not ended and len(rest) < PIECE + 4:
            more = file.read(PIECE)
            rest, ended = rest + more, not more
        if not rest:
            return
        end = len(rest) if ended and len(rest) <= PIECE else border(rest)
        if cut is not None and done < cut < done + end:
            end = character_border(rest, cut - done)
        text = decode(rest[:end], name, place)
        if text:
            yield cut is not None and done >= cut, text
        done, rest, place = done + end, rest[end:], behind(rest[:end], place)


def border(data):
    """Where to end a stretch of at most PIECE bytes."""
    for last in (rb"\S(?= )", rb"\S\n(?=\S)"):
        if found := re.match(rb"(?s).*" + last, data[: PIECE + 1]):
            return found.end()
    return character_border(data, PIECE)


def character_border(data, at):
    """The first place from `at` on that is not inside a character."""
    while at < len(data) and 0x80 <= data[at] < 0xC0:
        at += 1
    return at


def decode(content, name, place):
    """
    UTF-8 bytes from a `place` in a file, (line, byte of it) -> text, without the byte order mark that the
    file may begin with.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number, offset = behind(content[: error.start], place)
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {offset} of line {number})"
            ": convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from None
    return text.removeprefix("\ufeff") if place == (1, 0) else text


def behind(content, place):
    """The place in a file, (line, byte of it), that follows such content."""
    line, offset = place
    lines = content.count(b"\n")
    return line + lines, len(content) - (content.rfind(b"\n") + 1) + (0 if lines else offset)


def jsonl_documents(file, name, text_column):
    """A JSON object in each line that isn't empty."""
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        line = decode(line, name, (number, 0))
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
        yield document_of(row, text_column, where)


def tsv_documents(file, name, _):
    """A prompt, a tab and its completion in each line that isn't empty; \\n and \\t stand for themselves."""
    for number, line in enumerate(file, start=1):
        line = decode(line, name, (number, 0)).rstrip("\r\n")
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0]:
            raise UserError(
                f"{name}, line {number} has {len(fields) - 1} tabs and {len(fields[0])} characters before "
                "the first: a line of a .tsv file is a prompt, a tab and its completion"
            )
        yield prompted(*fields)


def parquet_documents(file, name, text_column):
    """A row of a table each."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {name} needs: pip install pyarrow") from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = columns_of(table.schema_arrow.names, text_column, name)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for index in range(len(batch)):
                number += 1
                where = f"{name}, row {number}"
                try:
                    row = {column: batch.column(column)[index].as_py() for column in columns}
                except UnicodeDecodeError:
                    raise UserError(
                        f"{where} is not UTF-8 text: write the table again from UTF-8 strings"
                    ) from None
                yield document_of(row, text_column, where)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a whole parquet file ({first_line(error)}): fetch it or write it again"
        ) from None


def name_on_hub(pattern):
    """hf:NAME[:CONFIG] -> (NAME, CONFIG or "")."""
    name, _, config = pattern.removeprefix("hf:").partition(":")
    return name, config


def hub_rows(pattern):
    """(row, where it is) of the training part of a set on the Hugging Face hub, or in a folder like one."""
    name, config = name_on_hub(pattern)
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading {pattern} needs: pip install datasets") from None
    for library in ("datasets", "huggingface_hub"):  # their retries and errors: one comes below
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield row, f"{pattern}, row {number}"
    except Exception as error:  # offline, refused, no such set, damaged: each library has errors of its own
        raise UserError(
            f"cannot read {name} from the Hugging Face hub ({first_line(error, 150)}): is it in reach, and "
            "its name right? hf:FOLDER reads files that you have"
        ) from None


READERS = {".jsonl": jsonl_documents, ".parquet": parquet_documents, ".tsv": tsv_documents}


IN_FOLDERS = (".txt", ".md", ".jsonl", ".parquet", ".tsv", ".txt.gz", ".jsonl.gz", ".tsv.gz")


def reader_of(path):
    """The function that reads such a file's documents; None for a text file, which is one document."""
    return READERS.get(Path(path.lower().removesuffix(".gz")).suffix)


def columns_of(columns, text_column, where):
    """The columns of a table that hold its documents."""
    for wanted in ((text_column,), ("messages",), ("prompt", "completion")):
        if all(column in columns for column in wanted):
            return wanted
    there = ", ".join(map(repr, columns))[:100] or "it has none"
    raise UserError(
        f"{where} has no column {text_column!r}, nor messages, nor a prompt and completion: say which one "
        f"has the text, --text_column=NAME ({there})"
    )


def document_of(row, text_column, where):
    """A row {column: value} as a text, a conversation, or None where it has none."""
    columns = columns_of(row, text_column, where)
    if columns == ("messages",):
        return conversation(row["messages"], where)
    values = [row[column] for column in columns]
    for column, value in zip(columns, values, strict=True):
        require_text(value, column, where)
    if len(values) == 1:
        return values[0]
    if not values[0] or values[1] is None:
        raise UserError(
            f"{where} has no {columns[0 if not values[0] else 1]}: leave the row out, or fill it in"
        )
    return prompted(*values)


def conversation(messages, where):
    """[{"role": ..., "content": ...}, ...] -> [(role, text), ...]. Raises UserError for what is none."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where} has no list of messages: [{{"role": "user", "content": "..."}}, ...]')
    said = []
    for number, message in enumerate(messages, start=1):
        role, text = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if role not in ROLES or not isinstance(text, str) or (role == "system" and number > 1):
            shown = json.dumps(message, default=str)[:80]
            raise UserError(
                f'{where}, message {number} is {shown}: each is {{"role": "user" or '
                '"assistant", "content": text}, and the first may be by "system"'
            )
        require_text(text, "content", where)
        said.append((role, text))
    roles = [role for role, _ in said if role != "system"]
    if roles[-1:] != ["assistant"] or "user" not in roles:
        raise UserError(
            f"{where} does not end with what the assistant says to the user: there is nothing to learn"
        )
    return said


def require_text(value, column, where):
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(
            f"{where} has a {type(value).__name__} in column {column!r}, not a string: say which one "
            "has the text, --text_column=NAME"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has \\u{ord(value[error.start]):04x} in column {column!r}, half of a surrogate "
            "pair, which is no character: remove it"
        ) from None


def unreadable(name, error):
    return UserError(f"{name} cannot be read ({error.strerror or error}): is it there, and yours to read?")
