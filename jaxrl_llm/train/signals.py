"""Ending a run cleanly from outside: SIGTERM (preemption) and Ctrl-C let the step finish, save, and leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(SystemExit):
    """The run was told to stop, saved its state and stopped; the same command goes on from there. Exit code 128 + signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Which signal asked for an end; 0 = none."""

    signum: int = 0


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGINT only set `signum`; a second one has its usual effect. Does nothing outside the main thread,
    where Python allows no handlers."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {}

    def handler(signum, _frame):
        request.signum = signum
        signal.signal(signum, before[signum])

    for signum in (signal.SIGTERM, signal.SIGINT):
        before[signum] = signal.signal(signum, handler)
    try:
        yield request
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
