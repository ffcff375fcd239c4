"""The server of a live page: it answers the page, and nobody else."""

import http.client
import json
import socket
import threading

import pytest

from kqv.looking import server as serving
from kqv.looking.server import MOST_BYTES, Server


@pytest.fixture
def served():
    """A server that echoes, and a function that sends it a request -> (status, text)."""
    server = Server(0, lambda: "<p>the page</p>", {"echo": lambda asked: asked})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port

    def send(method, path, body=None, host=f"127.0.0.1:{port}", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        if host is not None:
            connection.putheader("Host", host)
        body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        usual = (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} if body is not None else {}
        )
        for name, text in {**usual, **{key.replace("_", "-"): text for key, text in headers.items()}}.items():
            if text is not None:
                connection.putheader(name, text)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read().decode()

    yield server, send
    server.shutdown()
    server.server_close()


def test_the_page_and_its_questions_are_answered(served):
    server, send = served
    assert send("GET", "/") == (200, "<p>the page</p>")
    assert send("POST", "/echo", {"text": "é"}) == (200, json.dumps({"text": "é"}))
    own = f"http://127.0.0.1:{server.server_port}"
    assert send("POST", "/echo", {}, Origin=own)[0] == 200
    assert send("POST", "/echo", {}, host=f"localhost:{server.server_port}")[0] == 200


def test_it_listens_on_this_machine_alone(served):
    assert served[0].server_address[0] == "127.0.0.1"


def test_other_names_of_this_machine_are_refused(served):
    server, send = served
    port = server.server_port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1:{port}.evil.example",
        f"127.0.0.1.evil.example:{port}",
        f"user@127.0.0.1:{port}",
        f"127.0.0.1:{port}@evil.example",
        "127.0.0.1",
        f"127.0.0.1:{port} ",
        f"[::1]:{port}",
        f"0.0.0.0:{port}",
        f"127.1:{port}",
        f"LOCALHOST.:{port}",
        "",
        None,
    ):
        assert send("GET", "/", host=host)[0] == 403, host
        assert send("POST", "/echo", {}, host=host)[0] == 403, host


def test_other_origins_and_kinds_are_refused(served):
    server, send = served
    port = server.server_port
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1", ""):
        assert send("POST", "/echo", {}, Origin=origin)[0] == 403, origin
        assert send("GET", "/", Origin=origin)[0] == 403, origin
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None):
        assert send("POST", "/echo", {}, Content_Type=kind)[0] == 415, kind


def test_paths_lead_nowhere(served):
    _, send = served
    for path in (
        "/../look.py",
        "/etc/passwd",
        "/?a",
        "/%2e%2e/",
        "/figures/../echo",
        "*",
        "/echo/",
        "/ECHO",
    ):
        assert send("GET", path)[0] == 404, path
        assert send("POST", path, {})[0] == 404, path
    assert send("GET", "/echo")[0] == 404
    assert send("PUT", "/echo", {})[0] == 501


def test_a_request_is_of_json_and_not_too_long(served):
    _, send = served
    for body in (b"", b"{", b"[]", b"1", b'"text"', b"\xff", b"[" * 60_000):
        assert send("POST", "/echo", body)[0] == 400, body[:20]
    assert send("POST", "/echo", b" " * MOST_BYTES)[0] == 400
    for length in (str(MOST_BYTES + 1), "9" * 30):
        assert send("POST", "/echo", b"{}", Content_Length=length)[0] == 413
    for length in ("-1", "1.5", "", None, "²"):
        assert send("POST", "/echo", b"{}", Content_Length=length and length.encode())[0] == 411, length


def test_a_client_that_says_nothing_is_let_go(served, monkeypatch):
    monkeypatch.setattr(serving.Handler, "timeout", 0.2)
    server, send = served
    with socket.create_connection(("127.0.0.1", server.server_port)) as slow:
        slow.settimeout(10)
        slow.sendall(b"POST /echo HTTP/1.1\r\n")
        assert slow.recv(1) == b""  # the connection is closed
        assert send("GET", "/")[0] == 200


def test_an_answer_that_fails_is_one_line(served):
    server, send = served

    def fail(asked):
        raise RuntimeError("first line\nsecond line")

    server.answers["fail"] = fail
    status, text = send("POST", "/fail", {})
    assert status == 500 and "first line" in text and len(text.splitlines()) == 1
    assert send("GET", "/")[0] == 200


def test_one_answer_is_computed_at_a_time(served):
    server, send = served
    inside, most = [], []

    def slow(asked):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()
        return {}

    server.answers["slow"] = slow
    threads = [threading.Thread(target=send, args=("POST", "/slow", {})) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
