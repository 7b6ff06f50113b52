"""Memory of the GRPO loss at a large vocabulary: temporaries of value and gradient, by ahead-of-time compilation (no array is made).

    python -m benchmarks.loss_memory [--record]

8 x 512 completion tokens, width 896, Qwen2's vocabulary of 151,936, fp32, gradients of the hidden states and of the unembedding. The
temporaries are what XLA's memory analysis of the compiled program says, arguments and results not counted. The goal is under 2 GiB;
the "peer" is the plain log-softmax over the full logits of the same program.
"""

import argparse
import time
from collections.abc import Iterable

from benchmarks.common import Figure, run_benchmark

BATCH, SEQ, WIDTH, VOCAB = 8, 512, 896, 151_936


def temporaries(logprobs) -> tuple[float, float]:
    """(GiB of temporaries, compile seconds) of value and gradient of the clipped objective over `logprobs(hidden, unembed, targets)`."""
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.losses import grpo_loss

    def loss(hidden, unembed, targets, advantages):
        return grpo_loss(logprobs(hidden, unembed, targets), None, advantages, jnp.ones((BATCH, SEQ), bool))[0]

    struct = jax.ShapeDtypeStruct
    shapes = (
        struct((BATCH, SEQ, WIDTH), jnp.float32),
        struct((WIDTH, VOCAB), jnp.float32),
        struct((BATCH, SEQ), jnp.int32),
        struct((BATCH,), jnp.float32),
    )
    begin = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**30, time.perf_counter() - begin


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """One figure: GiB of temporaries, chunked against plain."""
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.losses import token_logprobs

    def plain(hidden, unembed, targets):
        logps = jax.nn.log_softmax(jnp.einsum("BTD,DV->BTV", hidden, unembed))
        return jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]

    ours, compile_s = temporaries(lambda *arrays: token_logprobs(*arrays)[0])
    theirs, _ = temporaries(plain) if args.peers else (None, None)
    shape = f"{BATCH} x {SEQ} tokens, width {WIDTH}, vocabulary {VOCAB}, fp32; goal under 2 GiB"
    yield Figure("loss_memory", ours, "GiB", "full log-softmax", theirs, compile_s, shape, better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
