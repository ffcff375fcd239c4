"""Signals that ask a run to stop: it finishes its step, saves a checkpoint and ends."""

import signal


class StopSignals:
    """
    A context in which SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal has gone)
    do no more than set `received` to the signal. A second Ctrl-C raises KeyboardInterrupt as usual. SIGHUP
    stays ignored where it was: nohup asks for that.
    """

    def __init__(self):
        self.received = None  # the last signal.Signals that came
        self.before = {}  # number of a signal -> the handler that it had

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
