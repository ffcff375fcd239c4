"""Figures as lines of text or of JSON, and profiles."""

import json
from dataclasses import dataclass
from typing import Literal

from torch.profiler import ProfilerActivity, profile

from kqv.errors import say
from kqv.settings import setting


@dataclass(frozen=True)
class ReportSettings:
    """Report"""

    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line")


def print_figures(config, what, figures):
    """Print {name: value} of one thing measured, as a line in `config.format`."""
    if config.format == "jsonl":
        print(json_line({"what": what, **figures}), flush=True)
        return
    say(f"{what}: {', '.join(map(format_figure, figures, figures.values()))}")


def json_line(figures):
    """{name: value} as a line of JSON. JSON has no NaN and no infinity: they become text."""
    return json.dumps(json.loads(json.dumps(figures), parse_constant=str))


def format_figure(name, value):
    """ "ms a step", 12.3456 -> "ms a step 12.35"."""
    return f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"


def profiled(device):
    """torch's profiler of the CPU, and of the device where it is CUDA: a context manager."""
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


def print_kernels(found, device):
    """Print the 20 kernels of a profile that take most time."""
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
