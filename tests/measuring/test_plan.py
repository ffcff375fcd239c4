"""bench.py plan: the batch that it chooses fits, its figures add up, and what does not fit has a way out."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
from kqv.measuring.costs import (
    Cluster,
    Job,
    count,
    highest_peak,
    loss_memory,
    model_of,
    peak_bytes,
    step_seconds,
    traffic,
)
from kqv.measuring.plan import fit
from model import GPTConfig

LINKS = Cluster(1e12, 450e9, 50e9)


# What fits


shapes = st.builds(
    lambda layers, heads, size, T, V: GPTConfig(T, V, layers, heads, heads * size, bias=False),
    st.sampled_from([1, 5]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([64]),
    st.sampled_from([256, 2048]),
    st.sampled_from([65, 50304]),
)
jobs = st.builds(
    Job,
    shapes,
    gpus=st.sampled_from([1, 2, 8, 64, 512]),
    sharded=st.booleans(),
    batch_size=st.integers(1, 64),
    accumulation=st.integers(1, 4),
    checkpointing=st.booleans(),
    compiled=st.booleans(),
)


@settings(deadline=None)
@given(jobs)
def test_more_takes_more(job):
    def more(**values):
        return peak_bytes(dataclasses.replace(job, **values))

    total = peak_bytes(job)
    assert total >= 16 * count(model_of(job.shape)) / job.shards
    larger, parts = dataclasses.replace(job, batch_size=2 * job.batch_size), highest_peak(job)[1]
    # Twice as much is not more where nothing depends on it, or the loss comes in chunks then.
    assert total < peak_bytes(larger) or not parts.get("activations") or loss_memory(larger) < parts["loss"]
    assert total <= more(accumulation=job.accumulation + 1)
    assert total <= more(shape=dataclasses.replace(job.shape, n_layer=job.shape.n_layer + 1))
    step, computing = step_seconds(job, LINKS, 0.4)
    assert step >= computing * (1 - 1e-9) > 0
    assert step_seconds(job, dataclasses.replace(LINKS, network_bandwidth=1e9), 0.4)[0] >= step
    assert all(bytes >= 0 for pair in traffic(job).values() for bytes in pair)


@settings(deadline=None)
@given(jobs, st.integers(1, 2**22), st.floats(1e9, 1e12))
def test_the_largest_batch_that_fits(job, tokens_per_step, limit):
    found = fit(job, 0, tokens_per_step, limit)
    sequences = max(1, round(tokens_per_step / job.shape.block_size / job.gpus))
    sizes = [2**power for power in range(30) if 2**power <= sequences]
    fits = [size for size in sizes if fit(job, size, tokens_per_step, limit)]
    assert (found.batch_size if found else None) == (max(fits) if fits else None)
    if found:
        assert peak_bytes(found) <= limit
        asked = max(tokens_per_step, job.shape.block_size * job.gpus)
        assert 2 / 3 <= found.tokens * found.accumulation * found.gpus / asked <= 3 / 2


# bench.py plan


@pytest.fixture
def planned(cli):
    """planned("--gpus=8") -> {what: its figures}."""

    def figures(*argv):
        status, out, err = cli(bench.main, "plan", "--format=jsonl", *argv)
        assert (status, err) == (0, "")
        lines = map(json.loads, out.splitlines())
        return {line.pop("what"): line for line in lines}

    return figures


def test_text_and_jsonl_say_the_same(cli, planned):
    status, out, err = cli(bench.main, "plan", "--preset=7B", "--gpus=64")
    assert (status, err) == (0, "")
    for line, (what, numbers) in zip(
        out.splitlines(), planned("--preset=7B", "--gpus=64").items(), strict=True
    ):
        assert line.startswith(f"{what}: ") and all(name in line for name in numbers)


def test_a_plan_adds_up(planned):
    found = planned("--preset=1.5B", "--gpus=16", "--tokens=1e10", "--mfu=0.5")
    model, gpus, memory, step, sent, speed, run = found.values()
    assert gpus == {"number": 16, "parallel": "ddp", "to a copy": 1}
    assert memory.pop("in all") == pytest.approx(sum(memory[part] for part in list(memory)[:-1]))
    assert memory.pop("fullest at") == "the loss" and max(memory.values()) < 80
    assert memory["weights"] == pytest.approx(4 * model["parameters"] / 1e9)
    assert step["tokens"] == 1024 * step["batch_size"] * step["gradient_accumulation_steps"] == 2**19
    gradient = memory["weights"]
    assert sent == pytest.approx({"within its node": 7 / 4 * gradient, "to other nodes": gradient / 8})
    assert speed["limited by"] == "computing" and speed["ms a step"] == speed["of them computing"]
    flops = speed["tokens/s"] * model["GFLOP a token"] * 1e9
    assert flops == pytest.approx(0.5 * 989e12 * 16, rel=1e-3)
    assert run["tokens"] == 1e10
    assert run["days"] == pytest.approx(1e10 / speed["tokens/s"] / 86400, rel=1e-4)
    assert run["GPU hours"] == pytest.approx(24 * 16 * run["days"])


def test_settings_change_the_plan(planned):
    def tokens_per_second(*argv):
        (speed,) = [figures for figures in planned(*argv).values() if "tokens/s" in figures]
        return speed["tokens/s"], speed["limited by"]

    def memory(*argv):
        return planned(*argv)["memory of each, GB"]["in all"]

    large = planned("--preset=774M")
    assert large["a run at that speed"]["tokens"] == 20 * large["model"]["parameters"]
    assert planned("--preset=774M", "--n_layer=18")["model"]["parameters"] < large["model"]["parameters"]
    assert planned("--gpus=8")["GPUs"]["parallel"] == "ddp"
    assert planned("--gpus=16", "--parallel=fsdp")["GPUs"] == {
        "number": 16,
        "parallel": "fsdp",
        "to a copy": 8,
    }
    assert planned("--gpus=8", "--memory_gb=3.9", "--batch_size=1")["GPUs"]["parallel"] == "fsdp"  # 2.0 GB
    assert planned("--preset=7B", "--gpus=512")["GPUs"]["parallel"] == "fsdp"
    assert planned("--batch_size=4")["a step"]["batch_size"] == 4
    assert memory("--batch_size=4", "--activation_checkpointing") < memory("--batch_size=4")
    assert memory("--batch_size=4") < memory("--batch_size=4", "--compile=False")
    sharded = ("--batch_size=4", "--gpus=8", "--parallel=fsdp")
    assert memory(*sharded) < memory(*sharded, "--compile=False")
    enough, little = tokens_per_second("--gpus=64"), tokens_per_second("--gpus=64", "--network_gbs=0.1")
    assert enough[0] > little[0] and (enough[1], little[1]) == ("computing", "communication")
    assert tokens_per_second("--peak_tflops=98.9")[0] == pytest.approx(tokens_per_second()[0] / 10, rel=1e-3)


def test_an_adapter_takes_less(planned):
    whole, adapter, few = (
        planned("--preset=774M", "--batch_size=4", *argv)
        for argv in ([], ["--lora_rank=8"], ["--lora_rank=8", "--lora_targets=c_attn"])
    )
    parameters, C, layers = whole["model"]["parameters"], 1280, 36
    sides = {"c_attn": 4 * C, "c_proj": 2 * C + 5 * C, "c_fc": 5 * C}  # in and out together
    assert whole["model"]["trained"] == adapter["model"]["parameters"] == parameters
    assert adapter["model"]["trained"] == 8 * layers * sum(sides.values())
    assert few["model"]["trained"] == 8 * layers * sides["c_attn"]
    memory = adapter["memory of each, GB"]
    assert memory["weights"] == pytest.approx(4 * (parameters + adapter["model"]["trained"]) / 1e9)
    assert memory["optimizer"] == pytest.approx(8 * adapter["model"]["trained"] / 1e9)
    totals = [plan["memory of each, GB"]["in all"] for plan in (few, adapter, whole)]
    assert totals == sorted(totals) and totals[1] < 0.7 * totals[2]
    speeds = [plan["model"]["GFLOP a token"] for plan in (few, adapter, whole)]
    assert speeds == sorted(speeds) and speeds[1] < 0.72 * speeds[2]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--preset=8B"], ["preset=8B", "774M", "7B"]),
        (["--n_head=5"], ["n_embd=768", "n_head=5", "n_embd=765"]),
        (["--gpus=12"], ["gpus=12", "gpus_per_node=8", "--gpus=8 or --gpus=16"]),
        (["--gpu=Abacus"], ["gpu=Abacus", "--peak_tflops"]),
        (["--peak_tflops=1e308"], ["peak_tflops is 1e+308", "below"]),
        (["--mfu=1"], ["mfu is 1.0", "below"]),
        (["--preset=7B"], ["batch_size=1 ", "memory_gb=80", "try --gpus=8 --parallel=fsdp"]),
        (["--preset=7B", "--gpus=8", "--parallel=ddp"], ["GB on each GPU", "try --parallel=fsdp"]),
        (["--preset=2.7B", "--gpus=8", "--memory_gb=22"], ["=22", "try --activation_checkpointing=True"]),
        (["--n_embd=49152", "--gpus=512"], ["GB on each GPU", "try a smaller model"]),
        (["--lora_rank=769"], ["lora_rank=769 can't be", "attn.c_attn", "768"]),
        (["--lora_rank=8", "--lora_targets=q"], ["lora_targets=q", "c_attn,c_proj,c_fc,c_gate"]),
        (["--lora_rank=8", "--parallel=fsdp"], ["parallel=fsdp does not go with lora_rank=8", "ddp"]),
        (["--preset=7B", "--lora_rank=8", "--memory_gb=20"], ["GB on each GPU", "try a smaller model"]),
        (["--batch_size=512"], ["batch_size=512 takes", "try --batch_size=128"]),
    ],
)
def test_what_can_not_be_is_one_line(refusal, argv, parts):
    message = refusal(bench.main, "plan", *argv, status=2)
    assert all(part in message for part in parts), message
