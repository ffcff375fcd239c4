"""bench.py gpu, rehearsed on a CPU: parts that fail, hang or die, and what is written of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, process_environment

import bench
import train
from kqv.measuring import gpu_runs, gpu_training
from kqv.measuring.gpu import PARTS, Report, run_part
from kqv.measuring.gpu_job import Job, NotHere, patched
from kqv.measuring.gpu_kernels import compare
from kqv.measuring.gpu_training import Trial, Variant
from model import GPTConfig

REHEARSAL = ["--device=cpu", "--quick"]


def parsed(text):
    """The lines of JSON in a text, all of which must be valid: NaN is not."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture
def job(tmp_path):
    return Job("baby", True, torch.device("cpu"), train, tmp_path, 60)


@pytest.fixture
def lines(capsys):
    """{what: its figures} of what was emitted."""
    return lambda: {line.pop("what"): line for line in parsed(capsys.readouterr().out)}


# Parts in processes


@pytest.fixture
def part(tmp_path):
    """Run Python code as a part: part("print(1)", seconds=5) -> (its lines, its messages)."""

    def run(code, seconds=30):
        (tmp_path / "out").mkdir(exist_ok=True)
        report = Report(tmp_path / "out")
        run_part("some", [sys.executable, "-c", code], seconds, report)
        return report.of("some"), (tmp_path / "out/some.stderr.txt").read_text("utf-8")

    return run


LINE = 'print(\'{"part": "some", "what": "one", "ms": 2.5}\', flush=True)\n'


def test_lines_of_json_are_taken_and_all_else_is_a_message(part, tmp_path, capsys):
    (one, end), messages = part(f"import sys\n{LINE}print('{{cut')\nprint(7)\nprint('x', file=sys.stderr)")
    assert one == {"part": "some", "what": "one", "ms": 2.5}
    assert end.keys() == {"part", "what", "seconds"} and end["seconds"] < 30
    assert sorted(messages.split()) == ["7", "x", "{cut"]
    written = (tmp_path / "out/parts.jsonl").read_text("utf-8")
    assert parsed(written)[1:] == [one, end] and capsys.readouterr().out == written


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import os; os.abort()", "ended by SIGABRT"),
    ],
)
def test_a_part_that_fails_keeps_its_lines_and_gives_a_reason(part, code, reason):
    (one, end), _ = part(LINE + code)
    assert one["ms"] == 2.5 and end["failed"] == reason


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_is_ended_with_all_that_it_started(part, tmp_path):
    hang = "import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'input()'], "
    hang += "stdin=subprocess.PIPE)\nprint(child.pid, file=sys.stderr, flush=True)\ntime.sleep(100)"
    start = time.monotonic()
    (one, end), messages = part(LINE + hang, seconds=2)
    assert one["ms"] == 2.5 and end["failed"] == "not done after 2 s" and time.monotonic() - start < 15
    end = time.monotonic() + 10
    while is_running(int(messages)):  # it has its signal; the system takes a moment
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_part_of_which_all_is_skipped_says_so(part):
    skip = """print('{"part": "some", "what": "one", "skipped": "needs CUDA"}')"""
    assert part(skip)[0][-1]["skipped"] == "all of it"
    assert "skipped" not in part(f"{skip}\n{LINE}")[0][-1]


# The command


def rehearse(cli, *argv):
    """(status, lines, standard error) of a rehearsal."""
    status, out, err = cli(bench.main, "gpu", *REHEARSAL, *argv)
    return status, parsed(out), err


def test_a_rehearsal_goes_through_its_parts_in_order(cli):
    status, lines, err = rehearse(cli, "--parts=versions,baby")
    assert status == 0, err
    assert [line["part"] for line in lines if line["what"] == "end"] == ["versions", "baby"]
    found = {(line["part"], line["what"]): line for line in lines}
    assert found["versions", "software"]["torch"] == torch.__version__
    assert "scaled_dot_product" in found["versions", "attention, causal"]["backward"][0]
    for name in ("baseline", "plain", "baseline again"):
        assert found["baby", name]["tokens/s"] == pytest.approx(
            4 * 64 / found["baby", name]["ms a step"] * 1e3, rel=1e-4
        )
    assert parsed(Path("out/gpu/parts.jsonl").read_text("utf-8")) == lines
    assert "versions     software" in err and "baby         end" in err  # the table


def test_another_run_is_added_to_the_file(cli):
    for _ in range(2):
        assert rehearse(cli, "--parts=ceilings")[0] == 0
    written = parsed(Path("out/gpu/parts.jsonl").read_text("utf-8"))
    assert [line["what"] for line in written].count("start") == 2


def test_the_others_run_where_a_part_fails(cli):
    status, lines, err = rehearse(cli, "--parts=ceilings,baby", "--seconds=1")
    assert status == 1 and err.endswith(
        "error: these parts failed: ceilings, baby; their messages are in out/gpu\n"
    )
    ends = [line for line in lines if line["what"] == "end"]
    assert [line["failed"] for line in ends] == ["not done after 1 s"] * 2


def test_ctrl_c_ends_the_part_and_leaves_what_is_there(tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "gpu", *REHEARSAL, "--parts=ceilings,tests,baby"]
    options = {"env": process_environment(), "cwd": tmp_path, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as run:
        for line in run.stdout:
            if '"end"' in line:  # of ceilings
                time.sleep(1)  # the next one has begun
                os.kill(run.pid, signal.SIGINT)
                break
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.endswith("error: interrupted\n") and "Traceback" not in err
    written = parsed((tmp_path / "out/gpu/parts.jsonl").read_text("utf-8"))
    assert written[-1]["part"] == "tests" and written[-1]["failed"] == "interrupted"
    assert "memory" in [line["what"] for line in written]
    assert not any(line["part"] == "baby" for line in written)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--parts=version"], ["parts=version", "'version'", "versions", "124M"]),
        (["--parts="], ["parts="]),
        (["--data=nothing.txt"], ["data=nothing.txt"]),
        (["--quick=False"], ["--device=cpu", "--quick"]),
        (["--seconds=-1"], ["seconds is -1", "at least 0"]),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(refusal, argv, says):
    line = refusal(bench.main, "gpu", *REHEARSAL, *argv, status=2)
    assert all(part in line for part in says), line


def test_without_a_gpu_a_rehearsal_is_offered(refusal):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "--device=cpu --quick" in refusal(bench.main, "gpu")


def test_a_folder_that_can_not_be_is_refused_at_once(refusal, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in refusal(bench.main, "gpu", *REHEARSAL, "--out_dir=file/out")


def test_all_limits_together_are_ten_minutes_less_a_margin():
    assert sum(seconds for _, seconds in PARTS.values()) <= 585


def test_every_part_is_rehearsed_without_a_process_of_its_own(cli):
    """As a debugger would run it; the text is the user's own."""
    Path("text.txt").write_text("To be, or not to be: that is the question.\n" * 200, "utf-8")
    argv = ["--isolated=False", "--parts=kernels,shakespeare", "--data=text.txt"]
    status, lines, err = rehearse(cli, *argv)
    assert status == 0, err
    found = {line["what"]: line for line in lines}
    assert found["shakespeare_char"]["text"] == "text.txt" and found["shakespeare_char"]["steps"] == 20
    assert found["loss"]["error"] < 0.01


OTHER_TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_right():
    print("noise")

def test_wrong():
    print("noise")
    assert 1 == 2

def test_not_here():
    pytest.skip("there is no such card")
"""


def test_each_test_that_fails_has_a_line(part, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_gpu.py").write_text(OTHER_TESTS, "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu", "utf-8")
    code = f"""
import sys, types, pathlib, torch
sys.path.insert(0, {str(ROOT)!r})
from kqv.measuring import gpu_job, gpu_runs
train = types.SimpleNamespace(__file__={str(tmp_path / "train.py")!r})
gpu_runs.run_tests(gpu_job.Job("some", True, torch.device("cpu"), train, pathlib.Path("."), 90))
"""
    (wrong, counts, end), messages = part(code, seconds=90)
    assert wrong["what"].endswith("test_gpu.py::test_wrong") and wrong["failed"] == "assert 1 == 2"
    assert [counts[f"tests {how}"] for how in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert counts["reasons of skips"] == ["Skipped: there is no such card"]
    assert "failed" not in end and "1 failed, 1 passed, 1 skipped" in messages


# What parts emit


def test_numbers_that_json_does_not_know_become_text(job, lines):
    job.emit("losses", last=float("nan"), all=[1.0, float("inf")], short=1.23456789)
    assert lines()["losses"] == {"part": "baby", "last": "NaN", "all": [1.0, "Infinity"], "short": 1.23457}


def test_an_error_is_a_line_and_the_part_goes_on(job, lines):
    with job.reporting("one"):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")
    with job.reporting("two"):
        import kqv.nothing  # noqa: F401
    found = lines()
    assert found["one"]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert found["two"]["skipped"] == "No module named 'kqv.nothing'"


def test_an_error_larger_than_the_usual_one_fails(job, lines):
    right = [torch.ones(4, dtype=torch.float64)]
    near, far = ([torch.full((4,), 1 + by)] for by in (0.01, 0.03))
    compare(job, "near", near, near, right, ("x",))
    compare(job, "far", far, near, right, ("x",))
    compare(job, "NaN", [torch.full((4,), torch.nan)], near, right, ("x",))
    found = lines()
    assert "failed" not in found["near"] and found["near"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert "x is off by 0.03" in found["far"]["failed"] and "x is off by nan" in found["NaN"]["failed"]


# Training


SHAPE = GPTConfig(64, 65, 1, 2, 32, bias=False)


@pytest.fixture
def variants(job, lines, monkeypatch):
    """Measure variants: variants({"baseline": Variant()}) -> the lines."""

    def run(table, seconds=60):
        monkeypatch.setattr(gpu_training, "VARIANTS", table)
        job.seconds = seconds
        with Trial(job, SHAPE, 1) as trial:
            trial.measure(*table)
            trial.compare_curves(*table)
        return lines()

    return run


def test_a_variant_that_fails_or_is_not_there_leaves_the_others(variants):
    table = {"baseline": Variant(), "wrong": Variant({"beta1": -1.0})}
    table |= {"later": Variant({"no_such_setting": 1}), "gone": Variant(replaced={"train.no_such_name": 1})}
    found = variants(table)
    assert found["baseline"]["of baseline"] == 1 and found["baseline again"]["tokens/s"] > 0
    assert "failed" in found["wrong"] and "failed" in found["wrong, curve"]
    assert found["later"]["skipped"] == "train.py has no setting no_such_setting"
    assert found["gone"]["skipped"] == "there is no train.no_such_name"


def test_a_curve_away_from_the_baseline_fails(variants):
    found = variants({"baseline": Variant(), "same": Variant(), "fast": Variant({"learning_rate": 0.1})})
    assert found["same, curve"]["from baseline"] == 0 and "failed" not in found["same, curve"]
    assert found["fast, curve"]["failed"].endswith("from the baseline, but noise is 0.02")


def test_what_a_variant_replaces_is_there_again_after_it():
    before = train.train_step
    with pytest.raises(NotHere), patched({"train.train_step": 1, "train.nothing": 2}):
        pass
    assert train.train_step is before
    with patched({"train.train_step": 1}):
        assert train.train_step == 1
    assert train.train_step is before


def test_a_clip_apart_is_the_clip_of_training():
    """AdamW's second step depends on the size of the gradient, so on the clip."""
    weights = []
    for step in (clipped_apart, clipped_by_torch):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for gradient in (torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.1, 0.2, 0.0])):
            parameter.grad = gradient
            step(parameter, optimizer)
        weights.append(parameter.detach())
    assert torch.allclose(*weights)


def clipped_apart(parameter, optimizer):
    gpu_training.clip_apart(torch.tensor(False), optimizer, parameter.grad.norm(), 1.0)


def clipped_by_torch(parameter, optimizer):
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    optimizer.step()


def test_without_time_variants_are_skipped(variants):
    found = variants({"baseline": Variant(), "late": Variant()}, seconds=1)
    assert found["late"]["skipped"] == found["baseline"]["skipped"] == "no time is left"


def test_a_run_without_network_trains_on_the_projects_own_files(job, lines, monkeypatch):
    monkeypatch.setattr(gpu_runs, "FETCHING", 1)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.folder / "cache"))
    gpu_runs.run_shakespeare(job)
    assert lines()["shakespeare_char"]["text"] == "the project's own files"
