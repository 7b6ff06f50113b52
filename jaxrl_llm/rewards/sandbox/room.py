"""The parent's end of one room of the sandbox: starting its program, handing it a request, reading its reply, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, cast

WORKER = pathlib.Path(__file__).with_name("worker.py")
HEADER = struct.Struct(">II")
START_SECONDS = 120.0  # a cold, busy machine
# What checkers of published data sets import; each check inherits them at no cost.
PRELOAD = ("re", "json", "ast", "math", "string", "collections", "itertools", "functools", "datetime", "unicodedata", "typing", "dataclasses")
PRELOAD += ("statistics", "textwrap", "difflib", "html", "csv", "io", "copy", "operator", "fractions", "decimal", "random", "hashlib", "ctypes")


def command(argument: str) -> list[str]:
    """The worker's command line: no site-packages, no user's folder, no current folder, no files of compiled code."""
    return [sys.executable, "-S", "-s", "-P", "-B", str(WORKER), argument]


def environment() -> dict[str, str]:
    """All that the worker sees of the environment: nothing of the caller's. The order of sets is the same in every room."""
    return {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}


class RoomEnded(Exception):
    """The room's program has ended; the message says why where it could."""


class Room:
    """One room: at most one request under way."""

    def __init__(self, isolated: bool, packages: Sequence[str]):
        options = {"isolated": isolated, "packages": list(packages), "preload": PRELOAD}
        self.process = subprocess.Popen(  # start_new_session: Ctrl-C in the terminal is the parent's business
            command(json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            start_new_session=True,
        )
        self.requests, self.replies = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        os.set_blocking(self.replies.fileno(), False)
        self.buffer = bytearray()
        self.unit: list[int] = []  # the jobs under way
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, limits: dict, payload: bytes) -> None:
        """Hands over one request; OSError where the room is gone."""
        header = json.dumps(limits).encode()
        self.requests.write(HEADER.pack(len(header), len(payload)) + header + payload)
        self.requests.flush()

    def receive(self) -> tuple[dict, bytes] | None:
        """The next reply: its header, in which "output" is what was printed, and the result; None while it is incomplete. RoomEnded where the
        room has ended."""
        chunk = self.replies.read()
        if chunk == b"":
            raise RoomEnded("the sandbox's own process ended")
        self.buffer += chunk or b""
        if len(self.buffer) < HEADER.size:
            return None
        header, body = HEADER.unpack_from(self.buffer)
        whole = HEADER.size + header + body
        if len(self.buffer) < whole:
            return None
        told, content = json.loads(self.buffer[HEADER.size : HEADER.size + header]), bytes(self.buffer[HEADER.size + header : whole])
        del self.buffer[:whole]
        result = told.pop("result", 0)
        return told | {"output": content[result:].decode("utf-8", "replace")}, content[:result]

    def kill(self) -> None:
        """Ends the room and all in it, and collects its program."""
        with contextlib.suppress(OSError):  # a request may still be buffered
            self.requests.close()
        self.process.kill()
        self.process.wait()
        self.replies.close()
