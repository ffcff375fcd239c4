"""
Serves the page on this machine alone, and computes what it asks for.

A page of another site may send requests to 127.0.0.1 as well. So a request must name this server as its Host
(a name that another site points here is refused), its Origin, if it has one, must be this server, and its
content type must be JSON, which a page of another site can't send unasked.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kqv.errors import UserError, first_line

MOST_BYTES = 64 * 1024  # of a request
SECONDS = 10  # that a client may take to send a request


class Refused(Exception):
    """A request that gets no answer but a status and a line."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """
    Answers GET / with `page`, a function that returns HTML, and POST /NAME with `answers[NAME]`, a function
    of a dict that returns what JSON can hold. One answer is computed at a time.
    """

    daemon_threads = True

    def __init__(self, port, page, answers):
        self.page, self.answers, self.lock = page, answers, threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(
                f"port {port} of this machine can't be used ({error.strerror}): try another --port"
            ) from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/"

    def handle_error(self, request, client_address):
        """A client that has gone needs no traceback."""


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.0", SECONDS
    server_version, sys_version = "kqv", ""

    def do_GET(self):
        self.attempt(self.get)

    def do_POST(self):
        self.attempt(self.post)

    def get(self):
        if self.path != "/":
            raise Refused(404, "there is one page, /")
        with self.server.lock:
            self.reply(200, "text/html; charset=utf-8", self.server.page())

    def post(self):
        answer = self.server.answers.get(self.path.removeprefix("/"))
        if answer is None:
            raise Refused(404, "nothing is asked for by that name")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the content type must be application/json")
        asked = self.read_json()
        with self.server.lock:
            self.reply(200, "application/json", json.dumps(answer(asked)))

    def read_json(self):
        """The JSON object that a request holds."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "Content-Length must say how long it is")
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise Refused(413, f"it has more than {MOST_BYTES} bytes")
        try:
            asked = json.loads(self.rfile.read(int(length)).decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refused(400, "it is not JSON") from None
        if not isinstance(asked, dict):
            raise Refused(400, "it is no JSON object")
        return asked

    def attempt(self, do):
        try:
            if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
                raise Refused(403, "the Host is not this server")
            origin = self.headers.get("Origin")
            if origin is not None and origin not in [f"http://{host}" for host in self.server.hosts]:
                raise Refused(403, "the Origin is not this server")
            do()
        except Refused as refused:
            self.reply(refused.status, "text/plain; charset=utf-8", f"{refused}\n")
        except UserError as error:
            self.reply(422, "text/plain; charset=utf-8", f"{error}\n")
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
        except Exception as error:
            self.reply(500, "text/plain; charset=utf-8", f"{first_line(error)}\n")

    def reply(self, status, kind, text):
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Nothing: the terminal belongs to the user."""
