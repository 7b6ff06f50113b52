"""HTTP in front of the engine, with the standard library alone: what is malformed, too large or too much is told so, and hurts no one else."""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import select
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxrl_llm import __version__
from jaxrl_llm.serve.engine import Engine, Full, Generation, Stopping
from jaxrl_llm.serve.protocol import BadRequest, Job, answer_of, choice_of, logprobs_of, read_job, usage_of
from jaxrl_llm.serve.text import Spelling, Text

LOOK = 0.25  # seconds between two looks whether the client is still there
IDLE = 60.0  # seconds that a connection may say nothing
ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds, of the histogram of requests


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. timeout: seconds for one. connections: open at once. key: the token that requests must bear, "" for none."""

    body_bytes: int
    timeout: float
    connections: int
    key: str = ""


class Gone(Exception):
    """The client has hung up."""


class Server(ThreadingHTTPServer):
    """Serves `engine` at (host, port); port 0 takes a free one. name: of the model. Raises OSError where the address cannot be had."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 256, True

    def __init__(self, host: str, port: int, engine: Engine, tokenizer: Any, name: str, limits: Limits):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.spell, self.started = Spelling(tokenizer), int(time.time())
        self.counts: Counter[tuple[str, str]] = Counter()  # (path, status)
        self.tokens: Counter[str] = Counter()
        self.seconds: list[float] = [0.0, 0]
        self.histogram = [0] * len(BUCKETS)
        self.busy = 0  # requests that are being answered
        self._open = threading.BoundedSemaphore(limits.connections)
        self.lock = threading.Lock()
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread a connection, up to the limit."""
        if not self._open.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(1)
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up; anything else is ours, and is told without the request, which is the user's."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, Gone)):
            print(f"serve: {type(error).__name__}: {error}", file=sys.stderr)

    def metrics(self) -> str:
        """In the text format of Prometheus."""
        waiting, decoding = self.engine.load()
        with self.lock:
            lines = ["# TYPE jaxrl_llm_requests_total counter"]
            lines += [f'jaxrl_llm_requests_total{{path="{path}",status="{status}"}} {n}' for (path, status), n in sorted(self.counts.items())]
            for kind in ("prompt", "completion"):
                lines += [f"# TYPE jaxrl_llm_{kind}_tokens_total counter", f"jaxrl_llm_{kind}_tokens_total {self.tokens[kind]}"]
            lines.append("# TYPE jaxrl_llm_request_seconds histogram")
            lines += [f'jaxrl_llm_request_seconds_bucket{{le="{edge}"}} {n}' for edge, n in zip(BUCKETS, self.histogram, strict=True)]
            lines += [f'jaxrl_llm_request_seconds_bucket{{le="+Inf"}} {self.seconds[1]}']
            lines += [f"jaxrl_llm_request_seconds_sum {self.seconds[0]:.6f}", f"jaxrl_llm_request_seconds_count {self.seconds[1]}"]
        for name, value in (("waiting", waiting), ("decoding", decoding), ("most_at_once", self.engine.most_at_once)):
            lines += [f"# TYPE jaxrl_llm_{name} gauge", f"jaxrl_llm_{name} {value}"]
        return "\n".join(lines) + "\n"

    def observe(self, path: str, status: int, seconds: float | None) -> None:
        """Counts a request; seconds: of one that was decoded."""
        with self.lock:
            self.counts[path, str(status)] += 1
            if seconds is not None:
                self.seconds[0] += seconds
                self.seconds[1] += 1
                for i, edge in enumerate(BUCKETS):
                    self.histogram[i] += seconds <= edge


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version, server_version, sys_version = "HTTP/1.1", f"jaxrl-llm/{__version__}", ""
    timeout, disable_nagle_algorithm, wbufsize = IDLE, True, -1

    def log_message(self, *_: Any) -> None:
        """Requests are the user's, and are written nowhere."""

    def do_GET(self) -> None:
        """Health, metrics, models."""
        path = self.path.partition("?")[0]
        if path == "/health":
            alive = self.server.engine.alive()
            return self._json(200 if alive else 503, {"status": "ok" if alive else "stopping"})
        try:
            self._check_key()
            if path == "/metrics":
                return self._send(200, self.server.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
            model = {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "local"}
            if path == "/v1/models":
                return self._json(200, {"object": "list", "data": [model]})
            if path == f"/v1/models/{self.server.name}":
                return self._json(200, model)
            raise BadRequest(f"there is nothing at {path:.100}", status=405 if path in ENDPOINTS else 404)
        except BadRequest as error:
            self._refuse(error)

    def do_POST(self) -> None:
        """Completions."""
        path, begun = self.path.partition("?")[0], time.monotonic()
        with self.server.lock:
            self.server.busy += 1
        try:
            self._check_key()
            if path not in ENDPOINTS:
                raise BadRequest(f"there is nothing at {path:.100}", status=404)
            engine = self.server.engine
            plan = engine.plan
            job = read_job(ENDPOINTS[path], self._body(), self.server.tokenizer, [self.server.name], plan.prompt_slots, plan.ring_slots)
            self._serve(job, path, begun)
        except BadRequest as error:
            self._refuse(error)
        except Gone:
            self.close_connection = True
            self.server.observe(path, 499, None)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _check_key(self) -> None:
        key = self.server.limits.key
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if key and not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
            self.close_connection = True  # its body is not read
            raise BadRequest("no such key: send the header Authorization: Bearer KEY", status=401, code="invalid_api_key")

    def _body(self) -> Any:
        """The JSON of the request; what is not to be read closes the connection."""
        self.close_connection, closing = True, self.close_connection
        if "chunked" in self.headers.get("Transfer-Encoding", "") or not self.headers.get("Content-Length", "").isdecimal():
            raise BadRequest("the request has no Content-Length", status=411)
        # A page in a browser can send anything but this to the loopback without being asked first.
        if self.headers.get_content_type() != "application/json":
            raise BadRequest("the body is no JSON by its header: send Content-Type: application/json", status=415)
        length, most = int(self.headers["Content-Length"][:20]), self.server.limits.body_bytes
        if length > most:
            raise BadRequest(f"the body has {length} bytes; it may have {most}", status=413)
        raw, until = b"", time.monotonic() + self.server.limits.timeout
        while len(raw) < length:
            self.connection.settimeout(max(min(until - time.monotonic(), IDLE), 0.001))
            try:
                part = self.rfile.read1(min(length - len(raw), 65536))
            except TimeoutError:
                raise BadRequest("the body did not come in time", status=408) from None
            if not part:
                raise Gone
            raw += part
        self.connection.settimeout(IDLE)
        self.close_connection = closing
        try:
            return json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is no JSON: {error!s:.200}") from None

    # ---- answers ----

    def _serve(self, job: Job, path: str, begun: float) -> None:
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        generations = [
            Generation(prompt, job.max_tokens, job.temperature, job.top_p, job.top_k, job.seed, sample, job.top or 0, p * job.n + sample, pieces)
            for p, prompt in enumerate(job.prompts) for sample in range(job.n)
        ]  # fmt: skip
        try:
            self.server.engine.submit(generations)
        except Full:
            raise BadRequest("the queue is full: come back later", status=429, code="queue_full") from None
        except Stopping:
            raise BadRequest("the server is about to end", status=503) from None
        out = _Streamed(self, job) if job.stream else _Collected(self, job)
        left = len(generations)
        try:
            while left:
                index, piece = self._next(pieces, begun)
                if piece.finish in ("error", "cancelled"):
                    told = "decoding failed" if piece.finish == "error" else "the server ends"
                    raise BadRequest(told, status=500 if piece.finish == "error" else 503)
                if out.add(index, piece):
                    left -= 1
                    generations[index].cancel()  # a stop string may have ended it before its last token
            written = sum(len(text.tokens) for text in out.texts)
            with self.server.lock:
                self.server.tokens["prompt"] += sum(map(len, job.prompts))
                self.server.tokens["completion"] += written
            self.server.observe(path, 200, time.monotonic() - begun)
            out.end(usage_of(sum(map(len, job.prompts)), written))
        except BadRequest as error:
            if not job.stream or not out.begun:
                raise
            self.server.observe(path, error.status, None)
            out.fail(error)
        except OSError:
            raise Gone from None
        finally:
            for generation in generations:
                generation.cancel()

    def _next(self, pieces: Any, begun: float) -> tuple[int, Any]:
        """The next piece of any choice. Raises BadRequest past the time limit, Gone when the client is."""
        while True:
            left = begun + self.server.limits.timeout - time.monotonic()
            if left <= 0:
                raise BadRequest(f"no answer within {self.server.limits.timeout:g} s", status=504)
            try:
                return pieces.get(timeout=min(left, LOOK))
            except queue.Empty:
                with contextlib.suppress(ValueError):
                    if select.select([self.connection], [], [], 0)[0] and self.connection.recv(1, socket.MSG_PEEK) == b"":
                        raise Gone from None

    def _refuse(self, error: BadRequest) -> None:
        path = self.path.partition("?")[0]
        self.server.observe(path if path in ENDPOINTS else "other", error.status, None)
        with contextlib.suppress(OSError):
            self._json(error.status, error.body(), {"Retry-After": "1"} if error.status in (429, 503) else {})

    def _json(self, status: int, body: Any, extra: Any = ()) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", extra)

    def _send(self, status: int, raw: bytes, kind: str, extra: Any = ()) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **dict(extra)}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself (no HTTP, headers too long, an unknown method), as JSON too."""
        self.close_connection, self.request_version = True, "HTTP/1.1"  # which a line that is no HTTP left unset
        with contextlib.suppress(OSError):
            self._json(code, BadRequest(message or self.responses.get(code, ("",))[0], status=code).body())


class _Output:
    """What is made of the pieces of a job's choices."""

    def __init__(self, handler: Handler, job: Job):
        self.handler, self.job, self.begun, self.created = handler, job, False, int(time.time())
        server = handler.server
        self.texts = [Text(server.tokenizer, prompt, job.stops) for prompt in job.prompts for _ in range(job.n)]
        self.ended = [False] * len(self.texts)
        self.offsets = [0] * len(self.texts)

    def add(self, index: int, piece: Any) -> bool:
        """Takes a piece; returns whether it was the choice's last one."""
        if self.ended[index]:
            return False
        text = self.texts[index]
        before = len(text.tokens)
        new = text.add(piece.tokens, last=bool(piece.finish))
        finish = "stop" if text.stopped else piece.finish or None
        logprobs, n = None, len(text.tokens) - before
        # A stop string may have begun in an earlier piece: n tokens of this one belong to the answer.
        if self.job.top is not None:
            tops, spell = piece.tops, self.handler.server.spell.of
            logprobs = logprobs_of(self.job.kind, piece.tokens[:n], piece.logps[:n], tops, self.job.top, spell, self.offsets[index])
            self.offsets[index] += sum(len(spell(token)) for token in piece.tokens[:n])
        self.ended[index] = finish is not None
        self.take(index, new, finish, logprobs)
        return finish is not None

    def take(self, index: int, text: str, finish: str | None, logprobs: Any) -> None:
        """New text of a choice."""
        raise NotImplementedError

    def end(self, usage: Any) -> None:
        """All choices have ended."""
        raise NotImplementedError

    def fail(self, error: BadRequest) -> None:
        """The answer breaks off."""


class _Collected(_Output):
    """One answer with everything."""

    def __init__(self, handler: Handler, job: Job):
        super().__init__(handler, job)
        self.parts = [[text] if job.echo else [] for text in job.texts for _ in range(job.n)]
        self.finish: list[str | None] = [None] * len(self.parts)
        self.logprobs: list[Any] = [None] * len(self.parts)

    def take(self, index, text, finish, logprobs):
        self.parts[index].append(text)
        self.finish[index] = finish
        if self.logprobs[index] is None or logprobs is None:
            self.logprobs[index] = logprobs
            return
        for name, value in logprobs.items():
            self.logprobs[index][name] = None if value is None else self.logprobs[index][name] + value

    def end(self, usage):
        job = self.job
        rows = zip(self.parts, self.finish, self.logprobs, strict=True)
        choices = [choice_of(job.kind, i, "".join(parts), finish, logprobs) for i, (parts, finish, logprobs) in enumerate(rows)]
        self.handler._json(200, answer_of(job, self.handler.server.name, self.created, choices, usage))


class _Streamed(_Output):
    """Server-sent events, a chunk of HTTP each."""

    def _event(self, body: Any) -> None:
        if not self.begun:
            self.begun = True
            handler = self.handler
            handler.send_response(200)
            for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), ("Transfer-Encoding", "chunked")):
                handler.send_header(name, value)
            handler.end_headers()
            for index, text in enumerate([text for text in self.job.texts for _ in range(self.job.n)]):
                if self.job.echo or self.job.kind == "chat":
                    self._chunk([choice_of(self.job.kind, index, text if self.job.echo else "", None, None, True, role=True)])
        self._write(body if isinstance(body, str) else json.dumps(body))

    def _write(self, text: str) -> None:
        raw = f"data: {text}\n\n".encode()
        self.handler.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        self.handler.wfile.flush()

    def _chunk(self, choices: list[Any], usage: Any = None) -> None:
        self._event(answer_of(self.job, self.handler.server.name, self.created, choices, usage, delta=True))

    def take(self, index, text, finish, logprobs):
        if text or finish or logprobs:
            self._chunk([choice_of(self.job.kind, index, text, finish, logprobs, delta=True)])

    def end(self, usage):
        if self.job.with_usage:
            self._chunk([], usage)
        self._event("[DONE]")
        self.handler.wfile.write(b"0\r\n\r\n")
        self.handler.wfile.flush()

    def fail(self, error):
        """Says why, and closes without the last chunk: nobody can take it for a whole answer."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self._event(error.body())
