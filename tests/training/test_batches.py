"""The losses of a run: means over all learnt tokens, however a step is split, and without padding."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, random_gpt, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch.nn import functional as F

import export
import prepare
import sample
import train
from kqv.formats import loading, resize
from kqv.text import dataset_writer
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.tokenizers import CharTokenizer, ChatTokenizer
from kqv.training.batches import micro_batches
from kqv.training.loss import next_token_loss
from kqv.training.state import start_state
from kqv.training.world import World
from model import NextToken

CHAT = ChatTokenizer(CharTokenizer("ab"))  # marks 2, 3, 4, the end 5
ROWS = 8  # in a step
SHAPE = {"block_size": 24, "vocab_size": 6, "n_layer": 1}


def write_rows(folder, answers):
    """A set with a row for each number: the length of its answer, or None for no answer."""
    random = np.random.default_rng(1)
    ids = []
    for length in answers:
        said = "".join(random.choice(["a", "b"], 20))
        asked = said[: 18 - (length or 0)]
        messages = [("user", asked)] if length is None else [("user", asked), ("assistant", said[:length])]
        ids.append(CHAT.encode_chat(messages))
    dataset_writer.write(folder, dict.fromkeys(SPLITS, np.concatenate(ids)), CHAT, {})
    data = Dataset(folder)
    assert data.windows("train", 24) == len(answers)
    return data


def gradient_and_loss(data, batch_size, accumulation, size, dtype=torch.float64):
    """What `size` processes together do in a step of one epoch: (their mean gradient, the loss they log)."""
    config = train.TrainSettings(
        batch_size=batch_size,
        block_size=24,
        gradient_accumulation_steps=accumulation,
        data_order="epoch",
        grad_clip=0.0,
    )
    gradients, losses = [], []
    for rank in range(size):
        gpt = random_gpt(**SHAPE).to(dtype)
        world = World(torch.device("cpu"), rank)
        state = start_state(config, gpt, None, torch.float32, world)
        learnt = []
        state.optimizer.register_step_pre_hook(
            lambda *_, gpt=gpt, learnt=learnt: learnt.append([p.grad.clone() for p in gpt.parameters()])
        )
        batches = micro_batches(data, config, World(torch.device("cpu"), rank, size), 0)
        share = train.TrainSettings(**{**vars(config), "gradient_accumulation_steps": accumulation // size})
        model = NextToken(gpt, next_token_loss)
        numbers = train.train_step(model, state, batches, share, world, nullcontext())
        assert state.bad_steps == 0
        gradients += learnt
        losses.append(numbers["loss"])
    return [torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)], torch.stack(losses).mean()


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.none() | st.integers(0, 12), min_size=ROWS, max_size=ROWS))
def test_every_split_of_a_step_learns_the_same(tmp_path, answers):
    if set(answers) == {None}:
        answers[3] = 2
    data = write_rows(tmp_path, answers)
    expected, loss = gradient_and_loss(data, ROWS, 1, 1)
    gpt = random_gpt(**SHAPE).double()
    batch = [torch.from_numpy(part) for part in data.batch("train", np.arange(ROWS), 24)]
    assert loss.item() == pytest.approx(NextToken(gpt)(*batch).item(), abs=1e-6)
    for batch_size, accumulation, size in ((1, 8, 1), (4, 2, 1), (2, 4, 2), (1, 8, 4), (1, 8, 8)):
        found, other_loss = gradient_and_loss(data, batch_size, accumulation, size)
        assert other_loss.item() == pytest.approx(loss.item(), abs=1e-6)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3, 8])
def test_of_texts_every_micro_batch_has_the_weight_one_exactly(accumulation, tiny_set):
    config = train.TrainSettings(batch_size=3, block_size=7, gradient_accumulation_steps=accumulation)
    batches = list(micro_batches(Dataset("tiny"), config, World(torch.device("cpu")), 5))
    assert [weight for _, weight, _ in batches] == [1.0] * accumulation


UNEVEN = [None, 12, 0, 3, 12, None, 1, 7, 5, 0, 9, 2, None, None, 4, 4]
CHAT_RUN = [*TINY_RUN, "--dataset=chat", "--block_size=24", "--dtype=float32", "--data_order=epoch"]
CHAT_RUN += ["--eval_iters=16", "--dropout=0"]


@pytest.fixture
def run(cli):
    """Run train.py on a set of uneven conversations -> what it prints and warns of."""
    write_rows(Path("data/chat").absolute(), UNEVEN)

    def succeed(*argv, main=train.main):
        status, out, err = cli(main, *argv)
        assert status == 0, err
        return out + err

    return succeed


def numbers(folder, *names):
    return [record[name] for record in results(folder) for name in names if name in record]


def assert_same_run(found, expected):
    names = ("loss", "grad_norm", "train_loss", "val_loss")
    assert numbers(found, *names) == pytest.approx(numbers(expected, *names), abs=2e-5)
    weights = loading.load(Path(expected, "ckpt.pt"))["model"]
    for name, weight in loading.load(Path(found, "ckpt.pt"))["model"].items():
        torch.testing.assert_close(weight, weights[name], atol=5e-5, rtol=0, msg=name)


def split(batch_size, accumulation, out_dir):
    return [
        f"--batch_size={batch_size}",
        f"--gradient_accumulation_steps={accumulation}",
        f"--out_dir={out_dir}",
    ]


def test_a_run_is_the_same_however_its_steps_are_split(run):
    run(*CHAT_RUN, *split(8, 1, "whole"))
    run(*CHAT_RUN, *split(1, 8, "rows"))
    run(*CHAT_RUN, *split(2, 4, "pairs"))
    assert_same_run("rows", "whole")
    assert_same_run("pairs", "whole")
    assert numbers("rows", "loss")[0] == pytest.approx(numbers("whole", "loss")[0], abs=1e-6)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_that_learn_unevenly_or_nothing_train_as_one(parallel, run):
    run(*CHAT_RUN, *split(4, 1, "alone"))
    run_ranks(2, *CHAT_RUN, *split(1, 4, "out"), f"--parallel={parallel}")
    assert_same_run("out", "alone")


def test_a_step_with_nothing_to_learn_is_skipped_and_said(run):
    write_rows(Path("data/chat").absolute(), [None, None, None, 4, None, None])
    argv = [*CHAT_RUN, *split(1, 1, "out"), "--max_bad_steps=2"]
    out = run(*argv)
    skipped = [line for line in out.splitlines() if "is skipped: none of its rows has an answer" in line]
    assert len(skipped) == 5 and all(line.startswith("warning: step ") for line in skipped)
    assert "done: step 6" in out and "steps skipped" not in out
    assert numbers("out", "loss").count(None) == 5 == numbers("out", "grad_norm").count(0)
    before = loading.load(Path("out/ckpt.pt"))
    counts = {int(state["step"]) for state in before["optimizer"]["state"].values()}
    assert counts == {1}


def test_a_set_with_nothing_to_learn_is_refused(run, refusal):
    write_rows(Path("data/chat").absolute(), [None, None])
    line = refusal(train.main, *CHAT_RUN)
    assert "the train split of" in line and "has no answer of the assistant" in line


def test_an_evaluation_is_the_mean_over_all_tokens(run, cli):
    out = run(*CHAT_RUN, *split(3, 1, "out"), "--eval_iters=1000")
    gpt = loading.model_of(loading.load(Path("out/ckpt.pt")), "out")
    rows = [torch.from_numpy(part) for part in Dataset("chat").batch("val", np.arange(16), 24)]
    with torch.no_grad():
        logits = gpt.lm_head(gpt.hidden(rows[0], rows[2]))
        expected = F.cross_entropy(logits.flatten(0, 1), rows[1].flatten(), ignore_index=-1).item()
    assert numbers("out", "val_loss")[-1] == pytest.approx(expected, abs=1e-5)
    for batch_size in (1, 3, 16):
        argv = ["--out_dir=out", "--checkpoint=newest", "--evaluate=val", "--format=jsonl", "--device=cpu"]
        status, out, err = cli(sample.main, *argv, f"--batch_size={batch_size}", "--dtype=float32")
        assert status == 0, err
        found = json.loads(out.splitlines()[-1])
        assert found["loss"] == pytest.approx(expected, abs=1e-5)


# Padding of the vocabulary


@pytest.fixture
def padded_run(cli, tmp_path):
    """A run with a vocabulary of more than 1,024 ids, which is padded, in `out`; its ids and rows."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1030))) * 3
    Path("text.txt").write_text(text, "utf-8")
    assert cli(prepare.main, "text.txt", "--name=padded", "--val_fraction=0.4")[0] == 0
    argv = [*TINY_RUN, "--dataset=padded", "--dtype=float32", "--eval_iters=1000", "--max_iters=2"]
    status, out, err = cli(train.main, *argv, "--eval_interval=1")
    assert (status, err) == (0, ""), err
    ids = Dataset("padded").tokenizer.vocab_size
    rows = len(loading.load(Path("out/ckpt.pt"))["model"]["lm_head.weight"])
    assert ids % 64 and rows == -(-ids // 64) * 64
    return ids, rows


def test_padding_has_no_part_in_any_loss(padded_run, cli):
    ids, rows = padded_run
    contents = loading.load(Path("out/ckpt.pt"))
    contents["model"]["lm_head.weight"][ids:] += 3.0  # so that it would show
    contents["model"]["transformer.wte.weight"] = contents["model"]["lm_head.weight"]
    torch.save(contents, "out/ckpt.pt")
    gpt = resize.without_padding(loading.model_of(contents, "out"), ids)  # as it is exported
    data, losses = Dataset("padded"), []
    with torch.no_grad():
        for index in range(data.batches("val", 4, 16)):
            batch = data.evaluation_batch("val", 4, 16, index, data.batches("val", 4, 16))
            losses.append(NextToken(gpt)(*map(torch.from_numpy, batch[:2])).item())
    status, _, err = cli(
        train.main,
        "--init_from=out/ckpt.pt",
        *TINY_RUN,
        "--dataset=padded",
        "--dtype=float32",
        "--eval_iters=1000",
        "--learning_rate=0",
        "--min_lr=0",
        "--max_iters=1",
        "--out_dir=again",
    )
    assert (status, err) == (0, "")
    assert numbers("again", "val_loss")[0] == pytest.approx(np.mean(losses), abs=1e-5)
    batch, _ = data.training_batch(4, 16, 1337, 0, 0)
    expected = NextToken(gpt)(*map(torch.from_numpy, batch[:2])).item()
    assert numbers("again", "loss")[0] == pytest.approx(expected, abs=1e-5)

    argv = ["--checkpoint=out/ckpt.pt", "--evaluate=val", "--format=jsonl", "--device=cpu", "--dtype=float32"]
    found = [json.loads(cli(sample.main, *argv)[1])["loss"]]
    assert cli(export.main, "--checkpoint=out/ckpt.pt", "--to=exported")[0] == 0
    argv[0] = "--init_from=exported"
    found.append(json.loads(cli(sample.main, *argv, "--dataset=padded")[1])["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_an_older_run_says_that_its_loss_changes(padded_run, cli):
    ids, rows = padded_run
    status, _, err = cli(train.main, "--init_from=resume", "--max_iters=3")
    assert (status, err) == (0, "")
    contents = loading.load(Path("out/ckpt.pt"))
    del contents["ids_in_loss"]
    torch.save(contents, "out/ckpt.pt")
    status, _, err = cli(train.main, "--init_from=resume", "--max_iters=4")
    assert status == 0 and err.startswith(f"warning: the rows {ids} to {rows - 1}, which pad the vocabulary")
    assert len(err.splitlines()) == 1


# Losses that are no numbers


def test_an_evaluation_that_is_no_number_is_said(tiny_set, cli):
    argv = [*TINY_RUN, "--dataset=tiny", "--dtype=float32"]
    assert cli(train.main, *argv)[0] == 0
    contents = loading.load(Path("out/ckpt.pt"))
    contents["model"]["transformer.ln_f.weight"][0] = math.nan
    torch.save(contents, "broken.pt")
    status, out, err = cli(train.main, *argv, "--init_from=broken.pt", "--eval_only")
    assert status == 1 and "train loss nan, val loss nan" in out
    assert "loss at step 0 is not finite" in err and len(err.splitlines()) == 1
    status, out, err = cli(train.main, *argv, "--init_from=broken.pt", "--out_dir=other", "--max_bad_steps=2")
    assert status == 1 and "val loss nan" in out and len(err.splitlines()) == 1
    assert not Path("other/ckpt.pt").exists()
