"""Text -> token files: what `train.py` reads, in data/<name>."""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from kqv import dataset
from kqv.builtin import BUILT_IN
from kqv.dataset import SPLITS
from kqv.errors import UsageError, UserError, run
from kqv.settings import parse, setting
from kqv.sources import PIECE, Source
from kqv.tokenizer import KINDS, ChatTokenizer, from_json, maker

PART = 2**28  # bytes of text, after which what was written is kept whatever happens
BEFORE_WORKERS = 8  # megabytes that are encoded sooner than other processes have started
LEARN_FROM = 2**29  # characters that a vocabulary of pieces is learnt from, at most


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
    writer = dataset.Writer(folder, tokenizer, about)
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


# The tokenizer


def tokenizer_maker(name, taken):
    """A function that makes the tokenizer of that name for a Source, or takes one. Raises UsageError."""
    make = (lambda texts: taken) if taken else maker(name)

    def made_for(source):
        is_chat = not isinstance(next(iter(source)).content, str)
        tokenizer = make(texts(source) if name == "char" else texts(source, "train", LEARN_FROM))
        if is_chat == (tokenizer.kind == "chat"):
            return tokenizer
        return ChatTokenizer(tokenizer) if is_chat else tokenizer.base

    return made_for


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
    from kqv import checkpoint  # and with it torch, which takes seconds

    return checkpoint.tokenizer_of(checkpoint.load_start(str(path)))


def texts(source, split=None, at_most=math.inf):
    """The texts of a source, or of its one split, until they have so many characters."""
    for piece in shown(source, "learning"):
        if split in (None, piece.split):
            for text in (piece.content,) if isinstance(piece.content, str) else (t for _, t in piece.content):
                yield text
                at_most -= len(text)
        if at_most <= 0:
            return


# Reading, encoding, writing


def read_parts(source, what):
    """
    The text in parts of about PART bytes: (number of the part, [(split, begins there, content), ...] to be
    encoded together) for all of a part, then (number, facts about the text up to its end).
    """
    digest, documents, number, before = hashlib.sha256(), 0, 0, None
    unit, unit_size, part_size = [], 0, 0
    for piece in shown(source, what):
        content = piece.content if isinstance(piece.content, str) else json.dumps(piece.content)
        content = content.encode("utf-8")
        digest.update(b"\xff" * (piece.begins and documents > 0))  # where one ends; no byte of UTF-8
        digest.update(content)
        documents += piece.begins
        unit.append((piece.split, piece.begins or piece.split != before, piece.content))
        before, unit_size = piece.split, unit_size + len(content)
        if unit_size >= PIECE:
            yield number, unit
            unit, unit_size, part_size = [], 0, part_size + unit_size
            if part_size >= PART:
                yield number, {"text_sha256": digest.hexdigest(), "documents": documents}
                number, part_size = number + 1, 0
    if unit:
        yield number, unit
    if unit or part_size:
        yield number, {"text_sha256": digest.hexdigest(), "documents": documents}


def shown(source, what):
    """The pieces of a source, with the progress on a terminal."""
    bar = tqdm(total=source.size, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    with bar:
        for piece in source:
            bar.update((source.position if source.size else bar.n + len(piece.content)) - bar.n)
            yield piece


def write_parts(writer, source, tokenizer, config):
    """Encode and write the parts of the source that are not there yet; all, where its text has changed."""
    kept, number, sizes = len(writer.parts), -1, dict.fromkeys(SPLITS, 0)
    for number, found in encoded(read_parts(source, "encoding"), kept, tokenizer, config):
        if isinstance(found, dict) and number < kept:
            if found["text_sha256"] != writer.parts[number]["text_sha256"]:
                number = -1
                break
        elif isinstance(found, dict):
            writer.end_part(**found, bytes=sizes)
            sizes = dict.fromkeys(SPLITS, 0)
        else:
            for split, ids, size in found:
                if not any(writer.count(split) for split in SPLITS):
                    require_space(writer, source, ids, size)
                if tokenizer.kind != "chat" and tokenizer.separator is not None and not writer.count(split):
                    ids = ids[1:]  # it stands between documents, and this is the first
                writer.append(split, ids)
                sizes[split] += size
    if number + 1 < kept:
        writer.parts.clear()
        write_parts(writer, source, tokenizer, config)


def require_space(writer, source, ids, size):
    """Raise UserError where the set, if all its text is like this, would not fit on the disk."""
    needed = (source.size or 0) * len(ids) * writer.dtype.itemsize / max(size, 1)
    free = shutil.disk_usage(writer.folder).free
    if needed > free:
        raise UserError(
            f"{writer.folder} needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on its "
            "disk: make room, or let data be a link to a larger disk"
        )


def encoded(items, kept, tokenizer, config):
    """What `read_parts` gives, in order, with the pieces of all but the `kept` first parts encoded."""
    workers = config.workers or os.cpu_count()
    waiting, pool, here = deque(), None, 0
    try:
        for number, item in items:
            if isinstance(item, list):
                if number < kept:
                    continue
                here += 1
                if workers == 1 or here <= BEFORE_WORKERS:
                    item = encode(item, tokenizer, config.unknown)
                else:
                    pool = pool or start_workers(workers, tokenizer, config.unknown)
                    item = pool.submit(encode_there, item)
            waiting.append((number, item))
            while len(waiting) > 3 * workers or (waiting and not pool):
                yield arrived(*waiting.popleft())
        while waiting:
            yield arrived(*waiting.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes was killed, for want of memory perhaps: run the same command again to go "
            "on, with --workers=1 at the least"
        ) from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def arrived(number, item):
    return number, item.result() if isinstance(item, Future) else item


def encode(unit, tokenizer, unknown):
    """[(split, begins there, content), ...] -> [(split, (N,) ids, bytes of text), ...], one a split."""
    ids, sizes = {}, {}
    dtype = dataset.smallest_dtype(tokenizer)
    for split, begins, content in unit:
        some = ids.setdefault(split, [])
        if not isinstance(content, str):
            some.append(tokenizer.encode_chat(content, unknown))
            content = "".join(text for _, text in content)
        else:
            if begins and tokenizer.separator is not None:
                some.append(np.array([tokenizer.separator]))
            some.append(tokenizer.encode(content, unknown))
        sizes[split] = sizes.get(split, 0) + len(content.encode("utf-8"))
    return [(split, np.concatenate(some).astype(dtype), sizes[split]) for split, some in ids.items()]


def start_workers(count, tokenizer, unknown):
    """Processes that `encode_there`."""
    return ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), become_worker, (tokenizer.to_json(), unknown)
    )


def become_worker(definition, unknown):
    """Of a new process: leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker.update(tokenizer=from_json(definition), unknown=unknown)


worker = {}  # what a process that encodes was started with


def encode_there(unit):
    return encode(unit, **worker)


if __name__ == "__main__":
    run(main)
