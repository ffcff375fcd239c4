"""What changes during training, and its form in a checkpoint."""

import math
from dataclasses import asdict, dataclass, field

import torch

from kqv.errors import UsageError, UserError, first_line
from kqv.formats import checkpoint
from kqv.formats.lora import contents_of
from kqv.forms import WHOLE, require_form
from kqv.training.optimizer import load_optimizer, make_optimizer
from model import GPT

# For older checkpoints, which do not say what these numbers belong to: the settings that decide it.
DECIDED_BY = {"windows": {"dataset", "data_order"}, "best_val_loss": {"dataset", "eval_iters", "batch_size"}}

FORM = {"iter_num": WHOLE, "best_val_loss": object}  # what kqv.formats.contents leaves open


@dataclass
class TrainingState:
    """Everything that changes during training, saved and loaded whole."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    bad_steps: torch.Tensor  # skipped in a row, counted on the device
    step: int = 0  # steps done
    windows: int = 0  # how many windows of the text these steps have read
    evaluated: int = -1  # the step of the last evaluation
    best_val_loss: float = math.inf
    best_step: int | None = -1  # at which that was measured; -1: no loss yet, None: an older file, not known
    teacher: str = ""  # the SHA-256 of the weights that the run learns from; "": it has no teacher
    # What `windows` and `best_val_loss` belong to, see the function `belongs_to`.
    belongs_to: dict = field(default_factory=dict)

    def note_step(self, windows):
        """Count a step that has read so many windows."""
        self.step += 1
        self.windows += windows

    def note_evaluation(self, val_loss):
        """Keep the result of an evaluation at this step. Returns whether it is the best; NaN never is."""
        self.evaluated = self.step
        if is_best := val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, self.step
        return is_best

    def begin_anew(self, belongs_to, changed=()):
        """
        Set `windows` to 0 where the run reads another text, and forget the best loss where evaluations
        measure something else than before. `belongs_to` says which text that is now; `changed` has the names
        of the settings that have changed: they decide for an older checkpoint, which does not say what its
        numbers belong to. Returns what it forgot.
        """
        before, self.belongs_to = self.belongs_to, belongs_to
        other = {
            name
            for name, now in belongs_to.items()
            if (before[name] != now if name in before else DECIDED_BY[name] & set(changed))
        }
        forgotten = {name: getattr(self, name) for name in other}
        if "windows" in other:
            self.windows = 0
        if "best_val_loss" in other:
            self.best_val_loss, self.best_step, self.evaluated = math.inf, -1, -1
        return forgotten

    def state_dict(self):
        return {
            **contents_of(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
            "iter_num": self.step,
            "windows": self.windows,
            "evaluated": self.evaluated,
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "teacher": self.teacher,
            "belongs_to": self.belongs_to,
        }

    def load_state_dict(self, saved):
        """All but the weights, which the model was built with. Raises ValueError where it does not fit."""
        require_form(saved, FORM if "folder" in saved else {**FORM, "optimizer": {"state": dict}})
        load_optimizer(self.optimizer, saved)
        if self.scaler.is_enabled() and saved.get("scaler"):
            load_scaler(self.scaler, saved["scaler"])
        self.bad_steps.fill_(int(saved.get("bad_steps", 0)))
        self.step = int(saved["iter_num"])
        self.windows = int(saved["windows"]) if "windows" in saved else self.step * windows_per_step_of(saved)
        self.evaluated = int(saved.get("evaluated", -1))
        self.best_val_loss = float(saved["best_val_loss"])
        step = saved.get("best_step")
        self.best_step = None if step is None else int(step)
        self.belongs_to = dict(saved.get("belongs_to", {}))


def load_scaler(scaler, saved):
    """
    Set what a GradScaler changes: its scale, and the count of steps since; its settings stay the run's own.
    Raises ValueError or TypeError where these are no numbers that can be.
    """
    scale, count = float(saved["scale"]), int(saved["_growth_tracker"])
    if not (0 < scale < math.inf and count >= 0):
        raise ValueError(f"its GradScaler has scale={scale} and _growth_tracker={count}")
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": count})


def windows_per_step_of(saved):
    """How many windows a step read in the run of an older checkpoint, which does not count them."""
    settings = saved.get("config", {})
    return settings.get("batch_size", 0) * settings.get("gradient_accumulation_steps", 0)


def belongs_to(data, config):
    """
    What the numbers of a state belong to: its `windows` to a text and the order in which it is read, its best
    loss to the windows that evaluations read.
    """
    batches = min(config.eval_iters, data.batches("val", config.batch_size, config.block_size))
    return {
        "windows": f"{data.fingerprint(['train'])}, {config.data_order}",
        "best_val_loss": f"{data.fingerprint(['val'])}, {batches * config.batch_size} windows",
    }


def start_state(config, gpt, start_checkpoint, dtype, world, kind=TrainingState):
    """
    The state, of a `kind`, before the run's first step: new, or on resume as `start_checkpoint`, a
    checkpoint's contents, has it. Raises UserError where that does not fit the model, and UsageError for
    another optimizer than its own.
    """
    device = gpt.lm_head.weight.device
    state = kind(
        model=gpt,
        optimizer=make_optimizer(gpt, config, world.spread),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        bad_steps=torch.zeros((), dtype=torch.int64, device=device),
    )
    if config.init_from == "resume":
        before = start_checkpoint.get("config", {}).get("optimizer", "adamw")  # the only one in older files
        if before != config.optimizer:
            raise UsageError(
                f"optimizer={config.optimizer}, but the run in {config.out_dir} has {before}: leave it out, "
                f"or begin anew from its weights by --init_from={config.out_dir}/{checkpoint.NEWEST} and "
                "another --out_dir"
            )
        try:
            state.load_state_dict(start_checkpoint)
        except (LookupError, ArithmeticError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"{error!r}" if isinstance(error, LookupError) else first_line(error)
            raise UserError(f"{config.out_dir}/{checkpoint.NEWEST} can't be resumed: {reason}") from None
    return state


def snapshot(state, config, tokenizer, wandb_id=None):
    """A checkpoint's contents: all that training, sampling and exporting need."""
    return {
        **state.state_dict(),
        "model_args": asdict(state.model.config),
        "config": asdict(config),
        "tokenizer": tokenizer.to_json(),
        "ids_in_loss": tokenizer.vocab_size,
        "wandb_id": wandb_id,
        "threads": torch.get_num_threads(),  # on a CPU they decide the last bits of results
    }


def changed_loss(config, start_checkpoint, tokenizer):
    """A line, if the loss of the run to resume counted the rows that pad the vocabulary, as it once did."""
    if config.init_from != "resume":
        return
    rows, ids = start_checkpoint["model_args"]["vocab_size"], tokenizer.vocab_size
    if start_checkpoint.get("ids_in_loss", rows) > ids:
        yield (
            f"the rows {ids} to {rows - 1}, which pad the vocabulary, do not count in the loss any more, so "
            "it is slightly lower than this run's before"
        )
