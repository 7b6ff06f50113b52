"""Answers of a chat server on disk: one SQLite file that several threads and processes read and write at once.

The key is a hash of the model's name, the messages in full and every parameter of the request; the server's address and its key are no part
of it, nor of the file. Only whole answers are kept: what failed is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError

BUSY = 60.0  # seconds to wait for another process's write
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, made REAL NOT NULL) WITHOUT ROWID"


def request_key(body: Mapping[str, Any]) -> str:
    """The hash of a request: sha256 of its JSON with sorted keys. Bodies that differ in any value, or in their type, have different keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """The answers in the file `path`, made where it is absent; its folder must be writable.

    Raises UserError, naming the file, where it cannot be opened, read or written, or is no such cache.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._process = -1
        self._open()

    def _open(self) -> sqlite3.Connection:
        """The connection of this process: one that was opened before a fork must not be used after it."""
        if self._process != os.getpid():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Autocommit: each write is whole by itself.
                self._db = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None, check_same_thread=False)
                self._share()
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute(_TABLE)
                self._db.execute("SELECT key, answer, made FROM answers LIMIT 1").fetchall()
            except (sqlite3.Error, OSError) as error:
                raise self._problem(error) from error
            self._process = os.getpid()
        return self._db

    def _share(self) -> None:
        """Puts the file into the mode in which readers and a writer do not wait for each other. Of two processes that do so to a new file at the same
        time SQLite tells one at once that it is locked, whatever `timeout` says: both have read it, and to wait would be a deadlock."""
        until = time.monotonic() + BUSY
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def _problem(self, error: Exception) -> UserError:
        return UserError(f"the cache of answers {self.path} cannot be used ({error}): free the disk, mend or remove the file, or name another")

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer kept under a key, or None."""
        with self._lock:
            try:
                found = self._open().execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                return None if found is None else json.loads(found[0])
            except (sqlite3.Error, ValueError) as error:
                raise self._problem(error) from error

    def put(self, key: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps an answer unless there is one, of another thread or process; returns the one that is kept."""
        text = json.dumps(answer, ensure_ascii=True)
        with self._lock:
            try:
                db = self._open()
                db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, text, time.time()))
                return json.loads(db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()[0])
            except (sqlite3.Error, ValueError) as error:
                raise self._problem(error) from error

    def count(self) -> int:
        """How many answers there are."""
        with self._lock:
            return self._open().execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        with self._lock:
            if self._process == os.getpid():
                self._db.close()
            self._process = -1
