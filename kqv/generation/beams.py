"""
Beam search: the likeliest continuations.

Shapes: P prompts, N beams, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kqv.generation.sampling import are_finite, not_finite
from kqv.generation.stream import ContextWindow, lists_of_ids
from kqv.settings import setting


@dataclass(frozen=True)
class BeamSettings:
    """Beam search instead of drawing"""

    beams: int = setting(0, "how many continuations to follow at once; 0: draw", at_least=0, below=2**31)
    length_penalty: float = setting(
        0.0, "divide log-probabilities by length to this power", at_least=0.0, at_most=10.0
    )


class Hypothesis(NamedTuple):
    """A continuation that a beam search found."""

    ids: list
    logprob: float  # of all its tokens together
    score: float  # logprob / len(ids) ** length_penalty


def score_of(logprob, length, length_penalty):
    """The score of a hypothesis. As a product, because a large power of the length is no float."""
    return logprob * length**-length_penalty


@torch.no_grad()
def beam_search(
    engine, texts, max_new_tokens, beams, length_penalty=0.0, ends=lambda ids: False, vocab_size=None
):
    """
    The likeliest continuations of each of P texts, lists of ids: P lists of at most `beams` Hypotheses, the
    highest score first.

    At each step the `beams` likeliest extensions of a text by one token are kept. A hypothesis is finished
    where `ends(ids)` is true, or after max_new_tokens. Its score is its log-probability divided by
    length ** length_penalty, because longer texts are less likely (Wu et al. 2016, section 7). The search of
    a text stops early when no kept beam can reach the score of the finished ones. Ids from vocab_size on are
    never chosen; of a text that is longer than block_size, the model reads the end. Raises the errors of
    `stream`, and ValueError for less than one beam.
    """
    if beams < 1:
        raise ValueError(f"beams is {beams}, but a search follows at least one")
    vocab_size = vocab_size or engine.gpt.config.vocab_size
    texts = lists_of_ids(texts, engine.gpt.config.vocab_size)
    if not texts:
        return []
    window = ContextWindow(engine, [text for text in texts for _ in range(beams)], max_new_tokens)
    alive = [[Hypothesis([], 0.0, 0.0)] for _ in texts]
    finished = [[] for _ in texts]
    for _ in range(max_new_tokens):
        if window.must_refill:
            tokens = window.refill()
        # A text with fewer than N beams has rows without one: at -inf their extensions are never chosen.
        scores = [[h.logprob for h in some] + [-math.inf] * (beams - len(some)) for some in alive]
        found = window.step(tokens, extensions, torch.tensor(scores, device=engine.device), vocab_size)
        parents, newest = [], []  # of each row: the row that it continues, and its next token
        for number, candidates in enumerate(zip(*(part.tolist() for part in found), strict=True)):
            kept, ended = extend(alive[number], *candidates, beams, vocab_size, length_penalty, ends)
            finished[number] = best(finished[number] + ended, beams)
            if kept and len(finished[number]) == beams:
                reachable = score_of(kept[0][1].logprob, max_new_tokens, length_penalty)
                if reachable <= finished[number][-1].score:
                    kept = []
            alive[number] = [hypothesis for _, hypothesis in kept]
            for row in range(beams):
                beam, token = (kept[row][0], kept[row][1].ids[-1]) if row < len(kept) else (row, 0)
                parents.append(number * beams + beam)
                newest.append(token)
        if not any(alive):
            break
        if parents != list(range(len(parents))):
            window.reorder(parents)
        window.texts = [[*window.texts[row], token] for row, token in zip(parents, newest, strict=True)]
        tokens = torch.tensor(newest, device=engine.device)[:, None]  # (P N, 1)
    return [best(ended + some, beams) for ended, some in zip(finished, alive, strict=True)]


def extend(hypotheses, logprobs, indices, beams, vocab_size, length_penalty, ends):
    """
    The beams of one text after one more token, from its row of what `extensions` gives: (those that go on,
    at most `beams` of [(beam that is extended, Hypothesis)], and those that ended, [Hypothesis]).
    """
    kept, ended = [], []
    for logprob, index in zip(logprobs, indices, strict=True):
        if math.isnan(logprob):
            raise not_finite()
        if logprob == -math.inf or len(kept) == beams:
            break
        beam, token = divmod(index, vocab_size)
        ids = [*hypotheses[beam].ids, token]
        hypothesis = Hypothesis(ids, logprob, score_of(logprob, len(ids), length_penalty))
        if ends(ids):
            ended.append(hypothesis)
        else:
            kept.append((beam, hypothesis))
    return kept, ended


def extensions(logits, scores, vocab_size):
    """
    The 2N likeliest extensions of each prompt's beams by a token; 2N, because N of them may end their text.

    logits (P N, V), the beams' log-probabilities (P, N) -> log-probabilities (P, 2N), the likeliest first,
    and indices (P, 2N): beam * vocab_size + id. Of a vocabulary of one id there are N, not 2N. Of logits that
    are not finite, the log-probabilities are NaN, and come first.
    """
    P, N = scores.shape
    logits = logits[:, :vocab_size]
    logprobs = torch.where(are_finite(logits), logits.log_softmax(dim=-1), math.nan).view(P, N, vocab_size)
    return (scores[:, :, None] + logprobs).flatten(1).topk(min(2 * N, N * vocab_size))


def best(hypotheses, count):
    """The `count` hypotheses of the highest score, in that order."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:count]
