"""Symbolic equality of two answers in worker processes, with a time limit that holds anywhere.

math-verify limits its own time with SIGALRM, which works in the main thread only and cannot stop a computation inside C; a thread
cannot be stopped at all. So each comparison runs in one of a few child processes (symbolic_worker.py); one that overruns is killed
and replaced. Children are started by exec, never by a bare fork, which a program with JAX's threads must not do.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import pathlib
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import IO, cast

WORKER = pathlib.Path(__file__).with_name("symbolic_worker.py")
START_SECONDS = 120.0  # importing sympy on a cold, busy machine


class _Worker:
    """One child process: at most one request under way."""

    def __init__(self, timeout_s: float, memory_mb: int):
        # The child's own alarm is only the second net, so it is set later than the parent's limit.
        command = [sys.executable, "-P", str(WORKER), str(memory_mb), str(math.ceil(timeout_s) + 2)]
        self.process = subprocess.Popen(  # start_new_session: Ctrl-C in the terminal is the parent's business
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.requests, self.replies = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        os.set_blocking(self.replies.fileno(), False)
        self.buffer = b""
        self.job: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, job: int, gold: str, answer: str, timeout_s: float) -> None:
        """Hands over one comparison; BrokenPipeError where the child is gone."""
        self.job, self.deadline = job, time.monotonic() + timeout_s
        self.requests.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
        self.requests.flush()

    def receive(self) -> dict | None:
        """The next reply; None while the line is incomplete; EOFError where the child has ended."""
        chunk = self.replies.read()
        if chunk == b"":
            raise EOFError
        self.buffer += chunk or b""
        line, end, rest = self.buffer.partition(b"\n")
        if not end:
            return None
        self.buffer = rest
        return json.loads(line)

    def kill(self) -> None:
        """Ends the child at once and collects it."""
        self.process.kill()
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):  # a request may still be buffered
            self.requests.close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


class SymbolicPool:
    """Compares pairs of LaTeX answers in parallel child processes. Safe to use from any thread; starts nothing before it is needed.

    workers: the most child processes at a time.
    timeout_s: seconds that one comparison may take before its process is killed.
    batch_timeout_s: seconds that one call of compare may take; what is left then counts as timed out, so that a policy that writes
      nothing but power towers slows a step by a bounded time.
    memory_mb: address space of a child in MiB.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 3.0, batch_timeout_s: float = 60.0, memory_mb: int = 2048):
        self.workers, self.timeout_s, self.batch_timeout_s, self.memory_mb = workers, timeout_s, batch_timeout_s, memory_mb
        self._alive: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _kill_all, self._alive)

    def close(self) -> None:
        """Ends the child processes; the next comparison starts new ones."""
        with self._lock:
            _kill_all(self._alive)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Compares each (gold, answer).

        Returns one outcome a pair: "equal", "different", "gold_unparsed", "answer_unparsed", "timeout", "exhausted" (memory or
        recursion), or "error: why".
        """
        with self._lock:
            if self._owner != os.getpid():  # after a fork the pipes belong to the parent: leave them alone
                self._finalizer.detach()
                self._alive, self._owner = [], os.getpid()
                self._finalizer = weakref.finalize(self, _kill_all, self._alive)
            try:
                return self._run(pairs)
            except BaseException:  # a child with a stale request under way must not serve the next call
                _kill_all(self._alive)
                raise

    def _run(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        waiting = collections.deque(range(len(pairs)))
        outcomes: list[str] = [""] * len(pairs)
        left = len(pairs)
        started: float | None = None  # the batch's clock runs from the first child that is up, not from its start-up
        while left:
            if started is not None and time.monotonic() - started > self.batch_timeout_s:
                _kill_all([w for w in self._alive if w.job is not None])
                self._alive[:] = [w for w in self._alive if w.job is None]
                return [outcome or "timeout" for outcome in outcomes]
            while len(self._alive) < min(self.workers, left):
                self._alive.append(_Worker(self.timeout_s, self.memory_mb))
            self._hand_out(waiting, pairs)
            for worker, reply in self._wait():
                job, worker.job = worker.job, None
                if "fatal" in reply:
                    _kill_all(self._alive)
                    return [outcome or f"error: {reply['fatal']}" for outcome in outcomes]
                if "ready" in reply:
                    worker.ready = True
                    started = started or time.monotonic()
                elif job is not None:
                    outcomes[job] = reply["outcome"]
                    left -= 1
        return outcomes

    def _hand_out(self, waiting: collections.deque[int], pairs: Sequence[tuple[str, str]]) -> None:
        """Gives each idle child the next pair."""
        for worker in [w for w in self._alive if w.ready and w.job is None]:
            if not waiting:
                return
            job = waiting.popleft()
            try:
                worker.send(job, *pairs[job], self.timeout_s)
            except BrokenPipeError:  # the child was killed from outside while idle
                self._discard(worker)
                waiting.appendleft(job)

    def _wait(self) -> list[tuple[_Worker, dict]]:
        """Waits for the next replies. A child that overran or died is given up, and its reply made up here."""
        occupied = [w for w in self._alive if w.job is not None or not w.ready]
        if not occupied:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in occupied:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            pause = max(0.0, min(w.deadline for w in occupied) - time.monotonic())
            readable = {key.data for key, _ in selector.select(pause)}
        replies = []
        for worker in occupied:
            try:
                reply = worker.receive() if worker in readable else None
                lost = reply is None and time.monotonic() >= worker.deadline
                ending = "timeout"
            except EOFError:
                reply, lost, ending = None, True, "error: the comparing process died"
            if lost:
                self._discard(worker)
                reply = {"outcome": ending} if worker.ready else {"fatal": "the comparing process does not start"}
            if reply is not None:
                replies.append((worker, reply))
        return replies

    def _discard(self, worker: _Worker) -> None:
        self._alive.remove(worker)
        worker.kill()
