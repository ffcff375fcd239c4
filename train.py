"""The training run: batches -> steps -> evaluation -> checkpoints -> logs."""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import signal
import sys
from dataclasses import dataclass, replace

import torch

from kqv import errors, threads
from kqv.device import DeviceSettings, find_compile, find_dtype, out_of_memory_as
from kqv.formats.lora import parameters_in_words
from kqv.settings import fill, read_given, setting
from kqv.text.dataset import Dataset
from kqv.training.batches import DataSettings, tokens_per_step
from kqv.training.best import adopt_best
from kqv.training.depth import DepthSettings
from kqv.training.distillation import DistillationSettings, load_teacher, other_teacher
from kqv.training.evaluation import EvaluationSettings
from kqv.training.failures import report_once
from kqv.training.folder import own_folder
from kqv.training.fused_mlp import KernelSettings
from kqv.training.log import Log, LogSettings, start_tracking
from kqv.training.lora import LoraSettings, require_lora
from kqv.training.loss import LossSettings
from kqv.training.muon import MuonSettings
from kqv.training.notices import (
    changed_settings,
    forgotten,
    odd_learning_rates,
    overruled,
    start_lines,
    uses_of_training,
)
from kqv.training.objective import (
    checkpoint_activations,
    compile_blocks,
    make_objective,
    set_precision,
)
from kqv.training.optimizer import OptimizerSettings, set_learning_rates
from kqv.training.process_group import ParallelSettings, join_world
from kqv.training.run import SaveSettings, TrainingRun, make_saver
from kqv.training.schedule import ScheduleSettings
from kqv.training.sharding import is_sharded
from kqv.training.signals import StopSignals
from kqv.training.start import (
    ActivationSettings,
    InitSettings,
    ModelSettings,
    RunSettings,
    build_model,
    choose_threads,
    require_divisible,
    require_run_of,
    require_same_start,
    resolve_start,
    smaller_batch,
)
from kqv.training.state import belongs_to, changed_loss, start_state
from kqv.training.step import train_step


@dataclass(frozen=True)
class ShowSettings:
    """Before a run"""

    show: int = setting(
        0,
        "print so many documents as tokens, what of them is learnt, and what a step needs; train nothing",
        at_least=0,
    )


@dataclass(frozen=True)
class TrainSettings(
    ParallelSettings,
    DeviceSettings,
    LogSettings,
    SaveSettings,
    EvaluationSettings,
    MuonSettings,
    OptimizerSettings,
    ScheduleSettings,
    LossSettings,
    DistillationSettings,
    ActivationSettings,
    KernelSettings,
    LoraSettings,
    InitSettings,
    ModelSettings,
    DepthSettings,
    DataSettings,
    ShowSettings,
    RunSettings,
):
    """
    usage: python train.py [config.py ...] [--name=value ...]

    Train a GPT on a prepared set. Config files are Python (run as your own code) and set the names below; the
    command line comes last. On several GPUs: torchrun --nproc_per_node=8 train.py ...
    """


@report_once
def main(argv):
    given = read_given(TrainSettings, argv)
    config = fill(TrainSettings, given)
    if config.show:  # nothing is written
        config = replace(config, eval_only=True)
    if not config.eval_only:  # a long run goes on where nobody reads its output
        errors.output_may_be_lost()
    stopped = False
    # Handlers outlive the process group, which may still report a lost rank.
    with (
        StopSignals(not config.eval_only) as stop,
        join_world(config) as world,
        own_folder(config, world) as folder,
    ):
        config, start_checkpoint = resolve_start(config, given, world)
        require_run_of("train.py", config, start_checkpoint)
        require_lora(config, given, start_checkpoint)
        if config.show:
            return show(config, start_checkpoint, world)
        with out_of_memory_as(f"out of memory on {world.device}: {smaller_batch(config)}"):
            run = set_up(config, given, start_checkpoint, world, folder)
            with run.log.bar:  # closed before an error is printed
                if config.eval_only:
                    run.evaluate()
                else:
                    stopped = train(run, stop)
    if stopped and stop.received == signal.SIGINT:
        sys.exit(130)


def show(config, start_checkpoint, world):
    """Print documents of the set, and what is trained, in what memory."""
    from kqv.measuring import plan  # slow imports: only for this
    from kqv.text import showing

    require_divisible(config, world)
    data = Dataset(config.dataset)
    dtype, compiled = find_dtype(config.dtype, world.device), find_compile(config.compile, world.device)
    config, gpt = build_model(config, start_checkpoint, data)
    teacher = load_teacher(config, data)
    share = config.gradient_accumulation_steps // world.size
    if world.is_main:
        showing.show(data, config.show)
        errors.say(f"{parameters_in_words(gpt)}, {tokens_per_step(config):,} tokens a step")
        job = plan.job_of_run(config, gpt, world, dtype, compiled, share, config.block_size)
        errors.say(plan.memory_in_words(job) + (f"; without the {teacher}" if teacher else ""))


def train(run, stop):
    """Train until max_iters, or until a signal asks to stop. Returns whether one did."""
    while True:
        stopping = run.agree_to_stop(stop)
        if run.evaluation_due() and not stopping:
            run.evaluate()
        if run.save_due(stopping):
            run.save(stopping)
        if run.finished or stopping:
            break
        learning_rate = set_learning_rates(run.state.optimizer, run.state.step, run.config)
        numbers = train_step(
            run.parallel_model, run.state, run.batches(), run.config, run.world, run.autocast
        )
        run.end_step(numbers, learning_rate)
    run.close(stopping, stop)
    return stopping


def set_up(config, given, start_checkpoint, world, folder=None):
    """
    The TrainingRun that `config` describes. `given` has the settings that the user gave. `start_checkpoint`
    has the contents of the checkpoint to start from, None: from scratch. It is emptied: the run has copies.
    `folder` is the OwnFolder to save in.
    """
    require_divisible(config, world)
    device = world.device.type if world.size > 1 else str(world.device)
    config = replace(config, device=device)  # so that a checkpoint says where it was made
    about_threads = choose_threads(config, start_checkpoint, world)  # before wandb starts processes
    config, wandb_run = start_tracking(config, start_checkpoint, world)
    dtype = find_dtype(config.dtype, world.device)
    compiled = find_compile(config.compile, world.device)
    data = Dataset(config.dataset)
    require_same_start(config, start_checkpoint, data, dtype, world)
    asked = config
    config, gpt = build_model(config, start_checkpoint, data)
    warnings = *overruled(asked, config), *odd_learning_rates(config), *data.left_out(config.block_size)
    for line in (*warnings, *changed_loss(config, start_checkpoint, data.tokenizer)):
        errors.warn(line)
    set_precision(config, world.device)
    teacher = None if config.eval_only else load_teacher(config, data)
    world.require_same({"the teacher": teacher.sha256 if teacher else ""})
    objective = make_objective(gpt, config, data, world.device, dtype, teacher)
    model = world.place(objective, gpt.transformer.h, config.parallel, dtype)
    sharded = is_sharded(model)
    state = start_state(config, gpt, start_checkpoint, dtype, world)
    for line in other_teacher(teacher, config, start_checkpoint):
        errors.warn(line)
    state.teacher = teacher.sha256 if teacher else ""
    if config.init_from == "resume" and (line := adopt_best(state, config, world)):
        errors.warn(line)
    evaluated = state.evaluated
    names = state.begin_anew(belongs_to(data, config), changed_settings(config, start_checkpoint))
    if compiled and sharded:
        compile_blocks(gpt)
    if config.activation_checkpointing:
        checkpoint_activations(gpt)
    model = torch.compile(model) if compiled else model

    log = Log(config, world, state, evaluated, dtype, wandb_run)
    how = [str(dtype).removeprefix("torch.")]
    how += ["fsdp" if sharded else "ddp"] * (world.size > 1) + ["compiled"] * compiled
    how += [str(teacher)] * bool(teacher)
    how += [threads.named(torch.get_num_threads())] * (world.device.type == "cpu")
    said = uses_of_training(config), forgotten(names, config)
    lines = start_lines(config, given, world, start_checkpoint, *said)
    log.start(state, config, world, how, (*about_threads, *lines))
    if start_checkpoint:
        start_checkpoint.clear()
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    saver = make_saver(config, world, sharded, state, folder)
    wandb_id = wandb_run.id if wandb_run else None
    return TrainingRun(config, world, data, model, world.wrap(model), state, autocast, log, saver, wandb_id)
