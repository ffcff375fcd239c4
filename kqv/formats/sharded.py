"""
The checkpoint of a sharded model: a folder in the place of a file, written by torch's distributed checkpoint.
Any number of processes can read it, one as well.

    __0_0.distcp, __1_0.distcp, ...   one for each process: its part of the weights and of AdamW's moments
    .metadata                         in which file, and where, each part of each tensor is
    rest.pt                           everything else; written last
"""

import io
import math
import warnings
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kqv.errors import UserError, first_line, is_out_of_memory
from kqv.files import read_file, sha256_of_file
from kqv.formats import torch_files
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
    """Reads tensors only, each part of one as `tensors.dense` says, and checks the CRC-32 of each part."""

    @cached_property
    def metadata(self):
        content = read_file(Path(self.path) / METADATA, MOST_BYTES)
        metadata = loaded(content, MetadataUnpickler, MOST_OPERATIONS)
        require_places(metadata, Path(self.path))
        for name, tensor in metadata.state_dict_metadata.items():
            require_whole(name, tensor)
        return metadata

    def read_metadata(self, *args, **kwargs):
        return self.metadata

    def read_data(self, plan, planner):
        for item in plan.items:
            index = item.storage_index
            part = self.read_part(index)
            target = planner.resolve_tensor(item).detach()
            if part.dtype != target.dtype:
                raise ValueError(f"{index.fqn} is of {part.dtype}, not {target.dtype}")
            ends = map(sum, zip(item.storage_offsets, item.lengths, strict=True))
            target.copy_(part[tuple(map(slice, item.storage_offsets, ends))])
            planner.commit_tensor(item, target)
        done = torch.futures.Future()
        done.set_result(None)
        return done

    def read_part(self, index):
        """The part of a tensor that a MetadataIndex names. Raises ValueError where it is another one."""
        place = self.metadata.storage_data[index]
        with open(Path(self.path) / place.relative_path, "rb") as file:
            file.seek(place.offset)
            part = torch_files.load(io.BytesIO(file.read(place.length)))
        tensor = self.metadata.state_dict_metadata[index.fqn]
        shapes = [
            chunk.sizes for chunk in tensor.chunks if chunk.offsets == index.offset and 0 not in chunk.sizes
        ]
        if [part.shape] != shapes or part.dtype != tensor.properties.dtype:
            raise ValueError(f"the part {tuple(index.offset)} of {index.fqn} has another shape or type")
        return part


def require_places(metadata, folder):
    """
    Raise an exception where a part's place is not in a file of the folder, or also another's, or the files
    are too short for what they are said to hold.
    """
    sizes, ends = {}, {}
    for place in sorted(
        metadata.storage_data.values(), key=lambda place: (place.relative_path, place.offset)
    ):
        name = place.relative_path
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"it names the file {name}, which is not in it")
        sizes[name] = (folder / name).stat().st_size
        if not (whole_numbers(place.offset, place.length) and place.offset + place.length <= sizes[name]):
            raise ValueError(f"{name} is cut off")
        if place.offset < ends.get(name, 0):
            raise ValueError(f"two parts of tensors have one place in {name}")
        ends[name] = place.offset + place.length
    tensors = metadata.state_dict_metadata.values()
    if sum(math.prod(t.size) * t.properties.dtype.itemsize for t in tensors) > sum(sizes.values()):
        raise ValueError("its tensors are larger than its files")


def require_whole(name, tensor):
    """
    Raise an exception where the parts of a tensor are not all of it, each number once: as it is sharded, they
    are cut along the first dimension.
    """
    shape, end = tensor.size, 0
    whole = isinstance(name, str) and isinstance(tensor, TensorStorageMetadata) and whole_numbers(*shape)
    parts = [part for part in tensor.chunks if 0 not in part.sizes]
    for part in sorted(parts, key=lambda part: part.offsets):
        whole &= (*part.offsets,) == ((end, *(0 for _ in shape[1:])) if shape else ())
        whole &= part.sizes[1:] == shape[1:] and whole_numbers(*part.sizes)
        end += part.sizes[0] if shape else 1
    if not whole or end != (shape[0] if shape else 1):
        raise ValueError(f"the parts of {name} do not make a whole tensor")


def whole_numbers(*values):
    return all(type(value) is int and value >= 0 for value in values)


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
    Fill {group: {name: tensor}}, sharded or full, with those of "model" or "optimizer": each process reads
    what it needs. Raises UserError, also where the folder has other tensors than these.
    """
    with damage_as_user_error(path):
        reader = TensorReader(path)
        saved = {name for name in reader.metadata.state_dict_metadata if name.startswith(f"{part}.")}
        known = {f"{part}.{group}.{name}" for group, named in tensors.items() for name in named}
        if other := sorted(saved ^ known):
            raise ValueError(f"{other[0]} is {'in it, but unknown' if other[0] in saved else 'not in it'}")
        load_into({part: tensors}, reader)


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
