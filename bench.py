"""
How fast the project is here, as numbers and as fractions of what the machine could do; and, by arithmetic,
what a run on other machines would take.
"""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import train
from kqv.errors import UsageError
from kqv.measuring.generation import bench_sample
from kqv.measuring.gpu import BenchGPUSettings, bench_gpu
from kqv.measuring.plan import BenchPlanSettings, bench_plan
from kqv.measuring.training import BenchTrainSettings, bench_train
from kqv.settings import parse


def main(argv):
    what, *arguments = argv or [""]
    if what == "train":
        bench_train(parse(BenchTrainSettings, arguments), train)
    elif what == "sample":
        bench_sample(arguments)
    elif what == "plan":
        bench_plan(parse(BenchPlanSettings, arguments))
    elif what == "gpu":
        bench_gpu(parse(BenchGPUSettings, arguments), train)
    elif what in ("--help", "-h"):
        print("usage: python bench.py train|sample|plan|gpu [config.py ...] [--name=value ...]\n")
        print("Measure training or sampling here, plan a run on other machines by arithmetic, or check and")
        print("measure a GPU. python bench.py train --help lists its settings; so do sample, plan and gpu.")
    else:
        wrong = f"{what} is nothing to measure" if what else "name what to measure"
        raise UsageError(f"{wrong}: python bench.py train, sample, plan or gpu (--help lists the settings)")
