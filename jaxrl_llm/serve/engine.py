"""The thread that decodes: requests wait in a queue, enter places that are free, and get their tokens a chunk at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.errors import UserError


class Full(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server is about to end, and takes nothing new."""


class Piece(NamedTuple):
    """What a request got in one chunk. tops: (ids [n, K], log-probabilities [n, K]). finish: "", "stop", "length", "error" or "cancelled"."""

    tokens: list[int]
    logps: list[float]
    tops: tuple[np.ndarray, np.ndarray] | None
    finish: str


@dataclass(eq=False)
class Generation:
    """One sample of one prompt. pieces: (index, Piece) as they come, the last with its `finish`; the generations of a request may share it.
    cancel(): whoever asked does not want more."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    sample: int = 0
    top_logprobs: int = 0
    index: int = 0
    pieces: queue.SimpleQueue[tuple[int, Piece]] = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    written: int = 0  # tokens so far

    def put(self, piece: Piece) -> None:
        """Hands out a piece."""
        self.pieces.put((self.index, piece))

    def cancel(self) -> None:
        """Gives the place free at the next chunk."""
        self.cancelled = True


class Engine:
    """Decodes with `params` of `cfg`. places: requests at once. prompt_tokens, new_tokens: the most of a request. chunk: steps between two looks
    at the queue. window: seconds that an idle engine waits for others after the first request. waiting: the most in the queue.
    Raises UserError where prompt and new tokens together pass the model's context."""

    def __init__(
        self, cfg: Any, params: Any, *, places: int, prompt_tokens: int, new_tokens: int, chunk: int = 8, window: float = 0.005,
        waiting: int = 256, top: int = 20,
    ):  # fmt: skip
        from models import serving
        from models.generate import UNROLLED_LAYERS

        if prompt_tokens + new_tokens > cfg.max_position:
            told = f"{prompt_tokens} tokens of prompt and {new_tokens} of answer"
            raise UserError(f"{told} are more than the model's context of {cfg.max_position}: lower max_prompt_tokens or max_tokens")
        self._serving = serving
        self.plan = serving.Plan(cfg, places, prompt_tokens, new_tokens, chunk, min(top, cfg.vocab_size), cfg.n_layers <= UNROLLED_LAYERS)
        self.window, self.most_waiting = window, waiting
        self._layers = serving.layers_of(self.plan, params)
        self._queue: deque[Generation] = deque()
        self._wake = threading.Condition()
        self._in: list[Generation | None] = [None] * places
        self._ended = self._draining = False
        self.most_at_once, self.chunks, self.tokens = 0, 0, 0
        self._thread = threading.Thread(target=self._run, name="jaxrl-llm-engine", daemon=True)
        self._thread.start()

    def submit(self, generations: list[Generation]) -> None:
        """Queues all or none. Raises Full, Stopping."""
        with self._wake:
            if self._draining or not self._thread.is_alive():
                raise Stopping
            if len(self._queue) + len(generations) > self.most_waiting:
                raise Full
            self._queue.extend(generations)
            self._wake.notify_all()

    def load(self) -> tuple[int, int]:
        """(requests that wait, requests that are decoded)."""
        with self._wake:
            return len(self._queue), sum(g is not None for g in self._in)

    def alive(self) -> bool:
        """Whether it decodes, or would."""
        return self._thread.is_alive() and not self._draining

    def drain(self, seconds: float) -> bool:
        """Takes nothing new, and finishes what there is, at most for `seconds`; then ends. Returns whether all was finished."""
        with self._wake:
            self._draining = True
        until = time.monotonic() + seconds
        while any(self.load()) and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.01)
        done = not any(self.load())
        with self._wake:
            self._ended = True
            self._wake.notify_all()
        self._thread.join(60)
        return done

    def _run(self) -> None:
        places = None
        while True:
            with self._wake:
                idle = not any(self._in)
                while not self._ended and idle and not self._queue:
                    self._wake.wait()
                if self._ended:
                    break
            if idle and self.window:
                time.sleep(self.window)
            try:
                places = self._turn(self._serving.empty(self.plan) if places is None else places)
            except Exception as error:  # such as no memory: those who are in lose their answer, the server goes on
                print(f"serve: decoding failed: {type(error).__name__}: {error}", flush=True)
                places = None
                self._end(lambda g: True, "error")
        self._end(lambda g: True, "cancelled", also_waiting=True)

    def _end(self, which: Any, finish: str, also_waiting: bool = False) -> None:
        with self._wake:
            gone = [g for g in self._in if g is not None and which(g)] + (list(self._queue) if also_waiting else [])
            self._in = [None if g in gone else g for g in self._in]
            if also_waiting:
                self._queue.clear()
        for g in gone:
            g.put(Piece([], [], None, finish))

    def _turn(self, places: Any) -> Any:
        """Lets go of what was cancelled, lets in what waits, decodes one chunk and hands out its tokens."""
        with self._wake:
            gone = np.array([g is not None and g.cancelled for g in self._in])
            entering: list[tuple[int, Generation]] = []
            for b, g in enumerate(self._in):
                if g is not None and not g.cancelled:
                    continue
                self._in[b] = None
                while self._queue and self._in[b] is None:
                    waited = self._queue.popleft()
                    if not waited.cancelled:
                        self._in[b] = waited
                        entering.append((b, waited))
            self.most_at_once = max(self.most_at_once, sum(g is not None for g in self._in))
            inside = list(self._in)
        if gone.any():
            places = self._serving.release(places, gone)
        if entering:
            places = self._admit(places, entering)
        if not any(inside):
            return places
        places, chunk = self._serving.decode(self.plan, self._layers, places)
        chunk = type(chunk)(*map(np.asarray, chunk))
        self.chunks += 1
        for b, g in enumerate(inside):
            if g is not None:
                self._hand_out(b, g, chunk)
        return places

    def _admit(self, places: Any, entering: list[tuple[int, Generation]]) -> Any:
        """Prompts are prefilled once for all samples of a request, as many at once as enter."""
        from models.decode import bucket, pad_prompts

        prompts = {id(g.prompt): g.prompt for _, g in entering}  # samples of one prompt share the list
        numbers, block = {name: i for i, name in enumerate(prompts)}, list(prompts.values())
        width = min(bucket(max(map(len, block)), 16), self.plan.prompt_slots)
        tokens, lengths = pad_prompts(block, width, bucket(len(block)))
        B = self.plan.places
        from_B = np.full(B, -1, np.int32)
        entry = self._serving.Entry(*(np.zeros(B, np.int32) for _ in range(5)), *(np.ones(B, np.float32) for _ in range(2)),
                                    np.zeros(B, np.int32), np.zeros(B, bool))  # fmt: skip
        for b, g in entering:
            from_B[b] = numbers[id(g.prompt)]
            told = (g.prompt[-1], len(g.prompt) - 1, g.max_tokens, g.seed, g.sample, g.temperature, g.top_p, g.top_k, g.top_logprobs > 0)
            for array, value in zip(entry, told, strict=True):
                array[b] = value
        return self._serving.admit(self.plan, self._layers, places, tokens, lengths, from_B, entry)

    def _hand_out(self, b: int, g: Generation, chunk: Any) -> None:
        live = chunk.live_CB[:, b]
        n = int(live.sum())
        tokens = chunk.tokens_CB[:n, b].tolist()
        g.written += n
        finish = "stop" if chunk.stopped_CB[:n, b].any() else "length" if g.written >= g.max_tokens else ""
        tops = (chunk.top_ids_CBK[:n, b], chunk.top_logps_CBK[:n, b]) if g.top_logprobs else None
        self.tokens += n
        if finish:
            with self._wake:
                self._in[b] = None
        g.put(Piece(tokens, chunk.logps_CB[:n, b].tolist(), tops, finish))
