"""Exact top-k along the last axis, and top-k of a matrix product a block of rows at a time.

`lax.top_k` is the definition. XLA runs it on one core on CPUs, element by element, so there `grouped_top_k` is used:
vector operations only, checked as it goes, with `lax.top_k` as the way out. Letters: n rows, F entries, K kept,
G groups, S entries a group, C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

DEPTH = 4  # of the K kept entries, so many may fall into one group before `lax.top_k` must be asked
GROUPS_PER_KEPT = 6  # groups for each kept entry, which makes more than DEPTH in one group rare
RESCUED = 8  # rows of a block for which `lax.top_k` is asked alone; with more it does the whole block
CPU_BLOCK_BYTES = 12 << 20  # of pre-activations at a time: they stay in the cache, and no pages are asked of the system
BLOCK_BYTES = 256 << 20  # the same on accelerators

TopK = tuple[Float[Array, "... K"], Int[Array, "... K"]]


def top_k(x: Float[Array, "... F"], k: int) -> TopK:
    """The k largest entries of each row, largest first, and their int32 positions; the first of equal entries."""
    values, indices = lax.platform_dependent(
        x, cpu=functools.partial(grouped_top_k, k=k), default=lambda x: tuple(lax.top_k(x, k))
    )
    return values, indices


def sharded_top_k(x: Float[Array, "... F"], k: int, shards: int) -> TopK:
    """`lax.top_k` when the last axis is spread over `shards` devices: each finds its own k, and only those travel."""
    if shards == 1 or x.shape[-1] // shards < k:
        return lax.top_k(x, k)
    width = x.shape[-1] // shards
    values, indices = lax.top_k(x.reshape(*x.shape[:-1], shards, width), k)
    indices = indices + width * jnp.arange(shards, dtype=jnp.int32)[:, None]
    values, places = lax.top_k(values.reshape(*x.shape[:-1], shards * k), k)
    return values, jnp.take_along_axis(indices.reshape(*x.shape[:-1], shards * k), places, axis=-1)


def grouped_top_k(x: Float[Array, "... F"], k: int) -> TopK:
    """`lax.top_k` by groups.

    The k largest entries lie in the k groups with the largest maxima. Of each such group the DEPTH largest entries are
    candidates, and the k largest candidates are the answer, unless a group may hold more than DEPTH of them, or
    entries are equal or NaN: of such rows `lax.top_k` decides.
    """
    width = x.shape[-1]
    size = 1 << max(width // (GROUPS_PER_KEPT * k), 1).bit_length() - 1
    if size <= DEPTH or width % size or k > 128:
        values, indices = lax.top_k(x, k)
        return values, indices
    rows = x.reshape(-1, width)
    fixed = lax.stop_gradient(rows)
    picked, sure = grouped_positions(fixed, k, size)
    few = min(RESCUED, len(rows))

    def rescue():
        (at,) = jnp.nonzero(~sure, size=few, fill_value=len(rows))
        return picked.at[at].set(lax.top_k(fixed.at[at].get(mode="fill", fill_value=0.0), k)[1], mode="drop")

    unsure = jnp.sum(~sure)
    which = jnp.where(unsure == 0, 0, jnp.where(unsure <= few, 1, 2))
    indices = lax.switch(which, [lambda: picked, rescue, lambda: lax.top_k(fixed, k)[1]])
    values = jnp.take_along_axis(rows, indices, axis=1)
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)


def grouped_positions(x: Float[Array, "n F"], k: int, size: int) -> tuple[Int[Array, "n K"], Bool[Array, "n"]]:
    """(positions of the k largest entries of each row, whether they are certain)."""
    n, width = x.shape
    x = x.reshape(n, width // size, size)
    maxima = x.max(axis=2)
    group_rank = ranks(maxima)
    group_nK = by_rank(group_rank, jnp.arange(width // size, dtype=jnp.int32)[None], k)
    members_nSK = jnp.take_along_axis(x, group_nK[:, :, None], axis=1).transpose(0, 2, 1)
    member_rank = ranks(members_nSK)
    values = by_rank(member_rank, members_nSK, DEPTH + 1)
    offsets = by_rank(member_rank, jnp.arange(size, dtype=jnp.int32)[None, :, None], DEPTH)
    candidates = values[:, :DEPTH].reshape(n, DEPTH * k)
    rank = ranks(candidates)
    least = jnp.min(jnp.where(rank < k, candidates, jnp.inf), axis=1)
    enough = jnp.max(values[:, DEPTH], axis=1) < least
    distinct = held_once(group_rank, k) & held_once(member_rank, DEPTH + 1) & held_once(rank, k)
    positions = (group_nK[:, None] * size + offsets).reshape(n, DEPTH * k)
    return by_rank(rank, positions, k), enough & distinct & jnp.all(x == x, axis=(1, 2))  # a maximum may pass over NaN on CPUs


def cut_for(x: Float[Array, "..."], n: int) -> Float[Array, ""]:
    """A value t with n entries of x at or above it, none of which may be negative: at most the n-th largest and above the next.

    More than n where entries equal the n-th largest; 0, so all of them, where n is over their number. Bits of non-negative floats are ordered
    as the floats are, so bisection on them needs at most 31 counts of x, in any layout: where x is spread over devices, only counts travel.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

    def unsure(state):
        low, high, found = state
        return (high - low > 1) & (found != n)

    def halve(state):
        low, high, _ = state
        middle = low + (high - low) // 2
        found = jnp.sum(bits >= middle, dtype=jnp.int32)
        return jnp.where(found >= n, middle, low), jnp.where(found >= n, high, middle), found

    low, _, _ = lax.while_loop(unsure, halve, (jnp.int32(0), jnp.max(bits) + 1, jnp.int32(-1)))
    return lax.bitcast_convert_type(low, jnp.float32)


def ranks(x: Float[Array, "n C ..."]) -> Int[Array, "n C ..."]:
    """How many entries along axis 1 are larger than each entry."""

    def count(j, total):
        return total + (lax.dynamic_slice_in_dim(x, j, 1, axis=1) > x).astype(jnp.int32)

    return lax.fori_loop(0, x.shape[1], count, jnp.zeros(x.shape, jnp.int32), unroll=16)


def held_once(rank: Int[Array, "n C ..."], k: int) -> Bool[Array, "n"]:
    """Whether in a row ranks 0 to k - 1 are all held by just one entry along axis 1. Equal entries share the lower rank, so they
    make the kept ones more than k or the sum of their ranks smaller."""
    kept = rank < k
    number, total = jnp.sum(kept, axis=1), jnp.sum(jnp.where(kept, rank, 0), axis=1)
    once = (number == k) & (total == k * (k - 1) // 2)
    return once.reshape(len(rank), -1).all(axis=1)


def by_rank(rank: Int[Array, "n C ..."], payload: Array, k: int) -> Array:
    """[n, k, ...]: along axis 1, the payload of the entries of rank 0 to k - 1, in that order; 0 where there is none."""
    places = jnp.arange(k, dtype=jnp.int32).reshape(1, k, *[1] * (rank.ndim - 2))
    start = jnp.zeros((rank.shape[0], k, *rank.shape[2:]), payload.dtype)

    def add(j, total):
        at, what = (lax.dynamic_slice_in_dim(a, j, 1, axis=1) for a in (rank, payload))
        return total + jnp.where(at == places, what, 0)

    return lax.fori_loop(0, rank.shape[1], add, start, unroll=16)


def in_row_blocks(
    function: Callable[[Array], object], rows: Float[Array, "... D"], bytes_per_row: int, block_bytes: int, apart: bool = False
):
    """function(rows) for a function of independent rows [n, D], computed a block of rows at a time.

    apart: of b blocks (a power of two, so that rows divide as over devices), each takes every b-th row rather than rows that follow each other. Where
    neighbouring rows lie on one device of a mesh, every device then has its part of each block; else each block would be sent to all of them.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    blocks = max(1, -(-flat.shape[0] * bytes_per_row // block_bytes))
    if apart:
        blocks = 1 << (blocks - 1).bit_length()
    height = -(-flat.shape[0] // blocks)
    if blocks == 1:
        result = function(flat)
    else:
        padded = jnp.pad(flat, ((0, blocks * height - flat.shape[0]), (0, 0)))
        if apart:
            padded = padded.reshape(height, blocks, -1)
            found = lax.map(lambda block: function(lax.dynamic_index_in_dim(padded, block, 1, keepdims=False)), jnp.arange(blocks))
            found = jax.tree.map(lambda a: a.swapaxes(0, 1), found)
        else:
            found = lax.map(function, padded.reshape(blocks, height, -1))
        result = jax.tree.map(lambda a: a.reshape(blocks * height, -1)[: flat.shape[0]], found)
    return jax.tree.map(lambda a: a.reshape(*rows.shape[:-1], a.shape[-1]), result)


def by_platform(function: Callable[[Array, int], object], rows: Float[Array, "... D"], bytes_per_row: int):
    """`in_row_blocks` with the block size that suits the platform the program is compiled for."""
    blocked = functools.partial(in_row_blocks, function, bytes_per_row=bytes_per_row)
    return lax.platform_dependent(
        rows,
        cpu=functools.partial(blocked, block_bytes=CPU_BLOCK_BYTES),
        default=functools.partial(blocked, block_bytes=BLOCK_BYTES, apart=True),
    )
