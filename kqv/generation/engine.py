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
import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import KVCache

TOP = 5  # how many alternatives are reported with log-probabilities


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's probabilities; the defaults leave them as they are."""

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # among the k likeliest; 0: all
    top_p: float = 1.0  # among the likeliest that together have probability top_p (Holtzman et al. 2019)
    min_p: float = 0.0  # among those with min_p times the likeliest one's probability (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides the odds of tokens that are in the text (Keskar et al. 2019)
    logprobs: bool = False  # report log-probabilities


def draw(logits, uniform, sampling):
    """
    One id for each row: logits (B, V) and numbers from [0, 1) (B, 1) -> (B, 1).

    Top-k, top-p and min-p each keep the first few tokens of a ranking by probability. The draw walks through
    those in the order of their ids (where rounding can't swap two that are equally likely) until their
    probabilities add up to the row's number: the inverse of the cumulative distribution. That number is all
    the chance there is, so a row's text does not depend on the rows beside it.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # the largest is 0: no temperature makes it overflow
    logits = logits / max(sampling.temperature, 1e-30)  # below that, 1/temperature is no float32
    ids = None  # all of them, in order
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        k = min(sampling.top_k or logits.size(-1), logits.size(-1))
        logits, ids = logits.topk(k)  # (B, V) -> (B, k), the likeliest first
        p = F.softmax(logits, dim=-1)
        before = p.cumsum(dim=-1) - p  # what the likelier ones have together; 0 for the first, which stays
        p = p * ((before < max(sampling.top_p, 1e-30)) & (p >= min(sampling.min_p, 1) * p[:, :1]))
        ids, order = ids.sort(dim=-1)
        p = p.gather(1, order)
    else:
        p = F.softmax(logits, dim=-1)  # (B, V)
    cdf = p.cumsum(dim=-1)
    reached = (cdf > uniform * cdf[:, -1:]) & (p > 0)  # True from the drawn one on
    choice = reached.int().argmax(dim=-1, keepdim=True)  # the first True
    return choice if ids is None else ids.gather(1, choice)


class Sampler(nn.Module):
    """From logits to the next tokens, with what a row's past has to do with it."""

    def __init__(self, sampling, texts, vocab_size, device):
        super().__init__()
        self.sampling, self.vocab_size = sampling, vocab_size
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
            for row, text in zip(seen, texts, strict=True):
                row[text] = True
        self.register_buffer("seen", seen)  # (B, V): the ids in each row's text

    def forward(self, logits, uniform):
        """logits (B, V), uniform (B, 1) -> ids (B, 1); with logprobs (B, 1), top ids (B, 5) and theirs."""
        logits = scores = logits[:, : self.vocab_size]
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self.seen, penalised, scores)
        ids = draw(scores, uniform, self.sampling)
        if self.seen is not None:
            self.seen.scatter_(1, ids, True)
        if not self.sampling.logprobs:
            return (ids,)
        logprobs = logits.log_softmax(dim=-1)  # the model's own, whatever the settings made of them
        top, top_ids = logprobs.topk(min(TOP, logprobs.size(-1)))
        return ids, logprobs.gather(1, ids), top_ids, top


def uniforms(seed, rows, device):
    """Numbers from [0, 1) for ever, as tensors (B, 1): row r's are a function of (seed, rows[r]) alone."""
    generators = [np.random.default_rng((seed, row)) for row in rows]
    while True:
        numbers = np.stack([generator.random(256) for generator in generators], axis=1)  # (256, B)
        # The factor keeps the largest number below 1 after rounding to float32.
        yield from torch.from_numpy(numbers * (1 - 1e-6)).float()[:, :, None].to(device, non_blocking=True)


# How the model runs


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


class Reader:
    """
    B texts, and how far the model has read them. It sees each through a window of at most block_size tokens,
    whose keys and values are in the cache.

    When a window is full, the oldest quarter is forgotten and the rest read again. (A key holds its token's
    position, so the kept keys can't be moved along.)
    """

    def __init__(self, engine, texts, max_new_tokens):
        block_size = engine.gpt.config.block_size
        for text in texts:
            if not 1 <= len(text) <= block_size:
                raise ValueError(
                    f"the prompt has {len(text)} tokens, but 1 to block_size={block_size} can be read"
                )
        self.engine, self.block_size = engine, block_size
        self.texts = [list(text) for text in texts]
        self.first = [0] * len(texts)  # where each window begins
        # Tokens of each row in the cache: full, so that the windows are read first.
        self.read = [block_size] * len(texts)
        slots = min(block_size, max(map(len, texts)) + max_new_tokens)
        self.cache = engine.new_cache(len(texts), slots)

    @property
    def full(self):
        """Whether a row has no slot left for another token."""
        return max(self.read) >= self.block_size

    def refill(self):
        """Read all windows, all but their newest token; returns that, (B, 1). `texts` must be up to date."""
        keep = self.block_size - max(1, self.block_size // 4)
        for row, text in enumerate(self.texts):
            if len(text) - self.first[row] > self.block_size:
                self.first[row] = len(text) - keep
        windows = [text[first:-1] for text, first in zip(self.texts, self.first, strict=True)]
        self.read = list(map(len, windows))
        self.engine.fill(self.cache, windows)
        return torch.tensor([text[-1:] for text in self.texts], device=self.engine.device)

    def step(self, tokens, choose, *inputs):
        """Read one more token of each row, (B, 1), and choose what comes next: `choose`'s tensors."""
        self.read = [count + 1 for count in self.read]
        return self.engine.step(self.cache, tokens, max(self.read), choose, *inputs)

    def reorder(self, rows):
        """Let row b go on from what row rows[b] has read; the two must be of one length."""
        index = torch.tensor(rows, device=self.engine.device)
        for layer in self.cache.layers:
            for kept in (layer.k, layer.v):  # (B, slots, C)
                kept[:, : max(self.read)] = kept[index, : max(self.read)]


# Sampling


class Drawn(NamedTuple):
    """What one step drew, a list of B entries each; the last three are there with `logprobs` alone."""

    ids: list
    logprobs: list = None
    top_ids: list = None
    top_logprobs: list = None


@torch.no_grad()
def stream(engine, texts, max_new_tokens, sampling=Sampling(), seed=0, rows=None, vocab_size=None):
    """
    Continue B texts, lists of ids: an iterator of max_new_tokens steps, each a Drawn.

    Row b draws by (seed, rows[b]), by default (seed, b), and ids from `vocab_size` on are never drawn. Raises
    ValueError where a text has no token or more than block_size.
    """
    reader = Reader(engine, texts, max_new_tokens)
    sampler = Sampler(sampling, texts, vocab_size or engine.gpt.config.vocab_size, engine.device)
    numbers = uniforms(seed, range(len(texts)) if rows is None else rows, engine.device)
    ahead = 1 if engine.device.type == "cuda" else 0  # steps that the device may be ahead of the reader
    flying = deque()

    def landed():
        drawn = flying.popleft()()
        for text, token in zip(reader.texts, drawn.ids, strict=True):
            text.append(token)
        return drawn

    for _ in range(max_new_tokens):
        if reader.full:
            while flying:
                yield landed()
            tokens = reader.refill()
        chosen = reader.step(tokens, sampler, next(numbers))
        tokens = chosen[0]
        flying.append(on_the_way(chosen))
        if len(flying) > ahead:
            yield landed()
    while flying:
        yield landed()


def on_the_way(chosen):
    """
    A function that returns the tensors as a Drawn. Their copy to the host begins now; the function waits for
    this step alone, not for those after it.
    """
    if chosen[0].device.type == "cuda":
        chosen = [part.to("cpu", non_blocking=True) for part in chosen]
        done = torch.cuda.Event()
        done.record()
    else:
        done = None

    def arrived():
        if done:
            done.synchronize()
        ids, *report = (part.tolist() for part in chosen)
        ids = [row[0] for row in ids]
        if not report:
            return Drawn(ids)
        return Drawn(ids, [row[0] for row in report[0]], *report[1:])

    return arrived


def generate(engine, texts, max_new_tokens, **options):
    """The texts, lists of ids, with max_new_tokens more each. The options are those of `stream`."""
    texts = [list(text) for text in texts]
    for drawn in stream(engine, texts, max_new_tokens, **options):
        for text, token in zip(texts, drawn.ids, strict=True):
            text.append(token)
    return texts


# Beam search


class Hypothesis(NamedTuple):
    """A continuation that a beam search found."""

    ids: list
    logprob: float  # of all its tokens together
    score: float  # logprob / len(ids) ** length_penalty


@torch.no_grad()
def beam_search(
    engine, texts, max_new_tokens, beams, length_penalty=0.0, ends=lambda ids: False, vocab_size=None
):
    """
    The likeliest continuations of each of P texts, lists of ids: P lists of up to `beams` Hypotheses, the
    highest score first.

    Of all continuations by one more token, the `beams` likeliest go on; one is finished where `ends(ids)`
    says so, or after max_new_tokens. A longer text is less likely, which dividing by a power of its length
    makes up for (Wu et al. 2016, section 7). The search ends where no beam can catch up with those finished.
    """
    vocab_size = vocab_size or engine.gpt.config.vocab_size
    reader = Reader(engine, [text for text in texts for _ in range(beams)], max_new_tokens)
    alive = [[Hypothesis([], 0.0, 0.0)] for _ in texts]
    finished = [[] for _ in texts]
    for _ in range(max_new_tokens):
        if reader.full:
            tokens = reader.refill()
        # Where fewer go on than there are rows, the rest of the rows can't be chosen.
        scores = [[h.logprob for h in some] + [-math.inf] * (beams - len(some)) for some in alive]
        chosen = reader.step(tokens, extensions, torch.tensor(scores, device=engine.device), vocab_size)
        parents, newest = [], []
        for number, (logprobs, indices) in enumerate(zip(*(part.tolist() for part in chosen), strict=True)):
            going = []  # (the beam that it extends, hypothesis)
            for logprob, index in zip(logprobs, indices, strict=True):
                if logprob == -math.inf or len(going) == beams:
                    break
                beam, token = divmod(index, vocab_size)
                ids = [*alive[number][beam].ids, token]
                hypothesis = Hypothesis(ids, logprob, logprob / len(ids) ** length_penalty)
                if ends(ids):
                    finished[number].append(hypothesis)
                else:
                    going.append((beam, hypothesis))
            finished[number] = best(finished[number], beams)
            if going and len(finished[number]) == beams:
                reachable = going[0][1].logprob / max_new_tokens**length_penalty
                if reachable <= finished[number][-1].score:
                    going = []
            alive[number] = [hypothesis for _, hypothesis in going]
            for row in range(beams):
                beam, token = (going[row][0], going[row][1].ids[-1]) if row < len(going) else (row, 0)
                parents.append(number * beams + beam)
                newest.append(token)
        if not any(alive):
            break
        if parents != list(range(len(parents))):
            reader.reorder(parents)
        reader.texts = [[*reader.texts[row], token] for row, token in zip(parents, newest, strict=True)]
        tokens = torch.tensor(newest, device=engine.device)[:, None]  # (P N, 1)
    return [best(ended + some, beams) for ended, some in zip(finished, alive, strict=True)]


def extensions(logits, scores, vocab_size):
    """
    logits (P N, V) and the beams' log-probabilities (P, N) -> for each prompt the 2N likeliest continuations
    of its beams by a token, since half of them may end there: log-probabilities (P, 2N), beam * vocab_size +
    id.
    """
    P, N = scores.shape
    logprobs = logits[:, :vocab_size].log_softmax(dim=-1).view(P, N, vocab_size)
    return (scores[:, :, None] + logprobs).flatten(1).topk(min(2 * N, N * vocab_size))


def best(hypotheses, count):
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:count]
