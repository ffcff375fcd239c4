"""The training run: batches -> steps -> evaluation -> checkpoints -> logs."""

import math
import signal
import sys
import time
from dataclasses import asdict, dataclass

import torch

from kqv.device import DeviceSettings, find_compile, find_dtype, out_of_memory_as
from kqv.errors import UsageError, run, warn
from kqv.settings import parse
from kqv.text.dataset import Dataset
from kqv.training.batches import DataSettings, micro_batches, tokens_per_step
from kqv.training.evaluation import evaluate, write_sample
from kqv.training.failures import report_once
from kqv.training.log import Log, LogSettings, start_tracking
from kqv.training.loss import next_token_loss
from kqv.training.optimizer import OptimizerSettings, learning_rate_at
from kqv.training.process_group import ParallelSettings, join_world
from kqv.training.sharding import full_tensor, is_sharded
from kqv.training.signals import StopSignals
from kqv.training.start import (
    ModelSettings,
    RunSettings,
    build_model,
    checkpoint_activations,
    contents,
    make_saver,
    set_precision,
    smaller_batch,
    start_of,
    start_state,
)
from model import NextToken


@dataclass(frozen=True)
class TrainSettings(
    ParallelSettings, DeviceSettings, LogSettings, OptimizerSettings, ModelSettings, DataSettings, RunSettings
):
    """
    usage: python train.py [config.py ...] [--name=value ...]

    Train a GPT on a prepared set. Config files are Python (run as your own code) and set the names below; the
    command line comes last. On several GPUs: torchrun --nproc_per_node=8 train.py ...
    """


def main(argv):
    config = parse(TrainSettings, argv)
    # Handlers outlive the process group, which may still report a lost rank.
    with StopSignals() as stop, join_world(config) as world:
        config, source = start_of(config, argv, world)
        with out_of_memory_as(f"out of memory on {world.device}: {smaller_batch(config)}"):
            train(config, source, world, stop)
    if stop.received == signal.SIGINT:
        sys.exit(130)


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
    objective = world.place(NextToken(gpt, next_token_loss), gpt.transformer.h, config.parallel, dtype)
    state = start_state(config, gpt, source, dtype)
    if compiled and is_sharded(gpt):  # what gathers a block's weights can't be compiled
        for block in gpt.transformer.h:
            block.forward = torch.compile(block.forward)
    if config.activation_checkpointing:
        checkpoint_activations(gpt)
    model = torch.compile(objective) if compiled else objective
    wrapped = world.wrap(model)

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
    saver = make_saver(config.out_dir, config.init_from != "resume", world, is_sharded(gpt))
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
        with world.reduce_gradients(model, micro_step == share):
            with autocast:
                loss = model(*batch)
            state.scaler.scale(loss / share).backward()
        loss_sum += loss.detach()
    state.scaler.unscale_(state.optimizer)
    grad_norm = full_tensor(
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf)
    )
    bad = ~torch.isfinite(grad_norm)
    state.bad_steps.add_(1).mul_(bad)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    # fused optimizers leave out a step by this, as GradScaler asks them to
    state.optimizer.found_inf = bad.float()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=world.frees_gradients(model))
    return loss_sum / share, grad_norm


if __name__ == "__main__":
    run(report_once(main))
