"""
Reads the files that torch.save writes: tensors and plain values, and nothing else. torch.load is not used,
since it admits every kind of tensor, with any strides over its memory.

A file is a zip archive, each record stored as it is, with its CRC-32:

    NAME/data.pkl     a pickle; in the place of a tensor: (key, type) of its memory, offset, shape, strides
    NAME/data/KEY     the numbers of one memory
    NAME/byteorder    little or big

Before torch 1.6 it was several pickles one after the other, and then every memory: its length, its numbers.
"""

import io
import struct
import sys
import zipfile
from collections import OrderedDict

import torch

from kqv.device import machine_memory
from kqv.errors import UserError, is_out_of_memory
from kqv.formats.tensors import dense
from kqv.pickles import MOST_BYTES, PlainUnpickler, require_modest

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# The functions that a pickle names for tensors that are not plain.
OTHER_KINDS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_qtensor": "quantised",
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_tensor_v3": "packed or unsigned",
    "_rebuild_wrapper_subclass": "wrapped",
    "_rebuild_from_type_v2": "wrapped",
}

LEGACY = 0x1950A86A20F9469CFC6C, 1001  # what a file from before torch 1.6 begins with


class Named(dict):
    """A dict in the place of an OrderedDict; what is beside its items, a module's versions, is left out."""

    def __setstate__(self, state):
        pass

    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self.items())


class TensorUnpickler(PlainUnpickler):
    """
    Makes each tensor of a pickle `dense`. All tensors in one memory are together no larger than it is, so
    what is loaded is no larger than its file. A tensor that the pickle has twice, as tied weights, is one.
    """

    def __init__(self, file, memory_of):
        """`memory_of(key)` is the torch.UntypedStorage of that key, as long as the file has it."""
        super().__init__(file, encoding="utf-8")
        self.memory_of, self.memories, self.tensors, self.used = memory_of, {}, {}, {}

    def find_class(self, module, name):
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in OTHER_KINDS:
            raise ValueError(f"it holds a {OTHER_KINDS[name]} tensor: save it as a dense one of real numbers")
        plain = {
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): data_of,
            ("torch._utils", "_rebuild_parameter_with_state"): data_of,
            ("collections", "OrderedDict"): Named,
            ("torch", "Size"): tuple,
        }
        return plain.get((module, name)) or super().find_class(module, name)

    def persistent_load(self, saved):
        kind, dtype, key, _, count, *view = saved
        if kind != "storage" or dtype not in STORAGES.values() or any(part is not None for part in view):
            raise ValueError("it holds tensors in memory of another kind than torch.save writes")
        if key not in self.memories:
            self.memories[key], self.used[key] = self.memory_of(key), 0
        held = self.memories[key].nbytes()
        if count * dtype.itemsize != held:
            raise ValueError(f"its tensor {key} has {held} bytes, not {count} numbers of {dtype}")
        return key, dtype

    def tensor(self, memory, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        (key, dtype), shape, strides = memory, tuple(shape), tuple(strides)
        if metadata:
            raise ValueError(f"it holds a tensor that is a view ({metadata}): save its clone()")
        name = key, dtype, offset, shape, strides
        if name not in self.tensors:
            view = torch.empty(0, dtype=dtype).set_(self.memories[key], offset, shape, strides)
            self.used[key] += view.nbytes
            if self.used[key] > self.memories[key].nbytes():
                raise ValueError(
                    f"it holds a tensor ({'x'.join(map(str, shape))}, {dtype}) that shares memory, as after "
                    "expand: save its clone()"
                )
            self.tensors[name] = dense(view)
        return self.tensors[name]


def data_of(tensor, *settings):
    """A Parameter's tensor."""
    return tensor


def load(file, mapped=None):
    """
    What torch.save wrote to an open file, on the CPU. Where its path is given as `mapped`, what is not used
    takes no memory. Raises UserError for what does not fit into memory, and any exception for what is
    damaged, or anything else.
    """
    name = getattr(file, "name", "it")
    if (size := file.seek(0, 2)) > machine_memory():
        raise UserError(
            f"{name} has {size / 2**30:.0f} GiB, more than this machine's memory: use a larger one"
        )
    try:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return load_legacy(file)
        with zipfile.ZipFile(file) as archive:
            return load_archive(archive, mapped)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{name} needs more memory than there is: end other programs, or use another"
        ) from None


def load_archive(archive, mapped):
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if len(records) < len(archive.infolist()):
        raise ValueError("two of its records have one name")
    size = archive.fp.seek(0, 2)
    if any(info.compress_type for info in records.values()):
        raise ValueError("its records are compressed, which torch.save does not do")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise ValueError("its records are longer than itself")
    if "byteorder" in records and archive.read(records["byteorder"]).decode() != sys.byteorder:
        raise ValueError(f"its numbers are not in the byte order of this machine, {sys.byteorder}")
    if mapped:
        if torn := archive.testzip():
            raise ValueError(f"the checksum of its record {torn} is wrong")
        whole = torch.UntypedStorage.from_file(str(mapped), False, size)

    def memory_of(key):
        record = records[f"data/{key}"]
        if mapped and (start := start_of(archive, record)) % 64 == 0:  # as torch.save places it
            return whole[start : start + record.file_size]
        with archive.open(record) as stream:
            return filled(stream, record.file_size)

    if records["data.pkl"].file_size > MOST_BYTES:
        raise ValueError(f"its record data.pkl has {records['data.pkl'].file_size} bytes")
    return load_pickle(TensorUnpickler, io.BytesIO(archive.read(records["data.pkl"])), memory_of)


def load_pickle(unpickler, file, *arguments):
    """The next object of an open file, after a look at what making it takes."""
    begin = file.tell()
    require_modest(file)
    file.seek(begin)
    return unpickler(file, *arguments).load()


def start_of(archive, record):
    """Where a record's content begins in the file: behind its header, of 30 bytes, a name and more."""
    archive.fp.seek(record.header_offset)
    return record.header_offset + 30 + sum(struct.unpack("<26xHH", archive.fp.read(30)))


def filled(stream, size):
    """A memory with the next `size` bytes of a stream. Raises ValueError if it has less."""
    memory = torch.UntypedStorage(size)
    target = memoryview(torch.empty(0, dtype=torch.uint8).set_(memory).numpy())
    done = 0
    while done < size:
        block = stream.read(min(2**24, size - done))
        if not block:
            raise ValueError("it is cut off")
        target[done : done + len(block)] = block
        done += len(block)
    return memory


class Counts(TensorUnpickler):
    """Makes no tensor: notes what a pickle says of each memory, {key: (type, count of numbers)}."""

    def persistent_load(self, saved):
        _, dtype, key, _, count, *_ = saved
        self.memories[key] = dtype, count

    def tensor(self, *arguments):
        pass


def load_legacy(file):
    """The same from a file from before torch 1.6."""
    size = file.seek(0, 2)
    file.seek(0)
    magic, version, system = (load_pickle(PlainUnpickler, file) for _ in range(3))
    if (magic, version) != LEGACY:
        raise ValueError("it does not begin as a file of torch.save")
    if system["little_endian"] != (sys.byteorder == "little"):
        raise ValueError(f"its numbers are not in the byte order of this machine, {sys.byteorder}")
    begin = file.tell()
    require_modest(file)
    file.seek(begin)
    counts = Counts(file, None)
    counts.load()
    memories = {}
    for key in load_pickle(PlainUnpickler, file):
        (count,) = struct.unpack("<q", file.read(8))
        dtype, expected = counts.memories[key]
        if count != expected or not 0 <= count * dtype.itemsize <= size - file.tell():
            raise ValueError(f"its tensor {key} has {count} numbers, not {expected}, or is cut off")
        memories[key] = filled(file, count * dtype.itemsize)
    file.seek(begin)
    return TensorUnpickler(file, memories.__getitem__).load()
