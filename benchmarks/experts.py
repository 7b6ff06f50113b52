"""The product of rows and their experts' matrices: our tiles beside `jax.lax.ragged_dot`, for which XLA multiplies every row by every matrix.

    python -m benchmarks.experts [--record]

2,048 rows of 256, 8 experts of 512 units, fp32, rows spread unevenly; forward, and with the gradient by rows and matrices. The two take turns.
"""

import argparse
from collections.abc import Iterable

from benchmarks.common import Figure, run_benchmark, timed_in_turns

ROWS, WIDTH, UNITS, EXPERTS = 2048, 256, 512, 8


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Milliseconds of each, the best of the repeats."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from models.experts import grouped_matmul

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((ROWS, WIDTH), (EXPERTS, WIDTH, UNITS)))
    sizes = jnp.asarray(rng.multinomial(ROWS, rng.dirichlet(np.ones(EXPERTS))), jnp.int32)
    products = {"tiles": lambda x, w: grouped_matmul(x, w, sizes), "ragged_dot": lambda x, w: jax.lax.ragged_dot(x, w, sizes)}
    shape = f"{ROWS} rows of {WIDTH}, {EXPERTS} experts of {UNITS}, fp32"
    for name, with_grad in (("experts_forward", False), ("experts_gradient", True)):
        calls = {}
        for kind, product in products.items():
            total = lambda x, w, product=product: jnp.sum(jnp.sin(product(x, w)))  # noqa: E731
            program = jax.jit(jax.grad(total, argnums=(0, 1)) if with_grad else product)
            calls[kind] = lambda program=program: program(x, w)
        found = timed_in_turns(calls, repeats=args.repeats)
        ours, theirs = (1e3 * min(found[kind][1]) for kind in ("tiles", "ragged_dot"))
        yield Figure(name, ours, "ms", "jax.lax.ragged_dot", theirs, found["tiles"][0], shape, better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
