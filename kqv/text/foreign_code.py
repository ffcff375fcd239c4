"""Calls of compiled code that works on what a stranger wrote: with a limit on time, and quiet."""

import os
import threading
from contextlib import contextmanager, suppress


def within(seconds, call):
    """
    The result of `call()`. Raises TimeoutError if it takes longer; it then goes on until the process ends,
    since compiled code can't be stopped. What it writes to standard error is lost.
    """
    outcome = []

    def run():
        try:
            outcome.append((call(), None))
        except BaseException as error:  # a panic of Rust is no Exception
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    with quiet():
        thread.start()
        thread.join(seconds)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@contextmanager
def quiet():
    """Send what is written to standard error to nowhere, as a panic of Rust, which prints its stack."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # standard error is closed
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        with suppress(OSError):
            os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
