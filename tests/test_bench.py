"""bench.py on a model so small that the figures mean nothing: what is printed, and whether it adds up."""

import json
from types import SimpleNamespace

import pytest
import torch

import bench
import train
from kqv.measuring import machine
from kqv.measuring.training import PRESETS, Preset, own_step, plain_step, training_settings, write_random_set
from kqv.text import dataset_writer
from kqv.text.dataset import Dataset
from model import GPT, GPTConfig

TINY = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=64", "--vocab_size=100", "--rounds=1"]
TINY += ["--prompt_length=8", "--max_new_tokens=8", "--prefill_length=16", "--batch_sizes=1,3"]
TINY += ["--device=cpu", "--compile=False", "--dtype=float32"]


@pytest.fixture
def small_machine(monkeypatch):
    """A Machine whose ceilings are measured on little, which takes no time."""

    class Smaller(machine.Machine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            assert (self.much.nbytes, self.side) == (2**28, 2048)
            self.much, self.side = self.much[: 2**16].clone(), 64

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, **options: ones(()).expand(size))  # no memory for 256 MB
    monkeypatch.setattr(bench, "Machine", Smaller)


@pytest.fixture
def measure(cli, small_machine):
    """Call bench.py sample on a tiny model: measure("--uncached=False") -> what it prints."""

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
    monkeypatch.setattr(machine.Machine, "matmul", lambda self: 1e9)
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
    assert machine.Machine.median(machine, lambda: next(rounds)) == 3.0


def test_the_cache_is_measured_on_request(figures):
    assert "cache" not in figures("--uncached=False")


def test_cached_and_uncached_tokens_come_from_the_same_text(figures, monkeypatch):
    """Both give the same answer, with a model whose answer hangs on the position."""
    answers, median = [], machine.Machine.median

    def gpt_of(shape):
        gpt = GPT(shape)
        gpt.transformer.wpe.weight.data *= 10
        return gpt

    def kept(self, work):
        answers.append(work())
        return median(self, work)

    monkeypatch.setattr(machine.Machine, "median", kept)
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
    looks, bandwidth = [], machine.Machine.bandwidth
    monkeypatch.setattr(
        machine.Machine, "bandwidth", lambda self, once=False: looks.append(once) or bandwidth(self, once)
    )
    found = figures("--max_new_tokens=38", "--batch_sizes=1")  # the first token, 16, 16 and 5
    assert looks == [False, True, True, True]
    assert found["batch 1"]["tokens/s"] * found["batch 1"]["ms a step"] == pytest.approx(1000)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], ["name what to measure", "bench.py sample", "bench.py train"]),
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


# Training


@pytest.fixture
def trained(cli, small_machine, monkeypatch):
    """Call bench.py train on a tiny model: trained("--compare") -> {what: its figures}."""
    shape = GPTConfig(block_size=16, vocab_size=30, n_layer=1, n_head=2, n_embd=32, bias=False)
    monkeypatch.setitem(PRESETS, "tiny", Preset(shape, (2, 3)))

    def figures(*argv):
        options = ["--device=cpu", "--compile=False", "--rounds=1", "--steps=2", "--format=jsonl"]
        status, out, err = cli(bench.main, "train", *options, "--start_up=False", *argv)
        assert (status, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return {line.pop("what"): line for line in lines}

    return figures


def test_training_has_a_line_for_each_batch_size_and_its_figures_add_up(trained, monkeypatch):
    monkeypatch.setattr(machine.Machine, "matmul", lambda self: 1e9)
    found = trained("--compare")
    assert list(found) == ["machine", "tiny, batch 2", "tiny, batch 3"]
    for batch_size in (2, 3):
        figures = found[f"tiny, batch {batch_size}"]
        assert all(number > 0 for number in figures.values())
        assert figures["tokens/s"] * figures["ms a step"] == pytest.approx(1000 * batch_size * 16)
        # 6 operations for each of 30 ids' vectors, 12 C^2 in the block and three LayerNorms; and attention
        a_token = 6 * (30 * 32 + 12 * 32**2 + 3 * 32) + 12 * 32 * 16
        assert figures["of matmul ceiling"] == pytest.approx(figures["tokens/s"] * a_token / 1e9)
        assert figures["times faster"] == pytest.approx(figures["plain ms a step"] / figures["ms a step"])
        assert 0.01 < figures["peak memory GB"] < 10  # a Python process with torch


def test_batch_sizes_are_those_asked_for_and_the_comparison_is_too(trained):
    found = trained("--batch_sizes=1", "--presets=tiny", "--dtype=bfloat16")
    assert list(found) == ["machine", "tiny, batch 1"] and found["machine"]["dtype"] == "bfloat16"
    assert "plain ms a step" not in found["tiny, batch 1"]


def test_rounds_are_measured_in_turns_without_the_first_steps(trained, monkeypatch):
    """With a clock that ticks once whenever it is read, a measurement takes one tick."""
    ticks = iter(range(10**6))
    calls = []
    for name in ("own_step", "plain_step"):
        make = getattr(bench, name)

        def counted(*arguments, make=make, name=name):
            step = make(*arguments)
            return lambda: (calls.append(name), step())

        monkeypatch.setattr(bench, name, counted)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    figures = trained("--compare", "--rounds=2", "--batch_sizes=2")["tiny, batch 2"]
    assert figures["ms a step"] == figures["plain ms a step"] == 1000 / 2
    assert calls == ["own_step"] * 3 + ["plain_step"] + (["own_step"] * 2 + ["plain_step"] * 2) * 2


def step_of(make, folder, shape, settings):
    machine = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    options = SimpleNamespace(activation_checkpointing=False)
    config = training_settings(options, shape, 2, folder)
    return make(train.replace(config, **settings), shape, machine, False)


@pytest.mark.parametrize("make", [own_step, plain_step])
def test_both_steps_train(make, tmp_path, monkeypatch):
    """On tokens of which there are only a few, though the model knows more."""
    shape = GPTConfig(block_size=16, vocab_size=30, n_layer=1, n_head=2, n_embd=32, bias=False)
    write_random_set(tmp_path, shape)
    assert Dataset(tmp_path).splits["train"][:].max() == 29
    splits = {split: torch.arange(1000).numpy() % 3 for split in ("train", "val")}
    dataset_writer.write(tmp_path, splits, Dataset(tmp_path).tokenizer, {})
    step = step_of(make, tmp_path, shape, {})
    losses = [step().item() for _ in range(300)]
    assert losses[0] == pytest.approx(3.4, abs=0.1) and losses[-1] < 0.8 * losses[0]


def test_where_memory_is_short_the_other_batch_sizes_are_measured_all_the_same(trained, monkeypatch):
    make = own_step

    def greedy(settings, *arguments):
        if settings.batch_size == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(settings, *arguments)

    monkeypatch.setattr(bench, "own_step", greedy)
    found = trained()
    assert found["tiny, batch 2"] == {"failed": "out of memory"} and "tokens/s" in found["tiny, batch 3"]


def test_start_up_is_that_of_a_real_train_py(trained):
    found = trained("--start_up=True", "--batch_sizes=2", "--activation_checkpointing=True")
    assert list(found)[-1] == "tiny, start-up"
    figures = found["tiny, start-up"]
    assert 0.5 < figures["warm s"] < 100 and 0.5 < figures["cold s"] < 100


def test_a_train_py_that_fails_is_named_in_its_own_words(trained, monkeypatch):
    monkeypatch.setattr(bench, "write_random_set", lambda folder, shape: None)
    monkeypatch.setattr(bench, "measure_training", lambda *arguments: {})
    found = trained("--start_up=True")["tiny, start-up"]
    assert list(found) == ["failed"] and "has no train.bin" in found["failed"]


def test_a_training_profile_names_kernels_and_leaves_a_trace(cli, small_machine, tmp_path, trained):
    argv = ["--device=cpu", "--compile=False", "--rounds=1", "--steps=1", "--start_up=False"]
    status, out, _ = cli(bench.main, "train", *argv, "--batch_sizes=2", "--profile")
    assert status == 0 and "Self CPU" in out and "trace: trace_tiny_batch_2.json" in out
    trace = json.loads((tmp_path / "trace_tiny_batch_2.json").read_text())
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--presets=124m"], ["presets=124m", "'124m'", "124M", "1.5B"]),
        (["--presets="], ["presets=", "tiny"]),
        (["--batch_sizes=0"], ["batch_sizes=0", "at least 1"]),
        (["--batch_sizes=x"], ["batch_sizes=x"]),
        (["--steps=0"], ["steps is 0", "at least 1"]),
        (["--prompt_length=9"], ["prompt_length"]),
    ],
)
def test_training_that_can_not_be_measured_is_refused(refused, argv, says):
    line = refused("train", *argv)
    assert all(part in line for part in says), line
