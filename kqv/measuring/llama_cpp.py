"""llama.cpp on the weights that are measured here, in turns with our own generation."""

import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from kqv.errors import UsageError, UserError
from kqv.formats import families, gguf
from kqv.generation.int8 import float_weights
from kqv.generation.stream import stream
from kqv.text.tokenizers import CharTokenizer
from model import GPT

FIRST_CHAR = 0xE000  # the code points before it are no characters


class LlamaCpp:
    """llama.cpp with the GGUF file at `path`, for texts of at most `slots` tokens, with torch's threads."""

    def __init__(self, path, slots):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = slots
        params.n_parallel = 1
        params.cpuparams.n_threads = torch.get_num_threads()
        params.port = 0
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def write(self, text, max_new_tokens, sampling):
        """Its answer to `text`, a list of ids: max_new_tokens more, also where one of them ends a text."""
        return self.server.handle_completions(
            {
                "prompt": text,
                "n_predict": max_new_tokens,
                "ignore_eos": True,
                "cache_prompt": False,
                "samplers": ["top_k", "temperature"],
                "top_k": sampling.top_k,
                "temperature": sampling.temperature,
            }
        )

    def seconds(self, text, max_new_tokens, sampling):
        """
        By its own clock: (seconds to read `text`, seconds for each token after the first that it writes).
        """
        taken = self.write(text, max_new_tokens, sampling)["timings"]
        # The first token is drawn from what reading the text has left.
        return taken["prompt_ms"] / 1e3, taken["predicted_ms"] / 1e3 / max(1, taken["predicted_n"] - 1)


def require_llama_cpp(kinds, shape, device):
    """Raise UserError where llama.cpp can't run a GPT of that shape, kept in each of `kinds` ("f32")."""
    for kind in kinds:
        if kind not in gguf.DTYPES:
            raise UsageError(f"llama_cpp={','.join(kinds)}: {kind!r} is none of {', '.join(gguf.DTYPES)}")
    if kinds and device.type != "cpu":
        raise UsageError(f"--llama_cpp measures on the CPU, and the device is {device}: give --device=cpu")
    for package in ("xllamacpp", "gguf"):
        if kinds and not find_spec(package):
            raise UserError(f"--llama_cpp={','.join(kinds)} needs: pip install xllamacpp gguf")
    if kinds:
        families.family_of(shape)


def measure_in_turns(engine, kinds, text, long_text, max_new_tokens, sampling, machine):
    """
    {who: {name: figure}} of us and of llama.cpp with the weights in each of `kinds`: how fast `long_text` is
    read, and how fast the tokens after the first are written after `text`. In each round all are measured.
    """
    slots = max(len(long_text), len(text) + max_new_tokens) + 1
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.gguf" for kind in kinds}
        for kind, path in paths.items():
            write_gguf(path, engine.gpt, kind)
        others = {f"llama.cpp {kind}": LlamaCpp(path, slots).seconds for kind, path in paths.items()}
        everyone = {"kqv": own_seconds(engine, machine), **others}
        reading, writing = ({name: [] for name in everyone} for _ in range(2))
        for _ in range(1 + machine.rounds):  # the first sets things up
            for name, seconds in everyone.items():
                reading[name].append(seconds(long_text, 1, sampling)[0])
                writing[name].append(seconds(text, max_new_tokens, sampling)[1])
    return {
        name: {
            "prefill tokens/s": len(long_text) / statistics.median(reading[name][1:]),
            "tokens/s": 1 / statistics.median(writing[name][1:]),
        }
        for name in everyone
    }


def own_seconds(engine, machine):
    """What `LlamaCpp.seconds` is, of our engine."""

    def seconds(text, max_new_tokens, sampling):
        cache = engine.new_cache(1, len(text))
        reading = machine.seconds(lambda: engine.fill(cache, [text]))
        if max_new_tokens == 1:
            return reading, None
        tokens = stream(engine, [text], max_new_tokens, sampling)
        next(tokens)
        return reading, machine.seconds(lambda: list(tokens)) / (max_new_tokens - 1)

    return seconds


def write_gguf(path, gpt, kind):
    """Write the weights, with a tokenizer that is not used: its ids are characters; the last ends a text."""
    whole = GPT.from_weights(gpt.config, float_weights(gpt))
    last = FIRST_CHAR + gpt.config.vocab_size - 1
    tokenizer = CharTokenizer("".join(map(chr, range(FIRST_CHAR, last))))
    gguf.save(path, path.name, whole, tokenizer, kind, {})
