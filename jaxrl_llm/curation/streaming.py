"""Run one jitted program over any number of token rows, shard by shard, on any number of devices, and keep the results.

A shard is `shard_rows` consecutive rows. Its rows are cut into pieces that fit the context, the pieces sorted into a few
padded widths, each width run in batches of one shape (so a handful of programs is compiled), and what comes back is put
together into one npz file, written atomically under a name that holds a hash of the program and of the shard's tokens. A
killed run finds its finished shards by that name and goes on; memory holds one shard. Several processes need a folder that all can
read; the first one writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from jaxrl_llm.errors import UserError, from_os_error

OVERFLOWS = ("window", "truncate", "drop", "error")
SMALLEST_WIDTH = 16


@dataclass(frozen=True)
class Piece:
    """A part of row `row` that fits the context. start: first position that counts (1 after a beginning-of-text token). mark: a
    position the program may need (where the answer begins), relative to this piece."""

    row: int
    tokens: Sequence[int]
    start: int
    mark: int
    first: bool = True
    last: bool = True


class Program(Protocol):
    """What is run. `sparse` names outputs [B, F] that are mostly zero; others are dense [B, D]. `merge` says how the pieces of
    a row combine: "max", "mean" (weighted by counted tokens) or "last"."""

    fingerprint: str
    context: int
    bos: int | None
    sparse: tuple[str, ...]
    merge: dict[str, str]

    def __call__(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, starts_B: np.ndarray, marks_B: np.ndarray) -> dict[str, Any]: ...


@dataclass
class Results:
    """What a run gives, read back lazily. names: outputs. lengths: [N] counted tokens. counts: rows that were "windowed",
    "truncated", "dropped" or "empty". dropped: [N] bool, rows whose outputs are zero because nothing of them was run."""

    shards: list[Callable[[], dict[str, np.ndarray]]]
    starts: np.ndarray
    lengths: np.ndarray
    dropped: np.ndarray
    counts: Counter = field(default_factory=Counter)
    widths: dict[str, int] = field(default_factory=dict)

    def blocks(self, name: str) -> ShardBlocks:
        """One output as CSR blocks, dense ones too."""
        return ShardBlocks(self, name)

    def dense(self, name: str) -> np.ndarray:
        """One dense output [N, D] in memory."""
        return np.concatenate([shard()[name] for shard in self.shards])

    def csr(self, name: str) -> sparse.csr_matrix:
        """One output [N, F] in memory."""
        return sparse.vstack(list(self.blocks(name).blocks()), format="csr")


@dataclass(frozen=True)
class ShardBlocks:
    """Rows of one output, read from the shards as they are asked for (the interface of feature_space.Blocks)."""

    results: Results
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.results.lengths), self.results.widths[self.name]

    def _block(self, i: int) -> sparse.csr_matrix:
        shard = self.results.shards[i]()
        if self.name in shard:
            return sparse.csr_matrix(shard[self.name])
        parts = (shard[f"{self.name}.{part}"] for part in ("data", "indices", "indptr"))
        rows = len(shard["lengths"])
        return sparse.csr_matrix(tuple(parts), shape=(rows, self.shape[1]))

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        for i in range(len(self.results.shards)):
            yield self._block(i)

    def rows(self, indices: np.ndarray) -> sparse.csr_matrix:
        indices = np.asarray(indices)
        shard = np.searchsorted(self.results.starts, indices, side="right") - 1
        used = np.unique(shard)
        if not len(used):
            return sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        parts = [self._block(i)[indices[shard == i] - self.results.starts[i]] for i in used]
        order = np.argsort(np.concatenate([np.flatnonzero(shard == i) for i in used]))
        return sparse.vstack(parts, format="csr")[order]


def run_sharded(
    program: Program,
    n: int,
    tokens_of: Callable[[int, int], tuple[list[Sequence[int]], Sequence[int]]],
    *,
    folder: str | os.PathLike[str] | None = None,
    shard_rows: int = 2048,
    batch_tokens: int = 8192,
    overflow: str = "window",
    mesh: Any = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Results:
    """Run `program` over n rows. tokens_of(a, b) -> (token lists of rows a..b, their marks). folder: where shards are kept (None:
    in memory). overflow: what happens to a row longer than the program's context: "window" runs it in parts and merges
    them, "truncate" keeps its end (behind the beginning-of-text token), "drop" skips it, "error" raises UserError. mesh: rows of
    a batch are spread over its batch axes. progress(rows) is called after each shard."""
    if overflow not in OVERFLOWS:
        raise UserError(f"overflow {overflow!r}: one of {', '.join(OVERFLOWS)}")
    folder = None if folder is None else Path(folder)
    shards, counts, lengths, dropped = [], Counter(), [], []
    starts = np.arange(0, n, shard_rows)
    widths: dict[str, int] = {}
    wanted = set()
    for start in starts:
        stop = min(n, start + shard_rows)
        tokens, marks = tokens_of(int(start), int(stop))
        path = None if folder is None else folder / f"shard-{start // shard_rows:05d}-{_key(program, tokens, marks, overflow)}.npz"
        done = path is not None and _agreed(path.exists())
        if done:
            arrays = dict(np.load(path))
        else:
            pieces, flags = _cut(tokens, marks, program, overflow, int(start))
            arrays = flags | _run_shard(program, pieces, stop - start, batch_tokens, mesh)
            if path is not None and _is_writer():
                write_npz(path, arrays)
        for name, count in zip(("windowed", "truncated", "dropped", "empty"), arrays["counts"].tolist(), strict=True):
            counts[name] += count
        widths |= {name: int(w) for name, w in zip(arrays["names"].tolist(), arrays["widths"].tolist(), strict=True)}
        lengths.append(arrays["lengths"])
        dropped.append(arrays["dropped"])
        wanted.add(path)
        shards.append(_Held(arrays) if path is None or not (done or _is_writer()) else _Shard(path))
        progress(int(stop - start))
    for stale in () if folder is None else folder.glob("shard-*.npz"):
        if stale not in wanted and _is_writer():
            stale.unlink()
    return Results(shards, starts, np.concatenate(lengths), np.concatenate(dropped), counts, widths)


@dataclass(frozen=True)
class _Held:
    arrays: dict[str, np.ndarray]

    def __call__(self) -> dict[str, np.ndarray]:
        return self.arrays


@dataclass(frozen=True)
class _Shard:
    path: Path

    def __call__(self):
        return np.load(self.path)  # lazy: a member is read when it is asked for


def _key(program: Program, tokens: list[Sequence[int]], marks: Sequence[int], overflow: str) -> str:
    digest = hashlib.blake2b(f"{program.fingerprint} {overflow}".encode(), digest_size=8)
    for row, mark in zip(tokens, marks, strict=True):
        digest.update(np.array([len(row), mark, *row], np.int32).tobytes())
    return digest.hexdigest()


def _is_writer() -> bool:
    import jax

    return jax.process_index() == 0


def _agreed(done: bool) -> bool:
    """The first process's word on whether a shard is done: the others must run it exactly when it does."""
    import jax
    from jax.experimental import multihost_utils

    return done if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(done)))


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz file that is there whole or not at all; raises UserError when the disk does not take it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise from_os_error(error, path, "write") from error


def keep_end(row: Sequence[int], mark: int, bos: int | None, context: int) -> tuple[list[int], int]:
    """A row's last tokens that fit the context, behind its beginning-of-text token, and where `mark` then is."""
    head = 1 if len(row) and row[0] == bos else 0
    return _piece(row, mark, head, max(len(row) - context, 0), context)


def _piece(row: Sequence[int], mark: int, head: int, begin: int, context: int) -> tuple[list[int], int]:
    """The context's worth of a row from `begin` behind its head, and where `mark` then is."""
    return [*row[:head], *row[head + begin : begin + context]], max(mark - begin, head)


def _cut(tokens, marks, program: Program, overflow: str, first_row: int) -> tuple[list[Piece], dict[str, np.ndarray]]:
    """Rows as pieces that fit the context, and what was done to them."""
    counts, pieces = Counter(), []
    lengths, dropped = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    for i, (row, mark) in enumerate(zip(tokens, marks, strict=True)):
        head = 1 if len(row) and row[0] == program.bos else 0
        lengths[i] = len(row) - head
        if lengths[i] == 0:
            counts["empty"] += 1
            dropped[i] = True
        elif len(row) <= program.context:
            pieces.append(Piece(i, row, head, mark))
        elif overflow == "error":
            raise UserError(
                f"row {first_row + i} has {len(row)} tokens, longer than the context of {program.context}; set overflow to window, truncate or drop"
            )
        elif overflow == "drop":
            counts["dropped"] += 1
            dropped[i] = True
        else:
            room = program.context - head
            body, name = row[head:], "windowed" if overflow == "window" else "truncated"
            begins = range(0, len(body), room) if overflow == "window" else [len(body) - room]
            for b in begins:
                part, at = _piece(row, mark, head, b, program.context)
                pieces.append(Piece(i, part, head, at, b == begins[0], b == begins[-1]))
            counts[name] += 1
    flags = {"lengths": lengths, "dropped": dropped}
    return pieces, flags | {"counts": np.array([counts[k] for k in ("windowed", "truncated", "dropped", "empty")])}


def padded_width(length: int, context: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ... (at most the context): at most a third of a row is padding, and widths are few."""
    power = max(SMALLEST_WIDTH, 1 << (length - 1).bit_length())
    return min(context, power * 3 // 4 if SMALLEST_WIDTH < length <= power * 3 // 4 else power)


def _batches(pieces: list[Piece], context: int, batch_tokens: int, multiple: int):
    """(pieces of a batch, tokens_BT, lengths_B, starts_B, marks_B), one shape a width; missing rows have length 0."""
    by_width: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_width.setdefault(padded_width(len(piece.tokens), context), []).append(piece)
    for width, group in sorted(by_width.items()):
        size = max(1, -(-batch_tokens // (width * multiple))) * multiple
        for first in range(0, len(group), size):
            chunk = group[first : first + size]
            tokens = np.zeros((size, width), np.int32)
            numbers = np.zeros((3, size), np.int32)
            for j, piece in enumerate(chunk):
                tokens[j, : len(piece.tokens)] = piece.tokens
                numbers[:, j] = len(piece.tokens), piece.start, piece.mark
            yield chunk, tokens, *numbers


def _run_shard(program: Program, pieces: list[Piece], rows: int, batch_tokens: int, mesh: Any) -> dict[str, np.ndarray]:
    """All outputs of one shard's rows; two batches are in flight, so that the host packs one while the device runs the next."""
    place, multiple = _placement(mesh)
    pending: deque = deque()
    collected: list[tuple[list[Piece], dict[str, Any]]] = []

    def fetch():
        chunk, outputs = pending.popleft()
        collected.append((chunk, {name: _to_host(value, len(chunk), name in program.sparse) for name, value in outputs.items()}))

    for chunk, *arrays in _batches(pieces, program.context, batch_tokens, multiple):
        pending.append((chunk, program(*place(arrays))))
        if len(pending) > 2:
            fetch()
    while pending:
        fetch()
    return _assemble(program, collected, rows)


def _placement(mesh: Any):
    if mesh is None:
        return lambda arrays: arrays, 1
    from models.sharding import batch_ways, place_rows

    return lambda arrays: [place_rows(a, mesh) for a in arrays], batch_ways(mesh)


def _to_host(value: Any, rows: int, is_sparse: bool):
    dense = np.asarray(value)[:rows]
    return sparse.csr_matrix(dense) if is_sparse else dense


def _assemble(program: Program, collected, rows: int) -> dict[str, np.ndarray]:
    """Pieces back into rows, in the order of the rows."""
    pieces = [piece for chunk, _ in collected for piece in chunk]
    row_of = np.array([p.row for p in pieces], int)
    counted = np.array([len(p.tokens) - p.start for p in pieces], np.float32)
    last = np.array([p.last for p in pieces], bool)
    total = np.bincount(row_of, counted, minlength=rows) if len(pieces) else np.zeros(rows)
    out: dict[str, np.ndarray] = {}
    names, widths = program.widths(), []
    for name, width in names.items():
        how = program.merge[name]
        parts = [outputs[name] for _, outputs in collected]
        weight = {"mean": counted / total[row_of], "last": last.astype(np.float32)}.get(how, np.ones(len(pieces), np.float32))
        if name in program.sparse:
            stacked = sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, width), dtype=np.float32)
            merged = _merge_sparse(stacked, row_of, weight.astype(np.float32), how, rows)
            out |= {f"{name}.data": merged.data, f"{name}.indices": merged.indices, f"{name}.indptr": merged.indptr}
        else:
            stacked = np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
            out[name] = _merge_dense(stacked, row_of, weight, how, rows)
        widths.append(width)
    return out | {"names": np.array(list(names)), "widths": np.array(widths)}


def _merge_sparse(stacked: sparse.csr_matrix, row_of, weight, how: str, rows: int) -> sparse.csr_matrix:
    width = stacked.shape[1]
    if how != "max":
        sums = sparse.csr_matrix((weight, (row_of, np.arange(len(row_of)))), shape=(rows, len(row_of)))
        merged = (sums @ stacked).tocsr().astype(np.float32)
    else:
        coo = stacked.tocoo()
        key = row_of[coo.row].astype(np.int64) * width + coo.col
        order = np.argsort(key, kind="stable")
        key, data = key[order], coo.data[order]
        first = np.flatnonzero(np.diff(key, prepend=-1))
        data = np.maximum.reduceat(data, first) if len(first) else data
        merged = sparse.csr_matrix((data, (key[first] // width, key[first] % width)), shape=(rows, width), dtype=np.float32)
    merged.eliminate_zeros()
    merged.sort_indices()
    return merged


def _merge_dense(stacked: np.ndarray, row_of, weight, how: str, rows: int) -> np.ndarray:
    if how == "max":
        out = np.full((rows, stacked.shape[1]), -np.inf, np.float32)
        np.maximum.at(out, row_of, stacked)
        return np.where(np.isfinite(out), out, 0.0).astype(np.float32)
    out = np.zeros((rows, stacked.shape[1]), np.float32)
    np.add.at(out, row_of, stacked * weight[:, None].astype(np.float32))
    return out
