"""
Where text comes from: files, folders, standard input, the Hugging Face hub and the built-in sets.

A `Source` is a stream of pieces of at most about a megabyte, so memory does not grow with the text. It can be
read again, and gives the same pieces in the same order.
"""

import codecs
import glob
import gzip
import hashlib
import io
import os
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager
from typing import NamedTuple

from kqv.errors import UserError, first_line
from kqv.text import hub, utf8
from kqv.text.built_in import BUILT_IN
from kqv.text.file_formats import COMPRESSED, ENDINGS, FORMATS, is_compressed, reader_of

FEW = 100  # so many text files are cut in two each; of more, each is in one split as a whole


STDIN = "-"


STANDARD_INPUT = "standard input"  # its name in messages


class Piece(NamedTuple):
    """A part of a text, or a whole conversation [(role, text), ...]."""

    split: str  # "train" or "val"
    begins: bool  # whether it is a document's first piece
    content: str | list


class Source:
    """
    The documents of paths, folders, globs, - (standard input), hf:ORG/NAME[:CONFIG] or the name of a built-in
    set, as an iterable of Pieces.

    Where there are a few texts, the validation split is the end of each. Where there are many, or rows of
    tables, it is those documents whose hash says so: a document's split depends on nothing but its text, and
    a conversation's on the first message of the user. Raises UserError where something can't be used.
    """

    def __init__(self, patterns, text_column="text", val_fraction=0.1):
        self.patterns, self.text_column, self.val_fraction = patterns, text_column, val_fraction
        self.built_in = BUILT_IN.get(patterns[0]) if len(patterns) == 1 else None
        if self.built_in and isinstance(self.built_in.documents, str):
            self.built_in, patterns = None, [self.built_in.documents]
        self.paths = [] if self.built_in else [path for pattern in patterns for path in files_of(pattern)]
        self.spool = spooled_standard_input() if STDIN in self.paths else None
        self.cut = sum(reader_of(path) is None for path in self.paths) < FEW
        self.seen = {}  # {path: the file's identity when it was first read}
        from_hub = [path for path in self.paths if path.startswith(hub.PREFIX)]
        self.is_on_hub = any(map(hub.is_on_hub, from_hub))
        # Bytes on the disk, all and those read so far, for a progress bar; None: not known.
        known = self.paths and not from_hub
        self.size = sum(self.status(path).st_size for path in self.paths) if known else None
        self.position = 0

    def __iter__(self):
        self.position = 0
        kind = None
        for name, piece in self.read():
            kind = kind or type(piece.content)
            if type(piece.content) is not kind:
                raise UserError(
                    f"{name} mixes texts and conversations with what came before: prepare each apart"
                )
            yield piece
        if kind is None:
            name = self.paths[0] if len(self.paths) == 1 else " ".join(self.patterns)
            raise UserError(
                f"{STANDARD_INPUT if name == STDIN else name} is empty: there is nothing to train on"
            )

    def read(self):
        """(name of its file or set, Piece) of all documents in order."""
        if self.built_in:
            for document in self.built_in.documents():
                for piece in self.pieces(document, cut=self.cut):
                    yield self.patterns[0], piece
        done = 0
        for path in self.paths:
            name = STANDARD_INPUT if path == STDIN else path
            for piece in self.pieces_in(path, name, done):
                yield name, piece
            if self.size is not None:
                done += self.status(path).st_size
                self.position = done

    def pieces_in(self, path, name, done):
        """The Pieces of one path; `done` is how many bytes were read before it."""
        if path.startswith(hub.PREFIX):
            for document in hub.documents(path, self.text_column):
                yield from self.pieces(document)
            return
        before = self.seen.setdefault(path, identity(self.status(path)))
        try:
            with self.opened(path) as (file, on_disk):
                for piece in self.pieces_of_file(path, name, file):
                    yield piece
                    self.position = done + on_disk.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{name} is a damaged or truncated gzip file ({first_line(error)}): fetch it or compress it "
                "again"
            ) from None
        except OSError as error:
            raise unreadable(name, error) from None
        if identity(self.status(path)) != before:
            raise UserError(
                f"{name} changed while it was read: prepare it when nothing writes to it any more"
            )

    def pieces_of_file(self, path, name, file):
        read_documents = reader_of(path)
        if not read_documents:
            yield from self.text_pieces(file, name, self.length(path) if self.cut else None)
            return
        for document in read_documents(file, name, self.text_column):
            yield from self.pieces(document)

    def pieces(self, document, cut=False):
        """A document in memory as Pieces; none where it is empty."""
        if isinstance(document, list):
            question = next(text for role, text in document if role == "user")
            yield Piece(self.split_of(question), True, document)
        elif document and (cut or len(document) > utf8.PIECE):
            content = document.encode("utf-8")
            yield from self.text_pieces(io.BytesIO(content), "text", len(content) if cut else None)
        elif document:
            yield Piece(self.split_of(document), True, document)

    def text_pieces(self, file, name, size):
        """
        A text file as Pieces; none where it is blank. Its end is for validation where its `size` in bytes is
        given; else all of it is in one split.
        """
        beginning = file.read(utf8.PIECE)
        if len(beginning) < utf8.PIECE and not beginning.removeprefix(codecs.BOM_UTF8).strip():
            return
        file.seek(0)
        cut = None if size is None else int(size * (1 - self.val_fraction))
        split = None
        for is_end, text in utf8.stretches(file, name, cut):
            begins, split = split is None, split or self.split_of(text)
            yield Piece(split if cut is None else "val" if is_end else "train", begins, text)

    def split_of(self, text):
        """The split of a document that is, or begins with, this text."""
        number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
        return "val" if number < self.val_fraction * 2**64 else "train"

    @contextmanager
    def opened(self, path):
        """(file of decompressed bytes, file on the disk)."""
        with self.opened_on_disk(path) as on_disk:
            if is_compressed(path):
                with gzip.GzipFile(fileobj=on_disk) as file:
                    yield file, on_disk
            else:
                yield on_disk, on_disk

    def opened_on_disk(self, path):
        if path == STDIN:
            self.spool.seek(0)
            return open(os.dup(self.spool.fileno()), "rb")
        return open(path, "rb")

    def length(self, path):
        """How many bytes of text a file has, decompressed."""
        if not is_compressed(path):
            return self.status(path).st_size
        with self.opened(path) as (file, _):
            return sum(map(len, iter(lambda: file.read(utf8.PIECE), b"")))

    def status(self, path):
        try:
            return os.fstat(self.spool.fileno()) if path == STDIN else os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None


def with_progress(source, what):
    """The pieces of a Source, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from source
        return
    from tqdm import tqdm  # slow: only for a terminal

    with tqdm(total=source.size, desc=what, unit="B", unit_scale=True) as bar:
        for piece in source:
            bar.update((source.position if source.size else bar.n + len(piece.content)) - bar.n)
            yield piece


def identity(status):
    """What is different after a file was written."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def spooled_standard_input():
    """Standard input as a file on the disk, which can be read twice."""
    if sys.stdin is None:
        raise UserError(f"{STANDARD_INPUT} is closed: pipe a text into it")
    spool = tempfile.TemporaryFile()
    shutil.copyfileobj(sys.stdin.buffer, spool, utf8.PIECE)
    spool.flush()
    return spool


def files_of(pattern):
    """The paths that a user's source names; those of a folder or a glob sorted. Raises UserError."""
    if os.path.isdir(pattern):
        return files_in(pattern)
    if pattern == STDIN or pattern.startswith(hub.PREFIX) or os.path.exists(pattern):
        return [pattern]
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not paths:
        raise UserError(
            f"{pattern} names no file: give a text file, a folder, a glob in quotes, hf:ORG/NAME, or a "
            f"built-in set ({', '.join(BUILT_IN)})"
        )
    return paths


def files_in(folder):
    """The files with text in a folder and in those below it, sorted; hidden ones are left out."""

    def refuse(error):
        raise unreadable(error.filename, error)

    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".") and name.lower().endswith(ENDINGS)]
        paths += [os.path.join(parent, name) for name in names]
    if not paths:
        raise UserError(
            f"{folder} is a folder without a text file ({', '.join(FORMATS)}, or these with {COMPRESSED}): "
            "name files that end in something else by a glob in quotes"
        )
    return sorted(paths)


def unreadable(name, error):
    return UserError(f"{name} cannot be read ({error.strerror or error}): is it there, and yours to read?")


def listing():
    """What a source can be, for --help: a line for each kind."""
    kinds = {
        "a built-in set": [(name, found.help) for name, found in BUILT_IN.items()],
        f"a file, also compressed ({COMPRESSED}); a folder; a glob in quotes": [
            *((f"*{ending}", found.help) for ending, found in FORMATS.items()),
            ("others", "the same as *.txt, where named by themselves or by a glob"),
        ],
        "something else": [
            (
                f"{hub.PREFIX}ORG/NAME",
                "a set on the Hugging Face hub; hf:ORG/NAME:CONFIG, one of several there",
            ),
            (f"{hub.PREFIX}FOLDER", "a folder like such a set"),
            (STDIN, "standard input: one document"),
        ],
    }
    return "\n".join(
        "\n".join([f"  {kind}:", *(f"    {name:<18} {text}" for name, text in lines)])
        for kind, lines in kinds.items()
    )
