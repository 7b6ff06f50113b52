"""k-means beside scikit-learn's, from the same initial centres: seconds of a whole fit, and both inertias.

    python -m benchmarks.kmeans [--record]

The two take turns, and each counts its best time. Both run Lloyd's algorithm with at most 100 passes and a tolerance of 1e-4.
scikit-learn is in our own environment, so it is measured with --no-peers too, for the inertia.

Then one Lloyd pass (assignment and the next centres) over sparse rows as an SAE gives them, too many to be made dense together, in a
process of its own for the peak of its memory; scikit-learn's pass is what a second one adds to a fit. --sparse-rows
1000000 is the size that must fit in memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np

from benchmarks.common import ROOT, Figure, progress, run_benchmark, timed_in_turns

N, D, K = 20_000, 1_024, 64
SPARSE_N, SPARSE_D, ENTRIES = 200_000, 10_000, 32


def points(seed=0):
    """Rows around K weak centres, so that Lloyd's algorithm needs about a dozen passes."""
    rng = np.random.default_rng(seed)
    centers = 0.3 * rng.standard_normal((K, D), dtype=np.float32)
    return centers[rng.integers(0, K, N)] + rng.standard_normal((N, D), dtype=np.float32)


def sparse_points(n: int):
    """CSR rows of at most ENTRIES of SPARSE_D features, each around one of K runs of 400 features."""
    import scipy.sparse

    rng = np.random.default_rng(0)
    columns = (150 * rng.integers(0, K, n)[:, None] + rng.integers(0, 400, (n, ENTRIES))) % SPARSE_D
    values, ends = rng.random(n * ENTRIES, dtype=np.float32), np.arange(0, n * ENTRIES + 1, ENTRIES)
    x = scipy.sparse.csr_matrix((values, columns.ravel(), ends), shape=(n, SPARSE_D))
    x.sum_duplicates()
    return x


def sparse_pass(n: int) -> dict[str, float]:
    """The child's part: seconds to take the points up, of our pass, of scikit-learn's, and the peak of memory before the latter (GiB)."""
    import jax
    from sklearn.cluster import KMeans

    from sae.kmeans import next_centers
    from sae.sparse_points import SparsePoints

    x = sparse_points(n)
    start = x[:K].toarray()

    def one_pass():
        found = points.assign(start, None)
        jax.block_until_ready(next_centers(found.sums, found.counts, start, False))

    def seconds(call):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    begin = time.perf_counter()
    points = SparsePoints(x, chunk=None, spherical=False, stream=None, mesh=None)
    result = {"read": time.perf_counter() - begin, "first": seconds(one_pass), "ours": seconds(one_pass)}
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    fits = [KMeans(K, init=start, n_init=1, max_iter=passes, tol=0.0, algorithm="lloyd") for passes in (1, 2)]
    one, two = (seconds(lambda fit=fit: fit.fit(x)) for fit in fits)
    return result | {"peer": two - one}


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Seconds of a fit, then the inertias; seconds and memory of a pass over sparse rows."""
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

    progress(f"a pass over {args.sparse_rows} sparse rows")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kmeans", "--one", str(args.sparse_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit("the pass over sparse rows failed")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    value, compile_s = found["peer"] if args.peers else None, max(0.0, found["first"] - found["ours"])
    shape = f"{args.sparse_rows} x {SPARSE_D}, {ENTRIES} entries a row, k {K}"
    size = "" if args.sparse_rows == SPARSE_N else f"_{args.sparse_rows}"
    read = f"{shape}; reading them first {found['read']:.1f} s"
    yield Figure(f"kmeans_sparse_pass{size}", found["ours"], "s", peer, value, compile_s, read, "lower")
    dense = 4 * args.sparse_rows * SPARSE_D / 2**30
    resident = f"{shape}; resident, all dense they would be {dense:.1f} GiB"
    yield Figure(f"kmeans_sparse_peak{size}", found["peak"], "GiB", shape=resident, better="lower")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--sparse-rows", type=int, default=SPARSE_N, help="rows of the pass over sparse points")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(sparse_pass(int(sys.argv[sys.argv.index("--one") + 1]))))
    else:
        run_benchmark(measure, __doc__, add_arguments)
