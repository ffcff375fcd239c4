"""
Generation token by token: B texts grow by one token in each step.

Sampling stays on the device, so that nothing waits for the host between two steps.
"""

import operator
from collections import deque
from typing import NamedTuple

import torch

from kqv.generation.sampling import PLAIN, not_finite, uniforms


def lists_of_ids(texts, vocab_size):
    """
    Texts as a user of Python gives them, lists, arrays or tensors (T,) of ids -> lists of ids. Raises
    TypeError for what is not a list of ids, ValueError for a text without a token or with an id that the
    model does not know.
    """
    found = []
    for number, text in enumerate(texts):
        try:
            # Neither a list of characters nor a number is a text: of those, operator.index raises TypeError.
            ids = list(map(operator.index, text.tolist() if hasattr(text, "tolist") else text))
        except TypeError:
            shown = repr(text) if len(repr(text)) <= 40 else f"{repr(text)[:40]}..."
            raise TypeError(
                f"each text must be a list of ids, but text {number} is {shown}: encode it first, "
                "generate(engine, [tokenizer.encode(text)], ...)"
            ) from None
        if not ids:
            raise ValueError(f"text {number} has no token, but the model continues at least one")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(id for id in ids if not 0 <= id < vocab_size)
            raise ValueError(
                f"text {number} has the id {wrong}, but the model knows ids from 0 to {vocab_size - 1}"
            )
        found.append(ids)
    return found


class ContextWindow:
    """
    B texts, lists of ids, and how much of them is in the cache. The model sees the last tokens of each text,
    at most block_size of them.

    When a window is full, its oldest quarter is dropped and the rest is read again. (A key holds its token's
    position, so the keys in the cache can't be moved along.)
    """

    def __init__(self, engine, texts, max_new_tokens):
        block_size = engine.gpt.config.block_size
        self.engine, self.block_size = engine, block_size
        self.texts = [list(text) for text in texts]
        self.window_start = [max(0, len(text) - block_size) for text in texts]  # of each row, in tokens
        self.n_cached = 0  # the tokens of the longest row in the cache
        self.mark = object()  # lies in the cache while it holds these texts
        slots = min(block_size, max(map(len, texts)) + max_new_tokens)
        self.cache = engine.new_cache(len(texts), slots)

    @property
    def must_refill(self):
        """Whether the cache holds other texts, as at the beginning, or a row has no slot left for a token."""
        return getattr(self.cache, "mark", None) is not self.mark or self.n_cached >= self.block_size

    def refill(self):
        """Read all of the windows but their newest tokens; returns those, (B, 1)."""
        keep = self.block_size - max(1, self.block_size // 4)
        for row, text in enumerate(self.texts):
            if len(text) - self.window_start[row] > self.block_size:
                self.window_start[row] = len(text) - keep
        windows = [text[start:-1] for text, start in zip(self.texts, self.window_start, strict=True)]
        self.engine.fill(self.cache, windows)
        self.n_cached, self.cache.mark = max(map(len, windows)), self.mark
        return torch.tensor([text[-1:] for text in self.texts], device=self.engine.device)

    def step(self, tokens, sampler, *inputs):
        """Read one more token of each row, (B, 1) -> what `sampler` chooses to come next: its tensors."""
        self.n_cached += 1
        return self.engine.step(self.cache, tokens, self.n_cached, sampler, *inputs)

    def reorder(self, rows):
        """Let row b go on from what is in the cache of row rows[b]; the two must have the same length."""
        index = torch.tensor(rows, device=self.engine.device)
        for layer in self.cache.layers:
            for kept in (layer.k, layer.v):  # (B, slots, nkv, hs)
                kept[:, : self.n_cached] = kept[index, : self.n_cached]


class Drawn(NamedTuple):
    """What one step drew, a list of B entries each; the last three are there with `logprobs` alone."""

    ids: list
    logprobs: list = None
    top_ids: list = None
    top_logprobs: list = None


@torch.no_grad()
def stream(engine, texts, max_new_tokens, sampling=PLAIN, seed=0, rows=None, vocab_size=None, exempt=()):
    """
    Continue B texts, lists of ids: an iterator of max_new_tokens steps, each a Drawn. Of a text that is
    longer than block_size, the model reads the end.

    Row b draws by (seed, rows[b]), by default (seed, b). Ids from `vocab_size` on are never drawn, and the
    ids `exempt` are free of the repetition penalty. On a GPU the host is a few tokens behind: it looks at one
    while the device computes those after it. Raises TypeError and ValueError as `lists_of_ids`, and
    UserError where the model's logits are not finite.
    """
    texts = lists_of_ids(texts, engine.gpt.config.vocab_size)
    rows = range(len(texts)) if rows is None else rows
    if len(rows) != len(texts):
        raise ValueError(f"there are {len(texts)} texts, but {len(rows)} rows to draw by")
    if not texts:
        return
    window = ContextWindow(engine, texts, max_new_tokens)
    sampler = engine.sampler(sampling, len(texts), vocab_size or engine.gpt.config.vocab_size)
    numbers = uniforms(seed, rows, engine.device)
    pending = deque()  # steps whose tokens the host has not looked at

    def pop_drawn():
        drawn = pending.popleft()()
        if min(drawn.ids) < 0:
            raise not_finite()
        for text, token in zip(window.texts, drawn.ids, strict=True):
            text.append(token)
        return drawn

    for _ in range(max_new_tokens):
        if window.must_refill:
            while pending:
                yield pop_drawn()
            tokens = window.refill()
            sampler.begin(sampling, window.texts, exempt)
        chosen = window.step(tokens, sampler, next(numbers))
        tokens = chosen[0]
        pending.append(copy_to_host(chosen))
        if len(pending) > engine.ahead:
            yield pop_drawn()
    while pending:
        yield pop_drawn()


def copy_to_host(chosen):
    """
    A function that returns the tensors as a Drawn. Their copy to the host begins now; the function waits for
    this step alone, not for those after it.
    """
    done, device = None, chosen[0].device
    if device.type == "cuda":
        chosen = [part.to("cpu", non_blocking=True) for part in chosen]  # into pinned memory
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))

    def drawn():
        if done:
            done.synchronize()
        ids, *report = (part.tolist() for part in chosen)
        ids = [row[0] for row in ids]
        if not report:
            return Drawn(ids)
        return Drawn(ids, [row[0] for row in report[0]], *report[1:])

    return drawn


def generate(engine, texts, max_new_tokens, **options):
    """
    The texts, lists of ids, with max_new_tokens more each. The options and the errors are those of `stream`.
    """
    texts = lists_of_ids(texts, engine.gpt.config.vocab_size)
    for drawn in stream(engine, texts, max_new_tokens, **options):
        for text, token in zip(texts, drawn.ids, strict=True):
            text.append(token)
    return texts
