"""k-means beside scikit-learn's, from the same initial centres: seconds of a whole fit, and both inertias.

    python -m benchmarks.kmeans [--record]

The two take turns, and each counts its best time. Both run Lloyd's algorithm with at most 100 passes and a tolerance of 1e-4.
scikit-learn is in our own environment, so it is measured with --no-peers too, for the inertia.
"""

import argparse
import sys
from collections.abc import Iterable

import numpy as np

from benchmarks.common import Figure, run_benchmark, timed_in_turns

N, D, K = 20_000, 1_024, 64


def points(seed=0):
    """Rows around K weak centres, so that Lloyd's algorithm needs about a dozen passes."""
    rng = np.random.default_rng(seed)
    centers = 0.3 * rng.standard_normal((K, D), dtype=np.float32)
    return centers[rng.integers(0, K, N)] + rng.standard_normal((N, D), dtype=np.float32)


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Seconds of a fit, then the inertias."""
    import sklearn
    from sklearn.cluster import KMeans

    import sae

    x = points()
    start = x[:K].copy()
    reference = KMeans(K, init=start, n_init=1, max_iter=100, tol=1e-4, algorithm="lloyd")
    calls = {"ours": lambda: sae.kmeans(x, K, init=start, max_iter=100, tol=1e-4), "peer": lambda: reference.fit(x)}
    times = timed_in_turns(calls, repeats=args.repeats)
    (compile_s, ours), (_, theirs) = times["ours"], times["peer"]
    found, expected = calls["ours"](), float(reference.inertia_)
    same = float(np.mean(found.labels == reference.labels_))
    print(f"inertia {found.inertia:.7g}, scikit-learn {expected:.7g}; equal labels {same:.4%}", file=sys.stderr)
    peer, shape = f"scikit-learn {sklearn.__version__}", f"{N} points, {D} features, k {K}, {reference.n_iter_} passes"
    value = min(theirs) if args.peers else None
    yield Figure("kmeans", min(ours), "s", peer, value, compile_s, f"{shape}; goal 1 x", better="lower")
    shape = f"{same:.3%} of the labels equal; goal 1 x"
    yield Figure("kmeans_inertia", found.inertia, "squared distance", peer, expected, shape=shape, better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
