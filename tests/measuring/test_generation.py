"""Generation's figures: what of the work is measured, and what it is divided by."""

import itertools

import pytest
import torch
from conftest import random_gpt

from kqv.generation.engine import Engine
from kqv.measuring import machine
from kqv.measuring.generation import (
    measure_decoding,
    measure_prefill,
    measure_uncached,
    prefill_flops,
    random_texts,
)

SHAPE = {"block_size": 64, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 32}


class Ticking(machine.Machine):
    """A Machine on which every measurement takes one second. It keeps what it was given to measure."""

    def __init__(self, rounds=3):
        ticks = itertools.count()
        super().__init__(torch.device("cpu"), torch.float32, rounds, lambda: float(next(ticks)))
        self.bandwidths_asked, self.answers = 0, []

    def bandwidth(self, once=False):
        self.bandwidths_asked += 1
        return super().bandwidth(once)

    def median(self, work):
        self.answers.append(work())
        return super().median(work)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(machine.NUMBERS_READ, "cpu", 2**16)
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 64)


@pytest.fixture
def engine():
    with torch.no_grad():
        yield Engine(random_gpt(**SHAPE))


def test_a_prefill_reads_all_tokens_at_once(engine):
    figures = measure_prefill(engine, 16, Ticking())
    assert (figures["tokens"], figures["ms"], figures["tokens/s"]) == (16, 1000, 16)
    assert figures["of matmul ceiling"] == pytest.approx(prefill_flops(engine.gpt, 16) / (2 * 64**3))


@pytest.mark.parametrize("bias", [False, True])
def test_operations_of_a_prefill_are_counted_as_they_are_done(bias):
    weights = 2 * 16 * 2 * (12 * 32**2 + (13 if bias else 2) * 32)
    scores = 2 * 2 * 2 * 16 * 16 * 32 / 2  # 2 blocks' two products of 16 x 16 x 32, of which half is masked
    assert prefill_flops(random_gpt(**SHAPE, bias=bias), 16) == pytest.approx(weights + scores)


def test_decoding_is_measured_without_the_first_token(engine):
    figures = measure_decoding(engine, random_texts(3, 8, 100), 9, Ticking())
    assert figures["first run s"] == 1 and figures["first token ms"] == 1000
    assert figures["ms a step"] == 1000 / 8 and figures["tokens/s"] == 3 * 8
    assert figures["memory GB/s"] == 2**18 / 1e9
    # a step reads all weights but positions, and of each row keys and values: 8 tokens and half of 8 more
    parameters = 100 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    read = 4 * parameters + 3 * 2 * 2 * (8 + 4) * 32 * 4
    assert figures["of ceiling"] == pytest.approx(read / 2**18 / (1 / 8))


def test_the_memory_is_looked_at_after_every_16_steps(engine):
    ticking = Ticking(rounds=2)
    measure_decoding(engine, random_texts(1, 8, 100), 38, ticking)  # the first token, then 16, 16 and 5
    assert ticking.bandwidths_asked == 2 * 3


def test_cached_and_uncached_tokens_come_from_the_same_text(engine):
    engine.gpt.transformer.wpe.weight.mul_(10)  # the answer depends on the position
    ticking = Ticking()
    figures = measure_uncached(engine, 16, ticking)
    (uncached, (cached,)) = ticking.answers
    assert uncached.item() == cached.item()
    assert (figures["context"], figures["tokens/s"], figures["times faster"]) == (16, 1, 1)
