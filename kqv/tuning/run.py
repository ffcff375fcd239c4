"""A tuning run: its model, state and prompts, and one round of drawing, rewarding and learning."""

import time

import numpy as np
import torch

from kqv.generation.engine import Engine
from kqv.training.optimizer import limit_bad_steps
from kqv.training.run import TrainingRun
from kqv.training.step import train_step
from kqv.tuning.evaluation import evaluate_prompts
from kqv.tuning.rewards import advantages, differ, highest, score
from kqv.tuning.rollouts import micro_batches, rows_of, sample


class TuningRun(TrainingRun):
    """
    A run of tune.py, whose steps are rounds. `reward` is the user's function, `start` the model that it began
    with, a Start, and `prompts` what `prompts_of` gives.
    """

    def __init__(self, *arguments, reward, start, prompts):
        super().__init__(*arguments)
        self.reward, self.start = reward, start
        self.prompts, self.held_out = prompts
        self.tokenizer, self.device = self.data.tokenizer, self.world.device
        self.engine = Engine(self.state.model)

    @property
    def finished(self):
        return super().finished or bool(self.state.why_ended)

    def save_due(self, stopping):
        """As TrainingRun's. What the run began with is saved too: it may stay the best."""
        is_start = self.state.step == self.best_at == 0 and self.saved_at is None
        return is_start or super().save_due(stopping)

    def evaluate(self):
        """Evaluate on the held-out prompts, and log it."""
        with self.log.pause():
            numbers, some = evaluate_prompts(self)
        samples = [f"{rollout.prompt.text}|{rollout.text}" for rollout in some]
        self.log.evaluation(self.state.step, numbers, samples)
        if self.state.note_evaluation(-numbers["val_reward"]):
            self.best_at = self.state.step

    def round(self, count):
        """
        Draw completions of `count` prompts of the step, and reward them -> (Rollouts, rewards (G, n),
        seconds). The completions of one prompt are a group.
        """
        began, config = time.perf_counter(), self.config
        prompts = self.prompts.of_step(count, config.seed, self.state.step)
        rollouts = sample(self.engine, self.tokenizer, prompts, config.num_samples, config, self.state.step)
        rewards = score(self.reward, rollouts, config.reward).reshape(len(prompts), -1)
        return rollouts, rewards, time.perf_counter() - began

    def learn(self, rollouts, rewards):
        """Update the weights by the method -> what train_step returns of the last update; {}: no update."""
        if self.config.method == "grpo":
            return self.policy_gradient_step(rollouts, advantages(rewards).ravel())
        return self.supervised_steps(rollouts, np.flatnonzero(highest(rewards)))

    def policy_gradient_step(self, rollouts, advantages):
        """
        One update by the policy gradient. It is divided by the number of tokens that could have been drawn,
        also where groups have nothing to learn: so those that have do not count more.
        """
        config = self.config
        if not advantages.any():
            return {}
        scale = 1 / (len(rollouts) * config.max_new_tokens)
        # A completion without an advantage counts for the divergence alone.
        places = np.flatnonzero(advantages) if not config.kl_weight else np.arange(len(rollouts))
        batches = []
        for part in micro_batches(rollouts, places, config.batch_size):
            of_part = torch.tensor(advantages[part], dtype=torch.float32, device=self.device)
            batches.append(((*rows_of(rollouts, part, self.device), of_part, scale), 1))
        return self.update(batches, share=1)

    def supervised_steps(self, rollouts, places):
        """A few updates on the rollouts at these places, each of which is learnt from once."""
        config, numbers = self.config, {}
        places = np.random.default_rng((config.seed, self.state.step)).permutation(places)
        for some in filter(len, np.array_split(places, config.updates)):
            parts = micro_batches(rollouts, some, config.batch_size)
            tokens = [sum(len(rollouts[place].ids) for place in part) for part in parts]
            weights = [count * len(parts) / sum(tokens) for count in tokens]
            rows = [rows_of(rollouts, part, self.device) for part in parts]
            numbers = self.update(list(zip(rows, weights, strict=True)), share=len(parts))
        return numbers

    def update(self, batches, share):
        """One optimizer step over micro-batches: (the model's arguments, weight)."""
        seeds = np.random.default_rng((self.config.seed, self.state.step, 1)).integers(
            2**63, size=len(batches)
        )
        batches = [(*batch, int(seed)) for batch, seed in zip(batches, seeds, strict=True)]
        return train_step(
            self.parallel_model, self.state, batches, self.config, self.world, self.autocast, share
        )

    def end_step(self, rollouts, rewards, numbers, learning_rate, seconds):
        """
        Count the step and log it. `seconds`: (of drawing and rewarding, of updating). Raises UserError after
        too many bad steps.
        """
        step = self.state.step
        self.state.note_step(0)
        dead = 1 - differ(rewards).mean()
        self.state.note_rewards(rewards, dead=dead == 1)
        drawn = np.concatenate([rollout.logprobs for rollout in rollouts])
        if step % self.config.log_interval == 0:
            numbers = {name: float(number) for name, number in numbers.items()}
            bad_steps = round(numbers.pop("bad_steps", 0))
            self.log.training(
                step,
                {
                    "reward": rewards.mean(),
                    "dead_groups": dead,
                    "entropy": -drawn.mean(),  # in nats a token, by the ids that were drawn
                    "length": len(drawn) / len(rollouts),
                    **numbers,
                    "lr": learning_rate,
                    "sampling_seconds": seconds[0],
                    "updating_seconds": seconds[1],
                },
            )
            limit_bad_steps(bad_steps, step, self.config)
        self.log.bar.update()

    def close(self, stopping, stop):
        if (why := self.state.why_ended) and not stopping:
            self.log.line(why)
        super().close(stopping, stop)
