"""train.py end to end, on models and texts so small that a run takes a blink."""

import copy
import fcntl
import json
import math
import os
import pickle
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY_RUN,
    process_environment,
    records,
    results,
    write_text,
)
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

import prepare
import sample
import train
from kqv.settings import parse
from kqv.text import tokenizers
from kqv.text.dataset import Dataset
from kqv.training.batches import micro_batches
from kqv.training.schedule import learning_rate_at
from kqv.training.world import World
from model import GPT, MLP, GPTConfig

TINY = [*TINY_RUN, "--dataset=tiny"]
# Each step four micro-batches, with dropout: what resuming and sharing among processes must not disturb.
FOUR = [*TINY, "--gradient_accumulation_steps=4", "--dropout=0.1"]


@pytest.fixture
def run(cli, tiny_set):
    """Call train.py's main and see it succeed: run("--max_iters=3") -> what it printed."""

    def succeed(*argv):
        status, out, err = cli(train.main, *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


def logged(name, folder="out"):
    """{step: number} of one of the logged numbers."""
    return {record["step"]: record[name] for record in records(folder) if name in record}


def saved(path="out/ckpt.pt"):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a, b):
    """Equal bit for bit, through nested containers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_training(a, b):
    """Whether two checkpoint files hold the same weights, optimizer state and step."""
    return all(
        same(saved(a)[name], saved(b)[name]) for name in ("model", "optimizer", "iter_num", "best_val_loss")
    )


def listing(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Training


def test_loss_falls_far_below_that_of_guessing(run):
    run(*TINY, "--batch_size=8", "--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150")
    val_loss, guessing = logged("val_loss"), math.log(21)
    assert val_loss[0] == pytest.approx(guessing, abs=0.1)
    assert val_loss[150] < 0.75 * guessing
    assert logged("train_loss")[150] < 0.75 * guessing


@pytest.mark.parametrize(
    "dropout, grad_clip",
    [(0.0, 0.1), (0.0, 0.0), (0.1, 1.0)],
    ids=["clip", "no clip", "dropout"],
)
def test_a_run_does_what_a_plain_loop_does(run, dropout, grad_clip):
    argv = [*FOUR, f"--dropout={dropout}", f"--grad_clip={grad_clip}", "--learning_rate=1e-3", "--bias=True"]
    argv += ["--dtype=float32"]
    run(*argv)
    gpt, losses, norms = plain_training(parse(train.TrainSettings, argv))
    assert list(logged("loss").values()) == pytest.approx(losses, abs=1e-6)
    assert list(logged("grad_norm").values()) == pytest.approx(norms, abs=1e-5)
    assert min(norms) > 0.1  # so that a clip of 0.1 is one
    for name, weight in gpt.state_dict().items():
        torch.testing.assert_close(saved()["model"][name], weight, atol=2e-6, rtol=0, msg=name)


def plain_training(config):
    """Training written out: the mean of the micro-batches' gradients, clipped, into plain AdamW."""
    torch.manual_seed(config.seed)
    shape = {
        name: getattr(config, name)
        for name in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")
    }
    gpt = GPT(GPTConfig(vocab_size=21, **shape)).train()
    parameters = list(gpt.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), foreach=False, fused=False)
    losses, norms = [], []
    for step in range(config.max_iters):
        loss, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
        for index in range(4):
            batch, seed = Dataset("tiny").training_batch(
                config.batch_size, config.block_size, config.seed, step, index
            )
            x, y = torch.from_numpy(batch.idx), torch.from_numpy(batch.targets)
            torch.manual_seed(seed)
            logits = gpt.lm_head(gpt.hidden(x))
            micro_loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            loss += micro_loss.item() / 4
            for total, gradient in zip(gradients, torch.autograd.grad(micro_loss, parameters), strict=True):
                total += gradient / 4
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        clip = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * clip
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.step()
        losses.append(loss)
        norms.append(norm)
    return gpt, losses, norms


def test_evaluating_more_often_does_not_shift_training(run):
    run(*FOUR, "--eval_interval=1", "--out_dir=often")
    run(*FOUR, "--eval_interval=100", "--eval_iters=1", "--out_dir=seldom")
    assert same(saved("often/ckpt.pt")["model"], saved("seldom/ckpt.pt")["model"])
    assert logged("loss", "often") == logged("loss", "seldom")


def test_the_seed_decides_everything(run):
    run(*FOUR, "--out_dir=one")
    run(*FOUR, "--out_dir=again")
    run(*FOUR, "--out_dir=other", "--seed=1338")
    assert same_training("one/ckpt.pt", "again/ckpt.pt")
    assert results("one") == results("again")
    assert not same(saved("one/ckpt.pt")["model"], saved("other/ckpt.pt")["model"])


def test_dropout_is_on_in_training_and_off_in_evaluation(run):
    run(*TINY, "--dropout=0.5", "--out_dir=dropout")
    run(*TINY, "--out_dir=plain")
    assert logged("val_loss", "dropout")[0] == logged("val_loss", "plain")[0]
    assert logged("loss", "dropout")[0] != logged("loss", "plain")[0]  # comes right after an evaluation


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_trains_with_float32_weights(run, dtype):
    out = run(*TINY, f"--dtype={dtype}", "--out_dir=low")
    run(*TINY, "--dtype=float32")
    assert dtype in out
    assert {weight.dtype for weight in saved("low/ckpt.pt")["model"].values()} == {torch.float32}
    assert list(logged("loss", "low").values()) == pytest.approx(list(logged("loss").values()), abs=0.02)
    assert logged("loss", "low") != logged("loss")  # it did compute in another precision


# Activation checkpointing


@pytest.mark.parametrize(
    "dropout, dtype, block_size",  # the last on both sides of where attention is computed otherwise
    [(0.0, "float32", 16), (0.1, "bfloat16", 16), (0.1, "float32", 136)],
)
def test_activation_checkpointing_changes_no_bit(run, dropout, dtype, block_size):
    computed = []
    hook = register_module_forward_pre_hook(lambda module, _: computed.append(isinstance(module, MLP)))
    argv = [*FOUR, f"--dropout={dropout}", f"--dtype={dtype}", f"--block_size={block_size}", "--max_iters=3"]
    try:
        run(*argv, "--out_dir=plain")
        once = sum(computed)
        run(*argv, "--activation_checkpointing=True")
    finally:
        hook.remove()
    assert sum(computed) - once == once + 3 * 4 * 2  # again in each step, micro-batch and layer
    assert same_training("out/ckpt.pt", "plain/ckpt.pt")
    assert results("out") == results("plain")


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_run_resumes_with_activation_checkpointing_switched(run, first, then):
    run(*FOUR, "--out_dir=straight")
    run(*FOUR, "--max_iters=3", f"--activation_checkpointing={first}")
    assert saved()["model"].keys() == saved("straight/ckpt.pt")["model"].keys()
    out = run("--init_from=resume", "--max_iters=6", f"--activation_checkpointing={then}")
    assert f"activation_checkpointing {first} -> {then}" in out
    assert same_training("out/ckpt.pt", "straight/ckpt.pt")
    assert results("out") == results("straight")


# What a run leaves behind


def test_metrics_hold_one_object_for_each_logged_step_and_evaluation(run):
    run(*TINY, "--log_interval=2")
    evaluations, steps, saves = (
        [record for record in records() if record["kind"] == kind] for kind in ("evaluation", "train", "save")
    )
    assert len(evaluations) + len(steps) + len(saves) == len(records())
    assert [record["step"] for record in saves] == [3, 6]
    assert [record["step"] for record in evaluations] == [0, 3, 6]
    assert [record["step"] for record in steps] == [0, 2, 4]
    common = {"kind", "step"}
    assert {frozenset(record.keys() - common) for record in evaluations} == {
        frozenset({"train_loss", "val_loss", "val_bits_per_byte"})
    }
    assert {frozenset(record.keys() - common) for record in steps} == {
        frozenset({"loss", "lr", "grad_norm", "tokens_per_second"})
    }
    assert {frozenset(record.keys() - common) for record in saves} == {frozenset({"save_stall_ms"})}
    # é, of two bytes, is a token here: a loss in nats per token, in bits for each of the bytes
    text = Path("text.txt").read_text("utf-8")
    val = text.encode("utf-8")[int(len(text.encode("utf-8")) * 0.9) :].decode("utf-8")
    for record in evaluations:
        bits = record["val_loss"] / math.log(2) * len(val) / len(val.encode("utf-8"))
        assert record["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6) and "é" in val
    config = parse(train.TrainSettings, TINY)
    assert logged("lr") == {step: learning_rate_at(step, config) for step in (0, 2, 4)}
    assert all(record["tokens_per_second"] > 0 and record["grad_norm"] > 0 for record in steps)


def test_plain_lines_say_what_the_metrics_say(run):
    lines = run(*TINY).splitlines()
    for step, loss in logged("loss").items():
        assert any(line.startswith(f"step {step}: loss {loss:.4f}, lr ") for line in lines)
    for record in records():
        if "val_loss" in record:
            step, train_loss, val_loss = record["step"], record["train_loss"], record["val_loss"]
            bits = f"{record['val_bits_per_byte']:.3f} bits per byte"
            assert f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} = {bits}" in lines
    assert lines[-1] == "to see what it writes: python sample.py --out_dir=out"


def test_a_run_that_diverged_ends_with_an_error_and_its_metrics_are_json(cli, tiny_set):
    status, out, err = cli(train.main, *TINY, "--learning_rate=1e30", "--decay_lr=False")
    error = err.splitlines()[-1]
    assert status == 1 and "done" not in out and error.startswith("error: ")
    assert "loss at step 6 is not finite" in error and "--learning_rate" in error
    assert not list(Path("out").glob("*.pt"))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in Path("out/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def fall_apart(run, *argv):
    """A run of 12 steps, of which the second half has a learning rate that is far too large."""
    run(*TINY, *argv, "--max_iters=6")
    run("--init_from=resume", "--max_iters=12", "--learning_rate=10", "--decay_lr=False")


def test_best_and_newest_weights_are_kept(run):
    fall_apart(run)
    val_loss = logged("val_loss")
    best = min(val_loss, key=val_loss.get)
    assert 0 < best < 12  # else this test shows nothing
    assert saved("out/best.pt")["iter_num"] == best
    assert saved("out/ckpt.pt")["iter_num"] == 12
    assert saved("out/ckpt.pt")["best_val_loss"] == saved("out/best.pt")["best_val_loss"] == val_loss[best]
    for name, step in (("best.pt", best), ("ckpt.pt", 12)):
        assert f"val loss {val_loss[step]:.4f}" in run(*TINY, f"--init_from=out/{name}", "--eval_only")


def test_only_improvements_and_the_last_state_are_saved_if_so_wanted(run):
    fall_apart(run, "--always_save_checkpoint=False", "--eval_interval=2")
    val_loss = logged("val_loss")
    best = [
        step for step in val_loss if step and val_loss[step] < min(val_loss[s] for s in range(0, step, 2))
    ]
    assert [record["step"] for record in records() if record["kind"] == "save"] == sorted({*best, 12})
    assert 0 < len(best) < 6 and saved("out/best.pt")["iter_num"] == best[-1] < 12
    assert saved("out/ckpt.pt")["iter_num"] == 12


@pytest.mark.parametrize("start", ["scratch", "base"])
@pytest.mark.parametrize("max_iters", [0, 6])
def test_a_run_that_never_improves_leaves_its_last_state(run, start, max_iters):
    run(*TINY, "--out_dir=base")
    run(*TINY, "--max_iters=3")  # an older run in the same folder
    argv = ["--learning_rate=10", "--always_save_checkpoint=False", f"--max_iters={max_iters}"]
    out = run(*TINY, f"--init_from={start}", *argv, "--decay_lr=False")
    val_loss = logged("val_loss")
    assert min(val_loss.values()) == val_loss[0]  # else this test shows nothing
    assert saved()["iter_num"] == max_iters and saved()["config"]["init_from"] == start
    assert Path("out/best.pt").exists() == (max_iters == 0)  # it is the older run's no longer
    assert f"done: step {max_iters}" in out


def test_a_new_run_names_what_it_replaces_and_keeps_it(run):
    assert "another run" not in run(*TINY)
    first, numbers = listing("out"), Path("out/metrics.jsonl").read_bytes()
    out = run(*TINY, "--seed=1")
    assert out.count("out has another run's ckpt.pt and best.pt: at this run's first save they become ") == 1
    for name in ("ckpt", "best"):
        assert Path(f"out/{name}.old.pt").read_bytes() == first[Path(f"out/{name}.pt")]
        assert saved(f"out/{name}.pt")["config"]["seed"] == 1
    assert saved("out/ckpt.prev.pt")["config"]["seed"] == 1
    assert Path("out/metrics.old.jsonl").read_bytes() == numbers != Path("out/metrics.jsonl").read_bytes()
    run(*TINY, "--seed=2", "--max_iters=1", "--eval_interval=1000", "--learning_rate=0", "--eval_iters=1")
    assert saved("out/ckpt.old.pt")["config"]["seed"] == saved("out/best.old.pt")["config"]["seed"] == 1


def test_a_resumed_run_with_no_step_left_says_so(run):
    run(*TINY, "--max_iters=4")
    resume = ["--init_from=resume", "--device=cpu"]
    assert "no step is left: the run is at step 4; to train on" in run(*resume, "--max_iters=3")
    assert "no step is left" not in run(*resume, "--max_iters=5")


def test_a_start_that_is_misspelt_names_those_there_are(run, cli):
    status, _, err = cli(train.main, *TINY, "--init_from=resum")
    assert status == 1 and "nor one of scratch, resume, auto, smollm2, gpt2," in err
    status, _, err = cli(sample.main, "--init_from=resum")
    assert status == 1 and "nor one of resume, smollm2, gpt2," in err


def test_a_new_run_that_ends_before_it_saves_leaves_all_as_it_was(run, cli):
    run(*TINY, "--max_iters=4")
    before = listing("out")
    for _ in range(2):
        status, _, err = cli(
            train.main, *TINY, "--learning_rate=1e30", "--decay_lr=False", "--max_bad_steps=1"
        )
        assert status == 1 and "not finite" in err
    assert {path: before[path] for path in before if path.suffix == ".pt"}.items() <= listing("out").items()
    assert Path("out/metrics.prev.jsonl").read_bytes() == before[Path("out/metrics.jsonl")]
    run("--init_from=auto", "--max_iters=6")
    run(*TINY, "--out_dir=straight", "--eval_interval=3")
    assert list(logged("loss").values()) == list(logged("loss", "straight").values())
    assert not Path("out/metrics.prev.jsonl").exists()


def test_checkpoint_is_self_contained(run):
    run(*TINY)
    newest, best = saved("out/ckpt.pt"), saved("out/best.pt")
    assert newest.keys() >= {"model", "optimizer", "scaler", "iter_num", "best_val_loss"}  # to go on
    assert best.keys() >= {"model", "model_args", "config", "tokenizer", "iter_num", "best_val_loss"}
    assert best.keys() == newest.keys() - {"optimizer", "scaler"}
    text = "keys and queries, é"[:16]
    tok = tokenizers.from_json(newest["tokenizer"])
    assert tok.decode(tok.encode(text)) == text
    gpt = GPT.from_weights(GPTConfig(**newest["model_args"]), newest["model"])
    assert gpt.config.vocab_size == tok.vocab_size == 21
    assert newest["config"]["learning_rate"] == 1e-2
    assert parse(train.TrainSettings, [], newest["config"]).dataset == "tiny"


def test_evaluating_only_prints_both_losses_and_writes_nothing(run):
    run(*TINY)
    before = listing()
    last = [record for record in records() if "val_loss" in record][-1]
    out = run(*TINY, "--init_from=resume", "--eval_only")
    assert (
        out.splitlines()[-1]
        == f"step 6: train loss {last['train_loss']:.4f}, val loss {last['val_loss']:.4f}"
        f" = {last['val_bits_per_byte']:.3f} bits per byte"
    )
    assert "step 0: train loss 3.0" in run(*TINY, "--eval_only", "--out_dir=new")
    assert listing() == before
    assert not Path("new").exists()


# Resuming


def test_a_stopped_run_goes_on_as_if_never_stopped(run):
    run(*FOUR, "--out_dir=straight")
    run(*FOUR, "--max_iters=3")
    torch.manual_seed(0)  # as random as a new process
    run("--init_from=resume", "--max_iters=6")
    assert same_training("out/ckpt.pt", "straight/ckpt.pt")
    assert same_training_weights("out/best.pt", "straight/best.pt")
    assert results("out") == results("straight")


@pytest.mark.parametrize("stop_at", [2, 7])
def test_a_stopped_run_goes_on_with_the_epoch_that_it_was_in(stop_at, run, cli, tmp_path):
    write_text(tmp_path / "short.txt", words=80)
    assert cli(prepare.main, "short.txt")[0] == 0
    argv = [*FOUR, "--dataset=short", "--max_iters=12"]
    windows = Dataset("short").windows("train", 16)
    assert 3 * 16 < windows < 6 * 16  # so an epoch has some four or five steps
    run(*argv, "--data_order=epoch", "--out_dir=straight")
    run(*argv, "--data_order=epoch", f"--max_iters={stop_at}")
    run("--init_from=resume", "--max_iters=12")
    assert same_training("out/ckpt.pt", "straight/ckpt.pt")
    assert logged("loss") == logged("loss", "straight")
    run(*argv, "--out_dir=drawn")
    assert logged("loss", "drawn") != logged("loss", "straight")


def test_another_batch_size_skips_and_repeats_no_window_of_an_epoch(run, cli):
    write_text(Path("short.txt"), words=80)
    assert cli(prepare.main, "short.txt")[0] == 0
    count = Dataset("short").windows("train", 16)
    argv = [*TINY, "--dataset=short", "--data_order=epoch", "--max_iters=3"]
    run(*argv)
    run("--init_from=resume", "--batch_size=2", "--gradient_accumulation_steps=3", "--max_iters=5")
    run("--init_from=resume", "--batch_size=1", "--max_iters=7")
    assert saved()["windows"] == 3 * 4 + 2 * 6 + 2 * 3
    seen, config = [], {"seed": 1337, "block_size": 16, "data_order": "epoch"}
    world, before = World(torch.device("cpu")), 0
    for step in range(2 * count):
        sizes = {"batch_size": 1 + step % 3, "gradient_accumulation_steps": 1 + step % 2}
        for (idx, _), *_ in micro_batches(
            Dataset("short"), SimpleNamespace(**config, **sizes), world, step, before
        ):
            seen += idx.tolist()
        before += sizes["batch_size"] * sizes["gradient_accumulation_steps"]
    straight = Dataset("short").in_epochs(0, len(seen), 16, 1337)
    assert seen == Dataset("short").batch("train", straight, 16).idx.tolist()


def test_a_resumed_run_reads_on_where_it_was_in_the_epoch(run):
    argv = [*TINY, "--data_order=epoch", "--learning_rate=0", "--min_lr=0", "--dtype=float32"]
    run(*argv, "--max_iters=3")
    run("--init_from=resume", "--batch_size=2", "--max_iters=5")
    run(*argv, "--batch_size=2", "--max_iters=8", "--out_dir=straight")
    found, expected = logged("loss"), logged("loss", "straight")
    assert [found[3], found[4]] == pytest.approx([expected[6], expected[7]], abs=1e-5)
    assert found[3] != pytest.approx(expected[3], abs=1e-3)


def test_an_epoch_begins_anew_on_another_text(run, cli):
    run(*TINY, "--data_order=epoch")
    other_set(cli, "queries " * 500, "queries")
    out = run("--init_from=resume", "--dataset=queries", "--max_iters=7")
    assert "the epoch begins anew" in out and saved()["windows"] == 4
    assert "the epoch begins anew" not in run("--init_from=resume", "--max_iters=8")


def same_training_weights(a, b):
    return same(saved(a)["model"], saved(b)["model"]) and saved(a)["iter_num"] == saved(b)["iter_num"]


def test_resuming_needs_nothing_but_the_folder(run):
    Path("mine.py").write_text("n_embd = 16\nbeta2 = 0.9\ndropout = 0.1\n")
    run(*TINY, "mine.py", "--n_embd=48", "--max_iters=3")
    Path("out").rename("moved")
    run("--init_from=resume", "--out_dir=moved", "--max_iters=6")
    run(*TINY, "mine.py", "--n_embd=48", "--out_dir=straight")
    assert same_training("moved/ckpt.pt", "straight/ckpt.pt")
    assert saved("moved/ckpt.pt")["config"] == {
        **saved("straight/ckpt.pt")["config"],
        "out_dir": "moved",
        "init_from": "resume",
    }
    assert not Path("out").exists()
    Path("moved").rename("out")  # where to look when nothing else is said
    run("--init_from=resume", "--max_iters=7")
    assert saved()["iter_num"] == 7 and not Path("moved").exists()


def test_resuming_remembers_the_best_loss(run):
    fall_apart(run)
    run("--init_from=resume", "--max_iters=13")
    val_loss = logged("val_loss")
    assert saved("out/best.pt")["iter_num"] == min(val_loss, key=val_loss.get) < 12
    assert saved("out/ckpt.pt")["best_val_loss"] == min(val_loss.values())


def other_set(cli, text, name):
    """Another set, with the tokenizer of the first."""
    Path(f"{name}.txt").write_text(text, "utf-8")
    status, _, err = cli(prepare.main, f"{name}.txt", f"--name={name}", "--tokenizer=data/tiny")
    assert status == 0, err


@pytest.mark.parametrize("same_name", [True, False])
def test_a_best_loss_belongs_to_the_text_that_it_was_measured_on(run, cli, same_name):
    run(*TINY)
    best = saved("out/best.pt")["best_val_loss"]
    other_set(cli, "éqéé" * 1000, "tiny" if same_name else "queries")
    argv = [] if same_name else ["--dataset=queries"]
    argv += ["--always_save_checkpoint=False", "--learning_rate=0", "--min_lr=0", "--max_iters=9"]
    out = run("--init_from=resume", *argv)
    assert (
        out.count(f"the best validation loss so far, {best:.4f}, was not measured on what is evaluated now")
        == 1
    )
    val_loss = [record["val_loss"] for record in records() if "val_loss" in record]
    assert len(val_loss) == 5  # step 6 has one on each text
    assert val_loss[3] > best  # else this test shows nothing
    assert saved("out/best.pt")["best_val_loss"] == saved()["best_val_loss"] == val_loss[3]
    assert saved("out/best.pt")["iter_num"] == 6 and saved()["iter_num"] == 9
    assert saved("out/best.old.pt")["best_val_loss"] == best
    assert "the best begins anew" not in run("--init_from=resume", "--max_iters=10")


def test_a_best_loss_belongs_to_the_windows_that_it_was_measured_on(run):
    run(*TINY)
    assert "the best begins anew" in run("--init_from=resume", "--eval_iters=3", "--max_iters=7")
    same_windows = ["--eval_iters=6", "--batch_size=2", "--gradient_accumulation_steps=2"]
    assert "the best begins anew" not in run("--init_from=resume", *same_windows, "--max_iters=8")


def test_an_older_checkpoint_keeps_its_best_loss_where_no_setting_says_otherwise(run):
    run(*TINY)
    older = saved()
    del older["belongs_to"], older["windows"]
    torch.save(older, "out/ckpt.pt")
    assert "the best begins anew" not in run("--init_from=resume", "--max_iters=7")
    assert saved()["best_val_loss"] <= older["best_val_loss"] and saved()["windows"] == 7 * 4
    torch.save(older, "out/ckpt.pt")
    assert "the best begins anew" in run("--init_from=resume", "--max_iters=7", "--eval_iters=1")


def test_resuming_with_another_optimizer_is_refused(run, cli):
    run(*TINY, "--max_iters=1")
    status, _, err = cli(train.main, "--init_from=resume", "--optimizer=muon")
    assert status == 2 and "the run in out has adamw" in err and err.count("\n") == 1
    run(*TINY, "--init_from=out/ckpt.pt", "--out_dir=other", "--max_iters=1", "--optimizer=muon")


def test_what_means_nothing_to_the_optimizer_is_said(run):
    out = run(*TINY, "--max_iters=1", "--muon_momentum=0.9", "--cooldown_iters=3")
    assert "not used: cooldown_iters (schedule is cosine), muon_momentum (optimizer is adamw)" in out
    out = run(
        *TINY, "--out_dir=c", "--max_iters=1", "--schedule=constant", "--min_lr=0.1", "--warmup_iters=0"
    )
    assert "min_lr (schedule is constant)" in out and "lr 1.00e-02" in out
    out = run(*TINY, "--out_dir=b", "--max_iters=1", "--optimizer=muon", "--head_learning_rate=0.1")
    assert "not used: head_learning_rate (the head is the embedding)" in out


def test_initial_weights_are_those_that_were_asked_for(run):
    run(*TINY, "--max_iters=0", "--zero_projections", "--embedding_std=0.7", "--tied_head=False")
    weights = saved("out/ckpt.pt")["model"]
    assert all(not weight.any() for name, weight in weights.items() if name.endswith("c_proj.weight"))
    assert weights["transformer.wte.weight"].std() == pytest.approx(0.7, rel=0.1)
    assert weights["lm_head.weight"].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_muon_is_resumed_bit_for_bit(run, every_shape, dtype):
    argv = [
        *TINY,
        *every_shape,
        f"--dtype={dtype}",
        "--optimizer=muon",
        "--schedule=wsd",
        "--label_smoothing=0.1",
    ]
    run(*argv, "--out_dir=straight")
    run(*argv, "--max_iters=3", "--lr_decay_iters=6", "--out_dir=parts")
    run("--init_from=resume", "--max_iters=6", "--out_dir=parts")
    one, other = (saved(f"{folder}/ckpt.pt") for folder in ("straight", "parts"))
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][number][name]), (number, name)


def test_resuming_with_another_architecture_is_refused(run, cli):
    run(*TINY, "--max_iters=3")
    before = listing()
    status, _, err = cli(train.main, "--init_from=resume", "--n_layer=3")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "n_layer=3" in err and "n_layer=2" in err
    assert listing() == before


def test_resuming_a_finished_run_harms_nothing(run):
    run(*TINY)
    before, numbers = listing(), results()
    assert "done: step 6" in run("--init_from=resume")
    assert "done: step 6" in run("--init_from=resume", "--max_iters=4")
    assert results() == numbers
    before.pop(Path("out/metrics.jsonl"))
    assert before.items() <= listing().items() and len(listing()) == len(before) + 1


@pytest.mark.parametrize("source", ["first", "first/best.pt", "first/ckpt.pt"])
def test_starting_from_trained_weights_is_a_new_run(run, source):
    run(*TINY, "--out_dir=first")
    run(*TINY, f"--init_from={source}", "--out_dir=second")
    assert logged("val_loss", "second")[0] == logged("val_loss", "first")[6]
    assert logged("lr", "second") == logged("lr", "first")
    assert saved("second/ckpt.pt")["iter_num"] == 6
    assert saved("second/ckpt.pt")["optimizer"]["state"][0]["step"] == 6
    assert logged("val_loss", "second")[6] < logged("val_loss", "first")[6]


def test_starting_with_a_shorter_context_crops_the_positions(run):
    run(*TINY, "--out_dir=first", "--max_iters=3")
    run(*TINY, "--init_from=first", "--block_size=8", "--eval_only", "--out_dir=second")
    run(*TINY, "--init_from=first", "--block_size=8", "--learning_rate=0", "--min_lr=0", "--out_dir=second")
    positions = saved("second/ckpt.pt")["model"]["transformer.wpe.weight"]
    assert torch.equal(positions, saved("first/ckpt.pt")["model"]["transformer.wpe.weight"][:8])
    assert positions.untyped_storage().nbytes() == positions.numel() * 4  # the rest is not in the file
    assert saved("second/ckpt.pt")["model_args"]["block_size"] == 8
    assert saved("second/ckpt.pt")["config"]["block_size"] == 8


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_weights_of_another_tokenizer_are_refused(run, cli, kind):
    run(*TINY, "--max_iters=3")
    Path("other.txt").write_text("other letters\n" * 100)  # fewer than the weights know
    status, _, err = cli(prepare.main, "other.txt", "--name=other", f"--tokenizer={kind}")
    assert status == 0, err
    before = listing()
    for source in (["--init_from=out", "--out_dir=new"], ["--init_from=resume"]):
        status, _, err = cli(train.main, *TINY, "--dataset=other", *source)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
        assert "tokenizer" in err and "data/other" in err
    assert listing() == before


# nanoGPT's own checkpoints


def nanogpt_checkpoint(ours, prefix):
    """What nanoGPT writes for the same state: its prefix and mask buffers, its config, and no tokenizer."""
    block_size = ours["model_args"]["block_size"]
    weights = {prefix + name: weight for name, weight in ours["model"].items()}
    for layer in range(ours["model_args"]["n_layer"]):
        mask = torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size)
        weights[f"{prefix}transformer.h.{layer}.attn.bias"] = mask
    foreign = {"backend": "nccl", "compile": True, "wandb_log": False, "device": "cuda", "dtype": "bfloat16"}
    return {
        "model": weights,
        "optimizer": copy.deepcopy(ours["optimizer"]),
        "model_args": {**ours["model_args"], "dropout": 0.0},
        "iter_num": ours["iter_num"],
        "best_val_loss": torch.tensor(ours["best_val_loss"]),
        "config": {**{k: v for k, v in ours["config"].items() if k != "seed"}, **foreign},
    }


def use_nanogpts_meta():
    """The tiny set as nanoGPT's prepare.py leaves it."""
    chars = json.loads(Path("data/tiny/meta.json").read_text("utf-8"))["tokenizer"]["chars"]
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    Path("data/tiny/meta.pkl").write_bytes(pickle.dumps(meta))
    Path("data/tiny/meta.json").unlink()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_nanogpts_checkpoint_resumes_and_samples(run, cli, prefix):
    run(*TINY, "--max_iters=3")
    shutil.copytree("out", "ours")
    torch.save(nanogpt_checkpoint(saved(), prefix), "out/ckpt.pt")
    Path("out/best.pt").unlink()
    use_nanogpts_meta()
    status, text, err = cli(sample.main, "--start=keys", "--max_new_tokens=5", "--device=cpu")
    assert status == 0 and text.startswith("keys") and len(text) == 4 + 5 + 1, err
    here = ["--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=6"]
    run("--init_from=resume", *here)
    run("--init_from=resume", *here, "--out_dir=ours")
    assert same_training("out/ckpt.pt", "ours/ckpt.pt")


# On a terminal


def on_terminal(*argv, columns=120):
    """train.py in a process whose output is a terminal: (exit status, all that was written to it)."""
    terminal, output = pty.openpty()
    fcntl.ioctl(output, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    process = subprocess.Popen(command, stdout=output, stderr=output, env=process_environment())
    os.close(output)
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    finally:
        os.close(terminal)
    return process.wait(), written.decode()


def test_a_terminal_gets_a_bar_instead_of_lines(run):
    argv = ["--max_iters=60", "--lr_decay_iters=60", "--eval_interval=30"]
    status, written = on_terminal(*TINY, *argv, columns=80)
    assert status == 0
    bar = [part for part in written.split("\r") if " left" in part and "loss" in part]
    assert (
        bar and "tokens/s" in bar[-1] and f"loss {logged('loss')[59]:.4f}" in bar[-1] and "60/60" in bar[-1]
    )
    lines = [line.split("\r")[-1] for line in written.replace("\r\n", "\n").split("\n")]
    assert any(line.startswith("step 30: train loss") for line in lines)
    assert not any(line.startswith("step 3: loss") for line in lines)
