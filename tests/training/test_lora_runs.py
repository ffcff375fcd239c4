"""Runs that train an adapter, and what all commands make of its checkpoint."""

import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, logits_of, random_gpt, random_ids, records, results, write_text
from ranks import Ranks, run_ranks

import export
import prepare
import sample
import train
from kqv.formats import loading, lora
from kqv.training import loss
from model import NextToken

STEPS = [*TINY_RUN[5:], "--batch_size=4", "--dtype=float32"]  # TINY_RUN without the shape
LORA = [*STEPS, "--init_from=base", "--lora_rank=4", "--out_dir=tuned"]
TEXT = ["--temperature=0", "--num_samples=1", "--max_new_tokens=12", "--start=keys"]


@pytest.fixture
def run(cli):
    """Run a command that must succeed without a warning -> what it prints."""

    def run(main, *argv):
        status, out, err = cli(main, *argv)
        assert (status, err) == (0, ""), err
        return out

    return run


@pytest.fixture
def base(run, tmp_path):
    """A run on bytes in the folder `base`: a function that makes it, with other settings."""
    run(prepare.main, write_text(tmp_path / "text.txt"), "--name=tiny", "--tokenizer=byte")
    return lambda *argv: run(
        train.main, *TINY_RUN, "--dataset=tiny", "--out_dir=base", "--dtype=float32", *argv
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the set, a run in `base` and an adapter of it in `tuned`, made once."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", io.StringIO())
        prepare.main([str(write_text(folder / "text.txt")), "--name=tiny", "--tokenizer=byte"])
        train.main([*TINY_RUN, "--dataset=tiny", "--out_dir=base", "--dtype=float32"])
        train.main([*LORA, "--dataset=tiny"])
    return folder


@pytest.fixture
def tuned(trained, cli, tmp_path):
    """That folder's files in the test's own, which is the working folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def changed(path="tuned/best.pt", **values):
    """A checkpoint with other contents."""
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, **values}, path)
    return path


# Training


def test_an_adapter_is_all_that_learns_and_is_saved(base, run, every_shape):
    base(*every_shape)
    before = Path("base/best.pt").read_bytes()
    out = run(train.main, *LORA, "--dataset=tiny")
    assert Path("base/best.pt").read_bytes() == before
    whole = loading.load("base/best.pt")
    for name in ("best.pt", "ckpt.pt"):
        contents = torch.load(f"tuned/{name}", weights_only=True)
        assert {each.rpartition(".")[2] for each in contents["model"]} == {lora.A, lora.B}
        assert contents["base"].keys() == {"source", "sha256", "alpha"}
        assert contents["base"]["source"] == "base" and contents["model_args"] == whole["model_args"]
        count = sum(weight.numel() for weight in contents["model"].values())
        assert f"{count:,} of them trained" in out.splitlines()[0]
        assert Path("tuned", name).stat().st_size < Path("base", name).stat().st_size
    losses = [record["val_loss"] for record in records("tuned") if "val_loss" in record]
    assert (
        losses[0] == min(r["val_loss"] for r in records("base") if "val_loss" in r) and losses[-1] < losses[0]
    )
    numbers = run(sample.main, "--out_dir=tuned", "--evaluate=val", "--device=cpu", "--dtype=float32")
    assert numbers
    run(export.main, "--out_dir=tuned", "--to=merged")
    texts = [
        run(sample.main, *TEXT, where, "--dtype=float32")
        for where in ("--out_dir=tuned", "--init_from=merged")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_for_bit_the_same(tuned, run, optimizer):
    argv = [*LORA, "--dataset=tiny", f"--optimizer={optimizer}", "--dropout=0.1"]
    run(train.main, *argv, "--out_dir=straight")
    run(train.main, *argv, "--out_dir=half", "--max_iters=3")
    out = run(train.main, "--init_from=resume", "--out_dir=half", "--max_iters=6")
    assert "changed: max_iters 3 -> 6\n" in out and "of them trained" in out
    assert results("half")[-4:] == results("straight")[-4:]
    one, other = (torch.load(f"{folder}/ckpt.pt", weights_only=True) for folder in ("half", "straight"))
    assert one["model"].keys() == other["model"].keys() and one["base"] == other["base"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][number][name])
    losses = [record["val_loss"] for record in records("straight") if "val_loss" in record]
    assert losses[-1] < losses[0]


def test_the_seed_decides_how_an_adapter_begins(tuned, run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(train.main, *LORA, "--dataset=tiny", f"--out_dir={name}", f"--seed={seed}", "--max_iters=0")
    a, b, c = (torch.load(f"{name}/ckpt.pt", weights_only=True)["model"] for name in "abc")
    name = "transformer.h.0.attn.c_attn.lora_A"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_an_adapter_can_be_trained_on_whole(tuned, run):
    last = [record["val_loss"] for record in records("tuned") if "val_loss" in record]
    out = run(train.main, *STEPS, "--init_from=tuned", "--dataset=tiny", "--out_dir=whole", "--max_iters=1")
    assert "trained" not in out.splitlines()[0]
    assert "tuned is an adapter, merged into its base: all weights are trained\n" in out
    first = next(record["val_loss"] for record in records("whole") if "val_loss" in record)
    assert first == pytest.approx(min(last), abs=1e-6)
    assert "base" not in torch.load("whole/ckpt.pt", weights_only=True)


def test_a_part_of_the_layers_can_be_adapted(tuned, run):
    part = ["--out_dir=part", "--lora_alpha=3"]
    run(train.main, *LORA, "--dataset=tiny", "--lora_targets=c_fc,c_gate", *part)
    contents = torch.load("part/ckpt.pt", weights_only=True)
    assert {name.split(".")[-2] for name in contents["model"]} == {"c_fc"}
    assert contents["base"]["alpha"] == 3.0 and contents["config"]["lora_targets"] == "c_fc"
    same = ["--lora_targets=c_gate,c_fc", "--lora_alpha=3", "--lora_rank=4"]
    out = run(train.main, "--init_from=resume", "--out_dir=part", "--max_iters=7", *same)
    assert "changed: max_iters 6 -> 7\n" in out


def test_several_processes_train_one_adapter(tuned, run, refusal):
    argv = [*LORA, "--dataset=tiny", "--gradient_accumulation_steps=4"]
    run(train.main, *argv, "--out_dir=one")
    out = run_ranks(2, *argv, "--out_dir=two")
    assert "of them trained" in out and "ddp" in out.splitlines()[0]
    one, two = (torch.load(f"{name}/ckpt.pt", weights_only=True)["model"] for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
    with Ranks(2, *argv, "--parallel=fsdp", "--out_dir=sharded") as ranks:
        ends = ranks.ends()
    assert {status for status, _, _ in ends} == {1}
    (line,) = [err for _, _, err in ends if err]
    assert "LoRA can't be sharded: use --parallel=ddp" in line and line.count("\n") == 1


def test_new_ids_learn_and_the_others_do_not(run, cli, tmp_path):
    """A run on texts goes on with conversations, whose marks it does not know."""
    Path("texts.txt").write_text("".join(f"{i}+{i}={2 * i}\n" for i in range(700)))
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(400)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(prepare.main, "texts.txt", "--name=texts")
    run(train.main, *TINY_RUN, "--dataset=texts", "--out_dir=base")
    run(prepare.main, "sums.jsonl", "--name=chat", "--tokenizer=base")
    argv = [*LORA, "--dataset=chat"]
    run(train.main, *argv, "--out_dir=begin", "--max_iters=0")
    run(train.main, *argv)
    ids = loading.load("base/best.pt")["model_args"]["vocab_size"]
    old = loading.load("base/best.pt")["model"]["lm_head.weight"]
    contents, start = loading.load("tuned/ckpt.pt"), loading.load("begin/ckpt.pt")
    new = contents["model"]["transformer.wte.new_rows"]
    assert len(new) == 4 and "lm_head.new_rows" not in contents["model"]
    moved = (new - start["model"]["transformer.wte.new_rows"]).abs().amax(dim=1)
    assert (moved > 1e-3).all()
    merged = loading.model_of(contents, "tuned")
    assert torch.equal(merged.lm_head.weight[:ids], old) and torch.equal(merged.lm_head.weight[ids:], new)
    losses = [record["val_loss"] for record in records("tuned") if "val_loss" in record]
    assert losses[-1] < losses[0]
    assert run(sample.main, "--out_dir=tuned", "--start=1+1=", *TEXT[:3])
    run(train.main, *argv, "--out_dir=half", "--max_iters=3")
    run(train.main, "--init_from=resume", "--out_dir=half", "--max_iters=6")
    again = loading.load("half/ckpt.pt")["model"]
    assert all(torch.equal(again[name], weight) for name, weight in contents["model"].items())


# Its base


def test_the_tokenizer_of_an_adapter_needs_no_base(tuned, run):
    shutil.rmtree("base")
    assert "byte tokenizer" in run(prepare.main, "text.txt", "--name=other", "--tokenizer=tuned")


def test_a_base_may_move_and_come_in_another_format(base, run, refusal):
    base("--bias=True")  # transformers' GPT-2 has biases
    run(train.main, *LORA, "--dataset=tiny")
    expected = run(sample.main, *TEXT, "--out_dir=tuned", "--dtype=float32")
    run(export.main, "--out_dir=base", "--to=hf")
    shutil.move("base", "moved")
    line = refusal(sample.main, *TEXT, "--out_dir=tuned")
    assert "the base of tuned/best.pt can't be read: base=base is no file or folder" in line
    assert "--base=PATH names its place" in line
    for place in ("moved", "moved/best.pt", "hf"):
        out = run(sample.main, *TEXT, "--out_dir=tuned", f"--base={place}", "--dtype=float32")
        assert out == expected
    run(train.main, "--init_from=resume", "--out_dir=tuned", "--base=hf", "--max_iters=7")
    assert torch.load("tuned/ckpt.pt", weights_only=True)["base"]["source"] == "hf"
    run(train.main, "--init_from=resume", "--out_dir=tuned", "--max_iters=8")
    run(train.main, *STEPS, "--init_from=tuned", "--base=moved", "--dataset=tiny", "--out_dir=x")


def test_another_base_is_refused_by_both_hashes(tuned, run, refusal):
    run(train.main, *TINY_RUN, "--dataset=tiny", "--seed=3", "--out_dir=other")
    line = refusal(sample.main, *TEXT, "--out_dir=tuned", "--base=other")
    saved = torch.load("tuned/best.pt", weights_only=True)["base"]["sha256"]
    assert "other is not the base of tuned/best.pt" in line and f"{saved[:12]}..." in line
    assert line.count("...") == 2 and "--base=PATH" in line


def test_an_adapter_is_no_base(tuned, refusal):
    for argv in (["--init_from=tuned"], ["--init_from=tuned/best.pt", "--lora_rank=2"]):
        line = refusal(train.main, *LORA, "--dataset=tiny", "--out_dir=x", *argv)
        assert "holds an adapter, not whole weights: export it" in line
    line = refusal(sample.main, *TEXT, "--out_dir=tuned", "--base=tuned")
    assert "tuned holds an adapter, not whole weights: it can't be the base of tuned/best.pt" in line


@pytest.mark.parametrize(
    "main, argv",
    [
        (sample.main, ["--out_dir=base"]),
        (sample.main, ["--init_from=base/best.pt"]),
        (export.main, ["--out_dir=base", "--to=x"]),
        (train.main, [*STEPS, "--init_from=base", "--dataset=tiny"]),
        (train.main, ["--init_from=resume", "--out_dir=base"]),
    ],
)
def test_whole_weights_have_no_base(tuned, refusal, main, argv):
    line = refusal(main, *argv, "--base=text.txt", status=2)
    assert "--base=text.txt means nothing for base" in line and "whole weights: leave it out" in line


# Settings that can't be


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--lora_rank=33"], "lora_rank=33 can't be: attn.c_attn: rank 33 is not within 1 to 32"),
        (["--lora_targets=q_proj"], "'q_proj' is no linear layer of a block: use some of c_attn,c_proj,c_fc"),
        (["--lora_targets="], "'' is no linear layer"),
        (["--lora_targets=c_gate"], "no layer is called c_gate"),
        (["--lora_rank=0", "--lora_alpha=3"], "--lora_alpha=3 means nothing without --lora_rank"),
        (["--lora_rank=0", "--lora_targets=c_fc"], "--lora_targets=c_fc means nothing without --lora_rank"),
        (["--init_from=scratch"], "--lora_rank=4 means nothing for a model from scratch"),
        (["--init_from=auto"], "--lora_rank=4 means nothing for a model from scratch"),
        (["--lora_alpha=0"], "lora_alpha is 0.0, but it must be at least"),
        (["--lora_alpha=nan"], "--lora_alpha=nan is not a finite number"),
        (["--lora_rank=-1"], "lora_rank is -1"),
    ],
)
def test_an_adapter_that_can_not_be_is_refused(tuned, refusal, argv, says):
    assert says in refusal(train.main, *LORA, "--dataset=tiny", "--out_dir=new", *argv, status=2)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--lora_rank=8"], "lora_rank=8, but the run in tuned has lora_rank=4"),
        (["--lora_rank=0"], "lora_rank=0, but the run in tuned has lora_rank=4"),
        (["--lora_alpha=8"], "lora_alpha=8.0, but the run in tuned has lora_alpha=16.0"),
        (
            ["--lora_targets=c_fc"],
            "lora_targets=c_fc, but the run in tuned has lora_targets=c_attn,c_proj,c_fc",
        ),
        (["--out_dir=base", "--lora_rank=8"], "lora_rank=8, but the run in base has lora_rank=0"),
    ],
)
def test_a_resumed_run_has_the_adapter_that_it_had(tuned, refusal, argv, says):
    line = refusal(train.main, "--init_from=resume", "--out_dir=tuned", "--max_iters=9", *argv, status=2)
    assert says in line and "leave it out" in line


def test_the_kernels_of_an_mlp_train_no_adapters(tuned, refusal):
    line = refusal(train.main, *LORA, "--dataset=tiny", "--fused_mlp=True")
    assert "--fused_mlp=True can't train the adapters of an MLP" in line


# A stranger's file


@pytest.mark.parametrize(
    "change, says",
    [
        ({"source": "tuned/best.pt"}, "it can't be the base of tuned/best.pt"),
        ({"source": "tuned"}, "it can't be the base of tuned/best.pt"),
        ({"source": ""}, "base.source"),
        ({"source": "a\0b"}, "base.source"),
        ({"source": 3}, "base.source"),
        ({"source": "/dev/zero"}, "can't be read"),
        ({"source": "x" * 5000}, "base.source"),
        ({"source": "../../../etc/passwd"}, "can't be read"),
        ({"source": "data/tiny"}, "can't be read"),
        ({"source": "."}, "can't be read"),
        ({"sha256": "0" * 64}, "000000000000..."),
        ({"sha256": "0" * 63}, "base.sha256"),
        ({"alpha": float("nan")}, "base.alpha"),
        ({"alpha": 1e300}, "base.alpha"),
        ({"alpha": 0}, "base.alpha"),
        ({"alpha": None}, "base.alpha"),
    ],
)
def test_what_a_file_says_of_its_base_is_checked(tuned, refusal, change, says):
    about = torch.load("tuned/best.pt", weights_only=True)["base"]
    changed(base={**about, **change})
    assert says in refusal(sample.main, *TEXT, "--out_dir=tuned")


FIRST = "transformer.h.0.attn.c_attn."


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: {**w, FIRST + "lora_A": torch.zeros(4, 31)}, "has the shape (4, 31), not (4, 32)"),
        (lambda w: {**w, FIRST + "lora_A": torch.zeros(5, 32)}, "its layers have the ranks [4, 5]"),
        (lambda w: {**w, FIRST + "lora_A": torch.tensor(1.0)}, "has the shape (), not (4, 32)"),
        (lambda w: {**w, FIRST + "lora_B": torch.zeros(96, 5)}, "has the shape (96, 5), not (96, 4)"),
        (lambda w: {name: x for name, x in w.items() if name != FIRST + "lora_B"}, "lora_B is missing"),
        (lambda w: {**w, FIRST + "weight": torch.zeros(96, 32)}, "c_attn.weight is no part of it"),
        (lambda w: {**w, FIRST + "lora_C": torch.zeros(4)}, "lora_C is no part of it"),
        (lambda w: {name: x.repeat(99, 1) for name, x in w.items() if name.endswith("A")}, "rank 396 is not"),
        (lambda w: {}, "it has no lora_A"),
        (lambda w: {"lora_A": torch.zeros(4, 4)}, "tuned/best.pt"),
        (lambda w: {**w, "transformer.wte.new_rows": torch.zeros(3, 31)}, "has the shape (3, 31)"),
        (lambda w: {**w, "transformer.wte.new_rows": torch.tensor(1.0)}, "holds no adapter"),
        (lambda w: {**w, "transformer.wte.new_rows": torch.zeros(500, 32)}, "257 ids, 500 of them new"),
    ],
)
def test_weights_that_are_no_adapter_of_the_base_are_refused(tuned, refusal, change, says):
    changed(model=change(torch.load("tuned/best.pt", weights_only=True)["model"]))
    assert says in refusal(sample.main, *TEXT, "--out_dir=tuned")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"n_layer": 3}, "its n_layer is 3, and that of the base 2"),
        ({"vocab_size": 2**30}, "it has 1073741824 ids, 0 of them new, and the base 257"),
        ({"block_size": 2**30}, "block_size=1073741824 is not within 1 to 16"),
        ({"n_embd": "many"}, "holds no adapter of base"),
    ],
)
def test_a_shape_that_is_not_that_of_the_base_is_refused(tuned, refusal, change, says):
    shape = torch.load("tuned/best.pt", weights_only=True)["model_args"]
    changed(model_args={**shape, **change})
    assert says in refusal(sample.main, *TEXT, "--out_dir=tuned")


def test_an_adapter_without_its_base_in_words_is_no_model(tuned, refusal):
    contents = torch.load("tuned/best.pt", weights_only=True)
    del contents["base"]
    torch.save(contents, "tuned/best.pt")
    assert "tuned/best.pt" in refusal(sample.main, *TEXT, "--out_dir=tuned")


def test_numbers_that_are_none_are_refused_where_they_are_used(tuned, cli, refusal):
    weights = torch.load("tuned/best.pt", weights_only=True)["model"]
    weights[FIRST + "lora_B"][0, 0] = torch.nan
    changed(model=weights)
    assert "logits are not finite" in cli(sample.main, *TEXT, "--out_dir=tuned")[2]
    assert "can't be merged" in refusal(export.main, "--out_dir=tuned", "--to=x")


# Other programs


def test_an_exported_adapter_has_the_same_logits_in_transformers(base, run, every_shape):
    transformers = pytest.importorskip("transformers")
    base(*every_shape)
    run(train.main, *LORA, "--dataset=tiny")
    out = run(export.main, "--out_dir=tuned", "--to=hf")
    assert "merged: logits differ by at most" in out and "f32 rounds them by at most 0.0e+00" in out
    ours = loading.adapted_model_of(loading.load("tuned/best.pt"), "tuned")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf")
    idx = random_ids(3, 16, below=257)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, logits_of(ours, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_an_export_says_what_the_precision_rounds(tuned, run, dtype):
    to = "x.gguf" if dtype == "q8_0" else "x"
    line = run(export.main, "--out_dir=tuned", f"--to={to}", f"--dtype={dtype}").splitlines()[0]
    lost = float(line.rpartition(" ")[2])
    assert f"{dtype} rounds them by at most" in line and 0 < lost < 1e-2


# What it would take


def test_a_run_is_shown_before_it_is_trained(tuned, run):
    before = sorted(Path().rglob("*"))
    out = run(train.main, *LORA, "--dataset=tiny", "--show=2")
    assert "document 1: " in out and "|" in out
    size, memory = out.splitlines()[-2:]
    assert "of them trained, 64 tokens a step" in size
    assert memory.startswith("memory by calculation: weights ") and "optimizer" in memory
    assert sorted(Path().rglob("*")) == before
    out = run(train.main, *TINY_RUN, "--dataset=tiny", "--show=1")
    assert "M parameters, 64 tokens a step" in out and "trained" not in out
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_an_adapter_and_new_rows_have_the_same_gradients(monkeypatch, backend):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE_COMPILED", 100)
    monkeypatch.setattr(loss, "compiled_cross_entropy", lambda: loss.cross_entropy)
    torch._dynamo.reset()
    gpt, idx = lora.adapt(random_gpt(n_layer=1), 3, 16.0, new_ids=4), random_ids(2, 8)
    gpt.transformer.h[0].mlp.c_fc.lora_B.data.fill_(0.1)
    objective = NextToken(gpt, partial(loss.next_token_loss, new_rows=gpt.lm_head.new_rows))
    parameters = list(lora.learnt(gpt).values())
    expected = torch.autograd.grad(objective(idx, idx), parameters)
    found = torch.autograd.grad(
        torch.compile(objective, backend=backend, fullgraph=True)(idx, idx), parameters
    )
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)
