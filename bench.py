"""How fast the project is here, as numbers and as fractions of what the machine could do."""

import json
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

from generate import Engine, Reader, Sampling, stream
from kqv.device import DeviceSettings, find_compile, find_device, find_dtype, is_out_of_memory
from kqv.errors import UsageError, UserError, run
from kqv.settings import parse, setting
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
class WorkSettings:
    """Work"""

    batch_sizes: str = setting("1,64", "texts written at once, with commas between")
    prompt_length: int = setting(128, "tokens read before the first is written", at_least=2)
    max_new_tokens: int = setting(128, "tokens written", at_least=8)
    prefill_length: int = setting(1000, "tokens of the prefill that is measured by itself", at_least=2)
    uncached: bool = setting(True, "also write without a cache, reading the whole context for each token")
    rounds: int = setting(5, "measurements of each; the median counts", at_least=1)
    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line")
    profile: bool = setting(False, "also print where the time of a decoding step goes")


@dataclass(frozen=True)
class BenchSampleSettings(DeviceSettings, WorkSettings, ShapeSettings):
    """
    usage: python bench.py sample [config.py ...] [--name=value ...]

    Measure generation: tokens per second, and as a fraction of the memory ceiling, which is reached where the
    weights and the kept keys and values of all rows are read at the speed of memory once for each step. That
    speed (a sum over a large tensor) is measured between the steps, in the same run.
    """


def main(argv):
    if argv[:1] != ["sample"]:
        wrong = f"{argv[0]} is nothing to measure" if argv else "name what to measure"
        raise UsageError(f"{wrong}: python bench.py sample (--help lists its settings)")
    config = parse(BenchSampleSettings, argv[1:])
    try:
        batch_sizes = [int(size) for size in config.batch_sizes.split(",")]
        shape = GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    except ValueError as error:
        raise UsageError(f"{error} (batch_sizes={config.batch_sizes})") from None
    if min(batch_sizes) < 1:
        raise UsageError(f"batch_sizes={config.batch_sizes}, but each must be at least 1")
    if max(config.prompt_length + config.max_new_tokens, config.prefill_length) > config.block_size:
        raise UsageError(
            f"prompt_length={config.prompt_length} + max_new_tokens={config.max_new_tokens} and "
            f"prefill_length={config.prefill_length} must be within block_size={config.block_size}"
        )
    device = find_device(config.device)
    try:
        with torch.no_grad():
            bench_sample(config, shape, batch_sizes, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: try smaller --batch_sizes than {config.batch_sizes}") from None


def bench_sample(config, shape, batch_sizes, device):
    """Print a line for each thing measured."""
    dtype = find_dtype(config.dtype, device)
    torch.manual_seed(0)
    with torch.device(device):
        gpt = GPT(shape).to(dtype).eval()
    compiled = find_compile(config.compile, device)
    machine = Machine(device, dtype, config.rounds)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    say(
        config,
        "machine",
        {
            "device": f"{device} ({name})",
            "torch": torch.__version__,
            "parameters": gpt.num_parameters(),
            "dtype": str(dtype).removeprefix("torch."),
            "compiled": compiled,
            "memory GB/s": machine.bandwidth() / 1e9,
            "matmul TFLOP/s": machine.matmul() / 1e12,
        },
    )
    engine = Engine(gpt, compiled)
    say(config, "prefill", measure_prefill(engine, config, machine))
    for batch_size in batch_sizes:
        say(config, f"batch {batch_size}", measure_decoding(engine, batch_size, config, machine))
    if config.uncached:
        say(config, "cache", measure_uncached(gpt, engine, config, machine))
    if config.profile:
        print_profile(engine, batch_sizes[0], config)


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
    from torch.profiler import ProfilerActivity, profile

    texts = random_texts(batch_size, config.prompt_length, engine.gpt.config.vocab_size)
    tokens = stream(engine, texts, config.max_new_tokens, Sampling(temperature=0.8, top_k=200))
    next(tokens)
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        list(tokens)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def say(config, what, figures):
    if config.format == "jsonl":
        print(json.dumps({"what": what, **figures}), flush=True)
        return
    print(f"{what}:", ", ".join(map(shown, figures, figures.values())), flush=True)


def shown(name, value):
    return f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"


if __name__ == "__main__":
    run(main)
