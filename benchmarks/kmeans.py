"""k-means beside scikit-learn's, from the same initial centres: seconds of a whole fit, and both inertias.

    python -m benchmarks.kmeans [--record]

The two take turns, and each counts its best time.
"""

import sys
import time

import numpy as np

from benchmarks.common import Figure, run_benchmark

N, D, K = 20_000, 1_024, 64


def points(seed=0):
    """Rows around K weak centres, so that Lloyd's algorithm needs about a dozen passes."""
    rng = np.random.default_rng(seed)
    centers = 0.3 * rng.standard_normal((K, D), dtype=np.float32)
    return centers[rng.integers(0, K, N)] + rng.standard_normal((N, D), dtype=np.float32)


def measure(args):
    import sklearn
    from sklearn.cluster import KMeans

    import sae

    x = points()
    start = x[:K].copy()
    reference = KMeans(K, init=start, n_init=1, max_iter=100, algorithm="lloyd")
    calls = {"ours": lambda: sae.kmeans(x, K, init=start), "peer": lambda: reference.fit(x)}
    times, results = {name: [] for name in calls}, {}
    for _ in range(args.repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            results[name] = call()
            times[name].append(time.perf_counter() - begin)
    first, *ours = times["ours"]
    peer = min(times["peer"]) if args.peers else None
    inertia, expected = results["ours"].inertia, float(results["peer"].inertia_)
    same = float(np.mean(results["ours"].labels == results["peer"].labels_))
    print(f"inertia {inertia:.6g}, scikit-learn {expected:.6g}; equal labels {same:.4%}; {reference.n_iter_} passes", file=sys.stderr)
    shape = f"{N} points, {D} features, k {K}, {reference.n_iter_} passes"
    yield Figure("kmeans", min(ours), "s", f"scikit-learn {sklearn.__version__}", peer, max(0.0, first - min(ours)), shape, better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
