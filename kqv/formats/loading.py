"""
What a user names, a run, a checkpoint, a folder or a model on the hub -> its weights, model and tokenizer.

All weights come in one form, the contents of a checkpoint: a dict with `model` {parameter name: tensor},
`model_args` (fields of GPTConfig), and, where they are known, `tokenizer`, `config` and more. Of an adapter,
`model` has only what it has learnt, and `base` says beside which weights: `model_of` reads and merges them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from kqv.errors import UserError, warn
from kqv.formats import base, gguf_reading, huggingface, lora, resize, size
from kqv.formats.checkpoint import (
    BEST,
    NEWEST,
    PREVIOUS,
    REST,
    is_checkpoint,
    plain_weights,
    read,
    shape_in,
    tie_head,
)
from kqv.formats.contents import require_agreement, require_contents
from kqv.formats.gguf_file import GGUFFile
from kqv.settings import setting
from kqv.text import names, token_files, tokenizers
from kqv.text.built_in import MODELS, model_file
from kqv.text.templated import over
from model import GPT


@dataclass(frozen=True)
class WeightsSettings:
    """Which weights"""

    out_dir: str = setting("out", "the folder of a training run", path=True)
    checkpoint: str = setting(
        "best", "best (lowest validation loss), newest, or the path of a file", path=True
    )
    init_from: str = setting(
        "resume",
        "resume: from out_dir; or smollm2, gpt2, gpt2-medium|large|xl, a GGUF file, a Hugging Face folder",
        path=True,
    )
    base: str = setting("", "where the base of an adapter is, if it is no more where it was", path=True)


UNUSED = (  # rows of `refuse_unused`: names of settings, when they mean nothing, and when in words
    (("out_dir", "checkpoint"), lambda c: c.init_from != "resume", "with --init_from, which names weights"),
    (("out_dir",), lambda c: c.checkpoint not in ("best", "newest"), "with --checkpoint=PATH"),
)


def load(path, mapped=False):
    """
    The contents of a checkpoint of kqv or nanoGPT, on the CPU. `path` is a file or a sharded model's folder;
    a folder's contents have whole weights, and `folder`, its path, instead of `optimizer`. `mapped`: of a
    file, only what is used takes memory.

    No code in a checkpoint is run. If ckpt.pt is damaged or missing and ckpt.prev.pt is not, the contents are
    those of ckpt.prev.pt, with a warning. Raises UserError if there is no checkpoint that can be read.
    """
    path = Path(path)
    try:
        return load_file(path, mapped)
    except UserError as error:
        previous = path.parent / PREVIOUS
        if path.name != NEWEST or not previous.exists():
            raise
        contents = load_file(previous, mapped)
        warn(f"{error}; using {previous}, of step {contents.get('iter_num', 'unknown')}")
        return contents


def load_file(path, mapped):
    """As `load`, but of `path` alone: ckpt.prev.pt does not take its place."""
    is_sharded = (path / REST).is_file()
    contents = load_folder(path) if is_sharded else read(path, mapped)
    if not is_checkpoint(contents):
        raise UserError(
            f"{path} is of another program: a checkpoint of kqv or nanoGPT has `model` and `model_args`"
        )
    require_contents(contents, path)
    contents["model"] = plain_weights(contents["model"], path)
    if "base" not in contents:
        tie_head(contents["model"], path, contents["model_args"].get("tied_head", True))
    return {**contents, "folder": path} if is_sharded else contents


def load_folder(path):
    """The contents of a sharded model's checkpoint, with its weights. Raises UserError."""
    from kqv.formats import sharded  # slow import: only for a sharded checkpoint

    rest = read(path / REST)
    sharded.require_metadata(path, rest.pop("metadata_sha256", None))
    return {**rest, "model": sharded.load_full(path, "model")}


def find(out_dir, which):
    """
    The path of a checkpoint: `which` is "best" or "newest" of the run in `out_dir`, or a path by itself. The
    newest serves as the best if there is no best.pt.
    """
    if which not in ("best", "newest"):
        return Path(which)
    best, newest = Path(out_dir) / BEST, Path(out_dir) / NEWEST
    return best if which == "best" and best.exists() else newest


def load_chosen(config):
    """(path or name, contents) of the weights that a WeightsSettings names. Raises UserError."""
    if config.init_from != "resume":
        path, contents = config.init_from, load_start(config.init_from)
    else:
        path = find(config.out_dir, config.checkpoint)
        contents = gguf_reading.load(path) if is_gguf(path) else load(path)
    return path, base.moved(contents, path, config.base)


def load_start(source, words=("resume",), what="init_from"):
    """
    The contents of `source`: a checkpoint, a run's folder (its best checkpoint), a GGUF file, a Hugging Face
    folder, a built-in model (smollm2), or one on the Hugging Face hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl
    or ORG/NAME. Raises UserError, with the `words` that the setting `what` takes besides, if it is none.
    """
    path = place_of(source)
    on_hub = source in huggingface.NAMES or (huggingface.HUB_ID.fullmatch(source) and not path.exists())
    if on_hub or (path / "config.json").exists():
        return huggingface.load(source)
    if not path.exists():
        known = ", ".join((*words, *MODELS, *huggingface.NAMES))
        raise UserError(f"{what}={source} is no file or folder, nor one of {known}")
    if is_gguf(path):
        return gguf_reading.load(path)
    return load(find(path, "best") if path.is_dir() and not (path / REST).exists() else path)


def tokenizer_at(source):
    """The tokenizer of what `load_start` takes; of a GGUF file without its weights. Raises UserError."""
    path = place_of(source)
    if is_gguf(path):
        return tokenizers.from_json(gguf_reading.tokenizer_in(GGUFFile(path)))
    return tokenizer_of(load_start(source))


def place_of(source):
    """The path that a user names, or that of a built-in model's file."""
    return model_file(source) if source in MODELS else Path(source)


def is_gguf(path):
    """Whether a file is in GGUF: by its name, or by its first bytes."""
    if path.suffix == gguf_reading.SUFFIX:
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def model_of(contents, path, dropout=None):
    """
    The GPT of a checkpoint's contents (`model`, `model_args`), with which it shares memory; `dropout`, if
    given, in place of its own. Of an adapter it is the merged model. Raises UserError, which names `path`, if
    the contents are not those of a GPT.
    """
    if "base" in contents:
        return lora.merge(adapted_model_of(contents, path, dropout))
    try:
        config = shape_in(contents["model_args"])
        if dropout is not None:
            config = replace(config, dropout=dropout)
        size.require_names(config, contents["model"])
        with size.fitting(config, path):
            return GPT.from_weights(config, contents["model"], copy=False)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no weights of a GPT: {error}") from None


def adapted_model_of(contents, path, dropout=None):
    """
    The adapted GPT, not merged, of an adapter's contents: its base is read from where `base` says. Raises
    UserError where that is missing or another, or the adapter does not fit it.
    """
    about, weights = contents["base"], contents["model"]
    source = about["source"]
    try:
        found = load_start(source, (), "base")
    except UserError as error:
        raise UserError(f"the base of {path} can't be read: {error}; --base=PATH names its place") from None
    base.require_whole(found, source, f"it can't be the base of {path}")
    gpt = model_of(found, source, dropout)
    base.require_same(found, source, about["sha256"], path)
    try:
        shape = shape_in(contents["model_args"])
        new_ids = len(weights.get("transformer.wte.new_rows", ()))
        resize.to_shape(gpt, shape, new_ids)
        gpt.base = about
        return lora.adapt_as_saved(gpt, weights, about["alpha"], new_ids).eval()
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no adapter of {source}: {error}") from None


def pair_of(contents, path, build=model_of):
    """
    (GPT, tokenizer) of a checkpoint's contents, as `build` and `tokenizer_of` make them. Raises UserError
    where they do not belong together.
    """
    gpt, tokenizer = build(contents, path), tokenizer_of(contents)
    require_agreement(contents, path, gpt.config.vocab_size, tokenizer.vocab_size)
    return gpt, tokenizer


def tokenizer_of(contents):
    """
    The tokenizer of a checkpoint's contents; that of conversations for a model of another program that brings
    a chat template. nanoGPT's checkpoints have none: then it is the one of the data folder that the model was
    trained on, or GPT-2's if the number of ids is GPT-2's. Raises UserError.
    """
    if "tokenizer" in contents:
        tokenizer = tokenizers.from_json(contents["tokenizer"])
        brings_template = "from_huggingface" in contents and getattr(tokenizer, "chat_template", None)
        return over(tokenizer) if brings_template else tokenizer
    dataset = contents.get("config", {}).get("dataset", "unnamed")
    folder = Path("data", Path(dataset).name)  # no path in a checkpoint is followed
    if names.is_in_data(folder) and token_files.is_set(folder):
        return token_files.read_meta(folder).tokenizer
    if "from_huggingface" in contents:
        source = contents["from_huggingface"]
        raise UserError(
            f"{source} has weights, but no tokenizer (a tokenizer.json): save it there too, as with "
            f"tokenizer.save_pretrained({str(source)!r})"
        )
    vocab_size = contents["model_args"].get("vocab_size")
    if vocab_size in (50257, 50304):
        return tokenizers.GPT2Tokenizer()
    raise UserError(
        f"the checkpoint has no tokenizer, nor has {folder} for its {vocab_size} ids: put its meta.pkl there"
    )
