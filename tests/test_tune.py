"""tune.py as a user runs it."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SHAPES, TINY_RUN, call, process_environment, records, results, script, write_sums

import sample
import train
import tune

REWARD = "def reward(prompt, completion, answer):\n    return completion.count('a') / 4\n"
MINE = "--reward=mine.py"
TUNE = [MINE, "--dataset=tiny", "--init_from=model", "--max_new_tokens=4", "--device=cpu"]
TUNE += ["--prompt_tokens=4", "--prompts_per_step=6", "--num_samples=4", "--eval_prompts=5"]
TUNE += ["--eval_interval=2", "--max_iters=4", "--learning_rate=1e-2", "--dtype=float32"]
METHODS = {"best": ["--updates=2"], "grpo": ["--method=grpo", "--kl_weight=0.1"]}
METHODS |= {f"{name} with LoRA": [*options, "--lora_rank=2"] for name, options in METHODS.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, the set of texts that it was trained on, and a set of sums."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.py").write_text(REWARD, "utf-8")
    (folder / "text.txt").write_text("a banana and a cabana, an open pan. " * 200, "utf-8")
    write_sums(folder / "sums.jsonl")
    for command in (
        ["prepare.py", "text.txt", "--name=tiny"],
        ["prepare.py", "sums.jsonl", "--name=sums"],
        ["train.py", *TINY_RUN, "--dataset=tiny", "--out_dir=model"],
        ["train.py", *TINY_RUN, "--dataset=sums", "--out_dir=sums_model"],
    ):
        result = script(*command, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def tuned(trained, tmp_path, monkeypatch, capsys):
    """Call a command in a copy of that folder: tuned(tune.main, *TUNE) -> (status, out, err)."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda main, *argv: call(main, argv, monkeypatch, capsys)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_bit_for_bit(tuned, method):
    for out_dir, *more in (("--out_dir=whole",), ("--out_dir=parts", "--max_iters=2")):
        assert tuned(tune.main, *TUNE, *METHODS[method], out_dir, *more)[::2] == (0, "")
    status, _, err = tuned(tune.main, "--init_from=resume", "--out_dir=parts", "--max_iters=4", MINE)
    assert (status, err) == (0, "")
    timed = ("sampling_seconds", "updating_seconds")
    whole, parts = (
        [{name: value for name, value in record.items() if name not in timed} for record in results(folder)]
        for folder in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 4 + 3
    one, other = (torch.load(f"{folder}/ckpt.pt", weights_only=True) for folder in ("whole", "parts"))
    assert one["iter_num"] == other["iter_num"] == 4 and one["history"] == other["history"]
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][number][name]), (number, name)


@pytest.mark.parametrize("method", ["best", "grpo"])
def test_the_reward_rises(tuned, method):
    options = [*METHODS[method], "--max_iters=15", "--eval_interval=15", "--prompts_per_step=16"]
    assert tuned(tune.main, *TUNE, *options)[::2] == (0, "")
    found = [record["val_reward"] for record in records("out/tuned") if record["kind"] == "evaluation"]
    assert found[-1] > found[0] + 0.2


def test_what_is_logged_and_what_it_costs(tuned):
    assert tuned(tune.main, *TUNE)[0] == 0
    first, *_, last = [record for record in records("out/tuned") if record["kind"] == "evaluation"]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and last["kl"] > 1e-3
    assert first["start_nats"] > 0 and 0 <= first["pass_at_1"] <= first["pass_at_k"] <= 1
    assert 0 < first["distinct_4grams"] <= 1 and first["length"] == 4
    step = next(record for record in records("out/tuned") if record["kind"] == "train")
    assert {"reward", "dead_groups", "entropy", "length", "sampling_seconds", "updating_seconds"} <= {*step}


def test_a_tuned_model_is_a_checkpoint_as_any_other(tuned):
    assert tuned(tune.main, *TUNE)[0] == 0
    best = torch.load("out/tuned/best.pt", weights_only=True)
    found = [record for record in records("out/tuned") if record["kind"] == "evaluation"]
    assert best["iter_num"] == max(found, key=lambda record: record["val_reward"])["step"]
    assert tuned(sample.main, "--out_dir=out/tuned", "--max_new_tokens=5")[0] == 0


def test_an_adapter_is_saved_alone_and_read_with_its_base(tuned):
    assert tuned(tune.main, *TUNE, "--lora_rank=2")[0] == 0
    assert {name.rpartition(".")[2] for name in weights("out/tuned/best.pt")} == {"lora_A", "lora_B"}
    assert tuned(sample.main, "--out_dir=out/tuned", "--max_new_tokens=5")[0] == 0
    os.rename("model", "elsewhere")
    again = ["--init_from=resume", "--out_dir=out/tuned", "--max_iters=5", MINE]
    status, _, err = tuned(tune.main, *again)
    assert status == 1 and "--base=PATH" in err
    assert tuned(tune.main, *again, "--base=elsewhere")[::2] == (0, "")


def test_a_start_that_stays_the_best_is_kept(tuned):
    with open("mine.py", "w", encoding="utf-8") as file:
        file.write("import itertools\n\nn = itertools.count()\n\n\n")
        file.write("def reward(prompt, completion, answer):\n    return 1 / (1 + next(n))\n")
    assert tuned(tune.main, *TUNE)[0] == 0
    best = torch.load("out/tuned/best.pt", weights_only=True)
    assert best["iter_num"] == 0
    assert all(torch.equal(best["model"][name], part) for name, part in weights("model/best.pt").items())


def test_conversations_have_the_answers_of_the_set(tuned):
    with open("mine.py", "w", encoding="utf-8") as file:
        file.write("def reward(prompt, completion, answer):\n")
        file.write(
            "    assert int(answer) == sum(map(int, prompt.rstrip('=').split('+'))), (prompt, answer)\n"
        )
        file.write("    return float(completion == answer)\n")
    options = ["--dataset=sums", "--init_from=sums_model", "--max_iters=1"]
    status, out, err = tuned(tune.main, *TUNE, *options)
    assert (status, err) == (0, "") and "exact match" in out


def test_equal_rewards_change_nothing(tuned):
    with open("mine.py", "w", encoding="utf-8") as file:
        file.write("def reward(prompt, completion, answer):\n    return 0.1\n")
    for method in ("best", "grpo"):
        options = [*METHODS[method], f"--out_dir={method}", "--max_iters=30"]
        assert tuned(tune.main, *TUNE, *options)[0] == 0
        before, after = weights("model/best.pt"), weights(f"{method}/ckpt.pt")
        assert all(torch.equal(before[name], weight) for name, weight in after.items())
        assert torch.load(f"{method}/ckpt.pt", weights_only=True)["iter_num"] == 20  # it has ended


def test_show_prints_groups_and_writes_nothing(tuned, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = tuned(tune.main, *TUNE, "--show=2", "--method=grpo")
    assert (status, err) == (0, "")
    assert out.count("prompt ") == 2 and out.count("advantage") == 8 and "mean reward" in out
    assert "0.03M parameters" in out and "memory by calculation: " in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_signal_saves_the_run(tuned):
    command = [sys.executable, str(ROOT / "tune.py"), *TUNE, "--max_iters=100000", "--log_interval=1"]
    process = subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3: reward"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "to go on: python tune.py --reward=mine.py --init_from=resume" in rest
    assert torch.load("out/tuned/ckpt.pt", weights_only=True)["iter_num"] >= 4


@pytest.mark.parametrize("shape", SHAPES)
def test_every_family_is_tuned(tuned, shape):
    shape = [f"--{name}={value}" for name, value in SHAPES[shape].items()]
    assert tuned(train.main, *TINY_RUN, "--dataset=tiny", "--out_dir=other", *shape)[0] == 0
    for options in METHODS.values():
        assert tuned(tune.main, *TUNE, "--init_from=other", "--max_iters=1", *options)[::2] == (0, "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--init_from="], "--init_from"),
        (["--init_from=scratch"], "--init_from"),
        (["--init_from=resume"], "no checkpoint"),
        (["--init_from=resume", "--out_dir=model"], "a run of train.py"),
        (["--out_dir=model"], "holds the weights"),
        (["--reward="], "--reward is empty"),
        (["--reward=other.py"], "other.py"),
        (["--dataset=sums"], "tokenizer"),
        (["--prompt_tokens=16"], "prompt_tokens=16"),
        (["--num_samples=1"], "num_samples is 1"),
        (["--temperature=0"], "temperature is 0"),
        (["--method=ppo"], "best|grpo"),
    ],
)
def test_what_can_not_be_is_refused(tuned, options, says):
    status, out, err = tuned(tune.main, *TUNE, *options)
    assert status in (1, 2) and out == "" and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize(("method", "name"), [("best", "kl_weight"), ("grpo", "updates")])
def test_what_a_method_has_no_use_for_is_said(tuned, method, name):
    status, out, _ = tuned(tune.main, *TUNE, "--max_iters=1", f"--method={method}", f"--{name}=2")
    assert status == 0 and f"not used: {name} (method is {method})" in out


@pytest.mark.parametrize(
    "given, why",
    [
        ("--min_lr=1e-5", "min_lr (schedule is constant)"),
        ("--muon_learning_rate=0.5", "muon_learning_rate (optimizer is adamw)"),
        ("--wandb_project=x", "wandb_project (wandb_log is False)"),
    ],
)
def test_what_training_has_no_use_for_is_said_here_too(tuned, given, why):
    status, out, _ = tuned(tune.main, *TUNE, "--max_iters=1", given)
    assert status == 0 and f"not used: {why}" in out


@pytest.mark.parametrize(
    "given", ["--max_new_tokens=2", "--temperature=0.5", "--seed=5", "--prompt_tokens=3"]
)
def test_completions_of_another_kind_forget_the_best(tuned, given):
    assert tuned(tune.main, *TUNE, "--max_iters=1")[0] == 0
    again = ["--init_from=resume", "--out_dir=out/tuned", "--max_iters=2", MINE]
    status, out, _ = tuned(tune.main, *again, given)
    assert status == 0 and "the best begins anew" in out


@pytest.mark.parametrize("name", ["--reward", "--dataset", "--init_from"])
def test_what_must_be_given(tuned, name):
    status, out, err = tuned(tune.main, *(option for option in TUNE if not option.startswith(name)))
    assert (status, out) == (2, "") and name in err and len(err.splitlines()) == 1


def test_a_failing_reward_ends_in_one_line(tuned):
    with open("mine.py", "w", encoding="utf-8") as file:
        file.write("def reward(prompt, completion, answer):\n    return 1 / 0\n")
    status, _, err = tuned(tune.main, *TUNE)
    assert status == 1 and len(err.splitlines()) == 1 and "mine.py, line 2: ZeroDivisionError" in err


def test_other_weights_than_those_it_began_with_are_refused(tuned):
    assert tuned(tune.main, *TUNE)[0] == 0
    assert tuned(train.main, *TINY_RUN, "--dataset=tiny", "--out_dir=model", "--seed=2")[0] == 0
    status, _, err = tuned(tune.main, "--init_from=resume", "--out_dir=out/tuned", "--max_iters=9", MINE)
    assert status == 1 and err.count("SHA-256") == 1 and len(err.splitlines()) == 1


def test_train_does_not_go_on_with_a_run_of_tune(tuned):
    assert tuned(tune.main, *TUNE, "--max_iters=1")[0] == 0
    status, _, err = tuned(train.main, "--init_from=resume", "--out_dir=out/tuned", "--dataset=tiny")
    assert status == 2 and "a run of tune.py" in err


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("start", None, "does not say what model"),
        ("start", {"source": "a\0b", "sha256": "0" * 64}, "start.source"),
        ("start", {"source": "model"}, "start"),
        ("start", {"source": "nothing", "sha256": "0" * 64}, "put the model back"),
        ("history", {"rewards": [0.5], "dead": [False]}, "history"),
        ("history", {"rewards": [float("nan")] * 4, "dead": [False] * 4}, "history"),
        ("history", {}, "history"),
    ],
)
def test_a_damaged_run_is_refused(tuned, part, value, says):
    assert tuned(tune.main, *TUNE)[0] == 0
    contents = torch.load("out/tuned/ckpt.pt", weights_only=True)
    contents[part] = value
    if value is None:
        del contents[part]
    torch.save(contents, "out/tuned/ckpt.pt")
    os.remove("out/tuned/ckpt.prev.pt")
    status, _, err = tuned(tune.main, "--init_from=resume", "--out_dir=out/tuned", MINE)
    assert status == 1 and len(err.splitlines()) == 1 and says in err


def test_no_checkpoint_says_which_code_is_run(tuned):
    assert tuned(tune.main, *TUNE, "--max_iters=1")[0] == 0
    status, _, err = tuned(tune.main, "--init_from=resume", "--out_dir=out/tuned", "--max_iters=2")
    assert status == 2 and "--reward is missing" in err


def test_many_processes_are_refused(tuned, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    status, _, err = tuned(tune.main, *TUNE)
    assert status == 2 and "torchrun" in err


def test_an_edited_reward_forgets_the_best(tuned):
    assert tuned(tune.main, *TUNE)[0] == 0
    with open("mine.py", "a", encoding="utf-8") as file:
        file.write("# other\n")
    status, out, _ = tuned(tune.main, "--init_from=resume", "--out_dir=out/tuned", "--max_iters=5", MINE)
    assert status == 0 and "the best begins anew" in out
    assert time.time() - os.path.getmtime("out/tuned/best.pt") < 60
