"""What a run says when it begins: what became of its settings, what it forgets and what it replaces."""

from dataclasses import asdict, fields
from pathlib import Path

from kqv.formats import checkpoint
from kqv.text.names import folder_of
from kqv.training.muon import MuonSettings
from kqv.training.schedule import UNUSED, last_learning_rate
from kqv.training.start import saved_settings, unlike

SCHEDULE = "schedule", "warmup_iters", "cooldown_iters", "lr_decay_iters", "min_lr"
MUON = tuple(field.name for field in fields(MuonSettings))


def start_lines(config, given, world, start_checkpoint, uses, forgotten):
    """
    What a run says of its settings and its folder when it begins, as lines. `uses` are those of its command,
    see unused_settings, and `forgotten` lines about what a resumed run has forgotten.
    """
    if changed := changed_settings(config, start_checkpoint):
        yield f"changed: {', '.join(f'{name} {change}' for name, change in changed.items())}"
    if start_checkpoint and "base" in start_checkpoint and not config.lora_rank:
        yield f"{config.init_from} is an adapter, merged into its base: all weights are trained"
    if unused := unused_settings(config, given, world, uses):
        yield f"not used: {', '.join(unused)}"
    if config.init_from == "resume" and not config.eval_only:
        if (step := int(start_checkpoint["iter_num"])) >= config.max_iters:
            yield f"no step is left: the run is at step {step}; to train on, --max_iters=N with a larger N"
    yield from forgotten
    if line := what_is_replaced(config):
        yield line


def changed_settings(config, start_checkpoint):
    """What a resumed run has changed: {name of a setting: "before -> now"}."""
    if config.init_from != "resume":
        return {}
    before, now = saved_settings(start_checkpoint), asdict(config)
    if before.get("device") == "auto":  # older checkpoints do not say where they were
        before["device"] = now["device"]
    changed = (name for name in now if name in before and before[name] != now[name])
    return {name: f"{before[name]} -> {now[name]}" for name in changed}


def unused_settings(config, given, world, uses):
    """
    The settings that were given but that this run has no use for, as "name (why)" each. `uses`, of the
    command, as here: {why: (whether they are used, names)}.
    """
    uses = {
        "decay_lr is False": (config.decay_lr, SCHEDULE),
        f"schedule is {config.schedule}": (not config.decay_lr, UNUSED[config.schedule]),
        "optimizer is adamw": (config.optimizer == "muon", MUON),
        "wandb_log is False": (config.wandb_log, ("wandb_project", "wandb_run_name", "wandb_resume")),
        "it is one process": (world.size > 1, ("parallel", "backend", "timeout_minutes")),
        **uses,
    }
    reasons = {name: why for why, (used, names) in uses.items() if not used for name in names}
    return [f"{name} ({why})" for name, why in reasons.items() if name in given]


def uses_of_training(config):
    """What train.py adds to the table of unused_settings."""
    return {
        "the head is the embedding": (not config.tied_head, ("head_learning_rate",)),
        "no teacher is named": (config.teacher, ("distill_weight", "distill_temperature")),
        "distill_weight is 0": (config.distill_weight, ("teacher", "distill_temperature")),
    }


def forgotten(names, config):
    """A line for each number that a resumed run has forgotten, see TrainingState.begin_anew."""
    if "best_val_loss" in names:
        yield (
            f"the best validation loss so far, {names['best_val_loss']:.4f}, was not measured on what is "
            f"evaluated now, windows of {folder_of(config.dataset)}: the best begins anew"
        )
    if names.get("windows") and config.data_order == "epoch":
        yield f"the epoch begins anew, since {folder_of(config.dataset)} was not read in this order before"


def what_is_replaced(config):
    """What a new run does with the checkpoints of another one in its out_dir, as a line; none: ""."""
    found = [name for name in (checkpoint.NEWEST, checkpoint.BEST) if Path(config.out_dir, name).exists()]
    if not found or config.init_from == "resume" or config.eval_only:
        return ""
    old = [f"{Path(name).stem}.old.pt" for name in found]
    become = "they become" if len(found) > 1 else "it becomes"
    return (
        f"{config.out_dir} has another run's {' and '.join(found)}: at this run's first save {become} "
        f"{' and '.join(old)}"
    )


# Warnings


def overruled(asked, found):
    """A line where the settings that were asked for are not those of the weights found."""
    if differing := unlike(asked, found):
        yield (
            f"{differing[0]} is not used: the weights of {found.init_from} have {differing[1]}; "
            "--init_from=scratch makes a model of any shape"
        )


def odd_learning_rates(config):
    """A line for a schedule that never reaches learning_rate, or rises where it should fall."""
    if not config.decay_lr or config.eval_only:
        return
    if config.warmup_iters > config.max_iters > 0:
        yield (
            f"the learning rate never reaches {config.learning_rate}: warmup_iters={config.warmup_iters:g} "
            f"is longer than the run, max_iters={config.max_iters}: try --warmup_iters="
            f"{config.max_iters // 10}"
        )
    elif last_learning_rate(config) > config.learning_rate:
        yield (
            f"the learning rate rises to min_lr={config.min_lr}, as learning_rate={config.learning_rate} is "
            "below it: leave min_lr out for a tenth of the learning rate"
        )
