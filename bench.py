"""
How fast the project is here, as numbers and as fractions of what the machine could do; and by arithmetic
(plan.py), what a run on other machines would take.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import plan
import train
from generate import Engine, Reader, Sampling, stream
from kqv import dataset
from kqv.device import (
    DeviceSettings,
    find_compile,
    find_device,
    find_dtype,
    out_of_memory_as,
    peak_flops,
)
from kqv.distributed import BYTES_A_PARAMETER, World
from kqv.errors import UsageError, UserError, run
from kqv.settings import parse, setting
from kqv.tokenizer import CharTokenizer
from model import GPT, GPTConfig


@dataclass(frozen=True)
class ShapeSettings:
    """Model, by default GPT-2 124M; the weights are random"""

    n_layer: int = setting(12, "blocks", at_least=1)
    n_head: int = setting(12, "attention heads", at_least=1)
    n_embd: int = setting(768, "channels of the residual stream", at_least=1)
    block_size: int = setting(1024, "longest context, in tokens", at_least=1)
    vocab_size: int = setting(50257, "token ids", at_least=1)


@dataclass(frozen=True)
class WritingSettings:
    """Work"""

    batch_sizes: str = setting("1,64", "texts written at once, with commas between")
    prompt_length: int = setting(128, "tokens read before the first is written", at_least=2)
    max_new_tokens: int = setting(128, "tokens written", at_least=8)
    prefill_length: int = setting(1000, "tokens of the prefill that is measured by itself", at_least=2)
    uncached: bool = setting(True, "also write without a cache, reading the whole context for each token")
    profile: bool = setting(False, "also print where the time of a decoding step goes")


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
class ReportSettings:
    """Report"""

    rounds: int = setting(5, "measurements of each; the median counts", at_least=1)
    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line")


@dataclass(frozen=True)
class BenchSampleSettings(DeviceSettings, ReportSettings, WritingSettings, ShapeSettings):
    """
    usage: python bench.py sample [config.py ...] [--name=value ...]

    Measure generation: tokens per second, and as a fraction of the memory ceiling, which is reached where the
    weights and the kept keys and values of all rows are read at the speed of memory once for each step. That
    speed (a sum over a large tensor) is measured between the steps, in the same run.
    """


@dataclass(frozen=True)
class BenchTrainSettings(DeviceSettings, ReportSettings, TrainingSettings):
    """
    usage: python bench.py train [config.py ...] [--name=value ...]

    Measure training, with train.py's own step on random tokens: tokens per second, and as fractions of the
    speed of a large matrix product, measured in the same run, and of the GPU's peak where it is known.
    """


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
class FormatSettings:
    """Report"""

    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line")


@dataclass(frozen=True)
class BenchPlanSettings(FormatSettings, PlannedMachineSettings, PlannedWorkSettings, PlannedShapeSettings):
    """
    usage: python bench.py plan [config.py ...] [--name=value ...]

    Calculate what training takes on GPUs that need not be here: memory of each, batch, communication, days.
    GB are 10^9 bytes. docs/scaling.md has the formulas, and what of them is measured.
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


def main(argv):
    if argv[:1] not in (["sample"], ["train"], ["plan"]):
        wrong = f"{argv[0]} is nothing to measure" if argv else "name what to measure"
        raise UsageError(
            f"{wrong}: python bench.py train, python bench.py sample or python bench.py plan "
            "(--help lists the settings)"
        )
    if argv[0] == "plan":
        return bench_plan(parse(BenchPlanSettings, argv[1:]))
    if argv[0] == "train":
        config = parse(BenchTrainSettings, argv[1:])
        device = find_device(config.device)
        return bench_train(config, chosen_presets(config, device), device)
    config = parse(BenchSampleSettings, argv[1:])
    batch_sizes = whole_numbers(config.batch_sizes)
    try:
        shape = GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if max(config.prompt_length + config.max_new_tokens, config.prefill_length) > config.block_size:
        raise UsageError(
            f"prompt_length={config.prompt_length} + max_new_tokens={config.max_new_tokens} and "
            f"prefill_length={config.prefill_length} must be within block_size={config.block_size}"
        )
    device = find_device(config.device)
    advice = f"out of memory: try smaller --batch_sizes than {config.batch_sizes}"
    with torch.no_grad(), out_of_memory_as(advice):
        bench_sample(config, shape, batch_sizes, device)


def whole_numbers(batch_sizes):
    """ "1,64" -> [1, 64]. Raises UsageError."""
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError as error:
        raise UsageError(f"{error} (batch_sizes={batch_sizes})") from None
    if min(sizes) < 1:
        raise UsageError(f"batch_sizes={batch_sizes}, but each must be at least 1")
    return sizes


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


# Training


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
    dataset.write(folder, splits, tokenizer, {})


def training_settings(config, shape, batch_size, folder):
    """train.py's settings for a shape."""
    own = {name: getattr(shape, name) for name in (*train.ARCHITECTURE, "dropout")}
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
    state = train.start_state(settings, gpt, None, machine.dtype)
    if settings.activation_checkpointing:
        train.checkpoint_activations(gpt)
    model = torch.compile(gpt) if compiled else gpt
    autocast = torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)

    def step():
        train.set_precision(settings, machine.device)
        batches = train.micro_batches(data, settings, world, state.step)
        loss, _ = train.train_step(model, state, batches, 1e-4, settings, world, autocast)
        state.step += 1
        return loss

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
        return train.to_device((x, y), device)

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


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak begins anew (man 5 proc)


def peak_memory(device):
    """The most bytes held since the peak was reset: by tensors on a CUDA device, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_start_up(config, shape, batch_size, folder):
    """
    Seconds from the command to the end of train.py's first step, one batch of evaluation on each split before
    it included: with the compiler's cache empty, and again with what that left there.
    """
    settings = training_settings(config, shape, batch_size, folder)
    names = (*train.ARCHITECTURE, "dataset", "batch_size", "gradient_accumulation_steps")
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


# Generation


def bench_sample(config, shape, batch_sizes, device):
    """Print a line for each thing measured."""
    dtype = find_dtype(config.dtype, device)
    torch.manual_seed(0)
    with torch.device(device):
        gpt = GPT(shape).to(dtype).eval()
    compiled = find_compile(config.compile, device)
    machine = Machine(device, dtype, config.rounds)
    say_machine(config, machine, compiled, parameters=gpt.num_parameters())
    engine = Engine(gpt, compiled)
    say(config, "prefill", measure_prefill(engine, config, machine))
    for batch_size in batch_sizes:
        say(config, f"batch {batch_size}", measure_decoding(engine, batch_size, config, machine))
    if config.uncached:
        say(config, "cache", measure_uncached(gpt, engine, config, machine))
    if config.profile:
        print_profile(engine, batch_sizes[0], config)


def random_texts(count, length, vocab_size):
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def measure_prefill(engine, config, machine):
    """Read one long text, all at once."""
    shape, length = engine.gpt.config, config.prefill_length
    texts = random_texts(1, length, shape.vocab_size)
    cache = engine.new_cache(1, length)
    taken = machine.median(lambda: engine.fill(cache, texts))
    in_blocks = sum(parameter.numel() for parameter in engine.gpt.transformer.h.parameters())
    # A multiply and an add for each weight and token; Q K^T and its use, half of which the mask saves; the
    # head.
    flops = 2 * in_blocks * length + 2 * shape.n_layer * shape.n_embd * length**2
    flops += 2 * shape.n_embd * shape.vocab_size
    return {
        "tokens": length,
        "ms": taken * 1e3,
        "tokens/s": length / taken,
        "of matmul ceiling": flops / taken / machine.matmul(),
    }


def measure_decoding(engine, batch_size, config, machine):
    """Write with the default sampling, as sample.py does; the memory is measured after every 16 steps."""
    texts = random_texts(batch_size, config.prompt_length, engine.gpt.config.vocab_size)
    sampling = Sampling(temperature=0.8, top_k=200)

    def write():
        return stream(engine, texts, config.max_new_tokens, sampling)

    cold = machine.seconds(lambda: list(write()))  # compiles every shape
    weights = sum(parameter.nbytes for name, parameter in engine.gpt.named_parameters() if "wpe" not in name)
    a_token = 2 * engine.gpt.config.n_layer * engine.gpt.config.n_embd * engine.dtype.itemsize  # its K and V
    firsts, steps, bandwidths, fractions = [], [], [], []
    for _ in range(config.rounds):
        tokens = write()
        firsts.append(machine.seconds(lambda: next(tokens)))  # noqa: B023
        length = config.prompt_length
        while length + 1 < config.prompt_length + config.max_new_tokens:
            count = min(16, config.prompt_length + config.max_new_tokens - length - 1)
            taken = machine.seconds(lambda: [next(tokens) for _ in range(count)])  # noqa: B023
            read = weights + batch_size * a_token * (length + count / 2)  # bytes in a step
            steps.append(taken / count)
            bandwidths.append(machine.bandwidth(once=True))
            fractions.append(read / bandwidths[-1] / steps[-1])
            length += count
    step = statistics.median(steps)
    return {
        "first run s": cold,
        "first token ms": statistics.median(firsts) * 1e3,
        "ms a step": step * 1e3,
        "tokens/s": batch_size / step,
        "memory GB/s": statistics.median(bandwidths) / 1e9,
        "of ceiling": statistics.median(fractions),
    }


def measure_uncached(gpt, engine, config, machine):
    """Write a token after a long text, with the cache and by reading it all again."""
    (text,) = random_texts(1, config.prefill_length, gpt.config.vocab_size)
    idx = torch.tensor([text], device=engine.device)
    reader = Reader(engine, [text], 0)
    tokens = reader.refill()
    again = machine.median(lambda: gpt(idx)[0].argmax())

    def once():
        reader.cache.length.fill_(len(text) - 1)
        reader.read = [len(text) - 1]
        return reader.step(tokens, lambda logits: (logits.argmax(dim=-1),))

    cached = machine.median(once)
    return {
        "context": len(text),
        "tokens/s": 1 / cached,
        "uncached tokens/s": 1 / again,
        "times faster": again / cached,
    }


def print_profile(engine, batch_size, config):
    """What a decoding step spends its time on, by kernel."""
    texts = random_texts(batch_size, config.prompt_length, engine.gpt.config.vocab_size)
    tokens = stream(engine, texts, config.max_new_tokens, Sampling(temperature=0.8, top_k=200))
    next(tokens)
    with profiled(engine.device) as found:
        list(tokens)
    print_table(found, engine.device)


# Planning


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
    large = BYTES_A_PARAMETER * plan.num_parameters(shape) > 1e9 * config.memory_gb / 2
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


# Measuring


class Machine:
    """What the device could do at best."""

    def __init__(self, device, dtype, rounds):
        self.device, self.dtype, self.rounds = device, dtype, rounds
        large = device.type != "cpu"
        self.much = torch.ones(2**28 if large else 2**26, device=device)  # 1 GB or 256 MB: past every cache
        self.side = 8192 if large else 2048

    def seconds(self, work):
        """How long `work()` takes, to the end of what it gives the device to do."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def median(self, work):
        work()  # the first time pays for what is made once
        return statistics.median(self.seconds(work) for _ in range(self.rounds))

    def bandwidth(self, once=False):
        """Bytes read a second."""
        return self.much.nbytes / (self.seconds if once else self.median)(self.much.sum)

    def matmul(self):
        """Floating-point operations a second in a large matrix product."""
        a, b = (torch.randn(self.side, self.side, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * self.side**3 / self.median(lambda: a @ b)


def profiled(device):
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


def print_table(found, device):
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def say_machine(config, machine, compiled, **more):
    """What is measured on, and what it could do at best."""
    on_gpu = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if on_gpu else f"{torch.get_num_threads()} threads"
    figures = {
        "device": f"{machine.device} ({name})",
        "torch": torch.__version__,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compiled": compiled,
        **more,
        "memory GB/s": machine.bandwidth() / 1e9,
        "matmul TFLOP/s": machine.matmul() / 1e12,
    }
    say(config, "machine", figures)


def say(config, what, figures):
    if config.format == "jsonl":
        print(json.dumps({"what": what, **figures}), flush=True)
        return
    print(f"{what}:", ", ".join(map(shown, figures, figures.values())), flush=True)


def shown(name, value):
    return f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"


if __name__ == "__main__":
    run(main)
