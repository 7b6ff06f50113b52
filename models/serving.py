"""Decoding for a server: B places, each with a request of its own settings, that come and go while the others go on.

As in `models.refill`, a place keeps its prompt's keys and values, and its own tokens' go to a ring that all places write at the same index.
Here nothing is known beforehand: `admit` puts requests into places between two chunks, `decode` runs a chunk of steps and returns what was
drawn in it. A request gets the tokens that `models.generate` would give it with the same seed, up to rounding, whoever decodes beside it.
Letters: B places, C steps of a chunk, E prompts prefilled at once, W their width, S slots of a prompt, R of the ring, K log-probabilities,
V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig
from models.sampling import draw, keep_top_p
from models.transformer import KV, KVCache, Params, forward, fused, init_cache, unembed, unstacked


class Plan(NamedTuple):
    """What is compiled in. places, prompt_slots, ring_slots: B, S, R; chunk: C; top: K; unroll: a loop over layers rather than a scan."""

    cfg: ModelConfig
    places: int
    prompt_slots: int
    ring_slots: int
    chunk: int
    top: int
    unroll: bool


class Entry(NamedTuple):
    """What a request asks, one a place. ids: of its samples in the random stream. limits: most tokens. temperatures: 0 is greedy.
    top_ks: 0 is no limit. wants_top: whether the likeliest tokens are asked for."""

    last_B: Int[Array, " B"]
    positions_B: Int[Array, " B"]
    limits_B: Int[Array, " B"]
    seeds_B: Int[Array, " B"]
    ids_B: Int[Array, " B"]
    temperatures_B: Float[Array, " B"]
    top_ps_B: Float[Array, " B"]
    top_ks_B: Int[Array, " B"]
    wants_top_B: Bool[Array, " B"]


class Places(NamedTuple):
    """What the places hold. entry.last and entry.positions go on with the tokens."""

    prompt: KV
    ring: KVCache
    entry: Entry
    lengths_B: Int[Array, " B"]
    live_B: Bool[Array, " B"]


class Chunk(NamedTuple):
    """What a chunk drew: tokens where live. logps: of the full vocabulary at temperature 1, as are those of the K likeliest tokens."""

    tokens_CB: Int[Array, "C B"]
    logps_CB: Float[Array, "C B"]
    live_CB: Bool[Array, "C B"]
    stopped_CB: Bool[Array, "C B"]
    top_ids_CBK: Int[Array, "C B K"]
    top_logps_CBK: Float[Array, "C B K"]


@functools.partial(jax.jit, static_argnums=0)
def layers_of(plan: Plan, params: Params) -> Params:
    """The parameters as decoding reads them."""
    return unstacked(params) if plan.unroll else fused(params)


@functools.partial(jax.jit, static_argnums=0)
def empty(plan: Plan) -> Places:
    """Places without a request."""
    B = plan.places
    cache = functools.partial(init_cache, plan.cfg, B, unrolled=plan.unroll)
    prompt, zeros = cache(plan.prompt_slots), jnp.zeros(B, jnp.int32)
    ones = jnp.ones(B, jnp.float32)
    entry = Entry(zeros, zeros, zeros, zeros, zeros, ones, ones, zeros, zeros > 0)
    return Places(KV(prompt.k, prompt.v, prompt.positions), cache(plan.ring_slots), entry, zeros, zeros > 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(plan: Plan, layers: Params, places: Places, tokens_EW, lengths_E, from_B, entry: Entry) -> Places:
    """Prefills prompts (right-padded, all but the last token of each, with which its place begins to decode) and puts them into places.

    from_B: the number of the prompt that a place gets, -1 where it keeps what it has.
    """
    kv = forward(plan.cfg, layers, tokens_EW, lengths=lengths_E, unroll=plan.unroll, return_kv=True).kv
    positions = jnp.where(kv.positions == lengths_E[:, None] - 1, -1, kv.positions)
    new, at, axis = from_B >= 0, jnp.maximum(from_B, 0), 0 if plan.unroll else 1
    pick = lambda given, kept: jnp.where(new.reshape(-1, *(1,) * (kept.ndim - 1)), given, kept)  # noqa: E731

    def copied(slots: int, block, kept):
        pads = [(0, 0)] * block.ndim
        pads[slots] = (0, kept.shape[slots] - block.shape[slots])
        mask = new.reshape(-1, *(1,) * (kept.ndim - axis - 1))
        return jnp.where(mask, jnp.take(jnp.pad(block, pads), at, axis=axis), kept)

    k = jax.tree.map(functools.partial(copied, -1), kv.k, places.prompt.k)
    v = jax.tree.map(functools.partial(copied, -2), kv.v, places.prompt.v)
    wide = jnp.pad(positions, ((0, 0), (0, plan.prompt_slots - positions.shape[1])), constant_values=-1)
    return Places(
        prompt=KV(k, v, pick(wide[at], places.prompt.positions)),
        ring=places.ring._replace(positions=pick(-1, places.ring.positions)),
        entry=jax.tree.map(pick, entry, places.entry),
        lengths_B=pick(0, places.lengths_B),
        live_B=places.live_B | new,
    )


@jax.jit
def release(places: Places, gone_B: Bool[Array, " B"]) -> Places:
    """Ends the requests of some places."""
    return places._replace(live_B=places.live_B & ~gone_B)


def draw_each(logits_BV: Float[Array, "B V"], uniforms_B2: Float[Array, "B 2"], entry: Entry) -> Int[Array, " B"]:
    """A token a row, by the temperature, top-k and top-p of its own: of each row what `models.sampling.sample` draws."""
    greedy = entry.temperatures_B == 0
    scaled = logits_BV / jnp.where(greedy, 1.0, entry.temperatures_B)[:, None]
    filters = ~greedy & ((entry.top_ks_B > 0) | (entry.top_ps_B < 1))

    def filtered(scaled):
        V = scaled.shape[-1]
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        k = jnp.where(entry.top_ks_B > 0, jnp.minimum(entry.top_ks_B, V), V)
        kept = jnp.where(scaled < jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1), -jnp.inf, scaled)
        return jnp.where(entry.top_ps_B[:, None] < 1, keep_top_p(kept, entry.top_ps_B[:, None]), kept)

    kept = lax.cond(filters.any(), filtered, lambda scaled: scaled, scaled)
    best = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn = lax.cond(greedy.all(), lambda _: best, lambda kept: draw(kept, uniforms_B2), kept)
    return jnp.where(greedy, best, drawn)


def _uniforms(entry: Entry, lengths_B: Array) -> Array:
    def one(seed, row, step):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step), (2,))

    return jax.vmap(one)(entry.seeds_B, entry.ids_B, lengths_B)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(plan: Plan, layers: Params, places: Places) -> tuple[Places, Chunk]:
    """C steps of every place that has a request."""
    stops = jnp.asarray(plan.cfg.eos_token_ids or (-1,), jnp.int32)

    def step(places: Places, _):
        entry, live, slot = places.entry, places.live_B, places.ring.next
        out = forward(
            plan.cfg, layers, entry.last_B[:, None], positions=entry.positions_B[:, None], prefix=places.prompt, cache=places.ring,
            unroll=plan.unroll,
        )  # fmt: skip
        logits_BV = unembed(plan.cfg, layers, out.hidden[:, 0])
        tokens = jnp.where(live, draw_each(logits_BV, _uniforms(entry, places.lengths_B), entry), 0)
        norm = jax.nn.logsumexp(logits_BV, axis=-1)
        logps = jnp.take_along_axis(logits_BV, tokens[:, None], axis=-1)[:, 0] - norm
        none = lambda logits: (jnp.zeros((*logits.shape[:1], plan.top), logits.dtype), jnp.zeros((*logits.shape[:1], plan.top), jnp.int32))  # noqa: E731
        tops, top_ids = lax.cond((live & entry.wants_top_B).any(), lambda logits: tuple(lax.top_k(logits, plan.top)), none, logits_BV)
        lengths = places.lengths_B + live
        stopped = live & (tokens[:, None] == stops).any(-1)
        drawn = Chunk(tokens, logps, live, stopped, top_ids, tops - norm[:, None])
        places = places._replace(
            ring=out.cache._replace(next=(slot + 1) % plan.ring_slots),
            entry=entry._replace(last_B=tokens, positions_B=entry.positions_B + live),
            lengths_B=lengths,
            live_B=live & ~stopped & (lengths < entry.limits_B),
        )
        return places, drawn

    return lax.scan(step, places, length=plan.chunk)
