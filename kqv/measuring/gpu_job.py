"""What a part of bench.py gpu is given."""

import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from kqv.errors import UserError, first_line
from kqv.measuring.report import json_line

START = 12  # seconds of a limit that are left for starting Python and for ending


class NotHere(UserError):
    """What is to be measured is not there: a package, a module or a setting."""


@dataclass
class Job:
    """A part's name, whether it is a rehearsal, the device, the module train.py, a folder, and its limit."""

    part: str
    quick: bool
    device: torch.device
    train: ModuleType
    folder: Path  # for what it writes, an absolute path
    seconds: float  # after which it is ended
    data: str = ""  # a file of text; "": the built-in plays
    started: float = field(default_factory=time.monotonic)

    @property
    def root(self):
        """The folder of the commands."""
        return Path(self.train.__file__).resolve().parent

    @property
    def seconds_left(self):
        """Seconds in which the part should end by itself."""
        return self.seconds - START - (time.monotonic() - self.started)

    def emit(self, what, **figures):
        """Print figures of `what` as a line of JSON. Under "failed" or "skipped" stands the reason."""
        rounded = {name: float(f"{it:.6g}") if isinstance(it, float) else it for name, it in figures.items()}
        print(json_line({"part": self.part, "what": what, **rounded}), flush=True)

    @contextmanager
    def reporting(self, what):
        """A context whose error becomes a line: the part goes on. The traceback is among its messages."""
        try:
            yield
        except (NotHere, ImportError) as error:
            self.emit(what, skipped=first_line(error, 300))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.emit(what, failed=f"{type(error).__name__}: {first_line(error, 300)}")


@contextmanager
def patched(replaced):
    """A context in which {"module.name": value} are in the place of what is there. Raises NotHere."""
    before = {}
    try:
        for path, value in replaced.items():
            module, _, name = path.rpartition(".")
            if not hasattr(sys.modules.get(module), name):
                raise NotHere(f"there is no {path}")
            before[path] = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, value)
        yield
    finally:
        for path, value in before.items():
            module, _, name = path.rpartition(".")
            setattr(sys.modules[module], name, value)
