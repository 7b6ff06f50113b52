"""`jaxrl-llm serve`: a model behind the OpenAI API, until SIGTERM or Ctrl-C."""

import ipaddress
import os
import signal
import threading
import time
from typing import Any

from jaxrl_llm.commands._policy import load_policy
from jaxrl_llm.config import check_fields
from jaxrl_llm.errors import UserError

INF = float("inf")
WRITING = 5.0  # seconds in which what is decoded is sent
CHOICES = {"dtype": ("float32", "bfloat16", "float16")}
RANGES: dict[str, tuple[float, float]] = dict.fromkeys(("places", "max_prompt_tokens", "max_tokens", "chunk", "queue", "connections"), (1, INF))
RANGES |= {"port": (0, 65535), "body_bytes": (1, 2**31), "timeout": (0.001, INF), "window_ms": (0, 1000), "drain": (0, INF)}


def run(config: Any, workdir: str | None = None) -> None:
    """Serves until it is told to stop; see configs/serve.py for the fields.

    Raises:
      UserError: no model named, a field out of its range, a key that is not set, an address that others reach without a key, or that cannot be
        had, limits that the model's context does not hold; and what loading raises.
    """
    server = make_server(config)
    host, port = server.server_address[:2]
    stop = threading.Event()
    before = {signum: signal.signal(signum, lambda *_: stop.set()) for signum in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    print(f"serving {config.name} at http://{f'[{host}]' if ':' in str(host) else host}:{port}/v1", flush=True)
    try:
        while not stop.wait(1.0):  # a wait without end would not let signals in on every platform
            pass
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        done = end(server, config.drain)
        print("stopped; all requests were answered" if done else f"stopped; not all requests were answered within {config.drain:g} s", flush=True)


def end(server: Any, seconds: float) -> bool:
    """Ends a server: what is under way may take so many seconds more, new requests get 503. Returns whether all were answered."""
    done = server.engine.drain(seconds)
    until = time.monotonic() + WRITING
    while server.busy and time.monotonic() < until:
        time.sleep(0.01)
    server.shutdown()
    server.server_close()
    return done and not server.busy


def make_server(config: Any) -> Any:
    """The server of a config, its programs compiled, not yet serving; raises as `run`."""
    import models
    from jaxrl_llm.serve.engine import Engine
    from jaxrl_llm.serve.server import Limits, Server

    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    check_fields(config, CHOICES, RANGES)
    key = os.environ.get(config.key_variable, "").strip() if config.key_variable else ""
    if config.key_variable and not key:
        raise UserError(f"the environment variable {config.key_variable}, which is to hold the token (config key 'key_variable'), is not set")
    if not key and not _is_loopback(config.host):
        raise UserError(f"config key 'host' is {config.host}, which others reach: name the environment variable of a token with key_variable")
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which may take minutes
    cfg, params = load_policy(config)
    engine = Engine(
        cfg, params, places=config.places, prompt_tokens=config.max_prompt_tokens, new_tokens=config.max_tokens, chunk=config.chunk,
        window=config.window_ms / 1000, waiting=config.queue,
    )  # fmt: skip
    try:
        server = Server(config.host, config.port, engine, tokenizer, config.name, Limits(config.body_bytes, config.timeout, config.connections, key))
    except OSError as error:
        engine.drain(0)
        raise UserError(f"cannot listen at {config.host}:{config.port} ({error.strerror}): choose another host or port") from error
    warm_up(engine)
    return server


def warm_up(engine: Any) -> None:
    """Compiles what the first request would wait for."""
    from jaxrl_llm.serve.engine import Generation

    first = Generation([0], 1, temperature=0.0)
    engine.submit([first])
    while not first.pieces.get()[1].finish:
        pass


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
