"""What torch.save wrote is read as it was, in plain tensors no larger than their file, or refused."""

import io
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kqv.formats import torch_files
from kqv.formats.tensors import DTYPES, dense


def saved(contents, **how):
    file = io.BytesIO()
    torch.save(contents, file, **how)
    return file


def again(contents, **how):
    """What is read of contents that torch.save writes."""
    return torch_files.load(saved(contents, **how))


def tensors_of(contents):
    if isinstance(contents, torch.Tensor):
        return [contents]
    if isinstance(contents, dict):
        contents = list(contents.values())
    parts = contents if isinstance(contents, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def assert_plain(tensor):
    assert type(tensor) is torch.Tensor and tensor.dtype in DTYPES and tensor.device.type == "cpu"
    assert tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


def numbers(count, dtype=torch.float32):
    return torch.randint(-100, 100, (count,), generator=torch.Generator().manual_seed(0)).to(dtype)


LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_plain_type_come_back(how, dtype):
    tied = numbers(12, dtype)
    contents = {
        "a": OrderedDict(wte=tied, head=tied),
        "b": [torch.nn.Parameter(torch.ones(2)), torch.tensor(3), numbers(6, dtype).view(2, 3).t()],
        "cropped": numbers(8, dtype)[2:4],
        "none": torch.empty(0, 5),
        "values": (1, 2.5, True, None, "é", 10**30),
    }
    found = again(contents, **how)
    assert all(map(torch.equal, tensors_of(found), tensors_of(contents)))
    assert found["values"] == contents["values"] and found["a"]["wte"] is found["a"]["head"]
    for tensor in tensors_of(found):
        assert_plain(tensor)


def test_a_state_dict_comes_back_without_what_is_beside_it(tmp_path):
    layer = torch.nn.Linear(3, 2)
    found = again({"model": layer.state_dict()})
    assert layer.load_state_dict(found["model"]) and again(found)["model"].keys() == {"weight", "bias"}


def test_what_is_mapped_is_the_same(tmp_path):
    contents = {"a": numbers(1000).view(10, 100).t(), "b": numbers(7, torch.int64)}
    torch.save(contents, tmp_path / "a.pt")
    with open(tmp_path / "a.pt", "rb") as file:
        found = torch_files.load(file, mapped=tmp_path / "a.pt")
    for name, tensor in contents.items():
        assert torch.equal(found[name], tensor)
        assert_plain(found[name])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_view_is_the_equal_dense_tensor_or_refused(data):
    """Strides of 0, that overlap, or transposed; an offset; a second view of the same memory."""
    memory = numbers(data.draw(st.integers(1, 30)))
    views = []
    for _ in range(data.draw(st.integers(1, 2))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        strides = data.draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
        offset = data.draw(st.integers(0, 10))
        try:
            views.append(torch.as_strided(memory, shape, strides, offset))
        except RuntimeError:  # beyond the memory
            assume(False)
    unlike = {(view.shape, view.stride(), view.storage_offset()): view for view in views}
    fits = sum(view.nbytes for view in unlike.values()) <= memory.nbytes
    try:
        found = again(views)
    except ValueError as error:
        assert not fits and "clone()" in str(error)
    else:
        assert fits and all(map(torch.equal, found, views))
        for tensor in found:
            assert_plain(tensor)


def test_tensors_that_share_memory_are_together_no_larger_than_it():
    memory = numbers(12)
    found = again([memory[:6], memory[4:8], memory[10:]])
    assert torch.equal(torch.cat(found), torch.cat([memory[:6], memory[4:8], memory[10:]]))
    for views in ([memory, memory[1:]], [memory, memory.view(3, 4)], [memory[:8], memory[4:]]):
        with pytest.raises(ValueError, match="shares memory"):
            again(views)


class Subclass(torch.Tensor):
    pass


NOT_PLAIN = {
    "expanded": lambda: torch.zeros(1).expand(64, 64),
    "expanded beyond any memory": lambda: torch.zeros(1).expand(2**30, 2**20),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "CSR": lambda: torch.eye(4).to_sparse_csr(),
    "meta": lambda: torch.empty(4, device="meta"),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "conjugate": lambda: torch.ones(4, dtype=torch.complex64).conj(),
    "negative view": lambda: torch._neg_view(torch.ones(4)),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "unsigned": lambda: torch.ones(4).to(torch.uint16),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "of a subclass": lambda: torch.ones(4).as_subclass(Subclass),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_tensor_that_is_not_plain_is_refused(make, how):
    tensor = make()
    with pytest.raises(ValueError):
        dense(tensor)
    try:
        file = saved([tensor], **how)
    except Exception:  # torch itself can't write it so
        return
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        torch_files.load(file)


class Makes:
    """Pickled as a call that torch.load admits, and that makes memory of any size, with no numbers in it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make", [Makes(torch.Tensor, 2**40), Makes(torch.Tensor, 4), Makes(bytearray, 2**40)]
)
def test_memory_that_the_file_does_not_have_is_refused(make):
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        again({"a": make})


def rewritten(file, **changes):
    """The zip archive with other records of these names, and right checksums."""
    new = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(new, "w") as archive:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            archive.writestr(info.filename, changes.get(name, old.read(info)))
    return new


WHOLE = saved({"model": {"a": numbers(40).view(5, 8), "b": numbers(3)}, "step": 3})
PICKLE = zipfile.ZipFile(WHOLE).read("archive/data.pkl")


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(PICKLE) - 1), st.integers(0, 255))
def test_a_pickle_that_lies_of_its_memory_gets_no_other_memory(where, byte):
    changed = bytearray(PICKLE)
    changed[where] = byte
    file = rewritten(WHOLE, **{"data.pkl": bytes(changed)})
    try:
        found = tensors_of(torch_files.load(file))
    except Exception:  # any: the caller says that the file is damaged
        return
    assert sum(tensor.nbytes for tensor in found) <= 4 * (40 + 3)
    for tensor in found:
        assert_plain(tensor)


@pytest.mark.parametrize("count", [0, 3, 41, 2**31 - 1])
@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_count_of_numbers_that_is_not_the_files_is_refused(how, count):
    file = saved([torch.ones(77)], **how)
    old, new = (b"K\x4d", b"J" + count.to_bytes(4, "little"))
    if how:
        content = io.BytesIO(file.getvalue().replace(old, new))
    else:
        content = rewritten(
            file, **{"data.pkl": zipfile.ZipFile(file).read("archive/data.pkl").replace(old, new)}
        )
    with pytest.raises(Exception):  # noqa: B017
        torch_files.load(content)


def test_records_that_grow_when_they_are_read_are_refused(tmp_path):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(tmp_path / "a.pt", "w", method) as archive, zipfile.ZipFile(WHOLE) as old:
            for info in old.infolist():
                archive.writestr(info.filename, old.read(info))
        with open(tmp_path / "a.pt", "rb") as file, pytest.raises(ValueError, match="compressed"):
            torch_files.load(file)


def test_numbers_of_another_byte_order_are_refused():
    with pytest.raises(ValueError, match="byte order"):
        torch_files.load(rewritten(WHOLE, byteorder=b"big"))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_legacy_file_that_is_damaged_is_refused_or_plain(data):
    whole = bytearray(saved({"a": numbers(40).view(5, 8), "step": 3}, **LEGACY).getvalue())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))]
    try:
        found = tensors_of(torch_files.load(io.BytesIO(whole)))
    except Exception:
        return
    for tensor in found:
        assert_plain(tensor)
