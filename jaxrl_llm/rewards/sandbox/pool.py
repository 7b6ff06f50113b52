"""Runs code that nobody vouches for: Python text, a function's name and JSON arguments in, a JSON result out.

Each job has a fresh process in a closed room (__init__.py says how closed). What goes wrong is never a result: code that is not Python,
that raises, dies, prints a forged answer or returns what is not JSON is an "error"; code that runs out of time or memory a "timeout".
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import selectors
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.sandbox import layers
from jaxrl_llm.rewards.sandbox.room import Room, RoomEnded
from jaxrl_llm.rewards.verdict import Status, Verdict

GRACE_SECONDS = 10.0  # after a check's own limit, for a machine that is busy; then the room is given up
MOST_REQUEST = 64 << 20  # bytes of one request
MOST_TOGETHER = 16  # jobs of a group in one process, which has the time of one
MOST_REMEMBERED = 100_000

# What a room must show before it gets any job: whoever it is, it has no number of root's, no network, no way to run a program, and sees
# nothing but what build_view put there.
SELF_TEST = """
import ctypes, os, socket
def look():
    kernel = ctypes.CDLL(None, use_errno=True)
    refused = []
    for call in (lambda: socket.socket(), lambda: os.execv("/usr/bin/env", ["env"]), lambda: os.listdir("/proc/1"), lambda: os.mkdir("/x")):
        try:
            call()
            refused.append(False)
        except OSError:
            refused.append(True)
    return [os.getpid(), os.getuid(), all(refused), kernel.prctl(39, 0, 0, 0, 0), sorted(os.listdir("/box"))]
"""
SELF_TEST_RESULT = [1, 1000, True, 1, []]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one check may use.

    wall_s: seconds from its start to its result. cpu_s: whole seconds of CPU. memory_mb: address space of a process in MiB, of which Python
    itself takes some 40. processes: processes and threads at a time, its own included; each may use memory_mb and cpu_s.
    file_mb: the largest file, disk_mb: all files, in MiB; they are in memory and gone afterwards. output_kb: what is kept of what it
    prints. result_kb: the longest result as JSON, in KiB.
    """

    wall_s: float = 5.0
    cpu_s: int = 3
    memory_mb: int = 256
    processes: int = 1
    file_mb: int = 8
    disk_mb: int = 16
    output_kb: int = 16
    result_kb: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UserError(f"sandbox limit {field.name} is {value}: it must be above 0")
            if field.name != "wall_s" and not isinstance(value, int):
                raise UserError(f"sandbox limit {field.name} is {value!r}: it must be a whole number")
        if self.memory_mb < 64:
            raise UserError(f"sandbox limit memory_mb is {self.memory_mb}: Python needs 64")


@dataclasses.dataclass(frozen=True)
class Job:
    """One call. as_bool: whether the result, unless None, becomes bool(result) before it is sent, for functions that return a match.

    group: jobs of one run with the same number, such as the rules of one response, may share a process where their code is so plain that none
    of it can reach another's (plain.py): several times as fast. They are answered as if each had its own; one that is not plain has.
    """

    code: str
    function: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    as_bool: bool = False
    group: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one job: status "value", "error" or "timeout"; the value; else a one-line reason; what was printed."""

    status: str
    value: Any = None
    reason: str = ""
    output: str = ""

    def verdict(self) -> Verdict:
        """PASS or FAIL for True or False; ERROR for any other value, None among them: a function that says nothing has not said no."""
        if self.status == "timeout":
            return Verdict(Status.TIMEOUT, reason=self.reason)
        if self.status == "error":
            return Verdict(Status.ERROR, reason=self.reason)
        if not isinstance(self.value, bool):
            return Verdict(Status.ERROR, reason=f"the check returned {'nothing' if self.value is None else type(self.value).__name__}, not a bool")
        return Verdict(Status.PASS if self.value else Status.FAIL, reason=f"the check returned {self.value}")


def _kill_all(rooms: list[Room]) -> None:
    while rooms:
        rooms.pop().kill()


class Sandbox:
    """Runs jobs in up to `workers` rooms at a time. Safe to use from any thread; starts nothing before it is needed.

    limits: of every check.
    isolation: "full", or layers.WEAK, by which the user accepts that code sees the host's files where the host allows nothing better.
    packages: folders that code may import from, shown read-only (a site-packages folder with what a data set's checkers need).
    batch_timeout_s: seconds that one call of run may take; what is left then counts as timed out, so that checks that all hang slow a step by
      a bounded time. None: as long as the checks take.
    Raises UserError where the host allows less than "full" asks for, or a folder is not there.
    """

    def __init__(
        self,
        workers: int = 2,
        limits: Limits | None = None,
        isolation: str = layers.FULL,
        packages: Sequence[str | os.PathLike[str]] = (),
        batch_timeout_s: float | None = None,
    ):
        if isolation not in layers.ISOLATIONS:
            raise UserError(f"unknown isolation {isolation!r}; {nearest(isolation, layers.ISOLATIONS)}")
        if workers < 1:
            raise UserError(f"a sandbox with {workers} workers runs nothing: it needs at least 1")
        self.workers, self.limits, self.isolated = workers, limits or Limits(), isolation == layers.FULL
        self.batch_timeout_s = math.inf if batch_timeout_s is None else batch_timeout_s
        self.packages = [os.path.realpath(folder) for folder in packages]
        self._alone: set[str] = set()  # code that was seen not to be plain, or to spend what others need
        for folder in self.packages:
            if not os.path.isdir(folder):
                raise UserError(f"sandbox packages: {folder} is no folder")
            if self.isolated and os.geteuid() == 0 and os.stat(folder).st_mode & 0o005 != 0o005:  # code of root's sandbox is not root
                raise UserError(f"sandbox packages: others than root may not read {folder}: chmod -R o+rX {folder}")
        if self.isolated and (why := layers.missing()):
            raise layers.refusal(why)
        self._reset()

    def _reset(self) -> None:
        self._rooms: list[Room] = []  # all that live
        self._idle: list[Room] = []
        self._starting = 0
        self._free = threading.Condition()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _kill_all, self._rooms)

    def close(self) -> None:
        """Ends the rooms, those at work too: their callers get errors. The next job starts new ones."""
        with self._free:
            idle, busy = self._idle[:], [room for room in self._rooms if room not in self._idle]
            self._idle.clear()
            self._rooms.clear()
            self._free.notify_all()
        for room in idle:
            room.kill()
        for room in busy:  # whoever waits for it sees its end and collects it
            room.process.kill()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, jobs: Sequence[Job]) -> list[Verdict]:
        """One Verdict a job, in order."""
        return [outcome.verdict() for outcome in self.run(jobs)]

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One Outcome a job, in order. Raises UserError where a room cannot be closed as asked."""
        if self._owner != os.getpid():  # after a fork the pipes belong to the parent: leave them alone
            self._finalizer.detach()
            self._reset()
        outcomes: list[Outcome | None] = [None] * len(jobs)
        waiting = collections.deque(self._together(jobs))
        failed: list[list[int]] = []
        at_work: list[Room] = []
        end = math.inf
        try:
            while (waiting or at_work) and time.monotonic() < end:
                while waiting and (room := self._take(block=not at_work)) is not None:
                    unit = waiting.popleft()
                    payload = _encode([jobs[index] for index in unit])
                    if isinstance(payload, bytes):
                        if self._send(room, unit, payload):
                            at_work.append(room)
                            end = min(end, time.monotonic() + self.batch_timeout_s)  # from the first check on, not from its room's start
                        else:  # it was ended from outside while idle
                            waiting.appendleft(unit)
                        continue
                    self._give(room)
                    if len(unit) == 1:
                        outcomes[unit[0]] = payload
                    else:
                        waiting.extendleft([index] for index in reversed(unit))
                for room, outcome in self._wait(at_work, end) if at_work else ():
                    at_work.remove(room)
                    unit, room.unit = room.unit, []
                    told = [outcome] if len(unit) == 1 else _parted(outcome, len(unit))
                    for index, answer in zip(unit, told, strict=True):
                        outcomes[index] = answer
                        if answer is None:
                            waiting.append([index])
                            if outcome.status == "value":
                                self._alone.add(jobs[index].code)
                    if len(unit) > 1 and outcome.status != "value":
                        failed.append(unit)
        finally:  # after an interruption, or out of time: a room with a stale request must not serve the next call
            for room in at_work:
                self._discard(room)
        late = Outcome("timeout", reason=f"the batch took its {self.batch_timeout_s:g} s")
        for unit in failed:  # by one of them; or, where each does well alone, by all together
            culprits = [index for index in unit if (found := outcomes[index]) is None or found.status != "value"]
            self._alone.update(jobs[index].code for index in culprits or unit)
        return [late if outcome is None else outcome for outcome in outcomes]

    def _together(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The numbers of the jobs, those that may share a process together."""
        if len(self._alone) > MOST_REMEMBERED:
            self._alone.clear()
        units: list[list[int]] = []
        open_: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            unit = None if job.group is None or job.code in self._alone else open_.get(job.group)
            if unit is not None and len(unit) < MOST_TOGETHER:
                unit.append(index)
                continue
            units.append([index])
            if job.group is not None and job.code not in self._alone:
                open_[job.group] = units[-1]
        return units

    def _take(self, block: bool) -> Room | None:
        """An idle room, or a new one where there may be more; None where there is none and the caller has other work."""
        with self._free:
            while not self._idle and len(self._rooms) + self._starting >= self.workers:
                if not block:
                    return None
                self._free.wait()
            if self._idle:
                return self._idle.pop()
            self._starting += 1
        room = None
        try:
            room = self._open()
        finally:
            with self._free:
                self._starting -= 1
                if room is not None:
                    self._rooms.append(room)
                self._free.notify()
        return room

    def _open(self) -> Room:
        """Starts a room and makes sure that it is closed."""
        room = Room(self.isolated, self.packages)
        try:
            header, _ = _await(room)
            if "fatal" in header:
                raise RoomEnded(header["fatal"])
            if self.isolated:
                payload = _encode([Job(SELF_TEST, "look")])
                assert isinstance(payload, bytes)
                room.send(dataclasses.asdict(Limits(wall_s=60.0)), payload)
                room.deadline = time.monotonic() + 60.0 + GRACE_SECONDS
                outcome = _read(*_await(room), Limits())
                if outcome.value != SELF_TEST_RESULT:
                    raise RoomEnded(f"the room is not closed: {outcome.reason or outcome.value}")
        except (RoomEnded, OSError) as error:
            room.kill()
            raise layers.refusal({"the room": str(error)}) from error
        except BaseException:
            room.kill()
            raise
        return room

    def _send(self, room: Room, unit: list[int], payload: bytes) -> bool:
        room.unit, room.deadline = unit, time.monotonic() + self.limits.wall_s + GRACE_SECONDS
        try:
            room.send(dataclasses.asdict(self.limits), payload)
        except OSError:
            self._discard(room)
            return False
        return True

    def _give(self, room: Room) -> None:
        with self._free:
            if room in self._rooms:
                self._idle.append(room)
            self._free.notify()

    def _discard(self, room: Room) -> None:
        with self._free:
            if room in self._rooms:
                self._rooms.remove(room)
            self._free.notify()
        room.kill()

    def _wait(self, at_work: Sequence[Room], end: float) -> list[tuple[Room, Outcome]]:
        """Waits for the next replies; what a room that ended or overran owes is made up here, and the room given up."""
        readable, done = _readable(at_work, end), []
        for room in at_work:
            try:
                reply = room.receive() if room in readable else None
            except RoomEnded as error:
                self._discard(room)
                done.append((room, Outcome("error", reason=f"{error}: a limit of the host, or somebody ended it")))
                continue
            if reply is not None:
                self._give(room)
                done.append((room, _read(*reply, self.limits)))
            elif time.monotonic() >= room.deadline:
                self._discard(room)
                done.append((room, Outcome("timeout", reason=f"no answer {GRACE_SECONDS:g} s after the limit of {self.limits.wall_s:g} s")))
        return done


def _readable(rooms: Sequence[Room], end: float = math.inf) -> set[Room]:
    """The rooms that have something to say; waits for the first, or until one is overdue or `end` has come."""
    with selectors.DefaultSelector() as selector:
        for room in rooms:
            selector.register(room.replies, selectors.EVENT_READ, room)
        pause = max(0.0, min(end, *(room.deadline for room in rooms)) - time.monotonic())
        return {key.data for key, _ in selector.select(pause)}


def _await(room: Room) -> tuple[dict, bytes]:
    """The next reply of one room; RoomEnded where it ends or takes too long."""
    while True:
        if _readable([room]) and (reply := room.receive()) is not None:
            return reply
        if time.monotonic() >= room.deadline:
            raise RoomEnded("it does not answer")


def _encode(jobs: Sequence[Job]) -> bytes | Outcome:
    """The request's body; an Outcome where the jobs cannot be sent."""
    try:
        calls = [
            {"code": job.code, "function": job.function, "args": list(job.args), "kwargs": dict(job.kwargs), "as_bool": job.as_bool} for job in jobs
        ]
        payload = json.dumps(calls[0] if len(calls) == 1 else {"jobs": calls}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return Outcome("error", reason=f"the arguments are not JSON: {error}")
    if len(payload) > MOST_REQUEST:
        return Outcome("error", reason=f"code and arguments take {len(payload) >> 20} MiB, more than {MOST_REQUEST >> 20}")
    return payload


def _read(header: dict, body: bytes, limits: Limits) -> Outcome:
    """The outcome that a reply tells. The body was written by the code: nothing in it is believed but that it is JSON."""
    output = header["output"] + ("\n[cut]" if header["cut"] else "")
    reasons = {
        "late": ("timeout", f"no result after {limits.wall_s:g} s"),
        "cpu": ("timeout", f"used up its {limits.cpu_s} s of CPU"),
        "large": ("error", f"the result is longer than {limits.result_kb} KiB"),
        "forged": ("error", "the code wrote to the pipe of the result"),
        "died": ("error", f"the process ended without a result ({_ending(header.get('code', 0))})"),
        "failed": ("error", f"the sandbox cannot be closed: {header.get('why')}"),
    }
    if header["ended"] in reasons:
        status, reason = reasons[header["ended"]]
        return Outcome(status, reason=reason, output=output)
    try:
        return _told(json.loads(body, parse_constant=_refuse), output)
    except (ValueError, RecursionError, AttributeError, StopIteration, KeyError):
        return Outcome("error", reason="the result is not JSON", output=output)


def _told(answer: dict, output: str = "") -> Outcome:
    """The outcome of one job's answer."""
    kind, content = next(iter(answer.items()))
    if kind == "value":
        return Outcome("value", content, output=output)
    return Outcome({"error": "error", "exhausted": "timeout"}[kind], reason=_one_line(str(content)), output=output)


def _parted(outcome: Outcome, count: int) -> list[Outcome | None]:
    """The outcomes of jobs that shared a process; None for one that is to have its own: it is not plain, or the process came to an end that
    any of them may have caused."""
    if outcome.status != "value":
        return [None] * count
    return [None if "alone" in answer else _told(answer) for answer in outcome.value]


def _one_line(text: str) -> str:
    """Text of unknown origin for a log: one line of printable characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))[:400]


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
