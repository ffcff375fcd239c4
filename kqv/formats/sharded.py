"""
A checkpoint of many processes that hold a part of the model each: a folder, written by torch's distributed
checkpoint, in the place of a file. Any number of processes reads it again, and one alone does too.

    __0_0.distcp, __1_0.distcp, ...   each process's own part of the weights and of AdamW's moments
    .metadata                         which part of which tensor is where
    rest.pt                           everything that is no tensor of them; written last
"""

import io
import warnings
import zipfile
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from kqv.errors import UserError, first_line
from kqv.files import PlainUnpickler, sha256_of_file
from kqv.formats.checkpoint import REST

METADATA = ".metadata"


PARTS = ("model", "optimizer")  # what is in parts


# Classes that .metadata may name; what is in them are numbers, names and shapes. BytesStorageMetadata is none
# of them: what it stands for, torch would unpickle.
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


class Unpickler(PlainUnpickler):
    harmless = HARMLESS


class Reader(dcp.FileSystemReader):
    """Reads tensors and nothing else, and checks the CRC-32 of what it reads."""

    @cached_property
    def metadata(self):
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata = Unpickler(file).load()
        ends = {}
        for part in metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        for name, end in ends.items():
            if Path(name).name != name:
                raise ValueError(f"it names the file {name}, which is elsewhere")
            if (Path(self.path) / name).stat().st_size < end:
                raise ValueError(f"{name} is cut off")
        return metadata

    def read_metadata(self, *args, **kwargs):
        return self.metadata

    def _slice_file(self, file, part):
        found = io.BytesIO(super()._slice_file(file, part).read(-1))
        with zipfile.ZipFile(found) as archive:
            if archive.testzip():
                raise ValueError(f"a checksum in {part.relative_path} is wrong")
        found.seek(0)
        return found


def load_rest(path, read):
    """The contents of rest.pt, by the function `read`. Raises UserError where .metadata is not its own."""
    rest = read(path / REST)
    digest = rest.pop("metadata_sha256", None)
    if not (path / METADATA).is_file() or digest != sha256_of_file(path / METADATA):
        raise UserError(f"{path} is damaged: its {METADATA} is not the one that was written")
    return rest


def load_whole(path, part):
    """{name: tensor} of a `part`, each tensor whole, on the CPU. Raises UserError."""
    with damage_of(path):
        reader = Reader(path)
        tensors = {
            name.removeprefix(f"{part}."): torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in reader.metadata.state_dict_metadata.items()
            if name.startswith(f"{part}.")
        }
        load_into({part: tensors}, reader)
    return tensors


def load_into(tensors, reader):
    """Fill nested dicts of tensors, each sharded or whole, in any number of processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is no mistake that each process reads by itself
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def first_cause(error):
    """What is behind torch's collection of what went wrong in each process."""
    return next((cause for cause, _ in getattr(error, "failures", {}).values()), error)


@contextmanager
def damage_of(path):
    """Whatever a damaged folder raises is a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        cause = first_line(first_cause(error))
        raise UserError(f"{path} is damaged or of another model: {cause}") from None


def load_moments(optimizer, path):
    """AdamW's state for parameters that are sharded or not: each process reads its own part alone."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    with damage_of(path):
        moments = {str(number): optimizer.state[parameter] for number, parameter in enumerate(parameters)}
        load_into({"optimizer": moments}, Reader(path))
