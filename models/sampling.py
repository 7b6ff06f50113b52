"""From logits to a sampled token and its log-probability, with two uniform numbers a row.

A draw is an inverse-CDF draw in two levels (a block of the vocabulary by its total mass, then a token inside it), each
with its own uniform number: exact up to fp32 rounding for any vocabulary, and far cheaper than one Gumbel number a
logit. The log-probability is always that of the full vocabulary at the sampling temperature: top-k and top-p change
what is drawn, never what is reported. Letters: B rows, V vocabulary, C blocks of the vocabulary, W tokens a block.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128


def keep_top_k(logits_BV: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Logits outside the k largest of each row become -inf; all logits equal to the k-th stay."""
    kth = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV < kth, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: Float[Array, "B V"], p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Nucleus filter (Holtzman et al. 2020): the smallest set of most likely tokens whose mass reaches p stays.

    Expects temperature-scaled logits. The most likely token always stays; all tokens tied with the last one stay.
    """
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    n_kept = jnp.maximum(jnp.sum(mass_before < p, axis=-1, keepdims=True), 1)
    last = jnp.take_along_axis(ordered, n_kept - 1, axis=-1)
    return jnp.where(logits_BV < last, -jnp.inf, logits_BV)


def _first_above(mass_BW: Array, u_B: Array) -> Array:
    """For each row, the first index whose cumulative mass exceeds u * total; never one of zero mass."""
    n = mass_BW.shape[-1]
    # A product with a triangle of ones: a cumulative sum that is one matrix product on every backend.
    upto = jnp.dot(mass_BW, jnp.triu(jnp.ones((n, n), mass_BW.dtype)), precision=jax.lax.Precision.HIGHEST)
    above = (upto > u_B[:, None] * upto[:, -1:]) & (mass_BW > 0)
    # Rounding could leave a row with no candidate; its most likely index is then as good as any.
    return jnp.where(above.any(-1), jnp.argmax(above, -1), jnp.argmax(mass_BW, -1)).astype(jnp.int32)


def draw(logits_BV: Float[Array, "B V"], uniforms_B2: Float[Array, "B 2"]) -> Int[Array, " B"]:
    """One index a row with probability softmax(logits); -inf logits are never drawn. uniforms in [0, 1)."""
    B, V = logits_BV.shape
    n_blocks = math.ceil(V / BLOCK)
    padded = jnp.pad(logits_BV, ((0, 0), (0, n_blocks * BLOCK - V)), constant_values=-jnp.inf)
    blocks_BCW = padded.reshape(B, n_blocks, BLOCK)
    top = jnp.max(logits_BV, axis=-1)[:, None]
    mass_BC = jnp.sum(jnp.exp(blocks_BCW - top[..., None]), axis=-1)
    block = _first_above(mass_BC, uniforms_B2[:, 0])
    inside_BW = jnp.take_along_axis(blocks_BCW, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first_above(jnp.exp(inside_BW - top), uniforms_B2[:, 1])


def sample(
    logits_BV: Float[Array, "B V"],
    uniforms_B2: Float[Array, "B 2"],
    *,
    temperature: Float[Array, ""] | float,
    greedy: bool = False,
    top_k: int = 0,
    top_p: Float[Array, ""] | float | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Sampled tokens and their log-probabilities under log_softmax(logits / temperature) over the full vocabulary.

    logits fp32. greedy takes the argmax and reports its log-probability at temperature 1. top_k = 0 and top_p = None
    filter nothing; both together keep what top-p keeps of the top k (renormalised), as transformers does.
    """
    if greedy:
        scaled, tokens = logits_BV, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        scaled = logits_BV / temperature
        kept = keep_top_k(scaled, top_k) if 0 < top_k < scaled.shape[-1] else scaled
        kept = kept if top_p is None else keep_top_p(kept, top_p)
        tokens = draw(kept, uniforms_B2)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)
