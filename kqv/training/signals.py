"""Signals that ask a run to stop: it finishes its step, saves a checkpoint and ends."""

import os
import signal

from kqv import errors


class StopSignals:
    """
    A context in which SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal has gone)
    ask the run to stop: the first sets `received`, the second is answered by a line, and a Ctrl-C that is the
    third raises KeyboardInterrupt. (A Ctrl-C under torchrun reaches a process twice.) SIGHUP stays ignored
    where it was: nohup asks for that.

    Where the process ends with the command, all of them are ignored after the context: the run is over, and
    its exit status stays what it is. After an error they end the process as usual.
    """

    def __init__(self, active=True):
        """Not `active`: for a run with nothing to save, which signals end at once as usual."""
        self.active = active
        self.received = None  # the first signal.Signals that came
        self.count = 0  # how many came
        self.before = {}  # number of a signal -> the handler that it had

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP) * self.active:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.count += 1
        self.received = self.received or signal.Signals(number)
        if self.count == 2 and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            errors.say_at_once(
                f"warning: {name}: the run stops already, and saves first; one more Ctrl-C ends it unsaved"
            )
        if self.count > 2 and number == signal.SIGINT:
            raise KeyboardInterrupt

    def __exit__(self, kind, *exception):
        for number, handler in self.before.items():
            if errors.is_command:
                handler = signal.SIG_DFL if kind else signal.SIG_IGN
            signal.signal(number, handler)
