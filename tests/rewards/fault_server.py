"""A chat server on the loopback that fails in every way that one can, as it is told, request by request."""

import contextlib
import json
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BAD_BODIES = {
    "malformed": '{"choices": [{"mess',
    "html": "<html>a proxy was here</html>",
    "wrong_shape": '["no", "completion"]',
    "empty_choices": '{"choices": []}',
    "no_text": '{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
    "not_utf8": b'{"choices": [{"message": {"content": "\xff"}, "finish_reason": "stop"}]}',
}
STATUSES = {"429": 429, "500": 500, "502": 502, "503": 503, "408": 408}
PASSING = ("reset", "hang", "drip", "drip_headers", "cut_body", *BAD_BODIES, *STATUSES)


class FaultServer:
    """Answers at `url` with `answer(body)`: a text, or a dict of fields of the choice. `fault(body, n)` says what goes wrong with the n-th try
    (from 0) of a body, None for nothing: a key of PASSING, or a status. `tries`, `answered`: how often each body (as JSON) came, and was
    answered well; `headers`: of the requests. `retry_after`: of 429. `usage`: of every answer."""

    def __init__(self, answer=lambda body: "Verdict: YES", fault=lambda body, n: None):
        self.answer, self.fault = answer, fault
        self.tries, self.answered, self.headers, self.bodies = Counter(), Counter(), [], []
        self.at_once = self.most_at_once = 0
        self.retry_after, self.usage = None, {"prompt_tokens": 10, "completion_tokens": 2}
        self.lock, self.ended = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_POST(self):
                with contextlib.suppress(OSError):
                    server._serve(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, *_):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler):
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        if len(raw) < int(handler.headers["Content-Length"]):  # the client gave up while it sent
            handler.close_connection = True
            return
        with self.lock:
            key = raw.decode()
            n = self.tries[key]
            self.tries[key] += 1
            self.headers.append((handler.path, handler.headers.get("Authorization")))
            self.bodies.append(json.loads(raw))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._answer(handler, json.loads(raw), key, n)
        finally:
            with self.lock:
                self.at_once -= 1

    def _answer(self, handler, body, key, n):
        fault = self.fault(body, n)
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "hang":
            handler.close_connection = True
            self.ended.wait(5)
            return
        if fault in ("drip", "drip_headers"):
            handler.close_connection = True
            start = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 1000\r\n\r\n" if fault == "drip" else b"")
            handler.wfile.write(start)
            handler.wfile.flush()
            while not self.ended.wait(0.02):  # each byte comes well before a socket would time out
                handler.wfile.write(b" " if fault == "drip" else b"X")
                handler.wfile.flush()
            return
        if fault in STATUSES or isinstance(fault, int):
            status = STATUSES.get(fault, fault)
            extra = {"Retry-After": self.retry_after} if status == 429 and self.retry_after is not None else {}
            return self._send(handler, status, f"no: {handler.headers.get('Authorization')}", extra)
        if fault in BAD_BODIES:
            return self._send(handler, 200, BAD_BODIES[fault])
        said = self.answer(body)
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"} if isinstance(said, str) else said
        whole = json.dumps({"choices": [choice], "usage": self.usage})
        if fault == "cut_body":
            handler.close_connection = True
            return self._send(handler, 200, whole, length=len(whole) + 10)
        with self.lock:
            self.answered[key] += 1
        self._send(handler, 200, whole)

    def _send(self, handler, status, text, extra=(), length=None):
        raw = text if isinstance(text, bytes) else text.encode()
        handler.send_response(status)
        for name, value in dict(extra).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(raw) if length is None else length))
        handler.end_headers()
        handler.wfile.write(raw)
        handler.wfile.flush()
