"""How many failures a run bears: past that all its requests pause, and when pauses do not help it stops.

Failures are counted after their retries, over whole requests. A row of them, or too great a share of the last ones, begins a pause, each
twice as long as the one before. Where waiting cannot help (the server refuses, or the model never answers in form), it stops at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from jaxrl_llm.rewards.verdict import RewardStopped


@dataclass(frozen=True)
class BudgetConfig:
    """in_row: failures one after the other that begin a pause. share: of the last `window` requests, the failed part above which a pause begins
    (1 never). pauses: how many may follow each other; the next stops the run. pause: seconds of the first, doubled each time.
    """

    in_row: int = 20
    share: float = 0.5
    window: int = 100
    pauses: int = 3
    pause: float = 10.0


class Budget:
    """Failures and successes of requests, told by several threads. clock, sleep: of time.monotonic and time.sleep, or a test's."""

    def __init__(self, config: BudgetConfig, clock: Callable[[], float], sleep: Callable[[float], None]):
        self.config, self._clock, self._sleep = config, clock, sleep
        self._lock = threading.Lock()
        self._last: deque[bool] = deque(maxlen=config.window)  # True: failed
        self._in_row = self._pauses = 0
        self._until = float("-inf")
        self._stopped = ""

    def gate(self, ended: threading.Event) -> None:
        """Waits while there is a pause, unless `ended`. Raises RewardStopped once the budget is spent."""
        while not ended.is_set():
            with self._lock:
                if self._stopped:
                    raise RewardStopped(self._stopped)
                left = self._until - self._clock()
            if left <= 0:
                return
            self._sleep(min(left, 1.0))

    def passed(self) -> None:
        """A request was answered."""
        with self._lock:
            self._in_row = 0
            self._last.append(False)
            if len(self._last) == self.config.window and sum(self._last) <= self.config.share * self.config.window:
                self._pauses = 0

    def failed(self, reason: str, wait_helps: bool = True) -> None:
        """A request failed for good. reason: for the message, should it be the last one."""
        with self._lock:
            self._in_row += 1
            self._last.append(True)
            if self._clock() < self._until:
                return  # it was under way when the pause began
            failed = sum(self._last)
            too_many = len(self._last) == self.config.window and failed > self.config.share * self.config.window
            if self._in_row < self.config.in_row and not too_many:
                return
            told = f"{self._in_row} requests in a row failed" if not too_many else f"{failed} of the last {len(self._last)} requests failed"
            if self._pauses == self.config.pauses or not wait_helps:
                self._stopped = f"{told}, after {self._pauses} pauses; the last: {reason}"
                return
            self._until = self._clock() + self.config.pause * 2**self._pauses
            self._pauses += 1
            self._in_row = 0
            self._last.clear()
