"""Beam search against a search that keeps nothing and never stops early, and against all texts there are."""

import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SHAPES, random_gpt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_models import gpt_of
from reference import log_softmax, next_logits, positions_read, texts_of

from kqv.generation.beams import beam_search
from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.generation.stream import generate


def plain_beams(
    gpt, text, max_new_tokens, beams, length_penalty=0.0, ends=lambda ids: False, vocab_size=None
):
    """Beam search that keeps nothing and never stops early: [(score, logprob, ids)], the highest first."""
    alive, finished = [(0.0, [])], []
    for _ in range(max_new_tokens):
        extended = []
        for logprob, ids in alive:
            after = log_softmax(next_logits(gpt, text + ids, len(text), vocab_size))
            extended += [(logprob + after[token], [*ids, token]) for token in range(len(after))]
        alive = []
        for logprob, ids in sorted(extended, reverse=True):
            if len(alive) < beams:
                (finished if ends(ids) else alive).append((logprob, ids))
    found = [
        (logprob / max(1, len(ids)) ** length_penalty, logprob, ids) for logprob, ids in finished + alive
    ]
    return sorted(found, reverse=True)[:beams]


def every_text(gpt, text, max_new_tokens, length_penalty, ends):
    """All continuations there are, the highest score first: [(score, logprob, ids)]."""
    found, going = [], [(0.0, [])]
    for _ in range(max_new_tokens):
        longer = []
        for logprob, ids in going:
            after = log_softmax(next_logits(gpt, text + ids, len(text)))
            longer += [(logprob + after[token], [*ids, token]) for token in range(len(after))]
        found += [(logprob, ids) for logprob, ids in longer if ends(ids)]
        going = [(logprob, ids) for logprob, ids in longer if not ends(ids)]
    found = [(logprob / len(ids) ** length_penalty, logprob, ids) for logprob, ids in found + going]
    return sorted(found, reverse=True)


def assert_found(found, expected):
    """
    Hypotheses are (score, log-probability, ids). Which of two with equal scores comes first, or is the last
    to be kept, is chance.
    """
    assert len(found) == len(expected)
    for one, (score, logprob, _) in zip(found, expected, strict=True):
        assert (one.score, one.logprob) == pytest.approx((score, logprob), abs=1e-4)
    scores = [score for score, _, _ in expected]
    scores += scores[-1:] if len(scores) > 1 else []  # so what is last always counts as tied
    for one, (score, _, ids) in zip(found, expected, strict=True):
        assert one.ids == ids or sum(abs(score - other) < 1e-6 for other in scores) > 1


def never(ids):
    return False


def at_id_2(ids):
    return ids[-1] == 2


@pytest.mark.parametrize("ends", [never, at_id_2])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("every_shape")
def test_enough_beams_find_the_likeliest_of_all_texts(count, length_penalty, ends):
    gpt = random_gpt(vocab_size=5, std=0.2)
    texts = [*texts_of(3, 1, 5, below=5), [4, 4, 4]]
    found = beam_search(Engine(gpt), texts, count, 5 ** (count - 1), length_penalty, ends)
    for text, hypotheses in zip(texts, found, strict=True):
        expected = every_text(gpt, text, count, length_penalty, ends)
        assert_found(hypotheses, expected[: 5 ** (count - 1)])


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    count=st.integers(0, 18),
    beams=st.integers(1, 5),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 1.5]),
    end=st.integers(-1, 6),
    seed=st.integers(0, 20),
    family=FAMILIES,
)
@example(lengths=[3, 8, 1], count=18, beams=3, length_penalty=0.6, end=-1, seed=0, family="gpt2")  # past 8
@example(lengths=[3, 8, 1], count=18, beams=3, length_penalty=1.0, end=2, seed=1, family="llama")
@example(lengths=[3, 8, 1], count=18, beams=3, length_penalty=0.6, end=2, seed=1, family="qwen3")
def test_beams_are_those_of_a_plain_search_for_each_text(
    lengths, count, beams, length_penalty, end, seed, family
):
    def ends(ids):
        return ids[-1] == end

    gpt = random_gpt(n_layer=1, vocab_size=7, std=0.25, seed=seed, **SHAPES[family]).double()
    texts = texts_of(*lengths, below=7)
    found = beam_search(Engine(gpt), texts, count, beams, length_penalty, ends)
    for text, hypotheses in zip(texts, found, strict=True):
        assert len(hypotheses) <= beams
        assert_found(hypotheses, plain_beams(gpt, text, count, beams, length_penalty, ends))


@pytest.mark.usefixtures("every_shape")
def test_one_beam_is_greedy():
    gpt, texts = random_gpt(), texts_of(1, 4, 8)
    greedy = generate(Engine(gpt), texts, 20, sampling=Sampling(temperature=0))
    found = beam_search(Engine(gpt), texts, 20, beams=1)
    assert [text + one.ids for text, (one,) in zip(texts, found, strict=True)] == greedy


def test_beam_search_for_no_tokens_gives_the_text_itself():
    assert beam_search(Engine(random_gpt()), texts_of(2, 3), 0, beams=3) == [[([], 0.0, 0.0)]] * 2


def test_where_everything_ends_the_search_ends():
    gpt = random_gpt()
    shapes = positions_read(gpt)
    found = beam_search(Engine(gpt), texts_of(4), 10, beams=3, ends=lambda ids: True)
    assert shapes == [(1, 3), (3, 1)]
    assert_found(found[0], [(p, p, ids) for _, p, ids in every_text(gpt, *texts_of(4), 1, 0.0, never)[:3]])


def test_the_search_ends_where_no_beam_can_catch_up():
    p = np.array([0.9, 0.06, 0.03, 0.01])  # of each id, always; 0 ends a text
    gpt = gpt_of(np.log(p))
    shapes = positions_read(gpt)
    # One beam: after the first end, of 0.9, the best that goes on has 0.06.
    (one,) = beam_search(Engine(gpt), [[1]], 10, beams=1, ends=lambda ids: ids[-1] == 0)
    assert len(shapes) == 1 and one[0].ids == [0]
    # Two: the second to end has 0.06 * 0.9, and the best that goes on 0.06 * 0.06.
    shapes.clear()
    (two,) = beam_search(Engine(gpt), [[1]], 10, beams=2, ends=lambda ids: ids[-1] == 0)
    assert len(shapes) == 2 and [hypothesis.ids for hypothesis in two] == [[0], [1, 0]]
    assert two[1].score == pytest.approx(math.log(0.06 * 0.9))
    # By the mean: t tokens of 0.06 may become 10, t log(0.06) / 10, which is below log(0.054) / 2 from 6 on.
    shapes.clear()
    beam_search(Engine(gpt), [[1]], 10, beams=2, length_penalty=1.0, ends=lambda ids: ids[-1] == 0)
    assert len(shapes) == 6
    # A text whose search is over waits for the others.
    shapes.clear()
    both = beam_search(Engine(gpt), [[1], [2, 3]], 5, 2, ends=lambda ids: ids[-1] == 0)
    assert both == [two, two] and len(shapes) == 1 + 2


def test_ids_from_vocab_size_on_are_never_chosen():
    gpt = random_gpt()
    with torch.no_grad():
        gpt.lm_head.weight[5:] *= 10  # the padding's ids would be the likeliest
    texts = texts_of(1, 3, 1, 8, below=5)
    for text, found in zip(texts, beam_search(Engine(gpt), texts, 12, beams=6, vocab_size=5), strict=True):
        assert_found(found, plain_beams(gpt, text, 12, beams=6, vocab_size=5))
    assert beam_search(Engine(gpt), [[0]], 3, beams=2, vocab_size=1) == [[([0, 0, 0], 0.0, 0.0)]]


def test_what_is_no_text_or_no_search_is_refused():
    engine = Engine(random_gpt())
    with pytest.raises(ValueError, match="text 1 has no token"):
        beam_search(engine, texts_of(3, 0), 1, beams=2)
    with pytest.raises(TypeError, match="text 0 is 'abc'"):
        beam_search(engine, ["abc"], 1, beams=2)
    with pytest.raises(ValueError, match="beams is 0"):
        beam_search(engine, texts_of(3), 1, beams=0)
    assert beam_search(engine, [], 1, beams=2) == []


def test_of_a_text_longer_than_the_context_the_end_is_read():
    engine, texts = Engine(random_gpt()), texts_of(3, 20)
    expected = beam_search(engine, [texts[0], texts[1][-8:]], 12, beams=3)
    for found, wanted in zip(beam_search(engine, texts, 12, beams=3), expected, strict=True):
        assert_found(found, [(one.score, one.logprob, one.ids) for one in wanted])


def test_a_search_records_no_gradients_and_leaves_them_on_and_the_texts_as_they_were():
    gpt, texts, recorded = random_gpt(), texts_of(3, 5), []
    gpt.lm_head.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    beam_search(Engine(gpt), texts, 2, beams=2)
    assert torch.is_grad_enabled() and recorded and not any(recorded) and texts == texts_of(3, 5)


def test_no_power_of_a_length_overflows():
    ((one,),) = beam_search(Engine(random_gpt()), [[0]], 20, beams=1, length_penalty=400.0)
    assert len(one.ids) == 20 and one.score == 0 > one.logprob
