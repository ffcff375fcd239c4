"""The training run: batches -> steps -> evaluation -> checkpoints -> logs."""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from kqv import checkpoint
from kqv.dataset import SPLITS, Dataset
from kqv.device import DeviceSettings, find_compile, find_dtype, peak_flops
from kqv.distributed import join_world
from kqv.errors import UsageError, UserError, run
from kqv.settings import parse, setting
from model import GPT, GPTConfig


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    out_dir: str = setting("out", "folder for checkpoints and metrics.jsonl")
    init_from: str = setting(
        "scratch", "scratch, resume, gpt2, gpt2-medium|large|xl, a checkpoint or a Hugging Face folder"
    )
    seed: int = setting(
        1337, "decides the initial weights, the batches and the dropout", at_least=0, below=2**63
    )
    eval_only: bool = setting(False, "evaluate once and stop")
    backend: Literal["auto", "nccl", "gloo"] = setting("auto", "what processes talk through, under torchrun")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    dataset: str = setting("openwebtext", "a prepared set: the folder data/<dataset>, or an absolute path")
    batch_size: int = setting(12, "sequences in one micro-batch", at_least=1)
    gradient_accumulation_steps: int = setting(
        5 * 8, "micro-batches in one step, over all processes", at_least=1
    )
    block_size: int = setting(1024, "the longest context, in tokens", at_least=1)


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    n_layer: int = setting(12, "blocks", at_least=1)
    n_head: int = setting(12, "attention heads in a block", at_least=1)
    n_embd: int = setting(768, "channels of the residual stream", at_least=1)
    dropout: float = setting(0.0, "share of activations dropped in training", at_least=0.0, below=1.0)
    bias: bool = setting(False, "biases in linear layers and LayerNorms")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer (AdamW) and learning rate"""

    learning_rate: float = setting(6e-4, "the largest learning rate", at_least=0.0)
    max_iters: int = setting(600000, "training steps", at_least=0)
    weight_decay: float = setting(1e-1, "on matrices and embeddings", at_least=0.0)
    beta1: float = setting(0.9, "momentum", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "momentum of the squares", at_least=0.0, below=1.0)
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
    always_save_checkpoint: bool = setting(True, "False: only when val loss is the best so far")
    wandb_log: bool = setting(False, "log to Weights & Biases too (WANDB_MODE=offline needs no network)")
    wandb_project: str = setting("owt", "wandb's project")
    wandb_run_name: str = setting("gpt2", "wandb's name of the run")


@dataclass(frozen=True)
class TrainSettings(DeviceSettings, LogSettings, OptimizerSettings, ModelSettings, DataSettings, RunSettings):
    """
    usage: python train.py [config.py ...] [--name=value ...]

    Train a GPT on a prepared set. Config files are Python (run as your own code) and set the names below; the
    command line comes last. On several GPUs: torchrun --nproc_per_node=8 train.py ...
    """


ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias")  # what a checkpoint's weights decide


@dataclass
class TrainingState:
    """Everything that changes during training, saved and loaded whole."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iter_num": self.step,
            "best_val_loss": self.best_val_loss,
        }

    def load_state_dict(self, saved):
        """All but the weights, which the model was built with. Raises ValueError where it does not fit."""
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved.get("scaler") or self.scaler.state_dict())
        self.step = int(saved["iter_num"])
        self.best_val_loss = float(saved["best_val_loss"])


def main(argv):
    config = parse(TrainSettings, argv)
    source = None
    if config.init_from == "resume":
        source = checkpoint.load(Path(config.out_dir) / checkpoint.NEWEST)
        left_out = ("out_dir", "init_from", "eval_only")  # where this run is, and what it is to do
        saved = {name: value for name, value in source.get("config", {}).items() if name not in left_out}
        config = parse(TrainSettings, argv, saved)
    elif config.init_from != "scratch":
        source = checkpoint.load_start(config.init_from)
    with join_world(config.device, config.backend) as world:
        try:
            train(config, source, world)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory on {world.device} with batch_size={config.batch_size}: try "
                f"--batch_size={max(1, config.batch_size // 2)} "
                f"--gradient_accumulation_steps={2 * config.gradient_accumulation_steps}"
            ) from None


def train(config, source, world):
    """
    The run that `config` describes, from the checkpoint contents `source` (None: from scratch), on this
    process.
    """
    if config.gradient_accumulation_steps % world.size:
        raise UsageError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts all processes, so it "
            f"must be divisible by their number, {world.size}"
        )
    torch.set_float32_matmul_precision("high")  # float32 products of a GPU in TF32
    dtype = find_dtype(config.dtype, world.device)
    compiled = find_compile(config.compile, world.device)
    data = Dataset(config.dataset)
    config, gpt = build_model(config, source, data.tokenizer)
    data.require_length(config.block_size)
    gpt.to(world.device)
    state = TrainingState(
        model=gpt,
        optimizer=make_optimizer(gpt, config, world.device),
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
    )
    if config.init_from == "resume":
        try:
            state.load_state_dict(source)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{config.out_dir}/{checkpoint.NEWEST} can't be resumed: {error}") from None
    resumed_at = state.step if config.init_from == "resume" else None

    model = torch.compile(gpt) if compiled else gpt
    wrapped = world.wrap(model)
    autocast = torch.autocast(world.device.type, dtype) if dtype != torch.float32 else nullcontext()
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    peak = (
        peak_flops(torch.cuda.get_device_name(world.device), dtype) if world.device.type == "cuda" else None
    )

    log = Log(config, world, resumed_at)
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else "")
    log.line(
        f"{gpt.num_parameters() / 1e6:.2f}M parameters, {tokens_per_step:,} tokens a step, "
        f"{world.size} x {world.device}, {precision}"
    )
    started = clock = time.perf_counter()
    evaluation_seconds = tokens = 0
    while True:
        last = state.step >= config.max_iters
        due = (state.step % config.eval_interval == 0 or last) and state.step != resumed_at
        if due or config.eval_only:
            before = time.perf_counter()
            losses = evaluate(model, data, config, world, autocast)
            log.evaluation(state.step, losses)
            if config.eval_only:
                break
            if state.step > 0 and world.is_main:
                save(state, losses["val"], config, data.tokenizer)
            state.best_val_loss = min(state.best_val_loss, losses["val"])
            clock, tokens = time.perf_counter(), 0
            evaluation_seconds += clock - before
        if last:
            break

        set_learning_rate(state.optimizer, learning_rate_at(state.step, config))
        batches = micro_batches(data, config, world, state.step)
        loss, grad_norm = train_step(wrapped, state, batches, config, world, autocast)
        tokens += tokens_per_step
        if state.step % config.log_interval == 0:
            loss = world.mean(loss).item()  # waits for the device, as nothing else in a step does
            tokens_per_second = tokens / (time.perf_counter() - clock)
            numbers = {
                "loss": loss,
                "lr": learning_rate_at(state.step, config),
                "grad_norm": grad_norm.item(),
            }
            numbers["tokens_per_second"] = tokens_per_second
            if peak:
                numbers["mfu"] = tokens_per_second * gpt.flops_per_token() / (peak * world.size)
            log.training(state.step, numbers)
            clock, tokens = time.perf_counter(), 0
        state.step += 1
        log.bar.update()
    log.close()
    if not config.eval_only:
        seconds = time.perf_counter() - started
        log.line(
            f"done: step {state.step} after {seconds:.1f} s, of which evaluation and saving took "
            f"{evaluation_seconds:.1f} s; best val loss {state.best_val_loss:.4f}\n"
            f"to see what it writes: python sample.py --out_dir={config.out_dir}"
        )


def build_model(config, source, tokenizer):
    """
    The model to train, and the settings with the architecture that it has got.

    Raises UsageError for a shape that can't be, or, on resume, for one other than the checkpoint's.
    """
    try:
        if source is None:
            torch.manual_seed(config.seed)
            shape = {name: getattr(config, name) for name in (*ARCHITECTURE, "dropout")}
            return config, GPT(GPTConfig(vocab_size=padded(tokenizer.vocab_size), **shape))
        known = {field.name for field in fields(GPTConfig)}
        shape = GPTConfig(**{name: value for name, value in source["model_args"].items() if name in known})
        gpt = GPT.from_weights(replace(shape, dropout=config.dropout), source["model"])
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    if config.init_from == "resume":
        for name in ARCHITECTURE:
            if getattr(config, name) != getattr(shape, name):
                raise UsageError(
                    f"{name}={getattr(config, name)}, but the run in {config.out_dir} has "
                    f"{name}={getattr(shape, name)}: leave it out, or use --init_from=scratch"
                )
    elif config.block_size < shape.block_size:
        gpt.crop_block_size(config.block_size)
    if (
        shape.vocab_size < tokenizer.vocab_size
        or source.get("tokenizer", tokenizer.to_json()) != tokenizer.to_json()
    ):
        raise UserError(
            f"data/{config.dataset} was made with another tokenizer than the weights of {config.init_from} "
            f"({tokenizer.kind}, {tokenizer.vocab_size} ids): prepare it with the one that the weights know"
        )
    return replace(config, **{name: getattr(gpt.config, name) for name in ARCHITECTURE}), gpt


def padded(vocab_size):
    """A large vocabulary rounded up to a multiple of 64, which tensor cores like; a small one as it is."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64


def make_optimizer(gpt, config, device):
    """AdamW (Loshchilov & Hutter 2017), in one fused kernel where the device has it."""
    groups = gpt.parameter_groups(config.weight_decay)
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


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


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def micro_batches(data, config, world, step):
    """
    This process's share of a step: (x (B, T), y (B, T), seed) each. Rank r takes every size-th, beginning
    with the r-th.
    """
    for index in range(world.rank, config.gradient_accumulation_steps, world.size):
        x, y, seed = data.training_batch(config.batch_size, config.block_size, config.seed, step, index)
        yield to_device(x, world.device), to_device(y, world.device), seed


def to_device(tensor, device):
    """On a CUDA device through pinned memory, so that the copy overlaps with computing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def train_step(model, state, batches, config, world, autocast):
    """
    One optimizer step over this process's micro-batches; state's model is trained through `model`, its
    wrapped form.

    Returns tensors on the device: the mean loss of these micro-batches, and the gradient's norm before
    clipping.
    """
    share = config.gradient_accumulation_steps // world.size
    loss_sum = torch.zeros((), device=world.device)
    for micro_step, (x, y, seed) in enumerate(batches, start=1):
        torch.manual_seed(seed)  # dropout is a function of (seed, step, micro-batch) too
        with world.reduce_gradients(model, micro_step == share):
            with autocast:
                _, loss = model(x, y)
            state.scaler.scale(loss / share).backward()
        loss_sum += loss.detach()
    state.scaler.unscale_(state.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return loss_sum / share, grad_norm


@torch.no_grad()
def evaluate(model, data, config, world, autocast):
    """{split: mean loss in nats per token} over fixed batches, shared among the processes."""
    model.eval()
    losses = {}
    for split in SPLITS:
        once = math.ceil(
            len(data.splits[split]) / (config.batch_size * config.block_size)
        )  # batches to read it all
        count = min(config.eval_iters, once)
        total = torch.zeros((), device=world.device)
        for index in range(world.rank, count, world.size):
            x, y = data.evaluation_batch(split, config.batch_size, config.block_size, index, count)
            with autocast:
                total += model(to_device(x, world.device), to_device(y, world.device))[1]
        losses[split] = world.sum(total).item() / count
    model.train()
    return losses


def save(state, val_loss, config, tokenizer):
    """
    ckpt.pt, the newest, with all that training needs; best.pt, the weights with the lowest validation loss.
    """
    out_dir = Path(config.out_dir)
    best = val_loss < state.best_val_loss
    contents = {
        **state.state_dict(),
        "best_val_loss": min(val_loss, state.best_val_loss),
        "model_args": asdict(state.model.config),
        "config": asdict(config),
        "tokenizer": tokenizer.to_json(),
    }
    if best or config.always_save_checkpoint:
        checkpoint.save(out_dir / checkpoint.NEWEST, contents)
    if best:
        del contents["optimizer"], contents["scaler"]
        checkpoint.save(out_dir / checkpoint.BEST, contents)


class Log:
    """
    Where a run's numbers go: metrics.jsonl always, the terminal, wandb where asked. Only the main process has
    one.
    """

    def __init__(self, config, world, resumed_at):
        self.is_main = world.is_main
        self.metrics = self.wandb = None
        on_terminal = self.is_main and sys.stderr.isatty() and not config.eval_only
        self.bar = tqdm(
            total=config.max_iters,
            initial=resumed_at or 0,
            unit="step",
            disable=not on_terminal,
            smoothing=0.05,
        )
        if self.is_main and not config.eval_only:
            self.metrics = open_metrics(Path(config.out_dir), resumed_at)
        if self.is_main and config.wandb_log:
            self.wandb = start_wandb(config)

    def line(self, text):
        if self.is_main:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, step, numbers):
        if self.metrics:
            self.metrics.write(json.dumps({"step": step, **numbers}) + "\n")
            self.metrics.flush()
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def evaluation(self, step, losses):
        self.line(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        self.record(step, {f"{split}_loss": loss for split, loss in losses.items()})

    def training(self, step, numbers):
        self.record(step, numbers)
        speed = f"{numbers['tokens_per_second'] / 1e3:.1f}k tokens/s"
        text = f"loss {numbers['loss']:.4f}, lr {numbers['lr']:.2e}, {speed}"
        if "mfu" in numbers:
            text += f", MFU {numbers['mfu']:.1%}"
        if self.bar.disable:
            self.line(f"step {step}: {text}")
        else:
            self.bar.set_postfix_str(text, refresh=False)

    def close(self):
        self.bar.close()
        if self.metrics:
            self.metrics.close()
        if self.wandb:
            self.wandb.finish()


def open_metrics(out_dir, resumed_at):
    """
    metrics.jsonl, empty for a new run; for a resumed one without what an interrupted run logged past its
    checkpoint.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "metrics.jsonl"
    kept = []
    if resumed_at is not None and path.exists():
        for line in path.read_text("utf-8").splitlines(keepends=True):
            try:
                numbers = json.loads(line)
            except ValueError:
                break  # torn when the run was killed
            if numbers["step"] < resumed_at or numbers["step"] == resumed_at and "val_loss" in numbers:
                kept.append(line)
    beside = path.with_name(".metrics.jsonl.new")
    beside.write_text("".join(kept), "utf-8")
    os.replace(beside, path)
    return open(path, "a", encoding="utf-8")


def start_wandb(config):
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log=True needs: pip install wandb") from None
    try:
        return wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config))
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"wandb can't start ({reason}): WANDB_MODE=offline logs without a network") from None


def is_out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    run(main)
