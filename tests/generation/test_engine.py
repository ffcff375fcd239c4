"""The engine and the stream against plain loops that keep nothing, in NumPy and float64."""

import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SHAPES, random_gpt, random_ids
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_models import gpt_of
from reference import MODES, exact_gpt, log_softmax, next_logits, positions_read, probabilities, texts_of
from torch import nn

from kqv.errors import UserError
from kqv.formats import resize
from kqv.generation.beams import beam_search
from kqv.generation.cpu_decoding import MatVec
from kqv.generation.engine import Engine
from kqv.generation.sampling import PLAIN
from kqv.generation.stream import ContextWindow, generate, stream

samplings = st.builds(
    partial(replace, PLAIN),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 6, 40]),
    top_p=st.sampled_from([0.0, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
)


# The reference: nothing kept, one text, one step after another


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


@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("gpt2", mode) for mode in MODES), *product(["llama", "qwen3"], ["greedy", "all"])],
)
@pytest.mark.parametrize("prompt_length", range(1, 9))
def test_cached_generation_is_uncached_generation_token_for_token(prompt_length, family, mode):
    gpt, (text,) = exact_gpt(**SHAPES[family]), texts_of(prompt_length)
    options = {"sampling": MODES[mode], "seed": prompt_length}
    expected = written_plainly(gpt, text, 20, **options)  # past block_size, 8, at least twice
    assert generate(Engine(gpt), [text], 20, **options) == [expected]
    assert len(set(expected)) > 1


@pytest.mark.parametrize("mode", ["greedy", "all"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 16])
@pytest.mark.usefixtures("every_shape")
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
    resize.crop_block_size(gpt, 5)
    assert generate(Engine(gpt), [text], 15) == [written_plainly(gpt, text, 15)]


# Rows side by side


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    count=st.integers(0, 20),
    sampling=samplings,
    seed=st.integers(0, 2**63 - 1),
    family=FAMILIES,
)
@example(lengths=[1, 8, 4], count=20, sampling=MODES["plain"], seed=0, family="gpt2")
@example(lengths=[1, 8, 4], count=20, sampling=MODES["plain"], seed=0, family="llama")
@example(lengths=[1, 8, 4], count=20, sampling=MODES["plain"], seed=0, family="qwen3")
def test_a_batch_writes_what_each_of_its_rows_writes_alone(lengths, count, sampling, seed, family):
    gpt, texts = exact_gpt(n_layer=1, **SHAPES[family]), texts_of(*lengths)
    options = {"sampling": sampling, "seed": seed}
    alone = [generate(Engine(gpt), [text], count, rows=[row], **options)[0] for row, text in enumerate(texts)]
    assert generate(Engine(gpt), texts, count, **options) == alone


@pytest.mark.parametrize("lengths", [[3] * 6, [1, 2, 8, 8, 5, 3], [8] * 6])
@pytest.mark.usefixtures("every_shape")
def test_the_batch_size_changes_no_text(lengths):
    gpt = exact_gpt(n_layer=1)
    engine, texts = Engine(gpt), texts_of(*lengths)
    expected = [written_plainly(gpt, text, 12, seed=4, row=row) for row, text in enumerate(texts)]
    for batch_size in (1, 2, 3, 6):
        written = []
        for first in range(0, 6, batch_size):
            rows = range(first, first + batch_size)
            written += generate(engine, texts[first : first + batch_size], 12, seed=4, rows=rows)
        assert written == expected


@pytest.mark.parametrize("length", [1, 4, 8])
@pytest.mark.usefixtures("every_shape")
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


# Drawing


def test_top_k_1_top_p_0_min_p_1_and_vanishing_temperatures_are_greedy():
    engine, texts = Engine(random_gpt()), texts_of(2, 5, 1)
    greedy = generate(engine, texts, 30, sampling=MODES["greedy"])
    assert len(set(greedy[0])) > 2
    for options in (
        {"top_k": 1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 1e-5},
        {"temperature": 5e-324},
    ):
        assert generate(engine, texts, 30, sampling=replace(PLAIN, **options)) == greedy, options


# Penalties, vocabulary, log-probabilities


def test_what_the_window_has_forgotten_is_still_penalised():
    (text,) = generate(Engine(gpt_of([5.0, 4.9] + [-9.0] * 17 + [4.0])), [[0]], 40, sampling=MODES["greedy"])
    assert set(text) == {0}
    sampling = replace(PLAIN, temperature=0, repetition_penalty=10.0)
    (text,) = generate(Engine(gpt_of([5.0, 4.9, 4.8, *[0.6] * 17])), [[0]], 40, sampling=sampling)
    assert text[:3] == [0, 1, 2] and sorted(text[3:20]) == [*range(3, 20)] and set(text[20:]) == {0}


@pytest.mark.parametrize("vocab_size, reported", [(None, 5), (7, 5), (3, 3)])
@pytest.mark.usefixtures("every_shape")
def test_logprobs_are_the_models_own_whatever_the_settings(vocab_size, reported):
    gpt, texts = random_gpt(), texts_of(2, 8, below=3)
    sampling = replace(PLAIN, temperature=3.0, top_k=4, repetition_penalty=2.0)
    with_logprobs = replace(sampling, logprobs=True)
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
    more = replace(PLAIN, temperature=2.0, logprobs=True), replace(PLAIN, top_k=19)
    for sampling in (*MODES.values(), *more):
        for drawn in stream(Engine(gpt), texts, 12, sampling, vocab_size=5):
            assert max(drawn.ids) < 5 and max(map(max, drawn.top_ids or [[0]])) < 5
    assert max(map(max, generate(Engine(gpt), texts, 30))) > 5


# What it costs


@pytest.mark.usefixtures("every_shape")
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


@pytest.mark.usefixtures("every_shape")
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
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("length", [9, 17, 40])
@pytest.mark.parametrize("mode", ["greedy", "temperature"])
@pytest.mark.usefixtures("every_shape")
def test_of_a_text_longer_than_the_context_the_end_is_read(length, mode):
    engine, texts = Engine(exact_gpt()), texts_of(3, length)
    ends = [texts[0], texts[1][-8:]]
    found = generate(engine, texts, 20, sampling=MODES[mode])  # block_size is 8
    assert found[1][:length] == texts[1]
    written = [text[len(start) :] for text, start in zip(found, texts, strict=True)]
    expected = generate(engine, ends, 20, sampling=MODES[mode])
    assert written == [text[len(start) :] for text, start in zip(expected, ends, strict=True)]


@pytest.mark.parametrize(
    "texts, error, says",
    [
        (["abc"], TypeError, "text 0 is 'abc'.*tokenizer.encode"),
        ("abc", TypeError, "text 0 is 'a'"),
        ([1, 2, 3], TypeError, "text 0 is 1"),
        (torch.tensor([1, 2]), TypeError, "text 0 is tensor"),
        ([[1, 2], [0.5]], TypeError, "text 1 is "),
        ([torch.tensor([1.0])], TypeError, "text 0 is "),
        ([[[1]]], TypeError, "text 0 is "),
        ([None], TypeError, "text 0 is None"),
        ([["x" * 1000]], TypeError, r"text 0 is \['x{38}\.\.\.: "),
        ([[1], []], ValueError, "text 1 has no token"),
        ([[1], [2, 19]], ValueError, "text 1 has the id 19, but the model knows ids from 0 to 18"),
        ([[-1]], ValueError, "text 0 has the id -1"),
    ],
)
def test_what_is_no_text_of_ids_is_refused_in_a_sentence(texts, error, says):
    engine = Engine(random_gpt())
    with pytest.raises(error, match=says) as found:
        generate(engine, texts, 1)
    assert len(str(found.value)) < 200
    with pytest.raises(error, match=says):
        next(stream(engine, texts, 1))


def test_texts_may_be_arrays_or_tensors_and_there_may_be_none():
    engine, texts = Engine(random_gpt()), texts_of(3, 3)
    expected = generate(engine, texts, 5)
    for same in (
        np.array(texts, np.uint32),
        torch.tensor(texts),
        map(np.array, texts),
        (tuple(texts[0]), texts[1]),
    ):
        assert generate(engine, same, 5) == expected
    assert generate(engine, [], 5) == [] and list(stream(engine, [], 5)) == []
    with pytest.raises(ValueError, match="2 texts, but 1 rows"):
        generate(engine, texts, 5, rows=[0])


def test_a_model_in_training_mode_drops_nothing_out_here_and_stays_in_it():
    gpt, texts = random_gpt(dropout=0.5), texts_of(3, 5)
    expected = generate(Engine(gpt), texts, 12), beam_search(Engine(gpt), texts, 12, 2)
    gpt.train().transformer.h[1].eval()
    modes = [module.training for module in gpt.modules()]
    engine = Engine(gpt)
    for _ in range(2):
        assert (generate(engine, texts, 12), beam_search(engine, texts, 12, 2)) == expected
        steps = stream(engine, texts, 12)
        next(steps)
        assert [module.training for module in gpt.modules()] == modes  # between two steps too
    assert not Engine(gpt, "compiled").decode.args[0].training


# Numbers that are none


def broken(name, value):
    """A GPT with a number in its weights that is none, or none in the end."""
    gpt = random_gpt()
    gpt.state_dict()[name].view(-1)[0] = value
    return gpt


@pytest.mark.parametrize(
    "name, value",
    [
        ("lm_head.weight", math.nan),
        ("lm_head.weight", math.inf),
        ("lm_head.weight", -math.inf),
        ("transformer.ln_f.bias", math.inf),
        ("transformer.h.0.mlp.c_fc.weight", math.nan),
        ("transformer.h.1.attn.c_proj.bias", 3e38),  # overflows in the LayerNorm
    ],
)
@pytest.mark.parametrize("mode", ["greedy", "plain", "all"])
def test_logits_that_are_not_finite_are_an_error(name, value, mode):
    engine, texts = Engine(broken(name, value)), texts_of(3, 8)
    for sampling in (MODES[mode], replace(MODES[mode], logprobs=True)):
        with pytest.raises(UserError, match="logits are not finite"):
            generate(engine, texts, 3, sampling=sampling)
    with pytest.raises(UserError, match="logits are not finite"):
        beam_search(engine, texts, 3, beams=2)


def test_what_came_before_a_number_that_is_none_is_given():
    gpt, (text,) = random_gpt(), texts_of(2)
    expected = generate(Engine(gpt), [text], 3)
    with torch.no_grad():
        gpt.transformer.wpe.weight[5] = math.nan  # which the token after four others reads
    found = stream(Engine(gpt), [text], 9)
    assert text + [next(found).ids[0] for _ in range(3)] == expected[0]
    with pytest.raises(UserError):
        list(found)


def test_large_finite_logits_are_none_of_them():
    gpt = gpt_of([-3e15, 1e15, 2e15])
    for mode in MODES.values():
        assert len(generate(Engine(gpt), [[0]], 9, sampling=mode)[0]) == 10


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
    engine = Engine(gpt, "compiled")
    (decoder,) = engine.decode.args
    assert engine.gpt is gpt and decoder is not gpt
    pairs = zip(gpt.named_parameters(), decoder.named_parameters(), strict=True)
    assert all(name == other and ours is theirs for (name, ours), (other, theirs) in pairs)
    assert decoder.lm_head.weight is gpt.transformer.wte.weight
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 * 2 + 1 and all(type(module) is MatVec for module in linears)
    assert not any(isinstance(module, MatVec) for module in gpt.modules())


def test_a_compiled_cache_follows_the_text_in_powers_of_two():
    """A model with a long context does not take memory for all of it."""
    engine = Engine(random_gpt(block_size=8192, positions="rotary"))
    engine.compiled = True
    slots = [engine.new_cache(1, needed).layers[0].k.size(1) for needed in (10, 1025, 8192)]
    assert slots == [1024, 2048, 8192]


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
    eager, compiled = Engine(gpt), Engine(gpt, "compiled")
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
@pytest.mark.usefixtures("every_shape")
def test_compiled_on_a_cpu_the_logits_are_the_eager_ones(compiler, dtype, tolerance, lengths):
    gpt, texts = random_gpt(std=0.2).to(getattr(torch, dtype)), texts_of(*lengths)
    engines = Engine(gpt), Engine(gpt, "compiled")
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
