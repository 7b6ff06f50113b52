"""The parts of a decoder layer as plain functions, and the Flax module that puts them together.

Letters in names and einsums: B batch, T query tokens, S key slots, D d_model, N query heads, K key/value heads,
R = N / K, H head_dim, F d_ff, P distinct prompts, G = B / P.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from models.adapted import Adapted, base_of, side_by_side
from models.attention import attention, attention_in_chunks, attention_scores
from models.config import BLOCK_NORMS, ModelConfig
from models.experts import expert_mlp, route
from models.kernels import Fused, fused_attention
from models.rope import rotate

QUERIES, QUERY_CHUNK = 1024, 256  # more queries than QUERIES attend in chunks of QUERY_CHUNK: their scores do not all fit in memory
PRODUCT = "product"  # of activations and a weight matrix
BATCH_AXES = ("data", "fsdp", "expert")  # the mesh axes over which the rows of a batch are spread

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), functools.partial(jax.nn.gelu, approximate=True)),
    "relu": jax.nn.relu,
}


def dense(equation: str, x: Array, kernel: Array | Adapted, dtype: Any = None) -> Array:
    """Einsum with fp32 accumulation, returned in dtype (None: x's); equation like "BTD,DNH->BTNH". An adapted kernel adds scale (x A) B.
    The result bears the name PRODUCT, by which a recomputed layer may keep it (`models.forward`).

    Run as one 2-D matmul: XLA's CPU backend computes the weight gradient of the plain einsum 1.5 times slower, and in
    bf16 not at all.
    """
    inputs, weights = equation.split("->")[0].split(",")
    contracted = sum(letter in inputs for letter in weights)
    rows, width = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    x_2d = x.reshape(math.prod(rows), -1)

    def product(x_2d: Array, matrix: Array) -> Array:
        return jnp.matmul(x_2d, matrix.reshape(x_2d.shape[1], -1), preferred_element_type=jnp.float32)

    y = product(x_2d, base_of(kernel))
    if isinstance(kernel, Adapted):  # A and B are trained in fp32 and computed with in x's dtype, as the base is
        low = product(x_2d, kernel.a.astype(x.dtype)).astype(x.dtype)
        y = y + kernel.scale * product(low, kernel.b.astype(x.dtype))
    return checkpoint_name(y.astype(dtype or x.dtype).reshape(*rows, *width), PRODUCT)


def unchanged(x: Array) -> Array:
    """x: the hook of an activation that nobody looks at."""
    return x


def rms_norm(x: Array, scale: Array, eps: float, kind: str = "rms", hook: Callable[[Array], Array] = unchanged) -> Array:
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last axis, computed in fp32; kinds as of `ModelConfig.norm`. hook sees,
    and may replace, what is not yet scaled."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if kind == "rms":
        return (scale * hook(y.astype(x.dtype))).astype(x.dtype)
    scale = scale.astype(jnp.float32)
    return (hook(y) * (1 + scale if kind == "rms_plus_one" else scale)).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float, hook: Callable[[Array], Array] = unchanged) -> Array:
    """LayerNorm (Ba et al. 2016) over the last axis, computed and scaled in fp32; hook as of `rms_norm`."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (hook(y) * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def norm(cfg: ModelConfig, x: Array, scale: Array, bias: Array | None = None, hook: Callable[[Array], Array] = unchanged) -> Array:
    """The norm of cfg over the last axis of x; bias for LayerNorm alone; hook as of `rms_norm`."""
    if bias is None:
        return rms_norm(x, scale, cfg.norm_eps, cfg.norm, hook)
    return layer_norm(x, scale, bias, cfg.norm_eps, hook)


def mesh_of(like: Array | Adapted) -> Any:
    """The mesh that a parameter lives on; an empty one on a single device."""
    mesh = jax.typeof(base_of(like)).sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def constrain(x: Array, like: Array | Adapted, *axes: tuple[str, ...]) -> Array:
    """Spreads the leading dimensions of `x` over `axes` of the mesh that the parameter `like` lives on, if on one.

    The rest of `x` is whole on every device. Left alone, the partitioner may spread activations along d_model, as the
    parameters are, and reduce every product over all devices.
    """
    mesh = mesh_of(like)
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    spec = [tuple(name for name in names if name in auto) for names in axes]
    ways = [math.prod(mesh.shape[name] for name in names) for names in spec]
    if not auto or any(size % n for size, n in zip(x.shape, ways, strict=False)):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def constrain_rows(x: Array, like: Array | Adapted) -> Array:
    """Keeps the rows of activations on the batch axes of the mesh; see `constrain`."""
    return constrain(x, like, BATCH_AXES)


def embed(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The embeddings of tokens. On a mesh the table's rows stay where they are, its columns are gathered first."""
    return constrain_rows(jnp.take(constrain(table_VD, table_VD, ("tensor",)), tokens_BT, axis=0), table_VD)


def embed_at(
    cfg: ModelConfig, tables: dict[str, Array], tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """What enters the first block: the embeddings, scaled, and where positions are learned those of the positions.

    Padding (-1) reads position 0, one past the last learned position that last one: a NaN there would reach all through attention.
    """
    x = embed(tables["embedding"], tokens_BT)
    if cfg.embed_scale != 1:
        x = x * jnp.asarray(cfg.embed_scale, x.dtype)
    if cfg.positions == "learned":
        table_PD = constrain(tables["positions"], tables["positions"], ())
        x = x + constrain_rows(jnp.take(table_PD, positions_BT, axis=0, mode="clip"), table_PD)
    return x


def fuse_qkv(p: dict[str, Any]) -> dict[str, Any]:
    """One layer's parameters with queries, keys and values as one kernel (and bias): one product, not three."""
    p = dict(p)
    p["qkv"] = side_by_side([p.pop(part) for part in "qkv"])
    if "q_bias" in p:
        p["qkv_bias"] = jnp.concatenate([p.pop(part + "_bias") for part in "qkv"])
    return p


class Block(nn.Module):
    """One layer: attention and MLP, laid out as `cfg.block` says. `hook(name, x)` sees, and may replace, each named activation.

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
        unit = zeros if c.norm == "rms_plus_one" else ones
        norms = {name: [declare(name, (D,), ("norm",), unit)] for name in BLOCK_NORMS[c.block]}
        qkv = {"qkv": (N + 2 * K, "heads")} if self.fused else {"q": (N, "heads"), "k": (K, "kv_heads"), "v": (K, "kv_heads")}
        self.qkv_kernels = [declare(name, (D, n, H), ("embed", axis, "head_dim")) for name, (n, axis) in qkv.items()]
        self.o = declare("o", (N, H, D), ("heads", "head_dim", "embed"))
        gated = c.mlp != "plain"
        many, experts = ((c.n_experts,), ("experts",)) if c.mlp == "experts" else ((), ())
        if many:
            self.router = declare("router", (D, *many), ("embed", "routes"))
        if gated:
            self.gate = declare("gate", (*many, D, F), (*experts, "embed", "mlp"))
        self.up = declare("up", (*many, D, F), (*experts, "embed", "mlp"))
        self.down = declare("down", (*many, F, D), (*experts, "mlp", "embed"))
        if c.qkv_bias:
            self.qkv_biases = [declare(f"{name}_bias", (n, H), (axis, "head_dim"), zeros) for name, (n, axis) in qkv.items()]
        if c.o_bias:
            self.o_bias = declare("o_bias", (D,), ("norm",), zeros)
        if c.mlp_bias:
            if gated:
                self.gate_bias = declare("gate_bias", (F,), ("mlp",), zeros)
            self.up_bias = declare("up_bias", (F,), ("mlp",), zeros)
            self.down_bias = declare("down_bias", (D,), ("norm",), zeros)
        if c.qk_norm:
            lead = 0 if c.qk_norm_over == "all" else 1  # a scale for each head, or one for all
            self.q_norm = declare("q_norm", (N, H)[lead:], ("heads", "head_dim")[lead:], unit)
            self.k_norm = declare("k_norm", (K, H)[lead:], ("kv_heads", "head_dim")[lead:], unit)
        if c.norm == "layer":
            for name, given in norms.items():
                given.append(declare(f"{name}_bias", (D,), ("norm",), zeros))
        self.norms = norms

    def declared(self) -> None:
        """Computes nothing: initialising by this method draws the parameters alone."""

    def qkv(self, x, rope):
        """Queries [B, T, N, H], keys [B, K, H, T] and values [B, K, T, H]; queries and keys rotated."""
        c = self.cfg
        parts = [dense("BTD,DNH->BTNH", x, kernel) for kernel in self.qkv_kernels]
        if c.qkv_bias:
            parts = [part + bias for part, bias in zip(parts, self.qkv_biases, strict=True)]
        q, k, v = jnp.split(parts[0], (c.n_heads, c.n_heads + c.n_kv_heads), axis=2) if self.fused else parts
        if c.qk_norm:
            q, k = self.head_norm(q, self.q_norm), self.head_norm(k, self.k_norm)
        if rope is not None:
            q, k = rotate(q, *rope, pairs=c.rotary_pairs), rotate(k, *rope, pairs=c.rotary_pairs)
        return q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

    def head_norm(self, x_BTNH, scale):
        """The q/k norm, over each head or over all together."""
        if self.cfg.qk_norm_over == "head":
            return rms_norm(x_BTNH, scale, self.cfg.norm_eps, self.cfg.norm)
        flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
        return rms_norm(flat, scale.reshape(-1), self.cfg.norm_eps, self.cfg.norm).reshape(x_BTNH.shape)

    def normed(self, name, x, hook=unchanged):
        """x after the norm `name`, or as it is where this kind of block has no such norm; hook as of `rms_norm`."""
        return norm(self.cfg, x, *self.norms[name], hook=hook) if name in self.norms else x

    def attend(self, q, segments, hook):
        """Attention over key/value segments [(k, v, mask_BTS)], or what stands for them before a kernel, softmax over all of them together."""
        if isinstance(segments, Fused):
            out = fused_attention(self.cfg, q, segments, mesh_of(self.o), BATCH_AXES)
            return self.attn_result(q, out, hook)
        probs_hook = functools.partial(hook, "attn_probs")
        scores_of = functools.partial(attention_scores, query_scalar=self.cfg.query_scalar, cap=self.cfg.attn_softcap)
        many = q.shape[1] > QUERIES and not self.whole_probs
        out = attention_in_chunks(q, segments, QUERY_CHUNK, scores_of) if many else attention(q, segments, probs_hook, scores_of)
        return self.attn_result(q, out, hook)

    def attn_result(self, q, out, hook):
        """What the heads' values add to the residual stream."""
        # Rounded once, so that a row's values do not depend on how many segments they lie in.
        z = hook("attn_z", out.astype(q.dtype).reshape(*out.shape[:2], -1))
        out = dense("BTNH,NHD->BTD", z.reshape(out.shape), self.o)
        return out + self.o_bias if self.cfg.o_bias else out

    def mlp(self, x, hook):
        """The MLP: down(activation(gate(x)) * up(x)) where gated (Shazeer 2020), that of each of a token's experts, or where plain
        down(activation(up(x)))."""
        c, activation = self.cfg, ACTIVATIONS[self.cfg.activation]
        if c.mlp == "experts":
            logits = hook("router_logits", dense("BTD,DE->BTE", x, self.router))
            chosen = route(logits, c.experts_per_token, c.renormalise_experts)
            how = {"activation": activation, "mesh": mesh_of(self.up), "rows": BATCH_AXES, "product": PRODUCT}
            return expert_mlp(x, *chosen, self.gate, self.up, self.down, **how)
        if c.mlp == "gated":
            gate, up = dense("BTD,DF->BTF", x, self.gate), dense("BTD,DF->BTF", x, self.up)
            if c.mlp_bias:
                gate, up = gate + self.gate_bias, up + self.up_bias
            act = hook("mlp_act", activation(hook("mlp_pre", gate)) * up)
        else:
            up = dense("BTD,DF->BTF", x, self.up)
            act = hook("mlp_act", activation(hook("mlp_pre", up + self.up_bias if c.mlp_bias else up)))
        out = dense("BTF,FD->BTD", act, self.down)
        return out + self.down_bias if c.mlp_bias else out

    def __call__(self, x, rope, segments_of, hook):
        """segments_of(k, v) places the new keys and values and returns (segments to attend to, what to keep)."""
        x = hook("resid_pre", x)
        into_attn = self.normed("attn_norm", x)
        q, k, v = self.qkv(into_attn, rope)
        segments, keep = segments_of(k, v)
        attn_out = self.normed("attn_post_norm", constrain_rows(self.attend(q, segments, hook), self.o))
        mid = hook("resid_mid", x + hook("attn_out", attn_out))
        if self.cfg.block == "parallel_shared":
            into_mlp = into_attn
        else:
            into_mlp = self.normed("mlp_norm", x if self.cfg.block == "parallel" else mid, functools.partial(hook, "mlp_normalized"))
        mlp_out = self.normed("mlp_post_norm", constrain_rows(self.mlp(hook("mlp_in", into_mlp), hook), self.down))
        return hook("resid_post", mid + hook("mlp_out", mlp_out)), keep
