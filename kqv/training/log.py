"""What a run prints on the terminal and records in its metrics."""

import math
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from kqv import errors
from kqv.device import peak_flops
from kqv.formats import lora
from kqv.settings import override, setting
from kqv.training.batches import tokens_per_step
from kqv.training.metrics import Metrics, start_wandb


@dataclass(frozen=True)
class LogSettings:
    """Logs"""

    log_interval: int = setting(1, "steps between log lines", at_least=1)
    wandb_log: bool = setting(False, "log to Weights & Biases too (WANDB_MODE=offline needs no network)")
    wandb_project: str = setting("owt", "wandb's project")
    wandb_run_name: str = setting("gpt2", "wandb's name of the run")
    wandb_resume: bool = setting(True, "a resumed run goes on in the wandb run that it was")
    tensorboard_log: bool = setting(False, "write TensorBoard's event files too, to out_dir/tensorboard")


def start_tracking(config, start_checkpoint, world):
    """
    (settings, wandb's run or None). In a wandb sweep the settings have the values that the sweep tries, in
    every process.
    """
    wandb_run, tried = None, {}
    if config.wandb_log and world.is_main:
        resumed = start_checkpoint if config.init_from == "resume" and config.wandb_resume else {}
        wandb_run = start_wandb(
            config.wandb_project, config.wandb_run_name, asdict(config), resumed.get("wandb_id")
        )
    if wandb_run and wandb_run.sweep_id:
        known, found = asdict(config), dict(wandb_run.config)  # with None for what was not given
        tried = {name: found[name] for name in known.keys() & found if found[name] is not None}
    return override(config, world.share(tried), "the sweep's "), wandb_run


class Log:
    """
    What a run prints, and the numbers that it records. In all processes but the main one it does nothing.
    """

    command = "train.py"  # that goes on with the run

    def __init__(self, config, world, state, evaluated, dtype, wandb_run):
        self.config, self.is_main = config, world.is_main
        self.metrics = None
        self.is_noted = False  # whether the metrics say that standard output can't be written
        self.mfu_per_token = mfu_per_token(state.model, dtype, world)
        on_terminal = self.is_main and sys.stderr.isatty() and not config.eval_only
        self.bar = tqdm(
            total=config.max_iters,
            initial=state.step,
            disable=not on_terminal,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt}, {remaining} left{postfix}",
            smoothing=0.05,
        )
        if self.is_main:
            self.metrics = Metrics(
                None if config.eval_only else config.out_dir,
                state.step,
                evaluated,
                config.init_from == "resume",
                wandb_run,
                config.tensorboard_log,
            )
        self.started = time.perf_counter()
        self.paused = 0.0  # seconds of evaluation and saving
        self.last_time, self.last_step = self.started, state.step - 1  # at the last record of training

    def line(self, text, show=errors.say):
        """Print a message, or a text that is shown in another way."""
        if self.is_main:
            with self.bar.external_write_mode(file=sys.stdout):
                show(text)
            lost = getattr(sys.stdout, "lost", None)
            if lost and self.metrics and not self.is_noted:
                text = (
                    f"standard output can't be written ({errors.reason_of(lost)}): the run goes on without it"
                )
                self.is_noted = self.metrics.note(max(0, self.last_step), text)

    def record(self, kind, step, values):
        if self.metrics:
            self.metrics.record(kind, step, values)

    @contextmanager
    def pause(self):
        """A context for evaluation and saving, whose time is not training time."""
        before = time.perf_counter()
        yield
        seconds = time.perf_counter() - before
        self.paused += seconds
        self.last_time += seconds

    def start(self, state, config, world, how, lines):
        """The first line: what is trained, and `how`. Then `lines`, what else a user should know."""
        size, work = lora.parameters_in_words(state.model), self.work_of_step(config)
        self.line(f"{size}, {work}, {world}, {', '.join(how)}")
        for line in lines:
            self.line(line)

    def work_of_step(self, config):
        """What a step is, in words."""
        return f"{tokens_per_step(config):,} tokens a step"

    def training(self, step, numbers):
        """
        Log a step's numbers: `loss`, `lr`, `grad_norm`, `bad_steps` (skipped in a row) and whatever else
        train_step returns. Adds the speed since the last call.
        """
        tokens = (step - self.last_step) * tokens_per_step(self.config)
        now = time.perf_counter()
        tokens_per_second = tokens / (now - self.last_time)
        self.last_time, self.last_step = now, step
        numbers = {**numbers, "tokens_per_second": tokens_per_second}
        text = "loss {loss:.4f}, lr {lr:.2e}".format_map(numbers)
        text += f", {tokens_per_second / 1e3:.1f}k tokens/s"
        if self.mfu_per_token:
            numbers["mfu"] = tokens_per_second * self.mfu_per_token
            text += f", MFU {numbers['mfu']:.1%}"
        if numbers["bad_steps"]:
            text += f", {numbers['bad_steps']} steps skipped"
        else:
            del numbers["bad_steps"]
        self.record("train", step, numbers)
        if self.bar.disable:
            self.line(f"step {step}: {text}")
        else:
            self.bar.set_postfix_str(text, refresh=False)

    def evaluation(self, step, losses, bits_per_byte=None, sample=""):
        """Log {split: loss}, the validation loss in bits per byte if known, and a sample if there is one."""
        numbers = {f"{split}_loss": loss for split, loss in losses.items()}
        text = f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        if bits_per_byte:
            numbers["val_bits_per_byte"] = bits_per_byte
            text += f" = {bits_per_byte:.3f} bits per byte"
        self.line(text)
        if sample:
            self.line(sample, show=errors.print_text)
            numbers["sample"] = sample
        self.record("evaluation", step, numbers)

    def saved(self, step, seconds):
        """Log a save, for which training waited so many seconds."""
        if self.metrics:
            self.metrics.keep_file()
        self.record("save", step, {"save_stall_ms": 1000 * seconds})

    def best(self, val_loss):
        """The lowest validation loss in words."""
        return f"best val loss {val_loss:.4f}"

    def close(self, state, stopping, received):
        """
        Print the last lines. Where the run is `stopping`, a signal has stopped it: `received`, or None where
        another process received it.
        """
        self.bar.close()
        seconds, out_dir = time.perf_counter() - self.started, shlex.quote(self.config.out_dir)
        who = received.name if received else "a signal to another process"
        how = f"stopped by {who}" if stopping else "done"
        best = f", {self.best(state.best_val_loss)}" if math.isfinite(state.best_val_loss) else ""
        self.line(
            f"{how}: step {state.step} after {seconds:.1f} s "
            f"({self.paused:.1f} s of it evaluation and saving){best}"
        )
        if stopping and state.step:
            self.line(f"to go on: python {self.command} --init_from=resume --out_dir={out_dir}")
        elif not stopping:
            self.line(f"to see what it writes: python sample.py --out_dir={out_dir}")
        if self.metrics:
            self.metrics.close()


def mfu_per_token(gpt, dtype, world):
    """
    The model-FLOPs utilisation (PaLM, Chowdhery et al. 2022) of one token a second; None where the peak of
    the device is not known.
    """
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device), dtype)
    return lora.flops_per_token(gpt) / (peak * world.size) if peak else None
