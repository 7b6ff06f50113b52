"""Training an SAE: activations a second, one full update (forward, backward, clipping, Adam, decoder norms) a batch.

    python -m benchmarks.sae_train [--architecture=topk] [--d_sae=6144] [--no-peers] [--record]

The peer is SAELens's trainer step of the same architecture on the same shape. Both count the best of the repeats, the peer's taken before and after
ours, since a machine that others use too slows both by different amounts at different times.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from benchmarks.common import Figure, peer_value, run_benchmark, run_peer, timed

SHAPE = {"d_in": 768, "d_sae": 6144, "k": 32, "batch": 4096}
PEER = "SAELens 6.54.0"


def best_peer(mode: str, architecture: str, args: argparse.Namespace, shape: dict[str, int] = SHAPE) -> Iterator[float | None]:
    """The larger of two runs of the peer, one before and one after ours; a generator to be advanced twice."""
    values = []
    for _ in range(2):
        result = run_peer("saelens", "saelens_sae", [mode, architecture, *shape.values(), args.repeats]) if args.peers else None
        values.append(peer_value(result))
        found = [v for v in values if v]
        yield max(found) if found else None


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    """Activations a second of our step and the peer's, for each architecture."""
    sizes = SHAPE | {"d_sae": args.d_sae}
    for architecture in args.architecture.split(","):
        yield of_architecture(architecture, sizes, args)


def of_architecture(architecture: str, sizes: dict[str, int], args: argparse.Namespace) -> Figure:
    """The figure of one architecture."""
    import jax

    import sae
    from sae.architectures import ARCHITECTURES
    from sae.step import init_state, start, step_for
    from sae.train_config import numbers_at

    rows = np.random.default_rng(0).standard_normal((sizes["batch"], sizes["d_in"]), dtype=np.float32)
    k = sizes["k"] if ARCHITECTURES[architecture].needs_k else None
    cfg = sae.SAEConfig(architecture=architecture, d_in=sizes["d_in"], d_sae=sizes["d_sae"], k=k)
    train = sae.SAETrainConfig(method=args.method, sparsity_coefficient=0.0 if k else 1e-3, aux_coefficient=1 / 32 if k else 0.0)
    d, scale = start(cfg, train, rows, jax.random.key(0))
    state, step, numbers = init_state(d), step_for(d.cfg, train), numbers_at(0, d.cfg.d_sae, train, scale)

    def update():
        nonlocal state
        state, metrics = step(state, jax.numpy.asarray(rows), numbers)
        return state, metrics

    peer = best_peer("train", architecture, args, sizes)
    next(peer)
    compile_s, seconds = timed(update, repeats=args.repeats)
    own = sizes if k else {name: value for name, value in sizes.items() if name != "k"}
    shape = ", ".join(f"{name} {value}" for name, value in own.items()) + ("; goal 5 x" if architecture == "topk" else "")
    rate = sizes["batch"] / min(seconds)
    name = "sae_train" if architecture == "topk" else f"sae_train_{architecture}"
    return Figure(name, rate, "activations/s", PEER, next(peer), compile_s, shape)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--architecture", default="topk,batchtopk,jumprelu", help="which, with commas")
    parser.add_argument("--d_sae", type=int, default=SHAPE["d_sae"], help="latents")
    parser.add_argument("--method", default="auto", help="products of the step: auto, dense or sparse")


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
