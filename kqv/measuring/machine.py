"""What this machine could do at best, and how figures are measured and printed."""

import json
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from kqv.errors import UsageError
from kqv.settings import setting


@dataclass(frozen=True)
class ReportSettings:
    """Report"""

    rounds: int = setting(5, "measurements of each; the median counts", at_least=1)
    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line")


@dataclass(frozen=True)
class FormatSettings:
    """Report"""

    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line")


def whole_numbers(batch_sizes):
    """ "1,64" -> [1, 64]. Raises UsageError."""
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError as error:
        raise UsageError(f"{error} (batch_sizes={batch_sizes})") from None
    if min(sizes) < 1:
        raise UsageError(f"batch_sizes={batch_sizes}, but each must be at least 1")
    return sizes


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak begins anew (man 5 proc)


def peak_memory(device):
    """The most bytes held since the peak was reset: by tensors on a CUDA device, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Machine:
    """What the device could do at best."""

    def __init__(self, device, dtype, rounds):
        self.device, self.dtype, self.rounds = device, dtype, rounds
        large = device.type != "cpu"
        self.much = torch.ones(2**28 if large else 2**26, device=device)  # 1 GB or 256 MB: past every cache
        self.side = 8192 if large else 2048

    def seconds(self, work):
        """How long `work()` takes, to the end of what it gives the device to do."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def median(self, work):
        work()  # the first time pays for what is made once
        return statistics.median(self.seconds(work) for _ in range(self.rounds))

    def bandwidth(self, once=False):
        """Bytes read a second."""
        return self.much.nbytes / (self.seconds if once else self.median)(self.much.sum)

    def matmul(self):
        """Floating-point operations a second in a large matrix product."""
        a, b = (torch.randn(self.side, self.side, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * self.side**3 / self.median(lambda: a @ b)


def profiled(device):
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


def print_table(found, device):
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def say_machine(config, machine, compiled, **more):
    """What is measured on, and what it could do at best."""
    on_gpu = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if on_gpu else f"{torch.get_num_threads()} threads"
    figures = {
        "device": f"{machine.device} ({name})",
        "torch": torch.__version__,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compiled": compiled,
        **more,
        "memory GB/s": machine.bandwidth() / 1e9,
        "matmul TFLOP/s": machine.matmul() / 1e12,
    }
    say(config, "machine", figures)


def say(config, what, figures):
    if config.format == "jsonl":
        print(json.dumps({"what": what, **figures}), flush=True)
        return
    print(f"{what}:", ", ".join(map(shown, figures, figures.values())), flush=True)


def shown(name, value):
    return f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
