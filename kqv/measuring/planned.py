"""The settings of a planned run, and its report."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kqv.device import peak_flops
from kqv.errors import UsageError
from kqv.measuring import plan
from kqv.measuring.machine import FormatSettings, say
from kqv.measuring.training import PRESETS
from kqv.settings import setting
from kqv.training.optimizer import training_bytes


@dataclass(frozen=True)
class PlannedShapeSettings:
    """Model"""

    preset: str = setting("124M", "124M, 350M, 774M, 1.5B, 2.7B, 7B; the settings below replace its own")
    n_layer: int = setting(0, "blocks; 0: the preset's, as in those that follow", at_least=0)
    n_head: int = setting(0, "attention heads", at_least=0)
    n_embd: int = setting(0, "channels of the residual stream", at_least=0)
    block_size: int = setting(0, "context, in tokens", at_least=0)
    vocab_size: int = setting(0, "token ids", at_least=0)


@dataclass(frozen=True)
class PlannedWorkSettings:
    """Work"""

    parallel: Literal["auto", "ddp", "fsdp"] = setting("auto", "as in train.py")
    batch_size: int = setting(
        0, "sequences in a micro-batch; 0: the largest power of two that fits", at_least=0, below=2**50
    )
    activation_checkpointing: bool = setting(False, "as in train.py")
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
class BenchPlanSettings(FormatSettings, PlannedMachineSettings, PlannedWorkSettings, PlannedShapeSettings):
    """
    usage: python bench.py plan [config.py ...] [--name=value ...]

    Calculate what training takes on GPUs that need not be here: memory of each, batch, communication, days.
    GB are 10^9 bytes. docs/scaling.md has the formulas, and what of them is measured.
    """


def bench_plan(config):
    """Print a line for each thing calculated."""
    job = planned_job(config)
    peak = 1e12 * config.peak_tflops or peak_flops(config.gpu, torch.bfloat16)
    if not peak:
        raise UsageError(f"gpu={config.gpu} is none whose peak is known: give its --peak_tflops in bfloat16")
    cluster = plan.Cluster(peak, 1e9 * config.node_gbs, 1e9 * config.network_gbs)
    for what, figures in plan.report(job, cluster, config.mfu, config.tokens).items():
        say(config, what, figures)


def planned_job(config):
    """The plan.Job asked for, with the batch that fits. Raises UsageError."""
    shapes = {name: preset.shape for name, preset in PRESETS.items()} | plan.LARGE
    if config.preset not in shapes:
        raise UsageError(f"preset={config.preset} is none of {', '.join(shapes)}")
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    own = {name: getattr(config, name) for name in names if getattr(config, name)}
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
    large = training_bytes(plan.num_parameters(shape)) > 1e9 * config.memory_gb / 2
    sharded = config.parallel == "fsdp" or config.parallel == "auto" and large
    job = plan.Job(
        shape,
        gpus,
        node,
        sharded and gpus > 1,
        checkpointing=config.activation_checkpointing,
        compiled=config.compile,
    )

    def fitted(job, batch_size=config.batch_size):
        return plan.fit(job, batch_size, config.tokens_per_step, 0.9e9 * config.memory_gb)

    if found := fitted(job):
        return found
    ways = {
        "--activation_checkpointing=True": fitted(replace(job, checkpointing=True)),
        "--parallel=fsdp": fitted(replace(job, sharded=gpus > 1)),
        f"--gpus={node} --parallel=fsdp": fitted(replace(job, gpus=max(gpus, node), sharded=node > 1)),
    }
    if smaller := fitted(job, batch_size=0):
        ways = {f"--batch_size={smaller.batch_size}": smaller}
    least = plan.with_batch(job, config.batch_size or 1, config.tokens_per_step)
    raise UsageError(
        f"batch_size={least.batch_size} takes {plan.total(least) / 1e9:.1f} GB on each GPU, more than nine "
        f"tenths of memory_gb={config.memory_gb:g}: try "
        + next((way for way, fits in ways.items() if fits), "a smaller model")
    )
