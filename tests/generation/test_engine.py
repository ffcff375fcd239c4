"""generate.py against plain loops that keep nothing and sets that are counted out, in NumPy and float64."""

import math
import shutil
from itertools import islice, product

import numpy as np
import pytest
import torch
from conftest import logits_of, random_gpt, random_ids
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from kqv.generation.beams import beam_search
from kqv.generation.engine import Engine, MatVec
from kqv.generation.sampling import PLAIN, Sampler, Sampling, draw, uniforms
from kqv.generation.stream import ContextWindow, generate, stream

MODES = {
    "greedy": Sampling(temperature=0),
    "plain": PLAIN,
    "temperature": Sampling(temperature=1.7),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.2),
    "repetition_penalty": Sampling(repetition_penalty=1.8),
    "repetitions wanted": Sampling(repetition_penalty=0.6),
    "greedy, repetition_penalty": Sampling(temperature=0, repetition_penalty=1.8),
    "all": Sampling(temperature=1.5, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
}
LARGEST = torch.tensor(1.0 - 1e-6)  # of the numbers that `uniforms` gives
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 6, 40]),
    top_p=st.sampled_from([0.0, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
)


def exact_gpt(**shape):
    """In float64, where a batch's other sums can't move a draw across the boundary between two ids."""
    return random_gpt(**shape).double()


def gpt_of(logits):
    """A GPT that gives the same logits whatever it reads."""
    gpt = random_gpt(vocab_size=len(logits))
    with torch.no_grad():
        gpt.transformer.ln_f.weight.zero_()
        gpt.transformer.ln_f.bias.zero_()[0] = 1
        gpt.lm_head.weight[:, 0] = torch.as_tensor(logits)
    return gpt


def texts_of(*lengths, below=19, seed=0):
    return [random_ids(length, below=below, seed=seed + row).tolist() for row, length in enumerate(lengths)]


def positions_read(gpt):
    """A list that grows with each forward of the model: (rows, positions)."""
    shapes = []
    gpt.transformer.wte.register_forward_hook(lambda module, ids, output: shapes.append(tuple(ids[0].shape)))
    return shapes


# The reference: nothing kept, one text, one step after another


def window(text, prompt_length, block_size):
    """What of a text is read for its next token: when the window is full, its oldest quarter is forgotten."""
    first = 0
    for length in range(prompt_length, len(text) + 1):
        if length - first > block_size:
            first = length - max(1, block_size - max(1, block_size // 4))
    return text[first:]


def next_logits(gpt, text, prompt_length, vocab_size=None):
    """What the model says about the token after a text: logits (V,) in float64."""
    seen = window(text, prompt_length, gpt.config.block_size)
    return logits_of(gpt, torch.tensor([seen]))[0, -1, :vocab_size].double().numpy()


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def probabilities(logits, sampling, slack=0.0):
    """
    Probabilities (V,) in float64, zero for what is left out. A token within `slack` of a boundary stays, and
    so does one as likely as the last that stays.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if sampling.temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(float)
    with np.errstate(over="ignore"):
        p = np.exp((logits - logits.max()) / sampling.temperature)
    likeliest = np.sort(p)[::-1][: sampling.top_k or None]
    p = np.where(p >= likeliest[-1], p, 0) / likeliest.sum()
    likeliest = likeliest / likeliest.sum()
    before = np.array([likeliest[likeliest > one].sum() for one in p])
    kept = (before < sampling.top_p + slack) & (p >= sampling.min_p * p.max() * (1 - slack)) | (p == p.max())
    return np.where(kept, p, 0) / p[kept].sum()


def written_plainly(gpt, text, max_new_tokens, sampling=MODES["plain"], seed=0, row=0, vocab_size=None):
    """A text and its continuation, by rereading the whole window for each token."""
    text, prompt_length, numbers = list(text), len(text), np.random.default_rng((seed, row))
    for _ in range(max_new_tokens):
        logits = next_logits(gpt, text, prompt_length, vocab_size)
        for token in set(text):
            penalty = sampling.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        cdf = probabilities(logits, sampling).cumsum()
        text.append(int(np.searchsorted(cdf, numbers.random() * cdf[-1], side="right")))
    return text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt_length", range(1, 9))
def test_cached_generation_is_uncached_generation_token_for_token(prompt_length, mode):
    gpt, (text,) = exact_gpt(), texts_of(prompt_length)
    options = {"sampling": MODES[mode], "seed": prompt_length}
    expected = written_plainly(gpt, text, 20, **options)  # past block_size, 8, at least twice
    assert generate(Engine(gpt), [text], 20, **options) == [expected]
    assert len(set(expected)) > 2


@pytest.mark.parametrize("mode", ["greedy", "all"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 16])
def test_the_window_slides_by_a_quarter_whatever_the_block_size(block_size, mode):
    gpt, count = exact_gpt(block_size=block_size), 3 * block_size + 2
    for length in {1, block_size}:
        (text,) = texts_of(length)
        expected = written_plainly(gpt, text, count, MODES[mode])
        assert generate(Engine(gpt), [text], count, sampling=MODES[mode]) == [expected]


@pytest.mark.parametrize("bias", [True, False])
def test_float32_writes_what_the_plain_loop_writes(bias):
    gpt, (text,) = random_gpt(bias=bias), texts_of(3)
    for mode in ("greedy", "all"):
        expected = written_plainly(gpt, text, 30, MODES[mode])
        assert generate(Engine(gpt), [text], 30, sampling=MODES[mode]) == [expected]


def test_a_cropped_model_writes_past_its_new_block_size():
    gpt, (text,) = exact_gpt(), texts_of(2)
    gpt.crop_block_size(5)
    assert generate(Engine(gpt), [text], 15) == [written_plainly(gpt, text, 15)]


# Rows side by side


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    count=st.integers(0, 20),
    sampling=samplings,
    seed=st.integers(0, 2**63 - 1),
)
@example(lengths=[1, 8, 4], count=20, sampling=MODES["plain"], seed=0)
def test_a_batch_writes_what_each_of_its_rows_writes_alone(lengths, count, sampling, seed):
    gpt, texts = exact_gpt(n_layer=1), texts_of(*lengths)
    options = {"sampling": sampling, "seed": seed}
    alone = [generate(Engine(gpt), [text], count, rows=[row], **options)[0] for row, text in enumerate(texts)]
    assert generate(Engine(gpt), texts, count, **options) == alone


@pytest.mark.parametrize("lengths", [[3] * 6, [1, 2, 8, 8, 5, 3], [8] * 6])
def test_the_batch_size_changes_no_text(lengths):
    gpt, engine = exact_gpt(), Engine(exact_gpt())
    texts = [[*text] for text in texts_of(*lengths)]
    expected = [written_plainly(gpt, text, 20, seed=4, row=row) for row, text in enumerate(texts)]
    for batch_size in (1, 2, 3, 6):
        written = []
        for first in range(0, 6, batch_size):
            rows = range(first, first + batch_size)
            written += generate(engine, texts[first : first + batch_size], 20, seed=4, rows=rows)
        assert written == expected


@pytest.mark.parametrize("length", [1, 4, 8])
def test_samples_of_one_prompt_are_what_each_would_be_alone(length):
    gpt, (text,) = exact_gpt(), texts_of(length)
    expected = [written_plainly(gpt, text, 15, seed=9, row=row) for row in range(4)]
    assert generate(Engine(gpt), [text] * 4, 15, seed=9) == expected
    assert len(set(map(tuple, expected))) == 4


def test_the_seed_and_the_rows_name_decide_the_text():
    engine, (text,) = Engine(random_gpt()), texts_of(3)
    written = {}
    for seed, row in product([0, 1, 2**40], [0, (0, 1), (1, 1), (2, 0)]):
        (first,), (again,) = (generate(engine, [text], 12, seed=seed, rows=[row]) for _ in range(2))
        assert first == again
        written[seed, row] = tuple(first)
    assert len(set(written.values())) == 12
    swapped = generate(engine, [text] * 2, 12, seed=1, rows=[(2, 0), 0])
    assert swapped == [list(written[1, (2, 0)]), list(written[1, 0])]


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


# Drawing


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=3),
        Sampling(top_k=100),
        Sampling(top_p=0.8),
        Sampling(min_p=0.25),
        Sampling(temperature=2.0, top_k=4),
        Sampling(temperature=2.0, top_p=0.7),
        Sampling(temperature=2.0, min_p=0.3),
        Sampling(top_k=4, top_p=0.85),  # of the four's probability
        Sampling(temperature=1.5, top_k=5, top_p=0.9, min_p=0.2),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities_that_are_left(sampling):
    logits = np.array([0.3, -1.2, 2.0, 0.9, -0.4, 1.4])
    numbers = torch.cat(list(islice(uniforms(0, range(100), "cpu"), 200)))  # (20000, 1)
    ids = draw(torch.tensor(logits, dtype=torch.float32).expand(len(numbers), -1), numbers, sampling)
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
)
@example(logits=[0.0, 0.0, -1.0, 1.0], sampling=Sampling(top_p=0.5), uniform=0.0)
def test_the_drawn_id_is_allowed_and_the_inverse_of_the_cumulative_distribution(logits, sampling, uniform):
    drawn = draw(torch.tensor([logits]), torch.tensor([[uniform]]), sampling)
    assert drawn.shape == (1, 1) and drawn.dtype == torch.long
    loose = probabilities(logits, sampling, slack=1e-5)
    assert loose[drawn.item()] > 0
    # Where ties or a boundary leave no choice of what is kept, the id is given too, but for rounding.
    tight = probabilities(logits, sampling, slack=-1e-5)
    distinct = len(set(logits)) == len(logits) or not (sampling.top_k or sampling.top_p < 1)
    if distinct and ((loose > 0) == (tight > 0)).all():
        cdf = np.array([0, *loose.cumsum()])
        assert cdf[drawn.item()] - 1e-5 <= uniform <= cdf[drawn.item() + 1] + 1e-5


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-38, 1e-30, 1e-3, 1e30])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST.item()])
def test_draw_gives_possible_ids_whatever_the_size_of_logits_and_temperature(temperature, options, uniform):
    logits = torch.tensor(
        [[-3e9, 3e9, 0.0, 1.0], [-math.inf, 1e4, 5.0, -math.inf], [-math.inf, 1.0, 0.5, -1.0]]
    )
    ids = draw(logits, torch.full((3, 1), uniform), Sampling(temperature=temperature, **options)).flatten()
    assert ((0 <= ids) & (ids < 4)).all() and ids[1] in (1, 2) and ids[2] > 0
    if temperature < 1 or options == {"top_k": 1}:
        assert ids.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.999}, {"min_p": 1e-3}], ids=str)
def test_the_smallest_and_the_largest_number_draw_no_id_of_probability_zero(options):
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 20, 48, 49]] = -math.inf
    for number, end in ((torch.tensor(0.0), 0), (LARGEST, -1)):
        ids = draw(logits, number.expand(500, 1), Sampling(**options)).flatten()
        possible = [np.flatnonzero(probabilities(row, Sampling(**options))) for row in logits.numpy()]
        assert ids.tolist() == [some[end] for some in possible]


def test_top_k_1_top_p_0_min_p_1_and_vanishing_temperatures_are_greedy():
    engine, texts = Engine(random_gpt()), texts_of(2, 5, 1)
    greedy = generate(engine, texts, 30, sampling=Sampling(temperature=0))
    assert len(set(greedy[0])) > 2
    for options in (
        {"top_k": 1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 1e-5},
        {"temperature": 5e-324},
    ):
        assert generate(engine, texts, 30, sampling=Sampling(**options)) == greedy, options


def test_min_p_1_keeps_all_of_the_likeliest_and_top_p_0_one():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0]]).expand(300, -1)
    numbers = torch.linspace(0, 0.99, 300)[:, None]
    ids = draw(logits, numbers, Sampling(min_p=1.0)).flatten()
    assert torch.bincount(ids).tolist()[1:] == pytest.approx([100, 0, 100, 100], abs=3)
    assert len(set(draw(logits, numbers, Sampling(top_p=0.0)).flatten().tolist()) & {1, 3, 4}) == 1


def test_at_a_boundary_the_fewest_tokens_are_kept_and_the_next_one_is_drawn():
    def counts(logits, sampling):
        ids = draw(torch.tensor([logits]).expand(8, -1), torch.arange(8)[:, None] / 8, sampling)
        return torch.bincount(ids.flatten(), minlength=len(logits)).tolist()

    assert counts([0.0, 0.0, 0.0, 0.0], Sampling()) == [2, 2, 2, 2]  # the numbers 0 and 1/8, 2/8 and 3/8, ...
    assert sorted(counts([0.0, 0.0, 0.0, 0.0], Sampling(top_p=0.5))) == [0, 0, 4, 4]
    assert counts([-math.inf, 0.0, -math.inf, 0.0], Sampling(top_p=0.75)) == [0, 4, 0, 4]


# Penalties, vocabulary, log-probabilities


def test_the_repetition_penalty_is_its_formula_for_prompt_and_drawn_ids():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.5), [[3], [0, 1, 2]], 4, "cpu")
    logits = torch.tensor([[3.0, 2.5, 2.2, -1.0], [-1.0, -1.1, -4.0, -1.6]])
    drawn = [sampler(logits, None)[0].flatten().tolist() for _ in range(5)]
    # Row 0 goes through 3, 2.5, 2.2, and then the largest of what is left of them. Row 1 begins with
    # -1.5, -1.65, -6, -1.6, and then has all of them.
    assert drawn == [[0, 0], [1, 0], [2, 0], [0, 0], [0, 0]]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.7), [[0, 1, 2]], 4, "cpu")
    assert [sampler(logits[1:], None)[0].item() for _ in range(2)] == [3, 0]


def test_what_the_window_has_forgotten_is_still_penalised():
    (text,) = generate(Engine(gpt_of([5.0, 4.9] + [-9.0] * 17 + [4.0])), [[0]], 40, sampling=MODES["greedy"])
    assert set(text) == {0}
    sampling = Sampling(temperature=0, repetition_penalty=10.0)
    (text,) = generate(Engine(gpt_of([5.0, 4.9, 4.8, *[0.6] * 17])), [[0]], 40, sampling=sampling)
    assert text[:3] == [0, 1, 2] and sorted(text[3:20]) == [*range(3, 20)] and set(text[20:]) == {0}


@pytest.mark.parametrize("vocab_size, reported", [(None, 5), (7, 5), (3, 3)])
def test_logprobs_are_the_models_own_whatever_the_settings(vocab_size, reported):
    gpt, texts = random_gpt(), texts_of(2, 8, below=3)
    sampling = Sampling(temperature=3.0, top_k=4, repetition_penalty=2.0)
    with_logprobs = Sampling(temperature=3.0, top_k=4, repetition_penalty=2.0, logprobs=True)
    expected = list(stream(Engine(gpt), texts, 15, sampling, vocab_size=vocab_size))
    assert all(drawn[1:] == (None, None, None) for drawn in expected)
    continued = [list(text) for text in texts]
    found = stream(Engine(gpt), texts, 15, with_logprobs, vocab_size=vocab_size)
    for drawn, plain in zip(found, expected, strict=True):
        assert drawn.ids == plain.ids
        for row, text in enumerate(continued):
            logprobs = log_softmax(next_logits(gpt, text, len(texts[row]), vocab_size))
            order = np.argsort(-logprobs)[:reported]
            assert drawn.logprobs[row] == pytest.approx(logprobs[drawn.ids[row]], abs=1e-4)
            assert drawn.top_ids[row] == order.tolist()
            assert drawn.top_logprobs[row] == pytest.approx(logprobs[order], abs=1e-4)
            text.append(drawn.ids[row])


def test_ids_from_vocab_size_on_are_never_emitted():
    gpt = random_gpt()
    with torch.no_grad():
        gpt.lm_head.weight[5:] *= 10  # the padding's ids would be the likeliest
    texts = texts_of(1, 3, 1, 8, below=5)
    for sampling in (*MODES.values(), Sampling(temperature=2.0, logprobs=True), Sampling(top_k=19)):
        for drawn in stream(Engine(gpt), texts, 30, sampling, vocab_size=5):
            assert max(drawn.ids) < 5 and max(map(max, drawn.top_ids or [[0]])) < 5
    for text, found in zip(texts, beam_search(Engine(gpt), texts, 12, beams=6, vocab_size=5), strict=True):
        assert_found(found, plain_beams(gpt, text, 12, beams=6, vocab_size=5))
    assert beam_search(Engine(gpt), [[0]], 3, beams=2, vocab_size=1) == [[([0, 0, 0], 0.0, 0.0)]]
    assert max(map(max, generate(Engine(gpt), texts, 30))) > 5


# What it costs


def test_a_token_costs_one_position_and_a_full_window_the_kept_part_of_it():
    gpt = random_gpt()
    shapes = positions_read(gpt)
    generate(Engine(gpt), texts_of(3), 12)
    assert [T for _, T in shapes] == [2, *[1] * 6, 5, *[1] * 3, 5, *[1] * 3]  # of 8 the newest 6 are kept
    shapes.clear()
    generate(Engine(gpt), texts_of(1), 2)
    assert shapes == [(1, 1), (1, 1)]  # of a single token there is nothing to read ahead
    shapes.clear()
    generate(Engine(gpt), texts_of(8), 2)
    assert shapes == [(1, 7), (1, 1), (1, 5), (1, 1)]


def test_samples_of_one_prompt_read_it_once():
    gpt = random_gpt()
    shapes = positions_read(gpt)
    generate(Engine(gpt), texts_of(5) * 4, 3)
    assert shapes == [(1, 4), *[(4, 1)] * 3]
    shapes.clear()
    generate(Engine(gpt), texts_of(5, 5), 1)
    assert shapes == [(2, 4), (2, 1)]


def test_a_short_text_needs_a_short_cache():
    engine = Engine(random_gpt(block_size=500).bfloat16())
    cache = ContextWindow(engine, texts_of(3, 7), 20).cache
    assert {kept.numel() for layer in cache.layers for kept in (layer.k, layer.v)} == {2 * 27 * 16}
    assert cache.layers[0].k.dtype == torch.bfloat16
    assert ContextWindow(engine, texts_of(490), 20).cache.layers[0].v.numel() == 500 * 16


# The stream


def test_stream_yields_a_token_at_a_time_and_leaves_gradients_on():
    gpt, texts, recorded = random_gpt(), texts_of(3, 5), []
    shapes = positions_read(gpt)
    gpt.lm_head.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    continued = [list(text) for text in texts]
    for number, drawn in enumerate(stream(Engine(gpt), texts, 10)):
        assert torch.is_grad_enabled()
        assert sum(T == 1 for _, T in shapes) == number + 1  # the next one waits until it is asked for
        assert drawn[1:] == (None, None, None)
        for text, token in zip(continued, drawn.ids, strict=True):
            text.append(token)
    assert number == 9 and not any(recorded)
    assert generate(Engine(gpt), texts, 10) == continued
    assert texts == texts_of(3, 5)  # the lists that came in are as they were
    assert generate(Engine(gpt), texts, 0) == texts and not list(stream(Engine(gpt), texts, 0))
    beam_search(Engine(gpt), texts, 2, beams=2)
    assert torch.is_grad_enabled() and not any(recorded) and texts == texts_of(3, 5)


@pytest.mark.parametrize("length", [0, 9])
def test_a_text_of_no_tokens_or_too_many_is_refused(length):
    engine = Engine(random_gpt())
    for texts in (texts_of(length), texts_of(3, length)):
        with pytest.raises(ValueError, match=rf"\b{length}\b.*block_size=8"):
            generate(engine, texts, 1)
        with pytest.raises(ValueError, match=rf"\b{length}\b.*block_size=8"):
            beam_search(engine, texts, 1, beams=2)


# Compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(30,), (1, 30), (1, 1, 30), (2, 30), (2, 3, 30)], ids=str)
def test_the_product_spelled_out_is_that_of_a_linear(monkeypatch, shape, bias, dtype):
    torch.manual_seed(0)
    matvec, x = MatVec(30, 7, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    expected = nn.functional.linear(
        x.double(), matvec.weight.double(), matvec.bias.double() if bias else None
    )
    tolerance = 2 * torch.finfo(dtype).eps
    if x.numel() == 30:  # one vector: no BLAS, and rounded but once, at the end
        monkeypatch.delattr(nn.Linear, "forward")
        tolerance = 0.51 * torch.finfo(dtype).eps
    found = matvec(x)
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=max(1e-6, tolerance / 100), rtol=tolerance)


def test_the_compiled_twin_takes_no_memory_and_leaves_the_model_as_it_was():
    gpt = random_gpt()
    engine = Engine(gpt, compiled=True)
    assert engine.gpt is gpt and engine.decoder is not gpt
    pairs = zip(gpt.named_parameters(), engine.decoder.named_parameters(), strict=True)
    assert all(name == other and ours is theirs for (name, ours), (other, theirs) in pairs)
    assert engine.decoder.lm_head.weight is gpt.transformer.wte.weight
    linears = [module for module in engine.decoder.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 * 2 + 1 and all(type(module) is MatVec for module in linears)
    assert not any(isinstance(module, MatVec) for module in gpt.modules())


def test_shapes_repeat_where_each_costs_a_graph():
    """As on a GPU, but for the compiler."""
    shape, spans = {"n_layer": 1, "block_size": 600}, []
    gpt, eager = exact_gpt(**shape), Engine(exact_gpt(**shape))
    engine = Engine(gpt)
    engine.use_cuda_graphs = True
    rounded = [engine.rounded(length) for length in (1, 256, 257, 512, 513, 600)]
    assert rounded == [256, 256, 512, 512, 600, 600]
    shapes = positions_read(gpt)
    (block,) = gpt.transformer.h
    block.register_forward_pre_hook(
        lambda module, args: spans.append(args[0].size(1) if args[1] is None else args[1].size(-1))
    )
    for lengths in ([250], [1], [258, 3], [3] * 3, [600, 520], [3, 4], [7]):  # the caches hold older texts
        texts = texts_of(*lengths)
        assert generate(engine, texts, 12, seed=3) == generate(eager, texts, 12, seed=3)
    assert {T for _, T in shapes} == {1, 256, 512, 600} and set(spans) == {256, 512, 600}
    assert sorted(engine.caches) == [1, 2, 3] and engine.caches[2].layers[0].k.numel() == 2 * 600 * 16


@pytest.mark.parametrize("mode", ["greedy", "all"])
def test_the_code_that_is_compiled_for_a_gpu_has_no_constant_that_changes(mode):
    gpt, texts = exact_gpt(n_layer=1), texts_of(3, 5)
    engine = Engine(gpt)
    engine.use_cuda_graphs = True
    engine.prefill, engine.decode = (
        torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
        for function in (engine.prefill, engine.decode)
    )
    for count in (1, 14):
        expected = generate(Engine(gpt), texts, count, sampling=MODES[mode])
        with torch.compiler.set_stance("fail_on_recompile" if count > 1 else "default"):
            assert generate(engine, texts, count, sampling=MODES[mode]) == expected


@pytest.fixture
def compiler():
    """A compiler that has not compiled anything yet: how often it does so is limited."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_on_a_cpu_the_engine_writes_what_the_eager_one_writes(compiler, bias):
    gpt = random_gpt(bias=bias)
    eager, compiled = Engine(gpt), Engine(gpt, compiled=True)
    # One engine for all: more lengths and batch sizes than a compiler makes code for.
    for lengths in ([1], [3], [4], [8], [3] * 3, [2, 8, 5], [1, 1], [5], [2, 4, 1, 3], [8] * 5, [6], [2]):
        texts = texts_of(*lengths)
        for count, mode in ((1, "greedy"), (2, "all"), (20, "all")):
            options = {"sampling": MODES[mode], "seed": 1}
            assert generate(compiled, texts, count, **options) == generate(eager, texts, count, **options)
    found, expected = (beam_search(engine, texts_of(3, 8), 12, beams=3) for engine in (compiled, eager))
    assert [[h.ids for h in some] for some in found] == [[h.ids for h in some] for some in expected]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[4], [2, 6]])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
@torch.no_grad()
def test_compiled_on_a_cpu_the_logits_are_the_eager_ones(compiler, dtype, tolerance, lengths):
    gpt, texts = random_gpt(std=0.2).to(getattr(torch, dtype)), texts_of(*lengths)
    engines = Engine(gpt), Engine(gpt, compiled=True)
    windows = [ContextWindow(engine, texts, 12) for engine in engines]
    newest = torch.tensor([text[-1:] for text in texts])
    for tokens in random_ids(12, len(texts), 1):
        logits = []
        for window in windows:
            if window.must_refill:
                window.refill()
            logits.append(window.step(newest, lambda logits: (logits,))[0])
            for text, (token,) in zip(window.texts, tokens.tolist(), strict=True):
                text.append(token)
        scale = logits[0].abs().max().item()
        torch.testing.assert_close(logits[1], logits[0], atol=tolerance * scale, rtol=0)
        newest = tokens


# Beam search


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
)
@example(lengths=[3, 8, 1], count=18, beams=3, length_penalty=0.6, end=-1, seed=0)  # past block_size, 8
@example(lengths=[3, 8, 1], count=18, beams=3, length_penalty=1.0, end=2, seed=1)
def test_beams_are_those_of_a_plain_search_for_each_text(lengths, count, beams, length_penalty, end, seed):
    def ends(ids):
        return ids[-1] == end

    gpt, texts = (
        random_gpt(n_layer=1, vocab_size=7, std=0.25, seed=seed).double(),
        texts_of(*lengths, below=7),
    )
    found = beam_search(Engine(gpt), texts, count, beams, length_penalty, ends)
    for text, hypotheses in zip(texts, found, strict=True):
        assert len(hypotheses) <= beams
        assert_found(hypotheses, plain_beams(gpt, text, count, beams, length_penalty, ends))


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
