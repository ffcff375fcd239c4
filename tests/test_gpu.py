"""What holds on a CUDA device: precisions train, runs repeat and resume bit for bit, generation agrees."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import TINY_RUN, logits_of, random_gpt, random_ids

import train
from kqv.formats import loading
from kqv.generation.beams import beam_search
from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.generation.stream import generate, stream
from kqv.kernels.attention import attend_within_examples
from kqv.training import loss
from model import NextToken

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
RUN = [*TINY_RUN, "--dataset=tiny", f"--device={DEVICE}", "--compile=False"]


def weights(out_dir):
    return loading.load(f"{out_dir}/ckpt.pt")["model"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_precision_trains(cli, tiny_set, optimizer, dtype, compiled):
    steps = ["--max_iters=100", "--lr_decay_iters=100", "--eval_interval=100", f"--optimizer={optimizer}"]
    status, _, err = cli(train.main, *RUN, *steps, f"--dtype={dtype}", f"--compile={compiled}")
    assert status == 0, err
    assert loading.load("out/ckpt.pt")["best_val_loss"] < 0.7 * math.log(20)  # about 20 characters


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deterministic_run_repeats_and_resumes_bit_for_bit(cli, tiny_set, optimizer, dtype):
    run = [*RUN, f"--dtype={dtype}", "--dropout=0.1", "--deterministic=True", f"--optimizer={optimizer}"]
    try:
        for out_dir in ("a", "b"):
            assert cli(train.main, *run, f"--out_dir={out_dir}")[0] == 0
        assert cli(train.main, *run, "--out_dir=c", "--max_iters=3", "--lr_decay_iters=6")[0] == 0
        assert cli(train.main, "--init_from=resume", "--out_dir=c", "--max_iters=6")[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)
    for other in ("b", "c"):
        assert all(map(torch.equal, weights("a").values(), weights(other).values()))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_in_chunks_gives_the_gradients_of_all_logits_at_once(monkeypatch, compiled):
    gpt, idx, targets = small_gpt(), random_ids(4, 300, below=50), random_ids(4, 300, below=50, seed=1)
    idx, targets = idx.to(DEVICE), targets.to(DEVICE)
    found = []
    for at_once in (loss.LOGITS_AT_ONCE, 10_000):
        torch._dynamo.reset()
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE_COMPILED", at_once)
        with torch.autocast(DEVICE, torch.bfloat16):
            objective = NextToken(gpt, loss.next_token_loss)
            mean = (torch.compile(objective) if compiled else objective)(idx, targets)
        found.append([mean, *torch.autograd.grad(mean, list(gpt.parameters()))])
    for whole, chunked in zip(*found, strict=True):
        assert (chunked - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_examples_by_their_borders_have_the_gradients_of_a_mask(n_kv_head, compiled):
    idx, targets = random_ids(4, 300, below=50).to(DEVICE), random_ids(4, 300, below=50, seed=1).to(DEVICE)
    lengths = [[1, 2, 97, 100, 100], [300], [150, 150], [64, 64, 64, 64, 44]]
    positions = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
    found = []
    for by_borders in (False, True):
        torch._dynamo.reset()
        gpt = small_gpt(n_head=4, n_kv_head=n_kv_head)
        if by_borders and not attend_within_examples(gpt, 6, torch.device(DEVICE), torch.bfloat16):
            pytest.skip("this GPU or torch has no kernel for borders")
        objective = NextToken(gpt)
        with torch.autocast(DEVICE, torch.bfloat16):
            mean = (torch.compile(objective) if compiled else objective)(idx, targets, positions.to(DEVICE))
        found.append([mean, *torch.autograd.grad(mean, list(gpt.parameters()))])
    for masked, bordered in zip(*found, strict=True):
        assert (bordered - masked).norm() < 0.02 * masked.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_learns_the_same_with_less_memory(cli, tiny_set, compiled):
    peaks, losses = [], []
    for again in (False, True):
        torch.cuda.reset_peak_memory_stats()
        shape = ["--n_layer=8", "--block_size=128", "--batch_size=64", "--dtype=float32", "--dropout=0"]
        options = [f"--activation_checkpointing={again}", f"--compile={compiled}", f"--out_dir=out{again}"]
        assert cli(train.main, *RUN, *shape, *options)[0] == 0
        peaks.append(torch.cuda.max_memory_allocated())
        losses.append(loading.load(f"out{again}/ckpt.pt")["best_val_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3) and peaks[1] < 0.6 * peaks[0]


# Generation


GREEDY, DRAWN = Sampling(temperature=0), Sampling(1.3, 20, 0.95, 0.01, 1.2)


def small_gpt(**shape):
    return random_gpt(block_size=300, vocab_size=50, n_embd=32, **shape).to(DEVICE)


def texts_of(*lengths):
    return [random_ids(length, below=50, seed=row).tolist() for row, length in enumerate(lengths)]


@pytest.fixture
def float32_products():
    """Matrix products of float32 in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_cached_generation_is_that_of_the_cpu(float32_products, sampling):
    gpt, texts = small_gpt().double(), texts_of(7, 300, 1)  # float64: no draw is near enough to a boundary
    found = generate(Engine(gpt), texts, 400, sampling=sampling)
    assert found == generate(Engine(gpt.cpu()), texts, 400, sampling=sampling)


@pytest.mark.parametrize("kind", ["graph", "compiled"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_recorded_steps_write_what_plain_ones_write(float32_products, sampling, kind):
    gpt = small_gpt()
    plain, recorded = Engine(gpt), Engine(gpt, kind)
    # One engine for texts of all kinds, some of them twice: what the older ones left in it changes nothing.
    for lengths in ([1], [40], [1], [7, 290, 300, 1], [3, 4, 5, 6], [9] * 3, [7, 290, 300, 1], [300]):
        texts = texts_of(*lengths)
        for count in (1, 120):  # past block_size, 300, twice
            options = {"sampling": sampling, "seed": 3}
            assert generate(recorded, texts, count, **options) == generate(plain, texts, count, **options)


@pytest.mark.parametrize("kind", ["plain", "graph", "compiled"])
def test_logprobs_belong_to_their_token_though_the_device_is_ahead(float32_products, kind):
    gpt, texts, sampling = small_gpt(), texts_of(3, 298), replace(DRAWN, logprobs=True)
    steps = list(stream(Engine(gpt, kind), texts, 40, sampling))
    continued = [list(text) for text in texts]
    for drawn, plain in zip(steps, stream(Engine(gpt), texts, 40, DRAWN), strict=True):
        assert drawn.ids == plain.ids
        for row, text in enumerate(continued):
            if len(text) <= 300:
                logits = logits_of(gpt, torch.tensor([text], device=DEVICE))[0, -1]
                logprobs = logits.log_softmax(dim=-1)
                assert drawn.logprobs[row] == pytest.approx(logprobs[drawn.ids[row]].item(), abs=1e-3)
                assert drawn.top_logprobs[row] == pytest.approx(logprobs.topk(5).values.tolist(), abs=1e-3)
                assert drawn.top_logprobs[row] == sorted(drawn.top_logprobs[row], reverse=True)
            text.append(drawn.ids[row])


def test_a_stream_that_is_left_early_leaves_the_engine_usable():
    gpt, texts = small_gpt(), texts_of(3, 20)
    engine = Engine(gpt, "graph")
    expected = list(stream(engine, texts, 30, DRAWN))
    assert list(islice(stream(engine, texts, 30, DRAWN), 5)) == expected[:5]
    assert list(stream(engine, texts, 30, DRAWN)) == expected


@pytest.mark.parametrize("kind", ["graph", "compiled"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_writes_with_the_likelihood_of_the_plain_engine(dtype, kind):
    gpt, texts = small_gpt().to(getattr(torch, dtype)), texts_of(200)
    sampling = Sampling(logprobs=True)
    mean = []
    for engine in (Engine(gpt), Engine(gpt, kind)):
        steps = list(stream(engine, texts * 16, 200, sampling))
        mean.append(sum(sum(drawn.logprobs) for drawn in steps) / (200 * 16))
    assert mean[0] == pytest.approx(mean[1], abs=0.15)


@pytest.mark.parametrize("kind", ["graph", "compiled"])
def test_recorded_beams_are_the_plain_ones(float32_products, kind):
    gpt, texts = small_gpt(), texts_of(3, 290)
    found, expected = (
        beam_search(engine, texts, 25, beams=4, length_penalty=0.6, ends=lambda ids: ids[-1] == 5)
        for engine in (Engine(gpt, kind), Engine(gpt))
    )
    for some, others in zip(found, expected, strict=True):
        assert [one.ids for one in some] == [other.ids for other in others]
        assert [one.score for one in some] == pytest.approx([other.score for other in others], abs=1e-3)


def test_other_numbers_of_a_sampling_record_and_compile_nothing():
    gpt, texts = small_gpt(), texts_of(3, 20)
    engine = Engine(gpt, "compiled")
    list(stream(engine, texts, 30, DRAWN))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sampling in (replace(DRAWN, temperature=0.7, top_k=17), replace(DRAWN, min_p=0.2, top_p=0.5)):
            expected = list(stream(engine, texts, 30, sampling))
            assert list(stream(engine, texts, 30, sampling)) == expected
    assert len(engine.recorded.steps) == 1


@pytest.mark.parametrize("kind", ["plain", "graph", "compiled"])
def test_the_device_never_waits_for_the_host_within_a_text(kind):
    gpt, texts = small_gpt(), texts_of(3, 20)
    engine = Engine(gpt, kind)
    list(stream(engine, texts, 30, DRAWN))
    steps = stream(engine, texts, 30, DRAWN)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_second_gpu_is_used_without_being_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    gpt, texts = small_gpt().double(), texts_of(3, 20)
    expected = generate(Engine(gpt), texts, 30, sampling=DRAWN)
    gpt.to("cuda:1")
    assert all(
        generate(Engine(gpt, kind), texts, 30, sampling=DRAWN) == expected for kind in ("plain", "graph")
    )
