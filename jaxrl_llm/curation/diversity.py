"""Which prompts are alike: clusters in feature space, and how diverse the batches of a schedule are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError


@dataclass(frozen=True)
class Clusters:
    """labels: [N] int, 0..k-1 by falling size. centers: [k, d] unit vectors. inertia: twice the sum of (1 - cosine)."""

    labels: np.ndarray
    centers: np.ndarray
    inertia: float


def cluster(vectors: np.ndarray, k: int, *, n_init: int = 10, seed: int = 0, max_iter: int = 100, mesh=None) -> Clusters:
    """Spherical k-means of reduced feature vectors [N, d] (SAERL's clusters; methods notes 5.3: K 32, 10 restarts on a
    256-dimensional truncated SVD). Rows of norm 0 all fall to one cluster. Raises UserError for k outside 1..N."""
    import sae

    vectors = np.asarray(vectors, dtype=np.float32)
    if not 1 <= k <= len(vectors):
        raise UserError(f"clusters: k is {k} for {len(vectors)} prompts; give 1 to {len(vectors)}")
    centers, labels, inertia = sae.kmeans(vectors, k, init="k-means++", seed=seed, n_init=n_init, max_iter=max_iter, spherical=True, mesh=mesh)
    by_size = np.argsort(-np.bincount(np.asarray(labels), minlength=k), kind="stable")
    rank = np.empty(k, int)
    rank[by_size] = np.arange(k)
    return Clusters(rank[np.asarray(labels)], np.asarray(centers)[by_size], float(inertia))


def cluster_kept(vectors: np.ndarray, keep: np.ndarray, k: int, **options) -> np.ndarray:
    """[N] labels: clusters of the kept rows [N] bool alone, the others with the nearest of them. SAERL filters before it clusters:
    clusters of the whole pool may be made of nothing but broken rows."""
    found = cluster(vectors[keep], min(k, int(keep.sum())), **options)
    labels = np.argmax(np.asarray(vectors, np.float32) @ found.centers.T, axis=1)
    labels[keep] = found.labels
    return labels


def normalised_mutual_information(labels: np.ndarray, truth: np.ndarray) -> float:
    """NMI (arithmetic mean of the entropies) of two labellings [N]; 1 for equal partitions, 0 for independent ones."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(np.asarray(truth).astype(str), labels))


def silhouette(vectors: np.ndarray, labels: np.ndarray, *, max_rows: int = 2000, seed: int = 0) -> float:
    """Mean cosine silhouette of at most `max_rows` random rows; 0 where there is only one cluster."""
    from sklearn.metrics import silhouette_score

    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:max_rows])
    rows = rows[np.linalg.norm(vectors[rows], axis=1) > 0]
    if not 1 < len(set(labels[rows])) < len(rows):
        return 0.0
    return float(silhouette_score(vectors[rows], labels[rows], metric="cosine"))


def batch_diversity(rows: np.ndarray, labels: np.ndarray, vectors: np.ndarray) -> dict[str, float]:
    """Diversity of one batch of row indices.

    cluster_entropy: Shannon entropy (nats) of its cluster labels. log_det: (1 / B) log det(I + V V') with V [B, d] the rows'
    unit vectors: 0 for no vectors, log(2) for orthogonal ones, about log(1 + B) / B for equal ones.
    """
    counts = np.bincount(labels[rows])
    share = counts[counts > 0] / len(rows)
    unit = vectors[rows].astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    log_det = np.linalg.slogdet(np.eye(len(rows)) + unit @ unit.T)[1]
    return {"cluster_entropy": float(-(share * np.log(share)).sum()), "log_det": float(log_det / len(rows))}


def schedule_diversity(schedule, steps: int, labels: np.ndarray, vectors: np.ndarray) -> dict[str, Any]:
    """Diversity of the first `steps` batches of an offline schedule: mean, and the values of each step, for both measures."""
    values = [batch_diversity(schedule.batch(step), labels, vectors) for step in range(steps)]
    return {
        name: {"mean": float(np.mean([v[name] for v in values])), "by_step": [v[name] for v in values]} for name in ("cluster_entropy", "log_det")
    }
