"""Token log-probabilities of a linear head without the full logits in memory.

At a vocabulary of 152k the fp32 logits of 8 x 512 tokens are 2.5 GB, and a plain log-softmax with its gradient holds several such
arrays. Here the head runs over chunks of positions inside a `lax.scan` whose body is rematerialised, so one chunk of logits lives at a
time, forwards and backwards.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Elements of one fp32 chunk of logits when the caller names no chunk: 2**25 x 4 bytes = 128 MiB.
CHUNK_ELEMENTS = 2**25


def default_chunk(vocab_size: int) -> int:
    """Tokens a chunk so that a chunk's fp32 logits take at most 128 MiB (at least one token)."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


def token_logprobs(
    hidden_BTD: Float[Array, "batch seq d_model"],
    unembed: Float[Array, "d_model vocab"] | Callable[[Float[Array, "... d_model"]], Float[Array, "... vocab"]],
    targets_BT: Int[Array, "batch seq"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool | str = False,
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"] | None]:
    """Log-probability (nats, fp32) of each target under softmax(logits / temperature), over the full vocabulary.

    hidden_BTD: the state that predicts targets_BT at the same index (the caller shifts). unembed: from hidden states to fp32 logits, the
    sampler's own function (`models.head(cfg, params)`, with its bias and soft-cap); or a plain matrix, any float dtype, whose product
    is accumulated in fp32. chunk: tokens (batch x positions) a chunk; None picks one by `default_chunk`. The split is along
    the sequence, so a batch axis sharded over devices stays sharded. with_entropy: also return the entropy (nats) of each predictive
    distribution; True is for a metric, through which no gradient flows, "gradient" for a term of a loss.
    Raises ValueError for a temperature that is not above zero or a chunk below one.
    """
    if not temperature > 0:
        raise ValueError(f"token_logprobs: temperature must be above 0, got {temperature}")
    batch, seq, d_model = hidden_BTD.shape
    logits_of = unembed if callable(unembed) else lambda hidden: jnp.einsum("BCD,DV->BCV", hidden, unembed, preferred_element_type=jnp.float32)
    chunk = default_chunk(jax.eval_shape(logits_of, hidden_BTD).shape[-1]) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"token_logprobs: chunk must be at least 1 token, got {chunk}")
    width = max(1, min(seq, chunk // max(batch, 1)))

    def head(hidden_BCD, targets_BC):
        return _gather_logprobs(logits_of(hidden_BCD) / temperature, targets_BC, with_entropy)

    if width == seq:  # one chunk: its logits are kept for the backward pass, which is cheaper than a second product
        logps_BT, entropy_BT = head(hidden_BTD, targets_BT)
        return logps_BT, entropy_BT if with_entropy else None

    count = -(-seq // width)
    pad = count * width - seq
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, pad)))
    chunks = (
        hidden_BTD.reshape(batch, count, width, d_model).swapaxes(0, 1),
        targets_BT.reshape(batch, count, width).swapaxes(0, 1),
    )
    body = jax.checkpoint(head, prevent_cse=False)
    _, outputs = jax.lax.scan(lambda carry, xs: (carry, body(*xs)), None, chunks)
    logps_BT, entropy_BT = (x.swapaxes(0, 1).reshape(batch, count * width)[:, :seq] for x in outputs)
    return logps_BT, entropy_BT if with_entropy else None


def _gather_logprobs(logits_BCV, targets_BC, with_entropy):
    """(log-probability, entropy or zeros), each [B, C]. The target's logit is picked by comparison, not by a gather: its gradient is
    then elementwise (no scatter) and partitions over a vocabulary sharded between devices."""
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    hit_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
    logps_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1) - lse_BC
    if not with_entropy:
        return logps_BC, jnp.zeros_like(logps_BC)
    lse = lse_BC
    if with_entropy != "gradient":
        logits_BCV, lse = jax.lax.stop_gradient((logits_BCV, lse))
    expected_BC = jnp.sum(jnp.exp(logits_BCV - lse[..., None]) * logits_BCV, axis=-1)
    return logps_BC, lse - expected_BC
