"""The training run: batches -> steps -> evaluation -> checkpoints -> logs."""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from generate import Engine, Sampling, generate
from kqv import checkpoint
from kqv.dataset import SPLITS, Dataset
from kqv.device import DeviceSettings, find_compile, find_dtype, out_of_memory_as, peak_flops
from kqv.distributed import ParallelSettings, in_one_voice, is_sharded, join_world, whole
from kqv.errors import UsageError, UserError, run, warn
from kqv.metrics import Metrics, start_wandb
from kqv.settings import override, parse, setting
from kqv.signals import StopSignals
from kqv.tokenizer import TextStream
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
class DataSettings:
    """Data"""

    dataset: str = setting("openwebtext", "a prepared set: the folder data/<dataset>, or an absolute path")
    batch_size: int = setting(12, "sequences in one micro-batch", at_least=1, below=2**50)
    gradient_accumulation_steps: int = setting(
        5 * 8, "micro-batches in one step, over all processes", at_least=1
    )
    block_size: int = setting(1024, "the longest context, in tokens", at_least=1)
    sampling: Literal["random", "epoch"] = setting(
        "random", "windows of the text: drawn with replacement, or each once before any comes again"
    )


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


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer (AdamW) and learning rate"""

    learning_rate: float = setting(6e-4, "the largest learning rate", at_least=0.0)
    max_iters: int = setting(600000, "training steps", at_least=0)
    weight_decay: float = setting(1e-1, "on matrices and embeddings", at_least=0.0)
    beta1: float = setting(0.9, "momentum", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "momentum of the squares", at_least=0.0, below=1.0)
    max_bad_steps: int = setting(
        20, "skipped steps in a row (non-finite gradient) that end the run", at_least=1
    )
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", at_least=0.0)
    decay_lr: bool = setting(True, "warm up, then decay along a cosine; False: constant")
    warmup_iters: int = setting(2000, "steps to warm up for", at_least=0)
    lr_decay_iters: int = setting(600000, "the step at which min_lr is reached", at_least=0)
    min_lr: float = setting(6e-5, "the learning rate at the end of the decay", at_least=0.0)


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


@dataclass(frozen=True)
class TrainSettings(
    ParallelSettings, DeviceSettings, LogSettings, OptimizerSettings, ModelSettings, DataSettings, RunSettings
):
    """
    usage: python train.py [config.py ...] [--name=value ...]

    Train a GPT on a prepared set. Config files are Python (run as your own code) and set the names below; the
    command line comes last. On several GPUs: torchrun --nproc_per_node=8 train.py ...
    """


ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias")  # what a checkpoint's weights decide
NOT_RESUMED = ("out_dir", "init_from", "eval_only")  # where a run is and what it is to do, not what it is


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
        checkpoint.load_optimizer(self.optimizer, saved)
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.bad_steps += saved.get("bad_steps", 0)
        self.step = int(saved["iter_num"])
        self.evaluated = int(saved.get("evaluated", -1))
        self.best_val_loss = float(saved["best_val_loss"])


def main(argv):
    config = parse(TrainSettings, argv)
    # Signals are kept until the world is left: though stopped, it may have to say who is lost.
    with StopSignals() as stop, join_world(config) as world:
        config, source = start_of(config, argv, world)
        with out_of_memory_as(f"out of memory on {world.device}: {smaller_batch(config)}"):
            train(config, source, world, stop)
    if stop.received == signal.SIGINT:
        sys.exit(130)


def start_of(config, argv, world):
    """(the settings, on resume with the checkpoint's for defaults, the contents to start from or None)."""
    newest = Path(config.out_dir) / checkpoint.NEWEST
    if config.init_from == "auto":
        found = newest.exists() or newest.with_name(checkpoint.PREVIOUS).exists()
        config = replace(config, init_from="resume" if found else "scratch")
    if config.init_from == "scratch":
        return config, None
    if config.init_from == "resume":
        source = checkpoint.load(newest, mapped=world.size > 1)
        saved = {name: value for name, value in source.get("config", {}).items() if name not in NOT_RESUMED}
        return replace(parse(TrainSettings, argv, saved), init_from="resume"), source
    start, out_dir = Path(config.init_from).resolve(), Path(config.out_dir).resolve()
    if out_dir in (start, start.parent) and not config.eval_only:
        raise UsageError(
            f"out_dir={config.out_dir} holds the weights to start from: use another --out_dir, "
            "or go on with that run by --init_from=resume"
        )
    return config, checkpoint.load_start(config.init_from)


def train(config, source, world, stop):
    """The run that `config` describes, from the checkpoint contents `source` (None: from scratch)."""
    if config.gradient_accumulation_steps % world.size:
        raise UsageError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts all processes, so it "
            f"must be divisible by their number, {world.size}"
        )
    config, wandb_run = start_tracking(config, source, world)
    dtype = find_dtype(config.dtype, world.device)
    compiled = find_compile(config.compile, world.device)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    data = Dataset(config.dataset)
    if world.size > 1:  # one process need not read so much of its data
        world.require_same(
            {
                **asdict(config),
                "the step to go on from": source.get("iter_num") if source else 0,
                f"the content of data/{config.dataset}": data.fingerprint(),
                "the precision": dtype,
                "torch": torch.__version__,
            }
        )
    if source is None:  # before a model of that size is built
        data.require_length(config.block_size)
    config, gpt = build_model(config, source, data.tokenizer)
    data.require_length(config.block_size)
    if world.is_main:
        for line in data.left_out(config.block_size):
            warn(line)
    set_precision(config, world.device)
    gpt = world.place(gpt, gpt.transformer.h, config.parallel, dtype)
    state = start_state(config, gpt, source, dtype)
    if compiled and is_sharded(gpt):  # what gathers a block's weights can't be compiled
        for block in gpt.transformer.h:
            block.forward = torch.compile(block.forward)
    if config.activation_checkpointing:
        checkpoint_activations(gpt)
    model = torch.compile(gpt) if compiled else gpt
    wrapped = world.wrap(model, gpt)

    log = Log(config, world, state, dtype, wandb_run)
    how = [str(dtype).removeprefix("torch.")]
    how += ["fsdp" if is_sharded(gpt) else "ddp"] * (world.size > 1) + ["compiled"] * compiled
    log.line(
        f"{gpt.num_parameters() / 1e6:.2f}M parameters, {tokens_per_step(config):,} tokens a step, "
        f"{world}, {', '.join(how)}"
    )
    log.changes(source)
    if source:
        source.clear()  # what it holds is the state's now, or not needed
    if config.eval_only:
        log.evaluation(state.step, evaluate(model, data, config, world, autocast), data)
        return
    saver = checkpoint.saver(config.out_dir, config.init_from != "resume", world, is_sharded(gpt))
    saved_at, saved_when = state.step, time.monotonic()
    while True:
        finished = state.step >= config.max_iters
        due = 0 < 60 * config.checkpoint_minutes <= time.monotonic() - saved_when
        stopping, save = world.any(stop.received is not None, due)
        save |= stopping or 0 < config.checkpoint_interval and state.step % config.checkpoint_interval == 0
        best = False
        evaluation_due = finished or state.step % config.eval_interval == 0
        if evaluation_due and state.evaluated != state.step and not stopping:
            with log.pause():
                losses = evaluate(model, data, config, world, autocast)
                sample = write_sample(gpt, data, config, world) if config.sample_tokens else ""
            log.evaluation(state.step, losses, data, sample)
            best = losses["val"] < state.best_val_loss
            save |= best or config.always_save_checkpoint
            state.best_val_loss = losses["val"] if best else state.best_val_loss  # NaN is never the best
            state.evaluated = state.step
        if save and state.step > 0 and (best or state.step > saved_at):
            if saver:
                with log.pause():
                    everything = contents(state, config, data.tokenizer, wandb_run)
                    log.saved(state.step, saver.save(everything, best))
            saved_at, saved_when = state.step, time.monotonic()
        if finished or stopping:
            break

        learning_rate = learning_rate_at(state.step, config)
        batches = micro_batches(data, config, world, state.step)
        loss, grad_norm = train_step(wrapped, state, batches, learning_rate, config, world, autocast)
        if state.step % config.log_interval == 0:
            log.training(state, world.mean(loss), grad_norm, learning_rate)
        state.step += 1
        log.bar.update()
    if saver:
        saver.wait()
    log.close(state, stopping, stop.received)


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


def make_optimizer(gpt, config):
    """
    AdamW (Loshchilov & Hutter 2017) as one fused kernel, which can leave out a bad step without asking the
    host.
    """
    groups = gpt.parameter_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_at(step, config):
    """
    The learning rate of a step: linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters.
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


def tokens_per_step(config):
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def micro_batches(data, config, world, step):
    """
    This process's share of a step: (the model's arguments, seed) each. Rank r takes every size-th, beginning
    with the r-th.
    """
    count = config.gradient_accumulation_steps
    for index in range(world.rank, count, world.size):
        batch, seed = data.training_batch(
            config.batch_size, config.block_size, config.seed, step, index, config.sampling, count
        )
        yield to_device(batch, world.device), seed


def to_device(batch, device):
    """A Batch's arrays as tensors; to a CUDA device through pinned memory, so that computing goes on."""
    tensors = [torch.from_numpy(array) for array in batch if array is not None]
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def train_step(model, state, batches, learning_rate, config, world, autocast):
    """
    One optimizer step over this process's micro-batches; state's model is trained through `model`, its
    wrapped form. A step whose gradient is not finite changes no weight and adds to `state.bad_steps`.

    Returns two tensors on the device: the mean loss of these micro-batches, and the norm of the gradient
    before clipping.
    """
    share = config.gradient_accumulation_steps // world.size
    loss_sum = torch.zeros((), device=world.device)
    for micro_step, (batch, seed) in enumerate(batches, start=1):
        if config.dropout:
            torch.manual_seed(seed)  # so dropout, too, is a function of (seed, step, micro-batch)
        with world.reduce_gradients(model, state.model, micro_step == share):
            with autocast:
                loss = model(*batch)
            state.scaler.scale(loss / share).backward()
        loss_sum += loss.detach()
    state.scaler.unscale_(state.optimizer)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf))
    bad = ~torch.isfinite(grad_norm)
    state.bad_steps.add_(1).mul_(bad)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    # fused optimizers leave out a step by this, as GradScaler asks them to
    state.optimizer.found_inf = bad.float()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=world.frees_gradients(state.model))
    return loss_sum / share, grad_norm


@torch.no_grad()
def evaluate(model, data, config, world, autocast):
    """{split: mean loss in nats per token} over fixed batches, shared among the processes."""
    model.eval()
    losses = {}
    for split in SPLITS:
        count = min(config.eval_iters, data.batches(split, config.batch_size, config.block_size))
        total = torch.zeros((), device=world.device)
        rounds = -(-count // world.size)  # the same in each process: sharded, they compute together
        for index in range(world.rank, rounds * world.size, world.size):
            batch = data.evaluation_batch(split, config.batch_size, config.block_size, index % count, count)
            with autocast:
                loss = model(*to_device(batch, world.device))
            total += loss if index < count else 0
        losses[split] = world.sum(total).item() / count
    model.train()
    return losses


def write_sample(gpt, data, config, world):
    """
    What the model makes of the beginning of the validation split, or answers to its first question: in the
    main process, which for that holds a sharded model whole.
    """
    if is_sharded(gpt):
        weights = {name: whole(weight) for name, weight in gpt.state_dict().items()}
        gpt = GPT.from_weights(gpt.config, weights)
    if not world.is_main:
        return ""
    if data.is_chat:
        ids = next(data.conversations("val"))
        prompt = ids[: np.flatnonzero(ids == data.tokenizer.assistant)[0] + 1]
    else:
        prompt = data.splits["val"][:16]
    prompt = prompt[-config.block_size :].tolist()
    gpt.eval()
    (ids,) = generate(
        Engine(gpt),
        [prompt],
        config.sample_tokens,
        sampling=Sampling(temperature=0.8, top_k=200),
        seed=config.seed,
        vocab_size=data.tokenizer.vocab_size,
    )
    gpt.train()
    text = TextStream(data.tokenizer)
    return data.tokenizer.decode(prompt) + "".join(map(text.feed, ids[len(prompt) :])) + text.finish()


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


if __name__ == "__main__":
    run(in_one_voice(main))
