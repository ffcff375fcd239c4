"""
The formats of files with text. A new format is an entry in FORMATS.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kqv.errors import UserError, first_line
from kqv.text import utf8
from kqv.text.documents import columns_of, document_of, document_of_json, prompted
from kqv.text.opening import COMPRESSED


def jsonl_documents(file, name, text_column, most=utf8.ROW):
    """Each line that isn't empty is a JSON object: a row."""
    for number, line in utf8.lines(file, name, most):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: a number with too many digits, too
            row = None
        if not isinstance(row, (dict, list, str)):
            raise UserError(
                f'{where} is not a JSON object: each line of a .jsonl file is one, like {{"text": "..."}}'
            )
        yield document_of_json(row, text_column, where)


def json_documents(file, name, text_column, most=utf8.ROW):
    """Each object of a list, or of those that stand one after another, is a row."""
    for number, row in enumerate(json_values(file, name, most), start=1):
        where = f"{name}, row {number}"
        if not isinstance(row, (dict, list, str)):
            raise UserError(f'{where} is {json.dumps(row)[:80]}, not an object like {{"text": "..."}}')
        yield document_of_json(row, text_column, where)


DECODED = 2**28  # bytes of a group of rows, of which 256 are decoded at once; of a larger one fewer

BETWEEN = re.compile(r"[\s,]*")  # what may stand between two values


def json_values(file, name, most=utf8.ROW):
    """The values of a JSON list, or of JSON texts one after another. Only a stretch of them is in memory."""
    stretches = (text for _, text in utf8.stretches(file, name))
    decode = json.JSONDecoder().raw_decode
    text = next(stretches, "").lstrip()
    closing = "]" if text.startswith("[") else ""
    at, count = len(closing), 0
    while True:
        at = BETWEEN.match(text, at).end()
        if closing and text.startswith(closing, at):
            is_whole = not any(map(str.strip, itertools.chain([text[at + 1 :]], stretches)))
            break
        try:
            value, at = decode(text, at)
        except (ValueError, RecursionError):  # it is no JSON, or its end is still to be read
            utf8.require_short(len(text) - at, most, f"{name}, row {count + 1}")
            more = "".join(itertools.islice(stretches, 1 + (len(text) - at) // utf8.PIECE))
            if not more:
                is_whole = at == len(text) and not closing
                break
            text, at = text[at:] + more, 0
        else:
            count += 1
            yield value
    if not is_whole:
        raise UserError(
            f"{name} is no whole JSON after row {count}: a .json file is a list of objects like "
            '{"text": "..."}, or such objects one after another'
        )


def csv_documents(file, name, text_column, most=utf8.ROW):
    """Each row of a table with a header. A field with a comma, quotes or line ends stands in quotes."""
    csv.field_size_limit(2**31 - 1)  # characters; `texts` sets the limit
    lines = ((number, f"{line}\n") for number, line in utf8.lines(file, name, most))
    before, first = next(((number - 1, line) for number, line in lines if line.strip()), (0, ""))
    delimiter = max(",;\t", key=first.count)  # where a comma is the decimal sign, programs write ;
    begin, size = before + 1, 0  # of the row that is read

    def texts():
        nonlocal size
        for _, line in itertools.chain([(begin, first)], lines):
            size += len(line)
            utf8.require_short(size, most, f"{name}, the row that begins in line {begin}")
            yield line

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        header = header_of(next(reader, []), text_column)
        begin, size = before + reader.line_num + 1, 0
        for fields in reader:
            where = f"{name}, line {before + reader.line_num}"
            begin, size = before + reader.line_num + 1, 0
            if fields:
                yield document_of(row_of(header, fields, where), text_column, where)
    except csv.Error as error:
        raise UserError(
            f"{name}, line {before + reader.line_num} is no CSV ({error}): a field with commas, quotes or "
            'line ends stands in "quotes", and quotes in it are doubled'
        ) from None


def tsv_documents(file, name, text_column, most=utf8.ROW):
    """
    Each line that isn't empty is a prompt, a tab and its completion; or, where the first line names columns
    with documents, a row of these. Nothing is escaped.
    """
    header = None
    for number, line in utf8.lines(file, name, most):
        where, fields = f"{name}, line {number}", line.split("\t")
        if not line:
            continue
        if header is None:
            header = header_of(fields, text_column)
            if has_documents(header, text_column):
                continue
            header = ()
        if header:
            yield document_of(row_of(header, fields, where), text_column, where)
            continue
        if len(fields) != 2 or not fields[0]:
            raise UserError(
                f"{where} has {len(fields) - 1} tabs and {len(fields[0])} characters before the first: a "
                "line of a .tsv file is a prompt, a tab and its completion"
            )
        yield prompted(*fields)


def header_of(fields, text_column):
    """The names of columns, as they are looked for: without capitals, but for the one that the user names."""
    names = [field.strip() for field in fields]
    return [name if name == text_column else name.lower() for name in names]


def has_documents(columns, text_column):
    try:
        return bool(columns_of(columns, text_column, "the header"))
    except UserError:
        return False


def row_of(header, fields, where):
    if len(fields) != len(header):
        raise UserError(
            f"{where} has {len(fields)} fields, but the first line has {len(header)}: each row has as many"
        )
    return dict(zip(header, fields, strict=True))


def parquet_documents(file, name, text_column, most=utf8.ROW):
    """Each row of the table. Needs pyarrow."""
    pyarrow = import_pyarrow(name)
    with damage_named(pyarrow, name, "parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        columns = [*columns_of(table.schema_arrow.names, text_column, name).values()]
        yield from rows_of(batches_of(table, columns), columns, text_column, name, most)


def batches_of(table, columns):
    """The record batches of a parquet file, of fewer rows where a group of them is large when decoded."""
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        chunks = map(group.column, range(group.num_columns))
        sizes = [chunk.total_uncompressed_size for chunk in chunks if top(chunk.path_in_schema) in columns]
        rows = max(1, min(256, 256 * DECODED // max(1, *sizes)))
        yield from table.iter_batches(batch_size=rows, columns=columns, row_groups=[number])


def top(path):
    """The column that a part of a column belongs to."""
    return path.partition(".")[0]


def arrow_documents(file, name, text_column, most=utf8.ROW):
    """Each row of a table as `datasets` keeps it. Needs pyarrow."""
    pyarrow = import_pyarrow(name)
    with damage_named(pyarrow, name, "Arrow"):
        is_file = file.read(6) == b"ARROW1"  # else a stream
        file.seek(0)
        table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file)
        columns = [*columns_of(table.schema.names, text_column, name).values()]
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        yield from rows_of(batches, columns, text_column, name, most)


def import_pyarrow(name):
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {name} needs: pip install pyarrow") from None
    return pyarrow


@contextmanager
def damage_named(pyarrow, name, kind):
    """Errors of pyarrow, within, as a line."""
    try:
        yield
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a whole {kind} file ({first_line(error)}): fetch it or write it again"
        ) from None


def rows_of(batches, columns, text_column, name, most):
    """The documents of the rows of pyarrow's record batches."""
    number = 0
    for batch in batches:
        for index in range(len(batch)):
            number += 1
            where = f"{name}, row {number}"
            try:
                row = {column: batch.column(column)[index].as_py() for column in columns}
            except UnicodeDecodeError:
                raise UserError(
                    f"{where} is not UTF-8 text: write the table again from UTF-8 strings"
                ) from None
            utf8.require_short(
                sum(len(value) for value in row.values() if isinstance(value, str)), most, where
            )
            yield document_of(row, text_column, where)


class Format(NamedTuple):
    help: str  # one line
    # (file, its name, text_column, most bytes of a row) -> its documents; None: the file is one text
    documents: Callable | None = None
    is_text: bool = True  # whether it may be compressed, and in any encoding of Unicode


# {end of a file's name: its format}. A file whose name ends in anything else is one text, too.
FORMATS = {
    ".txt": Format("one document"),
    ".md": Format("one document"),
    ".jsonl": Format("a JSON object in each line: a text or a conversation", jsonl_documents),
    ".json": Format("a list of such objects", json_documents),
    ".csv": Format("a table with a header, and a text or a conversation in each row", csv_documents),
    ".tsv": Format("the same; or without a header, a prompt, a tab and its completion", tsv_documents),
    ".parquet": Format("a table with a text or a conversation in each row", parquet_documents, is_text=False),
    ".arrow": Format("the same, as datasets' save_to_disk writes it", arrow_documents, is_text=False),
}

# The files of a folder that are read.
ENDINGS = (
    *FORMATS,
    *(ending + more for ending, found in FORMATS.items() if found.is_text for more in COMPRESSED),
)


def without_compression(path):
    """A file's name without the end that says how it is compressed."""
    ending = next((ending for ending in COMPRESSED if path.lower().endswith(ending)), "")
    return path[: len(path) - len(ending)]


def format_of(path):
    """The Format of a file of this name."""
    return FORMATS.get(Path(without_compression(path).lower()).suffix, FORMATS[".txt"])
