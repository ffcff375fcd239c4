"""What the machine can do at best, by a clock that tells what the tests want."""

import itertools

import pytest
import torch

from kqv.measuring import machine
from kqv.measuring.machine import Machine


def clock_of(*durations):
    """A clock by which measurements take these seconds, one after the other."""
    times = itertools.accumulate(itertools.chain.from_iterable((1.0, seconds) for seconds in durations))
    return lambda: next(times)


def machine_with(clock, monkeypatch, rounds=3):
    monkeypatch.setitem(machine.NUMBERS_READ, "cpu", 1000)
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 16)
    return Machine(torch.device("cpu"), torch.bfloat16, rounds, clock)


def test_the_first_call_does_not_count_and_of_the_others_the_median_does(monkeypatch):
    calls = []
    found = machine_with(clock_of(1.0, 5.0, 3.0), monkeypatch).median(lambda: calls.append(1))
    assert (found, len(calls)) == (3.0, 4)


def test_bandwidth_is_bytes_a_second(monkeypatch):
    assert machine_with(clock_of(1.0, 2.0, 4.0), monkeypatch).bandwidth() == 4000 / 2
    assert machine_with(clock_of(4.0), monkeypatch).bandwidth(once=True) == 4000 / 4


def test_a_matrix_product_takes_two_operations_for_each_pair(monkeypatch):
    assert machine_with(clock_of(0.1, 0.5, 0.5, 0.5), monkeypatch).matmul() == 2 * 16**3 / 0.5


def test_what_is_read_is_larger_than_the_caches():
    assert Machine(torch.device("cpu"), torch.float32, 1).numbers.nbytes == 2**28


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for():
    device = torch.device("cuda")
    gpu, a = Machine(device, torch.float32, 1), torch.ones(8192, 8192, device=device)
    gpu.seconds(lambda: a @ a)
    asked = gpu.seconds(lambda: None)
    assert gpu.seconds(lambda: [a @ a for _ in range(10)]) > 10 * asked


@pytest.mark.parametrize("a_second, size", [(1e12, 2048), (1e9, 512), (1e6, 256)])
def test_the_ceiling_of_slow_products_is_measured_with_smaller_ones(a_second, size):
    """`a_second`: multiplications in a second."""

    class Slow(Machine):
        now, sizes = 0.0, []

        def product(self, size):
            self.sizes = [*self.sizes, size]
            return lambda: setattr(self, "now", self.now + size**3 / a_second)

    slow = Slow(torch.device("cpu"), torch.bfloat16, 2, lambda: slow.now)
    assert slow.matmul() == pytest.approx(2 * a_second)
    assert slow.sizes == [256, size]
