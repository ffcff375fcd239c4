"""
When one of many processes fails, the others name it, and one of them prints why.

Processes share a store, a small table that torchrun or the first process hosts. In it every process shows by
a heartbeat that it is alive, and posts the error that ends it.
"""

import os
import threading
import time
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from kqv.errors import UserError, first_line
from kqv.printable import one_line

GRACE = 2  # seconds within which a living process shows a heartbeat


class FailureDetector:
    """
    While this context is open, a thread shows this process's heartbeat in the store, whatever the process
    waits for, and watches for the first error that another process posts.
    """

    def __init__(self, store, rank, size, hosts_store=False):
        self.store, self.rank, self.size = store, rank, size
        self.hosts_store = hosts_store  # whether the store ends with this process
        self.first_error = None  # a copy of the posted error, which outlives the store
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.beat, args=(store.clone(),), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stopped.set()
        self.thread.join(GRACE)

    def beat(self, store):
        """Uses a connection of its own, since the main thread may block the other one."""
        with suppress(RuntimeError):  # the store has ended; the main thread will notice and say so
            while not self.stopped.wait(GRACE / 4):
                store.set(f"heartbeat {self.rank}", str(time.monotonic()))
                if self.first_error is None and store.check(["error"]):
                    self.first_error = store.get("error").decode()

    @contextmanager
    def reporting(self, timeout):
        """
        Post the error that ends this process. Errors of communication become a UserError that names the lost
        process; `timeout` is how many seconds processes wait for each other.
        """
        try:
            yield
        except UserError as error:
            error.already_reported = self.post_error(str(error))
            raise
        except RuntimeError as error:
            if not is_about_processes(error):
                self.post_error(f"process {self.rank} of {self.size} failed: {first_line(error)}")
                raise
            lost = UserError(self.explain(error, timeout))
            lost.already_reported = self.post_error(str(lost))
            raise lost from None

    def post_error(self, message):
        """Post the error that ends this process. Returns whether another process has posted the same."""
        message = one_line(message)  # a store takes no text that is no UTF-8
        try:
            self.store.set("error", message)
            already_reported = self.store.add(f"reports of {message}", 1) > 1
        except RuntimeError:  # the store has ended
            return self.first_error == message
        if self.hosts_store:
            time.sleep(GRACE)  # for the others to read it
        return already_reported

    def explain(self, error, timeout):
        """
        Why other processes did not answer for at most `timeout` seconds: the error that one of them posted,
        or which of them have ended or hang. `error` is what the communication library raised here.
        """
        timed_out = "timeout" in str(error) or "imed out" in str(error)
        try:
            self.store.set(f"waiting {self.rank}", "")
            if timed_out:
                self.store.set("timed out", "")
            before = self.read_all("heartbeat")
            time.sleep(GRACE + timed_out * timeout / 20)  # others may have begun to wait later
            if self.store.check(["error"]):
                return self.store.get("error").decode()
            timed_out = self.store.check(["timed out"])
            heartbeats, waiting = self.read_all("heartbeat"), self.read_all("waiting")
        except RuntimeError:  # the store has ended
            return self.first_error or (
                f"process 0 of {self.size}, or the torchrun that started it, has ended: look at its output"
            )
        ranks = range(self.size)
        lost = [r for r in ranks if heartbeats[r] == before[r]] or [r for r in ranks if waiting[r] is None]
        if not lost:
            return f"the processes lost each other within {timeout:g} s: look at the network between them"
        return (
            f"process {', '.join(map(str, lost))} of {self.size} "
            + (f"has not answered for {timeout:g} s" if timed_out else "has ended")
            + ": look at its output and its machine; --init_from=auto goes on from the last save"
        )

    def read_all(self, name):
        """What each process has in the store under `name`; None for one that has nothing."""
        keys = [f"{name} {rank}" for rank in range(self.size)]
        return [self.store.get(key) if self.store.check([key]) else None for key in keys]


def is_about_processes(error):
    """Whether an exception says that another process is late or gone."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def report_once(main):
    """
    A script's `main(argv)` for many processes: torchrun learns of its errors, and one process prints an error
    that several have.
    """

    def returning_error(argv):
        try:
            main(argv)
        except UserError as error:  # returned, not raised: torchrun would print its traceback
            return error

    def reporting_once(argv):
        under_torchrun = "TORCHELASTIC_ERROR_FILE" in os.environ
        if error := (record(returning_error) if under_torchrun else returning_error)(argv):
            if error.already_reported is None:  # before processes met: the first of each machine prints it
                error.already_reported = os.environ.get("LOCAL_RANK", "0") != "0"
            raise error

    return reporting_once
