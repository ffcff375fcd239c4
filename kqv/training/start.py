"""From settings to the model that a run trains."""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from kqv import threads
from kqv.errors import UsageError, UserError
from kqv.formats import base, checkpoint, loading, resize, size
from kqv.formats.contents import padded, require_agreement
from kqv.settings import fill, group, refuse, setting
from kqv.text.names import folder_of, require_in_data
from kqv.training.depth import settings_of_depth
from kqv.training.lora import settings_of, start_adapter
from model import GPT, GPTConfig


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    out_dir: str = setting("out", "folder for checkpoints and metrics.jsonl", path=True)
    init_from: str = setting(
        "scratch",
        "scratch, resume, auto (resume if there is a checkpoint, else scratch), smollm2, gpt2, "
        "gpt2-medium|large|xl, a checkpoint, a GGUF file or a Hugging Face folder",
        path=True,
    )
    seed: int = setting(
        1337, "decides the initial weights, the batches and the dropout", at_least=0, below=2**63
    )
    eval_only: bool = setting(False, "evaluate once and stop")
    deterministic: bool = setting(
        False, "bit-for-bit repeatable: on a GPU at some cost in speed, on a CPU beside other work"
    )


# A field that GPTConfig gains is a setting here. (block_size is among the settings of the data.)
ModelSettings = group(
    "ModelSettings", "Model", GPTConfig, without=("block_size", "vocab_size", "dropout"), bias=False
)


@dataclass(frozen=True)
class InitSettings:
    """Initial weights"""

    zero_projections: bool = setting(False, "each block begins by adding nothing to the residual stream")
    embedding_std: float = setting(0.02, "standard deviation of the token embeddings", at_least=0.0)


@dataclass(frozen=True)
class ActivationSettings:
    """Activations"""

    dropout: float = setting(0.0, "share of activations dropped in training", at_least=0.0, below=1.0)
    activation_checkpointing: bool = setting(
        False, "compute each block again in the backward pass: much less memory, about a third more time"
    )


# The settings that weights decide: all of GPTConfig but the tokenizer's part of it, and dropout.
ARCHITECTURE = tuple(field.name for field in fields(GPTConfig) if field.name not in ("vocab_size", "dropout"))

# The run's task and place are new at each start; a resumed run takes all other settings from its checkpoint.
TASK = ("out_dir", "init_from", "base", "eval_only", "show", "reward")
PLACE = ("device", "backend", "timeout_minutes")  # in use before a checkpoint is read

# old name in a checkpoint -> name
RENAMED = {"sampling": "data_order"}


# Settings of a run


def resolve_start(config, given, world):
    """
    (settings, start_checkpoint): the contents of the checkpoint that the run starts from, or None, and the
    settings. `config` has those that were `given`, and the program's defaults. The shape of the weights and,
    on resume, the checkpoint's settings replace these defaults. Raises UserError.
    """
    newest = Path(config.out_dir) / checkpoint.NEWEST
    if config.init_from == "auto":
        found = newest.exists() or (newest.parent / checkpoint.PREVIOUS).exists()
        config = replace(config, init_from="resume" if found else "scratch")
    if config.init_from == "scratch":
        if config.depth:
            config = fill(type(config), given, settings_of_depth(config, given, world.size))
            config = replace(config, init_from="scratch")
        return config, None
    if config.init_from == "resume":
        start_checkpoint = loading.load(newest, mapped=world.size > 1)
        saved = saved_settings(start_checkpoint)
        require_same_depth(config, given, saved)
        if "dataset" in saved and "dataset" not in given:
            require_in_data(saved["dataset"])
        defaults = {name: value for name, value in saved.items() if name not in PLACE}
        found = {**shape_of(start_checkpoint), **settings_of(start_checkpoint)}
        start_checkpoint = base.moved(start_checkpoint, newest, config.base)
        config = fill(type(config), given, {**defaults, **found})
        return replace(config, init_from="resume"), start_checkpoint
    refuse(given, ("depth", "tokens_per_parameter"), "for weights to start from")
    if replaces(config, config.init_from):
        raise UsageError(
            f"out_dir={config.out_dir} holds the weights to start from: use another --out_dir, "
            "or go on with that run by --init_from=resume"
        )
    start_checkpoint = loading.load_start(config.init_from, words=("scratch", "resume", "auto"))
    start_checkpoint = base.moved(start_checkpoint, config.init_from, config.base)
    return fill(type(config), given, shape_of(start_checkpoint)), start_checkpoint


def replaces(config, source):
    """Whether a run saves where the weights `source` are: in out_dir, or in the folder that has this file."""
    # resolve() would raise an error for links in a circle.
    place, out_dir = (Path(os.path.realpath(path)) for path in (source, config.out_dir))
    return out_dir in (place, place.parent) and not config.eval_only


def require_run_of(command, config, start_checkpoint):
    """Raise UsageError where the run to resume is one of another command than train.py or tune.py."""
    if config.init_from != "resume":
        return
    made_by = "tune.py" if "history" in start_checkpoint else "train.py"
    if made_by != command:
        raise UsageError(
            f"{config.out_dir} holds a run of {made_by}: resume it by {made_by}, or begin anew from its "
            f"weights by --init_from={config.out_dir}/{checkpoint.NEWEST} and another --out_dir"
        )


def require_same_depth(config, given, saved):
    """Raise UsageError for another depth, or budget, than that of the run to go on with."""
    for name in ("depth", "tokens_per_parameter"):
        if name in given and getattr(config, name) != saved.get(name, 0):
            raise UsageError(
                f"{given[name]}, but the run in {config.out_dir} has {saved.get(name, 0)}: leave it out, or "
                "use --init_from=scratch"
            )


def shape_of(contents):
    """The settings that a checkpoint's weights decide; {} where its `model_args` are not valid."""
    try:
        shape = checkpoint.shape_in(contents["model_args"])
    except (ValueError, TypeError):
        return {}  # loading.model_of raises the error
    return {name: getattr(shape, name) for name in ARCHITECTURE}


def saved_settings(contents):
    """The settings in a checkpoint's contents, without those of its task, under today's names."""
    settings = contents.get("config", {})
    return {RENAMED.get(name, name): value for name, value in settings.items() if name not in TASK}


def require_divisible(config, world):
    """Raise UsageError where the processes can't share a step's micro-batches equally."""
    if config.gradient_accumulation_steps % world.size:
        raise UsageError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts all processes, so it "
            f"must be divisible by their number, {world.size}"
        )


def require_same_start(config, start_checkpoint, data, dtype, world):
    """Raise UserError where the processes do not start the same run."""
    if world.size == 1:  # and need not read so much of its data
        return
    world.require_same(
        {
            **asdict(config),
            "the step to go on from": start_checkpoint.get("iter_num") if start_checkpoint else 0,
            f"the content of {folder_of(config.dataset)}": data.fingerprint(),
            "the precision": dtype,
            "torch": torch.__version__,
        }
    )


# The model


def build_model(config, start_checkpoint, data):
    """
    (settings, model): the GPT to train, on the CPU, new or with a checkpoint's weights, and the settings with
    the architecture that it has. Raises UserError where weights, settings and data do not fit together.
    """
    if start_checkpoint is None:
        data.require_length(config.block_size)  # before a model of that size is built
        gpt = new_model(config, data.tokenizer.vocab_size)
    else:
        gpt = model_of_checkpoint(config, start_checkpoint)
        new_ids = require_tokenizer(config, start_checkpoint, gpt, data.tokenizer)
        config = start_adapter(config, start_checkpoint, gpt, new_ids)
    config = replace(config, **{name: getattr(gpt.config, name) for name in architecture_of(config)})
    data.require_length(config.block_size)
    return config, gpt.train()


def new_model(config, vocab_size):
    """A GPT with random weights. Raises UsageError for a shape that can't be."""
    shape = {name: getattr(config, name) for name in (*ARCHITECTURE, "dropout")}
    try:
        shape = GPTConfig(vocab_size=padded(vocab_size), **shape)
        if excess := size.excess(shape):
            raise ValueError(f"{excess}: make one of them smaller")
        torch.manual_seed(config.seed)
        return initialised(GPT(shape), config)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


@torch.no_grad()
def initialised(gpt, config):
    """The GPT, whose initial weights are GPT-2's, with those that the settings ask for."""
    if config.embedding_std != 0.02:
        gpt.transformer.wte.weight.mul_(config.embedding_std / 0.02)
    for name, parameter in gpt.named_parameters():
        if config.zero_projections and name.endswith("c_proj.weight"):
            parameter.zero_()
    return gpt


def model_of_checkpoint(config, contents):
    """
    The GPT in a checkpoint's contents, cropped to a shorter block_size in a new run. Raises UserError where
    there is none, and UsageError where a resumed run asks for another architecture.
    """
    resumes = config.init_from == "resume"
    path = Path(config.out_dir, checkpoint.NEWEST) if resumes else config.init_from
    build = loading.adapted_model_of if resumes and "base" in contents else loading.model_of
    gpt = build(contents, path, config.dropout)
    if not resumes and config.block_size < gpt.config.block_size:
        resize.crop_block_size(gpt, config.block_size)
    if resumes and (differing := unlike(config, gpt.config)):
        raise UsageError(
            f"{differing[0]}, but the run in {config.out_dir} has {differing[1]}: leave it out, or use "
            "--init_from=scratch"
        )
    return gpt


def architecture_of(config):
    """{name: value} of the architecture's settings that a command has. (tune.py has block_size alone.)"""
    return {name: getattr(config, name) for name in ARCHITECTURE if hasattr(config, name)}


def unlike(asked, found):
    """The settings of the architecture in which two configs differ, as text of each; () if in none."""
    names = [name for name, value in architecture_of(asked).items() if value != getattr(found, name)]
    return names and tuple(
        ", ".join(f"{name}={getattr(one, name)}" for name in names) for one in (asked, found)
    )


def require_tokenizer(config, contents, gpt, tokenizer):
    """
    Make room in `gpt` for the marks of a chat's tokenizer, if its base is the one that the checkpoint's
    weights know. Returns how many of the last ids the weights did not know. Raises UserError for any other
    tokenizer than theirs.
    """
    definition = tokenizer.to_json()
    known = contents.get("tokenizer", definition)
    of_texts = definition.get("base")
    weights = config.out_dir if config.init_from == "resume" else config.init_from
    if of_texts and known == of_texts:
        torch.manual_seed(config.seed)
        rows, needed = gpt.config.vocab_size, tokenizer.vocab_size
        resize.grow_vocab_size(gpt, rows if needed <= rows else padded(needed))
        ids = tokenizer.base.vocab_size
        return gpt.config.vocab_size - ids if needed > ids else 0
    if known != definition:
        theirs = known["kind"]
        raise UserError(
            f"{folder_of(config.dataset)} was made with another tokenizer ({tokenizer.kind}, "
            f"{tokenizer.vocab_size} ids) than the weights of {weights} know ({theirs}, "
            f"{gpt.config.vocab_size} ids): prepare it with theirs, as by --tokenizer={weights}"
        )
    require_agreement(contents, weights, gpt.config.vocab_size, tokenizer.vocab_size)
    return 0


def choose_threads(config, start_checkpoint, world):
    """Set how many threads compute on a CPU -> lines about it. A resumed run has as many as before."""
    saved = start_checkpoint.get("threads") if config.init_from == "resume" else None
    return threads.choose(world.device, saved, config.deterministic)


def smaller_batch(config):
    """
    What to try when memory is short: the next smaller micro-batch, with the accumulation that keeps the
    total.
    """
    again = "" if config.activation_checkpointing else "--activation_checkpointing=True or "
    if config.batch_size == 1:
        return f"batch_size is 1 already, so try {again}a smaller --block_size, --n_layer or --n_embd"
    smaller = next(size for size in range(config.batch_size // 2, 0, -1) if config.batch_size % size == 0)
    steps = config.gradient_accumulation_steps * config.batch_size // smaller
    return f"try {again}--batch_size={smaller} --gradient_accumulation_steps={steps}"
