"""Attention by kernels of accelerators, which hold no scores in memory: splash attention (Pallas, TPU) and cuDNN's (GPU).

They compute what `models.attention.attention` does for a whole text, or what follows a prompt, at once: training, not sampling. cuDNN's is given a
mask of all queries and slots, where the plain path has a score for each head too; both read a shared prompt's keys and values from a copy for
each of its completions. Letters as there; S counts the slots of all that is attended to, the T new tokens last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from models.config import ModelConfig

BLOCK = 512  # most queries, and most keys, of one tile of splash attention
LANES = 128  # a tile's sides are multiples of it
NOWHERE = -2  # the text of slots that nothing attends to
CUDNN = "cudnn"  # jax.nn.dot_product_attention's name of it


class Fused(NamedTuple):
    """What the queries of a layer attend to, for a kernel: keys [P, K, H, S] and values [P, K, S, H] of each part, the queries' own last;
    what `texts_of` makes of the texts that they are of; and the number of the layer."""

    parts: Sequence[tuple[Array, Array]]
    texts: tuple[Array, ...]
    layer: int | Int[Array, ""]


def texts_of(
    cfg: ModelConfig, before: Sequence[Int[Array, "P S"]], places_BT: Int[Array, "B T"], texts_BT: Int[Array, "B T"]
) -> tuple[Array, ...]:
    """What tells `cfg.attention`'s kernel which slots a query may see, the same in all layers: for splash the text of each query [B, T] and
    slot [B, S], for cuDNN a mask of all queries and slots [B, T, S], of even lengths. And for a model with sliding windows: the order
    of the earlier slots by position (splash), or the positions of queries and slots (cuDNN).

    before: positions of the slots of the parts before the queries' own, -1 = empty. places_BT: the queries' own, -1 = padding; with windows
    those of a text count up by one. texts_BT: the text of each query, 0 where a row is one text, -1 = padding.
    """
    B, T = texts_BT.shape
    before_BS = jnp.concatenate([*(_each_row(part, B) for part in before), jnp.zeros((B, 0), jnp.int32)], axis=1)
    ordered: tuple[Array, ...] = ()
    if cfg.attention == "splash" and any(cfg.layer_windows) and before:
        # The kernel's window counts slots: with the empty ones first these lie as far apart as their positions.
        ordered = (jnp.argsort(before_BS, axis=1),)
        before_BS = jnp.take_along_axis(before_BS, ordered[0], axis=1)
    slots_BS = jnp.concatenate([jnp.where(before_BS >= 0, 0, NOWHERE), texts_BT], axis=1)
    if cfg.attention != "cudnn":
        return texts_BT, slots_BS, *ordered
    ahead, places_BS = before_BS.shape[1], jnp.concatenate([before_BS, places_BT], axis=1)
    texts_BT, slots_BS = _even(texts_BT, -1), _even(slots_BS, NOWHERE)
    causal_TS = jnp.arange(slots_BS.shape[1]) <= jnp.arange(texts_BT.shape[1])[:, None] + ahead
    mask_BTS = (texts_BT[:, :, None] == slots_BS[:, None, :]) & causal_TS
    return (mask_BTS, _even(places_BT, -1), _even(places_BS, -1)) if any(cfg.layer_windows) else (mask_BTS,)


def _each_row(part: Array, rows: int) -> Array:
    """A part that several rows share, once for each of them."""
    return jnp.repeat(part, rows // len(part), axis=0)


def _even(a: Array, fill: int = 0) -> Array:
    """With one more entry on the second axis where it is odd."""
    return jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), *((0, 0),) * (a.ndim - 2)), constant_values=fill)


def fused_attention(cfg: ModelConfig, q_BTNH: Float[Array, "B T N H"], fused: Fused, mesh: Any, rows: Sequence[str]) -> Array:
    """Softmax attention of each query over its text's slots up to its own, [B, T, N, H], by `cfg.attention`'s kernel.

    mesh: where the parameters live (empty: one device), the rows of a batch over its axes `rows` and heads over "tensor", where they divide.
    Queries of padding get numbers without meaning.
    """
    B = len(q_BTNH)
    k_BKHS = jnp.concatenate([_each_row(k, B) for k, _ in fused.parts], axis=-1)
    v_BKSH = jnp.concatenate([_each_row(v, B) for _, v in fused.parts], axis=-2)
    scale = (cfg.head_dim if cfg.query_scalar is None else cfg.query_scalar) ** -0.5
    one = functools.partial(_cudnn, scale=scale) if cfg.attention == "cudnn" else functools.partial(_splash, scale=scale, cap=cfg.attn_softcap)
    S = k_BKHS.shape[-1]
    windows = [window if window is not None and window < S else None for window in cfg.layer_windows] or [None] * cfg.n_layers
    kinds = list(dict.fromkeys(windows))
    which = jnp.asarray([kinds.index(window) for window in windows])[fused.layer]

    def kernel(which, *given):  # a kernel's window is fixed when it is compiled, and the layers of a scan are compiled once
        return lax.switch(which, [functools.partial(one, window=window) for window in kinds], *given)

    given = (which, q_BTNH, k_BKHS, v_BKSH, *fused.texts)
    if mesh.empty:
        return kernel(*given)
    present = tuple(name for name in rows if name in mesh.shape)
    over = present if B % math.prod(mesh.shape[name] for name in present) == 0 else ()
    tensor = "tensor" if "tensor" in mesh.shape and cfg.n_kv_heads % mesh.shape["tensor"] == 0 else None
    row = PartitionSpec(over or None)
    heads = PartitionSpec(over or None, tensor)
    query = PartitionSpec(over or None, None, tensor)
    specs = (PartitionSpec(), query, heads, heads, *(row for _ in fused.texts))
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=query, check_vma=False)(*given)


def _cudnn(q_BTNH, k_BKHS, v_BKSH, mask_BTS, *places, scale, window):
    """cuDNN's attention on one device. It takes even lengths, and a mask as an array of all queries and slots."""
    if window is not None:
        places_BT, places_BS = places
        mask_BTS = mask_BTS & (places_BT[:, :, None] - places_BS[:, None, :] < window)
    k_BSKH, v_BSKH = _even(k_BKHS.transpose(0, 3, 1, 2)), _even(v_BKSH.transpose(0, 2, 1, 3))
    out = jax.nn.dot_product_attention(_even(q_BTNH), k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale, implementation=CUDNN)
    return out[:, : q_BTNH.shape[1]]


def _splash(q_BTNH, k_BKHS, v_BKSH, texts_BT, slots_BS, order_BS=None, *, scale, cap, window):
    """Splash attention on one device; Pallas interprets the kernel on a CPU, which is for tests."""
    T, S = q_BTNH.shape[1], slots_BS.shape[1]
    if order_BS is not None:
        order_BS = jnp.concatenate([order_BS, jnp.broadcast_to(jnp.arange(S - T, S), (len(order_BS), T))], axis=1)
        k_BKHS = jnp.take_along_axis(k_BKHS, order_BS[:, None, None, :], axis=3)
        v_BKSH = jnp.take_along_axis(v_BKSH, order_BS[:, None, :, None], axis=2)
    (block_q, pad_q), (block_kv, pad_kv) = _tiles(T), _tiles(S)
    q_BNTH = jnp.pad((q_BTNH * scale).astype(q_BTNH.dtype).transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, pad_q), (0, 0)))
    k_BKSH, v_BKSH = (jnp.pad(a, ((0, 0), (0, 0), (0, pad_kv), (0, 0))) for a in (k_BKHS.transpose(0, 1, 3, 2), v_BKSH))
    texts_BT = jnp.pad(texts_BT, ((0, 0), (0, pad_q)), constant_values=-1)
    slots_BS = jnp.pad(slots_BS, ((0, 0), (0, pad_kv)), constant_values=NOWHERE)

    def kernel(*given, interpret):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        sizes = splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
            block_kv_dkv_compute=block_kv, block_q_dq=block_q, block_kv_dq=block_kv,
        )  # fmt: skip
        size = (T + pad_q, S + pad_kv)
        seen = masks.CausalMask(size, offset=S - T) if window is None else masks.LocalMask(size, (window - 1, 0), offset=S - T)
        attend = splash.make_splash_mha(
            masks.MultiHeadMask([seen] * q_BNTH.shape[1]), head_shards=1, q_seq_shards=1, block_sizes=sizes,
            attn_logits_soft_cap=cap, interpret=interpret,
        )  # fmt: skip
        q, k, v, texts, slots = given
        return jax.vmap(lambda q, k, v, t, s: attend(q, k, v, splash.SegmentIds(t, s)))(q, k, v, texts, slots)

    # On a GPU there is no such branch, and lowering says so: interpreted, it would be of no use there.
    run = functools.partial(lax.platform_dependent, q_BNTH, k_BKSH, v_BKSH, texts_BT, slots_BS)
    out_BNTH: Array = run(tpu=functools.partial(kernel, interpret=False), cpu=functools.partial(kernel, interpret=True))
    return out_BNTH[:, :, :T].transpose(0, 2, 1, 3)


def _tiles(size: int) -> tuple[int, int]:
    """(side of a tile, places of padding) for so many queries or keys: multiples of LANES, of few tiles."""
    block = min(BLOCK, -(-size // LANES) * LANES)
    return block, -size % block
