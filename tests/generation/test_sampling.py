"""Drawing against probabilities that are counted out, in NumPy and float64."""

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import probabilities

from kqv.errors import UsageError
from kqv.generation.sampling import PLAIN, Sampler, Sampling, Work, uniforms

LARGEST = torch.tensor(1.0 - 1e-6)  # of the numbers that `uniforms` gives


def sampler_of(sampling, texts, vocab_size, exempt=(), rounded=False):
    sampler = Sampler(Work.of(sampling, vocab_size, rounded), len(texts), vocab_size, "cpu")
    sampler.begin(sampling, texts, exempt)
    return sampler


def draw(logits, uniform, sampling, rounded=False):
    """logits (B, V), uniform (B, 1) -> ids (B, 1), whatever numbers the logits are."""
    return sampler_of(sampling, [[]] * len(logits), logits.size(-1), rounded=rounded).draw(logits, uniform)


def changed(**settings):
    """A Sampling that leaves the model's probabilities as they are, but for these settings."""
    return replace(PLAIN, **settings)


def test_uniforms_are_each_rows_own_for_ever_and_below_1(monkeypatch):
    numbers = np.concatenate([part.numpy() for part in islice(uniforms(3, [5, (2, 7)], "cpu"), 600)], axis=1)
    for row, found in zip([5, (2, 7)], numbers, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.random.default_rng((3, row)).random(600), rtol=2e-6)

    class Largest:
        def random(self, count):
            return np.full(count, 1 - 2**-53)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Largest())
    assert next(uniforms(0, [0], "cpu")).tolist() == [[LARGEST.item()]] and LARGEST < 1


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        Sampling(),
        changed(temperature=0.5),
        changed(temperature=2.0),
        changed(top_k=3),
        changed(top_k=100),
        changed(top_p=0.8),
        changed(min_p=0.25),
        changed(temperature=2.0, top_k=4),
        changed(temperature=2.0, top_p=0.7),
        changed(temperature=2.0, min_p=0.3),
        changed(top_k=4, top_p=0.85),  # of the four's probability
        changed(temperature=1.5, top_k=5, top_p=0.9, min_p=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("rounded", [False, True])
def test_draws_follow_the_probabilities_that_are_left(sampling, rounded):
    logits = np.array([0.3, -1.2, 2.0, 0.9, -0.4, 1.4])
    numbers = torch.cat(list(islice(uniforms(0, range(100), "cpu"), 200)))  # (20000, 1)
    ids = draw(torch.tensor(logits, dtype=torch.float32).expand(len(numbers), -1), numbers, sampling, rounded)
    counts = np.bincount(ids.flatten().numpy(), minlength=6)
    expected = probabilities(logits, sampling) * len(numbers)
    likely = expected > 0
    assert counts[~likely].sum() == 0 and likely.sum() > 1
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # mean and standard deviation of a chi-square


@settings(deadline=None, max_examples=300)
@given(
    # Eighths: two logits are the same in float32 too, or far enough apart.
    logits=st.lists(
        st.integers(-160, 160).map(lambda eighths: eighths / 8) | st.sampled_from([0.0, 1.0, -math.inf]),
        min_size=1,
        max_size=12,
    ).filter(lambda logits: max(logits) > -math.inf),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
        top_k=st.integers(0, 14),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
    ),
    uniform=st.floats(0, LARGEST.item(), width=32),
    rounded=st.booleans(),
)
@example(logits=[0.0, 0.0, -1.0, 1.0], sampling=changed(top_p=0.5), uniform=0.0, rounded=False)
def test_the_drawn_id_is_allowed_and_the_inverse_of_the_cumulative_distribution(
    logits, sampling, uniform, rounded
):
    drawn = draw(torch.tensor([logits]), torch.tensor([[uniform]]), sampling, rounded)
    assert drawn.shape == (1, 1) and drawn.dtype == torch.long
    loose = probabilities(logits, sampling, slack=1e-5)
    assert loose[drawn.item()] > 0
    # Where ties or a boundary leave no choice of what is kept, the id is given too, but for rounding.
    tight = probabilities(logits, sampling, slack=-1e-5)
    distinct = len(set(logits)) == len(logits) or not (sampling.top_k or sampling.top_p < 1)
    if distinct and ((loose > 0) == (tight > 0)).all():
        cdf = np.array([0, *loose.cumsum()])
        assert cdf[drawn.item()] - 1e-5 <= uniform <= cdf[drawn.item() + 1] + 1e-5


def test_one_sampler_serves_every_sampling_of_its_work():
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0))
    numbers = torch.rand(300, 1, generator=torch.Generator().manual_seed(1))
    texts = [[row % 50] for row in range(300)]
    one = sampler_of(changed(top_k=5, repetition_penalty=2.0), texts, 50, rounded=True)
    for sampling in (
        changed(top_k=8, repetition_penalty=1.5, temperature=0.3),
        changed(top_k=6, repetition_penalty=0.5, top_p=0.6),
        changed(top_k=7, repetition_penalty=3.0, min_p=0.4, temperature=2.0),
    ):
        assert Work.of(sampling, 50, rounded=True) == one.work
        one.begin(sampling, texts)
        own = sampler_of(sampling, texts, 50)  # which looks for the top_k alone
        for _ in range(3):
            assert one(logits, numbers)[0].equal(own(logits, numbers)[0])
    for other in (
        {"top_k": 9},
        {"top_k": 4},
        {"temperature": 0},
        {"logprobs": True},
        {"repetition_penalty": 1},
    ):
        assert Work.of(replace(sampling, **other), 50, rounded=True) != one.work


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-38, 1e-30, 1e-3, 1e30, 1e39, 1.7e308])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST.item()])
def test_draw_gives_possible_ids_whatever_the_size_of_logits_and_temperature(temperature, options, uniform):
    logits = torch.tensor(
        [[-3e9, 3e9, 0.0, 1.0], [-math.inf, 1e4, 5.0, -math.inf], [-math.inf, 1.0, 0.5, -1.0]]
    )
    ids = draw(logits, torch.full((3, 1), uniform), changed(temperature=temperature, **options)).flatten()
    assert ((0 <= ids) & (ids < 4)).all() and ids[1] in (1, 2) and ids[2] > 0
    if temperature < 1 or options == {"top_k": 1}:
        assert ids.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.999}, {"min_p": 1e-3}], ids=str)
def test_the_smallest_and_the_largest_number_draw_no_id_of_probability_zero(options):
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 20, 48, 49]] = -math.inf
    for number, end in ((torch.tensor(0.0), 0), (LARGEST, -1)):
        ids = draw(logits, number.expand(500, 1), changed(**options)).flatten()
        possible = [np.flatnonzero(probabilities(row, changed(**options))) for row in logits.numpy()]
        assert ids.tolist() == [some[end] for some in possible]


def test_min_p_1_keeps_all_of_the_likeliest_and_top_p_0_one():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0]]).expand(300, -1)
    numbers = torch.linspace(0, 0.99, 300)[:, None]
    ids = draw(logits, numbers, changed(min_p=1.0)).flatten()
    assert torch.bincount(ids).tolist()[1:] == pytest.approx([100, 0, 100, 100], abs=3)
    assert len(set(draw(logits, numbers, changed(top_p=0.0)).flatten().tolist()) & {1, 3, 4}) == 1


def test_at_a_boundary_the_fewest_tokens_are_kept_and_the_next_one_is_drawn():
    def counts(logits, sampling):
        ids = draw(torch.tensor([logits]).expand(8, -1), torch.arange(8)[:, None] / 8, sampling)
        return torch.bincount(ids.flatten(), minlength=len(logits)).tolist()

    assert counts([0.0, 0.0, 0.0, 0.0], PLAIN) == [2, 2, 2, 2]  # the numbers 0 and 1/8, 2/8 and 3/8, ...
    assert sorted(counts([0.0, 0.0, 0.0, 0.0], changed(top_p=0.5))) == [0, 0, 4, 4]
    assert counts([-math.inf, 0.0, -math.inf, 0.0], changed(top_p=0.75)) == [0, 4, 0, 4]


def test_the_repetition_penalty_is_its_formula_for_prompt_and_drawn_ids():
    sampler = sampler_of(changed(temperature=0, repetition_penalty=1.5), [[3], [0, 1, 2]], 4)
    logits = torch.tensor([[3.0, 2.5, 2.2, -1.0], [-1.0, -1.1, -4.0, -1.6]])
    drawn = [sampler(logits, None)[0].flatten().tolist() for _ in range(5)]
    # Row 0 goes through 3, 2.5, 2.2, and then the largest of what is left of them. Row 1 begins with
    # -1.5, -1.65, -6, -1.6, and then has all of them.
    assert drawn == [[0, 0], [1, 0], [2, 0], [0, 0], [0, 0]]
    sampler = sampler_of(changed(temperature=0, repetition_penalty=1.7), [[0, 1, 2]], 4)
    assert [sampler(logits[1:], None)[0].item() for _ in range(2)] == [3, 0]


def test_exempt_ids_are_not_penalised_nor_those_beyond_the_vocabulary_looked_up():
    sampling = changed(temperature=0, repetition_penalty=100.0)
    logits = torch.tensor([[3.0, 2.5, 2.2, 9.0]])
    sampler = sampler_of(sampling, [[0, 1, 3]], 3, exempt=[1, 3])
    assert [sampler(logits, None)[0].item() for _ in range(3)] == [1, 1, 1]
    sampler = sampler_of(sampling, [[0, 1, 3]], 3)
    assert [sampler(logits, None)[0].item() for _ in range(3)] == [2, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 90.0},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": math.inf},
    ],
    ids=str,
)
def test_settings_out_of_their_bounds_are_refused_from_python_too(options):
    ((name, _),) = options.items()
    with pytest.raises(UsageError, match=f"{name} is .*, but it must be at "):
        changed(**options)


@settings(deadline=None, max_examples=200)
@given(
    logits=st.lists(st.floats(-(2.0**96), 2.0**96, width=32), min_size=1, max_size=6),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 1.7e308),
        top_k=st.integers(0, 10**30),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(1e-9, 1e9),
        logprobs=st.booleans(),
    ),
    uniform=st.floats(0, LARGEST.item(), width=32),
)
def test_every_setting_within_its_bounds_draws_an_id_whatever_the_logits(logits, sampling, uniform):
    sampler = sampler_of(sampling, [[0]], len(logits))
    for _ in range(2):
        (drawn,), *_ = sampler(torch.tensor([logits]), torch.tensor([[uniform]]))
        assert 0 <= drawn.item() < len(logits)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "sampling", [PLAIN, Sampling(), changed(temperature=0, repetition_penalty=2.0)], ids=str
)
def test_a_row_whose_logits_are_not_finite_draws_no_id(wrong, sampling):
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 4)
    logits[1, 0] = wrong
    logits[2] = wrong
    logits[3, 3] = wrong  # of an id beyond the vocabulary
    ids = sampler_of(sampling, [[0]] * 4, 3)(logits, torch.full((4, 1), 0.5))[0].flatten().tolist()
    assert ids[1:3] == [-1, -1] and ids[0] == ids[3] >= 0
