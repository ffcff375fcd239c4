"""Tuning by rewards: draw completions -> reward them -> learn, again and again."""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import os
import signal
import sys
import time
from dataclasses import dataclass, replace

import torch

from kqv import errors, threads
from kqv.device import PlacementSettings, find_device, find_dtype, out_of_memory_as
from kqv.errors import UsageError
from kqv.formats.lora import is_adapted
from kqv.settings import fill, read_given, setting
from kqv.text.dataset import Dataset
from kqv.training.best import adopt_best
from kqv.training.folder import own_folder
from kqv.training.log import LogSettings, start_tracking
from kqv.training.lora import LoraSettings, require_lora
from kqv.training.muon import MuonSettings
from kqv.training.notices import changed_settings, odd_learning_rates, start_lines
from kqv.training.objective import checkpoint_activations, loss_of, set_precision
from kqv.training.optimizer import OptimizerSettings, set_learning_rates
from kqv.training.run import SaveSettings, make_saver
from kqv.training.schedule import ScheduleSettings
from kqv.training.signals import StopSignals
from kqv.training.start import (
    ActivationSettings,
    RunSettings,
    build_model,
    choose_threads,
    require_run_of,
    resolve_start,
)
from kqv.training.state import start_state
from kqv.training.world import World
from kqv.tuning.log import TuningLog
from kqv.tuning.policy import PolicyGradient
from kqv.tuning.prompts import prompts_of
from kqv.tuning.rewards import load_reward
from kqv.tuning.run import TuningRun
from kqv.tuning.settings import DrawSettings, RewardSettings
from kqv.tuning.showing import show
from kqv.tuning.start import start_of
from kqv.tuning.state import TuningState, belongs_to
from model import NextToken

UNUSED = {"best": ("kl_weight",), "grpo": ("updates",)}  # the settings that a method has no use for


@dataclass(frozen=True)
class TuneSettings(
    PlacementSettings,
    LogSettings,
    SaveSettings,
    MuonSettings,
    OptimizerSettings,
    ScheduleSettings,
    ActivationSettings,
    LoraSettings,
    DrawSettings,
    RewardSettings,
    RunSettings,
):
    """
    usage: python tune.py --reward=FILE.py --init_from=MODEL --dataset=NAME [config.py ...] [--name=value ...]

    Tune a trained model by rewards: it draws completions of prompts, your function rewards them, and it
    learns to draw what has a high reward.
    """

    out_dir: str = setting("out/tuned", "folder for checkpoints and metrics.jsonl", path=True)
    init_from: str = setting(
        "", "the model to tune: what train.py takes; resume: go on with the run in out_dir", path=True
    )
    eval_only: bool = setting(False, "evaluate on the held-out prompts once and stop")
    max_iters: int = setting(100, "steps", at_least=0)
    learning_rate: float = setting(1e-4, "the largest learning rate", at_least=0.0)
    schedule: ScheduleSettings.__annotations__["schedule"] = setting(
        "constant", "how learning rates fall after the warm-up; wsd: not before the cool-down"
    )
    warmup_iters: float = setting(0, "steps to warm up for, or, below 1, a share of max_iters", at_least=0.0)
    weight_decay: float = setting(0.0, "AdamW's, on matrices and embeddings", at_least=0.0)


def main(argv):
    given = read_given(TuneSettings, argv)
    config = fill(TuneSettings, given)
    require_one_process()
    world = World(find_device(config.device))
    if config.show:  # then nothing is saved either
        config = replace(config, eval_only=True)
    if not config.eval_only:  # a long run goes on where nobody reads its output
        errors.output_may_be_lost()
    stopped = False
    with StopSignals(not config.eval_only) as stop, own_folder(config, world) as folder:
        resolved, start_checkpoint = resolve(config, given, world)
        config = replace(resolved, eval_only=config.eval_only)
        with out_of_memory_as(
            f"out of memory with batch_size={config.batch_size}: try a smaller --batch_size, or "
            "--activation_checkpointing=True"
        ):
            run = set_up(config, given, start_checkpoint, world, folder)
            with run.log.bar:  # closed before an error is printed
                if config.show:
                    show_memory(run, longest=show(run))
                elif config.eval_only:
                    run.evaluate()
                else:
                    stopped = tune(run, stop)
    if stopped and stop.received == signal.SIGINT:
        sys.exit(130)


def tune(run, stop):
    """Tune until max_iters, until there is nothing to gain, or until a signal. Returns whether one came."""
    while True:
        stopping = run.agree_to_stop(stop)
        if run.evaluation_due() and not stopping:
            run.evaluate()
        if run.save_due(stopping):
            run.save(stopping)
        if run.finished or stopping:
            break
        learning_rate = set_learning_rates(run.state.optimizer, run.state.step, run.config)
        rollouts, rewards, sampling_seconds = run.round(run.config.prompts_per_step)
        began = time.perf_counter()
        numbers = run.learn(rollouts, rewards)
        seconds = sampling_seconds, time.perf_counter() - began
        run.end_step(rollouts, rewards, numbers, learning_rate, seconds)
    run.close(stopping, stop)
    return stopping


def show_memory(run, longest):
    """Print the memory that a step needs whose longest row has so many tokens."""
    from kqv.measuring import plan  # slow import: only for this

    dtype = find_dtype(run.config.dtype, run.device)
    job = plan.job_of_run(run.config, run.state.model, run.world, dtype, False, 1, longest)
    copy = "" if is_adapted(run.state.model) else "; without the model as it was at the start"
    errors.say(plan.memory_in_words(job) + copy)


def require_one_process():
    """Raise UsageError under torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("tune.py runs in one process: start it without torchrun")


def resolve(config, given, world):
    """(settings, contents of the checkpoint to start from), see resolve_start. Raises UserError."""
    if config.init_from in ("", "scratch", "auto"):
        raise UsageError("--init_from names no model: give the one to tune, as --init_from=out/plays_char")
    config, start_checkpoint = resolve_start(config, given, world)
    require_run_of("tune.py", config, start_checkpoint)
    require_lora(config, given, start_checkpoint)
    if not config.reward:
        raise UsageError(
            "--reward is missing: name a Python file with def reward(prompt, completion, answer), also to go "
            "on with a run, since no checkpoint says which code is run"
        )
    if not config.dataset:
        raise UsageError("--dataset is missing: name the prepared set that prompts are taken from")
    return config, start_checkpoint


def set_up(config, given, start_checkpoint, world, folder=None):
    """The TuningRun that `config` describes; the arguments are those of train.set_up."""
    config = replace(config, device=str(world.device))
    about_threads = choose_threads(config, start_checkpoint, world)
    config, wandb_run = start_tracking(config, start_checkpoint, world)
    dtype = find_dtype(config.dtype, world.device)
    data = Dataset(config.dataset)
    reward = load_reward(config.reward)
    config, gpt = build_model(config, start_checkpoint, data)
    prompts = prompts_of(config, data, gpt.config.block_size)
    for line in odd_learning_rates(config):
        errors.warn(line)
    set_precision(config, world.device)
    start = start_of(config, gpt, start_checkpoint, data, world.device)
    gpt.to(world.device)
    if config.method == "grpo":
        model = PolicyGradient(gpt, start, data.tokenizer.vocab_size, config.temperature, config.kl_weight)
    else:
        model = NextToken(gpt, loss_of(gpt), data.tokenizer.vocab_size)
    state = start_state(config, gpt, start_checkpoint, dtype, world, TuningState)
    state.start = start.named
    if config.init_from == "resume" and (line := adopt_best(state, config, world)):
        errors.warn(line)
    evaluated = state.evaluated
    names = state.begin_anew(belongs_to(data, config), changed_settings(config, start_checkpoint))
    if config.activation_checkpointing:
        checkpoint_activations(gpt)

    log = TuningLog(config, world, state, evaluated, dtype, wandb_run)
    how = [str(dtype).removeprefix("torch."), config.method]
    how += [threads.named(torch.get_num_threads())] * (world.device.type == "cpu")
    uses = {
        "the head is the embedding": (not gpt.config.tied_head, ("head_learning_rate",)),
        f"method is {config.method}": (False, UNUSED[config.method]),
    }
    lines = start_lines(config, given, world, start_checkpoint, uses, forgotten(names))
    log.start(state, config, world, how, (*about_threads, *lines))
    start_checkpoint.clear()
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    saver = make_saver(config, world, False, state, folder)
    wandb_id = wandb_run.id if wandb_run else None
    return TuningRun(
        config,
        world,
        data,
        model,
        model,
        state,
        autocast,
        log,
        saver,
        wandb_id,
        reward=reward,
        start=start,
        prompts=prompts,
    )


def forgotten(names):
    """A line, if a resumed run has forgotten its best reward."""
    if "best_val_loss" in names:
        yield "the best reward so far was not measured on what is evaluated now: the best begins anew"
