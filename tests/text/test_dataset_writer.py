"""What is written of a set, and what a crash leaves of it."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kqv.errors import UserError
from kqv.text import dataset_writer, token_files
from kqv.text.dataset import Dataset
from kqv.text.token_files import SPLITS
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer


def all_of(tokens):
    return tokens[:].tolist()


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def write_in_parts(folder, count, splits, tokenizer, about):
    """A set in so many parts of unequal sizes, of which one may have nothing of a split; or what it lacks."""
    writer = dataset_writer.Writer(folder, tokenizer, about)
    pieces = {split: np.split(ids, sorted(random_cuts(len(ids), count))) for split, ids in splits.items()}
    for number in range(len(writer.parts), count):
        for split in SPLITS:
            writer.append(split, pieces[split][number])
        writer.end_part(number=number)
    writer.finish(more="facts")
    writer.leave()


def random_cuts(size, count):
    return np.random.default_rng(size).integers(0, size + 1, size=count - 1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_set_in_parts_is_read_as_one(count, tmp_path):
    splits = {"train": np.arange(1000) % 257, "val": np.arange(50) % 7}
    write_in_parts(tmp_path, count, splits, ByteTokenizer(), {"source": "here"})
    opened = Dataset(tmp_path)
    for split, ids in splits.items():
        assert all_of(opened.splits[split]) == ids.tolist()
        assert len(list(tmp_path.glob(f"{split}*.bin"))) == count
    whole = tmp_path / "whole"
    dataset_writer.write(whole, splits, ByteTokenizer(), {})
    for step in range(9):
        parts, one = (data.training_batch(3, 400, 1, step, 0) for data in (opened, Dataset(whole)))
        assert same(parts[0][:2], one[0][:2]) and parts[1] == one[1]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["source"], meta["more"], meta["tokens"]) == ("here", "facts", {"train": 1000, "val": 50})
    assert [part["number"] for part in meta["parts"]] == list(range(count))


@pytest.mark.parametrize("split", SPLITS)
def test_a_set_with_an_id_that_its_tokenizer_lacks_is_never_written(split, tmp_path):
    for wrong in (257, -1, 2**16):
        ids = {name: np.arange(2000) % 257 for name in SPLITS}
        ids[split][1234] = wrong
        with pytest.raises(ValueError, match="ids are from 0 to 256"):
            dataset_writer.write(tmp_path, ids, ByteTokenizer(), {})
        assert not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_smallest_type_that_holds_every_id_is_written(vocab_size, dtype, tmp_path):
    splits = {split: np.array([0, vocab_size - 1], np.uint32) for split in SPLITS}
    dataset_writer.write(
        tmp_path, splits, CharTokenizer("".join(map(chr, range(2**17, 2**17 + vocab_size)))), {}
    )
    opened = Dataset(tmp_path)
    assert opened.splits["train"].dtype == dtype and all_of(opened.splits["train"]) == [0, vocab_size - 1]
    x, y, _ = opened.evaluation_batch("val", 1, 1, 0, 1)
    assert (x.item(), y.item()) == (0, vocab_size - 1)


class Killed(BaseException):
    pass


OLD = ({"train": np.full(50, 1), "val": np.full(20, 1)}, ByteTokenizer(), {})


NEW = ({"train": np.full(50, 2), "val": np.full(20, 2)}, CharTokenizer("abc"), {})  # of the same sizes


def contents(folder):
    """What a set's folder is: a set's tokenizer and values, or None where it is no set."""
    try:
        opened = Dataset(folder)
    except UserError as error:
        assert "has no train" in str(error)
        return None
    return opened.tokenizer.kind, *(set(all_of(opened.splits[split])) for split in SPLITS)


STEPS = ((os, "fsync"), (os, "replace"), (os, "rename"), (Path, "unlink"), (shutil, "rmtree"))


@pytest.mark.parametrize("old_parts, new_parts", [(1, 1), (1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("killed", [False, True], ids=["exception", "kill"])
def test_a_crash_leaves_the_old_set_or_the_new_one_or_none(
    killed, old_parts, new_parts, tmp_path, monkeypatch
):
    def crashing(function):
        """`function`, until the crash; after it a process that was killed can't even clean up."""

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == crash_at or (calls > crash_at and killed):
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes its time
    for crash_at in itertools.count(1):
        folder = tmp_path / str(crash_at)
        write_in_parts(folder, old_parts, *OLD)
        assert contents(folder) == ("byte", {1}, {1})
        (folder / "notes.txt").write_text("mine")
        (folder / "training.bin").write_text("mine")
        calls = 0
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            for module, name in STEPS:
                patched.setattr(module, name, crashing(getattr(module, name)))
            write_in_parts(folder, new_parts, *NEW)
        assert contents(folder) in (None, ("byte", {1}, {1}), ("char", {2}, {2}))
        write_in_parts(folder, new_parts, *NEW)
        assert contents(folder) == ("char", {2}, {2})
        names = [name for split in SPLITS for name in token_files.file_names(split, new_parts)]
        assert sorted(os.listdir(folder)) == sorted(["meta.json", "notes.txt", "training.bin", *names])
        assert (folder / "notes.txt").read_text() == (folder / "training.bin").read_text() == "mine"
        if calls < crash_at:  # no crash: the end was reached
            break
    assert crash_at > 12


def test_a_set_that_is_being_read_stays_as_it_was(tmp_path):
    dataset_writer.write(tmp_path, *OLD)
    opened = Dataset(tmp_path)
    dataset_writer.write(tmp_path, *NEW)
    assert set(all_of(opened.splits["train"])) == {1}
