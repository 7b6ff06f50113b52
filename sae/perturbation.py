"""Targeted probe perturbation: do the latents that carry a class carry it alone?

For each class a linear probe is fitted, and the latents that move it most are taken out of the activations, the SAE's error kept. A good
dictionary then loses what that probe knew and nothing of what the others knew. Letters: N texts, C classes, R resamples, F latents, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sae.dictionary import Dictionary
from sae.errors import SAEError
from sae.pooling import Pooled
from sae.probing import Probe, Problem, fit_probe, mean_difference, one_vs_rest
from sae.splice import ratio

NS = (2, 5, 10, 20, 50, 100, 500)


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """Which test rows of each class's problem its probe gets right: clean[j], and, after class i's latents are taken out,
    ablated[n][i][j]; diff_mean[i][j] after the direction between class i's mean and the rest's is taken out instead.
    latents[i]: what is taken out for class i, in order, those that move its probe up; n larger than their number takes all."""

    problems: list[Problem]
    probes: list[Probe]
    latents: list[np.ndarray]
    clean: list[np.ndarray]
    ablated: dict[int, list[list[np.ndarray]]]
    diff_mean: list[list[np.ndarray]]

    def scores(self, weights_RN: np.ndarray | None = None) -> dict[str, dict[str, np.ndarray]]:
        """{n, or "diff_mean": {tpp, intended, unintended}}, [R] each, with weights of the texts [R, N] (default: each once).

        intended: mean over classes of the drop in accuracy of the class's own probe; unintended: mean over pairs of classes of the drop of
        the other's probe; tpp = intended - unintended.
        """
        clean = [self._accuracy(right, problem, weights_RN) for right, problem in zip(self.clean, self.problems)]
        found = {}
        for name, rows in (*((str(n), rows) for n, rows in self.ablated.items()), ("diff_mean", self.diff_mean)):
            drops = [[clean[j] - self._accuracy(right, self.problems[j], weights_RN) for j, right in enumerate(row)] for row in rows]
            intended = np.mean([drops[i][i] for i in range(len(drops))], axis=0)
            unintended = np.mean([drop for i, row in enumerate(drops) for j, drop in enumerate(row) if i != j], axis=0)
            found[name] = {"tpp": intended - unintended, "intended": intended, "unintended": unintended}
        return found

    @staticmethod
    def _accuracy(right: np.ndarray, problem: Problem, weights_RN: np.ndarray | None) -> np.ndarray:
        weights = np.ones((1, len(right))) if weights_RN is None else weights_RN[:, problem.test]
        return ratio(weights @ right, weights.sum(axis=1))  # NaN where a resample has no text of the problem


def targeted_probe_perturbation(
    d: Dictionary, pooled: Pooled, labels: Sequence[Any], train: np.ndarray, test: np.ndarray, *, ns: Sequence[int] = NS, seed: int = 0
) -> Perturbation:
    """Takes each class's n most telling latents out of the texts' mean activations and asks all probes again.

    Probes are logistic, one class against the rest, on mean activations (of contributions a mean is linear, so that taking a latent out
    of a text's mean is taking it out of each token). A latent's attribution is the class's mean contribution less the rest's, 0 where the rest's
    is larger, times its decoder row's product with the probe's weights, all on training rows: what speaks against the class where it is
    absent is no latent of the class, though the product of two negative numbers is positive. An n above the number of latents is cut to it.
    Raises SAEError for a transcoder, whose latents write to another tap than the probes read, and for fewer than three classes: of two, each
    probe is the other's mirror image, and the measure 0 by definition.
    """
    if d.cfg.d_out is not None:
        raise SAEError("targeted_probe_perturbation: a transcoder writes to another tap than it reads, so that its latents cannot be taken out there")
    if len(set(np.asarray(labels).tolist())) < 3:
        raise SAEError("targeted_probe_perturbation: two classes give mirrored probes; label the texts with three classes or more")
    decoder = np.asarray(d.params["W_dec"], np.float64)
    if decoder.shape[1] != pooled.activations.shape[1]:
        raise SAEError(f"targeted_probe_perturbation: the decoder writes {decoder.shape[1]} dimensions, the activations have {d.cfg.d_in}")
    problems = one_vs_rest(labels, train, test, seed=seed)
    probes, latents, directions = [], [], []
    for problem in problems:
        x = pooled.activations[problem.train]
        probe = fit_probe(x, problem.train_labels, per_column=False)
        more = np.maximum(mean_difference(pooled.contributions[problem.train], problem.train_labels), 0.0)
        effect = more * (decoder @ probe.weights)
        order = np.argsort(-effect, kind="stable")[: max(ns)]
        direction = mean_difference(x, problem.train_labels)
        probes.append(probe)
        latents.append(order[effect[order] > 0])
        directions.append((direction / max(np.linalg.norm(direction), 1e-30), x.mean(axis=0, dtype=np.float64)))
    scores = [probe.scores(pooled.activations[problem.test]) for probe, problem in zip(probes, problems)]

    def without(chosen: np.ndarray) -> list[np.ndarray]:
        """Which test rows each probe gets right without the chosen latents' contributions."""
        return [
            right(scores[j] - np.asarray(pooled.contributions[problem.test][:, chosen] @ (decoder[chosen] @ probes[j].weights)), problem)
            for j, problem in enumerate(problems)
        ]

    def across(direction: np.ndarray, mean: np.ndarray) -> list[np.ndarray]:
        """The same with what lies along a direction set to the training rows' mean."""
        return [
            right(scores[j] - ((pooled.activations[problem.test] - mean) @ direction) * (direction @ probes[j].weights), problem)
            for j, problem in enumerate(problems)
        ]

    counts = sorted({min(n, d.cfg.d_sae) for n in ns})
    ablated = {n: [without(own[:n]) for own in latents] for n in counts}
    clean = [right(own, problem) for own, problem in zip(scores, problems)]
    return Perturbation(problems, probes, latents, clean, ablated, [across(*one) for one in directions])


def right(scores: np.ndarray, problem: Problem) -> np.ndarray:
    """1.0 where a score's sign is the test label's."""
    return ((scores > 0) == (problem.test_labels == 1)).astype(float)
