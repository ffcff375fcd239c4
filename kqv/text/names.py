"""What a set is called, after its source and its tokenizer; and back: the command that makes a set."""

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

from kqv.errors import UsageError, UserError
from kqv.printable import one_line
from kqv.text import hub, tokenizers
from kqv.text.built_in import BUILT_IN
from kqv.text.file_formats import without_compression
from kqv.text.paths import STDIN

LONGEST = 200  # bytes of a set's name: a file system has 255, and files beside it have longer names

USUAL = "char"  # the tokenizer where the user names none


def usual_tokenizer(source):
    """The tokenizer of a source where the user names none, which is not in the set's name."""
    found = BUILT_IN.get(source)
    return found.settings.get("tokenizer", USUAL) if found else USUAL


def default_name(sources, tokenizer):
    """The name of the set of such sources. Raises UsageError where several files leave it open."""
    source = sources[0]
    suffix = "" if tokenizer == usual_tokenizer(source) else f"_{short(tokenizer)}"
    if source in BUILT_IN:
        return source + suffix
    is_pipe = os.path.exists(source) and not os.path.isfile(source) and not os.path.isdir(source)
    is_glob = any(letter in source for letter in "*?[") and not os.path.exists(source)
    if len(sources) > 1 or source == STDIN or is_pipe or is_glob:
        raise UsageError("several files, or standard input, need a name for their set: --name=mytext")
    if source.startswith(hub.PREFIX):
        return source.removeprefix(hub.PREFIX).rstrip("/").split("/")[-1].replace(":", "_") + suffix
    path = Path(source).resolve()
    return (path.name if path.is_dir() else Path(without_compression(path.name)).stem) + suffix


def require_name(name):
    """
    Raise UsageError where a set can't be called so: it would be outside of data/, or data/ itself, or its
    name could not be shown or be a folder's.
    """
    if not name.strip() or name in (".", "..") or "/" in name or "\0" in name or name.startswith("~"):
        raise UsageError(f"--name={name} is no name of a set, which is a folder in data: --name=mytext")
    try:
        shown, length = os.fsencode(name).decode("utf-8"), len(os.fsencode(name))
    except UnicodeError:
        raise UsageError(f"--name={name} is no name in UTF-8: --name=mytext") from None
    if shown != one_line(shown):
        raise UsageError(
            f"--name={name} has a character that can't be shown, or a blank at an end: --name=mytext"
        )
    if length > LONGEST:
        raise UsageError(f"--name={name[:40]}... has {length} bytes, more than {LONGEST}: --name=mytext")


def folder_of(dataset):
    """The folder of the set that a user names: data/NAME; or the folder itself where that is a path."""
    is_path = dataset.startswith(("data/", "./", "../", "/", "~"))
    return Path(os.path.expanduser(dataset)) if is_path else Path("data", dataset)


def is_in_data(folder):
    """Whether a folder is inside of data. A link there is the user's own."""
    return Path(os.path.abspath(folder)).is_relative_to(os.path.abspath("data"))


def require_in_data(dataset):
    """
    Raise UserError where a checkpoint names a set outside of data: it may be a stranger's, so no path in it
    is followed.
    """
    if not is_in_data(folder_of(dataset)):
        raise UserError(
            f"the checkpoint names the set {dataset}, which is outside of data, and no path in a checkpoint "
            f"is followed: if you know it, name it yourself, --dataset={shlex.quote(dataset)}"
        )


def short(tokenizer):
    """The name of a tokenizer as a part of a set's name."""
    return Path(tokenizer).stem.replace(":", "")


def how_to_prepare(name):
    """The command that makes the set of this name."""
    source, tokenizer = name, ""
    if name not in BUILT_IN:
        source, _, suffix = name.rpartition("_")
        tokenizer = tokenizer_of(suffix)
        if source not in BUILT_IN or not tokenizer:
            return f"make it with: python prepare.py YOUR_TEXT.txt --name={shlex.quote(name)}"
    options = f" --tokenizer={tokenizer} --name={name}" if tokenizer else ""
    return f"make it with: python prepare.py {source}{options}"


def tokenizer_of(suffix):
    """The tokenizer that has this part of a set's name; empty where none has."""
    if suffix in BUILT_IN:
        return f"data/{suffix}"
    name = re.sub("^bpe(?=[0-9])", "bpe:", suffix)
    with suppress(UsageError):
        tokenizers.by_name(name)
        return name
    return ""
