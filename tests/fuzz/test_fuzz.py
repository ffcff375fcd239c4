"""One case of each target of the fuzz suite, and those that once failed. `make fuzz` runs many more."""

import subprocess
import sys

from conftest import ROOT, process_environment
from targets import TARGETS

NUMBERED = enumerate(TARGETS.items())
SOME = [f"{name}/{t.mutators[i % len(t.mutators)].__name__}:1" for i, (name, t) in NUMBERED]
FOUND = ["checkpoint/change_pickle_in_zip:1000"]  # names hold as long as their mutators stay as they are


def test_hostile_files_are_read_as_what_they_are_or_refused_in_one_line():
    command = [sys.executable, "tests/fuzz", *SOME, *FOUND]
    ended = subprocess.run(command, cwd=ROOT, env=process_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
