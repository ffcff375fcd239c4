"""Look inside a trained model: a page of its queries, keys, values and weights on a text of yours."""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

from dataclasses import dataclass
from pathlib import Path

import torch

from kqv.device import find_device
from kqv.errors import UserError
from kqv.files import replacing
from kqv.formats import loading
from kqv.generation.prompts import decode_utf8, read_start  # noqa: F401
from kqv.looking.figures import figures
from kqv.looking.page import html
from kqv.looking.trace import Looker
from kqv.settings import fill, read_given, refuse_unused, setting


@dataclass(frozen=True)
class PageSettings:
    """The page"""

    text: str = setting("", "the text to read; FILE:path reads a file, - standard input")
    page: str = setting("look.html", "the file to write", path=True)
    device: str = setting("cpu", "auto, cpu, cuda, cuda:1, mps")


@dataclass(frozen=True)
class LookSettings(PageSettings, loading.WeightsSettings):
    """
    usage: python look.py [config.py ...] [--name=value ...]

    Look inside a trained model: writes a page of its queries, keys, values and weights on a text, and of what
    changes do. The page is one file, for a browser; it needs no network.
    """


def main(argv):
    given = read_given(LookSettings, argv)
    config = fill(LookSettings, given)
    refuse_unused(loading.UNUSED, config, given)
    path, contents = loading.load_chosen(config)
    gpt, tokenizer = loading.pair_of(contents, path)
    ids = ids_of(read_start(config.text), tokenizer, gpt.config.block_size)
    looker = Looker(gpt.to(find_device(config.device), torch.float32))
    with replacing(Path(config.page)) as beside:
        beside.write_text(html(figures(looker, tokenizer, ids, str(path))), "utf-8")
    print(f"{config.page}: open it in a browser")


def ids_of(text, tokenizer, block_size):
    """The ids of a text that the page shows. Raises UserError."""
    ids = [*tokenizer.begin, *tokenizer.encode(text, "error").tolist()]
    if not 2 <= len(ids) <= block_size:
        raise UserError(f"the text has {len(ids)} tokens, but the page shows 2 to {block_size}: give a --text")
    return ids
