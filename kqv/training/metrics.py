"""
Where a run's numbers go: to metrics.jsonl in its folder; if asked for, to Weights & Biases and TensorBoard.
"""

import html
import json
import math
import os
from pathlib import Path

from kqv.errors import UserError, first_line, warn


class Metrics:
    """A run's numbers and sample texts, in all the places where they go."""

    def __init__(self, out_dir, step, evaluated, wandb_run=None, tensorboard=False):
        """
        Go on from `step`: what an earlier run in `out_dir` wrote of later steps is removed. `evaluated` is
        the step of the last evaluation. Without `out_dir` no file is written.
        """
        self.wandb = wandb_run
        self.file = open_file(Path(out_dir), step, evaluated) if out_dir else None
        self.tensorboard = start_tensorboard(out_dir, step) if tensorboard and out_dir else None

    def record(self, kind, step, values):
        """Write {name: number or text} of a step; `kind` is "train", "evaluation" or "save"."""
        if self.file:
            plain = {name: None if is_infinite(value) else value for name, value in values.items()}
            try:
                self.file.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
                self.file.flush()
            except OSError as error:
                warn(f"{self.file.name} can't be written ({error.strerror}): training goes on without it")
                self.file = None
        if self.wandb and step >= self.wandb.step:  # a resumed run repeats steps that wandb has
            self.wandb.log({name: as_html(value) for name, value in values.items()}, step=step)
        if self.tensorboard:
            for name, value in values.items():
                add = self.tensorboard.add_text if isinstance(value, str) else self.tensorboard.add_scalar
                add(name, value, step)

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def is_infinite(value):
    """Whether a value is a number that JSON has no form for: NaN or infinite."""
    return isinstance(value, float) and not math.isfinite(value)


def as_html(value):
    """A text as wandb shows it as it is; a number unchanged."""
    if not isinstance(value, str):
        return value
    import wandb

    return wandb.Html(f"<pre>{html.escape(value)}</pre>", inject=False)


def open_file(out_dir, step, evaluated):
    """
    Open metrics.jsonl, and remove the lines that an earlier run wrote after the checkpoint at `step`. Raises
    UserError where the folder can't be made.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} can't be made ({error.strerror}): give another --out_dir") from None
    path = out_dir / "metrics.jsonl"
    old = path.read_text("utf-8", errors="replace") if step and path.exists() else ""
    kept = []
    for line in old.splitlines(keepends=True):
        try:
            record = json.loads(line)
            at, kind = record["step"], kind_of(record)
        except (ValueError, TypeError, KeyError):
            break  # torn when the run was killed
        before_save = kind == "evaluation" and at == evaluated or kind == "save"
        if at < step or at == step and before_save:
            kept.append(line)
    beside = path.with_name(".metrics.jsonl.new")
    beside.write_text("".join(kept), "utf-8")
    os.replace(beside, path)
    return open(path, "a", encoding="utf-8")


def kind_of(record):
    """A record's kind; files of older versions do not name it."""
    older = "evaluation" if "val_loss" in record else "save" if "save_stall_ms" in record else "train"
    return record.get("kind", older)


def start_wandb(project, name, settings, run_id=None):
    """
    Start wandb's run, or go on with the one of that id. Returns None, with a warning, where wandb's server is
    out of reach. Raises UserError where wandb is not installed or not set up.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log=True needs: pip install wandb") from None
    try:
        return wandb.init(project=project, name=name, config=settings, id=run_id, resume=run_id and "allow")
    except wandb.errors.CommError as error:
        warn(f"wandb is out of reach, so this run does not log to it ({' '.join(str(error).split())[:150]})")
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"wandb can't start ({reason}): WANDB_MODE=offline logs without a network") from None


def start_tensorboard(out_dir, step):
    """
    A writer of TensorBoard's event files. What an earlier run wrote of steps after `step` is hidden. Raises
    UserError where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"tensorboard_log=True needs: pip install tensorboard ({first_line(error)})"
        ) from None
    return SummaryWriter(Path(out_dir) / "tensorboard", purge_step=step and step + 1)
