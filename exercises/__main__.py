"""
Exercises: each takes one function away in a copy of the code, and grades what you write in its place.

usage: make exercise N=3, or python exercises 3
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exercises.catalogue import EXERCISES  # noqa: E402
from exercises.grade import ROOT, fault, folder_of, line_of, make_copy, run_tests  # noqa: E402


def main(argv):
    if len(argv) != 1 or not argv[0].isascii() or not argv[0].isdigit():
        return listed()
    number = int(argv[0])
    if not 1 <= number <= len(EXERCISES):
        print(f"error: exercise {number} is not there: choose 1 to {len(EXERCISES)}", file=sys.stderr)
        return 2
    return work_on(number, EXERCISES[number - 1])


def listed():
    for number, exercise in enumerate(EXERCISES, 1):
        print(f"{number:2}  {exercise.title}")
    print("\nmake exercise N=3 begins exercise 3, and grades it when you give the command again")
    return 0


def work_on(number, exercise):
    """Make the copy, or grade it. Returns the exit status: 0 where it is right, or has just begun."""
    folder = folder_of(number)
    path = folder / exercise.file
    shown = path.relative_to(ROOT)
    again = f"then give the command again: make exercise N={number}"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)  # half of a copy
        make_copy(exercise, folder)
        print(f"Exercise {number}: {exercise.title}\n\n{exercise.task}\n")
        print(f"Write it in {shown}, line {line_of(path)}; {again}")
        return 0
    if (line := line_of(path)) is not None:
        print(f"Exercise {number}: {exercise.title}\n\n{exercise.task}\n")
        print(f"Not written yet: {shown}, line {line}. Write it, {again}")
        return 1
    if wrong := fault(exercise, path):
        print(f"Not yet: {wrong}\n{shown}; {again}")
        return 1
    passed, lines = run_tests(exercise, folder)
    if not passed:
        print("\n".join(lines))
        print(f"Not yet: right on small inputs, but this test of the project fails. {shown}; {again}")
        return 1
    print(f"Right. {lines[-1] if lines else ''}")
    print(f"The project's own: {exercise.file}, {', '.join(exercise.names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
