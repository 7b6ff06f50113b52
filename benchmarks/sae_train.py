"""Training a TopK SAE: activations a second, one full update (forward, backward, clipping, Adam, decoder norms) a batch.

    python -m benchmarks.sae_train [--no-peers] [--record]

The peer is SAELens's trainer step on the same shape. Both count the best of the repeats, the peer's taken before and after
ours, since a machine that others use too slows both by different amounts at different times.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from benchmarks.common import Figure, peer_value, run_benchmark, run_peer, timed

SHAPE = {"d_in": 768, "d_sae": 6144, "k": 32, "batch": 4096}
PEER = "SAELens 6.54.0"


def best_peer(mode: str, args: argparse.Namespace) -> Iterator[float | None]:
    """The larger of two runs of the peer, one before and one after ours; a generator to be advanced twice."""
    values = []
    for _ in range(2):
        result = run_peer("saelens", "saelens_sae", [mode, *SHAPE.values(), args.repeats]) if args.peers else None
        values.append(peer_value(result))
        found = [v for v in values if v]
        yield max(found) if found else None


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    """Activations a second of our step and the peer's."""
    import jax

    import sae
    from sae.step import init_state, start, step_for
    from sae.train_config import numbers_at

    rows = np.random.default_rng(0).standard_normal((SHAPE["batch"], SHAPE["d_in"]), dtype=np.float32)
    cfg = sae.SAEConfig(d_in=SHAPE["d_in"], d_sae=SHAPE["d_sae"], k=SHAPE["k"])
    train = sae.SAETrainConfig(method=args.method)
    d, scale = start(cfg, train, rows, jax.random.key(0))
    state, step, numbers = init_state(d), step_for(d.cfg, train), numbers_at(0, d.cfg.d_sae, train, scale)

    def update():
        nonlocal state
        state, metrics = step(state, jax.numpy.asarray(rows), numbers)
        return state, metrics

    peer = best_peer("train", args)
    next(peer)
    compile_s, seconds = timed(update, repeats=args.repeats)
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items()) + "; goal 4 x"
    rate = SHAPE["batch"] / min(seconds)
    yield Figure("sae_train", rate, "activations/s", PEER, next(peer), compile_s, shape)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--method", default="auto", help="products of the step: auto, dense or sparse")


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
