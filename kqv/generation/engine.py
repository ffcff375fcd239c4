"""
How a GPT runs when it generates text: prefill, decoding, and what of them is compiled.

*Prefill* reads a prompt, all but its newest token, in one pass: large matrix products, limited by arithmetic.
*Decoding* reads one token to choose the next. For that every weight and every key and value in the cache is
read once: limited by the speed of memory. Both run the same `GPT.hidden`.

Shapes: B rows of text, T tokens, V vocabulary.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kqv.device import find_dtype, has_compiler
from kqv.generation.cpu_decoding import compiled_for_decoding
from model import KVCache

FEWEST_SLOTS = 1024  # of a cache where the model is compiled, if block_size is not less

COMPILE_FROM = 2000  # decoding steps from which compiling saves more time than it takes


def compiling_pays(batches, device, gpt, config):
    """Whether there are so many tokens to write that compiling saves more time than it takes."""
    if len(batches) * config.max_new_tokens < COMPILE_FROM:
        return False
    return device.type == "cuda" or (device.type == "cpu" and is_large(gpt) and has_compiler())


def is_large(gpt):
    """Whether the weights are larger than a CPU's caches, so that decoding waits for memory."""
    return gpt.num_parameters() > 16e6


def generation_dtype(name, device, gpt):
    """
    The precision of the weights. "auto" on a CPU is float32 for a small model, whose decoding does not wait
    for memory.
    """
    if name == "auto" and device.type == "cpu" and not is_large(gpt):
        return torch.float32
    return find_dtype(name, device)


def decode(gpt, cache, tokens, sampler, *inputs):
    """
    Read the newest token of each row, (B, 1) -> the tensors that `sampler` makes of the logits (B, V). A
    sampler returns -1 for a row whose logits are not finite. That is read as id 0 here, since the host may
    not have seen it yet.
    """
    return sampler(gpt(tokens.clamp(min=0), cache=cache)[:, 0].float(), *inputs)


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


def power_of_two(number):
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


class Engine:
    """
    Runs a GPT: plain, or compiled, which pays for many tokens. Dropout is off, also in training mode.

    Compiled on a GPU, prefill and decoding are CUDA graphs: one launch for all kernels of a step. A graph
    needs the same shapes and addresses again, so the slots of a cache and the lengths are rounded up to
    powers of two. Compiled on a CPU, only decoding differs.
    """

    def __init__(self, gpt, compiled=False):
        self.gpt = self.decoder = gpt
        self.device, self.dtype = gpt.transformer.ln_f.weight.device, gpt.transformer.ln_f.weight.dtype
        self.prefill, self.decode = gpt.hidden, decode
        self.use_cuda_graphs = compiled and self.device.type == "cuda"
        self.compile_for_cpu = compiled and self.device.type == "cpu"
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each shape
        if self.use_cuda_graphs:
            self.prefill, self.decode = (
                torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)
                for function in (self.prefill, self.decode)
            )
        elif self.compile_for_cpu:
            self.decoder = compiled_for_decoding(gpt)
        self.caches = {}

    def rounded(self, length):
        """The next length, from `length` to block_size, that there is a compiled shape for."""
        if self.compile_for_cpu:
            length = max(length, 2)  # one slot alone has no mask, which would be one more shape to compile
        elif self.use_cuda_graphs:
            length = max(256, power_of_two(length))
        return min(length, self.gpt.config.block_size)

    def new_cache(self, batch_size, slots):
        """An empty KVCache for texts of at most `slots` tokens."""
        if self.compile_for_cpu or self.use_cuda_graphs:
            # A compiler takes the shape of a cache for a constant, so there are few: a power of two.
            slots = max(FEWEST_SLOTS, power_of_two(slots))
        size = self.gpt.config, batch_size, slots, self.device, self.dtype
        if not self.use_cuda_graphs:
            return KVCache(*size)
        if (batch_size, slots) not in self.caches:  # kept for the next texts, since a graph knows addresses
            self.caches[batch_size, slots] = KVCache(*size)
        return self.caches[batch_size, slots]

    def fill(self, cache, texts):
        """Prefill: make the cache hold the B lists of ids `texts`, and nothing else."""
        lengths = torch.tensor(list(map(len, texts)))
        longest = int(lengths.max())
        unique = list(dict.fromkeys(map(tuple, texts)))
        if longest and len(unique) < len(texts):  # several continuations of one prompt: it is read once
            once = self.new_cache(len(unique), longest)
            self.fill(once, unique)
            rows = torch.tensor([unique.index(tuple(text)) for text in texts], device=self.device)
            for layer, read in zip(cache.layers, once.layers, strict=True):
                layer.k[:, :longest] = read.k[rows, :longest]
                layer.v[:, :longest] = read.v[rows, :longest]
        elif longest:
            # Padding on the right: what it leaves in the cache lies past a row's length.
            cache.span = length = self.rounded(longest)
            idx = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])  # (B, T)
            cache.length.zero_()
            self.run(self.prefill, idx.to(self.device), cache=cache)
        cache.length.copy_(lengths)

    def step(self, cache, tokens, length, sampler, *inputs):
        """
        One decoding step, tokens (B, 1) -> a tuple of the `sampler`'s tensors. `length` is the number of
        tokens in the longest row, the new one among them.
        """
        cache.span = self.rounded(length)
        # In plain operations, attention is fused with what is around it.
        with sdpa_kernel(SDPBackend.MATH) if self.compile_for_cpu else nullcontext():
            chosen = self.run(self.decode, self.decoder, cache, tokens, sampler, *inputs)
        if self.use_cuda_graphs:
            chosen = tuple(part.clone() for part in chosen)  # the next replay overwrites what it returned
        return chosen

    def run(self, function, *arguments, **options):
        if self.use_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with evaluating(self.gpt):
            return function(*arguments, **options)
