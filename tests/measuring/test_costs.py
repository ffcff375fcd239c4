"""Calculated bytes are those that real training steps hold and send; times are checked by hand."""

import dataclasses
import gc
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import train
from kqv.formats import lora
from kqv.measuring import costs
from kqv.measuring.costs import Cluster, Job
from kqv.measuring.presets import PRESETS
from kqv.training import loss
from kqv.training.objective import checkpoint_activations, narrow_stream
from kqv.training.sharding import is_sharded
from kqv.training.state import start_state
from kqv.training.world import World
from model import GPT, Block, GPTConfig, NextToken

SMALL = GPTConfig(block_size=256, vocab_size=512, n_layer=3, n_head=4, n_embd=64, bias=False)
HEAVY = GPTConfig(block_size=256, vocab_size=1024, n_layer=2, n_head=4, n_embd=512, bias=False)
WIDE = GPTConfig(block_size=256, vocab_size=2048, n_layer=2, n_head=2, n_embd=256, bias=False)
LINKS = Cluster(1e12, 450e9, 50e9)


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
    config = train.TrainSettings(
        gradient_accumulation_steps=job.accumulation * job.gpus, optimizer="muon" if job.muon else "adamw"
    )
    dtype = {2: torch.bfloat16, 4: torch.float32}[job.itemsize]
    torch.manual_seed(0)
    gpt = GPT(job.shape)
    if job.lora_rank:
        lora.adapt(gpt, job.lora_rank, 16.0, job.lora_targets)
    objective = NextToken(gpt, loss.next_token_loss)
    objective = world.place(objective, gpt.transformer.h, "fsdp" if job.sharded else "ddp", dtype)
    state = start_state(config, gpt, None, dtype, world)
    narrow_stream(gpt)
    if job.checkpointing:
        checkpoint_activations(gpt)
    model = world.wrap(torch.compile(objective) if job.compiled else objective)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def step():
        idx = torch.randint(job.shape.vocab_size, (job.batch_size, job.shape.block_size))
        batches = [((idx, idx), 1.0, 0)] * job.accumulation
        train.train_step(model, state, batches, config, world, autocast)

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
        trained = costs.learnt(job.model)
        if job.gpus > 1 and not job.sharded:
            step()  # makes DDP's buckets anew, in the order that gradients come
            buckets = 4 * trained
        return held(state) + buckets + most_allocated(step)


JOBS = {
    "float32": Job(SMALL, batch_size=4, itemsize=4),
    "bfloat16": Job(SMALL, batch_size=4),
    "Muon": Job(SMALL, batch_size=4, muon=True),
    "Muon, sharded": Job(HEAVY, gpus=4, sharded=True, batch_size=4, muon=True),
    "biases": Job(dataclasses.replace(SMALL, bias=True), batch_size=4),
    "accumulation": Job(WIDE, batch_size=2, accumulation=2),
    "checkpointing": Job(SMALL, batch_size=4, checkpointing=True),
    "checkpointing, little vocabulary": Job(
        dataclasses.replace(SMALL, vocab_size=64), batch_size=4, checkpointing=True
    ),
    "one block": Job(GPTConfig(256, 64, 1, 4, 64, bias=False), batch_size=8),
    "large vocabulary": Job(GPTConfig(256, 4096, 1, 4, 64, bias=False), batch_size=4),
    "large tied matrix": Job(GPTConfig(256, 2048, 1, 4, 512, bias=False)),
    "heavy weights": Job(HEAVY),
    "heavy weights, accumulation": Job(HEAVY, accumulation=2),
    "heavy weights, fsdp": Job(HEAVY, gpus=8, sharded=True),
    "heavy weights, fsdp, accumulation": Job(HEAVY, gpus=8, sharded=True, accumulation=3),
    "ddp": Job(WIDE, gpus=2, batch_size=2),
    "ddp, accumulation": Job(WIDE, gpus=2, batch_size=2, accumulation=2),
    "ddp, heavy weights": Job(HEAVY, gpus=2),
    "LoRA": Job(HEAVY, batch_size=2, lora_rank=4),
    "LoRA, float32, some targets": Job(HEAVY, itemsize=4, lora_rank=4, lora_targets=("c_attn",)),
    "LoRA, accumulation": Job(WIDE, batch_size=2, accumulation=2, lora_rank=8),
    "LoRA, checkpointing": Job(HEAVY, batch_size=4, checkpointing=True, lora_rank=4),
    "LoRA, Muon": Job(HEAVY, batch_size=4, muon=True, lora_rank=16),
    "LoRA, ddp": Job(HEAVY, gpus=2, lora_rank=16),
    "fsdp": Job(WIDE, gpus=4, sharded=True, batch_size=4),
    "fsdp, float32": Job(WIDE, gpus=2, sharded=True, batch_size=4, itemsize=4),
    "fsdp, accumulation": Job(WIDE, gpus=4, sharded=True, batch_size=4, accumulation=2),
    "fsdp, checkpointing": Job(WIDE, gpus=8, sharded=True, batch_size=4, checkpointing=True),
    "hsdp": Job(WIDE, gpus=8, gpus_per_node=2, sharded=True, batch_size=4),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_memory_is_what_a_step_of_train_py_holds(job):
    # Several gradients and copies are on their way, or layers without an adapter keep less.
    rough = job.sharded or job.checkpointing or job.lora_targets != lora.LAYERS
    assert costs.peak_bytes(job) == pytest.approx(measured(job), rel=0.1 if rough else 0.015)


GPT2 = {name: PRESETS[name].shape for name in ("124M", "350M", "774M")}
LARGE_VOCABULARY = GPTConfig(1024, 50304, 2, 4, 256, bias=False)
LARGE_JOBS = {
    "124M, float32, batch 1": Job(GPT2["124M"], itemsize=4),
    "124M, batch 1": Job(GPT2["124M"]),
    "124M, batch 2 x 2": Job(GPT2["124M"], batch_size=2, accumulation=2),
    "124M, batch 4, LoRA": Job(GPT2["124M"], batch_size=4, lora_rank=8),
    "124M, batch 8": Job(GPT2["124M"], batch_size=8),
    "124M, batch 8, checkpointing": Job(GPT2["124M"], batch_size=8, checkpointing=True),
    "124M, batch 4, compiled": Job(GPT2["124M"], batch_size=4, compiled=True),
    "15M of a large vocabulary, batch 4, compiled": Job(LARGE_VOCABULARY, batch_size=4, compiled=True),
    "15M of a large vocabulary, batch 8, compiled": Job(LARGE_VOCABULARY, batch_size=8, compiled=True),
    "15M of a large vocabulary, batch 4, compiled, fsdp 8": Job(
        LARGE_VOCABULARY, gpus=8, sharded=True, batch_size=4, compiled=True
    ),
    "15M of a large vocabulary, batch 8, compiled, fsdp 8": Job(
        LARGE_VOCABULARY, gpus=8, sharded=True, batch_size=8, compiled=True
    ),
    "124M, batch 1, ddp": Job(GPT2["124M"], gpus=8),
    "124M, batch 1 x 2, ddp": Job(GPT2["124M"], gpus=8, accumulation=2),
    "124M, batch 2, fsdp 8": Job(GPT2["124M"], gpus=8, sharded=True, batch_size=2),
    "124M, float32, batch 1, fsdp 8": Job(GPT2["124M"], gpus=8, sharded=True, itemsize=4),
    "350M, batch 1": Job(GPT2["350M"]),
    "350M, batch 1, hsdp 512": Job(GPT2["350M"], gpus=512, sharded=True),
    "774M, batch 1, fsdp 8": Job(GPT2["774M"], gpus=8, sharded=True),
    "774M, batch 1 x 2, hsdp 64, checkpointing": Job(
        GPT2["774M"], gpus=64, sharded=True, accumulation=2, checkpointing=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", LARGE_JOBS.values(), ids=LARGE_JOBS)
def test_memory_of_models_that_people_train(job):
    """The table of docs/lab/plan.md: pytest -s -m slow tests/measuring/test_costs.py"""
    calculated, found = costs.peak_bytes(job), measured(job)
    print(f" | {calculated / 1e9:.2f} | {found / 1e9:.2f} | {calculated / found - 1:+.1%} |", end="")
    assert calculated == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("chunk", [256, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_memory_of_a_loss_in_chunks(monkeypatch, chunk, itemsize):
    """Besides a byte for each logit of a chunk, which a CPU alone takes."""
    shape = GPTConfig(block_size=256, vocab_size=8192, n_layer=1, n_head=2, n_embd=128, bias=False)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", chunk * shape.vocab_size)
    monkeypatch.setattr(loss, "ROWS", chunk)
    job = Job(shape, batch_size=2, itemsize=itemsize)
    found = measured(job) - chunk * shape.vocab_size
    assert costs.peak_bytes(job) == pytest.approx(found, rel=0.025)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 2]), st.booleans())
def test_activations_of_a_block_are_those_that_autograd_saves(B, nh, hs, itemsize, bias):
    """
    To the byte, besides the weights themselves, autocast's copies of them, and that LayerNorm on a CPU has
    its means and deviations in float32.
    """
    shape = GPTConfig(block_size=32, n_layer=1, n_head=nh, n_embd=16 * hs * nh, bias=bias)
    block, x = Block(shape), torch.randn(B, 32, shape.n_embd)
    x = x.bfloat16() if itemsize == 2 else x
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
    copies = 2 * matrices + 8 * 32 * B if itemsize == 2 else 0
    assert found - copies == costs.block_activations(Job(shape, batch_size=B, itemsize=itemsize))


@pytest.mark.parametrize("itemsize, numbers", [(2, 32), (4, 64)])
@pytest.mark.parametrize("shape", [GPTConfig(), GPTConfig(2048, 50304, 32, 32, 4096, bias=False)])
def test_activations_of_a_block_by_hand(shape, itemsize, numbers):
    """The formula of docs/lab/plan.md: 32 C bytes for a token, or in float32 64 C, and a few besides."""
    a_token = (
        numbers * shape.n_embd + 4 * shape.n_head + 4 * itemsize
    )  # logsumexps, and two norms' statistics
    for batch_size in (1, 3):
        job = Job(shape, batch_size=batch_size, itemsize=itemsize)
        assert costs.block_activations(job) == batch_size * shape.block_size * a_token


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
        Job(WIDE, gpus=2),
        Job(WIDE, gpus=8, itemsize=4),
        Job(WIDE, gpus=8, gpus_per_node=2, accumulation=3),
        Job(WIDE, gpus=16, gpus_per_node=4, checkpointing=True),
        Job(WIDE, gpus=4, gpus_per_node=1, accumulation=2),
    ],
    ids=["a node", "float32", "two to a node", "checkpointing", "one to a node"],
)
def test_bytes_sent_are_those_of_a_sharded_step(job):
    job = dataclasses.replace(job, sharded=True)
    sent, calculated = sent_in_a_step(job), costs.traffic(job)
    place = 1 if job.gpus_per_node == 1 else 0
    assert job.accumulation * (calculated["forward"][place] + calculated["backward"][place]) == sent.gathered
    assert calculated["reduce"][place] == sent.scattered
    if not place:
        assert calculated["reduce"][1] == 2 * (job.nodes - 1) / job.nodes * sent.reduced
    assert sum(calculated[phase][1 - place] for phase in ("forward", "backward")) == 0


def test_bytes_sent_to_average_gradients():
    """As in a ring of rings: nodes first gather and then scatter within, and share the way between them."""
    gradient = 4 * costs.count(GPT(SMALL))
    for gpus, node, within, between in [
        (1, 8, 0, 0),
        (2, 8, 1, 0),
        (8, 8, 2 * 7 / 8, 0),
        (64, 8, 2 * 7 / 8, 2 * 7 / 8 / 8),
        (4, 1, 0, 2 * 3 / 4),
    ]:
        sent = costs.traffic(Job(SMALL, gpus, node))
        assert sent["reduce"] == pytest.approx((within * gradient, between * gradient)), (gpus, node)
        assert sent["forward"] == sent["backward"] == (0, 0)


# Time


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_counted_in_the_model(bias):
    gpt = costs.model_of(GPTConfig(128, 33, 5, 2, 48, bias=bias))
    block = 12 * 48**2 + (13 if bias else 2) * 48
    assert costs.count(gpt.transformer.h) == 5 * block
    assert costs.count(gpt) == 5 * block + (33 + 128 + 1 + bias) * 48
    assert all(parameter.is_meta for parameter in gpt.parameters())


def test_time_of_a_step_by_hand():
    """1 s forward, 2 s backward of each of two micro-batches, and what its links add to that."""
    job = Job(WIDE, gpus=4, gpus_per_node=4, sharded=True, batch_size=2, accumulation=2)
    flops = costs.model_of(WIDE).flops_per_token() * 2 * 256 / 3
    sent = costs.traffic(job)
    forward, backward, reduce = (sent[phase][0] for phase in ("forward", "backward", "reduce"))

    def seconds(bandwidth, mfu=0.5, job=job):
        return costs.step_seconds(job, Cluster(2 * flops, bandwidth, 1.0), mfu)

    assert seconds(1e18) == pytest.approx((6, 6))
    assert seconds(1e18, mfu=0.25) == pytest.approx((12, 12))
    assert seconds(1e18, job=dataclasses.replace(job, checkpointing=True)) == pytest.approx((8, 8))
    assert seconds(forward / 5) == pytest.approx((5 + 5 + 5 * (2 * backward + reduce) / forward, 6))
    assert seconds((backward + reduce) / 2.5) == pytest.approx(
        (1 + 2 + 1 + 2.5, 6)
    )  # the last backward waits
    across = dataclasses.replace(job, gpus_per_node=2)
    slow = Cluster(2 * flops, 1e18, costs.traffic(across)["reduce"][1] / 7)
    assert costs.step_seconds(across, slow, 0.5) == pytest.approx((1 + 2 + 1 + 7, 6))
