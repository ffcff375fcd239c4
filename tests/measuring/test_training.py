"""Training's steps, and the turns in which they are measured."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from kqv.measuring import machine
from kqv.measuring.plain import plain_step
from kqv.measuring.training import measure_in_turns, measure_training, own_step, write_random_set
from kqv.text import dataset_writer
from kqv.text.dataset import Dataset
from model import GPTConfig

SHAPE = GPTConfig(block_size=16, vocab_size=30, n_layer=1, n_head=2, n_embd=32, bias=False)
ON_CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def test_steps_are_measured_in_turns_and_the_median_counts():
    """Of a machine on which a step of one kind takes as many seconds as its number of calls so far."""
    calls = []

    def step(name):
        return lambda: calls.append(name)

    def seconds(work):
        work()
        return float(calls.count("ours"))

    machine = SimpleNamespace(rounds=3, seconds=seconds)
    found = measure_in_turns({"ours": step("ours"), "plain": step("plain")}, machine, 2)
    assert calls == ["ours", "ours", "plain", "plain"] * 3
    assert found == {"ours": 4 / 2, "plain": 4 / 2}  # of 2, 4 and 6 seconds for two steps


def own(settings):
    return own_step(settings, SHAPE, ON_CPU, False, train.train_step)


def plain(settings):
    return plain_step(settings, SHAPE, ON_CPU, False)


@pytest.fixture
def step_settings(tmp_path):
    """train.py's settings for a step on random tokens."""
    write_random_set(tmp_path, SHAPE)
    return train.TrainSettings(
        n_layer=1,
        n_head=2,
        n_embd=32,
        block_size=16,
        batch_size=2,
        gradient_accumulation_steps=1,
        dataset=str(tmp_path),
    )


def test_operations_are_counted_and_the_first_steps_are_not_measured(step_settings, monkeypatch):
    """On a machine on which each measurement takes a second."""
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 64)
    monkeypatch.setitem(machine.NUMBERS_READ, "cpu", 1)
    ticks, calls = itertools.count(), []
    ticking = machine.Machine(torch.device("cpu"), torch.float32, 2, lambda: float(next(ticks)))

    def train_step(*arguments):
        calls.append(1)
        return train.train_step(*arguments)

    options = SimpleNamespace(compile=False, compare=True, profile=False, steps=4)
    figures = measure_training(options, step_settings, SHAPE, ticking, train_step, "tiny")
    assert len(calls) == 1 + 2 + 2 * 4
    assert figures["first step s"] == figures["times faster"] == 1
    assert figures["ms a step"] == figures["plain ms a step"] == 1000 / 4
    assert figures["tokens/s"] == 4 * 2 * 16
    # 6 operations for each of 30 ids' vectors, 12 C^2 in the block and three LayerNorms; and attention
    a_token = 6 * (30 * 32 + 12 * 32**2 + 3 * 32) + 12 * 32 * 16
    assert figures["of matmul ceiling"] == pytest.approx(4 * 2 * 16 * a_token / (2 * 64**3))


@pytest.mark.parametrize("make", [own, plain])
def test_both_steps_train(make, step_settings):
    """On tokens of which there are only a few, though the model knows more."""
    folder = Path(step_settings.dataset)
    assert Dataset(folder).splits["train"][:].max() == 29
    splits = {split: torch.arange(1000).numpy() % 3 for split in ("train", "val")}
    dataset_writer.write(folder, splits, Dataset(folder).tokenizer, {})
    step = make(step_settings)
    losses = [step().item() for _ in range(300)]
    assert losses[0] == pytest.approx(3.4, abs=0.1) and losses[-1] < 0.8 * losses[0]
