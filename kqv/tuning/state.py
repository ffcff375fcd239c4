"""What changes while a model is tuned by rewards, and when that should end."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kqv.training.state import TrainingState

PATIENCE = 20  # steps


@dataclass
class TuningState(TrainingState):
    """
    A TrainingState whose steps are rounds of drawing and learning. Its `best_val_loss` is minus the highest
    mean reward on held-out prompts.
    """

    start: dict = field(default_factory=dict)  # see kqv/tuning/start.py
    rewards: list = field(default_factory=list)  # mean reward of each step
    dead: list = field(default_factory=list)  # of each step: whether no group had completions that differ

    def note_rewards(self, rewards, dead):
        """Keep the rewards of a step."""
        self.rewards.append(float(np.mean(rewards)))
        self.dead.append(bool(dead))

    @property
    def why_ended(self):
        """Why there is nothing to gain by more steps, as a line; "": there may be."""
        if len(self.rewards) < PATIENCE:
            return ""
        last, first, best = self.rewards[-PATIENCE:], self.rewards[:PATIENCE], max(self.rewards)
        if all(self.dead[-PATIENCE:]):
            return (
                f"nothing to learn for {PATIENCE} steps: all completions of a prompt have the same reward, "
                f"{last[-1]:.4g} on average; harder prompts, a finer reward or a higher --temperature helps"
            )
        # Half of a negative number is above it: then the least is what the run began with.
        least = best / 2 if min(self.rewards) >= 0 else float(np.mean(first))
        if len(self.rewards) > PATIENCE and max(last) < least:
            return (
                f"the mean reward has been below {least:.4g} for {PATIENCE} steps, and its best was "
                f"{best:.4g}: best.pt is the model to keep; a lower --learning_rate may help"
            )
        return ""

    def state_dict(self):
        start = {"start": self.start} if self.start else {}  # an adapter's is its base
        history = {"rewards": self.rewards, "dead": self.dead}
        return {**super().state_dict(), **start, "history": history}

    def load_state_dict(self, saved):
        super().load_state_dict(saved)
        history = saved.get("history", {"rewards": [], "dead": []})
        if not len(history["rewards"]) == len(history["dead"]) == self.step:
            raise ValueError(f"its history is not of {self.step} steps")
        self.rewards, self.dead = list(history["rewards"]), list(history["dead"])


def belongs_to(data, config):
    """What the best reward of a run belongs to: prompts, how they are completed, and the user's function."""
    function = hashlib.sha256(Path(config.reward).read_bytes()).hexdigest()[:16]
    drawn = ("eval_prompts", "prompt_tokens", "num_samples", "max_new_tokens", "temperature", "seed")
    what = ", ".join(f"{name} {getattr(config, name)}" for name in drawn) + f", reward {function}"
    return {"best_val_loss": f"{data.fingerprint(['val'])}, {what}"}
