"""
The formats of files with text. A new format is an entry in FORMATS.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError, first_line
from kqv.text.documents import columns_of, document_of, prompted
from kqv.text.utf8 import decode


def jsonl_documents(file, name, text_column):
    """Each line that isn't empty is a JSON object: a row."""
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        line = decode(line, name, (number, 0))
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: a number with too many digits, too
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f'{where} is not a JSON object: each line of a .jsonl file is one, like {{"text": "..."}}'
            )
        yield document_of(row, text_column, where)


def tsv_documents(file, name, _):
    """Each line that isn't empty is a prompt, a tab and its completion. Nothing is escaped."""
    for number, line in enumerate(file, start=1):
        line = decode(line, name, (number, 0)).rstrip("\r\n")
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0]:
            raise UserError(
                f"{name}, line {number} has {len(fields) - 1} tabs and {len(fields[0])} characters before "
                "the first: a line of a .tsv file is a prompt, a tab and its completion"
            )
        yield prompted(*fields)


def parquet_documents(file, name, text_column):
    """Each row of the table. Needs pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {name} needs: pip install pyarrow") from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = columns_of(table.schema_arrow.names, text_column, name)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for index in range(len(batch)):
                number += 1
                where = f"{name}, row {number}"
                try:
                    row = {column: batch.column(column)[index].as_py() for column in columns}
                except UnicodeDecodeError:
                    raise UserError(
                        f"{where} is not UTF-8 text: write the table again from UTF-8 strings"
                    ) from None
                yield document_of(row, text_column, where)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a whole parquet file ({first_line(error)}): fetch it or write it again"
        ) from None


class Format(NamedTuple):
    help: str  # one line
    documents: Callable | None = None  # (file, its name, text_column) -> its documents; None: it is one text


# {end of a file's name: its format}. A file whose name ends in anything else is one text, too.
FORMATS = {
    ".txt": Format("one document in UTF-8"),
    ".md": Format("one document in UTF-8"),
    ".jsonl": Format("a JSON object in each line: a text or a conversation", jsonl_documents),
    ".tsv": Format("a prompt, a tab and its completion in each line", tsv_documents),
    ".parquet": Format("a table with a text or a conversation in each row", parquet_documents),
}


COMPRESSED = ".gz"  # may follow each of these endings


ENDINGS = (*FORMATS, *(ending + COMPRESSED for ending in FORMATS))  # the files of a folder that are read


def is_compressed(path):
    return path.lower().endswith(COMPRESSED)


def reader_of(path):
    """The function that reads the documents of such a file; None where the file is one text."""
    found = FORMATS.get(Path(path.lower().removesuffix(COMPRESSED)).suffix)
    return found and found.documents
