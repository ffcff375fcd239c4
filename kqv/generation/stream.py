"""Token by token: texts that are continued until there are enough tokens."""

from collections import deque
from typing import NamedTuple

import torch

from kqv.generation.sampling import Sampler, Sampling, uniforms

PLAIN = Sampling()


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


class Drawn(NamedTuple):
    """What one step drew, a list of B entries each; the last three are there with `logprobs` alone."""

    ids: list
    logprobs: list = None
    top_ids: list = None
    top_logprobs: list = None


@torch.no_grad()
def stream(engine, texts, max_new_tokens, sampling=PLAIN, seed=0, rows=None, vocab_size=None):
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
