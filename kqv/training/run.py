"""A run under way: its model, state and data, and what is due at its step."""

import time
from dataclasses import dataclass

import torch

from kqv.settings import setting
from kqv.training.batches import micro_batches
from kqv.training.evaluation import evaluate, write_sample
from kqv.training.optimizer import limit_bad_steps
from kqv.training.saver import Saver
from kqv.training.sharding import is_sharded
from kqv.training.state import snapshot


@dataclass(frozen=True)
class SaveSettings:
    """Checkpoints"""

    checkpoint_interval: int = setting(0, "steps between saves, besides evaluations; 0: none", at_least=0)
    checkpoint_minutes: float = setting(10.0, "minutes between saves; 0: none", at_least=0.0)
    always_save_checkpoint: bool = setting(True, "False: evaluations save only the best so far")


class TrainingRun:
    """
    A run, with what the loop of train.py asks of it. All methods are called in every process, and give the
    same answers there.

    `model` gives the loss, `parallel_model` is its form whose backward pass averages gradients over the
    processes, and `state` holds the GPT itself and all else that training changes.
    """

    def __init__(self, config, world, data, model, parallel_model, state, autocast, log, wandb_run=None):
        self.config, self.world, self.data = config, world, data
        self.model, self.parallel_model, self.state = model, parallel_model, state
        self.autocast, self.log = autocast, log
        self.wandb_id = wandb_run.id if wandb_run else None
        self.saver = None if config.eval_only else make_saver(config, world, is_sharded(model))
        self.saved_at, self.saved_when = state.step, time.monotonic()
        self.best_at = None  # the step of the best evaluation, if it was in this process
        self.save_is_overdue = False

    @property
    def finished(self):
        return self.state.step >= self.config.max_iters

    def agree_to_stop(self, stop):
        """Whether any process has received a signal to stop. The processes agree on timed saves here too."""
        minutes = (time.monotonic() - self.saved_when) / 60
        overdue = 0 < self.config.checkpoint_minutes <= minutes
        stopping, self.save_is_overdue = self.world.any(stop.received is not None, overdue)
        return stopping

    def evaluation_due(self):
        due = self.finished or self.state.step % self.config.eval_interval == 0
        return due and self.state.evaluated != self.state.step

    def evaluate(self):
        """Evaluate, and log the losses and, if asked for, a sample of the model's text."""
        config, step, sample = self.config, self.state.step, ""
        with self.log.pause():
            losses = evaluate(self.model, self.data, config, self.world, self.autocast)
            if config.sample_tokens:
                sample = write_sample(self.state.model, self.data, config, self.world)
        self.log.evaluation(step, losses, self.data.bits_per_byte("val", losses["val"]), sample)
        if self.state.note_evaluation(losses["val"]):
            self.best_at = step

    def save_due(self, stopping):
        config, step = self.config, self.state.step
        if step == 0 or step == self.saved_at and step != self.best_at:
            return False
        evaluated = step == self.state.evaluated and config.always_save_checkpoint
        interval = config.checkpoint_interval and step % config.checkpoint_interval == 0
        return bool(stopping or self.save_is_overdue or step == self.best_at or evaluated or interval)

    def save(self):
        """Begin to write ckpt.pt, and best.pt too if this is the step of the best evaluation."""
        step = self.state.step
        if self.saver:
            with self.log.pause():
                contents = snapshot(self.state, self.config, self.data.tokenizer, self.wandb_id)
                seconds = self.saver.save(contents, best=step == self.best_at)
            self.log.saved(step, seconds)
        self.saved_at, self.saved_when = step, time.monotonic()

    def batches(self):
        """This process's micro-batches of the step."""
        return micro_batches(self.data, self.config, self.world, self.state.step)

    def log_step(self, numbers, learning_rate):
        """
        Log what train_step returned, if the step is one to log: the only place where training waits for the
        device. Raises UserError after too many bad steps.
        """
        step = self.state.step
        if step % self.config.log_interval == 0:
            values = torch.stack([number.float() for number in numbers.values()])
            numbers = dict(zip(numbers, self.world.mean(values).tolist(), strict=True))
            numbers["bad_steps"] = round(numbers["bad_steps"])
            self.log.training(step, {**numbers, "lr": learning_rate})
            limit_bad_steps(numbers["bad_steps"], step, self.config)
        self.log.bar.update()

    def close(self, stopping, stop):
        """Wait for the last save, and print how the run ended."""
        if self.saver:
            self.saver.wait()
        self.log.close(self.state, stopping, stop.received)


def make_saver(config, world, sharded):
    """The Saver of this process; None where it has nothing to save."""
    is_new_run = config.init_from != "resume"
    if sharded:
        from kqv.training.sharded_saver import ShardedSaver  # slow import: only when sharding

        return ShardedSaver(config.out_dir, is_new_run, world)
    return Saver(config.out_dir, is_new_run) if world.is_main else None
