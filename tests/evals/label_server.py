"""A chat server on the loopback that labels and detects by rule, and fails as it is told to."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """Answers chat completions at `url`. `script`: what to do with the next requests, one each: None (what the rule says), an HTTP status,
    "cut" (the connection is dropped), "slow" (no answer for a while), or a text that is the answer; then `answer(request)`. `seen`: the
    requests' bodies."""

    def __init__(self):
        self.script, self.seen, self.headers, self.answer = [], [], [], by_rule
        self.lock, self.wait = threading.Lock(), threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.seen.append(body)
                    fake.headers.append((self.path, self.headers.get("Authorization")))
                    step = fake.script.pop(0) if fake.script else None
                if step == "cut":
                    self.close_connection = True
                    return
                if step == "slow":
                    fake.wait.wait(20)
                code = step if isinstance(step, int) else 200
                said = step if isinstance(step, str) else fake.answer(body)
                raw = json.dumps({"choices": [{"message": {"content": said}}]}) if code == 200 else "the server says no"
                if said == "garbage":
                    raw = "<html>"
                with contextlib.suppress(OSError):
                    self.send_response(code)
                    self.send_header("Content-Length", str(len(raw.encode())))
                    self.end_headers()
                    self.wfile.write(raw.encode())

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self):
        self.wait.set()
        self._server.shutdown()
        self._server.server_close()


def is_labelling(body):
    return '"label"' in body["messages"][0]["content"]


def by_rule(body):
    """A label that names the first marked word; texts that hold the word which the description names."""
    said = body["messages"][1]["content"]
    if is_labelling(body):
        return json.dumps({"label": "the word " + re.search("«(.*?)»", said)[1].strip()})
    word = re.match(r"Description: the word (\S+)", said)[1]
    return json.dumps({"matches": [int(n) for n, text in re.findall(r'^(\d+)\. "(.*)"$', said, re.M) if word in text]})
