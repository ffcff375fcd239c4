"""What changes during training, and its form in a checkpoint."""

import math
from dataclasses import asdict, dataclass

import torch

from kqv.errors import UserError
from kqv.formats import checkpoint
from kqv.training.optimizer import load_optimizer, make_optimizer
from model import GPT


@dataclass
class TrainingState:
    """Everything that changes during training, saved and loaded whole."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    bad_steps: torch.Tensor  # skipped in a row, counted on the device
    step: int = 0  # steps done
    evaluated: int = -1  # the step of the last evaluation
    best_val_loss: float = math.inf

    def note_evaluation(self, val_loss):
        """Keep the result of an evaluation at this step. Returns whether it is the best; NaN never is."""
        self.evaluated = self.step
        if is_best := val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
        return is_best

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
            "iter_num": self.step,
            "evaluated": self.evaluated,
            "best_val_loss": self.best_val_loss,
        }

    def load_state_dict(self, saved):
        """All but the weights, which the model was built with. Raises ValueError where it does not fit."""
        load_optimizer(self.optimizer, saved)
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.bad_steps += saved.get("bad_steps", 0)
        self.step = int(saved["iter_num"])
        self.evaluated = int(saved.get("evaluated", -1))
        self.best_val_loss = float(saved["best_val_loss"])


def start_state(config, gpt, start_checkpoint, dtype):
    """
    The state before the run's first step: new, or on resume as `start_checkpoint`, a checkpoint's contents,
    has it. Raises UserError where that does not fit the model.
    """
    device = gpt.lm_head.weight.device
    state = TrainingState(
        model=gpt,
        optimizer=make_optimizer(gpt, config),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        bad_steps=torch.zeros((), dtype=torch.int64, device=device),
    )
    if config.init_from == "resume":
        try:
            state.load_state_dict(start_checkpoint)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"{config.out_dir}/{checkpoint.NEWEST} can't be resumed: {error!r}") from None
    return state


def snapshot(state, config, tokenizer, wandb_id=None):
    """A checkpoint's contents: all that training, sampling and exporting need."""
    return {
        **state.state_dict(),
        "model_args": asdict(state.model.config),
        "config": asdict(config),
        "tokenizer": tokenizer.to_json(),
        "wandb_id": wandb_id,
    }
