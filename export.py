"""A trained model for other programs: a Hugging Face folder, or a GGUF file for llama.cpp."""

import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from kqv.errors import UsageError, UserError, first_line, run
from kqv.files import remove, sync_folder
from kqv.formats import gguf, huggingface, loading
from kqv.formats.card import card
from kqv.formats.loading import WeightsSettings
from kqv.settings import parse, setting

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TargetSettings:
    """What to write"""

    format: Literal["hf", "gguf"] = setting("hf", "hf: a Hugging Face folder; gguf: a file for llama.cpp")
    to: str = setting("", "the folder or file to write; an earlier export there is replaced")
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = setting("f32", "how weights are kept; q8_0: gguf alone")


@dataclass(frozen=True)
class ExportSettings(TargetSettings, WeightsSettings):
    """
    usage: python export.py --out_dir=out/plays_char --to=DIR [--format=gguf] [--name=value ...]

    Write a trained model and its tokenizer for transformers or llama.cpp. The other way round, train.py and
    sample.py read a Hugging Face folder with --init_from=DIR.
    """


def main(argv):
    config = parse(ExportSettings, argv)
    if not config.to:
        raise UsageError("--to is missing: name the folder (hf) or file (gguf) to write, as --to=exported")
    if config.format == "hf" and config.dtype == "q8_0":
        raise UsageError("--dtype=q8_0 is for --format=gguf: a Hugging Face folder has f32, f16 or bf16")
    target = Path(config.to).resolve()
    require_free(target, config)
    path, contents = loading.load_chosen(config)
    gpt = loading.model_of(contents, path)
    tokenizer = loading.tokenizer_of(contents)
    weights = exported(gpt, tokenizer)
    shape = {**asdict(gpt.config), "vocab_size": tokenizer.vocab_size}
    size = f"{gpt.num_parameters() / 1e6:.2f}M parameters"
    try:
        with replacing(target) as beside:
            if config.format == "hf":
                beside.mkdir()
                weights = {name: weight.to(DTYPES[config.dtype]) for name, weight in weights.items()}
                text = card(target.name, contents, shape, size, tokenizer)
                huggingface.save(beside, weights, shape, tokenizer, text)
            else:
                weights = huggingface.with_biases(weights)
                gguf.save(beside, target.stem, weights, shape, tokenizer, config.dtype)
    except OSError as error:
        raise UserError(f"{config.to} can't be written: {error.strerror or first_line(error)}") from None
    print(f"wrote {config.to}: {size}, {config.dtype}, tokenizer {tokenizer.kind}")


def require_free(target, config):
    """Raise UserError where something is in the way that no export has written."""
    if config.format == "hf":
        free = not target.exists() or target.is_dir() and not any(target.iterdir())
        ours = target.is_dir() and huggingface.is_our_export(target)
    else:
        free = not target.exists()
        ours = target.is_file() and gguf.is_our_export(target)
    if not free and not ours:
        raise UserError(f"{config.to} holds something else than an earlier export: name another --to")


def exported(gpt, tokenizer):
    """The weights without the rows that pad the vocabulary, whose ids stand for nothing."""
    V = tokenizer.vocab_size
    if gpt.config.vocab_size < V:
        raise UserError(f"the tokenizer has {V} ids, but the weights are for {gpt.config.vocab_size}")
    weights = gpt.state_dict()
    rows = weights["lm_head.weight"][:V]  # (V, C)
    return {**weights, "lm_head.weight": rows, "transformer.wte.weight": rows}


@contextmanager
def replacing(target):
    """
    A path beside `target` for what is to take its place, a file or a folder: it does so when all of it is on
    disk, and otherwise leaves no trace.
    """
    beside, earlier = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(beside)
    try:
        yield beside
        for path in sorted(beside.iterdir()) if beside.is_dir() else [beside]:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if target.is_dir():  # a folder with content can't be replaced in one step
            os.replace(target, earlier)
        os.replace(beside, target)
        sync_folder(target.parent)
        remove(earlier)
    finally:
        remove(beside)


if __name__ == "__main__":
    run(main)
