"""Look inside a trained model: a page of its queries, keys, values and weights on a text of yours."""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kqv.device import find_device, out_of_memory_as
from kqv.errors import UsageError, UserError
from kqv.files import replacing
from kqv.formats import loading
from kqv.generation.prompts import read_start
from kqv.looking.figures import figures, of_layer
from kqv.looking.page import html
from kqv.looking.retrained import compared, losses, train_with
from kqv.looking.runs import draw_png, runs_of
from kqv.looking.server import Server
from kqv.looking.trace import Looker
from kqv.looking.what_if import WHAT_IFS
from kqv.settings import fill, read_given, refuse_unused, setting
from kqv.text.dataset import Dataset
from kqv.text.names import folder_of
from kqv.training.folder import METRICS

MOST_TOKENS = 256  # of a text: each head has a number for every two of them

STEPS_NOW = 300  # of a small model that is trained while the reader waits

SHOWN = "The pizza came out of the oven and it tasted good."


@dataclass(frozen=True)
class PageSettings:
    """The page"""

    text: str = setting(
        "", "the text to read; FILE:path reads a file, - standard input; empty: one that is at hand"
    )
    unknown: Literal["error", "skip"] = setting("error", "what becomes of characters the tokenizer lacks")
    page: str = setting("look.html", "the file to write", path=True)
    serve: bool = setting(False, "serve the page on this machine instead: it reads texts that you type")
    port: int = setting(8765, "of the server; 0: any that is free", at_least=0, below=2**16)
    runs: bool = setting(False, "instead, the curves of the runs in the FOLDERs that are named")
    retrain: int = setting(
        0,
        "instead, train small models with each change, with so many seeds, on the plays; prints JSON",
        at_least=0,
        below=100,
    )
    png: str = setting("", "with --runs: write this picture instead of a page; needs matplotlib", path=True)
    folders: tuple[str, ...] = ()
    device: str = setting("cpu", "auto, cpu, cuda, cuda:1, mps")


UNUSED = (  # rows of `refuse_unused`: names of settings, when they mean nothing, and when in words
    (("page",), lambda c: c.serve, "with --serve, which writes no file"),
    (("port",), lambda c: not c.serve, "without --serve"),
    (
        ("text", "unknown", "page", "serve", "out_dir", "checkpoint", "init_from", "device", "runs"),
        lambda c: c.retrain,
        "with --retrain, which trains small models",
    ),
    (("png",), lambda c: not c.runs, "without --runs"),
    (("page",), lambda c: c.png, "with --png, which writes a picture"),
    (
        ("text", "unknown", "serve", "out_dir", "checkpoint", "init_from", "device"),
        lambda c: c.runs,
        "with --runs",
    ),
)


@dataclass(frozen=True)
class LookSettings(PageSettings, loading.WeightsSettings):
    """
    usage: python look.py [--name=value ...], or python look.py --runs FOLDER ...

    Look inside a trained model: writes a page of its queries, keys, values and weights on a text, and of what
    changes do. The page is one file for a browser, and needs no network.
    """


def main(argv):
    given = read_given(LookSettings, argv)
    config = fill(LookSettings, given)
    refuse_unused((*loading.UNUSED, *UNUSED), config, given)
    require_replaceable(config.page, b"<!DOCTYPE html>")
    require_replaceable(config.png, b"\x89PNG")
    if config.retrain:
        table = compared(
            Dataset("plays"), range(config.retrain), tell=lambda line: print(line, file=sys.stderr)
        )
        return print(json.dumps(table, indent=1))
    if config.runs or config.folders:
        return show_runs(config)
    require_model(config)
    path, contents = loading.load_chosen(config)
    gpt, tokenizer = loading.pair_of(contents, path)
    with out_of_memory_as(f"out of memory: try a shorter --text than {config.text[:40]!r}, or --device=cpu"):
        looker = Looker(gpt.to(find_device(config.device), torch.float32))
        look = Look(looker, tokenizer, contents, str(path), config.unknown)
        text = read_start(config.text) or look.text_at_hand()
        if config.serve:
            serve(look, text, config.port)
        else:
            own = config.init_from == "resume" and (Path(path).parent / METRICS).exists()
            write(config.page, html(look.figures(text), runs_of([Path(path).parent]) if own else []))


def require_replaceable(path, first_bytes):
    """Raise UserError where something else than a page or picture, which begins so, is at the path."""
    path = Path(path or "none")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file, as {path / 'look.html'}")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(first_bytes)) not in (b"", first_bytes):
                raise UserError(f"{path} is there, and is another kind of file: give another name")


def require_model(config):
    """Raise UserError where the run has no checkpoint, with the commands that make one."""
    asked_for_run = config.init_from == "resume" and config.checkpoint in ("best", "newest")
    if asked_for_run and not loading.find(config.out_dir, config.checkpoint).exists():
        raise UserError(
            f"there is no checkpoint in {config.out_dir}: python prepare.py plays, and python train.py "
            "config/train_plays_char.py, make one in out/plays_char; or look at --init_from=smollm2"
        )


def show_runs(config):
    """Write the curves of the runs. Raises UsageError where none is named, or without --runs."""
    if not (config.runs and config.folders):
        wrong = "--runs names no folder" if config.runs else f"{config.folders[0]} is not asked for by a name"
        raise UsageError(f"{wrong}: python look.py --runs out/a out/b shows the curves of runs")
    runs = runs_of(config.folders)
    if config.png:
        draw_png(runs, config.png)
        print(config.png)
    else:
        write(config.page, html(runs=runs))


class Look:
    """
    A model that is looked into, and its tokenizer. A text for one that was trained here on conversations is a
    message to it.
    """

    def __init__(self, looker, tokenizer, contents, name, unknown):
        self.looker, self.tokenizer, self.name, self.unknown = looker, tokenizer, name, unknown
        self.dataset = contents.get("config", {}).get("dataset", "")
        self.is_asked = tokenizer.kind == "chat" and bool(self.dataset)
        self.most = min(MOST_TOKENS, looker.gpt.config.block_size)

    def text_at_hand(self):
        """
        A text for a user who gave none: the first question of the validation split of the conversations that
        the model was trained on, or a sentence. Raises UserError where that set is not there.
        """
        if not self.is_asked:
            ids = self.tokenizer.encode(SHOWN, "skip").tolist()
            return self.tokenizer.decode(ids[: self.most - len(self.tokenizer.begin)])
        ids, learnt = next(Dataset(self.dataset).marked_conversations("val"))
        marks = self.tokenizer.specials().values()
        return self.tokenizer.decode([id for id in ids[: int(learnt.argmax())].tolist() if id not in marks])

    def ids(self, text):
        """The ids of a text that the page shows. Raises UserError."""
        if self.is_asked:
            ids = self.tokenizer.encode_chat([("user", text)], self.unknown).tolist()
        else:
            ids = [*self.tokenizer.begin, *self.tokenizer.encode(text, self.unknown).tolist()]
        if not 2 <= len(ids) <= self.most:
            raise UserError(f"the text has {len(ids)} tokens, but the page shows from 2 to {self.most}")
        return ids

    def figures(self, text):
        return figures(self.looker, self.tokenizer, self.ids(text), self.name)

    def layer(self, ids, layer):
        """The exact queries, keys and values of one layer."""
        return of_layer(self.looker.trace(torch.tensor([ids], device=self.looker.device)), layer)


def serve(look, text, port):
    """Serve the page of a text until Ctrl-C."""
    first = look.figures(text)
    answers = {
        "figures": lambda asked: look.figures(text_in(asked)),
        "train": lambda asked: train_small(change_in(asked), look.dataset),
        "layer": lambda asked: look.layer(*layer_in(asked, look.looker.gpt.config)),
    }
    server = Server(port, lambda: html(first, text=text), answers)
    print(f"{server.address} shows the page, on this machine alone. Ctrl-C ends it.", flush=True)
    with server:
        server.serve_forever()


def train_small(name, dataset):
    """The losses of a small model that is trained now with a change, on the model's own set or the plays."""
    folder = next(
        (one for one in (dataset, "plays") if one and (folder_of(one) / "meta.json").exists()), None
    )
    if folder is None:
        raise UserError("there is no prepared text to train on: python prepare.py plays")
    data = Dataset(folder)
    if data.is_chat:
        raise UserError(f"{folder} has conversations, and the small model trains on texts: prepare.py plays")
    gpt = train_with(WHAT_IFS[name], data, steps=STEPS_NOW)
    return losses(gpt, data, WHAT_IFS[name])


def change_in(asked):
    """The name of a change in a request. Raises UsageError."""
    if asked.get("change") not in list(WHAT_IFS):
        raise UsageError(f"change must be one of {', '.join(WHAT_IFS)}")
    return asked["change"]


def text_in(asked):
    """The text in a request. Raises UsageError."""
    if not isinstance(asked.get("text"), str):
        raise UsageError("text must be a string")
    return asked["text"]


def layer_in(asked, config):
    """(ids, number of a layer) in a request. Raises UsageError."""
    ids, layer = asked.get("ids"), asked.get("layer")
    if type(layer) is not int or not 0 <= layer < config.n_layer:
        raise UsageError(f"layer must be a number from 0 to {config.n_layer - 1}")
    if not isinstance(ids, list) or not 2 <= len(ids) <= config.block_size:
        raise UsageError(f"ids must be 2 to {config.block_size} numbers")
    if not all(type(id) is int and 0 <= id < config.vocab_size for id in ids):
        raise UsageError(f"ids must be numbers from 0 to {config.vocab_size - 1}")
    return ids, layer


def write(path, page):
    with replacing(Path(path)) as beside:
        beside.write_text(page, "utf-8")
    print(f"{path}: open it in a browser")
