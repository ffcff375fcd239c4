"""bench.py on models so small that the figures mean nothing: what is printed, and whether it adds up."""

import json

import pytest
from exports import save_run

import bench
from kqv.measuring import machine
from kqv.text.tokenizers import ByteTokenizer

TINY = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=64", "--vocab_size=100", "--rounds=1"]
TINY += ["--prompt_length=8", "--max_new_tokens=8", "--prefill_length=16", "--batch_sizes=1,3"]
TINY += ["--device=cpu", "--engine=plain", "--dtype=float32"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The machine's ceilings are measured on little, which takes no time."""
    monkeypatch.setitem(machine.NUMBERS_READ, "cpu", 2**16)
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 64)


@pytest.fixture
def measure(cli):
    """Call bench.py sample on a tiny model: measure("--uncached=False") -> what it prints."""

    def succeed(*argv):
        status, out, err = cli(bench.main, "sample", *TINY, *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


def parsed(out):
    """{what: its figures} of lines of JSON."""
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {line.pop("what"): line for line in lines}


@pytest.fixture
def figures(measure):
    """The same as {what: its figures}."""
    return lambda *argv: parsed(measure("--format=jsonl", *argv))


@pytest.fixture
def refused(refusal):
    return lambda *argv: refusal(bench.main, *argv, status=2)


def fraction(read, decoding):
    """Of the memory's speed, what reading so many bytes in a step takes."""
    return read / (decoding["memory GB/s"] * 1e9) / (decoding["ms a step"] / 1e3)


def test_each_thing_measured_has_a_line(measure):
    lines = measure().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["machine", "prefill", "batch 1", "batch 3", "cache"]
    assert "device cpu (1 threads), torch " in lines[0] and "dtype float32, engine plain" in lines[0]
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


def test_the_cache_is_measured_on_request(figures):
    assert "cache" not in figures("--uncached=False")


def test_a_profile_names_what_takes_the_time(measure):
    out = measure("--profile", "--uncached=False", "--batch_sizes=2")
    assert "Self CPU" in out and "aten::" in out


def test_precision_and_sizes_are_those_asked_for(figures):
    found = figures("--dtype=bfloat16", "--batch_sizes=2", "--n_layer=2")
    assert found["machine"]["dtype"] == "bfloat16" and "batch 2" in found and "batch 1" not in found
    assert found["machine"]["parameters"] == 100 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    read = 2 * found["machine"]["parameters"] + 2 * 2 * 2 * 11.5 * 32 * 2
    assert found["batch 2"]["of ceiling"] == pytest.approx(fraction(read, found["batch 2"]))


def test_weights_are_measured_by_name(cli, tmp_path):
    gpt = save_run(tmp_path / "run", ByteTokenizer())
    sizes = [argument for argument in TINY if not argument.startswith(("--n_", "--block", "--vocab"))]
    status, out, err = cli(bench.main, "sample", *sizes, "--init_from=run", "--format=jsonl")
    assert (status, err) == (0, "")
    assert parsed(out)["machine"]["parameters"] == gpt.num_parameters()
    status, out, err = cli(bench.main, "sample", *sizes, "--init_from=run", "--prefill_length=129")
    assert status == 2 and "prefill_length=129 must be within block_size=128" in err
    status, out, err = cli(bench.main, "sample", *sizes, "--init_from=nothing")
    assert (status, out) == (1, "") and "init_from=nothing is no file or folder, nor one of scratch" in err


def test_llama_cpp_is_measured_on_request(figures):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    found = figures("--llama_cpp=f32,q8_0")
    assert list(found)[-3:] == ["in turns, kqv", "in turns, llama.cpp f32", "in turns, llama.cpp q8_0"]


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], ["name what to measure", "bench.py train, sample, plan or gpu"]),
        (["smaple"], ["smaple", "sample"]),
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
        (["sample", "--llama_cpp=f32,"], ["llama_cpp=f32,", "''", "q8_0"]),
        (["sample", "--init_from=smollm2", "--n_layer=3"], ["--n_layer=3", "--init_from"]),
        (["sample", "--n_layers=3"], ["did you mean n_layer?"]),
        (["train", "--presets=124m"], ["presets=124m", "'124m'", "124M", "1.5B"]),
        (["train", "--presets="], ["presets=", "tiny"]),
        (["train", "--batch_sizes=0"], ["batch_sizes=0", "at least 1"]),
        (["train", "--batch_sizes=x"], ["batch_sizes=x"]),
        (["train", "--steps=0"], ["steps is 0", "at least 1"]),
        (["train", "--prompt_length=9"], ["prompt_length"]),
    ],
)
def test_what_can_not_be_measured_is_refused(refused, argv, says):
    line = refused(*argv)
    assert all(part in line for part in says), line


@pytest.mark.parametrize("what", ["train", "sample", "plan", "gpu"])
def test_help_lists_settings(cli, what):
    status, out, err = cli(bench.main, what, "--help")
    assert (status, err) == (0, "") and f"usage: python bench.py {what}" in out
    if what == "gpu":
        assert "versions, ceilings, kernels" in out and "--quick=True|False" in out
    else:
        assert out.count("--format=text|jsonl") == 1 and out.count("\nReport:\n") == 1


def test_help_names_what_can_be_measured(cli):
    status, out, err = cli(bench.main, "--help")
    assert (status, err) == (0, "") and "train|sample|plan|gpu" in out


def test_lengths_may_fill_the_context(measure):
    assert "batch 1" in measure("--prompt_length=8", "--max_new_tokens=56", "--prefill_length=64")


def test_too_little_memory_is_said_in_a_line(cli):
    """Keys alone would take 17 GB, where tests may have 10."""
    long = ["--block_size=32768", "--max_new_tokens=32760", "--batch_sizes=4000"]
    status, out, err = cli(bench.main, "sample", *TINY, *long)
    assert status == 1 and out.splitlines()[-1].startswith("prefill: ")
    assert err == "error: out of memory: try smaller --batch_sizes than 4000\n"


# Training


@pytest.fixture
def train_output(cli):
    """Call bench.py train with little work: train_output("--compare") -> what it prints."""

    def succeed(*argv):
        options = ["--device=cpu", "--compile=False", "--dtype=float32", "--rounds=1", "--steps=1"]
        status, out, err = cli(bench.main, "train", *options, "--start_up=False", "--format=jsonl", *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


@pytest.fixture
def trained(train_output):
    """The same as {what: its figures}."""
    return lambda *argv: parsed(train_output(*argv))


def test_training_has_a_line_for_each_batch_size_and_its_figures_add_up(trained):
    found = trained("--compare", "--batch_sizes=1,2")
    assert list(found) == ["machine", "tiny, batch 1", "tiny, batch 2"]
    for batch_size in (1, 2):
        figures = found[f"tiny, batch {batch_size}"]
        assert all(number > 0 for number in figures.values())
        assert figures["tokens/s"] * figures["ms a step"] == pytest.approx(1000 * batch_size * 64)
        assert figures["times faster"] == pytest.approx(figures["plain ms a step"] / figures["ms a step"])
        assert 0.01 < figures["peak memory GB"] < 10  # a Python process with torch


def test_batch_sizes_are_those_asked_for_and_the_comparison_is_too(trained):
    found = trained("--batch_sizes=1", "--presets=tiny", "--dtype=bfloat16")
    assert list(found) == ["machine", "tiny, batch 1"] and found["machine"]["dtype"] == "bfloat16"
    assert "plain ms a step" not in found["tiny, batch 1"]


def test_a_preset_has_batch_sizes_of_its_own(trained):
    assert list(trained("--presets=tiny")) == ["machine", "tiny, batch 12"]


def test_where_memory_is_short_the_other_batch_sizes_are_measured_all_the_same(trained):
    found = trained("--batch_sizes=1000000000000,1")
    assert found["tiny, batch 1000000000000"] == {"failed": "out of memory"}
    assert "tokens/s" in found["tiny, batch 1"]


def test_start_up_is_that_of_a_real_train_py(trained):
    found = trained("--start_up=True", "--batch_sizes=2", "--activation_checkpointing=True")
    assert list(found)[-1] == "tiny, start-up"
    figures = found["tiny, start-up"]
    assert 0.5 < figures["warm s"] < 100 and 0.5 < figures["cold s"] < 100


def test_a_train_py_that_fails_is_named_in_its_own_words(trained):
    found = trained("--start_up=True", "--batch_sizes=1000000000000")["tiny, start-up"]
    assert list(found) == ["failed"] and "error: out of memory on cpu: try" in found["failed"]


def test_a_training_profile_names_kernels_and_leaves_a_trace(train_output, tmp_path):
    out = train_output("--batch_sizes=2", "--profile")
    assert "Self CPU" in out and "trace: trace_tiny_batch_2.json" in out
    trace = json.loads((tmp_path / "trace_tiny_batch_2.json").read_text())
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])
