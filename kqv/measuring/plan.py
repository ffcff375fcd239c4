"""bench.py plan: what a training run takes on GPUs that need not be here."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from kqv.device import peak_flops
from kqv.errors import UsageError
from kqv.formats.lora import flops_per_token
from kqv.measuring.costs import (
    Cluster,
    Job,
    count,
    highest_peak,
    learnt,
    model_of,
    peak_bytes,
    step_seconds,
    traffic,
)
from kqv.measuring.presets import PRESETS
from kqv.measuring.report import ReportSettings, print_figures
from kqv.settings import group, setting
from kqv.training.lora import LoraSettings, targets_of
from kqv.training.optimizer import training_bytes
from model import GPTConfig

LARGE = {  # shapes of GPT-3 (Brown et al. 2020, table 2.1), beyond the presets that bench.py measures
    "2.7B": GPTConfig(2048, 50304, 32, 32, 2560, bias=False),
    "7B": GPTConfig(2048, 50304, 32, 32, 4096, bias=False),
}
SIZES = [field.name for field in fields(GPTConfig) if type(field.default) is int]
MOST_BLOCKS = 10**4  # that are counted in a few seconds


@dataclass(frozen=True)
class PresetSettings:
    """Model"""

    preset: str = setting(
        "124M",
        "124M, 350M, 774M, 1.5B, 2.7B, 7B, smollm2-135M, qwen3-0.6B; the settings below replace its own",
    )


PlannedShapeSettings = group(
    "PlannedShapeSettings",
    "Sizes in place of the preset's; 0: its own",
    GPTConfig,
    without=[field.name for field in fields(GPTConfig) if field.name not in SIZES],
    at_least=0,
    **dict.fromkeys(SIZES, 0),
)


@dataclass(frozen=True)
class PlannedWorkSettings:
    """Work"""

    parallel: Literal["auto", "ddp", "fsdp"] = setting("auto", "as in train.py")
    batch_size: int = setting(
        0, "sequences in a micro-batch; 0: the largest power of two that fits", at_least=0, below=2**50
    )
    activation_checkpointing: bool = setting(False, "as in train.py")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "as in train.py; its computing is not counted")
    lora_rank: int = setting(0, "as in train.py", at_least=0)
    lora_targets: str = setting(LoraSettings.lora_targets, "as in train.py")
    compile: bool = setting(True, "as train.py does on a GPU")
    tokens_per_step: int = setting(
        2**19, "tokens in a step, rounded to what divides", at_least=1, below=2**50
    )
    tokens: float = setting(
        0.0, "tokens to train on; 0: 20 a parameter (Hoffmann et al. 2022)", at_least=0.0, below=1e18
    )


@dataclass(frozen=True)
class PlannedMachineSettings:
    """Machines, with data sheets' figures by default"""

    gpus: int = setting(1, "GPUs, each with a process", at_least=1, below=10**7)
    gpus_per_node: int = setting(8, "of them in a machine", at_least=1, below=10**7)
    gpu: str = setting("NVIDIA H100 80GB HBM3", "its name, as the driver has it")
    peak_tflops: float = setting(0.0, "its peak in bfloat16; 0: that of its name", at_least=0.0, below=1e9)
    memory_gb: float = setting(80.0, "its memory, of which a tenth is left free", at_least=0.1, below=1e9)
    mfu: float = setting(
        0.4, "share of the peak that computing reaches: an assumption", at_least=1e-3, below=1.0
    )
    node_gbs: float = setting(450.0, "GB/s from a GPU to those of its node", at_least=1e-3, below=1e9)
    network_gbs: float = setting(50.0, "GB/s from a GPU to other nodes", at_least=1e-3, below=1e9)


@dataclass(frozen=True)
class BenchPlanSettings(
    ReportSettings, PlannedMachineSettings, PlannedWorkSettings, PlannedShapeSettings, PresetSettings
):
    """
    usage: python bench.py plan [config.py ...] [--name=value ...]

    Calculate what training takes on GPUs that need not be here: memory of each, batch, communication, days.
    GB are 10^9 bytes. docs/lab/plan.md has the formulas, and what of them is measured.
    """


def bench_plan(config):
    """Print a line for each thing calculated. Raises UsageError where the run does not fit."""
    job = job_that_fits(config, planned_job(config))
    peak = 1e12 * config.peak_tflops or peak_flops(config.gpu, torch.bfloat16)
    if not peak:
        raise UsageError(f"gpu={config.gpu} is none whose peak is known: give its --peak_tflops in bfloat16")
    cluster = Cluster(peak, 1e9 * config.node_gbs, 1e9 * config.network_gbs)
    for what, figures in report(job, cluster, config.mfu, config.tokens).items():
        print_figures(config, what, figures)


def planned_job(config):
    """The Job that the settings name, its batch not chosen yet. Raises UsageError."""
    shapes = {name: preset.shape for name, preset in PRESETS.items()} | LARGE
    if config.preset not in shapes:
        raise UsageError(f"preset={config.preset} is none of {', '.join(shapes)}")
    if config.n_layer > MOST_BLOCKS:
        raise UsageError(f"n_layer is {config.n_layer}, but it must be at most {MOST_BLOCKS}")
    own = {name: getattr(config, name) for name in SIZES if getattr(config, name)}
    try:
        shape = replace(shapes[config.preset], **own)
    except ValueError as error:
        raise UsageError(str(error)) from None
    gpus, node = config.gpus, config.gpus_per_node
    if gpus > node and gpus % node:
        raise UsageError(
            f"gpus={gpus} do not fill nodes of gpus_per_node={node}: use --gpus={gpus // node * node} or "
            f"--gpus={-(-gpus // node) * node}, or give another --gpus_per_node"
        )
    rank, targets = config.lora_rank, targets_of(config)
    try:
        large = training_bytes(model_of(shape, rank, targets)) > 1e9 * config.memory_gb / 2
    except ValueError as error:
        raise UsageError(f"lora_rank={rank} can't be: {error}") from None
    if rank and config.parallel == "fsdp":
        raise UsageError(f"parallel=fsdp does not go with lora_rank={rank}: use --parallel=ddp")
    sharded = config.parallel == "fsdp" or config.parallel == "auto" and large
    return Job(
        shape,
        gpus,
        node,
        sharded and gpus > 1 and not rank,
        checkpointing=config.activation_checkpointing,
        muon=config.optimizer == "muon",
        compiled=config.compile,
        norm_itemsize=2 if config.compile else 4,  # autocast on a GPU computes LayerNorm in float32
        lora_rank=rank,
        lora_targets=targets,
    )


def job_of_run(config, gpt, world, dtype, compiled, accumulation, longest):
    """
    The Job of a run of train.py or tune.py: its settings, the GPT that it trains, and what it has found here.
    A step has `accumulation` micro-batches of each process, of rows of `longest` tokens.
    """
    sharded = world.size > 1 and world.find_parallel(config.parallel, gpt) == "fsdp"
    return Job(
        replace(gpt.config, block_size=longest),
        world.size,
        world.node_size,
        sharded,
        config.batch_size,
        accumulation,
        config.activation_checkpointing,
        config.optimizer == "muon",
        compiled,
        dtype.itemsize,
        norm_itemsize=4 if world.device.type == "cuda" and not compiled else dtype.itemsize,
        lora_rank=config.lora_rank,
        lora_targets=targets_of(config),
    )


def memory_in_words(job):
    """The memory that each process needs when a step holds most."""
    when, parts = highest_peak(job)
    sizes = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in parts.items())
    return f"memory by calculation: {sizes}, in all {sum(parts.values()) / 1e6:,.0f} MB at {when}"


def job_that_fits(config, job):
    """The job with a batch that fits in memory. Raises UsageError, which names a change that would fit."""

    def fitted(job, batch_size=config.batch_size):
        return fit(job, batch_size, config.tokens_per_step, 0.9e9 * config.memory_gb)

    if found := fitted(job):
        return found
    node = config.gpus_per_node
    ways = {"--activation_checkpointing=True": fitted(replace(job, checkpointing=True))}
    if not job.lora_rank:
        more = replace(job, gpus=max(job.gpus, node), sharded=node > 1)
        ways["--parallel=fsdp"] = fitted(replace(job, sharded=job.gpus > 1))
        ways[f"--gpus={node} --parallel=fsdp"] = fitted(more)
    if smaller := fitted(job, batch_size=0):
        ways = {f"--batch_size={smaller.batch_size}": smaller}
    smallest = with_batch(job, config.batch_size or 1, config.tokens_per_step)
    raise UsageError(
        f"batch_size={smallest.batch_size} takes {peak_bytes(smallest) / 1e9:.1f} GB on each GPU, more than "
        f"nine tenths of memory_gb={config.memory_gb:g}: try "
        + next((way for way, fits in ways.items() if fits), "a smaller model")
    )


def fit(job, batch_size, tokens_per_step, limit):
    """
    The job with `batch_size` (0: the largest power of two that fits in `limit` bytes) and the accumulation
    that comes nearest to `tokens_per_step`. None where it does not fit.
    """
    sequences = max(1, round(tokens_per_step / job.shape.block_size / job.gpus))
    sizes = [batch_size] if batch_size else [2**power for power in range(sequences.bit_length())]
    fitting = [with_batch(job, size, tokens_per_step) for size in sizes]
    return next((job for job in reversed(fitting) if peak_bytes(job) <= limit), None)


def with_batch(job, batch_size, tokens_per_step):
    """The job with that batch_size, and the accumulation that comes nearest to `tokens_per_step`."""
    accumulation = max(1, round(tokens_per_step / batch_size / job.shape.block_size / job.gpus))
    return replace(job, batch_size=batch_size, accumulation=accumulation)


def report(job, cluster, mfu, tokens=0):
    """{what: {name: figure}} of a job and of a run over `tokens` tokens, 0: over 20 a parameter."""
    gpt = job.model
    N = count(model_of(job.shape))
    tokens = tokens or 20 * N
    step, computing = step_seconds(job, cluster, mfu)
    tokens_per_step = job.tokens * job.accumulation * job.gpus
    seconds = tokens / tokens_per_step * step
    fullest_at, parts = highest_peak(job)
    memory_gb = {part: size / 1e9 for part, size in parts.items()}
    phases = traffic(job)
    within, between = (
        job.accumulation * (phases["forward"][place] + phases["backward"][place]) + phases["reduce"][place]
        for place in (0, 1)
    )
    return {
        "model": {"parameters": N, "trained": learnt(gpt), "GFLOP a token": flops_per_token(gpt) / 1e9},
        "GPUs": {"number": job.gpus, "parallel": "fsdp" if job.sharded else "ddp", "to a copy": job.shards},
        "memory of each, GB": {**memory_gb, "in all": sum(memory_gb.values()), "fullest at": fullest_at},
        "a step": {
            "batch_size": job.batch_size,
            "gradient_accumulation_steps": job.accumulation * job.gpus,
            "tokens": tokens_per_step,
        },
        "each sends in a step, GB": {"within its node": within / 1e9, "to other nodes": between / 1e9},
        f"at most, if computing alone has an MFU of {mfu:g}": {
            "tokens/s": round(tokens_per_step / step),
            "ms a step": step * 1e3,
            "of them computing": computing * 1e3,
            "limited by": "computing" if math.isclose(step, computing) else "communication",
        },
        "a run at that speed": {
            "tokens": int(tokens),
            "steps": math.ceil(tokens / tokens_per_step),
            "days": seconds / 86400,
            "GPU hours": seconds / 3600 * job.gpus,
        },
    }
