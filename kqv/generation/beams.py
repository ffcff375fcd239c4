"""
Beam search: the likeliest continuations.

Shapes: P prompts, N beams, V vocabulary.
"""

import math
from typing import NamedTuple

import torch

from kqv.generation.stream import ContextWindow


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
    window = ContextWindow(engine, [text for text in texts for _ in range(beams)], max_new_tokens)
    alive = [[Hypothesis([], 0.0, 0.0)] for _ in texts]
    finished = [[] for _ in texts]
    for _ in range(max_new_tokens):
        if window.must_refill:
            tokens = window.refill()
        # Where fewer go on than there are rows, the rest of the rows can't be chosen.
        scores = [[h.logprob for h in some] + [-math.inf] * (beams - len(some)) for some in alive]
        chosen = window.step(tokens, extensions, torch.tensor(scores, device=engine.device), vocab_size)
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
            window.reorder(parents)
        window.texts = [[*window.texts[row], token] for row, token in zip(parents, newest, strict=True)]
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
