"""The decoder: one pure forward pass for training, sampling, harvesting and editing.

Parameters are a plain dict, the layers' stacked on a leading axis. `models.layers.Block` declares each of them once
(shape, initialiser, logical axes) and computes one layer; the functions below run it over the stack. Letters in
names: B batch, T query tokens, S key slots, D d_model, K key/value heads, H head_dim, V vocabulary, L layers,
P distinct prompts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from models.adapted import base_of
from models.attention import attention_mask
from models.checks import check_tokens
from models.config import ModelConfig
from models.errors import ModelError
from models.head import head, unembed, unembed_matrix
from models.kernels import Fused, texts_of
from models.layers import PRODUCT, Block, embed_at, fuse_qkv, norm
from models.rope import layer_ropes
from models.taps import BLOCK_TAPS, Hooks, Interventions, Place, taps_of

__all__ = [
    "BLOCK_TAPS",
    "KV",
    "ForwardOutput",
    "Interventions",
    "KVCache",
    "Params",
    "abstract_params",
    "apply",
    "forward",
    "fused",
    "head",
    "init",
    "init_cache",
    "logical_axes",
    "taps_of",
    "unembed",
    "unembed_matrix",
    "unstacked",
]

Params = dict[str, Any]


class KV(NamedTuple):
    """Keys and values of earlier tokens, read-only. Its rows may be the P distinct prompts of a batch of P * G rows.

    k: [L, P, K, H, S], v: [L, P, K, S, H] (or a tuple over the layers); positions: [P, S] int32, -1 = empty slot.
    """

    k: Any
    v: Any
    positions: Int[Array, "P S"]


class KVCache(NamedTuple):
    """Keys and values that this call writes to. The T new tokens of every row go to slots [next, next + T).

    k: [L, B, K, H, S], v: [L, B, K, S, H], or a tuple over the layers when they run unrolled;
    positions: [B, S] int32, -1 = empty slot; next: int32 scalar.
    """

    k: Any
    v: Any
    positions: Int[Array, "B S"]
    next: Int[Array, ""]


class ForwardOutput(NamedTuple):
    """hidden_BTD after the final norm (None when stopped early), the taps asked for, the cache or new KV if any."""

    hidden: Float[Array, "B T D"] | None
    taps: dict[str, Array]
    cache: KVCache | None = None
    kv: KV | None = None


# --- parameters ------------------------------------------------------------------------------------------------------


Boxed = nn.LogicallyPartitioned  # an array with its logical axis names


def _is_boxed(x) -> bool:
    return isinstance(x, Boxed)


def _boxed_init(cfg: ModelConfig, key: Array) -> Params:
    """All parameters, each in a box that carries its logical axis names."""
    embed_key, block_key, head_key = jax.random.split(key, 3)
    dtype = jnp.dtype(cfg.dtype)
    normal = nn.initializers.normal(cfg.initializer_range)
    block = lambda key: Block(cfg).init(key, method=Block.declared)["params"]  # noqa: E731
    blocks = jax.vmap(block)(jax.random.split(block_key, cfg.n_layers))
    blocks = jax.tree.map(lambda b: Boxed(b.value, ("layers", *b.names)), blocks, is_leaf=_is_boxed)
    embedding = normal(embed_key, (cfg.vocab_size, cfg.d_model), dtype)
    params: Params = {
        "embed": {"embedding": Boxed(embedding, ("vocab", "embed"))},
        "blocks": blocks,
        "final_norm": {"scale": Boxed((jnp.zeros if cfg.norm == "rms_plus_one" else jnp.ones)((cfg.d_model,), dtype), ("norm",))},
    }
    if cfg.norm == "layer":
        params["final_norm"]["bias"] = Boxed(jnp.zeros((cfg.d_model,), dtype), ("norm",))
    if cfg.positions == "learned":
        places = normal(jax.random.fold_in(embed_key, 1), (cfg.max_position, cfg.d_model), dtype)
        params["embed"]["positions"] = Boxed(places, ("positions", "embed"))
    if not cfg.tie_embeddings:
        kernel = normal(head_key, (cfg.d_model, cfg.vocab_size), dtype)
        params["lm_head"] = {"kernel": Boxed(kernel, ("embed", "vocab"))}
    if cfg.head_bias:
        bias = Boxed(jnp.zeros((cfg.vocab_size,), dtype), ("vocab",))
        params["lm_head"] = params.get("lm_head", {}) | {"bias": bias}
    return params


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: ModelConfig, key: Array) -> Params:
    """Random parameters: a plain dict pytree, blocks stacked on a leading layer axis."""
    return nn.meta.unbox(_boxed_init(cfg, key))


@functools.cache
def _abstract_boxed(cfg: ModelConfig) -> Params:
    return jax.eval_shape(functools.partial(_boxed_init, cfg), jax.random.key(0))


def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without making any array."""
    return nn.meta.unbox(_abstract_boxed(cfg))


def logical_axes(cfg: ModelConfig) -> Params:
    """For each parameter, the tuple of its logical axis names (see `models.sharding.RULES`)."""
    return jax.tree.map(lambda b: tuple(b.names), _abstract_boxed(cfg), is_leaf=_is_boxed)


def fused(params: Params) -> Params:
    """The parameters with one kernel for queries, keys and values (the same ones on a mesh, where heads are sharded apart)."""
    on_mesh = not jax.typeof(base_of(params["blocks"]["q"])).sharding.mesh.empty
    return params if on_mesh else params | {"blocks": jax.vmap(fuse_qkv)(params["blocks"])}


def unstacked(params: Params) -> Params:
    """A copy of the `fused` parameters with a tuple of layers, so that `forward(unroll=True)` cuts none out of the stack."""
    blocks = fused(params)["blocks"]
    layers = tuple(jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(blocks["o"].shape[0]))
    return params | {"blocks": layers}


def init_cache(cfg: ModelConfig, batch: int, slots: int, *, unrolled: bool = False) -> KVCache:
    """An empty cache of `slots` token slots a row; `unrolled` keeps one array a layer (see `forward`)."""
    K, H, dtype = cfg.n_kv_heads, cfg.head_dim, jnp.dtype(cfg.dtype)

    def buffer(*shape):
        if unrolled:
            return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.n_layers))
        return jnp.zeros((cfg.n_layers, *shape), dtype)

    k, v = buffer(batch, K, H, slots), buffer(batch, K, slots, H)
    return KVCache(k, v, jnp.full((batch, slots), -1, jnp.int32), jnp.int32(0))


# --- the forward pass ------------------------------------------------------------------------------------------------


def _layer_masks(cfg: ModelConfig, q_pos: Array, k_pos: Array, segments: Array | None = None):
    """layer -> [B, T, S] mask. Computed once a distinct window, then picked by layer inside the scan."""
    windows = list(dict.fromkeys(cfg.layer_windows or (None,)))
    masks = [attention_mask(q_pos, k_pos, w) for w in windows]
    if segments is not None:
        masks = [mask & (segments[:, :, None] == segments[:, None, :]) for mask in masks]
    if len(masks) == 1:
        return lambda layer: masks[0]
    stacked, which = jnp.stack(masks), jnp.asarray([windows.index(w) for w in cfg.layer_windows])
    return lambda layer: stacked[which[layer]]


class _Memory:
    """What the queries of a layer attend to: the prefixes if any, then the cache or just this call's own tokens."""

    def __init__(
        self, cfg: ModelConfig, positions: Array, prefix: KV | Sequence[KV] | None, cache: KVCache | None, segments: Array | None = None
    ):
        self.prefixes = () if prefix is None else (prefix,) if isinstance(prefix, KV) else tuple(prefix)
        self.texts = None
        if cfg.attention != "plain" and cache is None and positions.shape[1] > 1:
            texts = jnp.where(positions < 0, -1, 0 if segments is None else segments)
            self.texts = texts_of(cfg, [part.positions for part in self.prefixes], positions, texts)
        self.cache, self.slots = cache, positions
        if cache is not None:
            self.slots = lax.dynamic_update_slice(cache.positions, positions, (0, cache.next))
        self.mask = _layer_masks(cfg, positions, self.slots, segments)
        self.n_slots = self.slots.shape[1]
        self.prefix_masks = []
        for part in self.prefixes:
            G = positions.shape[0] // part.positions.shape[0]
            self.prefix_masks.append(_layer_masks(cfg, positions, jnp.repeat(part.positions, G, axis=0)))
            self.n_slots += part.positions.shape[1]

    def layers(self) -> tuple[Any, Any]:
        """(keys and values of each prefix, those of the cache or None), all stacked or a tuple over layers."""
        return tuple((part.k, part.v) for part in self.prefixes), None if self.cache is None else (self.cache.k, self.cache.v)

    def segments(self, layer, prefix_kvs, cache_kv, k, v):
        """([(k, v, mask)] to attend to, this layer's (k, v) to keep) for new keys and values k, v."""
        if self.texts is not None:
            return Fused([*prefix_kvs, (k, v)], self.texts, layer), (k, v)
        (k, v), kept = ((k, v), (k, v)) if cache_kv is None else self._written(layer, cache_kv, k, v)
        own = (k, v, self.mask(layer))
        return [*((*kv, mask(layer)) for kv, mask in zip(prefix_kvs, self.prefix_masks, strict=True)), own], kept

    def _written(self, layer, cache_kv, k, v):
        """(this layer's keys and values, the cache) with k and v written; the cache is of this layer or of all."""
        slot, stacked = self.cache.next, cache_kv[0].ndim > k.ndim
        kept = tuple(
            lax.dynamic_update_slice(c, (new[None] if stacked else new).astype(c.dtype), (layer, *at) if stacked else at)
            for c, new, at in zip(cache_kv, (k, v), ((0, 0, 0, slot), (0, 0, slot, 0)), strict=True)
        )
        here = tuple(lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in kept) if stacked else kept
        return here, kept


def _packed_positions(segments_BT, *others) -> Array:
    """The place of each token within its segment, -1 where padding; `others` would say something else of positions."""
    if any(other is not None for other in others):
        raise ModelError("segments say where texts packed into a row begin and end: give no lengths, positions, prefix or cache with them")
    places = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    first = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(segments_BT < 0, -1, places - lax.cummax(jnp.where(first, places, 0), axis=1))


def _positions(tokens_BT, lengths, positions, prefix, cache, stop_at, n_layers) -> Array:
    """The position of each token, -1 where padding; refuses combinations that would be silently wrong."""
    if stop_at is not None and not 0 <= stop_at <= n_layers:
        raise ModelError(f"stop_at={stop_at} must be within 0..{n_layers}, the model's blocks")
    if stop_at is not None and cache is not None:
        raise ModelError("stop_at leaves the cache of later blocks unwritten; use return_kv instead of cache")
    if positions is not None:
        return positions
    if prefix is not None or cache is not None:
        raise ModelError("a prefix or cache needs positions: tokens after it do not start at 0")
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return positions if lengths is None else jnp.where(positions < lengths[:, None], positions, -1)


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    prefix: KV | Sequence[KV] | None = None,
    cache: KVCache | None = None,
    taps: tuple[str, ...] = (),
    interventions: Interventions | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
    texts: Int[Array, " B"] | None = None,
    stop_at: int | None = None,
    remat: bool | str = False,
    unroll: bool = False,
    return_kv: bool = False,
) -> ForwardOutput:
    """Runs the decoder. Pure; call it inside your own jit (cfg, taps, stop_at, remat, unroll, return_kv static).

    tokens_BT: rows right-padded; padding is known from `lengths` (tokens a row) or `positions` (-1 = padding),
      never from a token's value. positions default to 0, 1, 2, ...
    segments: several texts packed into each row: a number for each token, the same within one text and another in the next, -1 = padding.
      Each text starts at position 0 and sees itself only.
    prefix: keys and values of earlier tokens (see KV), attended to before the new ones and not changed; gradients
      flow into it. With P prefix rows and B = P * G, rows are grouped: row r reads prefix r // G. Needs positions.
      Several, each with its own number of rows, may follow each other.
    cache: written at [cache.next, cache.next + T) and attended to (sampling). Needs positions.
    taps: names of activations to return: "embed", "final_norm", "blocks.{i}.KIND" with KIND in `taps_of`.
      Asking for none costs nothing.
    interventions: {name: function}; the function's result replaces that activation. One that `takes_place` (see `taps.Place`) is also told
      where the tokens stand, from `prompt_lengths` (tokens of each row's prompt, without prefix or with) and `texts` (the number of each
      row's text; default 0, 1, 2, ...), which nothing else reads. One that `reads` another activation, computed before, is given it last.
    stop_at: run only the first `stop_at` blocks; hidden is then None.
    remat: recompute a layer's activations in the backward pass instead of keeping them: all of them ("nothing" is kept, or True), or all
      but what its weight matrices give ("products" are kept: attention, norms and the rest cost little to compute again).
    unroll: a Python loop over layers rather than a scan (faster sampling of small models; a cache is then a tuple, and
      params may be `unstacked`).
    return_kv: also return this call's keys and values as a KV (to be someone's prefix).

    Raises ModelError for an unknown tap or intervention name, one that stop_at never reaches, an intervention that reads what is not yet
    computed, a stop_at out of range, a prefix or
    cache without positions, and segments beside these; and, of tokens that can be looked at (outside of jit), for an id outside the
    vocabulary, a row past the context, no token at all, and lengths that are not one a row or pass its end. Inside jit nobody looks:
    an id past the vocabulary makes its row NaN, a negative one counts from the vocabulary's end, and positions past the context are
    computed though the model never saw such.
    """
    if segments is not None:
        positions = _packed_positions(segments, lengths, positions, prefix, cache)
    check_tokens(cfg, tokens_BT, lengths, positions)
    positions = _positions(tokens_BT, lengths, positions, prefix, cache, stop_at, cfg.n_layers)
    if segments is not None and prompt_lengths is not None:
        raise ModelError("segments pack several texts into a row, prompt_lengths are of one text a row: leave one of them out")
    texts = jnp.arange(len(tokens_BT), dtype=jnp.int32) if texts is None else texts
    hooks = Hooks(cfg, taps, interventions, stop_at, Place(positions, texts, prompt_lengths))
    if hooks.wants("attn_probs"):  # which a kernel does not show
        cfg = dataclasses.replace(cfg, attention="plain")
    memory = _Memory(cfg, positions, prefix, cache, segments)
    rope_of = layer_ropes(cfg, positions)
    x = hooks.outer("embed", embed_at(cfg, params["embed"], tokens_BT, positions))
    B, T, _ = x.shape
    buffers = hooks.buffers((B, T), memory.n_slots, x.dtype)

    def block(carry, layer, p, prefix_kvs, cache_kv):
        """One layer: (x and tap buffers, what to keep of its keys and values)."""
        x, buffers = carry[0], dict(carry[1])
        segments_of = functools.partial(memory.segments, layer, prefix_kvs, cache_kv)
        module = Block(cfg, "qkv" in p, hooks.wants("attn_probs"))
        x, kept = module.apply({"params": p}, x, rope_of(layer), segments_of, hooks.at(layer, buffers))
        return (x, buffers), kept if return_kv or cache is not None else None

    run = _unrolled if unroll else _scanned
    n_layers = cfg.n_layers if stop_at is None else stop_at
    (x, buffers), kept = run(block, (x, buffers), (params["blocks"], *memory.layers()), n_layers, cfg.n_layers, remat)
    hooks.collect(buffers)
    k, v = (None, None) if kept is None else kept
    new_cache = None if cache is None else KVCache(k, v, memory.slots, cache.next + T)
    kv = KV(k, v, memory.slots) if return_kv else None
    if stop_at is not None:
        return ForwardOutput(None, hooks.results(), new_cache, kv)
    hidden = hooks.outer("final_norm", norm(cfg, x, **params["final_norm"]))
    return ForwardOutput(hidden, hooks.results(), new_cache, kv)


# What a recomputed layer keeps for the backward pass, besides its input.
REMAT: dict[str, Any] = {"nothing": None, "products": jax.checkpoint_policies.save_only_these_names(PRODUCT)}


def _recomputed(layer, remat: bool | str, **options):
    if not remat:
        return layer
    kept = "nothing" if remat is True else remat
    if kept not in REMAT:
        raise ModelError(f"remat={remat!r} is not known; known: False, True, {', '.join(map(repr, REMAT))}")
    return jax.checkpoint(layer, policy=REMAT[kept], **options)


def _scanned(block, carry, layers, n_layers, total_layers, remat):
    """Layers as one lax.scan; a run that stops early indexes the stack, so that no half of it is copied.

    A cache travels in the carry, so that each layer writes its new slots in place.
    """
    *stack, cache = layers

    def body(state, xs):
        layer, given = xs
        if n_layers < total_layers:
            given = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False), stack)
        carry, kept = block(state[0], layer, *given, state[1])
        return ((carry, None), kept) if cache is None else ((carry, kept), None)

    body = _recomputed(body, remat, prevent_cse=False)  # a scan's body is not merged with its backward
    given = (jnp.arange(n_layers), stack if n_layers == total_layers else None)
    (carry, cache), kept = lax.scan(body, (carry, cache), given)
    return carry, kept if cache is None else cache


def _unrolled(block, carry, layers, n_layers, total_layers, remat):
    """Layers as a Python loop: no slicing of a stacked cache while sampling."""
    blocks, prefixes, cache = layers
    at = lambda kv, i: None if kv is None else (kv[0][i], kv[1][i])  # noqa: E731  (stacked, or a tuple over layers)
    kept = []
    for i in range(n_layers):
        run = _recomputed(functools.partial(_call, block, i), remat)
        p = blocks[i] if isinstance(blocks, tuple) else jax.tree.map(lambda a, i=i: a[i], blocks)
        carry, keep = run(carry, p, tuple(at(prefix, i) for prefix in prefixes), at(cache, i))
        kept.append(keep)
    return carry, tuple(zip(*kept, strict=True)) if kept and kept[0] is not None else None


def _call(block, layer, carry, *given):
    return block(carry, layer, *given)


def apply(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    taps: tuple[str, ...] = (),
    interventions: Interventions | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
    """Logits (fp32) at every position and the named activations asked for; see `forward`, also for the errors.

    interventions: compiled once for each function object and shape, like any function that jax.jit compiles: what one
      reads besides its argument is fixed at its first call. For another value give another function (a new lambda or
      functools.partial); for many, a pytree that can be called (`jax.tree_util.Partial(function, value)`, `sae.FeatureEdit`),
      which is compiled once for each structure.
    """
    check_tokens(cfg, tokens, lengths)
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    if not interventions:
        return _jitted_apply(cfg, params, tokens, lengths, tuple(taps))
    if not any(jax.tree_util.all_leaves([fn]) for fn in interventions.values()):
        return _jitted_apply(cfg, params, tokens, lengths, tuple(taps), dict(interventions), prompt_lengths)
    try:
        run = _jitted_edited(tuple(interventions.items()))
    except TypeError:  # a callable that cannot be told from others by its hash
        return _apply(cfg, params, tokens, lengths, tuple(taps), interventions, prompt_lengths)
    return run(cfg, params, tokens, lengths, tuple(taps), prompt_lengths=prompt_lengths)


def _apply(cfg, params, tokens, lengths, taps, interventions=None, prompt_lengths=None):
    out = forward(cfg, params, tokens, lengths=lengths, taps=taps, interventions=interventions, prompt_lengths=prompt_lengths)
    return unembed(cfg, params, out.hidden), out.taps


_jitted_apply = jax.jit(_apply, static_argnums=(0, 4))


@functools.lru_cache(maxsize=16)  # what interventions hold on to is let go with the programs made of them
def _jitted_edited(interventions: tuple):
    return jax.jit(functools.partial(_apply, interventions=dict(interventions)), static_argnums=(0, 4))
