"""plan.py: its bytes are those that real training steps hold and send, and its figures hang together."""

import dataclasses
import gc
import json
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import train
from kqv.measuring import plan
from kqv.measuring.training import PRESETS
from kqv.training import loss
from kqv.training.sharding import is_sharded
from kqv.training.start import checkpoint_activations
from kqv.training.state import start_state
from kqv.training.world import World
from model import GPT, Block, GPTConfig

SMALL = GPTConfig(block_size=256, vocab_size=512, n_layer=3, n_head=4, n_embd=64, bias=False)
HEAVY = GPTConfig(block_size=256, vocab_size=1024, n_layer=2, n_head=4, n_embd=512, bias=False)
WIDE = GPTConfig(block_size=256, vocab_size=2048, n_layer=2, n_head=2, n_embd=256, bias=False)
LINKS = plan.Cluster(1e12, 450e9, 50e9)


# Memory


@contextmanager
def processes(job):
    """The World of one process of many: what it sends goes nowhere, or where DDP is used, to itself."""
    if job.gpus > 1:
        fake = {"backend": "fake", "store": FakeStore(), "world_size": job.gpus}
        alone = {"backend": "gloo", "store": dist.HashStore(), "world_size": 1}
        dist.init_process_group(rank=0, **(fake if job.sharded else alone))
    try:
        yield World(torch.device("cpu"), 0, job.gpus, min(job.gpus, job.gpus_per_node))
    finally:
        if job.gpus > 1:
            dist.destroy_process_group()
        gc.collect()  # a sharded model refers to itself


def training(job, world):
    """train.py's step on random tokens, as a function, and its state."""
    config = train.TrainSettings(gradient_accumulation_steps=job.accumulation * job.gpus)
    dtype = {2: torch.bfloat16, 4: torch.float32}[job.itemsize]
    torch.manual_seed(0)
    gpt = GPT(job.shape)
    gpt = world.place(gpt, gpt.transformer.h, "fsdp" if job.sharded else "ddp", dtype)
    state = start_state(config, gpt, None, dtype)
    if job.checkpointing:
        checkpoint_activations(gpt)
    model = world.wrap(torch.compile(gpt) if job.compiled else gpt)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def step():
        idx = torch.randint(job.shape.vocab_size, (job.batch_size, job.shape.block_size))
        batches = [((idx, idx), 0)] * job.accumulation
        train.train_step(model, state, batches, 1e-4, config, world, autocast)

    return step, state


def held(state):
    """Bytes of the weights and moments that this process has."""
    tensors = [*state.model.parameters(), *(t for s in state.optimizer.state.values() for t in s.values())]
    return sum(
        (t.to_local() if is_sharded(state.model) and hasattr(t, "to_local") else t).nbytes for t in tensors
    )


def most_allocated(work):
    """The most bytes that `work()` holds at a time, of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measured(job):
    with processes(job) as world:
        step, state = training(job, world)
        step()  # makes the moments
        buckets = 0
        if job.gpus > 1 and not job.sharded:
            step()  # makes DDP's buckets anew, in the order that gradients come
            buckets = 4 * plan.num_parameters(job.shape)
        return held(state) + buckets + most_allocated(step)


JOBS = {
    "float32": plan.Job(SMALL, batch_size=4, itemsize=4),
    "bfloat16": plan.Job(SMALL, batch_size=4),
    "biases": plan.Job(dataclasses.replace(SMALL, bias=True), batch_size=4),
    "accumulation": plan.Job(WIDE, batch_size=2, accumulation=2),
    "checkpointing": plan.Job(SMALL, batch_size=4, checkpointing=True),
    "checkpointing, little vocabulary": plan.Job(
        dataclasses.replace(SMALL, vocab_size=64), batch_size=4, checkpointing=True
    ),
    "one block": plan.Job(GPTConfig(256, 64, 1, 4, 64, bias=False), batch_size=8),
    "large vocabulary": plan.Job(GPTConfig(256, 4096, 1, 4, 64, bias=False), batch_size=4),
    "large tied matrix": plan.Job(GPTConfig(256, 2048, 1, 4, 512, bias=False)),
    "heavy weights": plan.Job(HEAVY),
    "heavy weights, accumulation": plan.Job(HEAVY, accumulation=2),
    "heavy weights, fsdp": plan.Job(HEAVY, gpus=8, sharded=True, norm_itemsize=2),
    "heavy weights, fsdp, accumulation": plan.Job(
        HEAVY, gpus=8, sharded=True, accumulation=3, norm_itemsize=2
    ),
    "ddp": plan.Job(WIDE, gpus=2, batch_size=2),
    "ddp, accumulation": plan.Job(WIDE, gpus=2, batch_size=2, accumulation=2),
    "ddp, heavy weights": plan.Job(HEAVY, gpus=2),
    "fsdp": plan.Job(WIDE, gpus=4, sharded=True, batch_size=4, norm_itemsize=2),
    "fsdp, float32": plan.Job(WIDE, gpus=2, sharded=True, batch_size=4, itemsize=4),
    "fsdp, accumulation": plan.Job(WIDE, gpus=4, sharded=True, batch_size=4, accumulation=2, norm_itemsize=2),
    "fsdp, checkpointing": plan.Job(
        WIDE, gpus=8, sharded=True, batch_size=4, checkpointing=True, norm_itemsize=2
    ),
    "hsdp": plan.Job(WIDE, gpus=8, gpus_per_node=2, sharded=True, batch_size=4, norm_itemsize=2),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_memory_is_what_a_step_of_train_py_holds(job):
    rough = job.sharded or job.checkpointing  # where several gradients and copies are on their way
    assert plan.total(job) == pytest.approx(measured(job), rel=0.07 if rough else 0.015)


GPT2 = {name: PRESETS[name].shape for name in ("124M", "350M", "774M")}
LARGE_VOCABULARY = GPTConfig(1024, 50304, 2, 4, 256, bias=False)
LARGE_JOBS = {
    "124M, float32, batch 1": plan.Job(GPT2["124M"], itemsize=4),
    "124M, batch 1": plan.Job(GPT2["124M"]),
    "124M, batch 2 x 2": plan.Job(GPT2["124M"], batch_size=2, accumulation=2),
    "124M, batch 8": plan.Job(GPT2["124M"], batch_size=8),
    "124M, batch 8, checkpointing": plan.Job(GPT2["124M"], batch_size=8, checkpointing=True),
    "124M, batch 4, compiled": plan.Job(GPT2["124M"], batch_size=4, compiled=True),
    "15M of a large vocabulary, batch 4, compiled": plan.Job(LARGE_VOCABULARY, batch_size=4, compiled=True),
    "15M of a large vocabulary, batch 8, compiled": plan.Job(LARGE_VOCABULARY, batch_size=8, compiled=True),
    "15M of a large vocabulary, batch 4, compiled, fsdp 8": plan.Job(
        LARGE_VOCABULARY, gpus=8, sharded=True, batch_size=4, compiled=True, norm_itemsize=2
    ),
    "15M of a large vocabulary, batch 8, compiled, fsdp 8": plan.Job(
        LARGE_VOCABULARY, gpus=8, sharded=True, batch_size=8, compiled=True, norm_itemsize=2
    ),
    "124M, batch 1, ddp": plan.Job(GPT2["124M"], gpus=8),
    "124M, batch 1 x 2, ddp": plan.Job(GPT2["124M"], gpus=8, accumulation=2),
    "124M, batch 2, fsdp 8": plan.Job(GPT2["124M"], gpus=8, sharded=True, batch_size=2, norm_itemsize=2),
    "124M, float32, batch 1, fsdp 8": plan.Job(GPT2["124M"], gpus=8, sharded=True, itemsize=4),
    "350M, batch 1": plan.Job(GPT2["350M"]),
    "350M, batch 1, hsdp 512": plan.Job(GPT2["350M"], gpus=512, sharded=True, norm_itemsize=2),
    "774M, batch 1, fsdp 8": plan.Job(GPT2["774M"], gpus=8, sharded=True, norm_itemsize=2),
    "774M, batch 1 x 2, hsdp 64, checkpointing": plan.Job(
        GPT2["774M"], gpus=64, sharded=True, accumulation=2, checkpointing=True, norm_itemsize=2
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", LARGE_JOBS.values(), ids=LARGE_JOBS)
def test_memory_of_models_that_people_train(job):
    """The table of docs/scaling.md: pytest -s -m slow tests/test_plan.py"""
    calculated, found = plan.total(job), measured(job)
    print(f" | {calculated / 1e9:.2f} | {found / 1e9:.2f} | {calculated / found - 1:+.1%} |", end="")
    assert calculated == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("chunk", [256, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_memory_of_a_loss_in_chunks(monkeypatch, chunk, itemsize):
    """Besides a byte for each logit of a chunk, which a CPU alone takes."""
    shape = GPTConfig(block_size=256, vocab_size=8192, n_layer=1, n_head=2, n_embd=128, bias=False)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", chunk * shape.vocab_size)
    job = plan.Job(shape, batch_size=2, itemsize=itemsize)
    found = measured(job) - chunk * shape.vocab_size
    assert plan.total(job) == pytest.approx(found, rel=0.025)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 2]), st.booleans())
def test_activations_of_a_block_are_those_that_autograd_saves(B, nh, hs, itemsize, bias):
    """To the byte, besides the weights themselves and autocast's copies of them."""
    shape = GPTConfig(block_size=160, n_layer=1, n_head=nh, n_embd=16 * hs * nh, bias=bias)
    block, x = Block(shape), torch.randn(B, 160, shape.n_embd)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2):
            block(x.requires_grad_())
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    matrices = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 2)
    found = sum(storage.nbytes() for at, storage in saved.items() if at not in weights)
    copies = 2 * matrices if itemsize == 2 else 0
    assert found - copies == plan.block_activations(plan.Job(shape, batch_size=B, itemsize=itemsize))


# Communication


class Sent(TorchDispatchMode):
    """Counts the bytes that a process sends in rings of collectives; of all-reduces, what goes into them."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = self.reduced = 0

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        name = function.name() if function.namespace == "c10d" else ""
        if "allgather" in name:
            self.gathered += arguments[0].nbytes - arguments[1].nbytes
        elif "reduce_scatter" in name:
            self.scattered += arguments[1].nbytes - arguments[0].nbytes
        elif "allreduce" in name:
            self.reduced += sum(tensor.nbytes for tensor in arguments[0])
        return function(*arguments, **(more or {}))


def sent_in_a_step(job):
    with processes(job) as world:
        step, _ = training(job, world)
        with Sent() as sent:
            step()
    return sent


@pytest.mark.parametrize(
    "job",
    [
        plan.Job(WIDE, gpus=2),
        plan.Job(WIDE, gpus=8, itemsize=4),
        plan.Job(WIDE, gpus=8, gpus_per_node=2, accumulation=3),
        plan.Job(WIDE, gpus=16, gpus_per_node=4, checkpointing=True),
        plan.Job(WIDE, gpus=4, gpus_per_node=1, accumulation=2),
    ],
    ids=["a node", "float32", "two to a node", "checkpointing", "one to a node"],
)
def test_bytes_sent_are_those_of_a_sharded_step(job):
    job = dataclasses.replace(job, sharded=True)
    sent, calculated = sent_in_a_step(job), plan.traffic(job)
    place = 1 if job.gpus_per_node == 1 else 0
    assert job.accumulation * (calculated["forward"][place] + calculated["backward"][place]) == sent.gathered
    assert calculated["reduce"][place] == sent.scattered
    if not place:
        assert calculated["reduce"][1] == 2 * (job.nodes - 1) / job.nodes * sent.reduced
    assert sum(calculated[phase][1 - place] for phase in ("forward", "backward")) == 0


def test_bytes_sent_to_average_gradients():
    """As in a ring of rings: nodes first gather and then scatter within, and share the way between them."""
    gradient = 4 * plan.num_parameters(SMALL)
    for gpus, node, within, between in [
        (1, 8, 0, 0),
        (2, 8, 1, 0),
        (8, 8, 2 * 7 / 8, 0),
        (64, 8, 2 * 7 / 8, 2 * 7 / 8 / 8),
        (4, 1, 0, 2 * 3 / 4),
    ]:
        sent = plan.traffic(plan.Job(SMALL, gpus, node))
        assert sent["reduce"] == pytest.approx((within * gradient, between * gradient)), (gpus, node)
        assert sent["forward"] == sent["backward"] == (0, 0)


# Time


def test_parameters_and_operations_are_the_models():
    for bias in (False, True):
        for shape in (SMALL, WIDE, GPTConfig(128, 33, 5, 2, 48)):
            shape = dataclasses.replace(shape, bias=bias)
            gpt = GPT(shape)
            assert plan.num_parameters(shape) == gpt.num_parameters(without_positions=False)
            assert plan.flops_per_token(shape) == gpt.flops_per_token()


def test_time_of_a_step_by_hand():
    """1 s forward, 2 s backward of each of two micro-batches, and what its links add to that."""
    job = plan.Job(WIDE, gpus=4, gpus_per_node=4, sharded=True, batch_size=2, accumulation=2)
    flops = plan.flops_per_token(WIDE) * 2 * 256 / 3
    sent = plan.traffic(job)
    forward, backward, reduce = (sent[phase][0] for phase in ("forward", "backward", "reduce"))

    def seconds(bandwidth, mfu=0.5, job=job):
        return plan.step_seconds(job, plan.Cluster(2 * flops, bandwidth, 1.0), mfu)

    assert seconds(1e18) == pytest.approx((6, 6))
    assert seconds(1e18, mfu=0.25) == pytest.approx((12, 12))
    assert seconds(1e18, job=dataclasses.replace(job, checkpointing=True)) == pytest.approx((8, 8))
    assert seconds(forward / 5) == pytest.approx((5 + 5 + 5 * (2 * backward + reduce) / forward, 6))
    assert seconds((backward + reduce) / 2.5) == pytest.approx(
        (1 + 2 + 1 + 2.5, 6)
    )  # the last backward waits
    across = dataclasses.replace(job, gpus_per_node=2)
    slow = plan.Cluster(2 * flops, 1e18, plan.traffic(across)["reduce"][1] / 7)
    assert plan.step_seconds(across, slow, 0.5) == pytest.approx((1 + 2 + 1 + 7, 6))


# What fits


shapes = st.builds(
    lambda layers, heads, size, T, V: GPTConfig(T, V, layers, heads, heads * size, bias=False),
    st.integers(1, 60),
    st.integers(1, 40),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([256, 1024, 4096]),
    st.sampled_from([65, 50304]),
)
jobs = st.builds(
    plan.Job,
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
        return plan.total(dataclasses.replace(job, **values))

    total = plan.total(job)
    assert total >= 16 * plan.num_parameters(job.shape) / job.shards
    assert total < more(batch_size=2 * job.batch_size) or not plan.memory(job)[1].get("activations")
    assert total <= more(accumulation=job.accumulation + 1)
    assert total <= more(shape=dataclasses.replace(job.shape, n_layer=job.shape.n_layer + 1))
    step, computing = plan.step_seconds(job, LINKS, 0.4)
    assert step >= computing * (1 - 1e-9) > 0
    assert plan.step_seconds(job, dataclasses.replace(LINKS, network_bandwidth=1e9), 0.4)[0] >= step
    assert all(bytes >= 0 for pair in plan.traffic(job).values() for bytes in pair)


@settings(deadline=None)
@given(jobs, st.integers(1, 2**22), st.floats(1e9, 1e12))
def test_the_largest_batch_that_fits(job, tokens_per_step, limit):
    found = plan.fit(job, 0, tokens_per_step, limit)
    sequences = max(1, round(tokens_per_step / job.shape.block_size / job.gpus))
    sizes = [2**power for power in range(30) if 2**power <= sequences]
    fits = [size for size in sizes if plan.fit(job, size, tokens_per_step, limit)]
    assert (found.batch_size if found else None) == (max(fits) if fits else None)
    if found:
        assert plan.total(found) <= limit
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
        (["--preset=2.7B", "--gpus=8", "--memory_gb=24"], ["=24", "try --activation_checkpointing=True"]),
        (["--n_embd=49152", "--gpus=512"], ["GB on each GPU", "try a smaller model"]),
        (["--batch_size=512"], ["batch_size=512 takes", "try --batch_size=128"]),
    ],
)
def test_what_can_not_be_is_one_line(refusal, argv, parts):
    message = refusal(bench.main, "plan", *argv, status=2)
    assert all(part in message for part in parts), message
