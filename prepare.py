"""Text -> token files: what `train.py` reads, in data/<name>."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kqv import dataset, sources
from kqv.errors import UsageError, UserError, run
from kqv.settings import parse, setting
from kqv.tokenizer import maker


@dataclass(frozen=True)
class PrepareSettings:
    """
    usage: python prepare.py SOURCE [SOURCE ...] [--name=value ...]

    Turn text into the token files that train.py reads, in data/<name>. SOURCE is a built-in set (plays,
    shakespeare_char, shakespeare), or paths, folders and quoted globs of UTF-8 files: text (one document),
    .jsonl (one a line), either as .gz, and .parquet (one a row); - is standard input. The last part of the
    text becomes the validation split.
    """

    sources: tuple[str, ...] = ()
    tokenizer: str = setting(
        "auto", "char, byte, gpt2, or bpe:N (learns N ids); auto: what is usual for the source, else char"
    )
    name: str = setting("", "the set's name; empty: the source's")
    text_column: str = setting("text", "where a .jsonl or .parquet file has its text")
    val_fraction: float = setting(0.1, "share of the text for validation", at_least=0.0, below=1.0)


def main(argv):
    config = parse(PrepareSettings, argv)
    if not config.sources:
        raise UsageError(
            f"no source: python prepare.py plays, or another of {', '.join(sources.BUILT_IN)}, or text files"
        )
    built_in = config.sources[0] if config.sources[0] in sources.BUILT_IN else None
    if built_in and len(config.sources) > 1:
        raise UsageError(
            f"{built_in} is a whole set by itself: prepare {config.sources[1]} apart, with its own --name"
        )
    usual = sources.USUAL_TOKENIZER.get(built_in, "char")
    kind = usual if config.tokenizer == "auto" else config.tokenizer
    make_tokenizer = maker(kind)
    suffix = "" if kind == usual else "_" + kind.replace(":", "")
    name = config.name or default_name(config.sources, built_in, suffix)
    folder = Path("data") / name
    documents = (
        sources.BUILT_IN[built_in]()
        if built_in
        else sources.read_text_files(config.sources, config.text_column)
    )
    about = {
        "source": {
            "name": built_in or list(config.sources),
            "sha256": hash_of(documents),
            "documents": len(documents),
        },
        "val_fraction": config.val_fraction,
        "made_with": kind,
    }
    if is_prepared(folder, about):
        print(f"{folder} is ready: the same text and tokenizer as before")
        return
    texts = split(documents, config.val_fraction)
    tokenizer = make_tokenizer(documents if kind == "char" else texts["train"])
    splits = {}
    for part, part_documents in texts.items():
        splits[part] = encode(part_documents, tokenizer, progress=f"{part} split")
        if len(splits[part]) < 2:
            raise UserError(
                f"the {part} split would have {len(splits[part])} tokens: give more text, or another "
                f"--val_fraction than {config.val_fraction}"
            )
    sizes = {part: sum(len(text.encode("utf-8")) for text in texts[part]) for part in splits}
    dataset.write(folder, splits, tokenizer, {**about, "bytes": sizes})
    counts = ", ".join(f"{part} {len(ids):,} tokens" for part, ids in splits.items())
    a_token = sum(sizes.values()) / sum(map(len, splits.values()))
    print(
        f"{folder}: {counts}; {tokenizer.kind} tokenizer with {tokenizer.vocab_size:,} ids, "
        f"{a_token:.2f} bytes a token"
    )
    print(f"train on it with: python train.py --dataset={name}")


def default_name(paths, built_in, suffix):
    """The set's name where the user gives none. Raises UsageError where several files leave it open."""
    if built_in:
        return built_in + suffix
    if len(paths) > 1 or paths[0] == "-" or any(letter in paths[0] for letter in "*?["):
        raise UsageError("several files, or standard input, need a name for their set: --name=mytext")
    path = Path(paths[0]).resolve()
    return (path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem) + suffix


def hash_of(documents):
    """sha256 of the documents' UTF-8 bytes, one after another."""
    digest = hashlib.sha256()
    for index, document in enumerate(documents):
        digest.update(b"\xff" * (index > 0))  # where one ends; no byte of UTF-8
        digest.update(document.encode("utf-8"))
    return digest.hexdigest()


def is_prepared(folder, about):
    """Whether the folder holds this very set, whole."""
    try:
        dataset.Dataset(folder.resolve())
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (UserError, OSError):
        return False
    return {name: meta.get(name) for name in about} == about


def split(documents, val_fraction):
    """
    {"train": documents, "val": documents}, cut where `val_fraction` of all characters remain, within a
    document if need be.
    """
    cut = int(sum(map(len, documents)) * (1 - val_fraction))
    parts = {"train": [], "val": []}
    for document in documents:
        parts["train"].append(document[: max(cut, 0)])
        parts["val"].append(document[max(cut, 0) :])
        cut -= len(document)
    return {part: [document for document in texts if document] for part, texts in parts.items()}


def encode(documents, tokenizer, progress):
    """(N,) ids of all documents, with the tokenizer's separator between two of them."""
    total = sum(map(len, documents))
    ids = []
    with tqdm(
        total=total, desc=progress, unit="char", unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:
        for document in documents:
            if ids and tokenizer.separator is not None:
                ids.append(np.array([tokenizer.separator], np.uint32))
            ids.append(tokenizer.encode(document))
            bar.update(len(document))
    return np.concatenate(ids) if ids else np.zeros(0, np.uint32)


if __name__ == "__main__":
    run(main)
