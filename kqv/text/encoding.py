"""
Text -> token files, in parts and on all cores.

A source's pieces are collected into units of about a megabyte, which many processes encode. Units are
collected into parts of about 256 MB. A run that was stopped does not make finished parts again.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np

from kqv.errors import UserError
from kqv.text import utf8
from kqv.text.chat import LEARNT
from kqv.text.dataset_writer import Writer
from kqv.text.sources import with_progress
from kqv.text.token_files import SPLITS, smallest_dtype
from kqv.text.tokenizers import from_json
from kqv.threads import core_limit

PART = 2**28  # bytes of text in a part

BEFORE_WORKERS = 8  # so many units are encoded while other processes start


def write_set(folder, source, tokenizer, about, unknown="error", workers=0):
    """
    Encode a Source and write its set, or what a stopped run left of it to do. `about` goes into meta.json;
    `workers` is the number of processes, 0 for one a core. Raises UserError.
    """
    writer = Writer(folder, tokenizer, about)
    try:
        write_parts(writer, source, tokenizer, unknown, workers)
        finish(writer, source, tokenizer)
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error.strerror}): when it can, the same command goes on with what "
            "was finished"
        ) from None
    finally:
        writer.leave()


def finish(writer, source, tokenizer):
    """Put the set in place, with what is known of the whole text. Raises UserError where it is too short."""
    is_chat = tokenizer.kind == "chat"
    for split in SPLITS:
        if (count := writer.count(split)) < 2:
            writer.parts.clear()
            raise UserError(f"the {split} split would have {count} tokens: {source.remedy()}")
        if is_chat and not any(part["learnt"][split] for part in writer.parts):
            writer.parts.clear()
            raise UserError(
                f"the {split} split would have no answer of the assistant, so nothing to learn: give "
                "conversations with answers"
            )
    sizes = {split: sum(part["bytes"][split] for part in writer.parts) for split in SPLITS}
    last = writer.parts[-1]
    writer.finish(
        sha256=last["text_sha256"],
        documents=last["documents"],
        bytes={} if is_chat else sizes,
    )


def read_parts(source, what):
    """
    Read a Source: (number of the part, unit) for all units of a part, then (number, {"text_sha256": ...,
    "documents": ...}) of the text up to its end. A unit is a list of Pieces. `what` names the progress bar.
    """
    digest, documents, number = hashlib.sha256(), 0, 0
    unit, unit_size, part_size = [], 0, 0
    for piece in with_progress(source, what):
        content = piece.content if isinstance(piece.content, str) else json.dumps(piece.content)
        content = content.encode("utf-8")
        digest.update(b"\xff" * (piece.begins and documents > 0))  # where one ends; no byte of UTF-8
        digest.update(content)
        documents += piece.begins
        unit.append(piece)
        unit_size += len(content)
        if unit_size >= utf8.PIECE:
            yield number, unit
            unit, unit_size, part_size = [], 0, part_size + unit_size
            if part_size >= PART:
                yield number, {"text_sha256": digest.hexdigest(), "documents": documents}
                number, part_size = number + 1, 0
    if unit:
        yield number, unit
    if unit or part_size:
        yield number, {"text_sha256": digest.hexdigest(), "documents": documents}


def text_facts(source):
    """The sha256 of all of a source's text, and how many documents it has."""
    ((_, facts),) = deque(read_parts(source, "comparing"), maxlen=1)
    return facts


def write_parts(writer, source, tokenizer, unknown, workers):
    """Encode and write the parts of a Source that `writer` lacks; all of them where its text has changed."""
    kept, number = len(writer.parts), -1
    sizes, learnt = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    is_large = (source.size or 0) > BEFORE_WORKERS * utf8.PIECE
    units = read_parts(source, "encoding")
    with closing(encoded(units, kept, tokenizer, unknown, workers, is_large)) as items:
        for number, found in items:
            if isinstance(found, dict) and number < kept:
                if found["text_sha256"] != writer.parts[number]["text_sha256"]:
                    number = -1
                    break
            elif isinstance(found, dict):
                writer.end_part(**found, bytes=sizes, learnt=learnt)
                sizes, learnt = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
            else:
                for some in found:
                    if not any(writer.count(split) for split in SPLITS):
                        require_space(writer, source, some.ids, some.size)
                    writer.append(some.split, some.ids, some.marks)
                    sizes[some.split] += some.size
                    learnt[some.split] += some.learnt
    if number + 1 < kept:
        writer.parts.clear()
        write_parts(writer, source, tokenizer, unknown, workers)


def require_space(writer, source, ids, size):
    """Raise UserError where the set would not fit on the disk if all its text has as many ids a byte."""
    needed = (source.size or 0) * len(ids) * writer.dtype.itemsize / max(size, 1)
    free = shutil.disk_usage(writer.folder).free
    if needed > free:
        raise UserError(
            f"{writer.folder} needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on its "
            "disk: make room, or let data be a link to a larger disk"
        )


def encoded(items, kept, tokenizer, unknown, workers, is_large):
    """
    What `read_parts` gives, in order, each unit `encode`d, but without those of the `kept` first parts. Other
    processes start at once where the text `is_large`, else after BEFORE_WORKERS units.
    """
    workers = workers or core_limit()
    waiting, pool, units = deque(), None, 0
    try:
        for number, item in items:
            if isinstance(item, list):
                if number < kept:
                    continue
                units += 1
                if workers > 1 and not pool and (is_large or units > BEFORE_WORKERS):
                    pool = start_workers(workers, tokenizer, unknown)
                    with control_c_held_back():
                        for _ in range(workers):  # so that all are ready when the first units are done
                            pool.submit(os.getpid)
                if not pool or units <= BEFORE_WORKERS:
                    item = encode(item, tokenizer, unknown)
                else:
                    with control_c_held_back():
                        item = pool.submit(encode_in_worker, item)
            waiting.append((number, item))
            while len(waiting) > 3 * workers or (waiting and not pool):
                yield result_of(*waiting.popleft())
        while waiting:
            yield result_of(*waiting.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes was killed, for want of memory perhaps: run the same command again to go "
            "on, with --workers=1 at the least"
        ) from None
    finally:
        if pool:
            with control_c_held_back():  # a second Ctrl-C would leave starting processes without a parent
                pool.shutdown(cancel_futures=True)


def result_of(number, item):
    return number, item.result() if isinstance(item, Future) else item


class Encoded(NamedTuple):
    """What a split has of a unit."""

    split: str
    ids: np.ndarray  # (N,)
    marks: np.ndarray | None  # (N,) uint8, where the tokenizer stores them
    size: int  # bytes of the text that the ids stand for
    learnt: int  # how many ids of conversations are learnt


def encode(unit, tokenizer, unknown):
    """A unit, as of `read_parts`, -> a list of Encoded, one for each split that it has."""
    contents = [content_of(piece, tokenizer) for piece in unit]
    texts = iter(tokenizer.encode_many([text for text in contents if isinstance(text, str)], unknown))
    found = {}  # {split: (ids, marks, sizes)}, lists
    for piece, content in zip(unit, contents, strict=True):
        ids, marks, sizes = found.setdefault(piece.split, ([], [], []))
        if not isinstance(content, str):
            some, its_marks = tokenizer.encode_marked_chat(content, unknown)
            ids.append(some)
            marks.append(its_marks)
            sizes.append(sum(len(text.encode("utf-8")) for _, text in content))
            continue
        if piece.joint is not None and tokenizer.separator is not None:
            ids.append(np.array([tokenizer.separator]))
        if piece.begins or piece.joint is not None:
            ids.append(np.array(tokenizer.begin, np.int64))
        ids.append(next(texts))
        sizes.append(len(content.encode("utf-8") if unknown == "error" else tokenizer.decode_bytes(ids[-1])))
    dtype = smallest_dtype(tokenizer)
    return [
        joined(split, np.concatenate(ids).astype(dtype), marks, sum(sizes), tokenizer.stores_marks)
        for split, (ids, marks, sizes) in found.items()
    ]


def joined(split, ids, marks, size, stores_marks):
    """An Encoded of a list of the marks of its conversations, which is empty for texts."""
    marks = np.concatenate(marks) if marks else None
    learnt = 0 if marks is None else int((marks & LEARNT).sum())
    return Encoded(split, ids, marks if stores_marks else None, size, learnt)


def content_of(piece, tokenizer):
    """What of a Piece is encoded: a conversation, or its text with what stands before it."""
    if isinstance(piece.content, str) and piece.joint and tokenizer.separator is None:
        return joint_of(tokenizer, piece.joint) + piece.content
    return piece.content


def joint_of(tokenizer, joint):
    """What stands between documents where a tokenizer has no separator; empty where it lacks that, too."""
    return joint if len(tokenizer.encode(joint, "skip")) else ""


def start_workers(count, tokenizer, unknown):
    """A pool of processes for `encode_in_worker`. It starts each when there is work for it."""
    return ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), become_worker, (tokenizer.to_json(), unknown)
    )


@contextmanager
def control_c_held_back():
    """Delay Ctrl-C to the end of the block. A process that is started in the block never receives Ctrl-C."""
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))  # another thread may get the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def become_worker(definition, unknown):
    """What a new process does first: it ends when the parent ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process has one core
    worker.update(tokenizer=from_json(definition), unknown=unknown)


worker = {}  # in a process that encodes: the arguments of `encode` beside the unit


def encode_in_worker(unit):
    return encode(unit, **worker)
