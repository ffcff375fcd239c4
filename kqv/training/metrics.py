"""
Where a run's numbers go: to metrics.jsonl in its folder; if asked for, to Weights & Biases and TensorBoard.
"""

import html
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from kqv.errors import UserError, first_line, warn
from kqv.files import replacing
from kqv.printable import printable
from kqv.training.folder import METRICS, OLDER_METRICS


class Metrics:
    """A run's numbers and sample texts, in all the places where they go."""

    def __init__(self, out_dir, step, evaluated, resumed, wandb_run=None, tensorboard=False):
        """
        Go on from `step`: what a run that is `resumed` wrote of later steps is removed. `evaluated` is the
        step of its last evaluation. Without `out_dir` no file is written.
        """
        self.wandb = wandb_run
        self.file = open_file(Path(out_dir), step, evaluated, resumed) if out_dir else None
        self.tensorboard = start_tensorboard(out_dir, step) if tensorboard and out_dir else None
        self.lost = 0  # records that could not be written to the file

    def record(self, kind, step, values):
        """Write {name: number or text} of a step; `kind` is "train", "evaluation" or "save"."""
        if self.file:
            self.write(kind, step, values)
        if self.wandb and step >= self.wandb.step:  # a resumed run repeats steps that wandb has
            with self.losing("wandb"):
                self.wandb.log({name: as_html(value) for name, value in values.items()}, step=step)
        if self.tensorboard:
            with self.losing("tensorboard"):
                for name, value in values.items():
                    is_text = isinstance(value, str)
                    add = self.tensorboard.add_text if is_text else self.tensorboard.add_scalar
                    add(name, value, step)

    def note(self, step, text):
        """Write to the file what a reader of the numbers should know. Returns whether that was possible."""
        if self.file:
            self.write("note", step, {"note": text})
        return not self.lost

    def write(self, kind, step, values):
        """
        Append a record to the file, whole or not at all. While that is not possible, records are lost; the
        next one comes after a note that says how many.
        """
        plain = {name: None if is_infinite(value) else value for name, value in values.items()}
        records = [{"kind": kind, "step": step, **plain}]
        if self.lost:
            lost = f"{self.lost} records could not be written"
            records.insert(0, {"kind": "note", "step": step, "note": lost})
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        end = self.file.seek(0, os.SEEK_END)
        try:
            while content:  # a part of it may be all that there is room for
                content = content[self.file.write(content) :]
            self.lost = 0
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(end)  # no half of a line
            if not self.lost:
                warn(f"{self.file.name} can't be written ({error.strerror}): training goes on without it")
            self.lost += 1

    def keep_file(self):
        """Write the file anew where somebody has removed it: what it had is still in the open one."""
        if not self.file or (path := Path(self.file.name)).exists():
            return
        try:
            self.file.seek(0)
            content = self.file.read()
            file = open(path, "a+b", buffering=0)
        except OSError:  # the folder is not there either, until the next save makes it
            return
        self.file.close()
        self.file = file
        file.write(content)

    @contextmanager
    def losing(self, name):
        """A context in which an error of "wandb" or "tensorboard" ends the use of it, not the run."""
        try:
            yield
        except Exception as error:  # each library has errors of its own
            warn(f"{name} failed ({first_line(error)}): training goes on without it")
            setattr(self, name, None)

    def close(self):
        self.keep_file()
        if self.file:
            self.file.close()
        if self.wandb:
            with self.losing("wandb"):
                self.wandb.finish()
        if self.tensorboard:
            with self.losing("tensorboard"):
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


def open_file(out_dir, step, evaluated, resumed):
    """
    Open metrics.jsonl. A run that is `resumed` goes on in its own file, without the lines after its
    checkpoint at `step`. A new run renames an earlier run's file to metrics.prev.jsonl. It keeps that
    name until the new run replaces the checkpoints.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path, older = out_dir / METRICS, out_dir / OLDER_METRICS
    for there in (path, older):
        if there.exists() and not there.is_file():
            raise UserError(f"{there} is no file: a run writes its numbers there; rename or remove it")
    if resumed and older.exists():  # a new run began here, and ended before it saved
        os.replace(older, path)
    elif path.exists() and not resumed and not older.exists():
        os.replace(path, older)
    old = path.read_text("utf-8", errors="replace") if resumed and path.exists() else ""
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
    with replacing(path) as beside:
        beside.write_text("".join(kept), "utf-8")
    return open(path, "a+b", buffering=0)


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
    settings = {key: printable(value) if isinstance(value, str) else value for key, value in settings.items()}
    texts = {"project": printable(project), "name": printable(name)}
    try:
        return wandb.init(**texts, config=settings, id=run_id, resume=run_id and "allow")
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
