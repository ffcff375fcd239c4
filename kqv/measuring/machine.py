"""What this machine can do at best, and how long work takes on it."""

import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kqv import threads
from kqv.measuring.report import print_figures
from kqv.settings import setting

NUMBERS_READ = {"cpu": 2**26, "gpu": 2**28}  # float32, so 256 MB or 1 GB: larger than every cache
MATRIX_SIZE = {"cpu": 2048, "gpu": 8192}  # rows and columns
SMALL_MATRIX = 256
LONGEST_PRODUCT = 0.5  # seconds


@dataclass(frozen=True)
class RoundsSettings:
    """Measurements"""

    rounds: int = setting(5, "measurements of each; the median counts", at_least=1)


class Machine:
    """
    A device and the precision of matrix products on it. `clock` gives seconds; each measurement is repeated
    `rounds` times.
    """

    def __init__(self, device, dtype, rounds, clock=time.perf_counter):
        threads.choose(device)
        self.device, self.dtype, self.rounds, self.clock = device, dtype, rounds, clock
        kind = "cpu" if device.type == "cpu" else "gpu"
        self.numbers = torch.ones(NUMBERS_READ[kind], device=device)
        self.matrix_size = MATRIX_SIZE[kind]

    def synchronize(self):
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def seconds(self, work):
        """Seconds that `work()` takes, until the device has done what it was given."""
        self.synchronize()
        start = self.clock()
        work()
        self.synchronize()
        return self.clock() - start

    def median(self, work):
        """The median of the seconds that `work()` takes, after a first call, which may set things up."""
        work()
        return statistics.median(self.seconds(work) for _ in range(self.rounds))

    def bandwidth(self, once=False):
        """Bytes read in a second, from the sum of a large tensor: the median, or of one measurement."""
        return self.numbers.nbytes / (self.seconds if once else self.median)(self.numbers.sum)

    def matmul(self):
        """
        Floating-point operations in a second of a large matrix product: of a smaller one where that would
        take long, as without instructions for this dtype.
        """
        small, size = self.product(SMALL_MATRIX), self.matrix_size
        small()
        a_second = SMALL_MATRIX**3 / self.seconds(small)
        while size > SMALL_MATRIX and size**3 > a_second * LONGEST_PRODUCT:
            size //= 2
        return 2 * size**3 / self.median(self.product(size))

    def product(self, size):
        """A function that computes the product of two square matrices."""
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        return lambda: a @ b


def reset_peak_memory(device):
    """Let `peak_memory` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the process's peak (man 5 proc)


def peak_memory(device):
    """The most bytes held since the peak was reset: by tensors on a CUDA device, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_machine(config, machine, **more):
    """Print what is measured on, and what it can do at best."""
    on_gpu = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if on_gpu else f"{torch.get_num_threads()} threads"
    figures = {
        "device": f"{machine.device} ({name})",
        "torch": torch.__version__,
        "dtype": str(machine.dtype).removeprefix("torch."),
        **more,
        "memory GB/s": machine.bandwidth() / 1e9,
        "matmul TFLOP/s": machine.matmul() / 1e12,
    }
    print_figures(config, "machine", figures)
