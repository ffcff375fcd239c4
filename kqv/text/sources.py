"""
Where text comes from: files, folders, standard input, the Hugging Face hub and the built-in sets.

A `Source` is a stream of pieces of at most about a megabyte, so memory does not grow with the text. It can be
read again, and gives the same pieces in the same order.
"""

import hashlib
import io
import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from kqv import pipes
from kqv.errors import UserError
from kqv.files import require_file
from kqv.text import hub, opening, utf8
from kqv.text.built_in import BUILT_IN
from kqv.text.file_formats import FORMATS, format_of
from kqv.text.paths import STANDARD_INPUT, STDIN, files_of, unreadable

BLANK = 2**26  # the most bytes without a word that a text may begin with

FEW = 100  # of fewer text files, each is cut into train and val; of more, each is in one split


class Piece(NamedTuple):
    """A part of a text, or a whole conversation [(role, text), ...]."""

    split: str  # "train" or "val"
    begins: bool  # whether it is a document's first piece
    content: str | list
    # What a tokenizer without an id for the end of a text puts before it: "\n", or "" where the document
    # before it ends so; None where no document of the split came before.
    joint: str | None = None


class Source:
    """
    The documents of paths, folders, globs, - (standard input), hf:ORG/NAME[:CONFIG] or the name of a built-in
    set, as an iterable of Pieces. Lines end in a newline, however they ended.

    Where there are a few texts, the validation split is the end of each. Where there are many, or rows of
    tables, it is those documents whose hash says so: a document's split depends on nothing but its text, and
    a conversation's on the first message of the user. Or the validation split is a source of its own, `val`.
    A row of more than `row` bytes is refused. Raises UserError where something can't be used.
    """

    def __init__(self, patterns, text_column="text", val_fraction=0.1, val=None, row=utf8.ROW):
        self.val = Source([val], text_column, 0.0, row=row) if val else None
        self.patterns, self.text_column, self.row = patterns, text_column, row
        self.val_fraction = 0.0 if val else val_fraction
        self.built_in = BUILT_IN.get(patterns[0]) if len(patterns) == 1 else None
        if self.built_in and isinstance(self.built_in.documents, str):
            self.built_in, patterns = None, [self.built_in.documents]
        self.paths = [] if self.built_in else [path for pattern in patterns for path in files_of(pattern)]
        from_hub = [path for path in self.paths if path.startswith(hub.PREFIX)]
        for path in {*self.paths} - {*from_hub, *patterns}:  # a pipe is read where the user names it
            require_file(path)
        self.spools = {  # {path: a copy of what can be read only once: of standard input, or another pipe}
            path: spooled(path) for path in {*self.paths} - {*from_hub} if not os.path.isfile(path)
        }
        self.cut = sum(format_of(path).documents is None for path in self.paths) < FEW
        self.seen = {}  # {path: the file's identity when it was first read}
        self.is_on_hub = any(map(hub.is_on_hub, from_hub)) or bool(self.val and self.val.is_on_hub)
        # Bytes on the disk, all and those read so far, for a progress bar; None: not known.
        known = self.paths and not from_hub
        self.size = sum(self.status(path).st_size for path in self.paths) if known else None
        self.position = 0
        self.lowest, self.highest = 1.0, 0.0  # val_fraction from which some text is in val; from which all is
        self.has_joints = False  # whether a newline was missing between two documents
        self.has_other_line_ends = False  # whether one that was read was no newline

    def __iter__(self):
        kind, before = None, None
        ends_a_line = {}  # of each split that has begun, whether the last document in it does
        where = set()  # the splits of the document so far
        for name, piece in self.read_all():
            kind = kind or type(piece.content)
            if type(piece.content) is not kind:
                raise UserError(
                    f"{name} mixes texts and conversations with what came before: prepare each apart"
                )
            if (piece.begins or piece.split != before) and piece.split in ends_a_line:
                piece = piece._replace(joint="" if ends_a_line[piece.split] else "\n")
                self.has_joints |= piece.joint == "\n"
            yield piece
            before, where = piece.split, {piece.split} | (where if not piece.begins else set())
            ends_a_line |= dict.fromkeys(where, kind is list or piece.content.endswith("\n"))

    def with_newlines(self, text):
        changed = utf8.with_newlines(text)
        self.has_other_line_ends |= changed is not text
        return changed

    def read_all(self):
        """(name of its file or set, Piece) of all documents in order, those for validation at the end."""
        yield from self.read()
        if self.val:
            for name, piece in self.val.read():
                yield name, piece._replace(split="val")
            self.has_other_line_ends |= self.val.has_other_line_ends

    def read(self):
        """(name of its file or set, Piece) of the documents of `patterns`. Raises UserError without any."""
        self.position = done = 0
        is_empty = True
        if self.built_in:
            for document in self.built_in.documents():
                for piece in self.pieces(document, cut=self.cut):
                    is_empty = False
                    yield self.patterns[0], piece
        for path in self.paths:
            name = STANDARD_INPUT if path == STDIN else path
            for piece in self.pieces_in(path, name, done):
                is_empty = False
                yield name, piece
            if self.size is not None:
                done += self.status(path).st_size
                self.position = done
        if is_empty:
            name = self.paths[0] if len(self.paths) == 1 else " ".join(self.patterns)
            raise UserError(
                f"{STANDARD_INPUT if name == STDIN else name} is empty: there is nothing to train on"
            )

    def pieces_in(self, path, name, done):
        """The Pieces of one path; `done` is how many bytes were read before it."""
        if path.startswith(hub.PREFIX):
            for document in hub.documents(path, self.text_column):
                yield from self.pieces(document)
            return
        before = self.seen.setdefault(path, identity(self.status(path)))
        is_one_text = format_of(path).documents is None
        try:
            size = self.length(path, name) if is_one_text and self.cut else None
            with self.opened(path, name) as (file, on_disk):
                for piece in self.pieces_of_file(path, name, file, size):
                    yield piece
                    self.position = done + on_disk.tell()
        except OSError as error:
            raise unreadable(name, error) from None
        if identity(self.status(path)) != before:
            raise UserError(
                f"{name} changed while it was read: prepare it when nothing writes to it any more"
            )

    def pieces_of_file(self, path, name, file, size):
        read_documents = format_of(path).documents
        if not read_documents:
            yield from self.text_pieces(file, name, size)
            return
        for document in read_documents(file, name, self.text_column, self.row):
            yield from self.pieces(document)

    def pieces(self, document, cut=False):
        """A document in memory as Pieces; none where it is empty."""
        if isinstance(document, list):
            document = [(role, self.with_newlines(text)) for role, text in document]
            question = next(text for role, text in document if role == "user")
            yield Piece(self.split_of(question), True, document)
            return
        document = self.with_newlines(document or "")
        if document and (cut or len(document) > utf8.PIECE and document.strip()):
            content = document.encode("utf-8")
            yield from self.text_pieces(io.BytesIO(content), "text", len(content) if cut else None)
        elif document:
            yield Piece(self.split_of(document), True, document)

    def text_pieces(self, file, name, size):
        """
        A text file as Pieces; none where it is blank. Its end is for validation where its `size` in bytes is
        given; else all of it is in one split.
        """
        cut, split = None, None
        if size is not None:
            cut = int(size * (1 - self.val_fraction))
            self.lowest, self.highest = 0.0, 1.0  # any part of it
        blank = []  # Pieces before the first that has something to read
        for is_end, text in utf8.stretches(file, name, cut):
            text = self.with_newlines(text)
            begins, split = split is None, split or self.split_of(text)
            piece = Piece(split if cut is None else "val" if is_end else "train", begins, text)
            if blank is not None:
                blank.append(piece)
                if len(blank) * utf8.PIECE > BLANK:
                    raise UserError(
                        f"{name} begins with more than {BLANK >> 20} MB of blanks: leave them out"
                    )
                if text.strip():
                    yield from blank
                    blank = None
            else:
                yield piece

    def split_of(self, text):
        """The split of a document that is, or begins with, this text."""
        number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
        self.lowest, self.highest = min(self.lowest, number / 2**64), max(self.highest, number / 2**64)
        return "val" if number < self.val_fraction * 2**64 else "train"

    def remedy(self):
        """Advice that gives both splits some text; everything must have been read before."""
        if self.val:
            return "give more text for it"
        own = "or a validation file, --val=FILE"
        if self.lowest == self.highest:
            return f"all documents begin alike, and what begins alike is in one split: give others, {own}"
        if (self.lowest, self.highest) == (0.0, 1.0):
            return f"give more text, another --val_fraction than {self.val_fraction}, {own}"
        scales = (10**digits for digits in range(1, 17))
        shares = (math.floor(self.lowest * scale + 1) / scale for scale in scales)
        share = next((share for share in shares if share <= self.highest), self.highest)
        return f"give more documents, --val_fraction={share}, {own}"

    @contextmanager
    def opened(self, path, name):
        """(file to read documents from, file on the disk)."""
        with self.opened_on_disk(path) as on_disk:
            yield opening.opened(on_disk, name) if format_of(path).is_text else on_disk, on_disk

    def opened_on_disk(self, path):
        if path in self.spools:
            self.spools[path].seek(0)
            return open(os.dup(self.spools[path].fileno()), "rb")
        return open(path, "rb")

    def length(self, path, name):
        """How many bytes of UTF-8 a file with text has."""
        with self.opened(path, name) as (file, on_disk):
            if file is on_disk:
                return self.status(path).st_size
            return sum(map(len, iter(lambda: file.read(utf8.PIECE), b"")))

    def status(self, path):
        try:
            return os.fstat(self.spools[path].fileno()) if path in self.spools else os.stat(path)
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
    """Numbers that differ after a file was written."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def spooled(path):
    """A copy, on the disk, of standard input or another file that can be read only once. Raises UserError."""
    copy = tempfile.TemporaryFile()
    try:
        file, first = (sys.stdin.buffer, b"") if path == STDIN else pipes.opened(path)
        with nullcontext() if path == STDIN else file:
            pipes.require_end(file, STANDARD_INPUT if path == STDIN else path)
            copy.write(first)
            shutil.copyfileobj(file, copy, utf8.PIECE)
    except OSError as error:
        raise unreadable(STANDARD_INPUT if path == STDIN else path, error) from None
    copy.flush()
    return copy


def listing():
    """What a source can be, for --help: a line for each kind."""
    kinds = {
        "a built-in set": [(name, found.help) for name, found in BUILT_IN.items()],
        f"a file, also compressed ({', '.join(opening.COMPRESSED)}); a folder; a glob in quotes": [
            *((f"*{ending}", found.help) for ending, found in FORMATS.items()),
            ("others", "the same as *.txt, where named by themselves or by a glob"),
        ],
        "something else": [
            (
                f"{hub.PREFIX}ORG/NAME",
                "a set on the Hugging Face hub; hf:ORG/NAME:CONFIG, one of several there",
            ),
            (f"{hub.PREFIX}FOLDER", "a folder like such a set"),
            (STDIN, "standard input: one document; <(COMMAND) is one, too"),
        ],
    }
    return "\n".join(
        "\n".join([f"  {kind}:", *(f"    {name:<18} {text}" for name, text in lines)])
        for kind, lines in kinds.items()
    )
