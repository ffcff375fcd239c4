"""Text -> token files: what `train.py` reads, in data/<name>."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kqv.errors import UsageError, UserError, run
from kqv.settings import parse, setting
from kqv.text import dataset, dataset_writer
from kqv.text.built_in import BUILT_IN
from kqv.text.dataset import SPLITS
from kqv.text.encoding import read_parts, tokenizer_maker, write_parts
from kqv.text.sources import Source
from kqv.text.tokenizers import KINDS


@dataclass(frozen=True)
class PrepareSettings:
    """
    usage: python prepare.py SOURCE [SOURCE ...] [--name=value ...]

    Turn text into the token files that train.py reads, in data/<name>. SOURCE is a built-in set (plays,
    shakespeare_char, shakespeare, plays_chat, addition, digits, translation, openwebtext, fineweb_edu,
    tinystories), or paths, folders and quoted globs of UTF-8 files: text (one document), .jsonl (one a line),
    .tsv (a prompt, a tab, its completion), each also as .gz, and .parquet (one a row). hf:ORG/NAME[:CONFIG]
    is a set on the Hugging Face hub, - is standard input. A row with messages, or a prompt and a completion,
    is a conversation, of which the answers are learnt.

    Stopped at any moment, the same command goes on with what was finished.
    """

    sources: tuple[str, ...] = ()
    tokenizer: str = setting(
        "char", "char, byte, gpt2, bpe:N (learns N ids), or a prepared set or checkpoint whose to take"
    )
    unknown: Literal["error", "skip"] = setting("error", "what becomes of characters the tokenizer lacks")
    name: str = setting("", "the set's name; empty: the source's")
    text_column: str = setting("text", "where a .jsonl or .parquet file has its text")
    val_fraction: float = setting(0.1, "share of the text for validation", at_least=0.0, below=1.0)
    workers: int = setting(0, "processes that encode; 0: one a core. The result is the same", at_least=0)


def main(argv):
    config = parse(PrepareSettings, argv)
    if not config.sources:
        raise UsageError(
            f"no source: python prepare.py plays, or another of {', '.join(BUILT_IN)}, or text files"
        )
    built_in = next((name for name in config.sources if name in BUILT_IN), None)
    if built_in and len(config.sources) > 1:
        other = next(name for name in config.sources if name != built_in)
        raise UsageError(f"{built_in} is a whole set by itself: prepare {other} apart, with its own --name")
    usual = BUILT_IN[built_in].settings if built_in else {}
    config = parse(PrepareSettings, argv, saved=usual)
    taken = taken_tokenizer(config.tokenizer)
    make_tokenizer = tokenizer_maker(config.tokenizer, taken)
    suffix = "" if config.tokenizer == usual.get("tokenizer", "char") else "_" + short(config.tokenizer)
    name = config.name or default_name(config.sources, built_in, suffix)
    folder = Path("data") / name
    source = Source(config.sources, config.text_column, config.val_fraction)
    about = {
        "source": list(config.sources),
        "text_column": config.text_column,
        "cut": source.cut,
        "val_fraction": config.val_fraction,
        "made_with": taken.to_json() if taken else config.tokenizer,
        "unknown": config.unknown,
    }
    if is_prepared(folder, about, source):
        print(f"{folder} is ready: the same text and tokenizer as before")
        return
    tokenizer = make_tokenizer(source)
    writer = dataset_writer.Writer(folder, tokenizer, about)
    try:
        write_parts(writer, source, tokenizer, config)
        finish(writer, tokenizer, config)
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error.strerror}): when it can, the same command goes on with what "
            "was finished"
        ) from None
    finally:
        writer.leave()
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    counts = ", ".join(f"{split} {count:,} tokens" for split, count in meta["tokens"].items())
    a_token = f", {sum(meta['bytes'].values()) / sum(meta['tokens'].values()):.2f} bytes a token"
    documents = "conversations" if tokenizer.kind == "chat" else "documents"
    print(
        f"{folder}: {counts}, of {meta['documents']:,} {documents}; {tokenizer.kind} tokenizer with "
        f"{tokenizer.vocab_size:,} ids{a_token if meta['bytes'] else ''}"
    )
    print(f"train on it with: python train.py --dataset={name}")


def finish(writer, tokenizer, config):
    """Put the set in place, with what is known of the whole text. Raises UserError where it is too short."""
    for split in SPLITS:
        count = sum(part["tokens"][split] for part in writer.parts)
        if count < 2:
            writer.parts.clear()
            raise UserError(
                f"the {split} split would have {count} tokens: give more text, or another --val_fraction "
                f"than {config.val_fraction}"
            )
    sizes = {split: sum(part["bytes"][split] for part in writer.parts) for split in SPLITS}
    last = writer.parts[-1]
    writer.finish(
        sha256=last["text_sha256"],
        documents=last["documents"],
        bytes={} if tokenizer.kind == "chat" else sizes,
    )


def default_name(paths, built_in, suffix):
    """The set's name where the user gives none. Raises UsageError where several files leave it open."""
    if built_in:
        return built_in + suffix
    if len(paths) > 1 or paths[0] == "-" or any(letter in paths[0] for letter in "*?["):
        raise UsageError("several files, or standard input, need a name for their set: --name=mytext")
    if paths[0].startswith("hf:"):
        return paths[0].removeprefix("hf:").rstrip("/").split("/")[-1].replace(":", "_") + suffix
    path = Path(paths[0]).resolve()
    return (path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem) + suffix


def short(tokenizer):
    """The name of a tokenizer as a part of a set's name."""
    return Path(tokenizer).stem.replace(":", "")


def is_prepared(folder, about, source):
    """Whether the folder holds this very set, whole."""
    try:
        dataset.Dataset(folder.resolve())
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (UserError, OSError):
        return False
    if {name: meta.get(name) for name in about} != about:
        return False
    if source.is_on_hub:  # which would be downloaded to compare it
        return True
    ((_, last),) = deque(read_parts(source, "comparing"), maxlen=1)
    return last["text_sha256"] == meta.get("sha256")


def taken_tokenizer(name):
    """
    The tokenizer of the prepared set, the checkpoint or the folder with weights of that name; None where it
    is none of them.
    """
    path = Path(name)
    if not name or name in KINDS:
        return None
    if (path / "meta.json").exists() or (path / "meta.pkl").exists():
        return dataset.read_meta(path)[0]
    if not path.exists():
        return None
    from kqv.formats import loading  # and with it torch, which takes seconds

    return loading.tokenizer_of(loading.load_start(str(path)))


if __name__ == "__main__":
    run(main)
