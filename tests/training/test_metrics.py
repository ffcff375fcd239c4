"""Where a run's numbers go besides metrics.jsonl: TensorBoard, wandb with its sweeps, sample texts."""

import gzip
import json
import math
import resource
import socket
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, process_environment, records, script

import prepare
import train
from kqv.errors import UserError
from kqv.text.dataset import Dataset
from kqv.training import metrics

TINY = [*TINY_RUN, "--dataset=tiny"]


def listing():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


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
    fake.finished = False
    fake.init = lambda **settings: fake.started.append(settings) or fake
    fake.log = lambda values, step: fake.history.append((step, values))
    fake.finish = lambda: setattr(fake, "finished", True)
    fake.Html = lambda text, inject: text
    monkeypatch.setitem(sys.modules, "wandb", fake)
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


@pytest.mark.slow
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


# wandb itself

KEY = "0123456789" * 4


class FakeWandb(ThreadingHTTPServer):
    """As much of wandb's server as a run needs; `history` collects what the run logged, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeWandbHandler)
        self.history, self.started = [], {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, path, asked):
        if path.endswith("/file_stream"):
            lines = asked.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += map(json.loads, lines)
        if asked.get("operationName") == "UpsertBucket":
            self.started = self.started or asked["variables"]
        project = {"id": "p", "name": "owt", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "r", "name": "run1", "displayName": "run", "project": project, "config": "{}"}
        bucket |= {"historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {
            "data": {
                "viewer": viewer,
                "serverInfo": {"features": []},
                "model": None,
                "upsertBucket": {"bucket": bucket, "inserted": True},
                "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
            }
        }


class FakeWandbHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        is_json = self.path.endswith(("/graphql", "/file_stream"))  # telemetry is not
        answer = json.dumps(self.server.answer(self.path, json.loads(body)) if is_json else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def train_with_wandb(tmp_path, *argv, **environment):
    environment = {"WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path / "home"), **environment}
    return script("train.py", *TINY, "--wandb_log", *argv, cwd=tmp_path, **environment)


def test_without_wandb_log_wandb_is_not_imported(tiny_set):
    program = (
        "import sys, train; train.main(sys.argv[1:]); assert not {'wandb', 'requests'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *TINY, "--max_iters=1"],
        env=process_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_number_goes_to_wandb_at_its_step(run, wandb):
    run(*TINY, "--wandb_log", "--wandb_project=plays", "--wandb_run_name=first")
    recorded = [(record.pop("step"), record) for record in records() if record.pop("kind")]
    assert wandb.history == recorded and wandb.finished
    (start,) = wandb.started
    assert (start["project"], start["name"]) == ("plays", "first")
    assert start["config"]["n_embd"] == 32


def test_a_missing_wandb_is_one_line(run, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = listing()
    status, _, err = cli(train.main, *TINY, "--wandb_log")
    assert (status, err) == (1, "error: wandb_log=True needs: pip install wandb\n")
    assert listing() == before


@pytest.mark.slow
def test_wandb_offline_keeps_the_numbers_in_a_folder(run, tmp_path):
    done = train_with_wandb(tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for number in [*logged("loss").values(), *logged("val_loss").values()]:
        assert str(number).encode() in kept.read_bytes()


def test_wandb_online_receives_the_numbers(run, tmp_path):
    with FakeWandb() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        done = train_with_wandb(tmp_path, WANDB_MODE="online", WANDB_BASE_URL=address, WANDB_API_KEY=KEY)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert server.started["project"] == "owt" and server.started["displayName"] == "gpt2"
    assert json.loads(server.started["config"])["n_embd"]["value"] == 32
    for name in ("loss", "lr", "grad_norm", "train_loss", "val_loss"):
        assert {row["_step"]: row[name] for row in server.history if name in row} == pytest.approx(
            logged(name)
        )


@pytest.mark.slow
def test_wandb_without_an_account_is_one_line(run, tmp_path):
    before = listing()
    done = train_with_wandb(tmp_path, WANDB_MODE="online", WANDB_API_KEY="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: wandb can't start") and done.stderr.count("\n") == 1
    assert "WANDB_MODE=offline" in done.stderr
    assert {path for path in listing() if path.parts[0] != "wandb"} == set(before)


@pytest.mark.slow  # wandb waits long before it gives up
def test_a_run_goes_on_without_a_wandb_that_is_out_of_reach(run, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2"}
        done = train_with_wandb(tmp_path, WANDB_MODE="online", **environment)
    said = [line for line in done.stderr.splitlines() if not line.startswith("wandb: ")]
    assert done.returncode == 0
    assert len(said) == 1 and said[0].startswith("warning: wandb is out of reach")
    assert saved()["iter_num"] == 6


# metrics.jsonl


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    log = metrics.Metrics(tmp_path, 0, -1, resumed=False)
    log.record("train", 3, {"loss": math.nan, "lr": math.inf, "sample": "a\nb"})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "kind": "train",
        "step": 3,
        "loss": None,
        "lr": None,
        "sample": "a\nb",
    }


def test_records_that_find_no_room_are_left_out_whole_and_counted(tmp_path, capsys):
    log, unlimited = (
        metrics.Metrics(tmp_path, 0, -1, resumed=False),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    log.record("train", 0, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, unlimited[1]))
    try:
        for step in (1, 2, 3):
            log.record("train", step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    log.record("train", 4, {"loss": 1.0})
    log.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics.jsonl can't be written (File too large)" in err
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found if "loss" in record] == [0, 4]
    assert found[1] == {"kind": "note", "step": 4, "note": "3 records could not be written"}


def test_a_tracker_that_fails_ends_no_run(run, cli, wandb):
    def fail(*_, **__):
        raise RuntimeError("the service has died")

    wandb.log = fail
    status, out, err = cli(train.main, *TINY, "--wandb_log")
    assert status == 0 and "done: step 6" in out
    assert err == "warning: wandb failed (the service has died): training goes on without it\n"
    assert len(logged("loss")) == 6


LINES = [
    {"kind": "evaluation", "step": 0, "val_loss": 3.0},
    {"kind": "train", "step": 0, "loss": 3.0},
    {"kind": "train", "step": 1, "loss": 2.0},
    {"kind": "evaluation", "step": 2, "val_loss": 2.0},
    {"kind": "save", "step": 2, "save_stall_ms": 1.0},
    {"kind": "train", "step": 2, "loss": 1.5},
    {"kind": "train", "step": 3, "loss": 1.0},
    {"kind": "save", "step": 4, "save_stall_ms": 1.0},
]


@pytest.mark.parametrize("older", [False, True], ids=["with kinds", "of an older version"])
@pytest.mark.parametrize(
    "step, evaluated, kept",
    [(2, 2, [0, 1, 2, 3, 4]), (2, 0, [0, 1, 2, 4]), (3, 2, [0, 1, 2, 3, 4, 5]), (4, 2, range(8))],
    ids=["at an evaluation", "before an evaluation", "between", "at the last save"],
)
def test_a_resumed_run_keeps_what_was_recorded_before_its_checkpoint(tmp_path, older, step, evaluated, kept):
    lines = [
        {name: value for name, value in line.items() if not (older and name == "kind")} for line in LINES
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')  # torn
    log = metrics.Metrics(tmp_path, step, evaluated, resumed=True)
    log.record("train", step, {"loss": 0.5})
    log.close()
    expected = [*(lines[number] for number in kept), {"kind": "train", "step": step, "loss": 0.5}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
