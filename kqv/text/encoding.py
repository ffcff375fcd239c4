"""Text -> token files, in parts and on all cores."""

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

import numpy as np
from tqdm import tqdm

from kqv.errors import UserError
from kqv.text import dataset_writer
from kqv.text.dataset import SPLITS
from kqv.text.sources import PIECE
from kqv.text.tokenizers import ChatTokenizer, from_json, maker

PART = 2**28  # bytes of text, after which what was written is kept whatever happens


BEFORE_WORKERS = 8  # megabytes that are encoded sooner than other processes have started


LEARN_FROM = 2**29  # characters that a vocabulary of pieces is learnt from, at most


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


def texts(source, split=None, at_most=math.inf):
    """The texts of a source, or of its one split, until they have so many characters."""
    for piece in shown(source, "learning"):
        if split in (None, piece.split):
            for text in (piece.content,) if isinstance(piece.content, str) else (t for _, t in piece.content):
                yield text
                at_most -= len(text)
        if at_most <= 0:
            return


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
    dtype = dataset_writer.smallest_dtype(tokenizer)
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
