"""Which files a user's source names."""

import glob
import os

from kqv.errors import UserError
from kqv.files import read_json
from kqv.text import hub
from kqv.text.built_in import BUILT_IN
from kqv.text.file_formats import ENDINGS, FORMATS
from kqv.text.opening import COMPRESSED

STDIN = "-"

STANDARD_INPUT = "standard input"  # its name in messages


def files_of(pattern):
    """The paths that a user's source names; those of a folder or a glob sorted. Raises UserError."""
    folder = hub.name_of(pattern)[0] if pattern.startswith(hub.PREFIX) else pattern
    if os.path.isdir(folder) and (saved := saved_files(folder)):
        return saved
    if os.path.isdir(pattern):
        return files_in(pattern)
    if pattern == STDIN or pattern.startswith(hub.PREFIX) or os.path.exists(pattern):
        return [pattern]
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not paths:
        raise UserError(
            f"{pattern} names no file: give a text file, a folder, a glob in quotes, hf:ORG/NAME, or a "
            f"built-in set ({', '.join(BUILT_IN)})"
        )
    return paths


def files_in(folder):
    """The files with text in a folder and in those below it, sorted; hidden ones are left out."""

    def refuse(error):
        raise unreadable(error.filename, error)

    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".") and name.lower().endswith(ENDINGS)]
        paths += [os.path.join(parent, name) for name in names]
    if not paths:
        raise UserError(
            f"{folder} is a folder without a text file ({', '.join(FORMATS)}, or these with "
            f"{' or '.join(COMPRESSED)}): name files that end in something else by a glob in quotes"
        )
    return sorted(paths)


def saved_files(folder):
    """
    The files of a set that datasets' save_to_disk wrote, of its training split where it has several; empty
    where the folder is none. Raises UserError.
    """
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        there = folder
        folder = os.path.join(folder, "train")
        if not os.path.isdir(folder):
            raise UserError(f"{there} has no split called train: name one of its folders, {there}/NAME")
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
        return []
    try:
        names = [os.path.basename(entry["filename"]) for entry in read_json(state)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{state} is not what datasets' save_to_disk writes ({error}): save it again"
        ) from None
    return [os.path.join(folder, name) for name in names]


def unreadable(name, error):
    return UserError(f"{name} cannot be read ({error.strerror or error}): is it there, and yours to read?")
