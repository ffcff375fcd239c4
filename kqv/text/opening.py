"""A file with text, as it is on the disk -> its bytes in UTF-8: decompressed, and decoded by its mark."""

import codecs
import importlib

from kqv.errors import UserError, first_line, is_out_of_memory

# {end of a file's name: (first bytes, the module of the standard library that reads it)}
COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".bz2": (b"BZh", "bz2"),
    ".xz": (b"\xfd7zXZ\0", "lzma"),
}

# Byte order marks, the longest first: UTF-32's begins as UTF-16's does. That of UTF-8 goes in utf8.decode.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Files that are no text: where and how they begin, what they are, and what to do.
NO_TEXT = (
    (0, b"PK\x03\x04", "a zip archive, as .docx and .xlsx are", "unpack it, python -m zipfile -e OLD FOLDER"),
    (257, b"ustar", "a tar archive", "unpack it, tar -xf OLD"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, 7z x OLD"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it, zstd -d OLD"),
    (0, b"%PDF-", "a PDF file", "take its text, pdftotext OLD"),
    (0, b"PAR1", "a table", "let its name end in .parquet"),
    (0, b"ARROW1", "a table", "let its name end in .arrow"),
)

CONTROL = {*range(1, 32)} - {*b"\t\n\v\f\r\x1b"}  # bytes that texts seldom have; Esc is for colours

HEAD = 4096  # bytes that show what a file is


def opened(on_disk, name):
    """
    What an open file holds, decompressed and in UTF-8, as something to `read(size)`. `name` is the file's,
    for messages. Raises UserError where it is no text.
    """
    file, head = on_disk, head_of(on_disk)
    for magic, module in COMPRESSED.values():
        if head.startswith(magic):
            file = decompressed(module, on_disk, name)
            head = head_of(file)
            break
    require_text(head, name)
    encoding = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)
    return InUtf8(file, encoding, name) if encoding else file


def head_of(file):
    head = file.read(HEAD)
    file.seek(0)
    return head


def decompressed(module, on_disk, name):
    try:
        file = importlib.import_module(module).open(on_disk)
    except ImportError:
        raise UserError(
            f"{name} can't be read, since this Python has no {module}: decompress it first"
        ) from None
    return Decompressed(file, module, name)


class Decompressed:
    """What one of Python's decompressors reads. `read` raises UserError where the file is damaged."""

    def __init__(self, file, kind, name):
        self.file, self.kind, self.name = file, kind, name

    def read(self, size):
        try:
            return self.file.read(size)
        except Exception as error:  # each has errors of its own; those with a number are of the disk
            if getattr(error, "errno", None) or is_out_of_memory(error):
                raise
            kind = {"bz2": "bzip2", "lzma": "xz"}.get(self.kind, self.kind)
            raise UserError(
                f"{self.name} is a damaged or truncated {kind} file ({first_line(error)}): fetch it or "
                "compress it again"
            ) from None

    def seek(self, place):
        self.file.seek(place)


class InUtf8:
    """A file in another encoding of Unicode, read as UTF-8 and without its byte order mark."""

    def __init__(self, file, encoding, name):
        self.file, self.encoding, self.name = file, encoding, name
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def read(self, size):
        """About `size` bytes; none at the end alone."""
        text, block = "", b"more"
        while block and not text:
            block = self.file.read(size)
            try:
                text = self.decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.name} begins as {self.encoding} does, but is not whole ({error.reason}): "
                    "write it again in UTF-8"
                ) from None
        return text.encode("utf-8")


def require_text(head, name):
    """Raise UserError where the first bytes of a file are those of something else than text."""
    for place, magic, what, way_out in NO_TEXT:
        if head[place:].startswith(magic):
            raise UserError(f"{name} is {what}, not a text: {way_out}")
    if head.startswith(tuple(MARKS)):
        return
    control = sum(byte in CONTROL for byte in head)
    if control > len(head) // 20:
        raise UserError(f"{name} is no text: {control} of its first {len(head)} bytes are control characters")
    if head.count(0) <= len(head) // 4:
        return
    even, odd = head[::2].count(0), head[1::2].count(0)  # of UTF-16 in Latin letters, one of both is the half
    if min(even, odd) > len(head) // 8:
        raise UserError(f"{name} is no text: {head.count(0)} of its first {len(head)} bytes are 0")
    encoding = "utf-16le" if odd > even else "utf-16be"
    raise UserError(
        f"{name} is UTF-16 without a byte order mark: convert it first, iconv -f {encoding} -t utf-8 "
        "OLD > NEW"
    )


def likely_conversion(content):
    """What to do with bytes that are no UTF-8, in words."""
    decoded = content.decode("utf-8", errors="replace")
    wrong, right = decoded.count("\ufffd"), sum(char > "\x7f" for char in decoded)
    if right - wrong > wrong:
        return "most of it is UTF-8: leave out the bytes that are not, iconv -c -f utf-8 -t utf-8 OLD > NEW"
    high = sum(byte > 0x7F for byte in content)
    if high > sum(chr(byte).isalpha() for byte in content if byte < 0x80):
        return (
            "convert it first from its own encoding, as cp1251 (Russian), gb18030 (Chinese) or shift_jis "
            "(Japanese): iconv -f ENCODING -t utf-8 OLD > NEW"
        )
    return "it may be Windows' cp1252: convert it first, iconv -f cp1252 -t utf-8 OLD > NEW"
