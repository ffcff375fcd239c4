"""Ids in many files, read as one sequence."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kqv.errors import UserError
from kqv.text import token_files

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy


def write_files(folder, sizes, dtype):
    """Files with 0, 1, 2, ... in them, so many in each; and these numbers as one array."""
    numbers = np.arange(sum(sizes)).astype(dtype)
    borders = np.cumsum([0, *sizes])
    paths = [folder / f"{place}.bin" for place in range(len(sizes))]
    for path, start, end in zip(paths, borders, borders[1:], strict=False):
        numbers[start:end].tofile(path)
    return paths, numbers


@UNHURRIED
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from(["uint16", "uint32"]),
    slices=st.lists(st.slices(60).map(lambda part: slice(part.start, part.stop)), max_size=9),
    at_once=st.integers(1, 20),
)
def test_tokens_in_many_files_are_one_array(sizes, dtype, slices, at_once, tmp_path_factory):
    paths, numbers = write_files(tmp_path_factory.mktemp("files"), sizes, dtype)
    tokens = token_files.Tokens(paths, dtype, 2**32)
    assert len(tokens) == len(numbers) and tokens.dtype == numbers.dtype
    for part in [slice(None), *slices]:
        assert np.array_equal(tokens[part], numbers[part]) and tokens[part].dtype == numbers.dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "AT_ONCE", at_once)
        blocks = list(tokens.blocks())
    assert np.array_equal(np.concatenate(blocks), numbers) and max(map(len, blocks)) <= at_once


def test_a_file_that_becomes_shorter_is_one_line(tmp_path):
    paths, numbers = write_files(tmp_path, [50, 50], "uint16")
    tokens = token_files.Tokens(paths, "uint16", 2**16)
    os.truncate(paths[1], 50)
    assert np.array_equal(tokens[40:75], numbers[40:75])
    with pytest.raises(UserError, match="1.bin became shorter"):
        tokens[40:76]


def test_files_are_closed_with_their_tokens(tmp_path):
    paths, _ = write_files(tmp_path, [5] * 40, "uint16")
    before = len(os.listdir("/proc/self/fd"))
    tokens = token_files.Tokens(paths, "uint16", 2**16)
    assert len(os.listdir("/proc/self/fd")) == before + 40
    del tokens
    assert len(os.listdir("/proc/self/fd")) == before
