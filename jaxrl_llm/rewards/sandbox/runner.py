"""Inside a check's process: runs the code, calls the function, sends what it returned. Everything here is in the hands of that code.

The frame: the keeper's number, four bytes of length, then one JSON object {"value": ...}, {"error": line} or {"exhausted": line}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
import types

from jaxrl_llm.rewards.sandbox.plain import is_plain

MODULE = "check"
LONGEST_LINE = 300


def run(payload: bytes, nonce: bytes, result: int) -> None:
    """Answers one request on the descriptor `result`. Ends the process whatever happens, without its atexit and other last words."""
    frame_of, write, leave = framed, os.write, os._exit  # against code that puts its own in their places
    try:
        frame = frame_of(nonce, answer(payload))
    except MemoryError:
        frame = frame_of(nonce, b'{"exhausted": "memory ran out"}')
    with contextlib.suppress(BaseException):  # what was printed and lies in Python's buffers
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        view = memoryview(frame)
        while view:
            view = view[write(result, view) :]
    finally:
        leave(0)


def framed(nonce: bytes, answer: bytes) -> bytes:
    """What goes over the pipe."""
    return nonce + len(answer).to_bytes(4, "big") + answer


def answer(payload: bytes) -> bytes:
    """The answer to one request as JSON: that of its job, or of its jobs in order."""
    request = json.loads(payload)
    return b'{"value": [' + b", ".join(map(beside, request["jobs"])) + b"]}" if "jobs" in request else answer_one(request)


def beside(job: dict) -> bytes:
    """The answer of a job that others share the process with, none of which can reach it: only plain code is run, and nothing of it is kept."""
    if not is_plain(job["code"]):
        return b'{"alone": true}'
    try:
        return answer_one(job)
    finally:
        sys.modules.pop(MODULE).__dict__.clear()
        re.purge()
        gc.collect()


def answer_one(job: dict) -> bytes:
    """The answer of one job; whatever the code raises is an answer, but MemoryError, for which there may be no memory."""
    tell = describe
    try:
        value = call(**job)
        if value is True or value is False:  # most verdicts need no more than this
            return b'{"value": true}' if value else b'{"value": false}'
        return json.dumps({"value": value}, allow_nan=False).encode()
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: they are the code's
        return json.dumps({"error": tell(error)}).encode()


def call(code: str, function: str, args: list, kwargs: dict, as_bool: bool):
    """Runs `code` as a module of its own and calls its `function`."""
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module  # dataclasses and pickle look their classes' module up
    exec(compile(code, f"<{MODULE}>", "exec", dont_inherit=True), module.__dict__)
    if function not in module.__dict__:
        raise NameError(f"the code defines no {function}")
    truth = bool
    value = module.__dict__[function](*args, **kwargs)
    return truth(value) if as_bool and value is not None else value


def describe(error: BaseException) -> str:
    """One line: the kind of error, its message, the line of the code where it came up."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "(its message cannot be read)"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == f"<{MODULE}>":
            line = trace.tb_lineno
        trace = trace.tb_next
    place = f" (line {line})" if line else ""
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:LONGEST_LINE] + place
