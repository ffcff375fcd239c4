"""
The chat template that a model brings: a text in Jinja, which turns messages into one text.

A template is data from a stranger. It runs in Jinja's sandbox, which gives it neither files nor the inside of
Python's objects, and in a process of its own that the system ends where it takes too long.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

from kqv.errors import UserError, first_line

SECONDS = 5  # of a core for one rendering
LONGEST = 2**20  # characters that one rendering gives, at most, beside those of its messages
MEMORY = 2**29  # bytes of the process that renders
JINJA = (3, 1, 6)  # programs can leave the sandbox of older versions

START = "import sys; sys.path.insert(0, sys.argv[1]); from kqv.text.template import serve; serve()"


class Template:
    """
    A chat template, its `source`, with `variables` {name: text}: bos_token, eos_token and so on. Renders as
    transformers does (`apply_chat_template`).
    """

    def __init__(self, source, variables):
        self.source, self.variables = source, variables
        self.process = None

    def render(self, messages, add_generation_prompt=False):
        """
        [(role, text), ...] -> the text that the template makes of them; add_generation_prompt: with what
        opens the assistant's turn at its end. Raises UserError where the template refuses them, has an error,
        or takes more time, memory or output than it may.
        """
        found = self.ask(
            {
                "messages": [{"role": role, "content": text} for role, text in messages],
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if "error" in found:
            raise UserError(f"the chat template can't be used: {found['error']}")
        return found["text"]

    def ask(self, task):
        """What the process answers to a task; the process is started for the first, and after it ended."""
        self.process = self.process or start({"source": self.source, "variables": self.variables})
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status, self.process = self.process.wait(), None
        if status == -signal.SIGPROF:
            return {"error": f"it ran for more than {SECONDS} seconds"}
        return {"error": f"it took more than {MEMORY >> 20} MB of memory, or its process was killed"}


def start(template):
    """A process that renders the template. It ends when the other end of its pipes is closed."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", START, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
    )
    weakref.finalize(process, end, process.stdin, process.stdout)
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(template).encode() + b"\n")
    return process


def end(*pipes):
    for pipe in pipes:
        with suppress(OSError):
            pipe.close()


# In the process of the template


def serve():
    """Read a template from standard input, then tasks, one a line; write a line of JSON for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it the pipe
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing else is taken for an answer
    with suppress(ValueError, OSError):  # a system without this limit still has that on time
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template, render = json.loads(sys.stdin.buffer.readline()), None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        try:
            render = render or compiled(template["source"])
            text = rendered(render, {**template["variables"], **json.loads(line)})
            answer = json.dumps({"text": text})
        except MemoryError:
            answer = json.dumps({"error": f"it took more than {MEMORY >> 20} MB of memory"})
        except Exception as error:  # a template can raise anything
            answer = json.dumps({"error": why(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(f"{answer}\n")
        answers.flush()


def rendered(template, values):
    """The text that a template makes of values. Raises ValueError where it is too long, and many errors."""
    longest = LONGEST + 2 * sum(len(message["content"]) for message in values["messages"])
    parts, size = [], 0
    for part in template.generate(values, tools=[], documents=None):
        parts.append(part)
        size += len(part)
        if size > longest:
            raise ValueError(f"it wrote more than {longest} characters")
    text = "".join(parts)
    text.encode("utf-8")  # raises an error where the text is not valid Unicode
    return text


def why(error):
    if isinstance(error, ImportError):
        return f"jinja2 {'.'.join(map(str, JINJA))} or newer is missing: pip install --upgrade jinja2"
    line = getattr(error, "lineno", None)
    return first_line(error, 200) + (f" (line {line})" if line else "")


def compiled(source):
    """A template with the filters, functions and settings that transformers gives it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < JINJA:
        raise ImportError

    class Generation(Extension):
        """{% generation %}: around what the assistant says. It changes nothing of the text."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source)
