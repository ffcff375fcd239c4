"""Recorded steps against plain ones: the same tokens, from graphs that are recorded once."""

import gc
import sys
import weakref
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from conftest import random_gpt
from recording import recording_engine, recordings
from reference import MODES, exact_gpt, texts_of

from kqv.errors import UserError
from kqv.generation import engine as engines
from kqv.generation import graphs
from kqv.generation import stream as streams
from kqv.generation.beams import beam_search
from kqv.generation.engine import Engine
from kqv.generation.stream import generate, stream


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("every_shape")
def test_recorded_steps_write_what_plain_ones_write(monkeypatch, mode):
    gpt = exact_gpt(n_layer=1)
    engine = recording_engine(monkeypatch, gpt)
    for lengths in ([3], [1, 8, 4], [5] * 3, [2]):
        for count in (1, 20):  # past block_size, 8, twice
            options = {"sampling": MODES[mode], "seed": count}
            texts = texts_of(*lengths)
            assert generate(engine, texts, count, **options) == generate(Engine(gpt), texts, count, **options)
    # Of 1, 3, 3 and 1 texts at once: three times another number.
    assert recordings() == [1, 1, 1]


@pytest.mark.usefixtures("every_shape")
def test_a_step_is_recorded_for_each_power_of_two_that_the_text_reaches(monkeypatch):
    gpt = exact_gpt(n_layer=1, block_size=600)
    engine, options = recording_engine(monkeypatch, gpt), {"sampling": MODES["all"]}
    assert [engine.span_for(length) for length in (1, 256, 257, 512, 513, 600)] == [
        256,
        256,
        512,
        512,
        600,
        600,
    ]
    for length, count in ((3, 1), (250, 2), (3, 2), (505, 3), (590, 3), (250, 3)):
        texts = texts_of(length)
        assert generate(engine, texts, 30, **options) == generate(Engine(gpt), texts, 30, **options)
        assert recordings() == [count]


def test_other_numbers_need_no_other_graph(monkeypatch):
    gpt, texts = exact_gpt(n_layer=1), texts_of(3, 5)
    engine = recording_engine(monkeypatch, gpt)
    base = replace(MODES["all"], top_k=5)
    for changes in (
        {},
        {"temperature": 0.7},
        {"top_k": 8},
        {"top_p": 1.0, "min_p": 0.0},
        {"min_p": 0.3},
        {"repetition_penalty": 0.8},
        {},
    ):
        options = {"sampling": replace(base, **changes), "exempt": [len(changes)]}
        assert generate(engine, texts, 15, **options) == generate(Engine(gpt), texts, 15, **options), changes
    assert recordings() == [1]
    for number, changes in enumerate(
        ({"top_k": 9}, {"temperature": 0}, {"repetition_penalty": 1}, {"logprobs": True})
    ):
        for _ in range(2):
            generate(engine, texts, 15, sampling=replace(base, **changes))
        assert recordings() == [number + 2]


def test_one_cache_follows_the_texts_and_the_graphs_of_the_old_one_are_freed(monkeypatch):
    gpt = random_gpt(block_size=4096, positions="rotary", n_layer=1)
    engine, slots = recording_engine(monkeypatch, gpt), []
    old = []
    for batch_size, length, made in ((1, 10, 1), (1, 1025, 2), (1, 10, 2), (2, 10, 3), (2, 1024, 3)):
        cache = engine.new_cache(batch_size, length)
        assert sum(map(bool, recordings())) == 0 and len(recordings()) == made
        slots.append(tuple(cache.layers[0].k.shape[:2]))
        old.append(weakref.ref(cache))
        del cache
    assert slots == [(1, 1024), (1, 2048), (1, 2048), (2, 1024), (2, 1024)]
    gc.collect()
    assert [ref() is not None for ref in old] == [False, False, False, True, True]


def test_a_stream_that_is_left_early_leaves_the_engine_usable(monkeypatch):
    gpt, texts = exact_gpt(n_layer=1), texts_of(3, 5)
    engine = recording_engine(monkeypatch, gpt)
    expected = list(stream(engine, texts, 30, MODES["all"]))
    assert list(islice(stream(engine, texts, 30, MODES["all"]), 5)) == expected[:5]
    assert list(stream(engine, texts, 30, MODES["all"])) == expected
    assert recordings() == [1]


@pytest.mark.parametrize("others", [[3, 5], [3], [3, 5, 2]])
def test_streams_in_turns_write_what_each_writes_alone(monkeypatch, others):
    gpt = exact_gpt(n_layer=1, block_size=64)  # so long that no window fills up and is read again
    options = [(texts_of(4, 2), 30, MODES["all"]), (texts_of(*others), 30, MODES["all"], 7)]
    expected = [list(stream(Engine(gpt), *some)) for some in options]
    engine = recording_engine(monkeypatch, gpt)
    found, going = ([], []), [stream(engine, *some) for some in options]
    for number in (0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1):
        found[number].extend(islice(going[number], 4))
    for steps, some in zip(going, found, strict=True):
        some.extend(steps)
    assert list(found) == expected


@pytest.mark.usefixtures("every_shape")
def test_recorded_beams_are_the_plain_ones(monkeypatch):
    gpt, texts = exact_gpt(), texts_of(3, 8)
    engine = recording_engine(monkeypatch, gpt)
    for options in (
        {"beams": 3},
        {"beams": 3, "vocab_size": 7, "ends": lambda ids: ids[-1] == 5},
        {"beams": 2},
    ):
        found, expected = (beam_search(one, texts, 20, **options) for one in (engine, Engine(gpt)))
        for some, others in zip(found, expected, strict=True):
            assert [one.ids for one in some] == [other.ids for other in others]
            assert [one.logprob for one in some] == pytest.approx([other.logprob for other in others])
    assert recordings() == [2, 1]  # 6 rows, of all ids and of 7, and 4 rows


def test_log_probabilities_belong_to_their_token(monkeypatch):
    gpt, texts = exact_gpt(n_layer=1), texts_of(3, 5)
    sampling = replace(MODES["all"], logprobs=True)
    found = list(stream(recording_engine(monkeypatch, gpt), texts, 20, sampling))
    assert found == list(stream(Engine(gpt), texts, 20, sampling))


def test_logits_that_are_not_finite_are_an_error_and_what_came_before_is_given(monkeypatch):
    gpt, texts = random_gpt(), texts_of(2)
    expected = generate(Engine(gpt), texts, 3)
    with torch.no_grad():
        gpt.transformer.wpe.weight[5] = float("nan")  # which the token after four others reads
    found = stream(recording_engine(monkeypatch, gpt), texts, 9)
    assert texts[0] + [next(found).ids[0] for _ in range(3)] == expected[0]
    with pytest.raises(UserError, match="logits are not finite"):
        list(found)


def test_weights_that_learn_write_other_texts_by_the_same_graph(monkeypatch):
    gpt, texts = exact_gpt(n_layer=1), texts_of(3)
    engine = recording_engine(monkeypatch, gpt)
    before = generate(engine, texts, 12)
    with torch.no_grad():
        gpt.transformer.h[0].mlp.c_fc.weight.neg_()
    after = generate(engine, texts, 12)
    assert before != after == generate(Engine(gpt), texts, 12) and recordings() == [1]


def test_a_model_in_training_mode_drops_nothing_out(monkeypatch):
    gpt, texts = exact_gpt(dropout=0.5), texts_of(3)
    expected = generate(Engine(gpt), texts, 12)
    gpt.train()
    assert generate(recording_engine(monkeypatch, gpt), texts, 12) == expected and gpt.training


def test_the_host_never_waits_for_the_newest_steps(monkeypatch):
    engine, events, number = recording_engine(monkeypatch, random_gpt()), [], iter(range(100))
    copy_to_host = streams.copy_to_host

    def logged(chosen):
        step, drawn = next(number), copy_to_host(chosen)
        events.append(("begun", step))
        return lambda: (events.append(("read", step)), drawn())[1]

    monkeypatch.setattr(streams, "copy_to_host", logged)
    list(stream(engine, texts_of(1), 7))  # fewer than fit into the context
    begun, expected = 7, []
    for step in range(7):
        expected += [("begun", step)]
        if step >= engines.AHEAD:
            expected += [("read", step - engines.AHEAD)]
    expected += [("read", step) for step in range(begun - engines.AHEAD, begun)]
    assert events == expected


def test_the_projects_kernels_are_recorded_too(monkeypatch):
    class KernelDecoder:
        def __init__(self, gpt):
            self.gpt = gpt

        def __call__(self, tokens, cache):
            return self.gpt(tokens, cache=cache)[:, 0].float()  # (B, V)

    monkeypatch.setitem(sys.modules, "kqv.kernels.decoding", SimpleNamespace(KernelDecoder=KernelDecoder))
    gpt, texts = exact_gpt(), texts_of(3, 5)
    engine = recording_engine(monkeypatch, gpt, "kernels")
    assert generate(engine, texts, 15) == generate(Engine(gpt), texts, 15) and recordings() == [1]


class CalledAgain:
    """Stands in for graphs.Recorder where the compiler does not bear that operations are kept."""

    def __init__(self, device):
        self.found = None

    def warm_up(self, function):
        self.found = function()

    def record(self, function):
        found = self.found
        return lambda: [part.copy_(new) for part, new in zip(found, function(), strict=True)], found


@pytest.mark.parametrize("mode", ["greedy", "all"])
def test_the_code_that_is_compiled_for_a_gpu_has_no_constant_that_changes(monkeypatch, mode):
    gpt, texts = exact_gpt(n_layer=1), texts_of(3, 5)
    engine = recording_engine(monkeypatch, gpt)
    monkeypatch.setattr(graphs, "Recorder", CalledAgain)
    step = torch.compile(engines.decode, backend="eager", fullgraph=True, dynamic=False)
    engine.decode = lambda *inputs: step(gpt, *inputs)
    for count in (1, 14):
        sampling = replace(MODES[mode], min_p=MODES[mode].min_p / count, top_p=0.6 + count / 100)
        expected = generate(Engine(gpt), texts, count, sampling=sampling)
        with torch.compiler.set_stance("fail_on_recompile" if count > 1 else "default"):
            assert generate(engine, texts, count, sampling=sampling) == expected


def test_an_unknown_engine_and_a_graph_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="no engine 'fast', but plain, graph, compiled, kernels"):
        Engine(random_gpt(), "fast")
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu"):
        generate(Engine(random_gpt(), "graph"), texts_of(3), 1)
