"""Pickles: what is read, and what is refused before it takes time or memory."""

import io
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kqv.errors import UserError
from kqv.pickles import load_plain_pickle, require_modest

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda part: (
        st.lists(part) | st.tuples(part, part) | st.dictionaries(st.text() | st.integers(0, 2**62), part)
    ),
    max_leaves=20,
)


def nested(times):
    value = ()
    for _ in range(times):
        value = (value, value)
    return value


@settings(deadline=None, max_examples=60)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_what_pickle_writes_of_plain_values_is_modest(value, protocol):
    file = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
    require_modest(file)
    assert file.read() == b"rest"


def test_a_large_vocabulary_is_read_fast(tmp_path):
    meta = {"itos": {i: f"piece {i}" for i in range(50257)}, "stoi": {f"piece {i}": i for i in range(50257)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    begin = time.process_time()
    assert load_plain_pickle(tmp_path / "meta.pkl") == meta
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_saves_is_modest(new, tmp_path):
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    contents = {"a": layer.state_dict(), "b": optimizer.state_dict(), "c": b"\xff", "d": torch.Size([1])}
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=new)
    if new:
        content = torch._C.PyTorchFileReader(io.BytesIO(file.getvalue())).get_record("data.pkl")
        require_modest(io.BytesIO(content))
    else:
        file.seek(0)
        for _ in range(5):
            require_modest(file)


BOMBS = {
    "a key that is hashed for ever": b"\x80\x02}" + pickle.dumps(nested(60), 2)[2:-1] + b"K\x01s.",
    "a value that is compared for ever": pickle.dumps(nested(60)),
    "lists that hold one list often": b"\x80\x02]q\x00"
    + b"".join(b"(h%ch%ch%ce]q%c" % (i, i, i, i + 1) for i in range(30))
    + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "depth": b"\x80\x02" + b"]" * 200 + b"a" * 199 + b".",
    "depth of marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "a far place of its memory": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a place below 0": b"Np-5\n.",
    "keys of one hash": pickle.dumps({(2**61 - 1) * k: 1 for k in range(9)}),
    "keys of one hash, in tuples": pickle.dumps({((2**61 - 1) * k,): 1 for k in range(9)}),
    "bytes that are not there": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.",
    "a number that is not there": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "an empty stack": b"\x80\x02a.",
    "marks without end": b"\x80\x02t.",
    "a part of a leaf": b"\x80\x02NNa.",
    "nothing": b"",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_at_once(content, tmp_path):
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(UserError, match="meta.pkl is refused"):
        load_plain_pickle(path)
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        require_modest(io.BytesIO(content))
    assert time.process_time() - begin < 5


def test_a_pickle_of_more_operations_than_asked_for_is_refused():
    require_modest(io.BytesIO(b"\x80\x02" + b"N0" * 9 + b"N."), 20)
    with pytest.raises(pickle.UnpicklingError, match="more than 20 operations"):
        require_modest(io.BytesIO(b"\x80\x02" + b"N0" * 10 + b"N."), 20)
