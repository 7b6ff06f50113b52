"""Encoding with a TopK SAE: activations a second.

    python -m benchmarks.sae_encode [--no-peers] [--record]

`sae_encode` gives dense latents, as the peer (SAELens's TopKSAE.encode) does; `sae_encode_topk` the k values and indices;
`sae_encode_jumprelu` is that of JumpReLU (peer: JumpReLUSAE.encode).
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
    peer = best_peer("encode", "topk", args)
    next(peer)
    dense = timed(lambda: sae.encode(d, rows), repeats=args.repeats)
    sparse = timed(lambda: sae.encode_topk(d, rows), repeats=args.repeats)
    best = next(peer)
    jump = sae.SAEConfig(architecture="jumprelu", d_in=SHAPE["d_in"], d_sae=SHAPE["d_sae"])
    d_jump = sae.init(jump, jax.random.key(0))
    d_jump = d_jump.replace(params=d_jump.params | {"threshold": jax.numpy.full(SHAPE["d_sae"], 0.01)})
    peer_jump = best_peer("encode", "jumprelu", args)
    next(peer_jump)
    compile_s, seconds = timed(lambda: sae.encode(d_jump, rows), repeats=args.repeats)
    said = "; also what a BatchTopK SAE is once trained"
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items() if name != "k") + said
    yield Figure("sae_encode_jumprelu", SHAPE["batch"] / min(seconds), "activations/s", PEER, next(peer_jump), compile_s, shape)
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items()) + "; goal 1.8 x"
    for name, (compile_s, seconds) in {"sae_encode": dense, "sae_encode_topk": sparse}.items():
        yield Figure(name, SHAPE["batch"] / min(seconds), "activations/s", PEER, best, compile_s, shape)


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
