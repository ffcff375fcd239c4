"""
What a GGUF file says of itself: its metadata, and where its tensors are. The file may be a stranger's: each
count and place in it is compared with the size of the file before it is used. The format is described in
ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from typing import NamedTuple

import numpy as np

from kqv.errors import UserError
from kqv.files import require_file

MOST_HEADER = 2**26  # bytes; that of a model with 262,144 tokens has about 10 MB

NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY, BOOL = 8, 9, 7


class Place(NamedTuple):
    """A tensor in the file: its shape as torch's, the gguf package's kind, bytes [begin, end)."""

    shape: tuple
    kind: object
    begin: int
    end: int


class Damaged(Exception):
    """The file is no GGUF file, cut off, or contradicts itself."""


class GGUFFile:
    """
    An open GGUF file. `metadata`: {key: number, text, list of texts or array of numbers}; `places`: {name:
    Place}. Raises UserError where the file is missing, damaged, or of a kind that is not known.
    """

    def __init__(self, path):
        try:
            import gguf
        except ImportError:
            raise UserError(f"reading {path} needs: pip install gguf") from None
        require_file(path)
        with open(path, "rb") as file:
            try:
                self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise UserError(f"{path} is empty, not a GGUF file: fetch or export it again") from None
        self.gguf, self.path = gguf, path
        try:
            self.metadata, self.places = self.read_header()
        except Damaged as error:
            raise UserError(f"{path} is damaged or no GGUF file: {error}: fetch or export it again") from None

    def read_header(self):
        if self.content[:4] != b"GGUF":
            raise Damaged(f"it begins with {self.content[:4]!r}")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            raise Damaged(f"its version is {version}, not 2 or 3 with the lowest byte first")
        tensors = self.count(24, "tensors")
        entries = self.count(13, "entries of metadata")
        metadata = {}
        for _ in range(entries):
            key = self.text("a key")
            if key in metadata:
                raise Damaged(f"it has {key!r} twice")
            metadata[key] = self.value(key)
        found = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
            raise Damaged(f"its general.alignment is {alignment!r}, not a power of 2")
        begin = -(-self.at // alignment) * alignment
        return metadata, self.placed(found, begin, alignment)

    def placed(self, found, begin, alignment):
        """[(name, shape, kind, offset, size)] -> {name: Place}, where no two overlap."""
        places = {}
        for name, shape, kind, offset, size in found:
            place = Place(shape, kind, begin + offset, begin + offset + size)
            if name in places:
                raise Damaged(f"it has the tensor {name!r} twice")
            if offset % alignment or place.end > len(self.content):
                where = f"bytes {place.begin} to {place.end} of {len(self.content)}"
                raise Damaged(f"its tensor {name!r} would be in {where}, so it is cut off or lies")
            places[name] = place
        before = Place((), None, 0, 0), ""
        for name, place in sorted(places.items(), key=lambda item: item[1].begin):
            if place.begin < before[0].end:
                raise Damaged(f"its tensors {before[1]!r} and {name!r} overlap")
            before = place, name
        return places

    def tensor(self):
        """The next tensor's (name, shape, kind, offset, size in bytes)."""
        name = self.text("a tensor's name")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= 4:
            raise Damaged(f"its tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("<I"), self.number("<Q")
        try:
            kind = self.gguf.GGMLQuantizationType(number)
        except ValueError:
            raise Damaged(f"its tensor {name!r} is of the unknown kind {number}") from None
        block, size = self.gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise Damaged(f"its tensor {name!r} has the shape {shape}, which {kind.name} can't have")
        return name, shape, kind, offset, math.prod(shape) // block * size

    def value(self, key):
        kind = self.number("<I")
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY:
            return self.numbers(kind, 1, key)[0].item()
        kind = self.number("<I")
        if kind == STRING:
            return [self.text(key) for _ in range(self.count(8, f"texts in {key}"))]
        if kind not in NUMBERS:
            raise Damaged(f"{key!r} is an array of the unknown kind {kind}")
        return self.numbers(kind, self.count(np.dtype(NUMBERS[kind]).itemsize, f"numbers in {key}"), key)

    def numbers(self, kind, count, key):
        if kind not in NUMBERS:
            raise Damaged(f"{key!r} is of the unknown kind {kind}")
        dtype = np.dtype(NUMBERS[kind])
        part = self.take(count * dtype.itemsize)
        return np.frombuffer(part, np.uint8) != 0 if kind == BOOL else np.frombuffer(part, dtype)

    def text(self, what):
        part = self.take(self.count(1, f"bytes in {what}"))
        try:
            return part.decode("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"{what} is {part[:40]!r}, which is not UTF-8") from None

    def count(self, least, what):
        """The next number: of things that take at least so many bytes each, so there can't be more."""
        count = self.number("<Q")
        if count * least > min(len(self.content), MOST_HEADER) - self.at:
            raise Damaged(f"it would have {count} {what}, more than fit into it")
        return count

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, size):
        if self.at + size > min(len(self.content), MOST_HEADER):
            raise Damaged(f"it ends within its header, which has {self.at + size} bytes or more")
        self.at += size
        return self.content[self.at - size : self.at]

    def array(self, name):
        """A tensor's numbers in float32, as a new array. Raises UserError for a kind that can't be read."""
        place = self.places[name]
        rows = np.frombuffer(self.content, np.uint8, place.end - place.begin, place.begin)
        rows = rows.reshape(math.prod(place.shape[:-1]), -1)
        found = np.empty((len(rows), place.shape[-1]), np.float32)
        step = 1 + 2**20 // place.shape[-1]  # a part at a time: dequantising takes several times its memory
        try:
            for begin in range(0, len(rows), step):
                part = slice(begin, begin + step)
                found[part] = self.gguf.dequantize(rows[part], place.kind)
        except NotImplementedError:
            raise UserError(
                f"{self.path} has {name} as {place.kind.name}, which the gguf package can't read: use F32, "
                "F16, BF16 or a usual quantisation as Q8_0 or Q4_K"
            ) from None
        return found.reshape(place.shape)
