"""Where a run's numbers go besides metrics.jsonl: TensorBoard, wandb with its sweeps, sample texts."""

import json
import math
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, script

import prepare
import train
from kqv.errors import UserError
from kqv.text.dataset import Dataset
from kqv.training import metrics

TINY = [*TINY_RUN, "--dataset=tiny"]


def records():
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text("utf-8").splitlines()]


def logged(name):
    return {record["step"]: record[name] for record in records() if name in record}


def saved():
    return torch.load("out/ckpt.pt", weights_only=True)


@pytest.fixture
def run(cli, tiny_set):
    def succeed(*argv):
        status, out, err = cli(train.main, *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


# TensorBoard


def events(tag):
    """{step: number} of one tag in the event files."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator("out/tensorboard")
    found.Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


def test_tensorboard_has_every_number_also_after_a_resume(run):
    pytest.importorskip("tensorboard")
    run(*TINY, "--tensorboard_log", "--max_iters=4")
    run("--init_from=resume", "--max_iters=6")
    for name in ("loss", "lr", "grad_norm", "train_loss", "val_loss"):
        assert events(name) == pytest.approx(logged(name), rel=1e-6)
    assert len(logged("loss")) == 6


def test_without_the_setting_there_are_no_event_files(run):
    run(*TINY)
    assert not Path("out/tensorboard").exists()


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    import builtins

    def without(name, *rest):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return found(name, *rest)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="tensorboard_log=True needs: pip install tensorboard"):
        metrics.start_tensorboard(tmp_path, 0)


# Sample texts


def test_a_sample_is_printed_and_kept_at_each_evaluation(run):
    out = run(*TINY, "--sample_tokens=12")
    samples = logged("sample")
    assert list(samples) == [0, 3, 6]
    data = Dataset("tiny")
    beginning = data.tokenizer.decode(data.splits["val"][:16].tolist())
    for text in samples.values():
        assert text.startswith(beginning) and len(text) == 16 + 12 and f"{text}\n" in out
    assert len(set(samples.values())) == 3  # the model has changed


def test_samples_do_not_change_the_run(run):
    run(*TINY, "--dropout=0.2")
    without = saved()["model"]
    run(*TINY, "--dropout=0.2", "--sample_tokens=5")
    assert all(torch.equal(weight, without[name]) for name, weight in saved()["model"].items())


def test_a_model_of_conversations_answers_the_first_question(cli, tmp_path):
    rows = "".join(f"{i % 9}+1=\t{i % 9 + 1}\n" for i in range(200))
    (tmp_path / "sums.tsv").write_text(rows)
    assert cli(prepare.main, "sums.tsv", "--val_fraction=0.5")[0] == 0
    status, out, err = cli(train.main, *TINY_RUN, "--dataset=sums", "--sample_tokens=3")
    assert (status, err) == (0, "")
    data = Dataset("sums")
    question = data.tokenizer.decode(next(data.conversations("val")).tolist())[:4]
    assert all(text.startswith(question) for text in logged("sample").values()), out


# wandb


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module: what it was started with, and what was logged."""
    fake = types.SimpleNamespace(id="abc", step=0, sweep_id=None, config={}, started=[], history=[])
    fake.init = lambda **settings: fake.started.append(settings) or fake
    fake.log = lambda values, step: fake.history.append((step, values))
    fake.finish = lambda: None
    fake.Html = lambda text, inject: text
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    return fake


def test_a_resumed_run_goes_on_in_its_wandb_run(run, wandb):
    run(*TINY, "--wandb_log", "--max_iters=4")
    wandb.step = 5  # what wandb was told before the run was killed, for example
    run("--init_from=resume", "--max_iters=8")
    run("--init_from=resume", "--max_iters=9", "--wandb_resume=False")
    assert [(start["id"], start["resume"]) for start in wandb.started] == [
        (None, None),
        ("abc", "allow"),
        (None, None),
    ]
    assert saved()["wandb_id"] == "abc"
    second = [step for step, values in wandb.history if "lr" in values][4:]
    assert second == [5, 6, 7, 8]  # nothing is told twice


def test_a_sweep_decides_settings_also_the_models(run, wandb):
    wandb.sweep_id, wandb.config = "s", {"n_embd": 16, "learning_rate": 1, "not_ours": 5}
    run(*TINY, "--wandb_log")
    assert saved()["config"]["n_embd"] == saved()["model_args"]["n_embd"] == 16
    assert saved()["config"]["learning_rate"] == 1.0


@pytest.mark.parametrize("name, value", [("n_embd", "wide"), ("dropout", 1.5), ("n_embd", 17)])
def test_a_sweeps_wrong_value_is_one_line(name, value, refusal, tiny_set, wandb):
    wandb.sweep_id, wandb.config = "s", {name: value}
    line = refusal(train.main, *TINY, "--wandb_log", status=2)
    assert name in line and str(value) in line


def test_wandbs_own_config_decides_nothing_without_a_sweep(run, wandb):
    wandb.config = {"n_embd": 16}
    run(*TINY, "--wandb_log")
    assert saved()["model_args"]["n_embd"] == 32


def test_the_real_wandb_takes_a_sweeps_values_and_resumes_offline(tiny_set, tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "tried.yaml").write_text("wandb_version: 1\nn_embd:\n  value: 16\n")
    environment = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path / "home")}
    sweep = {"WANDB_SWEEP_ID": "s", "WANDB_SWEEP_PARAM_PATH": "tried.yaml"}
    done = script("train.py", *TINY, "--wandb_log", "--sample_tokens=4", cwd=tmp_path, **environment, **sweep)
    assert done.returncode == 0, done.stderr
    first = saved()
    assert first["model_args"]["n_embd"] == 16 and first["wandb_id"]
    done = script("train.py", "--init_from=resume", "--max_iters=8", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert saved()["wandb_id"] == first["wandb_id"]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{first['wandb_id']}"))) == 2


# metrics.jsonl


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    log = metrics.Metrics(tmp_path, 0, -1)
    log.record(3, {"loss": math.nan, "lr": math.inf, "sample": "a\nb"})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3,
        "loss": None,
        "lr": None,
        "sample": "a\nb",
    }
