"""Activations of a language model as a stream of rows: what dictionaries are trained and judged on.

Letters: B rows of tokens, T tokens, D width of the tap.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from models.sharding import batch_ways, fetch, place_rows
from sae.errors import SAEError

TokenRows = Iterable[Sequence[int]]


def blocks_needed(hook_name: str) -> int | None:
    """How many blocks must run for the tap to be known; None for all (the final norm)."""
    if hook_name == "embed":
        return 0
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(match[1]) + 1 if match else None


@functools.partial(jax.jit, static_argnames=("cfg", "hook_name"))
def tap(cfg: Any, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, hook_name: str) -> jax.Array:
    """The named activation [B, T, D] in fp32; blocks past it do not run."""
    out = models.forward(cfg, params, tokens_BT, lengths=lengths_B, taps=(hook_name,), stop_at=blocks_needed(hook_name))
    return out.taps[hook_name].astype(jnp.float32)


def token_batches(
    token_rows: TokenRows, batch_size: int, context_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens_BT right-padded, lengths_B, whether each row opens its text) with rows cut at the context.

    Rows of a batch are padded to the next power of two of the longest (at most context_size), so that few shapes are
    compiled; a last short batch is filled with rows of length 0. Empty rows are left out.
    """

    def pieces():
        for row in token_rows:
            for start in range(0, len(row), context_size):
                yield row[start : start + context_size], start == 0

    def emit(group):
        longest = max(len(row) for row, _ in group)
        width = min(context_size, 1 << (longest - 1).bit_length())
        tokens, lengths = np.zeros((batch_size, width), np.int32), np.zeros(batch_size, np.int32)
        for i, (row, _) in enumerate(group):
            tokens[i, : len(row)], lengths[i] = row, len(row)
        opens = np.array([opening for _, opening in group] + [False] * (batch_size - len(group)))
        return tokens, lengths, opens

    group = []
    for piece in pieces():
        group.append(piece)
        if len(group) == batch_size:
            yield emit(group)
            group = []
    if group:
        yield emit(group)


def harvest_activations(
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    hook_name: str,
    batch_size: int = 32,
    context_size: int | None = None,
    skip_bos: bool = True,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Runs the model over rows of token ids and yields fp32 arrays [n, D], one a batch, padding left out.

    Rows longer than context_size (default: the model's) are cut into pieces, so no token is lost. skip_bos drops the
    first position of a row where it holds the BOS token: its huge norm would dominate a dictionary.
    mesh: of `models.sharding.make_mesh`, with `params` on it: the rows of a batch, rounded up to a multiple of the
    devices that share them, are spread over its batch axes. Every process calls with the same rows and gets them all.
    Raises SAEError on a token id outside the vocabulary, a tap that is no vector a token, and NaN activations.
    """
    context_size = min(context_size or cfg.max_position, cfg.max_position)
    if (blocks_needed(hook_name) or 0) > cfg.n_layers:
        raise SAEError(f"harvest: there is no {hook_name}: the model has {cfg.n_layers} blocks")
    if hook_name.endswith("attn_probs"):
        raise SAEError(f"harvest: {hook_name} is no vector a token; choose another tap")
    ways = 1 if mesh is None else batch_ways(mesh)
    for tokens, lengths, opens in token_batches(token_rows, -(-batch_size // ways) * ways, context_size):
        if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
            bad = int(tokens.max() if tokens.max() >= cfg.vocab_size else tokens.min())
            raise SAEError(f"harvest: token id {bad} is outside the model's vocabulary of {cfg.vocab_size}")
        keep = np.arange(tokens.shape[1]) < lengths[:, None]
        if skip_bos and cfg.bos_token_id is not None:
            keep[:, 0] &= ~(opens & (tokens[:, 0] == cfg.bos_token_id))
        rows = fetch(tap(cfg, params, place_rows(tokens, mesh), place_rows(lengths, mesh), hook_name), mesh)[keep]
        if not np.isfinite(rows).all():
            raise SAEError(f"harvest: {hook_name} gives NaN or infinite activations; check the model's weights and dtype")
        yield rows


class ActivationBuffer:
    """Batches [batch_size, D] drawn at random from a rolling window of a stream of activations.

    The window holds `buffer_size` rows in shuffled order. Half of it is served, then refilled from the stream and
    shuffled again, so that neighbouring tokens do not share a batch and at most buffer_size rows are in memory.
    source: an iterator of arrays [n, D] (one pass), or a function that opens a new one (as many passes as asked for:
    the stream starts anew when it ends). At the end of one pass the rest is served, less than one batch dropped.
    """

    def __init__(
        self,
        source: Iterable[np.ndarray] | Callable[[], Iterable[np.ndarray]],
        batch_size: int,
        buffer_size: int,
        seed: int = 0,
    ):
        if batch_size < 1 or buffer_size < 2 * batch_size:
            raise SAEError(f"ActivationBuffer: buffer_size {buffer_size} must be at least twice batch_size {batch_size}")
        self.batch_size, self.buffer_size = batch_size, buffer_size
        self._rng = np.random.default_rng(seed)
        self._open = source if callable(source) else None
        self._stream = iter(source() if callable(source) else source)
        self._seen = 0  # rows of the pass under way
        self._rest: np.ndarray | None = None  # rows read and not yet in the window
        self._window: np.ndarray | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            self._refill()
            window = self._window
            if window is None or len(window) < self.batch_size:
                return
            exhausted = len(window) < self.buffer_size
            serve = len(window) if exhausted else max(self.batch_size, self.buffer_size // 2)
            count = serve // self.batch_size
            for i in range(count):
                yield window[i * self.batch_size : (i + 1) * self.batch_size]
            self._window = window[count * self.batch_size :]

    def _read(self) -> np.ndarray | None:
        """The next rows of the stream, opened anew at its end if it can be; None when there are none."""
        if self._rest is not None:
            rows, self._rest = self._rest, None
            return rows
        rows = next(self._stream, None)
        if rows is None and self._open is not None:
            if not self._seen:
                raise SAEError("ActivationBuffer: the source gives no activations; is the text empty?")
            self._stream, self._seen = iter(self._open()), 0
            return self._read()
        self._seen += 0 if rows is None else len(rows)
        return rows

    def _refill(self) -> None:
        parts = [] if self._window is None else [self._window]
        held = sum(map(len, parts))
        while held < self.buffer_size and (rows := self._read()) is not None:
            take = self.buffer_size - held
            if len(rows) > take:
                rows, self._rest = rows[:take], rows[take:]
            parts.append(rows)
            held += len(rows)
        if parts:
            window = np.concatenate(parts)
            self._window = window[self._rng.permutation(len(window))]


def array_batches(rows: np.ndarray, batch_size: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Endless shuffled batches of rows held in memory; every row is used once an epoch, a part batch dropped."""
    if len(rows) < batch_size:
        raise SAEError(f"array_batches: {len(rows)} rows are fewer than batch_size {batch_size}")
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[np.sort(order[start : start + batch_size])]
        epoch += 1
