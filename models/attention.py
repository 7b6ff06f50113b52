"""Attention as plain functions: masks, scores, softmax over several segments of keys, and the same in chunks of queries.

Letters as in `models.layers`: B batch, T query tokens, S key slots, N query heads, K key/value heads, R = N / K, H head_dim,
P distinct prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NEGATIVE = -1e30  # finite, so that a row with nothing to attend to gives no NaN


def batched_matmul(a: Float[Array, "... M C"], b: Float[Array, "... C N"]) -> Float[Array, "... M N"]:
    """Matmul of arrays that share their leading dimensions, with fp32 accumulation and result.

    The operands lie as the product reads them: XLA's CPU backend takes an einsum that leaves it to transpose them three
    to seven times longer. It also counts on a library for products of narrower types, then finds that the library takes
    no batched product whose first operand lies transposed, and fails at run time. So there, and only there, they are
    widened.
    """
    return _accumulated(a, b) if a.dtype == b.dtype == jnp.float32 else _narrow_matmul(a, b)


def _accumulated(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@jax.custom_jvp
def _narrow_matmul(a, b):
    return lax.platform_dependent(
        a, b, cpu=lambda a, b: _accumulated(a.astype(jnp.float32), b.astype(jnp.float32)), default=_accumulated
    )


@_narrow_matmul.defjvp
def _narrow_matmul_jvp(primals, tangents):
    """The plain product's: its gradient's products have one fp32 operand, which CPUs take, and it keeps a and b as they
    are for them, where differentiating the choice of platform would keep the wide copies too."""
    (a, b), (da, db) = primals, tangents
    return _narrow_matmul(a, b), _accumulated(da, b) + _accumulated(a, db)


def attention_mask(
    q_pos_BT: Int[Array, "B T"], k_pos_BS: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """A query sees filled slots at its own or an earlier position, fewer than `window` positions back."""
    q, k = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    mask = (k >= 0) & (k <= q)
    return mask if window is None else mask & (q - k < window)


def soft_cap(x: Array, cap: float | None) -> Array:
    """x squeezed smoothly into (-cap, cap); unchanged where cap is None. Gemma 2 (2024), after Bello et al. 2016."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_scores(
    q_BTNH: Array, k_PKHS: Array, query_scalar: float | None = None, cap: float | None = None
) -> Float[Array, "B K R T S"]:
    """fp32 scores over the square root of query_scalar (None = H), soft-capped; P may divide B, then rows p*G .. p*G+G-1 read prompt
    p's keys.

    Keys lie [P, K, H, S] and values [P, K, S, H]: as a matrix product reads them, so that sampling, which reads all of
    them for one query, transposes nothing.
    """
    B, T, N, H = q_BTNH.shape
    P, K, _, S = k_PKHS.shape
    q = q_BTNH.reshape(P, B // P, T, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    scores = batched_matmul(q.reshape(P, K, -1, H), k_PKHS).reshape(P, K, B // P, N // K, T, S)
    scores = scores.transpose(0, 2, 1, 3, 4, 5).reshape(B, K, N // K, T, S) * ((H if query_scalar is None else query_scalar) ** -0.5)
    return soft_cap(scores, cap)


def attention_values(probs_BKRTS: Array, v_PKSH: Array) -> Float[Array, "B T N H"]:
    """The probability-weighted values in fp32; P may divide B as in `attention_scores`."""
    B, K, R, T, S = probs_BKRTS.shape
    P, H = v_PKSH.shape[0], v_PKSH.shape[-1]
    probs = probs_BKRTS.reshape(P, B // P, K, R, T, S).transpose(0, 2, 1, 3, 4, 5).astype(v_PKSH.dtype)
    out = batched_matmul(probs.reshape(P, K, -1, S), v_PKSH).reshape(P, K, B // P, R, T, H)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, K * R, H)


Segments = list[tuple[Array, Array, Array]]  # keys, values and mask [B, T, S] of each part of what is attended to
Scores = Callable[[Array, Array], Array]  # `attention_scores`, its options given


def attention(
    q_BTNH: Array, segments: Segments, probs_hook: Callable[[Array], Array] = lambda x: x, scores_of: Scores = attention_scores
) -> Float[Array, "B T N H"]:
    """Softmax attention over all segments together, in fp32; probs_hook sees, and may replace, the probabilities [B, N, T, S]."""
    scores = jnp.concatenate([jnp.where(mask[:, None, None], scores_of(q_BTNH, k), NEGATIVE) for k, _, mask in segments], axis=-1)
    B, K, R, T, S = scores.shape
    probs = probs_hook(jax.nn.softmax(scores, axis=-1).reshape(B, K * R, T, S)).reshape(B, K, R, T, S)
    parts, start = [], 0
    for k, v, _ in segments:
        parts.append(attention_values(probs[..., start : start + k.shape[-1]], v))
        start += k.shape[-1]
    return functools.reduce(jnp.add, parts)


def attention_in_chunks(q_BTNH: Array, segments: Segments, chunk: int, scores_of: Scores = attention_scores) -> Float[Array, "B T N H"]:
    """`attention`, the scores of `chunk` queries in memory at a time, forwards and (computed again) backwards."""
    B, T, N, H = q_BTNH.shape
    count = -(-T // chunk)

    def cut(x):  # [B, T, ...] -> [count, B, chunk, ...]; queries of the padding attend to nothing and are dropped
        x = jnp.pad(x, ((0, 0), (0, count * chunk - T), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    dtype = q_BTNH.dtype
    # In fp32 where the chunks' gradients add up.
    keys_values = [(k.astype(jnp.float32), v.astype(jnp.float32)) for k, v, _ in segments]

    def attend(given):
        q, masks = given
        given = [(k.astype(dtype), v.astype(dtype), mask) for (k, v), mask in zip(keys_values, masks, strict=True)]
        return attention(q, given, scores_of=scores_of)

    out = lax.map(jax.checkpoint(attend, prevent_cse=False), (cut(q_BTNH), [cut(mask) for _, _, mask in segments]))
    return out.swapaxes(0, 1).reshape(B, count * chunk, N, H)[:, :T]
