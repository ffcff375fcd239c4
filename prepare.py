"""Text -> token files: what `train.py` reads, in data/<name>."""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kqv.errors import UsageError, UserError, say, warn
from kqv.settings import fill, read_given, setting
from kqv.text import dataset, documents, encoding, learning, names, showing, sources, token_files, tokenizers
from kqv.text.built_in import BUILT_IN, MODELS
from kqv.text.tokenizers import TOKENIZERS
from kqv.text.utf8 import ROW

MB = 2**20

RULES = 2  # the version of how text is read; a set of another version is made again


@dataclass(frozen=True)
class PrepareSettings:
    __doc__ = f"""
usage: python prepare.py SOURCE [SOURCE ...] [--name=value ...]

Turn text into the token files that train.py reads, in data/<name>. A SOURCE is

{sources.listing()}

A row of a table or an object of JSON has a text; or it is a conversation, with messages, or with a prompt and
its completion. Only the answers of a conversation are learnt. Several sources make one set, which needs a
--name. Line ends \\r\\n and \\r become \\n. Text is in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

The --tokenizer is

{tokenizers.listing()}

If it was stopped, the same command goes on from what was finished.
"""

    sources: tuple[str, ...] = ()
    tokenizer: str = setting(
        names.USUAL,
        f"{', '.join(cls.spelling for cls in TOKENIZERS.values())}; or a set or checkpoint to take it from",
        path=True,
    )
    unknown: Literal["error", "skip"] = setting("error", "what to do with characters the tokenizer lacks")
    name: str = setting("", "the set's name; empty: the source's")
    text_column: str = setting(documents.TEXT, "the column of the text, in tables and JSON")
    val: str = setting("", "a file, folder or hf:NAME for validation; empty: a share of the text", path=True)
    val_fraction: float = setting(0.1, "share of the text for validation", at_least=0.0, below=1.0)
    max_row_mb: int = setting(
        ROW // MB, "the longest line, or row of a table or JSON, in MB; it is held in memory", at_least=1
    )
    show: int = setting(
        0, "print so many documents as tokens, what is learnt of conversations in colour", at_least=0
    )
    workers: int = setting(0, "processes that encode; 0: one a core. The result is the same", at_least=0)


def main(argv):
    config = read_settings(argv)
    existing_tokenizer = find_tokenizer(config.tokenizer)
    new_tokenizer = None if existing_tokenizer else tokenizers.by_name(config.tokenizer)
    name = config.name or names.default_name(config.sources, config.tokenizer)
    names.require_name(name)
    folder = Path("data") / name
    row = config.max_row_mb * MB
    source = sources.Source(config.sources, config.text_column, config.val_fraction, config.val, row)
    about = {
        "rules": RULES,
        "source": list(config.sources),
        "text_column": config.text_column,
        "cut": source.cut,
        "val_fraction": source.val_fraction,
        "val": config.val,
        "made_with": existing_tokenizer.to_json() if existing_tokenizer else config.tokenizer,
        "unknown": config.unknown,
    }
    if is_prepared(folder, about, source):
        say(f"{folder} is ready: the same text and tokenizer as before")
        show(folder, config.show)
        return
    tokenizer = learning.tokenizer_for(source, existing_tokenizer, new_tokenizer)
    encoding.write_set(folder, source, tokenizer, about, config.unknown, config.workers)
    report(folder, tokenizer)
    report_changes(source, tokenizer)
    show(folder, config.show)
    say(f"train on it with: python train.py --dataset={shlex.quote(name)}")


def read_settings(argv):
    """The settings. The defaults are those of the built-in set, if it has its own. Raises UsageError."""
    given = read_given(PrepareSettings, argv)
    config = fill(PrepareSettings, given)
    if "name" in given:
        names.require_name(config.name)
    if config.val and "val_fraction" in given:
        raise UsageError(f"{given['val']} and {given['val_fraction']}: a set has one of them")
    if not config.sources:
        raise UsageError(
            f"no source: python prepare.py plays, or another of {', '.join(BUILT_IN)}, or text files"
        )
    built_in = next((name for name in config.sources if name in BUILT_IN), None)
    if not built_in:
        return config
    if len(config.sources) > 1:
        other = next(name for name in config.sources if name != built_in)
        raise UsageError(f"{built_in} is a whole set by itself: prepare {other} apart, with its own --name")
    return fill(PrepareSettings, given, saved=BUILT_IN[built_in].settings)


def find_tokenizer(name):
    """
    The tokenizer of the prepared set, the checkpoint, the folder with weights or the built-in model that is
    called `name`; None where there is none. Raises UserError.
    """
    path = Path(name)
    if not name or name in TOKENIZERS:
        return None
    if token_files.is_set(path):
        return token_files.read_meta(path).tokenizer
    if not path.exists() and name not in MODELS:
        return None
    from kqv.formats import loading  # slow: it loads torch

    return loading.tokenizer_at(name)


def is_prepared(folder, about, source):
    """Whether the folder has exactly this set, complete."""
    try:
        dataset.Dataset(folder)
        meta = json.loads((folder / token_files.META).read_text("utf-8"))
    except (UserError, OSError):
        return False
    if {name: meta.get(name) for name in about} != about:
        return False
    if source.is_on_hub:  # it would have to be downloaded to compare its text
        return True
    return encoding.text_facts(source)["text_sha256"] == meta.get("sha256")


def show(folder, count):
    if count:  # else a large tokenizer would be read in vain
        showing.show(dataset.Dataset(folder), count)


def report(folder, tokenizer):
    meta = json.loads((folder / token_files.META).read_text("utf-8"))
    counts = ", ".join(f"{split} {count:,} tokens" for split, count in meta["tokens"].items())
    a_token = f", {sum(meta['bytes'].values()) / sum(meta['tokens'].values()):.2f} bytes a token"
    documents = "conversations" if tokenizer.kind == "chat" else "documents"
    say(
        f"{folder}: {counts}, of {meta['documents']:,} {documents}; {tokenizer.kind} tokenizer with "
        f"{tokenizer.vocab_size:,} ids{a_token if meta['bytes'] else ''}"
    )


def report_changes(source, tokenizer):
    """Say what was done to the text."""
    if source.has_other_line_ends:
        print("line ends \\r\\n or \\r became \\n")
    if source.has_joints and tokenizer.separator is None:
        if encoding.joint_of(tokenizer, "\n"):
            print(
                f"a newline stands between documents, since the {tokenizer.kind} tokenizer has no end of text"
            )
        else:
            warn(
                f"documents run into each other: the {tokenizer.kind} tokenizer has neither an end of text "
                "nor a newline"
            )
