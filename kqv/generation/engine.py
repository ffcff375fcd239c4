"""
How a GPT runs when it generates text: prefill, decoding, and what of them is compiled.

*Prefill* reads a prompt, all but its newest token, in one pass: large matrix products, limited by arithmetic.
*Decoding* reads one token to choose the next. For that every weight and every key and value in the cache is
read once: limited by the speed of memory. Both run the same `GPT.hidden`.

Shapes: B rows of text, T tokens, V vocabulary.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kqv.generation import graphs
from kqv.generation.cpu_decoding import compiled_for_decoding
from kqv.generation.sampling import Sampler, Work
from kqv.kernels.sizes import power_of_two
from model import KVCache

KINDS = ("plain", "graph", "compiled", "kernels")
FEWEST_SLOTS = 1024  # of a cache that is made once for many texts, if block_size is not less
SHORTEST_SPAN = 256  # of a recorded step
AHEAD = 4  # steps that a GPU may be ahead of the host


def decode(gpt, cache, sampler, tokens, *inputs):
    """
    Read the newest token of each row, (B, 1) -> the tensors that `sampler` makes of the logits (B, V). A
    sampler returns -1 for a row whose logits are not finite. That is read as id 0 here, since the host may
    not have seen it yet.
    """
    logits = gpt(tokens.clamp(min=0), cache=cache)  # (B, 1, V), or (B, V)
    return sampler(logits.flatten(0, -2).float(), *inputs)


@contextmanager
def evaluating(gpt):
    """A context without dropout. At its end, each module is in the mode that it had before."""
    in_training = [module for module in gpt.modules() if module.training] if gpt.training else []
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


class Engine:
    """
    Runs a GPT. Dropout is off, also in training mode. The kinds differ in how a decoding step runs:

    plain     as model.py says, on every device
    graph     the same as a CUDA graph: one launch for all kernels of a step
    compiled  by torch.compile, which pays for many tokens; on a GPU as a CUDA graph, too
    kernels   by the project's own kernels, as a CUDA graph

    An engine with CUDA graphs has one cache, made again for another number of rows or more slots. The model's
    weights must stay where they are. Two texts may be written in turns, but each turn reads its text again.
    """

    def __init__(self, gpt, kind="plain"):
        if kind not in KINDS:
            raise ValueError(f"there is no engine {kind!r}, but {', '.join(KINDS)}")
        self.gpt = decoder = gpt
        self.device, self.dtype = gpt.transformer.ln_f.weight.device, gpt.transformer.ln_f.weight.dtype
        on_cpu, step = self.device.type == "cpu", decode
        self.ahead = AHEAD if self.device.type == "cuda" else 0
        self.compiled = kind == "compiled"
        self.records = kind in ("graph", "kernels") or self.compiled and not on_cpu
        self.recorded = None  # the RecordedSteps
        self.kind_of_sampler = lambda sampling, work: Sampler
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each shape
            if on_cpu:
                decoder = compiled_for_decoding(gpt)
            else:
                # Tuned so, products of one row are code of the compiler's, too, that others are fused with.
                options = {"coordinate_descent_tuning": True}
                step = torch.compile(decode, fullgraph=True, dynamic=False, options=options)
        elif kind == "kernels":
            from kqv.generation.kernel_sampler import kind_for  # here, since they load Triton
            from kqv.kernels.decoding import KernelDecoder

            decoder = KernelDecoder(gpt)
            self.kind_of_sampler = kind_for
        self.decode = partial(step, decoder)

    def span_for(self, length):
        """The slots that a step looks at where the longest row has `length` tokens; few where each costs."""
        if self.records:
            length = max(SHORTEST_SPAN, power_of_two(length))
        elif self.compiled:
            length = max(length, 2)  # one slot alone has no mask, which would be one more shape to compile
        return min(length, self.gpt.config.block_size)

    def new_cache(self, batch_size, slots):
        """A KVCache for texts of at most `slots` tokens."""
        if self.compiled or self.records:
            # A compiler takes the shape of a cache for a constant, so there are few: a power of two.
            slots = min(max(FEWEST_SLOTS, power_of_two(slots)), self.gpt.config.block_size)
        if not self.records:
            return self.make_cache(batch_size, slots)
        if not self.recorded or not self.recorded.has_room(batch_size, slots):
            self.recorded = None  # its memory is free for the next one
            cache = self.make_cache(batch_size, slots)
            self.recorded = graphs.RecordedSteps(cache, graphs.Recorder(self.device))
        return self.recorded.cache

    def make_cache(self, batch_size, slots):
        return KVCache(self.gpt.config, batch_size, slots, self.device, self.dtype)

    def sampler(self, sampling, batch_size, vocab_size):
        """A Sampler of the work that `sampling` asks for, before its `begin`."""
        work = Work.of(sampling, vocab_size, rounded=self.records)
        kind = self.kind_of_sampler(sampling, work)
        if not self.records:
            return kind(work, batch_size, vocab_size, self.device)
        kept = self.recorded.samplers
        if (kind, work, vocab_size) not in kept:
            kept[kind, work, vocab_size] = kind(work, batch_size, vocab_size, self.device)
        return kept[kind, work, vocab_size]

    def fill(self, cache, texts):
        """Prefill: make the cache hold the B lists of ids `texts`, and nothing else."""
        lengths = torch.tensor(list(map(len, texts)))
        longest = int(lengths.max())
        unique = list(dict.fromkeys(map(tuple, texts)))
        if longest and len(unique) < len(texts):  # several continuations of one prompt: it is read once
            once = self.make_cache(len(unique), longest)
            self.fill(once, unique)
            rows = torch.tensor([unique.index(tuple(text)) for text in texts], device=self.device)
            for layer, read in zip(cache.layers, once.layers, strict=True):
                layer.k[:, :longest] = read.k[rows, :longest]
                layer.v[:, :longest] = read.v[rows, :longest]
        elif longest:
            # Padding on the right: what it leaves in the cache lies past a row's length.
            idx = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])  # (B, T)
            cache.span = longest
            cache.length.zero_()
            with evaluating(self.gpt):
                self.gpt.hidden(idx.to(self.device), cache=cache)
        cache.length.copy_(lengths)

    def step(self, cache, tokens, length, sampler, *inputs):
        """
        One decoding step, tokens (B, 1) -> a tuple of the `sampler`'s tensors. `length` is the number of
        tokens in the longest row, the new one among them. The next step may overwrite the tensors, in the
        order of the device's work.
        """
        span = self.span_for(length)
        # In plain operations, attention is fused with what is around it.
        attention = sdpa_kernel(SDPBackend.MATH) if self.compiled else nullcontext()
        with evaluating(self.gpt), attention:
            if self.recorded and cache is self.recorded.cache:
                return self.recorded(self.decode, span, sampler, tokens, *inputs)
            cache.span = span
            return self.decode(cache, sampler, tokens, *inputs)
