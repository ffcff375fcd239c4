"""The numbers of training runs, from their metrics.jsonl: for the page, or as a picture."""

import json
import math
from pathlib import Path

from kqv.errors import UserError
from kqv.files import replacing
from kqv.training.folder import METRICS

MOST_POINTS = 1000  # of a curve


def curves(folder):
    """
    A run's folder -> {name of a number: [[step, value], ...]}, of what its metrics.jsonl has. Of a long curve
    every n-th point is kept, and the last. Raises UserError.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): give the folder of a run, its --out_dir"
        ) from None
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue  # torn when the run was killed
        for name, value in record.items():
            if name != "step" and type(value) in (int, float) and math.isfinite(value):
                found.setdefault(name, []).append([step, value])
    if not found:
        raise UserError(f"{path} has no numbers: the run has not logged a step yet")
    return {name: thinned(points) for name, points in found.items()}


def thinned(points):
    stride = -(-len(points) // MOST_POINTS)
    kept = points[::stride]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def runs_of(folders):
    """[{"name", "curves"}] of the folders of runs."""
    return [{"name": str(folder), "curves": curves(folder)} for folder in folders]


def draw_png(runs, path):
    """
    The losses of the runs as a picture, or the rewards where all were tuned by rewards. Raises UserError
    where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    of_rewards = all("val_reward" in run["curves"] for run in runs)
    numbers = ("reward", "val_reward") if of_rewards else ("loss", "val_loss")
    for run in runs:
        for name, style in zip(numbers, (":", "-"), strict=True):
            if name in run["curves"]:
                steps, values = zip(*run["curves"][name], strict=True)
                axes.plot(steps, values, style, label=f"{run['name']}: {name}")
    axes.set(xlabel="step", ylabel="mean reward" if of_rewards else "loss (nats a token)")
    axes.legend()
    with replacing(Path(path)) as beside:
        figure.savefig(beside, format="png", dpi=150)
