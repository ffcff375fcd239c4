"""bench.py on a model so small that the figures mean nothing: what is printed, and whether it adds up."""

import json
from types import SimpleNamespace

import pytest
import torch

import bench
from model import GPT

TINY = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=64", "--vocab_size=100", "--rounds=1"]
TINY += ["--prompt_length=8", "--max_new_tokens=8", "--prefill_length=16", "--batch_sizes=1,3"]
TINY += ["--device=cpu", "--compile=False"]


@pytest.fixture
def measure(cli, monkeypatch):
    """Call bench.py sample on a tiny model: measure("--uncached=False") -> what it prints."""

    class Smaller(bench.Machine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            assert (self.much.nbytes, self.side) == (2**28, 2048)
            self.much, self.side = self.much[: 2**16].clone(), 64

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, **options: ones(()).expand(size))  # no memory for 256 MB
    monkeypatch.setattr(bench, "Machine", Smaller)

    def succeed(*argv):
        status, out, err = cli(bench.main, "sample", *TINY, *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


@pytest.fixture
def figures(measure):
    """The same as {what: its figures}."""

    def parsed(*argv):
        lines = map(json.loads, measure("--format=jsonl", *argv).splitlines())
        return {line.pop("what"): line for line in lines}

    return parsed


@pytest.fixture
def refused(refusal):
    return lambda *argv: refusal(bench.main, *argv, status=2)


def fraction(read, decoding):
    """Of the memory's speed, what reading so many bytes in a step takes."""
    return read / (decoding["memory GB/s"] * 1e9) / (decoding["ms a step"] / 1e3)


def test_each_thing_measured_has_a_line(measure):
    lines = measure().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["machine", "prefill", "batch 1", "batch 3", "cache"]
    assert "device cpu (1 threads), torch " in lines[0] and "dtype float32, compiled False" in lines[0]
    assert all(part in lines[2] for part in ("first token ms ", "ms a step ", ", tokens/s ", "of ceiling "))


def test_jsonl_has_the_same_lines(figures, measure):
    for line, (what, numbers) in zip(measure().splitlines(), figures().items(), strict=True):
        assert line.startswith(f"{what}: ") and all(name in line for name in numbers)


def test_figures_are_positive_and_add_up(figures):
    found = figures()
    for what, numbers in found.items():
        assert all(number > 0 for number in numbers.values() if type(number) in (int, float)), what
    machine, prefill = found["machine"], found["prefill"]
    # 100 ids, 12 n_embd ** 2 in a block, its 13 biases and gains and ln_f's 2; positions don't count
    assert machine["parameters"] == 100 * 32 + 12 * 32**2 + 13 * 32 + 2 * 32
    assert (prefill["tokens"], found["cache"]["context"]) == (16, 16)
    assert prefill["tokens/s"] * prefill["ms"] == pytest.approx(16 * 1000)
    for rows in (1, 3):
        decoding = found[f"batch {rows}"]
        assert decoding["tokens/s"] * decoding["ms a step"] == pytest.approx(1000 * rows)
        # a step reads all weights, and each row's keys and values: 8 tokens and half of the 7 after the first
        read = 4 * machine["parameters"] + rows * 2 * 11.5 * 32 * 4
        assert decoding["of ceiling"] == pytest.approx(fraction(read, decoding))
    cache = found["cache"]
    assert cache["tokens/s"] / cache["uncached tokens/s"] == pytest.approx(cache["times faster"])


def test_operations_of_a_prefill_are_counted_as_they_are_done(figures, monkeypatch):
    monkeypatch.setattr(bench.Machine, "matmul", lambda self: 1e9)
    prefill = figures()["prefill"]
    weights, scores, head = 16 * (12 * 32**2 + 13 * 32), 16 * 16 * 32, 32 * 100
    expected = 2 * (weights + scores + head) / (prefill["ms"] / 1e3) / 1e9
    assert prefill["of matmul ceiling"] == pytest.approx(expected)


def test_time_is_measured_where_the_work_is_done(figures, monkeypatch):
    """With a clock that ticks once whenever it is read, each thing takes one tick."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    found = figures("--rounds=3", "--max_new_tokens=9")
    assert found["machine"]["memory GB/s"] == 2**18 / 1e9
    assert found["machine"]["matmul TFLOP/s"] == 2 * 64**3 / 1e12
    assert found["prefill"]["ms"] == 1000
    assert found["batch 3"]["first run s"] == 1 and found["batch 3"]["first token ms"] == 1000
    assert found["batch 3"]["ms a step"] == 1000 / 8  # the first of the nine tokens is measured apart
    assert found["cache"]["times faster"] == 1


def test_the_first_round_does_not_count_and_of_the_others_the_median_does():
    rounds = iter([100.0, 1.0, 5.0, 3.0])
    machine = SimpleNamespace(rounds=3, seconds=lambda work: work())
    assert bench.Machine.median(machine, lambda: next(rounds)) == 3.0


def test_the_cache_is_measured_on_request(figures):
    assert "cache" not in figures("--uncached=False")


def test_cached_and_uncached_tokens_come_from_the_same_text(figures, monkeypatch):
    """Both give the same answer, with a model whose answer hangs on the position."""
    answers, median = [], bench.Machine.median

    def gpt_of(shape):
        gpt = GPT(shape)
        gpt.transformer.wpe.weight.data *= 10
        return gpt

    def kept(self, work):
        answers.append(work())
        return median(self, work)

    monkeypatch.setattr(bench.Machine, "median", kept)
    monkeypatch.setattr(bench, "GPT", gpt_of)
    figures("--batch_sizes=1")
    *_, uncached, (cached,) = answers
    assert uncached.item() == cached.item()


def test_a_profile_names_what_takes_the_time(measure):
    out = measure("--profile", "--uncached=False", "--batch_sizes=2")
    assert "Self CPU" in out and "aten::" in out


def test_precision_and_sizes_are_those_asked_for(figures):
    found = figures("--dtype=bfloat16", "--batch_sizes=2", "--n_layer=2")
    assert found["machine"]["dtype"] == "bfloat16" and "batch 2" in found and "batch 1" not in found
    assert found["machine"]["parameters"] == 100 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    read = 2 * found["machine"]["parameters"] + 2 * 2 * 2 * 11.5 * 32 * 2
    assert found["batch 2"]["of ceiling"] == pytest.approx(fraction(read, found["batch 2"]))


def test_the_memory_is_looked_at_after_every_16_steps(figures, monkeypatch):
    looks, bandwidth = [], bench.Machine.bandwidth
    monkeypatch.setattr(
        bench.Machine, "bandwidth", lambda self, once=False: looks.append(once) or bandwidth(self, once)
    )
    found = figures("--max_new_tokens=38", "--batch_sizes=1")  # the first token, 16, 16 and 5
    assert looks == [False, True, True, True]
    assert found["batch 1"]["tokens/s"] * found["batch 1"]["ms a step"] == pytest.approx(1000)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], ["name what to measure", "bench.py sample"]),
        (["smaple"], ["smaple", "bench.py sample"]),
        (["--help"], ["bench.py sample", "--help"]),
        (["sample", "--batch_sizes=0"], ["batch_sizes=0", "at least 1"]),
        (["sample", "--batch_sizes=1,-2"], ["batch_sizes=1,-2", "at least 1"]),
        (["sample", "--batch_sizes=a"], ["'a'", "batch_sizes=a"]),
        (["sample", "--batch_sizes="], ["batch_sizes="]),
        (["sample", "--batch_sizes=1,,2"], ["batch_sizes=1,,2"]),
        (["sample", "--n_embd=100"], ["n_embd=100", "n_head=12"]),
        (["sample", "--block_size=255"], ["prompt_length=128", "max_new_tokens=128", "block_size=255"]),
        (["sample", "--prefill_length=1025"], ["prefill_length=1025", "block_size=1024"]),
        (["sample", "--max_new_tokens=7"], ["max_new_tokens is 7", "at least 8"]),
        (["sample", "--prompt_length=1"], ["prompt_length is 1", "at least 2"]),
        (["sample", "--rounds=0"], ["rounds is 0", "at least 1"]),
        (["sample", "--n_layers=3"], ["did you mean n_layer?"]),
    ],
)
def test_what_can_not_be_measured_is_refused(refused, argv, says):
    line = refused(*argv)
    assert all(part in line for part in says), line


def test_lengths_may_fill_the_context(measure):
    assert "batch 1" in measure("--prompt_length=8", "--max_new_tokens=56", "--prefill_length=64")


def test_too_little_memory_is_said_in_a_line(refusal, monkeypatch):
    def bench_sample(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "bench_sample", bench_sample)
    line = refusal(bench.main, "sample", *TINY)
    assert "out of memory" in line and "--batch_sizes than 1,3" in line
