"""
bench.py gpu: all that can be checked and measured on a GPU, in at most ten minutes.

Each part runs in a process of its own with a time limit, so one that crashes, hangs or runs out of memory
ends alone, and the next part begins with a free GPU. What is right comes first, then how fast it is.
"""

import faulthandler
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kqv.errors import UsageError, UserError, output_may_be_lost
from kqv.measuring.gpu_decoding import compare_engines
from kqv.measuring.gpu_job import Job, NotHere
from kqv.measuring.gpu_kernels import check_kernels
from kqv.measuring.gpu_machine import ceilings, versions
from kqv.measuring.gpu_process import Process
from kqv.measuring.gpu_runs import run_shakespeare, run_tests, start_up
from kqv.measuring.gpu_training import train_124m, train_124m_by_kernels, train_baby
from kqv.measuring.report import format_figure, json_line
from kqv.settings import setting

# {part: (function of a Job, seconds)}, in the order in which they run. A part is ended when the seconds of it
# and of those before it are over, so it also has what those have left. All together: ten minutes, less a
# margin.
PARTS = {
    "versions": (versions, 35),
    "ceilings": (ceilings, 20),
    "kernels": (check_kernels, 50),
    "tests": (run_tests, 70),
    "baby": (train_baby, 70),
    "124M": (train_124m, 110),
    "124M_kernels": (train_124m_by_kernels, 70),
    "decode": (compare_engines, 70),
    "shakespeare": (run_shakespeare, 50),
    "start_up": (start_up, 40),
}


@dataclass(frozen=True)
class BenchGPUSettings:
    """
    usage: python bench.py gpu [config.py ...] [--name=value ...]

    Check and measure everything on one GPU, in at most ten minutes. Each thing is a line of JSON, printed
    and added to parts.jsonl in the folder; a table comes last. The exit status is 1 where a part fails; the
    others run all the same.
    """

    out_dir: str = setting("out/gpu", "folder for parts.jsonl, and each part's messages", path=True)
    device: Literal["auto", "cpu"] = setting("auto", "auto: the CUDA device; cpu: with --quick, a rehearsal")
    quick: bool = setting(False, "tiny models and few steps: whether everything runs, not how fast")
    parts: str = setting("all", f"{', '.join(PARTS)}; with commas between")
    data: str = setting("", "a text to train on, as tiny Shakespeare; empty: the built-in plays", path=True)
    seconds: int = setting(0, "limit of each part; 0: its share of ten minutes", at_least=0)
    isolated: bool = setting(True, "False: no processes and no limits, for a debugger")


def bench_gpu(config, train):
    """
    Run the parts. `train` is the module train.py. Raises UserError where a part fails, and for settings that
    make no sense.
    """
    names, device, folder = chosen_parts(config.parts), device_of(config), Path(config.out_dir).resolve()
    if config.data and not Path(config.data).is_file():
        raise UsageError(f"data={config.data} is no file: give a text, or leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    if not config.isolated:
        for name in names:
            limit = config.seconds or PARTS[name][1]
            run_here(Job(name, config.quick, device, train, folder, limit, config.data))
        return
    output_may_be_lost()
    report = Report(folder)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a part ends with this process
    try:
        run_parts(names, config, train, report)
    finally:
        signal.signal(signal.SIGTERM, before)
        print(report.table(), file=sys.stderr, flush=True)
    if failed := report.failed:
        raise UserError(f"these parts failed: {', '.join(failed)}; their messages are in {config.out_dir}")


def run_parts(names, config, train, report):
    """Run each part in a process of its own."""
    command = [sys.executable, str(Path(train.__file__).with_name("bench.py")), "gpu", "--isolated=False"]
    command += [f"--out_dir={report.folder}", f"--device={config.device}", f"--quick={config.quick}"]
    command += [f"--data={Path(config.data).resolve()}"] if config.data else []
    environment = {"TRITON_INTERPRET": "1"} if config.device == "cpu" else {}  # kernels run on a CPU, too
    end = time.monotonic()
    for name in names:
        end += config.seconds or PARTS[name][1]
        seconds = math.ceil(config.seconds or end - time.monotonic())
        command_of_part = [*command, f"--parts={name}", f"--seconds={seconds}"]
        run_part(name, command_of_part, seconds, report, environment)


def run_here(job):
    """Do a part in this process. Shortly before its end, what it is doing is printed to its messages."""
    faulthandler.enable(sys.__stderr__)
    faulthandler.dump_traceback_later(max(1, job.seconds - 3), file=sys.__stderr__)
    try:
        PARTS[job.part][0](job)
    except NotHere as error:
        job.emit("all", skipped=str(error))
    finally:
        faulthandler.cancel_dump_traceback_later()


def chosen_parts(parts):
    """ "versions,decode" -> ["versions", "decode"]; "all": all of them. Raises UsageError."""
    names = list(PARTS) if parts == "all" else parts.split(",")
    for name in names:
        if name not in PARTS:
            raise UsageError(f"parts={parts}: {name!r} is none of {', '.join(PARTS)}")
    return names


def device_of(config):
    """The device that the settings name. Raises UserError, also where a CPU would take hours."""
    rehearse = "--device=cpu --quick runs the same on tiny models"
    if config.device == "cpu" and not config.quick:
        raise UsageError(f"--device=cpu can't do this in ten minutes: {rehearse}")
    if config.device == "auto" and not torch.cuda.is_available():
        raise UserError(f"there is no CUDA device: {rehearse}")
    return torch.device("cpu" if config.device == "cpu" else "cuda")


class Report:
    """The lines of all parts: printed, added to parts.jsonl in `folder`, and kept for the table."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []
        self.file = open(folder / "parts.jsonl", "a", encoding="utf-8")
        self.add({"part": "all", "what": "start", "time": time.strftime("%Y-%m-%d %H:%M:%S")})

    def add(self, line):
        self.lines.append(line)
        text = json_line(line)
        print(text, file=self.file, flush=True)
        print(text, flush=True)

    def of(self, part):
        return [line for line in self.lines if line["part"] == part]

    @property
    def failed(self):
        """The parts of which something failed, in order."""
        return list(dict.fromkeys(line["part"] for line in self.lines if "failed" in line))

    def table(self):
        """The lines as text for people: a row each, with what failed and the first figures."""
        rows = []
        for line in self.lines[1:]:
            names = sorted(list(line)[2:], key=lambda name: name not in ("failed", "skipped"))
            shown = ", ".join(format_figure(name, line[name]) for name in names)
            rows.append(f"{line['part']:<12} {line['what']:<36} {shown[:110]}")
        return "\n".join(rows)


def run_part(name, command, seconds, report, environment=None):
    """
    Run a part's command for at most so many seconds. Its lines of JSON go to the report, then one about its
    end; all else that it prints goes to NAME.stderr.txt in the report's folder.
    """
    messages = report.folder / f"{name}.stderr.txt"
    process = Process(command, messages, report.add, environment)
    start, failed = time.monotonic(), "interrupted"
    try:
        failed = process.run(seconds)
    finally:
        end = {"part": name, "what": "end", "seconds": round(time.monotonic() - start, 1)}
        lines = report.of(name)
        if failed:
            end["failed"] = failed
        elif lines and all("skipped" in line for line in lines):
            end["skipped"] = "all of it"
        report.add(end)
