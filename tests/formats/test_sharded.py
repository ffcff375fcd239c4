"""The inside of a sharded checkpoint: every number of a tensor is read from the files, or nothing is."""

import copy
import io
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from kqv.errors import UserError
from kqv.formats import sharded

MATRIX, COUNT = "model.0.a", "model.0.n"


def folder_of(path, parts=3):
    """A folder with a matrix, cut into parts, and a count, as torch's distributed checkpoint writes them."""
    tensors = {MATRIX: torch.arange(24.0).view(6, 4), COUNT: torch.tensor(5.0)}
    metadata = Metadata({}, storage_data={})
    content = io.BytesIO()
    for name, tensor in tensors.items():
        pieces = tensor.chunk(parts) if tensor.dim() else [tensor]
        chunks, row = [], 0
        for piece in pieces:
            at = torch.Size([row, 0] if tensor.dim() else [])
            chunks.append(ChunkStorageMetadata(at, piece.shape))
            file, begin = io.BytesIO(), content.tell()
            torch.save(piece.clone(), file)
            content.write(file.getvalue())
            place = _StorageInfo("__0_0.distcp", begin, content.tell() - begin)
            metadata.storage_data[MetadataIndex(name, at)] = place
            row += len(piece) if tensor.dim() else 0
        metadata.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(), tensor.shape, chunks)
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(content.getvalue())
    return metadata, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def load(path, metadata):
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return sharded.load_full(path, "model")


def matrix(metadata):
    return metadata.state_dict_metadata[MATRIX]


def chunk(metadata, number=1):
    return matrix(metadata).chunks[number]


def place(metadata, number=1):
    return metadata.storage_data[MetadataIndex(MATRIX, chunk(metadata, number).offsets)]


def put(value, name, size):
    setattr(value, name, torch.Size(size))


def move(metadata, offsets):
    """The second part of the matrix is somewhere else in it, and is found there."""
    where = place(metadata)
    put(chunk(metadata), "offsets", offsets)
    metadata.storage_data[MetadataIndex(MATRIX, torch.Size(offsets))] = where


LIES = {
    "a hole": lambda m: matrix(m).chunks.pop(1),
    "no parts": lambda m: matrix(m).chunks.clear(),
    "parts that overlap": lambda m: move(m, [1, 0]),
    "a part twice": lambda m: move(m, [0, 0]),
    "a part beyond the end": lambda m: move(m, [6, 0]),
    "a part before the beginning": lambda m: move(m, [-2, 0]),
    "a part beside the others": lambda m: move(m, [2, 1]),
    "a part of too many dimensions": lambda m: move(m, [2, 0, 0]),
    "a part that is longer": lambda m: put(chunk(m), "sizes", [3, 4]),
    "a part that is shorter": lambda m: put(chunk(m), "sizes", [1, 4]),
    "a part without end": lambda m: put(chunk(m), "sizes", [2**60, 4]),
    "a part of less than nothing": lambda m: put(chunk(m), "sizes", [-2, 4]),
    "a larger tensor": lambda m: put(matrix(m), "size", [7, 4]),
    "a tensor without end": lambda m: put(matrix(m), "size", [2**60, 4]),
    "a wider tensor": lambda m: put(matrix(m), "size", [6, 5]),
    "a transposed tensor": lambda m: put(matrix(m), "size", [4, 6]),
    "a tensor of less than nothing": lambda m: put(matrix(m), "size", [-6, 4]),
    "a size in words": lambda m: setattr(matrix(m), "size", "six"),
    "another type": lambda m: setattr(matrix(m).properties, "dtype", torch.float16),
    "whole numbers": lambda m: setattr(matrix(m).properties, "dtype", torch.int64),
    "no type": lambda m: setattr(matrix(m).properties, "dtype", "float32"),
    "the place of another part's shape": lambda m: setattr(place(m), "offset", place_of_count(m).offset),
    "a place before the file": lambda m: setattr(place(m), "offset", -8),
    "a place behind the file": lambda m: setattr(place(m), "offset", 2**60),
    "a part of no bytes": lambda m: setattr(place(m), "length", 0),
    "a part of fewer than no bytes": lambda m: setattr(place(m), "length", -1),
    "a part of too many bytes": lambda m: setattr(place(m), "length", 2**60),
    "half a byte": lambda m: setattr(place(m), "offset", 0.5),
    "another folder": lambda m: setattr(place(m), "relative_path", "../run/__0_0.distcp"),
    "the folder itself": lambda m: setattr(place(m), "relative_path", "."),
    "an absolute path": lambda m: setattr(place(m), "relative_path", "/dev/zero"),
    "a pipe": lambda m: setattr(place(m), "relative_path", "pipe"),
    "a link to a device": lambda m: setattr(place(m), "relative_path", "device"),
    "a file that is not there": lambda m: setattr(place(m), "relative_path", "__1_0.distcp"),
    "a path that is none": lambda m: setattr(place(m), "relative_path", 5),
    "no place": lambda m: m.storage_data.pop(MetadataIndex(MATRIX, chunk(m).offsets)),
    "no places": lambda m: setattr(m, "storage_data", None),
    "no tensors": lambda m: setattr(m, "state_dict_metadata", [1]),
    "a part in the place of a tensor": lambda m: m.state_dict_metadata.update({MATRIX: chunk(m)}),
    "a name that is none": lambda m: m.state_dict_metadata.update({7: matrix(m)}),
}


def place_of_count(metadata):
    return metadata.storage_data[MetadataIndex(COUNT, torch.Size([]))]


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_metadata_that_lies_is_refused(tmp_path, lie):
    metadata, _ = folder_of(tmp_path / "run")
    os.mkfifo(tmp_path / "run/pipe")
    (tmp_path / "run/device").symlink_to("/dev/zero")
    lie(metadata)
    with pytest.raises(UserError, match="run is damaged or of another model"):
        load(tmp_path / "run", metadata)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
def test_parts_make_the_tensor(tmp_path, parts):
    metadata, tensors = folder_of(tmp_path / "run", parts)
    matrix(metadata).chunks.reverse()
    found = load(tmp_path / "run", metadata)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)


STRANGE = {
    "transposed": (lambda t: t.t().clone().t(), True),
    "with gaps": (lambda t: torch.stack([t, t], -1)[..., 0], True),
    "in 4 bytes": (lambda t: t[:1, :1].clone().expand_as(t), False),
    "sparse": (lambda t: t.to_sparse(), False),
    "without numbers": (lambda t: t.to("meta"), False),
    "complex": (lambda t: t + 0j, False),
    "of two": (lambda t: [t, t], False),
    "larger": (lambda t: torch.cat([t, t]), False),
    "of another type": (lambda t: t.double(), False),
    "of another shape": (lambda t: t.view(4, 2), False),
}


@pytest.mark.parametrize(("change", "equal"), STRANGE.values(), ids=STRANGE.keys())
def test_a_part_of_another_layout_is_the_equal_one_or_refused(tmp_path, change, equal):
    metadata, tensors = folder_of(tmp_path / "run")
    file = tmp_path / "run/__0_0.distcp"
    content = io.BytesIO()
    torch.save(change(tensors["0.a"][2:4].clone()), content)
    place(metadata).offset, place(metadata).length = file.stat().st_size, len(content.getvalue())
    file.write_bytes(file.read_bytes() + content.getvalue())
    if equal:
        assert torch.equal(load(tmp_path / "run", metadata)["0.a"], tensors["0.a"])
    else:
        with pytest.raises(UserError, match="run is damaged"):
            load(tmp_path / "run", metadata)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "run"
    return path, *folder_of(path)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 100, 2**31, 2**60, 2**63 - 1])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_sizes_and_places_load_all_numbers_or_none(whole, data):
    """Whatever the numbers in .metadata are, no number that is loaded is one that no file has."""
    path, metadata, tensors = whole
    metadata = copy.deepcopy(metadata)
    for _ in range(data.draw(st.integers(1, 2))):
        number = data.draw(st.integers(0, 2))
        kind = data.draw(st.sampled_from(["size", "sizes", "offsets", "offset", "length"]))
        if kind in ("offset", "length"):
            if MetadataIndex(MATRIX, chunk(metadata, number).offsets) in metadata.storage_data:
                setattr(place(metadata, number), kind, data.draw(NUMBERS))
            continue
        size = data.draw(st.lists(NUMBERS, max_size=3))
        put(matrix(metadata) if kind == "size" else chunk(metadata, number), kind, size)
    try:
        found = load(path, metadata)
    except UserError:
        return
    matrix_found = found[
        "0.a"
    ]  # its last parts may be said to have no rows; then the model's shape refuses it
    assert torch.equal(matrix_found, tensors["0.a"][: len(matrix_found)]) or not matrix_found.numel()


def test_moments_are_those_of_the_optimizer_alone(tmp_path):
    metadata, tensors = folder_of(tmp_path / "run")
    (tmp_path / "run/.metadata").write_bytes(pickle.dumps(metadata))
    room = {name: torch.zeros_like(tensors[f"0.{name}"]) for name in ("a", "n")}
    sharded.load_part(tmp_path / "run", "model", {"0": room})
    assert all(torch.equal(room[name], tensors[f"0.{name}"]) for name in room)
    for other in (
        {"a": room["a"]},
        {**room, "b": room["a"]},
        {**room, "n": torch.zeros((), dtype=torch.int64)},
    ):
        with pytest.raises(UserError, match=r"model.0.[bn] is"):
            sharded.load_part(tmp_path / "run", "model", {"0": other})
