"""Rows that repeat another row: exactly, or nearly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

TERM = re.compile(r"\w+|[^\w\s]")
NUMBER = re.compile(r"\b\d+")
PERMUTATIONS = 64  # MinHash signature length: 16 bands of 4 find pairs of Jaccard 0.8 with probability 0.9998, of 0.5 with 0.64
BANDS = 16


def normalised(text: str) -> str:
    """Case and white space do not make a text another text."""
    return " ".join(text.casefold().split())


def exact_duplicates(texts: Sequence[str]) -> np.ndarray:
    """[N] index of the first row with the same normalised text, or -1 for a row that is the first of its kind."""
    first: dict[bytes, int] = {}
    out = np.full(len(texts), -1, dtype=np.int64)
    for i, text in enumerate(texts):
        key = hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        seen = first.setdefault(key, i)
        out[i] = -1 if seen == i else seen
    return out


def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float = 0.85,
    shingle: int = 3,
    vectors: np.ndarray | None = None,
    vector_threshold: float = 0.95,
    answers: Sequence[str] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """[N] index of the first row that this one nearly repeats, or -1.

    Two rows are near-duplicates when they hold the same numbers (the same problem with other numbers is another problem), the
    same answers where `answers` are given, and either the numbers in the same order and a Jaccard similarity of at least
    `threshold` between their sets of `shingle` consecutive terms, or, with `vectors` [N, d], a cosine of at least
    `vector_threshold`. Pairs are looked for among rows that share
    a MinHash band, and with `vectors` also among rows with the same (two or more) numbers. Keeps the first of a chain.
    """
    terms = [TERM.findall(normalised(text)) for text in texts]
    in_order = [tuple(NUMBER.findall(text)) for text in texts]
    numbers = [tuple(sorted(found)) for found in in_order]
    shingles = [_shingles(t, shingle) for t in terms]
    buckets = _minhash_buckets(shingles, seed)
    unit = None
    if vectors is not None:
        unit = np.asarray(vectors, np.float32) / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        by_numbers: dict[tuple, list[int]] = {}
        for i, key in enumerate(numbers):
            if len(key) > 1:
                by_numbers.setdefault(key, []).append(i)
        buckets += [b for b in by_numbers.values() if len(b) > 1]

    def alike(a: int, b: int) -> bool:
        if unit is not None and unit[a] @ unit[b] >= vector_threshold:
            return True
        return in_order[a] == in_order[b] and _jaccard(shingles[a], shingles[b]) >= threshold

    out = np.full(len(texts), -1, dtype=np.int64)
    for bucket in buckets:
        by_content: dict[tuple, list[int]] = {}
        for i in bucket:
            by_content.setdefault((numbers[i], normalised(answers[i] or "") if answers else ""), []).append(i)
        for rows in by_content.values():
            _mark(rows, alike, out)
    # A row may repeat one that itself repeats an earlier one: point at the first.
    for i in range(len(out)):
        while out[i] >= 0 and out[out[i]] >= 0:
            out[i] = out[out[i]]
    return out


def _mark(rows: list[int], alike: Callable[[int, int], bool], out: np.ndarray) -> None:
    """Point each row of a bucket at its first near-duplicate there; a row already found is not compared again."""
    heads: list[int] = []
    for i in rows:
        if out[i] >= 0:
            continue
        match = next((h for h in heads if alike(h, i)), None)
        if match is None:
            heads.append(i)
        else:
            out[i] = match


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _shingles(terms: list[str], size: int) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the runs of `size` terms (of the whole text where it is shorter)."""
    runs = {" ".join(terms[i : i + size]) for i in range(max(1, len(terms) - size + 1))}
    hashed = [int.from_bytes(hashlib.blake2b(r.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") for r in runs]
    return np.sort(np.array(hashed, dtype=np.uint64))


def _minhash_buckets(shingles: list[np.ndarray], seed: int) -> list[list[int]]:
    """Groups of two or more rows (in order) that agree in a whole band of their MinHash signatures (Broder 1997)."""
    if not shingles:
        return []
    rng = np.random.default_rng(seed)
    factor = rng.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offset = rng.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
    signatures = np.empty((len(shingles), PERMUTATIONS), np.uint64)
    for i, s in enumerate(shingles):
        # Multiply-shift on 64 bits, high bits compared: overflow wraps, as intended.
        signatures[i] = ((s[:, None] * factor + offset) >> np.uint64(16)).min(axis=0)
    found: dict[tuple[int, ...], None] = {}
    for band in np.split(signatures, BANDS, axis=1):
        _, group = np.unique(np.ascontiguousarray(band), axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        sizes = np.bincount(group.ravel())
        for rows, size in zip(np.split(order, np.cumsum(sizes)[:-1]), sizes, strict=True):
            if size > 1:
                found[tuple(rows.tolist())] = None
    return [list(rows) for rows in found]
