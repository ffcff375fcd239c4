"""
The checkpoint of a sharded model: a folder in the place of a file, written by torch's distributed checkpoint.
Any number of processes can read it, one as well.

    __0_0.distcp, __1_0.distcp, ...   one for each process: its part of the weights and of AdamW's moments
    .metadata                         in which file, and where, each part of each tensor is
    rest.pt                           everything else; written last
"""

import io
import warnings
import zipfile
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from kqv.errors import UserError, first_line, is_out_of_memory
from kqv.files import read_file, require_file, sha256_of_file
from kqv.pickles import MOST_BYTES, PlainUnpickler, loaded

METADATA = ".metadata"
MOST_OPERATIONS = 20_000_000  # of .metadata: each part of each tensor has some 60

PARTS = ("model", "optimizer")  # what is in the .distcp files

# Classes that .metadata may name; they hold numbers, names and shapes. BytesStorageMetadata is not among
# them: torch would unpickle the entries that it describes.
HARMLESS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "bfloat16", "float16", "int64"),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class MetadataUnpickler(PlainUnpickler):
    """Reads .metadata without running any code that is in it."""

    harmless = HARMLESS


class TensorReader(dcp.FileSystemReader):
    """Reads tensors only, and checks the CRC-32 of each."""

    @cached_property
    def metadata(self):
        content = read_file(Path(self.path) / METADATA, MOST_BYTES)
        metadata = loaded(content, MetadataUnpickler, MOST_OPERATIONS)
        ends = {}
        for part in metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        for name, end in ends.items():
            if Path(name).name != name:
                raise ValueError(f"it names the file {name}, which is in another folder")
            require_file(Path(self.path) / name)
            if (Path(self.path) / name).stat().st_size < end:
                raise ValueError(f"{name} is cut off")
        return metadata

    def read_metadata(self, *args, **kwargs):
        return self.metadata

    def _slice_file(self, file, part):
        content = io.BytesIO(super()._slice_file(file, part).read(-1))
        with zipfile.ZipFile(content) as archive:
            if archive.testzip():
                raise ValueError(f"a checksum in {part.relative_path} is wrong")
        content.seek(0)
        return content


def require_metadata(path, digest):
    """Raise UserError unless `digest` is the SHA-256 of the folder's .metadata; rest.pt has it."""
    if not (path / METADATA).is_file() or digest != sha256_of_file(path / METADATA):
        raise UserError(f"{path} is damaged: its {METADATA} is not the one that was written")


def load_full(path, part):
    """{name: tensor} of "model" or "optimizer", each tensor full, on the CPU. Raises UserError."""
    with damage_as_user_error(path):
        reader = TensorReader(path)
        tensors = {
            name.removeprefix(f"{part}."): torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in reader.metadata.state_dict_metadata.items()
            if name.startswith(f"{part}.")
        }
        load_into({part: tensors}, reader)
    return tensors


def has_part(path, part):
    """Whether the folder has any tensor of "model" or "optimizer". Raises UserError."""
    with damage_as_user_error(path):
        return any(name.startswith(f"{part}.") for name in TensorReader(path).metadata.state_dict_metadata)


def load_part(path, part, tensors):
    """
    Fill nested dicts of tensors, sharded or full, with those of "model" or "optimizer": each process reads
    what it needs. Raises UserError.
    """
    with damage_as_user_error(path):
        load_into({part: tensors}, TensorReader(path))


def load_into(tensors, reader):
    """Fill nested dicts of tensors, sharded or full, in place. Processes need not call this together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that processes read without each other: as intended
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def first_cause(error):
    """The first exception in torch's collection of what went wrong in each process."""
    return next((cause for cause, _ in getattr(error, "failures", {}).values()), error)


@contextmanager
def damage_as_user_error(path):
    """Turn whatever a damaged folder raises into a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if is_out_of_memory(first_cause(error)):
            raise MemoryError from None
        cause = first_line(first_cause(error))
        raise UserError(f"{path} is damaged or of another model: {cause}") from None
