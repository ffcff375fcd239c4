"""A source -> the tokenizer for it, whose vocabulary may be learnt from the text."""

import math

from kqv.text.sources import with_progress
from kqv.text.templated import over

LEARN_FROM = 2**29  # characters of the training text that a vocabulary is learnt from, at most


def tokenizer_for(source, existing, new):
    """
    The tokenizer for a Source: the `existing` one; where that is None, a `new` one, (class, options) as of
    `tokenizers.by_name`, learnt from the text. Where the source has conversations, it is a ChatTokenizer.
    Raises UserError.
    """
    is_chat = not isinstance(next(iter(source)).content, str)
    tokenizer = existing or learnt(*new, source)
    if is_chat == (tokenizer.kind == "chat"):
        return tokenizer
    return over(tokenizer) if is_chat else tokenizer.base


def learnt(cls, options, source):
    if cls.learns_from == "all":
        return cls.trained_on(texts(source), **options)
    return cls.trained_on(texts(source, cls.learns_from, LEARN_FROM), **options)


def texts(source, split=None, at_most=math.inf):
    """
    The texts of a source, with what joins them; or those of its one split, until they have so many
    characters.
    """
    for piece in with_progress(source, "learning"):
        if split is None:
            yield piece.joint or ""
        if split in (None, piece.split):
            for text in (piece.content,) if isinstance(piece.content, str) else (t for _, t in piece.content):
                yield text
                at_most -= len(text)
        if at_most <= 0:
            return
