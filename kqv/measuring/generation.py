"""bench.py sample: how fast generation is here."""

import statistics
from dataclasses import dataclass, fields

import torch

from kqv.device import PlacementSettings, find_device, find_dtype, out_of_memory_as
from kqv.errors import UsageError
from kqv.formats.base import moved
from kqv.formats.checkpoint import shape_in
from kqv.formats.loading import load_start, model_of
from kqv.generation.choice import EngineSettings, choose_engine
from kqv.generation.engine import Engine
from kqv.generation.int8 import PrecisionSettings, to_device
from kqv.generation.sampling import Sampling
from kqv.generation.stream import ContextWindow, stream
from kqv.measuring.costs import count
from kqv.measuring.llama_cpp import measure_in_turns, require_llama_cpp
from kqv.measuring.machine import Machine, RoundsSettings, print_machine
from kqv.measuring.presets import parse_batch_sizes
from kqv.measuring.report import ReportSettings, print_figures, print_kernels, profiled
from kqv.settings import fill, group, read_given, refuse_unused, setting
from model import GPT, GPTConfig, KVCache

WRITING = Sampling(temperature=0.8, top_k=200)  # sample.py's defaults
STEPS_AT_ONCE = 16  # decoding steps between two measurements of the memory's speed


ShapeSettings = group(
    "ShapeSettings",
    "Shape of a model from scratch, by default GPT-2 124M",
    GPTConfig,
    without=("dropout",),
    vocab_size=50257,
)


UNUSED = (  # rows of `refuse_unused`: names of settings, when they mean nothing, and when in words
    (
        [field.name for field in fields(ShapeSettings)],
        lambda c: c.init_from != "scratch",
        "with --init_from, which names weights of a shape",
    ),
    (("base",), lambda c: c.init_from == "scratch", "for a model from scratch"),
)


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    init_from: str = setting(
        "scratch", "scratch: random weights; or weights that train.py starts from, as smollm2", path=True
    )
    base: str = setting("", "where the base of an adapter is, if it is no more where it was", path=True)


@dataclass(frozen=True)
class WritingSettings:
    """Work"""

    batch_sizes: str = setting("1,64", "texts written at once, with commas between")
    prompt_length: int = setting(128, "tokens read before the first is written", at_least=2)
    max_new_tokens: int = setting(128, "tokens written", at_least=8)
    prefill_length: int = setting(1000, "tokens of the prefill that is measured by itself", at_least=2)
    uncached: bool = setting(True, "also write without a cache, reading the whole context for each token")
    llama_cpp: str = setting(
        "", "also measure llama.cpp on the same weights, kept so: f32, f16, bf16, q8_0, with commas between"
    )
    profile: bool = setting(False, "also print where the time of a decoding step goes")


@dataclass(frozen=True)
class BenchSampleSettings(
    EngineSettings,
    PlacementSettings,
    PrecisionSettings,
    ReportSettings,
    RoundsSettings,
    WritingSettings,
    ShapeSettings,
    ModelSettings,
):
    """
    usage: python bench.py sample [config.py ...] [--name=value ...]

    Measure generation: tokens per second, and as a fraction of the memory ceiling, which is reached where the
    weights and the kept keys and values of all rows are read at the speed of memory once for each step. That
    speed (a sum over a large tensor) is measured between the steps, in the same run.
    """


def bench_sample(argv):
    """Print a line for each thing measured. Raises UserError."""
    given = read_given(BenchSampleSettings, argv)
    config = fill(BenchSampleSettings, given)
    refuse_unused(UNUSED, config, given)
    batch_sizes = parse_batch_sizes(config.batch_sizes)
    device = find_device(config.device)
    advice = f"out of memory: try smaller --batch_sizes than {config.batch_sizes}"
    with torch.no_grad(), out_of_memory_as(advice):
        gpt = model_to_measure(config, device)
        require_llama_cpp(parse_kinds(config.llama_cpp), gpt.config, device)
        measure_generation(config, gpt, batch_sizes, device)


def model_to_measure(config, device):
    """The GPT that the settings name, on the device. Raises UserError, also where it is too short."""
    if config.init_from != "scratch":
        contents = moved(load_start(config.init_from, words=("scratch",)), config.init_from, config.base)
        gpt = model_of(contents, config.init_from)
        require_room(config, gpt.config)
    else:
        try:
            shape = shape_in(vars(config))
        except ValueError as error:
            raise UsageError(str(error)) from None
        require_room(config, shape)
        torch.manual_seed(0)
        with torch.device(device):
            gpt = GPT(shape)
    return to_device(gpt, device, find_dtype(config.dtype, device), config.weights).eval()


def require_room(config, shape):
    """Raise UsageError where a text that is measured would be longer than the model's context."""
    if max(config.prompt_length + config.max_new_tokens, config.prefill_length) > shape.block_size:
        raise UsageError(
            f"prompt_length={config.prompt_length} + max_new_tokens={config.max_new_tokens} and "
            f"prefill_length={config.prefill_length} must be within block_size={shape.block_size}"
        )


def measure_generation(config, gpt, batch_sizes, device):
    dtype, vocab_size = gpt.transformer.ln_f.weight.dtype, gpt.config.vocab_size
    kind = choose_engine(config.engine, device, gpt, config.max_new_tokens, max(batch_sizes))
    machine = Machine(device, dtype, config.rounds)
    print_machine(config, machine, engine=kind, weights=config.weights, parameters=gpt.num_parameters())
    engine = Engine(gpt, kind)
    prefill = measure_prefill(engine, config.prefill_length, machine)
    print_figures(config, "prefill", prefill)
    for batch_size in batch_sizes:
        texts = random_texts(batch_size, config.prompt_length, vocab_size)
        decoding = measure_decoding(engine, texts, config.max_new_tokens, machine)
        print_figures(config, f"batch {batch_size}", decoding)
    if config.uncached:
        print_figures(config, "cache", measure_uncached(engine, config.prefill_length, machine))
    if kinds := parse_kinds(config.llama_cpp):
        lengths = config.prompt_length, config.prefill_length
        texts = [random_texts(1, length, vocab_size)[0] for length in lengths]
        found = measure_in_turns(engine, kinds, *texts, config.max_new_tokens, WRITING, machine)
        for who, figures in found.items():
            print_figures(config, f"in turns, {who}", figures)
    if config.profile:
        texts = random_texts(batch_sizes[0], config.prompt_length, vocab_size)
        print_decoding_profile(engine, texts, config.max_new_tokens)


def parse_kinds(kinds):
    """ "f32,q8_0" -> ["f32", "q8_0"]; "" -> []."""
    return kinds.split(",") if kinds else []


def random_texts(batch_size, length, vocab_size):
    """Lists of ids, the same for the same sizes."""
    return torch.randint(
        vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0)
    ).tolist()


def measure_prefill(engine, length, machine):
    """{name: figure} of reading one text of `length` tokens at once."""
    texts = random_texts(1, length, engine.gpt.config.vocab_size)
    cache = engine.new_cache(1, length)
    taken = machine.median(lambda: engine.fill(cache, texts))
    return {
        "tokens": length,
        "ms": taken * 1e3,
        "tokens/s": length / taken,
        "of matmul ceiling": prefill_flops(engine.gpt, length) / taken / machine.matmul(),
    }


def prefill_flops(gpt, length):
    """
    Floating-point operations to read `length` tokens: a multiply and an add for each weight of the blocks and
    token, and attention.
    """
    config = gpt.config
    attention = 4 * config.n_layer * config.n_head * config.head_channels  # for each token that is seen
    return 2 * count(gpt.transformer.h) * length + attention * length**2 / 2  # the causal mask saves half


def measure_decoding(engine, texts, max_new_tokens, machine):
    """
    {name: figure} of continuing B texts of one length with sample.py's sampling. The speed of the memory is
    measured after every 16 steps, so that both meet the same state of the machine.
    """

    def write():
        return stream(engine, texts, max_new_tokens, WRITING)

    cold = machine.seconds(lambda: list(write()))  # compiles every shape
    firsts, steps, bandwidths, fractions = [], [], [], []
    for _ in range(machine.rounds):
        tokens, length = write(), len(texts[0])
        firsts.append(machine.seconds(lambda: next(tokens)))  # noqa: B023
        end = length + max_new_tokens - 1
        while length < end:
            steps_now = min(STEPS_AT_ONCE, end - length)
            taken = machine.seconds(lambda: [next(tokens) for _ in range(steps_now)])  # noqa: B023
            steps.append(taken / steps_now)
            bandwidths.append(machine.bandwidth(once=True))
            read = bytes_of_step(engine.gpt, len(texts), length + steps_now / 2)
            fractions.append(read / bandwidths[-1] / steps[-1])
            length += steps_now
    step = statistics.median(steps)
    return {
        "first run s": cold,
        "first token ms": statistics.median(firsts) * 1e3,
        "ms a step": step * 1e3,
        "tokens/s": len(texts) / step,
        "memory GB/s": statistics.median(bandwidths) / 1e9,
        "of ceiling": statistics.median(fractions),
    }


def bytes_of_step(gpt, batch_size, length):
    """Bytes that a decoding step must read: the weights, and the keys and values of `length` tokens a row."""
    looked_up = ("transformer.wpe.",) if gpt.config.tied_head else ("transformer.wpe.", "transformer.wte.")
    kept = (*gpt.named_parameters(), *gpt.named_buffers())
    weights = sum(tensor.nbytes for name, tensor in kept if not name.startswith(looked_up))
    one_slot = KVCache(gpt.config, 1, slots=1, device="meta", dtype=gpt.transformer.ln_f.weight.dtype)
    a_token = sum(buffer.nbytes for buffer in one_slot.buffers() if buffer.is_floating_point())
    return weights + batch_size * length * a_token


def measure_uncached(engine, length, machine):
    """{name: figure} of writing a token after `length` others, with the cache and by reading all again."""
    gpt = engine.gpt
    (text,) = random_texts(1, length, gpt.config.vocab_size)
    idx = torch.tensor([text], device=engine.device)
    window = ContextWindow(engine, [text], 0)
    tokens = window.refill()
    again = machine.median(lambda: gpt.lm_head(gpt.hidden(idx)[:, -1]).argmax())

    def greedy(logits):
        return (logits.argmax(dim=-1),)

    def once():
        window.cache.length.fill_(length - 1)
        window.n_cached = length - 1
        return window.step(tokens, greedy)

    cached = machine.median(once)
    return {
        "context": length,
        "tokens/s": 1 / cached,
        "uncached tokens/s": 1 / again,
        "times faster": again / cached,
    }


def print_decoding_profile(engine, texts, max_new_tokens):
    """Print the kernels that decoding steps spend their time on."""
    tokens = stream(engine, texts, max_new_tokens, WRITING)
    next(tokens)
    with profiled(engine.device) as found:
        list(tokens)
    print_kernels(found, engine.device)
