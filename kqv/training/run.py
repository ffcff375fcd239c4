"""A training run: its model, state and data, and what is due at its step."""

import itertools
import math
import time
from dataclasses import dataclass

import torch

from kqv import threads
from kqv.errors import UserError
from kqv.formats.checkpoint import BEST
from kqv.settings import setting
from kqv.training.batches import micro_batches, windows_per_step
from kqv.training.evaluation import evaluate, write_sample
from kqv.training.folder import OLD
from kqv.training.optimizer import limit_bad_steps
from kqv.training.saver import SAID, Saver
from kqv.training.state import snapshot


@dataclass(frozen=True)
class SaveSettings:
    """Checkpoints"""

    checkpoint_interval: int = setting(0, "steps between saves, besides evaluations; 0: none", at_least=0)
    checkpoint_minutes: float = setting(10.0, "minutes between saves; 0: none", at_least=0.0)
    always_save_checkpoint: bool = setting(True, "False: evaluations save only the best so far, and the last")


class TrainingRun:
    """
    A run, with what the loop of train.py asks of it. All methods are called in every process, and give the
    same answers there.

    `model` gives the loss, `parallel_model` is its form whose backward pass averages gradients over the
    processes, and `state` holds the GPT itself and all else that training changes.
    """

    def __init__(self, config, world, data, model, parallel_model, state, autocast, log, saver, wandb_id):
        self.config, self.world, self.data = config, world, data
        self.model, self.parallel_model, self.state = model, parallel_model, state
        self.autocast, self.log = autocast, log
        self.saver, self.wandb_id = saver, wandb_id
        # The step of this run's last save; another run's checkpoint in the folder does not count.
        self.saved_at = state.step if config.init_from == "resume" else None
        self.saved_when = time.monotonic()
        self.best_at = None  # the step of the best evaluation, if it was in this process
        self.is_spoilt = False  # whether the losses of the last evaluation were not finite
        self.save_is_overdue = self.save_is_late = False
        self.read_ahead = None  # the next step's micro-batches, once its first one is read

    @property
    def finished(self):
        return self.state.step >= self.config.max_iters

    def agree_to_stop(self, stop):
        """
        Whether any process has received a signal to stop. The processes agree here too on timed saves.
        """
        minutes = (time.monotonic() - self.saved_when) / 60
        overdue = 0 < self.config.checkpoint_minutes <= minutes
        stopping, self.save_is_overdue = self.world.any(stop.received is not None, overdue)
        return stopping

    def evaluation_due(self):
        due = self.finished or self.state.step % self.config.eval_interval == 0
        return due and self.state.evaluated != self.state.step

    def evaluate(self):
        """
        Evaluate, and log the losses and, if asked for, a sample of the model's text. Raises UserError where a
        run would end with losses that are not finite.
        """
        config, step, sample = self.config, self.state.step, ""
        self.limit_bad_steps()
        with self.log.pause():
            losses = evaluate(self.model, self.data, config, self.world, self.autocast)
            finite = [math.isfinite(loss) for loss in losses.values()]
            if config.sample_tokens and all(finite):  # else there is no text
                sample = write_sample(self.state.model, self.data, config, self.world)
        self.log.evaluation(step, losses, self.data.bits_per_byte("val", losses["val"]), sample)
        self.is_spoilt = not any(finite)
        if self.is_spoilt and self.finished or config.eval_only and not all(finite):
            raise UserError(
                f"the model's loss at step {step} is not finite, so it is not saved; what was saved before "
                f"stays: try --dtype=float32 or a --learning_rate below {config.learning_rate}"
            )
        if self.state.note_evaluation(losses["val"]):
            self.best_at = step

    def save_due(self, stopping):
        config, step, best = self.config, self.state.step, self.state.step == self.best_at
        if step == self.saved_at and not best or step == 0 and not self.finished:
            return False
        evaluated = step == self.state.evaluated and config.always_save_checkpoint
        interval = config.checkpoint_interval and step % config.checkpoint_interval == 0
        timed = self.save_is_overdue or self.save_is_late
        return bool(self.finished or stopping or timed or best or evaluated or interval)

    def save(self, stopping):
        """
        Begin to write ckpt.pt, and best.pt too if this is the step of the best evaluation. After a bad step,
        or where the loss is not finite, the weights may be spoilt. Then the last good checkpoint stays, and
        the save waits for a good step, unless the run ends here or the weights are its best.
        """
        step = self.state.step
        bad_steps = self.limit_bad_steps()
        spoilt = bad_steps > 0 or self.is_spoilt and step == self.state.evaluated
        self.save_is_late = spoilt and not (self.finished or stopping or step == self.best_at)
        if self.save_is_late:
            return
        if self.saver:
            with self.log.pause():
                contents = snapshot(self.state, self.config, self.data.tokenizer, self.wandb_id)
                seconds = self.saver.save(contents, best=step == self.best_at)
            self.log.saved(step, seconds)
            advice = [] if self.finished or stopping else threads.crowded(self.world.device)
            for line in advice:
                self.log.line(line)
        self.saved_at, self.saved_when = step, time.monotonic()

    def batches(self):
        """This process's micro-batches of the step."""
        found, self.read_ahead = self.read_ahead, None
        state = self.state
        return found or micro_batches(self.data, self.config, self.world, state.step, state.windows)

    def end_step(self, numbers, learning_rate):
        """
        Count the step, and log what train_step returned, if the step is one to log. Between evaluations and
        saves, only a step that is logged waits for the device, and the next one's first micro-batch is read
        before. Raises UserError after too many bad steps.
        """
        step = self.state.step
        self.state.note_step(windows_per_step(self.config))
        if step % self.config.log_interval == 0:
            values = torch.stack([number.float() for number in numbers.values()])
            values = self.world.mean(values)
            if not self.finished:
                batches = self.batches()
                self.read_ahead = itertools.chain(list(itertools.islice(batches, 1)), batches)
            numbers = dict(zip(numbers, values.tolist(), strict=True))
            numbers["bad_steps"] = round(numbers["bad_steps"])
            self.log.training(step, {**numbers, "lr": learning_rate})
            limit_bad_steps(numbers["bad_steps"], step, self.config)
        self.log.bar.update()

    def limit_bad_steps(self):
        """How many steps before this one were bad, in a row. Raises UserError where they are too many."""
        bad_steps = int(self.state.bad_steps)
        limit_bad_steps(bad_steps, self.state.step - 1, self.config)
        return bad_steps

    def close(self, stopping, stop):
        """
        Wait for the last save, and print how the run ended. Raises UserError, in every process, if its last
        state is not saved.
        """
        problem = None
        if self.saver:
            try:
                self.saver.require_saved(self.state.step)
            except UserError as error:
                problem = str(error)
        if problem := self.world.share(problem):
            raise UserError(problem)
        self.log.close(self.state, stopping, stop.received)


def make_saver(config, world, sharded, state, folder):
    """The Saver of this process for the OwnFolder; None where it has nothing to save."""
    if config.eval_only or not (sharded or world.is_main):
        return None
    resumed, older = config.init_from == "resume", tuple(OLD)
    if resumed:
        older = () if state.best_val_loss < math.inf else (BEST,)
    arguments = (config.out_dir, older, state.step if resumed else None, folder)
    if sharded:
        from kqv.training.sharded_saver import ShardedSaver  # slow import: only when sharding

        saver = ShardedSaver(world, *arguments)
    else:
        saver = Saver(*arguments)
    saver.held = {name: getattr(state, name) for name in SAID}
    return saver
