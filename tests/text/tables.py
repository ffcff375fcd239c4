"""Tables of documents to read, and what a source makes of them."""

import gzip
import json

import pytest

from kqv.text.sources import Source


def parquet():
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write_table(path, values, column="text", **writing):
    """A .jsonl, .jsonl.gz or .parquet file with a document in each row and a number beside it."""
    if path.name.endswith(".parquet"):
        pa, pq = parquet()
        table = pa.table({column: values, "number": list(range(len(values)))})
        pq.write_table(table, path, **writing)
        return path
    rows = "".join(json.dumps({"number": i, column: value}) + "\n" for i, value in enumerate(values))
    content = rows.encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*patterns, **options):
    """The documents of a source, put together from their pieces."""
    documents = []
    for piece in Source([str(pattern) for pattern in patterns], **options):
        if piece.begins:
            documents.append(piece.content)
        else:
            documents[-1] += piece.content
    return documents
