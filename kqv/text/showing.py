"""The first documents of a set as tokens, with what of them is learnt."""

import sys
from itertools import islice

import numpy as np

from kqv.errors import print_text
from kqv.printable import printable
from kqv.text.token_files import AT_ONCE

LONGEST = 500  # tokens of a document that are shown, at most

COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"  # green, on a terminal


def show(data, count):
    """
    Print the first `count` documents of the training split of a Dataset, their tokens with a | between them.
    What is learnt of conversations is green on a terminal, and elsewhere in [brackets].
    """
    names = {number: name for name, number in data.tokenizer.specials().items()}
    marks = learnt_marks()
    for number, (ids, learnt) in enumerate(islice(documents(data), count), 1):
        kind, some = ("conversation", f"{learnt.sum()}") if data.is_chat else ("document", "all")
        tokens = [token_text(data.tokenizer, names, one) for one in ids[:LONGEST].tolist()]
        runs = [tokens]
        if data.is_chat:
            borders = np.flatnonzero(np.diff(learnt[:LONGEST])) + 1
            runs = [tokens[a:b] for a, b in zip([0, *borders], [*borders, len(tokens)], strict=True)]
        texts = ["|".join(run) for run in runs]
        first = int(data.is_chat and not learnt[0])  # of the runs, every second one is learnt
        if data.is_chat:
            texts[first::2] = [f"{marks[0]}{text}{marks[1]}" for text in texts[first::2]]
        more = f"|... {len(ids) - LONGEST} more" if len(ids) > LONGEST else ""
        print(f"{kind} {number}: {len(ids)} tokens, {some} of them learnt")
        print_text(f"{'|'.join(texts)}{more}\n", raw=True)  # control codes are written out already


def learnt_marks():
    """What is printed before and after what is learnt."""
    return (COLOUR, PLAIN) if sys.stdout.isatty() else ("[", "]")


def documents(data):
    """((T,) ids, (T,) bool which ones are learnt) of the documents of the training split, as far as read."""
    if data.is_chat:
        yield from data.marked_conversations("train")
        return
    ids = data.splits["train"][:AT_ONCE]
    ends = np.flatnonzero(ids == data.tokenizer.separator) if data.tokenizer.separator is not None else []
    for some in np.split(ids, np.asarray(ends, np.int64) + 1):
        if len(some):
            yield some, np.ones(len(some), bool)


def token_text(tokenizer, names, number):
    """A token as it is shown: the name of a special id, or its text without control codes."""
    if number in names:
        return names[number]
    text = tokenizer.decode_bytes([number]).decode("utf-8", errors="backslashreplace")
    return printable(text, stays="")
