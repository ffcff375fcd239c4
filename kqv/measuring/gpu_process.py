"""A command in a process of its own: lines of JSON come out, and it ends at its time limit."""

import json
import os
import signal
import subprocess
import threading
from contextlib import suppress

from kqv.errors import first_line


class Process:
    """
    `command` in a process of its own and a group of its own. Each line of its output that is an object of
    JSON goes to `take`, as a dict; all else that it prints goes to the file at `messages`. `environment` has
    more variables.
    """

    def __init__(self, command, messages, take, environment=None):
        self.command, self.messages, self.take, self.environment = command, messages, take, environment

    def run(self, seconds):
        """
        Run it for at most so many seconds, then end it and all that it started. Returns why it failed, or
        None.
        """
        with open(self.messages, "wb") as messages:
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **(self.environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,
            )
            reader = threading.Thread(target=self.read, args=(process.stdout, messages), daemon=True)
            reader.start()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"not done after {seconds} s"
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                reader.join(5)  # a process that has left the group may hold the pipe for longer
        return self.reason(process.returncode)

    def read(self, output, messages):
        for line in output:
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict) and {"part", "what"} <= found.keys():
                self.take(found)
            else:
                with suppress(ValueError):  # closed: it is printed after the end
                    messages.write(line)
                    messages.flush()

    def reason(self, status):
        """Why a process with that exit status failed: its last message, where there is one."""
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        if not status:
            return None
        lines = self.messages.read_text("utf-8", "replace").strip().splitlines()
        return first_line(lines[-1], 300) if lines else f"exit status {status}"
