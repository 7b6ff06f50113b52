"""Ending a run cleanly from outside: SIGTERM (preemption) and Ctrl-C let the step finish, save, and leave. And from inside, where a step
does not come to its end."""

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np


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

    def agreed(self, waits: bool = True) -> int:
        """`signum`, the same on all processes of a job: that of any of them. Every process asks after the same steps.

        A signal reaches the processes of a job at different moments. One that saved and left after its own step would leave the others in
        a step whose sums wait for it. waits: False after a step whose end nothing waits for, which asking would; several processes then
        answer 0 until they are asked again.
        """
        if jax.process_count() > 1:
            if not waits:
                return 0
            from jax.experimental.multihost_utils import process_allgather

            self.signum = int(np.max(process_allgather(np.int32(self.signum))))
        return self.signum


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


class Alive:
    """What tells a watchdog that the run goes on: it is called at each new piece of work. seconds: 0 = there is no watchdog."""

    def __init__(self, seconds: int):
        self.seconds = seconds

    def __call__(self) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def rest(self) -> None:
        """Until it is called again nothing is watched: a checkpoint is waited for, which has a limit of its own. A run that is ended while it
        writes, and so writes the same again, would get nowhere."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def watchdog(seconds: int) -> Iterator[Alive]:
    """Within the block the process ends with exit code 1, the stacks of all threads on stderr, where what is given is not
    called for so many seconds: a reward that waits for ever, a collective whose peer is gone. What starts it anew goes on from the newest
    checkpoint. seconds: 0 = it waits with the step."""
    alive = Alive(seconds)
    alive()
    try:
        yield alive
    finally:
        alive.rest()
