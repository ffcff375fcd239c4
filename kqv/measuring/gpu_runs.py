"""The parts of bench.py gpu that do what a user does: the tests, train.py from its command, a whole run."""

import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from kqv.errors import UserError, first_line
from kqv.measuring.gpu_job import NotHere
from kqv.measuring.presets import PRESETS
from kqv.measuring.start_up import measure_start_up
from kqv.measuring.training import step_settings, write_random_set
from kqv.text.dataset import Dataset
from model import GPTConfig

FETCHING = 10  # seconds that preparing the built-in plays may take: there may be no network
STDERR = 2
TWO_STARTS = 45  # seconds that starting 124M takes, cold and warm
STOPPING = 10  # seconds in which a run saves and ends, or pytest does


# Tests


class Tests:
    """A plugin of pytest that emits each failure at once, counts, and ends the session at the job's limit."""

    def __init__(self, job, exit):
        self.job, self.exit, self.output = job, exit, sys.stdout
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.reasons = set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = first_line(crash.message if crash else report.longrepr, 300)
            with redirect_stdout(self.output):
                self.job.emit(report.nodeid, failed=reason)
        if report.outcome == "skipped":
            self.reasons.add(str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else "expected")
        if self.job.seconds_left < STOPPING:
            self.exit("no time is left")


def run_tests(job):
    """A line for each test marked `gpu` that fails, and one of how many there were."""
    for package in ("pytest", "hypothesis"):
        if not find_spec(package):
            raise NotHere(f"{package} is not installed: pip install -r requirements-dev.txt")
    import pytest

    tests = Tests(job, pytest.exit)
    options = ["-m", "gpu", "--rootdir", str(job.root), "-p", "no:cacheprovider", "--tb=short"]
    if find_spec("xdist") and job.device.type == "cuda":
        options += ["-n", "4"]
    where = job.root / "tests" / "test_gpu.py" if job.quick else job.root / "tests"
    with redirect_stdout(sys.stderr):
        status = pytest.main([*options, str(where)], plugins=[tests])
    figures = {f"tests {outcome}": count for outcome, count in tests.counts.items()}
    if reasons := sorted(tests.reasons):
        figures["reasons of skips"] = reasons
    if not sum(tests.counts.values()):
        figures["failed"] = f"no test ran: pytest ended with status {int(status)}"
    elif job.seconds_left < STOPPING:
        figures["failed"] = "no time was left for the others"
    elif tests.counts["skipped"] == sum(tests.counts.values()):
        figures["skipped"] = "all"
    job.emit("pytest -m gpu", **figures)


# From the command to the end of the first step


def start_up(job):
    """A line for each model: how long train.py takes with an empty compiler's cache, and with a full one."""
    shapes = {"baby": PRESETS["baby"].shape, "124M": PRESETS["124M"].shape}
    if job.quick:
        shapes = {"baby": GPTConfig(64, 65, 2, 2, 32, bias=False)}
    for name, shape in shapes.items():
        if name == "124M" and job.seconds_left < TWO_STARTS:
            job.emit(name, skipped="no time is left")
            continue
        with job.reporting(name):
            folder = job.folder / f"random-{name}"
            write_random_set(folder, shape)
            options = SimpleNamespace(
                activation_checkpointing=False, device=job.device.type, dtype="auto", compile="auto"
            )
            settings = step_settings(options, job.train.TrainSettings, shape, 16, folder)
            job.emit(name, **measure_start_up(settings, job.train.__file__))


# A whole run


def run_shakespeare(job):
    """A line of a run of config/train_shakespeare_char.py: its best loss, and when."""
    text, dataset = prepared_text(job)
    out_dir = job.folder / "shakespeare"
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", f"--dataset={dataset}"]
    command += [f"--out_dir={out_dir}", f"--device={job.device.type}"]
    if job.quick:
        command += ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64", "--batch_size=4"]
        command += ["--max_iters=20", "--eval_interval=10", "--eval_iters=2", "--warmup_iters=2"]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=job.root, stdout=STDERR) as run:
        try:
            run.wait(max(1, job.seconds_left - STOPPING))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT)  # it saves, and ends with status 130
    if run.returncode not in (0, 130):
        raise UserError(f"train.py ended with status {run.returncode}")
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
    best = min(evaluations, key=lambda record: record["val_loss"])
    job.emit(
        "shakespeare_char",
        **{"text": text, "best val loss": best["val_loss"], "at step": best["step"]},
        **{"steps": records[-1]["step"], "seconds": time.monotonic() - start, "tokens/s": max(speeds)},
    )


def prepared_text(job):
    """
    (what text it is, the folder of the set made of it in characters): the user's own, else the built-in
    plays, else, without a network, the project's own files.
    """
    if job.data:
        return Path(job.data).name, prepare(job, "given", Path(job.data).resolve())
    try:
        return "the built-in plays", prepare(job, "plays", "plays", FETCHING)
    except (UserError, subprocess.TimeoutExpired):
        own = job.folder / "project.txt"
        paths = sorted(path for end in ("md", "py") for path in job.root.glob(f"**/*.{end}"))
        ours = [path for path in paths if ".venv" not in path.parts]
        own.write_text("\n".join(path.read_text("utf-8") for path in ours), "utf-8")
        return "the project's own files", prepare(job, "project", own)


def prepare(job, name, source, seconds=None):
    """The folder of the set of that name, made by prepare.py. Raises UserError, or TimeoutExpired."""
    command = [sys.executable, str(job.root / "prepare.py"), str(source), f"--name={name}"]
    made = subprocess.run(command, cwd=job.folder, stdout=STDERR, timeout=seconds)
    if made.returncode:
        raise UserError(f"prepare.py {source} ended with status {made.returncode}")
    return Dataset(job.folder / "data" / name).folder
