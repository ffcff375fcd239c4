"""Signals that ask a run to stop. It finishes its step, saves, and leaves."""

import signal


class StopSignals:
    """
    While this context is open, SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM's warning) only leave their name
    in `received`.

    A second Ctrl-C raises KeyboardInterrupt, as it would without this.
    """

    def __init__(self):
        self.received = None
        self.before = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
