"""How fast generation is here."""

import statistics
from dataclasses import dataclass

import torch

from kqv.device import DeviceSettings, find_compile, find_dtype
from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.generation.stream import ContextWindow, stream
from kqv.measuring.machine import Machine, ReportSettings, print_table, profiled, say, say_machine
from kqv.settings import setting
from model import GPT


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
class BenchSampleSettings(DeviceSettings, ReportSettings, WritingSettings, ShapeSettings):
    """
    usage: python bench.py sample [config.py ...] [--name=value ...]

    Measure generation: tokens per second, and as a fraction of the memory ceiling, which is reached where the
    weights and the kept keys and values of all rows are read at the speed of memory once for each step. That
    speed (a sum over a large tensor) is measured between the steps, in the same run.
    """


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
    # A multiply and an add for each weight and token; Q K^T and its use, half of which the mask saves.
    flops = 2 * in_blocks * length + 2 * shape.n_layer * shape.n_embd * length**2
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
    window = ContextWindow(engine, [text], 0)
    tokens = window.refill()
    again = machine.median(lambda: gpt.lm_head(gpt.hidden(idx)[:, -1]).argmax())

    def once():
        window.cache.length.fill_(len(text) - 1)
        window.n_cached = len(text) - 1
        return window.step(tokens, lambda logits: (logits.argmax(dim=-1),))

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
