"""Which tokens a step sees, and which folders are no set."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, process_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from kqv.errors import UserError
from kqv.text import dataset_writer, token_files
from kqv.text.dataset import Dataset
from kqv.text.token_files import SPLITS
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer
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
    batches += [numbered.evaluation_batch(split, batch_size, block_size, 1, 3) for split in SPLITS]
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
            (x.tolist(), y.tolist(), weight, seed)
            for (x, y), weight, seed in micro_batches(numbered, config, world, step=5)
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
        return [numbered.evaluation_batch(split, 4, 16, i, 3) for split in SPLITS for i in range(3)]

    before = evaluated()
    np.random.seed(7)
    torch.manual_seed(7)
    numbered.training_batch(4, 16, 7, 7, 7)
    assert all(same(a[:2], b[:2]) for a, b in zip(before, evaluated(), strict=True))


GROWTH = """
import resource, sys
from kqv.text.dataset import Dataset
data = Dataset(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for order in ("random", "epoch"):
    for step in range(50_000):
        if step == 1000:
            before = peak()
        data.training_batch(4, 64, 1, step, 0, order)
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
    program = GROWTH.replace("50_000", "600").replace("1000", "100").replace("4, 64", "40, 64")
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
    dataset_writer.write(folder, {split: np.zeros(2000) for split in SPLITS}, tokenizer, {})
    os.truncate(folder / "train.bin", size)
    meta = json.loads((folder / "meta.json").read_text())
    meta["parts"][0]["tokens"]["train"] = size // 2
    (folder / "meta.json").write_text(json.dumps(meta))


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


@pytest.mark.parametrize(
    "meta, known, places",
    [(None, 50257, [999]), ({"itos": {0: "a", 1: "b"}, "vocab_size": 2}, 2, [0, 299, 300])],
)
@pytest.mark.parametrize("split", SPLITS)
def test_an_id_that_the_tokenizer_of_nanogpts_folder_lacks_is_refused_wherever_it_is(
    split, meta, known, places, gpt2, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_files, "AT_ONCE", 300)
    if meta:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    for name in SPLITS:
        np.full(1000, known - 1, np.uint16).tofile(tmp_path / f"{name}.bin")
    Dataset(tmp_path)
    for place in places:
        ids = np.zeros(1000, np.uint16)
        ids[place] = known
        ids.tofile(tmp_path / f"{split}.bin")
        with pytest.raises(UserError, match=f"{split}.bin has the id {known}, but .* has only {known}"):
            Dataset(tmp_path)


def bytes_read():
    """How many bytes this process has read until now, from files and all else."""
    return int(re.search("rchar: ([0-9]+)", Path("/proc/self/io").read_text())[1])


def test_a_set_of_ours_is_opened_without_reading_its_ids(tmp_path):
    sparse_set(tmp_path, 2**26)
    before = bytes_read()
    Dataset(tmp_path).require_length(64)
    assert bytes_read() - before < 100_000


def test_a_folder_of_nanogpt_without_meta_holds_gpt2s_tokens(gpt2, tmp_path):
    for split in SPLITS:
        gpt2.encode(f"the {split} split").astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    opened = Dataset(tmp_path)
    assert opened.tokenizer.kind == "gpt2"
    assert opened.tokenizer.decode(opened.splits["val"][:]) == "the val split"


@pytest.mark.parametrize("size", [0, 7])
def test_a_damaged_folder_of_nanogpt_is_refused(size, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "stoi": {"a": 0}, "vocab_size": 1}))
    for split in SPLITS:
        (tmp_path / f"{split}.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=f"train.bin has {size} bytes"):
        Dataset(tmp_path)


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
        "a tokenizer of fewer ids": lambda: changed(tokenizer={"kind": "char", "chars": "ab"}),
        "another number of ids": lambda: changed(vocab_size=9999),
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
    dataset_writer.write(tmp_path, {split: np.zeros(64) for split in SPLITS}, ByteTokenizer(), {})
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
