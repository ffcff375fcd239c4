"""A trained model for other programs: a Hugging Face folder, or a GGUF file for llama.cpp."""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kqv.errors import UsageError, UserError, first_line, say
from kqv.files import replacing
from kqv.formats import gguf, huggingface, loading, resize
from kqv.formats.loading import WeightsSettings
from kqv.formats.merging import merge_for
from kqv.formats.precision import require_numbers
from kqv.settings import fill, read_given, refuse_unused, setting

# A format is a module with HELP, SUFFIX, DTYPES, save(path, ...) and is_ours(path): whether an export may
# replace that path.
FORMATS = {"hf": huggingface, "gguf": gguf}
DTYPES = {  # dtype: the formats that have it
    dtype: [name for name, other in FORMATS.items() if dtype in other.DTYPES]
    for format in FORMATS.values()
    for dtype in format.DTYPES
}
OF_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx")  # endings of other formats' files
SPECIAL = [f"{dtype}: {' or '.join(names)} alone" for dtype, names in DTYPES.items() if names != [*FORMATS]]


@dataclass(frozen=True)
class TargetSettings:
    """What to write"""

    format: Literal[("auto", *FORMATS)] = setting(
        "auto",
        "; ".join(f"{name}: {format.HELP}" for name, format in FORMATS.items())
        + "; auto: what the name --to says, gguf for NAME.gguf, else hf",
    )
    to: str = setting("", "the folder or file to write; an earlier export there is replaced", path=True)
    dtype: Literal[tuple(DTYPES)] = setting("f32", "; ".join(["how weights are kept", *SPECIAL]))


@dataclass(frozen=True)
class ExportSettings(TargetSettings, WeightsSettings):
    """
    usage: python export.py --out_dir=out/plays_char --to=FOLDER or NAME.gguf [--name=value ...]

    Write a trained model and its tokenizer for transformers or llama.cpp. The other way round, train.py and
    sample.py read a Hugging Face folder with --init_from=DIR.
    """


def main(argv):
    given = read_given(ExportSettings, argv)
    config = fill(ExportSettings, given)
    refuse_unused(loading.UNUSED, config, given)
    if not config.to:
        raise UsageError("--to is missing: name the folder (hf) or file (gguf) to write, as --to=exported")
    require_utf8(config.to)
    format = format_of(config)
    if config.dtype not in format.DTYPES:
        *most, last = format.DTYPES
        raise UsageError(
            f"--dtype={config.dtype} is for --format={' or '.join(DTYPES[config.dtype])}: "
            f"{format.HELP} has {', '.join(most)} or {last}"
        )
    target = Path(config.to).resolve()
    if target.exists() and not format.is_ours(target):
        raise UserError(f"{config.to} holds something else than an earlier export: name another --to")
    path, contents = loading.load_chosen(config)
    is_adapter = "base" in contents
    build = loading.adapted_model_of if is_adapter else loading.model_of
    gpt, tokenizer = loading.pair_of(contents, path, build)
    merged = merge_for(config.dtype, gpt, path) if is_adapter else None
    if tokenizer.is_ours:  # the rows of others stay as they are
        gpt = resize.without_padding(gpt, tokenizer.vocab_size)
    require_numbers(gpt)
    if tokenizer.is_ours and tokenizer.separator is None:
        gpt = resize.with_end(gpt)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside:
            format.save(beside, target.name, gpt, tokenizer, config.dtype, contents)
    except OSError as error:
        raise UserError(f"{config.to} can't be written: {error.strerror or first_line(error)}") from None
    if merged:
        say(merged)
    size = f"{gpt.num_parameters() / 1e6:.2f}M parameters"
    say(f"wrote {config.to}: {size}, {config.dtype}, tokenizer {tokenizer.kind}")


def require_utf8(name):
    """Raise UsageError where a name is no UTF-8: other programs could not open what is called so."""
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeError:
        raise UsageError(f"--to={name} is no name in UTF-8, so other programs can't open it") from None


def format_of(config):
    """The format to write, by its name or by that of the target. Raises UsageError where they contradict."""
    suffix = Path(config.to).suffix.lower()
    said = next((name for name, format in FORMATS.items() if suffix and format.SUFFIX == suffix), None)
    name = (said or "hf") if config.format == "auto" else config.format
    format = FORMATS[name]
    if said not in (None, name) or suffix in OF_OTHERS or (format.SUFFIX and config.to.endswith("/")):
        raise UsageError(
            f"--to={config.to} is no name for {format.HELP} (--format={name}): name it as "
            f"--to=exported{format.SUFFIX}"
        )
    return format
