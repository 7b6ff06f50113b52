"""Ending a run cleanly from outside: SIGTERM (preemption) and Ctrl-C let the step finish, save, and leave. And from inside, where a step
does not come to its end."""

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator


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


@contextlib.contextmanager
def watchdog(seconds: int) -> Iterator[Callable[[], None]]:
    """Within the block the process ends with exit code 1, the stacks of all threads on stderr, where the function that is given is not
    called for so many seconds: a reward that waits for ever, a collective whose peer is gone. What starts it anew goes on from the newest
    checkpoint. seconds: 0 = it waits with the step."""
    if not seconds:
        yield lambda: None
        return

    def alive() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
