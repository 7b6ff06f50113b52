"""Activations of a language model as a stream of rows: what dictionaries are trained and judged on.

Letters: B rows of tokens, T tokens, D width of the tap.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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


@functools.partial(jax.jit, static_argnames=("cfg", "hook_names"))
def tap(cfg: Any, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, hook_names: tuple[str, ...]) -> jax.Array:
    """The named activations [B, T, D] in fp32, one behind the other along D; blocks past the last of them do not run."""
    needed = [blocks_needed(name) for name in hook_names]
    stop_at = None if None in needed else max(n for n in needed if n is not None)
    out = models.forward(cfg, params, tokens_BT, lengths=lengths_B, taps=hook_names, stop_at=stop_at)
    found = [out.taps[name].astype(jnp.float32) for name in hook_names]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


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


def left_out(tokens_BT: np.ndarray, skip_first: int, drop_tokens: Collection[int] = ()) -> np.ndarray:
    """[B, T] bool: the positions that dictionaries are trained without, at which a tap that one is spliced into stays as it is.

    skip_first: so many at the beginning of each row of the batch, be it a text's first piece or a later one, with BOS or without: whatever
    stands first is where attention drains to, with a norm that would dominate a dictionary (Sun et al. 2024, massive activations).
    drop_tokens: ids, wherever they stand.
    """
    return np.isin(tokens_BT, np.fromiter(drop_tokens, np.int32)) | (np.arange(tokens_BT.shape[1]) < skip_first)


def harvest_activations(
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    hook_name: str | Sequence[str],
    batch_size: int = 32,
    context_size: int | None = None,
    skip_first: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    drop_tokens: Collection[int] = (),
) -> Harvest:
    """Runs the model over rows of token ids: a stream of fp32 arrays [n, D], one a batch, padding left out.

    hook_name: a tap, or several whose activations stand one behind the other in each row, in one pass over the model.
    Rows longer than context_size (default: the model's) are cut into pieces, so no token is lost but those that skip_first, of
    each piece, and drop_tokens (such as a chat format's special tokens) leave out, see `left_out`.
    mesh: of `models.sharding.make_mesh`, with `params` on it: the rows of a batch, rounded up to a multiple of the
    devices that share them, are spread over its batch axes. Every process calls with the same rows and gets them all.
    Raises SAEError on a token id outside the vocabulary, a tap that is no vector a token, and NaN activations.
    """
    context_size = min(context_size or cfg.max_position, cfg.max_position)
    hooks = (hook_name,) if isinstance(hook_name, str) else tuple(hook_name)
    for hook in hooks:
        if (blocks_needed(hook) or 0) > cfg.n_layers:
            raise SAEError(f"harvest: there is no {hook}: the model has {cfg.n_layers} blocks")
        if hook.endswith("attn_probs"):
            raise SAEError(f"harvest: {hook} is no vector a token; choose another tap")
    ways = 1 if mesh is None else batch_ways(mesh)

    def run(tokens, lengths, _) -> np.ndarray:
        if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
            bad = int(tokens.max() if tokens.max() >= cfg.vocab_size else tokens.min())
            raise SAEError(f"harvest: token id {bad} is outside the model's vocabulary of {cfg.vocab_size}")
        keep = (np.arange(tokens.shape[1]) < lengths[:, None]) & ~left_out(tokens, skip_first, drop_tokens)
        rows = fetch(tap(cfg, params, place_rows(tokens, mesh), place_rows(lengths, mesh), hooks), mesh)[keep]
        if not np.isfinite(rows).all():
            raise SAEError(f"harvest: {', '.join(hooks)} gives NaN or infinite activations; check the model's weights and dtype")
        return rows

    return Harvest(token_batches(token_rows, -(-batch_size // ways) * ways, context_size), run)


class Harvest(Iterator[np.ndarray]):
    """The stream of `harvest_activations`: batches of tokens, and `run`, which makes each one's array when it is asked for."""

    def __init__(self, batches: Iterator[tuple], run: Callable[..., np.ndarray]):
        self._batches, self._run = batches, run

    def __next__(self) -> np.ndarray:
        return self._run(*next(self._batches))

    def skip(self, count: int) -> None:
        """Passes over the next `count` arrays without running the model."""
        for _ in itertools.islice(self._batches, count):
            pass


class ActivationBuffer:
    """Batches [batch_size, D] drawn at random from a rolling window of a stream of activations.

    The window holds `buffer_size` rows in shuffled order. Half of it is served, then refilled from the stream and
    shuffled again, so that neighbouring tokens do not share a batch and at most buffer_size rows are in memory.
    source: an iterator of arrays [n, D] (one pass), or a function that opens a new one (as many passes as asked for:
    the stream starts anew when it ends). At the end of one pass the rest is served, less than one batch dropped.

    `state` and `restore` let a buffer over the same source go on bit for bit. The window is kept whole; the source is wound on to
    its place, by its `skip` where it has one (Harvest's runs no model), else by drawing and dropping.
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
        self._arrays = 0  # arrays of the pass under way
        self._taken = 0  # rows of the last array that are in the window, or were
        self._rest: np.ndarray | None = None  # its other rows
        self._window: np.ndarray | None = None  # rows not yet served
        self._left = 0  # batches to serve before the window is filled and shuffled again

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            if not self._left:
                self._refill()
            if not self._left:
                return
            self._left -= 1
            batch, self._window = self._window[: self.batch_size], self._window[self.batch_size :]
            yield batch

    def state(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(the rows in the window, fp32, with zeros up to [buffer_size, D]; where in the stream it is, small arrays)."""
        if self._window is None:
            raise ValueError("ActivationBuffer.state: nothing was served yet")
        window = np.zeros((self.buffer_size, self._window.shape[1]), np.float32)
        window[: len(self._window)] = self._window
        place = np.array([len(self._window), self._left, self._arrays, self._taken, self._seen], np.int64)
        generator = json.dumps(self._rng.bit_generator.state).encode()
        return window, {"place": place, "generator": np.frombuffer(generator, np.uint8)}

    def restore(self, window: np.ndarray, place: dict[str, np.ndarray]) -> None:
        """Goes on from a `state`; the buffer must be fresh, with the source and sizes of the one that gave it.

        Raises SAEError where the source has become shorter.
        """
        held, self._left, arrays, self._taken, self._seen = map(int, place["place"])
        self._window = np.array(window[:held])
        self._rng.bit_generator.state = json.loads(place["generator"].tobytes())
        self._arrays = arrays
        if not arrays:
            return
        if hasattr(self._stream, "skip"):
            self._stream.skip(arrays - 1)
        else:
            next(itertools.islice(self._stream, arrays - 1, arrays - 1), None)
        last = next(self._stream, None)
        if last is None or len(last) < self._taken:
            raise SAEError("ActivationBuffer: the source is shorter than when training was stopped; start over in another folder")
        self._rest = last[self._taken :] if len(last) > self._taken else None

    def _read(self) -> np.ndarray | None:
        """The next rows of the stream, opened anew at its end if it can be; None when there are none."""
        if self._rest is not None:
            rows, self._rest = self._rest, None
            return rows
        rows = next(self._stream, None)
        if rows is None and self._open is not None:
            if not self._seen:
                raise SAEError("ActivationBuffer: the source gives no activations; is the text empty?")
            self._stream, self._seen, self._arrays = iter(self._open()), 0, 0
            return self._read()
        if rows is not None:
            self._seen, self._arrays, self._taken = self._seen + len(rows), self._arrays + 1, 0
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
            self._taken += len(rows)
        if parts:
            window = np.concatenate(parts)
            self._window = window[self._rng.permutation(len(window))]
        serve = held if held < self.buffer_size else max(self.batch_size, self.buffer_size // 2)
        self._left = serve // self.batch_size


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
