"""The parts of a decoder layer as plain functions, and the Flax module that puts them together.

Letters in names and einsums: B batch, T query tokens, S key slots, D d_model, N query heads, K key/value heads,
R = N / K, H head_dim, F d_ff, P distinct prompts, G = B / P.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig, rope_frequencies, rope_stretch

NEGATIVE = -1e30  # finite, so that a row with nothing to attend to gives no NaN
QUERIES, QUERY_CHUNK = 1024, 256  # more queries than QUERIES attend in chunks of QUERY_CHUNK: their scores do not all fit in memory
BATCH_AXES = ("data", "fsdp")  # the mesh axes over which the rows of a batch are spread

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def dense(equation: str, x: Array, kernel: Array) -> Array:
    """Einsum with fp32 accumulation, returned in x's dtype; equation like "BTD,DNH->BTNH".

    Run as one 2-D matmul: XLA's CPU backend computes the weight gradient of the plain einsum 1.5 times slower, and in
    bf16 not at all.
    """
    inputs, weights = equation.split("->")[0].split(",")
    contracted = sum(letter in inputs for letter in weights)
    rows, width = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    x_2d = x.reshape(math.prod(rows), -1)
    y = jnp.matmul(x_2d, kernel.reshape(x_2d.shape[1], -1), preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*rows, *width)


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


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last axis, computed in fp32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (scale * y.astype(x.dtype)).astype(x.dtype)


def rope_table(cfg: ModelConfig, positions_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, H / 2] in fp32 at integer positions; padding (-1) is treated as position 0.

    "dynamic" scaling stretches the base by each row's own length (last position + 1) once it passes max_position;
    cached keys stay as they were written, so a row that crosses max_position while it is sampled differs a little
    from the same row in one pass.
    """
    freqs, factor = rope_frequencies(cfg)
    freqs = jnp.asarray(freqs)
    if cfg.rope_scaling.kind == "dynamic":
        length = jnp.maximum(jnp.max(positions_BT, axis=1) + 1, cfg.max_position)[:, None, None]
        freqs = freqs * rope_stretch(cfg, length) ** -(jnp.arange(freqs.size) * 2 / cfg.head_dim)
    angles = jnp.maximum(positions_BT, 0)[..., None].astype(jnp.float32) * freqs
    # The barrier keeps XLA from computing cosines again in every layer that uses them.
    return lax.optimization_barrier((factor * jnp.cos(angles)[:, :, None], factor * jnp.sin(angles)[:, :, None]))


def rotate(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotary position embedding, half-split convention (dimension i is paired with i + H / 2)."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def attention_mask(
    q_pos_BT: Int[Array, "B T"], k_pos_BS: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """A query sees filled slots at its own or an earlier position, fewer than `window` positions back."""
    q, k = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    mask = (k >= 0) & (k <= q)
    return mask if window is None else mask & (q - k < window)


def attention_scores(q_BTNH: Array, k_PKHS: Array) -> Float[Array, "B K R T S"]:
    """fp32 scaled scores; P may divide B, then rows p*G .. p*G+G-1 read prompt p's keys.

    Keys lie [P, K, H, S] and values [P, K, S, H]: as a matrix product reads them, so that sampling, which reads all of
    them for one query, transposes nothing.
    """
    B, T, N, H = q_BTNH.shape
    P, K, _, S = k_PKHS.shape
    q = q_BTNH.reshape(P, B // P, T, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    scores = batched_matmul(q.reshape(P, K, -1, H), k_PKHS).reshape(P, K, B // P, N // K, T, S)
    return scores.transpose(0, 2, 1, 3, 4, 5).reshape(B, K, N // K, T, S) * (H**-0.5)


def attention_values(probs_BKRTS: Array, v_PKSH: Array) -> Float[Array, "B T N H"]:
    """The probability-weighted values in fp32; P may divide B as in `attention_scores`."""
    B, K, R, T, S = probs_BKRTS.shape
    P, H = v_PKSH.shape[0], v_PKSH.shape[-1]
    probs = probs_BKRTS.reshape(P, B // P, K, R, T, S).transpose(0, 2, 1, 3, 4, 5).astype(v_PKSH.dtype)
    out = batched_matmul(probs.reshape(P, K, -1, S), v_PKSH).reshape(P, K, B // P, R, T, H)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, K * R, H)


Segments = list[tuple[Array, Array, Array]]  # keys, values and mask [B, T, S] of each part of what is attended to


def attention(q_BTNH: Array, segments: Segments, probs_hook: Callable[[Array], Array] = lambda x: x) -> Float[Array, "B T N H"]:
    """Softmax attention over all segments together, in fp32; probs_hook sees, and may replace, the probabilities [B, N, T, S]."""
    scores = jnp.concatenate([jnp.where(mask[:, None, None], attention_scores(q_BTNH, k), NEGATIVE) for k, _, mask in segments], axis=-1)
    B, K, R, T, S = scores.shape
    probs = probs_hook(jax.nn.softmax(scores, axis=-1).reshape(B, K * R, T, S)).reshape(B, K, R, T, S)
    parts, start = [], 0
    for k, v, _ in segments:
        parts.append(attention_values(probs[..., start : start + k.shape[-1]], v))
        start += k.shape[-1]
    return functools.reduce(jnp.add, parts)


def attention_in_chunks(q_BTNH: Array, segments: Segments, chunk: int) -> Float[Array, "B T N H"]:
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
        return attention(q, [(k.astype(dtype), v.astype(dtype), mask) for (k, v), mask in zip(keys_values, masks, strict=True)])

    out = lax.map(jax.checkpoint(attend, prevent_cse=False), (cut(q_BTNH), [cut(mask) for _, _, mask in segments]))
    return out.swapaxes(0, 1).reshape(B, count * chunk, N, H)[:, :T]


def constrain(x: Array, like: Array, *axes: tuple[str, ...]) -> Array:
    """Spreads the leading dimensions of `x` over `axes` of the mesh that the parameter `like` lives on, if on one.

    The rest of `x` is whole on every device. Left alone, the partitioner may spread activations along d_model, as the
    parameters are, and reduce every product over all devices.
    """
    mesh = jax.typeof(like).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    spec = [tuple(name for name in names if name in auto) for names in axes]
    ways = [math.prod(mesh.shape[name] for name in names) for names in spec]
    if not auto or any(size % n for size, n in zip(x.shape, ways, strict=False)):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def constrain_rows(x: Array, like: Array) -> Array:
    """Keeps the rows of activations on the batch axes of the mesh; see `constrain`."""
    return constrain(x, like, BATCH_AXES)


def embed(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The embeddings of tokens. On a mesh the table's rows stay where they are, its columns are gathered first."""
    return constrain_rows(jnp.take(constrain(table_VD, table_VD, ("tensor",)), tokens_BT, axis=0), table_VD)


def fuse_qkv(p: dict[str, Array]) -> dict[str, Array]:
    """One layer's parameters with queries, keys and values as one kernel (and bias): one product, not three."""
    p = dict(p)
    for name, suffix, axis in (("qkv", "", 1), ("qkv_bias", "_bias", 0)):
        if "q" + suffix in p:
            p[name] = jnp.concatenate([p.pop(part + suffix) for part in "qkv"], axis=axis)
    return p


class Block(nn.Module):
    """One layer: pre-norm attention and gated MLP. `hook(name, x)` sees, and may replace, each named activation.

    fused: the parameters are those of `fuse_qkv`. whole_probs: the hook wants "attn_probs", so that no queries are split off.
    """

    cfg: ModelConfig
    fused: bool = False
    whole_probs: bool = False

    def setup(self):
        c, normal = self.cfg, nn.initializers.normal(self.cfg.initializer_range)

        def declare(name, shape, axes, init=normal):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(c.dtype))

        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        D, N, K, H, F = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff
        self.attn_norm = declare("attn_norm", (D,), ("norm",), ones)
        self.mlp_norm = declare("mlp_norm", (D,), ("norm",), ones)
        qkv = {"qkv": (N + 2 * K, "heads")} if self.fused else {"q": (N, "heads"), "k": (K, "kv_heads"), "v": (K, "kv_heads")}
        self.qkv_kernels = [declare(name, (D, n, H), ("embed", axis, "head_dim")) for name, (n, axis) in qkv.items()]
        self.o = declare("o", (N, H, D), ("heads", "head_dim", "embed"))
        self.gate = declare("gate", (D, F), ("embed", "mlp"))
        self.up = declare("up", (D, F), ("embed", "mlp"))
        self.down = declare("down", (F, D), ("mlp", "embed"))
        if c.qkv_bias:
            self.qkv_biases = [declare(f"{name}_bias", (n, H), (axis, "head_dim"), zeros) for name, (n, axis) in qkv.items()]
        if c.o_bias:
            self.o_bias = declare("o_bias", (D,), ("norm",), zeros)
        if c.mlp_bias:
            self.gate_bias = declare("gate_bias", (F,), ("mlp",), zeros)
            self.up_bias = declare("up_bias", (F,), ("mlp",), zeros)
            self.down_bias = declare("down_bias", (D,), ("norm",), zeros)
        if c.qk_norm:
            self.q_norm = declare("q_norm", (H,), ("head_dim",), ones)
            self.k_norm = declare("k_norm", (H,), ("head_dim",), ones)

    def qkv(self, x, rope):
        """Queries [B, T, N, H], keys [B, K, H, T] and values [B, K, T, H]; queries and keys rotated."""
        c = self.cfg
        parts = [dense("BTD,DNH->BTNH", x, kernel) for kernel in self.qkv_kernels]
        if c.qkv_bias:
            parts = [part + bias for part, bias in zip(parts, self.qkv_biases, strict=True)]
        q, k, v = jnp.split(parts[0], (c.n_heads, c.n_heads + c.n_kv_heads), axis=2) if self.fused else parts
        if c.qk_norm:
            q, k = rms_norm(q, self.q_norm, c.norm_eps), rms_norm(k, self.k_norm, c.norm_eps)
        return rotate(q, *rope), rotate(k, *rope).transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

    def attend(self, q, segments, hook):
        """Attention over key/value segments [(k, v, mask_BTS)], softmax over all of them together."""
        probs_hook = functools.partial(hook, "attn_probs")
        many = q.shape[1] > QUERIES and not self.whole_probs
        out = attention_in_chunks(q, segments, QUERY_CHUNK) if many else attention(q, segments, probs_hook)
        # Rounded once, so that a row's values do not depend on how many segments they lie in.
        out = dense("BTNH,NHD->BTD", out.astype(q.dtype), self.o)
        return out + self.o_bias if self.cfg.o_bias else out

    def mlp(self, x, hook):
        """The gated MLP: down(activation(gate(x)) * up(x))."""
        c, activation = self.cfg, ACTIVATIONS[self.cfg.activation]
        gate, up = dense("BTD,DF->BTF", x, self.gate), dense("BTD,DF->BTF", x, self.up)
        if c.mlp_bias:
            gate, up = gate + self.gate_bias, up + self.up_bias
        act = hook("mlp_act", activation(hook("mlp_pre", gate)) * up)
        out = dense("BTF,FD->BTD", act, self.down)
        return out + self.down_bias if c.mlp_bias else out

    def __call__(self, x, rope, segments_of, hook):
        """segments_of(k, v) places the new keys and values and returns (segments to attend to, what to keep)."""
        x = hook("resid_pre", x)
        q, k, v = self.qkv(rms_norm(x, self.attn_norm, self.cfg.norm_eps), rope)
        segments, keep = segments_of(k, v)
        x = hook("resid_mid", x + hook("attn_out", constrain_rows(self.attend(q, segments, hook), self.o)))
        mlp_out = constrain_rows(self.mlp(rms_norm(x, self.mlp_norm, self.cfg.norm_eps), hook), self.down)
        return hook("resid_post", x + hook("mlp_out", mlp_out)), keep
