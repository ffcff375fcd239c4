"""
What a user sees when something is wrong: one line that names the value and the way out, never a traceback.
"""

import os
import sys


class UserError(Exception):
    """
    The environment is at fault: a missing file, a broken checkpoint, an absent device. Exit status 1.
    """

    status = 1
    already_reported = None  # whether another process has printed it; None: not known


class UsageError(UserError):
    """The command or its settings are wrong: a misspelt name, a value out of range. Exit status 2."""

    status = 2


def run(main):
    """
    Run a command's `main(argv)`. Its error becomes one line on standard error and an exit status.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # any text shows, whatever the terminal's encoding
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a reader that has gone (`| head`) is noticed here, not in the interpreter's exit
    except UserError as error:
        fail("" if error.already_reported else str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)


def first_line(error, length=100):
    """The first line of an exception's message, cut to `length`; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


def warn(message):
    """Print a warning: something is wrong, but the program goes on. Only the main process prints."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(message, status):
    """Print an error, unless it is empty, and exit."""
    if message:
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)
