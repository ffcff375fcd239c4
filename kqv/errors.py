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
    Run a script's `main(argv)` and turn what went wrong into one line on standard error and an exit status.
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
    """What an exception says, short enough for the middle of a line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


def warn(message):
    """Say what went wrong where the program can go on; of many processes the main one does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(message, status):
    if message:
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)
