"""bench.py train: how fast training is here."""

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kqv.device import DeviceSettings, find_compile, find_device, find_dtype, out_of_memory_as, peak_flops
from kqv.errors import UserError, say
from kqv.measuring.costs import model_of
from kqv.measuring.machine import Machine, RoundsSettings, peak_memory, print_machine, reset_peak_memory
from kqv.measuring.plain import plain_step
from kqv.measuring.presets import chosen_presets
from kqv.measuring.report import ReportSettings, print_figures, print_kernels, profiled
from kqv.measuring.start_up import measure_start_up
from kqv.settings import setting
from kqv.text import dataset, dataset_writer
from kqv.text.tokenizers import CharTokenizer
from kqv.training.batches import micro_batches
from kqv.training.objective import checkpoint_activations, make_objective, set_precision
from kqv.training.start import ARCHITECTURE
from kqv.training.state import start_state
from kqv.training.world import World
from model import GPT


@dataclass(frozen=True)
class TrainingSettings:
    """Work"""

    presets: str = setting(
        "auto",
        "models, with commas between: tiny, baby, 124M, 350M, 774M, 1.5B, smollm2-135M, qwen3-0.6B; auto",
    )
    batch_sizes: str = setting("auto", "micro-batches, with commas between; auto: the preset's own")
    steps: int = setting(10, "training steps in a measurement", at_least=1)
    activation_checkpointing: bool = setting(False, "as in train.py")
    compare: bool = setting(False, "also measure a plain PyTorch step, in turns with train.py's")
    start_up: bool = setting(True, "also time train.py from its command to the end of its first step")
    profile: bool = setting(False, "also print the kernels that take most, and write a trace for a viewer")


@dataclass(frozen=True)
class BenchTrainSettings(DeviceSettings, ReportSettings, RoundsSettings, TrainingSettings):
    """
    usage: python bench.py train [config.py ...] [--name=value ...]

    Measure training, with train.py's own step on random tokens: tokens per second, and as fractions of the
    speed of a large matrix product, measured in the same run, and of the GPU's peak where it is known.
    """


def bench_train(config, train):
    """
    Print a line for each thing measured. `train` is the module train.py, whose `train_step`, `TrainSettings`
    and command are measured. Raises UserError.
    """
    device = find_device(config.device)
    presets = chosen_presets(config.presets, config.batch_sizes, device)
    config = replace(config, compile=find_compile(config.compile, device))
    machine = Machine(device, find_dtype(config.dtype, device), config.rounds)
    print_machine(config, machine, compiled=config.compile)
    for name, preset in presets.items():
        with tempfile.TemporaryDirectory() as folder:
            write_random_set(Path(folder), preset.shape)
            for batch_size in preset.batch_sizes:
                what = f"{name}, batch {batch_size}"
                settings = step_settings(config, train.TrainSettings, preset.shape, batch_size, folder)
                try:
                    with out_of_memory_as("out of memory"):
                        figures = measure_training(
                            config, settings, preset.shape, machine, train.train_step, what
                        )
                except UserError as error:
                    figures = {"failed": str(error)}
                print_figures(config, what, figures)
            if config.start_up:
                smallest = min(preset.batch_sizes)
                settings = step_settings(config, train.TrainSettings, preset.shape, smallest, folder)
                print_figures(config, f"{name}, start-up", measure_start_up(settings, train.__file__))


def write_random_set(folder, shape):
    """
    A prepared set of random tokens, with as many ids as the shape has. As in text, few ids are frequent, and
    of two tokens, every second follows from the one before it: there is something to learn.
    """
    first = 0xE000  # the code points before it are no characters
    tokenizer = CharTokenizer("".join(map(chr, range(first, first + shape.vocab_size))))
    random = np.random.default_rng(0)
    share = 1 / (np.arange(shape.vocab_size) + 3)  # Zipf's law
    follower = random.permutation(shape.vocab_size)
    splits = {}
    for split in dataset.SPLITS:
        size = 2**20 + shape.block_size
        drawn = random.choice(shape.vocab_size, size, p=share / share.sum())
        follows = random.random(size) < 0.5
        follows[0] = False
        tokens = drawn
        for _ in range(30):  # few follow so many in a row
            tokens = np.where(follows, follower[np.roll(tokens, 1)], drawn)
        splits[split] = tokens
    dataset_writer.write(folder, splits, tokenizer, {})


def step_settings(config, cls, shape, batch_size, folder):
    """train.py's settings, of its class `cls`, for one micro-batch in a step of a model of that shape."""
    return cls(
        **{name: getattr(shape, name) for name in (*ARCHITECTURE, "dropout")},
        dataset=str(folder),
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        activation_checkpointing=config.activation_checkpointing,
        device=config.device,
        dtype=config.dtype,
        compile=config.compile,
    )


def measure_training(config, settings, shape, machine, train_step, what):
    """
    {name: figure} of train.py's step with `settings` and, where asked for, of a plain one in turns with it.
    """
    compiled = config.compile
    ours = own_step(settings, shape, machine, compiled, train_step)
    reset_peak_memory(machine.device)
    first = machine.seconds(ours)
    machine.seconds(lambda: [ours() for _ in range(2)])  # the optimizer's state is made, and CUDA graphs
    peak = peak_memory(machine.device)
    steps = {"ours": ours}
    if config.compare:
        steps["plain"] = plain_step(settings, shape, machine, compiled and machine.device.type != "cpu")
        machine.seconds(steps["plain"])
    seconds = measure_in_turns(steps, machine, config.steps)
    tokens_per_second = settings.batch_size * shape.block_size / seconds["ours"]
    flops = model_of(shape).flops_per_token() * tokens_per_second
    figures = {
        "ms a step": seconds["ours"] * 1e3,
        "tokens/s": tokens_per_second,
        "of matmul ceiling": flops / machine.matmul(),
        "peak memory GB": peak / 1e9,
        "first step s": first,
    }
    if machine.device.type == "cuda":
        peak_of_gpu = peak_flops(torch.cuda.get_device_name(machine.device), machine.dtype)
        figures |= {"MFU": flops / peak_of_gpu} if peak_of_gpu else {}
    if config.compare:
        figures["plain ms a step"] = seconds["plain"] * 1e3
        figures["times faster"] = seconds["plain"] / seconds["ours"]
    if config.profile:
        write_profile(ours, machine, f"trace {what}.json".replace(", ", "_").replace(" ", "_"))
    return figures


def measure_in_turns(steps, machine, count):
    """
    {name: seconds of a step}, from {name: function}: the median over the machine's rounds, in each of which
    every function is called `count` times.
    """
    seconds = {name: [] for name in steps}
    for _ in range(machine.rounds):
        for name, step in steps.items():
            taken = machine.seconds(lambda: [step() for _ in range(count)])  # noqa: B023
            seconds[name].append(taken / count)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def own_step(settings, shape, machine, compiled, train_step):
    """train.py's step, as a function without arguments that returns the loss."""
    world = World(machine.device)
    data = dataset.Dataset(settings.dataset)
    torch.manual_seed(settings.seed)
    gpt = GPT(shape).to(machine.device)
    state = start_state(settings, gpt, None, machine.dtype, world)
    objective = make_objective(gpt, settings, data, machine.device, machine.dtype)
    if settings.activation_checkpointing:
        checkpoint_activations(gpt)
    model = torch.compile(objective) if compiled else objective
    autocast = torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)

    def step():
        set_precision(settings, machine.device)
        batches = micro_batches(data, settings, world, state.step)
        numbers = train_step(model, state, batches, settings, world, autocast)
        state.step += 1
        return numbers["loss"]

    return step


def write_profile(step, machine, path):
    """Print the kernels of three steps by the time they take, and write a trace for Perfetto or Chrome."""
    with profiled(machine.device) as found:
        for _ in range(3):
            step()
        machine.synchronize()
    found.export_chrome_trace(path)
    print_kernels(found, machine.device)
    say(f"trace: {path}")
