"""
Text from a GPT: tokens drawn one after another, or searched for with beams.

Writing has two parts with costs of their own. *Prefill* reads all of a text but its newest token at once:
large matrix products, limited by arithmetic. *Decoding* reads one token to make the next, and for that moves
every weight and every kept key and value once through the processor: limited by memory. Both are
`GPT.forward`. No step of drawing waits for the device: what depends on the drawn numbers stays there, and the
host looks at a token while the device makes the next.

Shapes: B rows of text, V vocabulary, N beams.
"""

import copy
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kqv.device import find_dtype, has_compiler
from model import KVCache

COMPILE_FROM = 2000  # decoding steps from which compiling has paid for itself


def compiling_pays(batches, device, gpt, config):
    """Whether so much is to be written that compiling saves more time than it takes."""
    if len(batches) * config.max_new_tokens < COMPILE_FROM:
        return False
    return device.type == "cuda" or (device.type == "cpu" and is_large(gpt) and has_compiler())


def is_large(gpt):
    """Whether a model is too large for the caches of a CPU, which then waits for its weights from memory."""
    return gpt.num_parameters() > 16e6


def generation_dtype(name, device, gpt):
    """
    The precision of the weights. "auto" on a CPU: float32 for a small model, whose tokens wait for no memory.
    """
    if name == "auto" and device.type == "cpu" and not is_large(gpt):
        return torch.float32
    return find_dtype(name, device)


class MatVec(nn.Linear):
    """
    A Linear that spells out the product of its matrix with one vector.

    A compiler makes that one pass over the weights at the speed of memory; the BLAS of some CPUs takes twice
    as long.
    """

    def forward(self, x):
        if x.numel() > self.in_features:
            return super().forward(x)
        y = (self.weight.float() * x.float().reshape(-1)).sum(dim=-1)  # (out, in) -> (out,)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def twin_for_one_token(gpt):
    """A GPT on the same weights, compiled for decoding on a CPU. All blocks share one compilation."""
    twin = copy.deepcopy(gpt, {id(parameter): parameter for parameter in gpt.parameters()})
    for module in twin.modules():
        if type(module) is nn.Linear:
            module.__class__ = MatVec
    # What a matrix is multiplied with is computed once, not anew for each of its rows.
    options = {"realize_reads_threshold": 1, "realize_opcount_threshold": 1}
    for module in (*twin.transformer.h, twin.lm_head):
        module.compile(fullgraph=True, dynamic=True, options=options)
    return twin


def decode(gpt, cache, tokens, span, choose, *inputs):
    """Read the newest token of each row, (B, 1), and choose the next from the logits: `choose`'s tensors."""
    logits = gpt(tokens, cache=cache, span=span)
    cache.length.add_(1)
    return choose(logits[:, 0].float(), *inputs)


class Engine:
    """
    How a GPT runs: plain, or compiled for many tokens.

    Compiled on a GPU, prefill and decoding are CUDA graphs: one launch for all kernels of a step, for which
    shapes must repeat. So the cache always has block_size slots, and lengths are rounded up to powers of two.
    Compiled on a CPU, only decoding differs.
    """

    def __init__(self, gpt, compiled=False):
        self.gpt = self.decoder = gpt
        self.device, self.dtype = gpt.lm_head.weight.device, gpt.lm_head.weight.dtype
        self.prefill, self.decode = gpt.forward, decode
        self.graphs = compiled and self.device.type == "cuda"
        self.by_formula = compiled and self.device.type == "cpu"
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each shape
        if self.graphs:
            self.prefill, self.decode = (
                torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)
                for function in (self.prefill, self.decode)
            )
        elif self.by_formula:
            self.decoder = twin_for_one_token(gpt)
        self.caches = {}

    def rounded(self, length):
        """A length that the engine has a shape for, at least `length` and at most block_size."""
        if not self.graphs:
            return length
        return min(max(256, 1 << (length - 1).bit_length()), self.gpt.config.block_size)

    def new_cache(self, batch_size, slots):
        if self.by_formula:
            slots = None  # block_size: the compiler takes the shape of a cache for a constant
        if not self.graphs:
            return KVCache(self.gpt.config, batch_size, slots, self.device, self.dtype)
        if batch_size not in self.caches:  # kept for the next texts, since a graph knows addresses
            self.caches[batch_size] = KVCache(self.gpt.config, batch_size, None, self.device, self.dtype)
        return self.caches[batch_size]

    def fill(self, cache, texts):
        """Prefill: make the cache hold the B lists `texts`, from their first tokens on."""
        lengths = torch.tensor(list(map(len, texts)))
        longest = int(lengths.max())
        unique = list(dict.fromkeys(map(tuple, texts)))
        if longest and len(unique) < len(texts):  # many continuations of a prompt: it is read once
            once = self.new_cache(len(unique), longest)
            self.fill(once, unique)
            rows = torch.tensor([unique.index(tuple(text)) for text in texts], device=self.device)
            for layer, read in zip(cache.layers, once.layers, strict=True):
                layer.k[:, :longest] = read.k[rows, :longest]
                layer.v[:, :longest] = read.v[rows, :longest]
        elif longest:
            length = self.rounded(longest)
            idx = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])  # (B, T)
            cache.length.zero_()
            self.run(self.prefill, idx.to(self.device), cache=cache)
        cache.length.copy_(lengths)

    def step(self, cache, tokens, span, choose, *inputs):
        """One decoding step, (B, 1) tokens -> tuple of `choose`'s tensors."""
        # In plain operations, attention is fused with what is around it.
        with sdpa_kernel(SDPBackend.MATH) if self.by_formula else nullcontext():
            chosen = self.run(self.decode, self.decoder, cache, tokens, self.rounded(span), choose, *inputs)
        if self.graphs:
            chosen = tuple(part.clone() for part in chosen)  # the next replay overwrites what it returned
        return chosen

    def run(self, function, *arguments, **options):
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return function(*arguments, **options)
