"""Sets on the Hugging Face hub, or in a folder like one: hf:NAME[:CONFIG]."""

import logging
import os

from kqv.errors import UserError, first_line
from kqv.text.documents import document_of

PREFIX = "hf:"


def is_on_hub(pattern):
    """Whether hf:NAME names what is not here, but would be downloaded."""
    return not os.path.isdir(name_of(pattern)[0])


def name_of(pattern):
    """hf:NAME[:CONFIG] -> (NAME, CONFIG or "")."""
    name, _, config = pattern.removeprefix(PREFIX).partition(":")
    return name, config


def documents(pattern, text_column):
    """The documents of the training split. Raises UserError."""
    for number, row in enumerate(rows(pattern), start=1):
        yield document_of(row, text_column, f"{pattern}, row {number}")


def rows(pattern):
    """The rows {column: value} of the training split, read as a stream. Raises UserError."""
    name, config = name_of(pattern)
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading {pattern} needs: pip install datasets") from None
    for library in ("datasets", "huggingface_hub"):  # they log every retry; the error below is enough
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
    except MemoryError:
        raise
    except Exception as error:  # offline, refused, no such set, damaged: each library has errors of its own
        raise UserError(
            f"cannot read {name} from the Hugging Face hub ({first_line(error, 150)}): is it in reach, and "
            "its name right? hf:FOLDER reads files that you have"
        ) from None
