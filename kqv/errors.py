"""
What a user sees when something is wrong: one line that names the value and the way out, never a traceback.

This module is imported first, and Ctrl-C during that import prints a traceback. To keep it short, modules
that are rarely needed are imported inside functions.
"""

import errno
import os
import sys

from kqv import threads
from kqv.printable import one_line, printable, without_commands

REQUIRED = ("torch", "numpy", "tiktoken", "tqdm", "wandb")


class UserError(Exception):
    """
    The environment is at fault: a missing file, a broken checkpoint, an absent device. Exit status 1.
    """

    status = 1
    already_reported = None  # whether another process has printed it; None: not known


class UsageError(UserError):
    """The command or its settings are wrong: a misspelt name, a value out of range. Exit status 2."""

    status = 2


class OutputLost(UserError):
    """Standard output can't be written. A reader that has gone (`| head`) needs no message: status 0."""

    def __init__(self, error):
        super().__init__(f"standard output can't be written: {reason_of(error)}")
        self.already_reported = isinstance(error, BrokenPipeError)
        self.status = 0 if self.already_reported else 1


class Output:
    """
    A text stream that shows no control code: what is written is made printable by `show`, a function like
    `printable`, but where `as_it_is` is set.

    The stream may fail, because its reader has ended or its disk is full. If the output is `needed`, a write
    that fails raises OutputLost; else the text is dropped. `lost` is the first error.
    """

    def __init__(self, stream, needed, show=printable):
        self.stream, self.needed, self.show, self.lost = stream, needed, show, None
        self.as_it_is = False
        self.before = ""  # the last that was written

    def write(self, text):
        shown = text if self.as_it_is else self.show(text, before=self.before)
        self.before = shown[-1:] or self.before
        self.attempt(self.stream.write, shown)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, do, *arguments):
        try:
            do(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.lost = self.lost or error
            if self.needed:
                raise OutputLost(error) from None

    def __getattr__(self, name):
        return getattr(self.stream, name)


# How a command runs

is_command = False  # whether this process ends when the command does


def run_command(path):
    """
    Run the command in the file at `path`, its imports and its `main(argv)`, and exit. A command
    calls this before its imports, so that an import that fails, or Ctrl-C during one, ends in one line too.
    """
    global is_command
    is_command = not hasattr(sys, "ps1")  # a notebook goes on
    threads.begin()
    try:
        run(lambda argv: load(os.path.join(working_folder(), path)).main(argv))
    finally:
        if is_command:
            import signal

            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the interpreter ends
    sys.exit(0)


def working_folder():
    """The working folder. Raises UserError where it has been deleted: libraries fail then in many ways."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError("the working folder has been deleted: change to another (cd ..)") from None


def load(path):
    """The module in the file at `path`, which may be a copy of a command under another name."""
    import importlib.util

    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(main):
    """
    Run a command's `main(argv)`. Its error becomes one line on standard error and an exit status.
    """
    open_streams()
    before = sys.stdout, sys.stderr
    sys.stdout = Output(sys.stdout, needed=True)
    sys.stderr = Output(sys.stderr, needed=False, show=without_commands)
    try:
        output = sys.stdout
        status, message = outcome(lambda: main(sys.argv[1:]))
        flushed, unwritten = outcome(output.flush)
        if message or unwritten:
            print(f"error: {one_line(message or unwritten)}", file=sys.stderr, flush=True)
        for stream in (sys.stdout, sys.stderr):
            if stream.lost:
                discard(stream)
    finally:
        sys.stdout, sys.stderr = before
    if status or flushed:
        sys.exit(status or flushed)


def outcome(do):
    """Call `do` -> (exit status, what to tell the user of its error)."""
    try:
        do()
        return 0, ""
    except SystemExit as stop:
        return stop.code or 0, ""
    except UserError as error:
        return error.status, "" if error.already_reported else str(error)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except ImportError as error:
        return 1, not_importable(error)
    except RecursionError:
        return 1, "what is to be read is nested too deeply"
    except UnicodeEncodeError as error:
        return 1, not_encodable(error)
    except OSError as error:
        return 1, f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 1, "out of memory: end other programs, or take something smaller"


def is_out_of_memory(error):
    """Whether an exception, of Python, numpy or torch, says that the memory of a device is used up."""
    signs = ("DefaultCPUAllocator", "std::bad_alloc", "can't start new thread", os.strerror(errno.ENOMEM))
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in signs))
    )


def not_encodable(error):
    """What could not be written, as of a name that is no UTF-8."""
    shown = error.object if len(error.object) <= 100 else f"{error.object[:100]}..."
    return f"{shown!r} can't be written in {error.encoding}: if it is a file or folder, give it another name"


def not_importable(error):
    """What is missing or broken, and what to run instead."""
    import shlex
    import traceback
    from pathlib import Path

    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in REQUIRED:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{place.filename}, line {place.lineno}: {first_line(error)}"
    root = Path(__file__).resolve().parent.parent
    python = root / ".venv/bin/python"
    if python.exists() and Path(sys.prefix).resolve() != python.parent.parent.resolve():
        way = f"run {shlex.join([str(python), sys.argv[0]])}, or activate that environment first"
    else:
        way = f"pip install -r {shlex.quote(str(root / 'requirements.txt'))}"
    return f"{name} is not installed for {sys.executable}: {way}"


# Standard streams


def open_streams():
    """
    Make the standard streams ready for any text. One that was closed (`>&-`) becomes the null device:
    else the next file that is opened would get its number, and what is printed would go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
        if number:
            try:
                getattr(sys, name).reconfigure(errors="backslashreplace")  # any text shows, in any encoding
            except (AttributeError, ValueError):  # a notebook's stream has no such method; one may be closed
                pass


def discard(stream):
    """Drop what `stream` holds and can't write: else the interpreter tries to write it again when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # no file is behind it
        pass


def output_may_be_lost():
    """From now on, standard output that can't be written is dropped, and the command goes on."""
    if isinstance(sys.stdout, Output):
        sys.stdout.needed = False


# Messages


def reason_of(error):
    """Why an operation of the system failed, in its words."""
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error, length=100):
    """The first line of an exception's message, cut to `length`; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip()[:length]


def say_at_once(message):
    """Print a line on standard error from a signal's handler, which may have interrupted another print."""
    try:
        os.write(2, f"{message}\n".encode())
    except OSError:  # nobody reads it
        pass


def warn(message):
    """Print a warning: something is wrong, but the program goes on. Only the main process prints."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def say(message):
    """Print a line on standard output. What is hidden in the names in it is written out, newlines too."""
    print(one_line(message), flush=True)


def print_text(text, raw=False, end="\n"):
    """
    Print a model's or a user's text: in a pipe or a file as it is; on a terminal printable, but where `raw`.
    """
    output = sys.stdout
    is_ours = isinstance(output, Output)
    if is_ours:
        output.as_it_is = raw or not output.isatty()
    try:
        print(text, end=end, flush=True)
    finally:
        if is_ours:
            output.as_it_is = False
