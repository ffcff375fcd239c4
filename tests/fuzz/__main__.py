"""
Hostile and damaged files against the commands: each is loaded as what it was, or refused in one line.

    python tests/fuzz                               for four minutes, other cases at each start
    python tests/fuzz --seed=3 --cases=2            the cases 3 and 4 of each target and mutator
    python tests/fuzz checkpoint/change_layout:17   that case, and what the command printed
"""

import argparse
import itertools
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from runner import originals, run_case  # noqa: E402
from targets import TARGETS  # noqa: E402


def main():
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.splitlines()[1])
    parser.add_argument(
        "names", nargs="*", metavar="TARGET/MUTATOR:NUMBER", help="cases to run, printed whole"
    )
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after so many (240)")
    parser.add_argument("--cases", type=int, help="run so many of each target and mutator, whatever the time")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="number of the first cases")
    parser.add_argument("--only", default="", help="the targets and mutators with this in their name")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # torch warns of rare kinds of tensors
    torch.set_num_threads(1)  # a process with threads can't be forked
    end = time.monotonic() + given.seconds if given.cases is None else float("inf")
    count, wrong = 0, 0
    print(f"seed {given.seed}", flush=True)
    with originals() as folder:
        for name in given.names or names(given):
            if time.monotonic() > end and not given.names:
                break
            problem, outcome, command, place = run_case(name, folder)
            count += 1
            if problem:
                wrong += 1
                print(f"\n{name}: {problem}\n    again: {shlex.join([sys.executable, 'tests/fuzz', name])}")
                print(
                    f"    ran {shlex.join([f'{command[0]}.py', *command[1:]])} in {place}, which stays",
                    flush=True,
                )
            if given.names:
                print(f"{name}: status {outcome.status}, {outcome.seconds:.1f} s, {outcome.growth >> 20} MB")
                print(f"{outcome.out}{outcome.err}", end="")
            if not problem:
                shutil.rmtree(place)
    print(f"{count} cases, {wrong} wrong")
    sys.exit(wrong > 0)


def names(given):
    """The names of the cases, target after target, again and again with the next number."""
    pairs = [
        (name, mutator) for name, target in TARGETS.items() for mutator in dict.fromkeys(target.mutators)
    ]
    numbers = itertools.count(given.seed)
    for number in itertools.islice(numbers, given.cases):
        for target, mutator in pairs:
            name = f"{target}/{mutator.__name__}:{number}"
            if given.only in name:
                yield name


if __name__ == "__main__":
    main()
