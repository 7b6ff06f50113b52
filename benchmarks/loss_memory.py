"""Memory of the GRPO loss at a large vocabulary, and the time that it costs to save it.

    python -m benchmarks.loss_memory [--record]

8 x 512 completion tokens, width 896, Qwen2's vocabulary of 151,936, fp32, gradients of the hidden states and of the unembedding. The
temporaries of value and gradient are what XLA's memory analysis of the compiled program says, arguments and results not counted (no array
is made). The goal is under 2 GiB; the "peer" is the plain log-softmax over the full logits of the same program.

The chunks' logits are computed again in the backward pass: one product more where there are three. `loss_remat` times that on 512 tokens (by
one chunk, whose logits are kept), and `loss_remat_step_SIZE` says what it adds to a training step of Qwen2.5 of that size, all else equal: the
head's share of the step's products, times what was measured. Above 15% the loss would need a gradient of its own.
"""

import argparse
import time
from collections.abc import Iterable

from benchmarks.common import Figure, median, run_benchmark, timed_in_turns

BATCH, SEQ, WIDTH, VOCAB = 8, 512, 896, 151_936
TIMED, CHUNK = 512, 128  # tokens
QWEN = {"0.5b": (896, 494e6), "1.5b": (1536, 1544e6), "7b": (3584, 7071e6)}  # width and parameters whose products a token goes through


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


def remat(args: argparse.Namespace) -> Iterable[Figure]:
    """Seconds of value and gradient in chunks, against one chunk, and the share of a whole step that the difference is."""
    import jax

    from jaxrl_llm.losses import token_logprobs

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, TIMED, WIDTH))
    unembed = jax.random.normal(keys[1], (WIDTH, VOCAB)) / WIDTH**0.5
    targets = jax.random.randint(keys[2], (1, TIMED), 0, VOCAB)

    def step_of(chunk):
        return jax.jit(jax.value_and_grad(lambda h, w: token_logprobs(h, w, targets, chunk=chunk)[0].mean(), argnums=(0, 1)))

    steps = {name: step_of(chunk) for name, chunk in (("chunks", CHUNK), ("one", TIMED))}
    found = timed_in_turns({name: lambda step=step: step(hidden, unembed) for name, step in steps.items()}, repeats=args.repeats)
    (compile_s, chunks), (_, one) = ((of[0], median(of[1])) for of in (found["chunks"], found["one"]))
    shape = f"{TIMED} tokens, chunks of {CHUNK}, width {WIDTH}, vocabulary {VOCAB}, fp32"
    yield Figure("loss_remat", chunks, "s", "logits kept", one, compile_s, shape, better="lower")
    for size, (width, parameters) in QWEN.items():
        added = 100 * (chunks / one - 1) * width * VOCAB / parameters
        yield Figure(f"loss_remat_step_{size}", added, "%", shape=f"{parameters / 1e9:.2f} B parameters in products; goal at most 15 %")


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """GiB of temporaries, chunked against plain; then the time of it."""
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
    yield from remat(args)


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
