"""
A file that torch.save wrote -> what is in it: only tensors and plain values, no code, and nothing that takes
much more time or memory than the file's size says.
"""

import io
import warnings
import zipfile

import torch

from kqv.device import machine_memory
from kqv.errors import UserError, is_out_of_memory
from kqv.files import require_file
from kqv.pickles import MOST_BYTES, require_modest

ZIP = b"PK\x03\x04"  # how torch tells its files from those before torch 1.6

HEADER = 30  # bytes that stand before a record, at least

OLD_PICKLES = 5  # which a file before torch 1.6 begins with; its numbers come after them


def load(path, mapped=False):
    """
    What torch.save wrote to the file `path` (a Path), on the CPU. `mapped`: only what is used takes memory.
    Every record's checksum is checked. Raises UserError for what is no file, or does not fit into memory, and
    any other error for a file that is damaged or foreign.
    """
    require_file(path)
    if (size := path.stat().st_size) > machine_memory():
        raise UserError(
            f"{path} has {size / 2**30:.0f} GiB, more than this machine's memory: use a larger one"
        )
    try:
        with path.open("rb") as file:
            head = file.read(MOST_BYTES)
        is_zip = head.startswith(ZIP)
        if is_zip:
            require_records(path)
        else:
            pickles = io.BytesIO(head)
            for _ in range(OLD_PICKLES):
                require_modest(pickles)
        del head
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} needs more memory than there is: end other programs, or use another"
        ) from None


def require_records(path):
    """Raise an error unless a zip's records are as torch.save writes them: not compressed, apart, whole."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = {record.filename.lower() for record in records}  # torch finds them so
        if len(names) < len(records):
            raise ValueError("two of its records have one name")
        if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
            raise ValueError("a record is compressed or encrypted, which torch.save does not do")
        end = 0
        for record in sorted(records, key=lambda record: record.header_offset):
            if record.header_offset < end or (not end and record.header_offset):
                raise ValueError(
                    f"its record {record.filename} begins within another, or after something else"
                )
            end = record.header_offset + HEADER + record.file_size
        for record in records:
            if record.filename.lower().endswith(".pkl"):
                if record.file_size > MOST_BYTES:
                    raise ValueError(f"its record {record.filename} has {record.file_size} bytes")
                require_modest(io.BytesIO(archive.read(record)))
        if torn := archive.testzip():
            raise ValueError(f"the checksum of its record {torn} is wrong")
