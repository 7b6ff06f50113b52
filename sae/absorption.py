"""Feature absorption on the first-letter task: tokens whose letter is told not by the letter's latent but by one of their own.

After Chanin et al. 2024 and SAEBench. A linear probe says which direction tells a letter; the letter's main latents are those that a sparse
probe needs; where they are silent though the probe is right, the latent that carries the direction instead has absorbed the letter. docs/sae.md lists
what differs from SAEBench.
Letters: N tokens' activations, D width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sae.dictionary import Dictionary
from sae.errors import SAEError
from sae.kmeans import unit_rows
from sae.pooling import pool
from sae.probing import Probe, fit_probe, mean_difference, measures, split

SPACE_MARKS = ("▁", "Ġ", " ")  # how tokenizers write that a word begins


@dataclasses.dataclass(frozen=True)
class AbsorptionConfig:
    """max_k: latents that a sparse probe may read. f1_jump: the rise in F1 (of training rows) that makes one more of them a main latent.
    cosine: least cosine of an absorbing latent's decoder row with the probe's direction, for the fraction; full_cosine: the same for full
    absorption (SAEBench's defaults, for wide models; in D dimensions random directions have cosines of about 1 / sqrt(D)). share: least part
    of the activation's own projection that absorbing latents must give, the latents of a fraction together, the one of full absorption
    alone. max_absorbing: latents that may share a fraction. least: rows that a letter needs on each side of the split; others are passed over.
    """

    max_k: int = 10
    f1_jump: float = 0.03
    cosine: float = 0.1
    full_cosine: float = 0.025
    share: float = 0.4
    max_absorbing: int = 3
    least: int = 5


@dataclasses.dataclass(frozen=True)
class LetterAbsorption:
    """Of one letter: its main latents; F1 on test rows of the dense probe and of sparse ones with 1, 2, ... latents; the test rows of the letter
    that the dense probe gets right, and for each of these its absorbed fraction, whether absorption is full, and by which latent (-1: none)."""

    letter: str
    main: list[int]
    probe_f1: float
    sparse_f1: list[float]
    rows: np.ndarray
    fraction: np.ndarray
    full: np.ndarray
    absorber: np.ndarray


def first_letters(vocabulary: Mapping[str, int], *, words_only: bool = True) -> dict[int, str]:
    """Token id -> first letter, lower case, of the vocabulary's tokens of ASCII letters alone.

    words_only: only tokens that begin a word, told by a space's mark, where the vocabulary has such marks at all.
    """
    marked = any(token[:1] in SPACE_MARKS and token[1:].isalpha() for token in vocabulary)
    found = {}
    for token, number in vocabulary.items():
        opens = token[:1] in SPACE_MARKS
        word = token[1:] if opens else token
        if word.isascii() and word.isalpha() and (opens or not marked or not words_only):
            found[number] = word[0].lower()
    return found


def feature_absorption(
    d: Dictionary, x_ND: np.ndarray, letters: Sequence[str], tokens: Sequence[int] | None = None, *,
    cfg: AbsorptionConfig = AbsorptionConfig(), test_share: float = 0.5, seed: int = 0, progress: Any = None,
) -> list[LetterAbsorption]:  # fmt: skip
    """What of each letter's direction is carried by other latents than the letter's.

    x_ND: activations at single tokens, with the first letter of each; tokens: their ids (default: all differ), so that no token is
    on both sides of the split. progress wraps the iterator over letters (tqdm). Raises SAEError for a transcoder, whose latents write to
    another tap than the probe reads, and where no letter has enough rows.
    """
    if d.cfg.d_out is not None:
        raise SAEError("feature_absorption: a transcoder writes to another tap than it reads, so that its latents carry no part of a probe there")
    x, labels = np.asarray(x_ND, np.float32), np.asarray(letters)
    if np.asarray(d.params["W_dec"]).shape[1] != x.shape[1]:
        raise SAEError(f"feature_absorption: activations have {x.shape[1]} dimensions, the decoder writes {np.shape(d.params['W_dec'])[1]}")
    train, test = split_tokens(labels, np.arange(len(x)) if tokens is None else np.asarray(tokens), test_share, seed)
    known = [c for c in sorted(set(labels.tolist())) if min(np.sum(labels[train] == c), np.sum(labels[test] == c)) >= cfg.least]
    if len(known) < 2:
        raise SAEError(f"feature_absorption: {len(known)} letter(s) with {cfg.least} rows to train on and as many to test on; give more tokens")
    pooled = pool(d, [x], [1] * len(x))
    unit = unit_rows(np.asarray(d.params["W_dec"], np.float64))
    return [_letter(d, cfg, pooled, unit, labels == c, train, test, c) for c in (known if progress is None else progress(known))]


def split_tokens(labels: np.ndarray, tokens: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`split` of rows by token id; letters of a single token are left out of both sides."""
    several = np.array([len(set(tokens[labels == c].tolist())) > 1 for c in labels.tolist()])
    rows = np.flatnonzero(several)
    if not len(rows) or len(set(labels[rows].tolist())) < 2:
        raise SAEError("feature_absorption: give two letters with two different tokens each, at least")
    train, test = split(labels[rows], tokens[rows].tolist(), test_share=test_share, seed=seed)
    return rows[train], rows[test]


def _letter(
    d: Dictionary, cfg: AbsorptionConfig, pooled: Any, unit_FD: np.ndarray, own: np.ndarray, train: np.ndarray, test: np.ndarray, letter: str
) -> LetterAbsorption:
    x, decoder = pooled.activations, np.asarray(d.params["W_dec"], np.float64)
    probe = fit_probe(x[train], own[train], per_column=False)
    main, sparse_f1 = main_latents(pooled.latents, own, train, test, cfg)
    direction = probe.weights / max(np.linalg.norm(probe.weights), 1e-30)
    scores = probe.scores(x[test])
    rows = test[own[test] & (scores > 0)]
    cosine, along, projection = unit_FD @ direction, decoder @ direction, x[rows] @ direction
    by_main, by_absorbers, full, absorber = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), bool), np.full(len(rows), -1)
    for i, row in enumerate(rows):
        sparse = pooled.contributions[row]
        given = sparse.data * along[sparse.indices]  # what each firing latent puts along the direction
        is_main = np.isin(sparse.indices, main)
        by_main[i] = given[is_main].sum()
        others = given[~is_main & (cosine[sparse.indices] >= cfg.cosine) & (given > 0)]
        by_absorbers[i] = np.sort(others)[::-1][: cfg.max_absorbing].sum()
        if len(given) and projection[i] > 0 and not np.any(sparse.data[is_main] > 0):
            top = int(np.argmax(given))
            full[i] = cosine[sparse.indices[top]] >= cfg.full_cosine and given[top] >= cfg.share * projection[i]
            absorber[i] = sparse.indices[top] if full[i] else -1
    fraction = absorbed_fraction(projection, by_main, by_absorbers, cfg.share)
    return LetterAbsorption(
        letter, [int(j) for j in main], f1(own[test], scores), sparse_f1, rows, fraction, full, absorber
    )


def absorbed_fraction(projection_N: np.ndarray, main_N: np.ndarray, absorbers_N: np.ndarray, share: float) -> np.ndarray:
    """SAEBench's absorption fraction [N], from what lies along the probe's direction: the activation's projection, what its main latents
    give, and what its absorbing latents give together.

    0 where the absorbers give less than `share` of the projection, where the main latents give all of it, and where it is not positive; 1
    where the main latents give nothing; else a / (a + main), a being what the absorbers give, at most what the main latents leave.
    """
    absorbed = np.minimum(absorbers_N, projection_N - main_N)
    counts = (projection_N > 0) & (absorbers_N > 0) & (absorbers_N >= share * projection_N) & (main_N < projection_N)
    partly = counts & (main_N > 0)
    return np.where(partly, absorbed / np.where(partly, absorbed + main_N, 1.0), counts.astype(float))


def main_latents(latents: Any, own: np.ndarray, train: np.ndarray, test: np.ndarray, cfg: AbsorptionConfig) -> tuple[np.ndarray, list[float]]:
    """(the letter's latents, F1 on test rows of sparse probes with 1, 2, ... latents): the one that fires most more on the letter than
    elsewhere, and the next ones as long as each lifts the training rows' F1 by more than cfg.f1_jump."""
    difference = mean_difference(latents[train], own[train].astype(int))
    order = np.argsort(-difference, kind="stable")[: cfg.max_k]
    trained, tested = [], []
    for k in range(1, len(order) + 1):
        columns = latents[:, order[:k]]
        probe: Probe = fit_probe(columns[train], own[train])
        trained.append(f1(own[train], probe.scores(columns[train])))
        tested.append(f1(own[test], probe.scores(columns[test])))
    count = 1
    while count < len(trained) and trained[count] - trained[count - 1] > cfg.f1_jump:
        count += 1
    return order[:count], tested


def f1(own: np.ndarray, scores: np.ndarray) -> float:
    """F1 of positive scores, 0 where there is nothing to find and nothing is."""
    return float(np.nan_to_num(measures(own.astype(int), scores)["f1"][0]))


def absorption_figures(letters: Sequence[LetterAbsorption]) -> dict[str, float]:
    """SAEBench's figures, means over letters: mean_absorption_fraction_score, mean_full_absorption_score, mean_num_split_features (main
    latents a letter); and mean_probe_f1. A letter whose probe gets no test row right counts in the last two only."""
    with_rows = [found for found in letters if len(found.rows)]
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")  # noqa: E731
    return {
        "mean_absorption_fraction_score": mean([found.fraction.mean() for found in with_rows]),
        "mean_full_absorption_score": mean([found.full.mean() for found in with_rows]),
        "mean_num_split_features": mean([len(found.main) for found in letters]),
        "mean_probe_f1": mean([found.probe_f1 for found in letters]),
    }
