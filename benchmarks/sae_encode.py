"""Encoding with a TopK SAE: activations a second.

    python -m benchmarks.sae_encode [--no-peers] [--record]

`sae_encode` gives dense latents, as the peer (SAELens's TopKSAE.encode) does; `sae_encode_topk` the k values and indices.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from benchmarks.common import Figure, run_benchmark, timed
from benchmarks.sae_train import PEER, SHAPE, best_peer


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    """Activations a second of both of our encoders and the peer's."""
    import jax

    import sae

    cfg = sae.SAEConfig(d_in=SHAPE["d_in"], d_sae=SHAPE["d_sae"], k=SHAPE["k"])
    d = sae.init(cfg, jax.random.key(0))
    rows = jax.numpy.asarray(np.random.default_rng(0).standard_normal((SHAPE["batch"], SHAPE["d_in"]), dtype=np.float32))
    peer = best_peer("encode", args)
    next(peer)
    dense = timed(lambda: sae.encode(d, rows), repeats=args.repeats)
    sparse = timed(lambda: sae.encode_topk(d, rows), repeats=args.repeats)
    best = next(peer)
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items()) + "; goal 1.5 x"
    for name, (compile_s, seconds) in {"sae_encode": dense, "sae_encode_topk": sparse}.items():
        yield Figure(name, SHAPE["batch"] / min(seconds), "activations/s", PEER, best, compile_s, shape)


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
