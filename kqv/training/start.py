"""From settings to the state in which a run starts."""

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from kqv.errors import UsageError, UserError
from kqv.formats import checkpoint, loading
from kqv.settings import parse, setting
from kqv.training.log import NOT_RESUMED
from kqv.training.optimizer import load_optimizer, make_optimizer
from kqv.training.saver import Saver
from model import GPT, GPTConfig


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    out_dir: str = setting("out", "folder for checkpoints and metrics.jsonl")
    init_from: str = setting(
        "scratch",
        "scratch, resume, auto (resume if there is a checkpoint, else scratch), gpt2, gpt2-medium|large|xl, "
        "a checkpoint or a Hugging Face folder",
    )
    seed: int = setting(
        1337, "decides the initial weights, the batches and the dropout", at_least=0, below=2**63
    )
    eval_only: bool = setting(False, "evaluate once and stop")
    deterministic: bool = setting(False, "bit-for-bit repeatable on a GPU too, at some cost in speed")


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    n_layer: int = setting(12, "blocks", at_least=1)
    n_head: int = setting(12, "attention heads in a block", at_least=1)
    n_embd: int = setting(768, "channels of the residual stream", at_least=1)
    dropout: float = setting(0.0, "share of activations dropped in training", at_least=0.0, below=1.0)
    bias: bool = setting(False, "biases in linear layers and LayerNorms")
    activation_checkpointing: bool = setting(
        False, "compute each block again in the backward pass: much less memory, about a third more time"
    )


ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias")  # what a checkpoint's weights decide


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


def start_of(config, argv, world):
    """(the settings, on resume with the checkpoint's for defaults, the contents to start from or None)."""
    newest = Path(config.out_dir) / checkpoint.NEWEST
    if config.init_from == "auto":
        found = newest.exists() or newest.with_name(checkpoint.PREVIOUS).exists()
        config = replace(config, init_from="resume" if found else "scratch")
    if config.init_from == "scratch":
        return config, None
    if config.init_from == "resume":
        source = loading.load(newest, mapped=world.size > 1)
        saved = {name: value for name, value in source.get("config", {}).items() if name not in NOT_RESUMED}
        return replace(parse(type(config), argv, saved), init_from="resume"), source
    start, out_dir = Path(config.init_from).resolve(), Path(config.out_dir).resolve()
    if out_dir in (start, start.parent) and not config.eval_only:
        raise UsageError(
            f"out_dir={config.out_dir} holds the weights to start from: use another --out_dir, "
            "or go on with that run by --init_from=resume"
        )
    return config, loading.load_start(config.init_from)


def contents(state, config, tokenizer, wandb_run=None):
    """What a checkpoint holds: all that training, sampling and exporting need."""
    return {
        **state.state_dict(),
        "model_args": asdict(state.model.config),
        "config": asdict(config),
        "tokenizer": tokenizer.to_json(),
        "wandb_id": wandb_run.id if wandb_run else None,
    }


def start_state(config, gpt, source, dtype):
    """The state at the run's first step: all new, or on resume as it was saved."""
    device = gpt.lm_head.weight.device
    state = TrainingState(
        model=gpt,
        optimizer=make_optimizer(gpt, config),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        bad_steps=torch.zeros((), dtype=torch.int64, device=device),
    )
    if config.init_from == "resume":
        try:
            state.load_state_dict(source)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"{config.out_dir}/{checkpoint.NEWEST} can't be resumed: {error!r}") from None
    return state


def build_model(config, source, tokenizer):
    """
    The model to train, and the settings with the architecture that it has got.

    Raises UsageError for a shape that can't be, or, on resume, for one other than the checkpoint's.
    """
    try:
        if source is None:
            torch.manual_seed(config.seed)
            shape = {name: getattr(config, name) for name in (*ARCHITECTURE, "dropout")}
            shape = GPTConfig(vocab_size=padded(tokenizer.vocab_size), **shape)
            require_memory(shape)
            return config, GPT(shape)
        shape = GPTConfig.from_args(source["model_args"])
        gpt = GPT.from_weights(replace(shape, dropout=config.dropout), source["model"])
    except (ValueError, TypeError) as error:
        if source is None:
            raise UsageError(str(error)) from None
        start = Path(config.out_dir, checkpoint.NEWEST) if config.init_from == "resume" else config.init_from
        raise UserError(f"the weights of {start} are not those of a GPT: {error}") from None
    if config.init_from == "resume":
        for name in ARCHITECTURE:
            if getattr(config, name) != getattr(shape, name):
                raise UsageError(
                    f"{name}={getattr(config, name)}, but the run in {config.out_dir} has "
                    f"{name}={getattr(shape, name)}: leave it out, or use --init_from=scratch"
                )
    elif config.block_size < shape.block_size:
        gpt.crop_block_size(config.block_size)
    definition = tokenizer.to_json()
    base = definition.get("base")  # of a chat's tokenizer: its marks are new to what was trained on texts
    known = source.get("tokenizer", definition)
    if base and known == base:
        torch.manual_seed(config.seed)
        gpt.grow_vocab_size(max(shape.vocab_size, padded(tokenizer.vocab_size)))
    elif shape.vocab_size < tokenizer.vocab_size or known != definition:
        raise UserError(
            f"data/{config.dataset} was made with another tokenizer than the weights of {config.init_from} "
            f"({tokenizer.kind}, {tokenizer.vocab_size} ids): prepare it with the one that the weights know"
        )
    return replace(config, **{name: getattr(gpt.config, name) for name in ARCHITECTURE}), gpt


def require_memory(shape):
    """Raise ValueError for a model whose weights alone outgrow the machine, before it takes the memory."""
    count = 12 * shape.n_layer * shape.n_embd**2 + (shape.vocab_size + shape.block_size) * shape.n_embd
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > memory:
        raise ValueError(
            f"n_layer={shape.n_layer} and n_embd={shape.n_embd} make {count:.1e} parameters, more than the "
            f"{memory / 2**30:.0f} GiB of this machine hold: make one of them smaller"
        )


def checkpoint_activations(gpt):
    """
    Keep only what goes into each block, and compute the block again for its backward pass (Chen et al. 2016).
    """
    for block in gpt.transformer.h:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def padded(vocab_size):
    """A large vocabulary rounded up to a multiple of 64, which tensor cores like; a small one as it is."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64


def set_precision(config, device):
    """
    How float32 products and attention are computed, and with --deterministic that every operation repeats bit
    for bit.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # in TF32
    if device.type == "cpu":
        # Over few tokens the CPU's fused attention is slower than plain products, in bfloat16 by far. The
        # switch is CUDA's by name only.
        torch.backends.cuda.enable_flash_sdp(config.block_size > 128)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
        torch.use_deterministic_algorithms(True)


def smaller_batch(config):
    """
    What to try when memory is short: the next smaller micro-batch with the accumulation that keeps the total.
    """
    again = "" if config.activation_checkpointing else "--activation_checkpointing=True or "
    if config.batch_size == 1:
        return f"batch_size is 1 already, so try {again}a smaller --block_size, --n_layer or --n_embd"
    smaller = next(size for size in range(config.batch_size // 2, 0, -1) if config.batch_size % size == 0)
    steps = config.gradient_accumulation_steps * config.batch_size // smaller
    return f"try {again}--batch_size={smaller} --gradient_accumulation_steps={steps}"


def make_saver(out_dir, is_new_run, world, is_sharded):
    """The Saver for this process; None where it has nothing to save."""
    if is_sharded:
        from kqv.training.sharded_saver import ShardedSaver  # which takes half a second to import

        return ShardedSaver(out_dir, is_new_run, world)
    return Saver(out_dir, is_new_run) if world.is_main else None
