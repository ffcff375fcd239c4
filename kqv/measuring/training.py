"""How fast training is here."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import train
from kqv.device import DeviceSettings, find_compile, find_dtype, out_of_memory_as, peak_flops
from kqv.errors import UsageError, UserError
from kqv.measuring.machine import (
    Machine,
    ReportSettings,
    peak_memory,
    print_table,
    profiled,
    reset_peak_memory,
    say,
    say_machine,
    whole_numbers,
)
from kqv.settings import setting
from kqv.text import dataset, dataset_writer
from kqv.text.tokenizers import CharTokenizer
from kqv.training.batches import micro_batches, to_device
from kqv.training.loss import next_token_loss
from kqv.training.start import ARCHITECTURE, checkpoint_activations, set_precision
from kqv.training.state import start_state
from kqv.training.world import World
from model import GPT, GPTConfig, NextToken


@dataclass(frozen=True)
class TrainingSettings:
    """Work"""

    presets: str = setting(
        "auto",
        "models, with commas between: tiny, baby, 124M, 350M, 774M, 1.5B; auto: what the device is for",
    )
    batch_sizes: str = setting("auto", "micro-batches, with commas between; auto: the preset's own")
    steps: int = setting(10, "training steps in a measurement", at_least=1)
    activation_checkpointing: bool = setting(False, "as in train.py")
    compare: bool = setting(False, "also measure a plain PyTorch step, in turns with train.py's")
    start_up: bool = setting(True, "also time train.py from its command to the end of its first step")
    profile: bool = setting(False, "also print the kernels that take most, and write a trace for a viewer")


@dataclass(frozen=True)
class BenchTrainSettings(DeviceSettings, ReportSettings, TrainingSettings):
    """
    usage: python bench.py train [config.py ...] [--name=value ...]

    Measure training, with train.py's own step on random tokens: tokens per second, and as fractions of the
    speed of a large matrix product, measured in the same run, and of the GPU's peak where it is known.
    """


@dataclass(frozen=True)
class Preset:
    """A shape of model that people train."""

    shape: GPTConfig
    batch_sizes: tuple[int, ...]


PRESETS = {
    "tiny": Preset(GPTConfig(64, 65, 4, 4, 128, bias=False), (12,)),  # nanoGPT's recipe for a CPU
    "baby": Preset(GPTConfig(256, 65, 6, 6, 384, bias=False), (64,)),  # its recipe for tiny Shakespeare
    "124M": Preset(GPTConfig(1024, 50304, 12, 12, 768, bias=False), (16, 32, 64)),
    "350M": Preset(GPTConfig(1024, 50304, 24, 16, 1024, bias=False), (8, 16, 32)),
    "774M": Preset(GPTConfig(1024, 50304, 36, 20, 1280, bias=False), (4, 8, 16)),
    "1.5B": Preset(GPTConfig(1024, 50304, 48, 25, 1600, bias=False), (2, 4, 8)),
}


def chosen_presets(config, device):
    """{name: Preset} of the models to measure, each with the batch sizes asked for. Raises UsageError."""
    names = config.presets
    if names == "auto":
        names = "tiny" if device.type == "cpu" else "baby,124M"
    chosen = {}
    for name in names.split(","):
        if name not in PRESETS:
            raise UsageError(f"presets={config.presets}: {name!r} is none of {', '.join(PRESETS)}")
        chosen[name] = PRESETS[name]
        if config.batch_sizes != "auto":
            chosen[name] = replace(PRESETS[name], batch_sizes=tuple(whole_numbers(config.batch_sizes)))
    return chosen


def bench_train(config, presets, device):
    """Print a line for each thing measured."""
    dtype = find_dtype(config.dtype, device)
    machine = Machine(device, dtype, config.rounds)
    say_machine(config, machine, find_compile(config.compile, device))
    for name, preset in presets.items():
        with tempfile.TemporaryDirectory() as folder:
            write_random_set(Path(folder), preset.shape)
            for batch_size in preset.batch_sizes:
                what = f"{name}, batch {batch_size}"
                try:
                    with out_of_memory_as("out of memory"):
                        figures = measure_training(config, preset.shape, batch_size, folder, machine, what)
                except UserError as error:
                    figures = {"failed": str(error)}
                say(config, what, figures)
            if config.start_up:
                smallest = min(preset.batch_sizes)
                say(config, f"{name}, start-up", measure_start_up(config, preset.shape, smallest, folder))


def write_random_set(folder, shape):
    """A prepared set of random tokens, with a vocabulary that train.py pads to the shape's."""
    skipped = 0xE000  # past the code points that are no characters
    tokenizer = CharTokenizer("".join(map(chr, range(skipped, skipped + shape.vocab_size))))
    random = np.random.default_rng(0)
    splits = {
        split: random.integers(shape.vocab_size, size=2**20 + shape.block_size) for split in dataset.SPLITS
    }
    dataset_writer.write(folder, splits, tokenizer, {})


def training_settings(config, shape, batch_size, folder):
    """train.py's settings for a shape."""
    own = {name: getattr(shape, name) for name in (*ARCHITECTURE, "dropout")}
    return train.TrainSettings(
        **own,
        dataset=str(folder),
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        activation_checkpointing=config.activation_checkpointing,
    )


def measure_training(config, shape, batch_size, folder, machine, what):
    """train.py's step and, where asked for, a plain one, measured in turns."""
    settings = training_settings(config, shape, batch_size, folder)
    compiled = find_compile(config.compile, machine.device)
    ours = own_step(settings, shape, machine, compiled)
    reset_peak_memory(machine.device)
    first = machine.seconds(ours)
    machine.seconds(lambda: [ours() for _ in range(2)])  # what is made once is made
    peak = peak_memory(machine.device)
    steps = {"ours": ours}
    if config.compare:
        steps["plain"] = plain_step(settings, shape, machine, compiled and machine.device.type != "cpu")
        machine.seconds(steps["plain"])
    seconds = {name: [] for name in steps}
    for _ in range(config.rounds):
        for name, step in steps.items():
            taken = machine.seconds(lambda: [step() for _ in range(config.steps)])  # noqa: B023
            seconds[name].append(taken / config.steps)
    step = statistics.median(seconds["ours"])
    tokens_per_second = batch_size * shape.block_size / step
    with torch.device("meta"):
        flops = GPT(shape).flops_per_token() * tokens_per_second
    figures = {
        "ms a step": step * 1e3,
        "tokens/s": tokens_per_second,
        "of matmul ceiling": flops / machine.matmul(),
        "peak memory GB": peak / 1e9,
        "first step s": first,
    }
    if machine.device.type == "cuda":
        peak_of_gpu = peak_flops(torch.cuda.get_device_name(machine.device), machine.dtype)
        figures |= {"MFU": flops / peak_of_gpu} if peak_of_gpu else {}
    if config.compare:
        plain = statistics.median(seconds["plain"])
        figures |= {"plain ms a step": plain * 1e3, "times faster": plain / step}
    if config.profile:
        print_training_profile(ours, machine, f"trace {what}.json".replace(", ", "_").replace(" ", "_"))
    return figures


def own_step(settings, shape, machine, compiled):
    """train.py's step, as a function of nothing that gives the loss."""
    world = World(machine.device)
    data = dataset.Dataset(settings.dataset)
    torch.manual_seed(settings.seed)
    gpt = GPT(shape).to(machine.device)
    state = start_state(settings, gpt, None, machine.dtype)
    if settings.activation_checkpointing:
        checkpoint_activations(gpt)
    objective = NextToken(gpt, next_token_loss)
    model = torch.compile(objective) if compiled else objective
    autocast = torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)

    def step():
        set_precision(settings, machine.device)
        batches = micro_batches(data, settings, world, state.step)
        numbers = train.train_step(model, state, batches, 1e-4, settings, world, autocast)
        state.step += 1
        return numbers["loss"]

    return step


class PlainGPT(GPT):
    """The yardstick's model: the loss from all logits at once, in float32."""

    def forward(self, idx, targets):
        logits = self.lm_head(self.hidden(idx)).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_step(settings, shape, machine, compiled):
    """
    The step as most would write it, and the yardstick of --compare: autocast on a GPU, float32 on a CPU,
    whatever attention torch picks, a batch stacked from random windows.
    """
    device, dtype = machine.device, machine.dtype
    torch.manual_seed(settings.seed)
    gpt = PlainGPT(shape).to(device)
    model = torch.compile(gpt) if compiled else gpt
    optimizer = torch.optim.AdamW(
        gpt.parameter_groups(settings.weight_decay), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    tokens = dataset.Dataset(settings.dataset).splits["train"]
    length = shape.block_size
    half = device.type != "cpu" and dtype != torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=half)

    def batch():
        starts = torch.randint(len(tokens) - length, (settings.batch_size,)).tolist()
        x, y = (
            np.stack([tokens[i + shift : i + shift + length].astype(np.int64) for i in starts])
            for shift in (0, 1)
        )
        return to_device((x, y), device)

    def step():
        torch.backends.cuda.enable_flash_sdp(True)
        with autocast:
            loss = model(*batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def measure_start_up(config, shape, batch_size, folder):
    """
    Seconds from the command to the end of train.py's first step, one batch of evaluation on each split before
    it included: with the compiler's cache empty, and again with what that left there.
    """
    settings = training_settings(config, shape, batch_size, folder)
    names = (*ARCHITECTURE, "dataset", "batch_size", "gradient_accumulation_steps")
    command = [sys.executable, str(Path(train.__file__).resolve()), f"--out_dir={folder}/out"]
    command += [f"--{name}={getattr(settings, name)}" for name in (*names, "activation_checkpointing")]
    command += [f"--{name}={getattr(config, name)}" for name in ("device", "dtype", "compile")]
    command += ["--max_iters=1", "--eval_iters=1"]
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in ("cold s", "warm s"):
            start = time.perf_counter()
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                for line in process.stdout:
                    if line.startswith("step 0: loss"):
                        figures[name] = time.perf_counter() - start
                error = process.stderr.read()
            if process.returncode:
                return {"failed": error.strip().splitlines()[-1]}
    return figures


def print_training_profile(step, machine, trace):
    """The kernels of three steps by the time they take, and a trace of all that Perfetto or Chrome shows."""
    with profiled(machine.device) as found:
        for _ in range(3):
            step()
        machine.synchronize()
    found.export_chrome_trace(trace)
    print_table(found, machine.device)
    print(f"trace: {trace}")
