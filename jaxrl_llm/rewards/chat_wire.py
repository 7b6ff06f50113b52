"""HTTP to a chat server: one request, one answer, by one deadline that nothing the server does can stretch.

A socket's own timeout starts anew with each byte that arrives, so a server that drips would hold a caller for ever. Connections are kept
alive and used by one caller at a time; one that the server has closed meanwhile is opened anew once, which costs no try.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.errors import UserError

MOST_BYTES = 16 * 2**20  # of an answer
_GONE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


class Wire:
    """Connections to the server at a URL, such as http://127.0.0.1:8000/v1; safe for several threads.

    Proxies of the environment (HTTPS_PROXY, NO_PROXY) are honoured for https. Redirects are not followed: a key is for the host it was given to.
    Raises UserError for a URL that is none, or that holds a password.
    """

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.username is not None or parts.password is not None:
            raise UserError("the server's url holds a user name or password: leave it out, and name the environment variable that holds the key")
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise UserError(f"the server's url is {url!r}; give one such as http://127.0.0.1:8000/v1")
        self.url, self.path = url.rstrip("/"), parts.path.rstrip("/")
        self._tls, self._host = parts.scheme == "https", parts.hostname
        self._port = port or (443 if self._tls else 80)
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def post(self, path: str, body: bytes, headers: Mapping[str, str], seconds: float) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, body) of the answer to a POST at url + path.

        Raises TimeoutError where `seconds` pass, OSError or http.client.HTTPException for a connection that fails or an answer cut short.
        """
        until = time.monotonic() + seconds
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._exchange(connection, path, body, headers, until)
            except _GONE:
                pass  # the server had closed it before it saw the request
        return self._exchange(self._connect(until), path, body, headers, until)

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connect(self, until: float) -> http.client.HTTPConnection:
        left = max(until - time.monotonic(), 1e-3)
        proxy = urllib.request.getproxies().get("https") if self._tls and not urllib.request.proxy_bypass(self._host) else None
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        if proxy:
            at = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            connection = kind(at.hostname or "", at.port or 8080, timeout=left)
            connection.set_tunnel(self._host, self._port)
        else:
            connection = kind(self._host, self._port, timeout=left)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        connection.sock = _Timed(connection.sock)
        return connection

    def _exchange(self, connection: Any, path: str, body: bytes, headers: Mapping[str, str], until: float) -> tuple[int, Mapping[str, str], bytes]:
        try:
            connection.sock.until = until
            connection.request("POST", self.path + path, body, dict(headers))
            response = connection.getresponse()
            raw = response.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise http.client.HTTPException(f"the answer is longer than {MOST_BYTES} bytes")
            # A read with a limit does not say that an answer ended before its declared length.
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            told = {name.lower(): value for name, value in response.getheaders()}
        except BaseException:
            connection.close()
            raise
        if connection.sock is None:  # the server closes after each answer
            return response.status, told, raw
        with self._lock:
            self._idle.append(connection)
        return response.status, told, raw


class _Timed:
    """A connected socket whose every read and write ends at `until`, a time.monotonic()."""

    def __init__(self, sock: Any):
        self.sock, self.until = sock, 0.0

    def limit(self) -> None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)

    def sendall(self, data: Any) -> None:
        self.limit()
        self.sock.sendall(data)

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self, self.sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, timed: _Timed, raw: Any):
        self._timed, self._raw = timed, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._timed.limit()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
