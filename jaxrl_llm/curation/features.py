"""Texts to pooled feature vectors: one jitted program for model, SAE and pooling.

For each padded width the program runs the blocks up to the tap, encodes every token with each dictionary, and pools over the
row's tokens, so that no token's activations leave the device. A trained SAE, a randomly initialised one and the dense
activations (the controls that SAERL needs) come out of the same pass.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
import sae
from jaxrl_llm.curation.streaming import Results, run_sharded
from jaxrl_llm.errors import UserError
from models.taps import parse_name, width_of
from sae.harvest import blocks_needed

POOLINGS = ("max_log1p", "max", "mean", "last")
DENSE = ("dense_mean", "dense_max", "dense_last")


def middle_hook(cfg: models.ModelConfig) -> str:
    """The residual stream after the middle block (28 blocks: block 14), SAERL's place."""
    return f"blocks.{min(cfg.n_layers // 2, cfg.n_layers - 1)}.resid_post"


def hook_width(cfg: models.ModelConfig, hook: str) -> int:
    """Width of the activation at `hook`. Raises ModelError for an unknown tap, UserError for one that is no vector a token."""
    kind, _ = parse_name(cfg, hook, "tap")
    if kind == "attn_probs":
        raise UserError(f"features: {hook} is no vector a token; choose another tap")
    return width_of(cfg, kind)


def choose_hook(cfg: models.ModelConfig, dictionaries: Mapping[str, sae.Dictionary], hook: str | None = None) -> str:
    """The tap that all `dictionaries` read: `hook`, or what they record; the middle block's residual where there are none.

    Raises UserError where it is unknown, where they record different ones, where `hook` is another than theirs (a dictionary says
    nothing of activations that it was not trained on; who means it writes the new `hook_name` into the dictionary), and where a
    dictionary's d_in is not the width there.
    """
    own = {name: d.cfg.hook_name for name, d in dictionaries.items()}
    for name, theirs in own.items():
        if not (theirs or hook):
            raise UserError(f"features: {name} does not record the tap that it was trained on: name it (hook), such as {middle_hook(cfg)}")
        if hook and theirs and theirs != hook:
            raise UserError(
                f"features: hook is {hook}, but {name} was trained on {theirs}: leave hook empty; to read another place on purpose, set "
                "hook_name in the dictionary's config (sae.json or cfg.json, or d.replace(cfg=d.cfg.replace(hook_name=...)))"
            )
    if not hook and len(set(own.values())) > 1:
        told = ", ".join(f"{name} {theirs}" for name, theirs in own.items())
        raise UserError(f"features: the dictionaries were trained on different taps ({told}): extract the features of each alone")
    hook = hook or next(iter(own.values()), None) or middle_hook(cfg)
    width = hook_width(cfg, hook)
    for name, d in dictionaries.items():
        if d.cfg.d_in != width:
            trained = f" ({d.cfg.model_name})" if d.cfg.model_name else ""
            raise UserError(
                f"features: {name} reads activations of width {d.cfg.d_in}, this model's {hook} has {width}; "
                f"give the model that the SAE was trained on{trained} as the feature model"
            )
    return hook


def same_model(one: str, other: str) -> bool:
    """Whether two names (folder, hub id, "id@revision") may be of one model: the same folder, or else the same last part."""
    a, b = Path(one), Path(other)
    if a.is_dir() and b.is_dir():
        return a.samefile(b)
    return a.name.partition("@")[0] == b.name.partition("@")[0]


def tell_transfer(dictionaries: Iterable[sae.Dictionary], model: str) -> None:
    """A line on standard error for each model that dictionaries record and that is another than `model` (of equal width no shape tells)."""
    if jax.process_index() == 0:
        for other in sorted({d.cfg.model_name for d in dictionaries if d.cfg.model_name and not same_model(d.cfg.model_name, model)}):
            _tell_transfer(other, model)


@functools.cache  # each pair is told once, however many passes there are
def _tell_transfer(sae_model: str, model: str) -> None:
    print(f"warning: the SAE was trained on {sae_model}, the model here is {model}: its latents are used as they are", file=sys.stderr)


@functools.partial(jax.jit, static_argnames=("cfg", "hook", "pooling", "dense", "replicate"))
def pool(cfg, params, dictionaries, tokens_BT, lengths_B, starts_B, *, hook, pooling, dense, replicate=None) -> dict[str, jax.Array]:
    """Pooled vectors of one batch of rows.

    tokens_BT: int32, right-padded; rows count from starts_B (0, or 1 to leave out a beginning-of-text token) to lengths_B.
    dictionaries: name -> sae.Dictionary, each gives [B, d_sae]; dense: names of DENSE, each gives [B, D].
    pooling of latents over a row's tokens: "max_log1p" = log(1 + max), "max", "mean", "last". Rows without tokens give zeros.
    replicate: a sharding for the results (all processes then see them whole).
    """
    out = models.forward(cfg, params, tokens_BT, lengths=lengths_B, taps=(hook,), stop_at=blocks_needed(hook))
    x_BTD = out.taps[hook].astype(jnp.float32)
    position_T = jnp.arange(tokens_BT.shape[1])
    mask_BT = (position_T < lengths_B[:, None]) & (position_T >= starts_B[:, None])
    last_B = jnp.maximum(lengths_B - 1, 0)
    if pooling == "last":
        mask_BT &= position_T == last_B[:, None]
    count_B = jnp.maximum(mask_BT.sum(axis=1), 1)
    pooled = {name: _pool_latents(d, x_BTD, mask_BT, count_B, pooling) for name, d in dictionaries.items()}
    counts_BT = (position_T < lengths_B[:, None]) & (position_T >= starts_B[:, None])
    for name in dense:
        pooled[name] = _pool_dense(x_BTD, counts_BT, last_B, name)
    return pooled if replicate is None else jax.lax.with_sharding_constraint(pooled, replicate)


def _pool_latents(d: sae.Dictionary, x_BTD, mask_BT, count_B, pooling: str) -> jax.Array:
    if d.cfg.k:  # few latents a token: scatter them into the row's vector
        values_BTK, indices_BTK = sae.encode_topk(d, x_BTD)
        values_BTK = jnp.where(mask_BT[..., None], values_BTK, 0.0)

        def scatter(values_TK, indices_TK):
            zero = jnp.zeros(d.cfg.d_sae, jnp.float32).at[indices_TK.ravel()]
            return zero.add(values_TK.ravel()) if pooling == "mean" else zero.max(values_TK.ravel())

        pooled_BF = jax.vmap(scatter)(values_BTK, indices_BTK)
    else:  # dense code: a row's [T, d_sae] at a time

        def reduce(row):
            z_TF = jnp.where(row[1][:, None], sae.encode(d, row[0]), 0.0)
            return z_TF.sum(axis=0) if pooling == "mean" else z_TF.max(axis=0)

        pooled_BF = jax.lax.map(reduce, (x_BTD, mask_BT))
    if pooling == "mean":
        return pooled_BF / count_B[:, None]
    return jnp.log1p(jnp.maximum(pooled_BF, 0.0)) if pooling == "max_log1p" else pooled_BF


def _pool_dense(x_BTD, mask_BT, last_B, name: str) -> jax.Array:
    if name == "dense_last":
        last_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
        return jnp.where(mask_BT.any(axis=1)[:, None], last_BD, 0.0)
    if name == "dense_mean":
        return jnp.where(mask_BT[..., None], x_BTD, 0.0).sum(axis=1) / jnp.maximum(mask_BT.sum(axis=1), 1)[:, None]
    most_BD = jnp.where(mask_BT[..., None], x_BTD, -jnp.inf).max(axis=1)
    return jnp.where(mask_BT.any(axis=1)[:, None], most_BD, 0.0)


@dataclass
class FeatureProgram:
    """The program of `extract_features` (streaming.Program)."""

    cfg: models.ModelConfig
    params: Any
    dictionaries: dict[str, sae.Dictionary]
    hook: str
    pooling: str = "max_log1p"
    dense: tuple[str, ...] = ("dense_mean", "dense_max")
    context: int = 0
    bos: int | None = None
    mesh: Any = None
    sparse: tuple[str, ...] = field(init=False)
    merge: dict[str, str] = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise UserError(f"features: no pooling {self.pooling!r}; one of {', '.join(POOLINGS)}")
        unknown = [name for name in self.dense if name not in DENSE]
        if unknown:
            raise UserError(f"features: no dense features {unknown[0]!r}; some of {', '.join(DENSE)}")
        choose_hook(self.cfg, self.dictionaries, self.hook)
        limit = self.cfg.max_position
        self.context = min(self.context or limit, limit)
        self.sparse = tuple(self.dictionaries)
        how = {"mean": "mean", "last": "last"}.get(self.pooling, "max")
        self.merge = dict.fromkeys(self.dictionaries, how) | {name: name.removeprefix("dense_") for name in self.dense}
        described = (repr(self.cfg), self.hook, self.pooling, self.context, self.bos, self.dense, list(self.dictionaries))
        digest = hashlib.blake2b(repr(described).encode(), digest_size=8)
        digest.update(tree_fingerprint((self.params, self.dictionaries)).encode())
        self.fingerprint = digest.hexdigest()

    def widths(self) -> dict[str, int]:
        return {name: d.cfg.d_sae for name, d in self.dictionaries.items()} | dict.fromkeys(self.dense, hook_width(self.cfg, self.hook))

    def __call__(self, tokens_BT, lengths_B, starts_B, marks_B):
        replicate = None
        if self.mesh is not None:
            from models.sharding import replicated

            replicate = replicated(self.mesh)
        return pool(
            self.cfg, self.params, self.dictionaries, tokens_BT, lengths_B, starts_B,
            hook=self.hook, pooling=self.pooling, dense=self.dense, replicate=replicate,
        )  # fmt: skip


def extract_features(
    cfg: models.ModelConfig,
    params: Any,
    dictionaries: Mapping[str, sae.Dictionary],
    tokens: Sequence[Sequence[int]] | Callable[[int, int], list[list[int]]],
    n: int | None = None,
    *,
    hook: str | None = None,
    pooling: str = "max_log1p",
    dense: Sequence[str] = ("dense_mean", "dense_max"),
    context: int | None = None,
    mesh: Any = None,
    model_name: str | None = None,
    **run_options,
) -> Results:
    """Pooled features of N rows under a feature model (which need not be the policy).

    tokens: token lists, or a function (a, b) -> token lists of rows a..b with `n` rows in all (nothing is then held). A first
    token equal to cfg.bos_token_id is run but not pooled. hook: the tap; by default the SAE's own (see choose_hook). context:
    longest piece run at once, at most the model's. model_name: of the feature model; where the SAE records another one, a line on
    standard error says so, once (SAEs may be used on another model on purpose). run_options: of streaming.run_sharded (folder,
    overflow, shard_rows, batch_tokens, progress).

    Results has a CSR output for each dictionary by its name and dense outputs by theirs. Raises UserError where the SAE and
    the model do not fit together.
    """
    hook = choose_hook(cfg, dictionaries, hook)
    if model_name:
        tell_transfer(dictionaries.values(), model_name)
    program = FeatureProgram(cfg, params, dict(dictionaries), hook, pooling, tuple(dense), context or 0, cfg.bos_token_id, mesh)
    n = len(tokens) if n is None else n

    def tokens_of(a: int, b: int):
        rows = tokens(a, b) if callable(tokens) else tokens[a:b]
        return rows, [0] * len(rows)

    return run_sharded(program, n, tokens_of, mesh=mesh, **run_options)


def random_dictionary(like: sae.Dictionary, seed: int = 0) -> sae.Dictionary:
    """A dictionary of the same shape and centre (decoder bias) as `like` that was never trained: the control that asks whether
    training the directions mattered."""
    drawn = sae.init(like.cfg, jax.random.key(seed))
    return drawn.replace(params=drawn.params | {"b_dec": like.params["b_dec"]})


def tree_fingerprint(tree: Any, sample: int = 4096) -> str:
    """16 hex digits of a pytree's paths, shapes, dtypes and `sample` evenly spaced values of each leaf. Cheap on large models, and
    any training step changes it."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        flat = leaf.reshape(-1)
        values = np.asarray(flat[:: max(1, flat.shape[0] // sample)])
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + values.tobytes())
    return digest.hexdigest()
