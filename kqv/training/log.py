"""What a run says, on the terminal and in its metrics."""

import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from kqv.device import peak_flops
from kqv.errors import UserError
from kqv.settings import override, setting
from kqv.training.batches import tokens_per_step
from kqv.training.metrics import Metrics, start_wandb


@dataclass(frozen=True)
class LogSettings:
    """Evaluation, checkpoints and logs"""

    eval_interval: int = setting(2000, "steps between evaluations", at_least=1)
    eval_iters: int = setting(200, "most batches for a split; a small one is read once", at_least=1)
    log_interval: int = setting(1, "steps between log lines", at_least=1)
    checkpoint_interval: int = setting(0, "steps between saves, besides evaluations; 0: none", at_least=0)
    checkpoint_minutes: float = setting(10.0, "minutes between saves; 0: none", at_least=0.0)
    always_save_checkpoint: bool = setting(True, "False: evaluations save only the best so far")
    wandb_log: bool = setting(False, "log to Weights & Biases too (WANDB_MODE=offline needs no network)")
    wandb_project: str = setting("owt", "wandb's project")
    wandb_run_name: str = setting("gpt2", "wandb's name of the run")
    wandb_resume: bool = setting(True, "a resumed run goes on in the wandb run that it was")
    tensorboard_log: bool = setting(False, "write TensorBoard's event files too, to out_dir/tensorboard")
    sample_tokens: int = setting(0, "tokens of a text written at each evaluation; 0: none", at_least=0)


NOT_RESUMED = ("out_dir", "init_from", "eval_only")  # where a run is and what it is to do, not what it is


def start_tracking(config, source, world):
    """(the settings, in a sweep with the values that it tries, wandb's run or None)."""
    wandb_run, tried = None, {}
    if config.wandb_log and world.is_main:
        resumed = source if config.init_from == "resume" and config.wandb_resume else {}
        wandb_run = start_wandb(
            config.wandb_project, config.wandb_run_name, asdict(config), resumed.get("wandb_id")
        )
    if wandb_run and wandb_run.sweep_id:
        tried = {name: value for name, value in dict(wandb_run.config).items() if name in asdict(config)}
    return override(config, world.share(tried), "the sweep's "), wandb_run


class Log:
    """What a run says: on the terminal, and where its numbers go. All but the main process are silent."""

    def __init__(self, config, world, state, dtype, wandb_run):
        self.config, self.is_main = config, world.is_main
        self.metrics = None
        flops = (
            peak_flops(torch.cuda.get_device_name(world.device), dtype)
            if world.device.type == "cuda"
            else None
        )
        self.mfu_per_token = state.model.flops_per_token() / (flops * world.size) if flops else None
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
                state.evaluated,
                wandb_run,
                config.tensorboard_log,
            )
        self.started = self.clock = time.perf_counter()  # of the run, and of the steps since the last line
        self.last_step, self.paused = state.step - 1, 0.0

    def line(self, text):
        if self.is_main:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, step, values):
        if self.metrics:
            self.metrics.record(step, values)

    @contextmanager
    def pause(self):
        """Time in here (evaluation, saving) is not training time."""
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before
        self.clock += time.perf_counter() - before

    def changes(self, source):
        """Say which settings a resumed run has that its checkpoint had not."""
        before = source.get("config", {}) if source and self.config.init_from == "resume" else {}
        now = asdict(self.config)
        changed = [
            name for name in now if name in before and name not in NOT_RESUMED and before[name] != now[name]
        ]
        if changed:
            self.line("changed: " + ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed))

    def evaluation(self, step, losses, data, sample=""):
        numbers = {f"{split}_loss": loss for split, loss in losses.items()}
        text = f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        if bits := data.bits_per_byte("val", losses["val"]):
            numbers["val_bits_per_byte"] = bits
            text += f" = {bits:.3f} bits per byte"
        self.line(text)
        if sample:
            self.line(sample)
            numbers["sample"] = sample
        self.record(step, numbers)

    def saved(self, step, seconds):
        self.record(step, {"save_stall_ms": 1000 * seconds})

    def training(self, state, loss, grad_norm, learning_rate):
        """
        Log a step; the only place where training waits for the device. Raises UserError after too many bad
        steps.
        """
        loss, grad_norm, bad_steps = loss.item(), grad_norm.item(), int(state.bad_steps)
        tokens = (state.step - self.last_step) * tokens_per_step(self.config)
        tokens_per_second = tokens / (time.perf_counter() - self.clock)
        numbers = {
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
        }
        text = f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second / 1e3:.1f}k tokens/s"
        if self.mfu_per_token:
            numbers["mfu"] = tokens_per_second * self.mfu_per_token
            text += f", MFU {numbers['mfu']:.1%}"
        if bad_steps:
            numbers["bad_steps"] = bad_steps
            text += f", {bad_steps} steps skipped"
        self.record(state.step, numbers)
        if self.bar.disable:
            self.line(f"step {state.step}: {text}")
        else:
            self.bar.set_postfix_str(text, refresh=False)
        self.clock, self.last_step = time.perf_counter(), state.step
        if bad_steps >= self.config.max_bad_steps:
            self.bar.close()
            raise UserError(
                f"{bad_steps} steps in a row up to step {state.step} had a gradient that is not finite: try "
                f"--dtype=float32 or a --learning_rate below {self.config.learning_rate}; ckpt.pt stays"
            )

    def close(self, state, stopping, received):
        self.bar.close()
        seconds, out_dir = time.perf_counter() - self.started, self.config.out_dir
        who = received.name if received else "a signal to another process"
        how = f"stopped by {who}" if stopping else "done"
        self.line(
            f"{how}: step {state.step} after {seconds:.1f} s "
            f"({self.paused:.1f} s of it evaluation and saving), best val loss {state.best_val_loss:.4f}"
        )
        if stopping and state.step:
            self.line(f"to go on: python train.py --init_from=resume --out_dir={out_dir}")
        elif not stopping:
            self.line(f"to see what it writes: python sample.py --out_dir={out_dir}")
        if self.metrics:
            self.metrics.close()
