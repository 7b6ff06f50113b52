"""Fine-tuning a trained dictionary on what the model loses by it: the divergence of the spliced model from the clean one.

Trained on reconstruction alone, a dictionary spends latents on directions that the rest of the model hardly reads. A short end with the
divergence in the loss wins most of what end-to-end training (Braun et al. 2024) wins, at a small part of its cost (Karvonen 2025):

    kl_coefficient * KL(clean || spliced) + masked FVU + sparsity_coefficient * L1 penalty

A transcoder is spliced in, and its FVU measured, where it writes. Letters: B rows of tokens, T tokens, F d_sae.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

import models
from sae.architectures.relu import l1_penalty
from sae.base import Params
from sae.dictionary import Dictionary, architecture, decode, decode_topk, encode, encode_topk
from sae.errors import SAEError
from sae.harvest import blocks_needed, left_out, tap, token_batches
from sae.step import scale_of, typical_sizes, unit_rows, without_parallel


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a dictionary is fine-tuned end to end."""

    steps: int = 100  # updates
    batch_rows: int = 8  # rows of tokens an update
    context_size: int | None = None  # longer rows are cut; None: the dictionary's, or the model's
    learning_rate: float = 5e-5  # falls linearly to 0
    kl_coefficient: float = 1.0  # weight of the divergence, nats a predicted token
    fvu_coefficient: float = 1.0  # weight of the fraction of variance unexplained
    sparsity_coefficient: float = 0.0  # weight of the L1 penalty ("relu")
    grad_clip: float = 1.0  # global norm; 0: none
    skip_first: int = 1  # positions at the beginning of each piece of a row at which the tap stays as it is
    drop_tokens: tuple[int, ...] = ()  # and these ids, wherever they stand
    seed: int = 0  # of the order of rows

    def __post_init__(self):
        for name in ("steps", "batch_rows"):
            if getattr(self, name) < 1:
                raise SAEError(f"SAE fine-tuning: {name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "kl_coefficient", "fvu_coefficient", "sparsity_coefficient", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SAEError(f"SAE fine-tuning: {name} is {getattr(self, name)}; give 0 or more")


def spliced_loss(
    sae_params: Params,
    sae_cfg: Any,
    cfg: Any,
    lm: Any,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    keep_BT: Bool[Array, "B T"],
    weights: dict[str, Array | float],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(loss, parts kl, fvu, l0) of a batch; positions in keep_BT are neither spliced nor counted in fvu. weights: "kl", "fvu", "sparsity"."""
    d = Dictionary(sae_params, sae_cfg)
    reads, place = sae_cfg.hook_name, sae_cfg.place
    real_BT = (jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]) & ~keep_BT
    forward = functools.partial(models.forward, cfg, lm, tokens_BT, lengths=lengths_B)
    clean = lax.stop_gradient(forward(taps=(reads, place)))
    x, target = (clean.taps[tap].astype(jnp.float32) for tap in (reads, place))
    if architecture(sae_cfg).encode_sparse is not None:
        values, indices = encode_topk(d, x)
        x_hat, penalty = decode_topk(d, values, indices, x), jnp.zeros(x.shape[:2])
    else:
        values = encode(d, x)
        penalty = l1_penalty(sae_params, values) if sae_cfg.architecture == "relu" else jnp.zeros(x.shape[:2])
        x_hat = decode(d, values, x)
    spliced = forward(interventions={place: lambda h: jnp.where(real_BT[..., None], x_hat.astype(h.dtype), h)})

    def divergence(inputs):  # a row at a time: the logits of a batch are large
        before_TD, after_TD, length = inputs
        first, second = (jax.nn.log_softmax(models.unembed(cfg, lm, h[:-1]).astype(jnp.float32), axis=-1) for h in (before_TD, after_TD))
        kl_T = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
        return jnp.sum(jnp.where(jnp.arange(1, tokens_BT.shape[1]) < length, kl_T, 0.0))

    predicted = jnp.maximum(jnp.sum(jnp.maximum(lengths_B - 1, 0)), 1)
    kl = jnp.sum(lax.map(jax.checkpoint(divergence), (clean.hidden, spliced.hidden, lengths_B))) / predicted
    real, count = real_BT[..., None], jnp.maximum(jnp.sum(real_BT), 1)
    mean = jnp.sum(jnp.where(real, target, 0.0), axis=(0, 1)) / count
    variance = jnp.sum(jnp.where(real, (target - mean) ** 2, 0.0)) / count
    fvu = jnp.sum(jnp.where(real, (target - x_hat) ** 2, 0.0)) / count / variance
    sparsity = jnp.sum(jnp.where(real_BT, penalty, 0.0)) / count / jnp.sqrt(variance)
    total = weights["kl"] * kl + weights["fvu"] * fvu + weights["sparsity"] * sparsity
    return total, {"kl": kl, "fvu": fvu, "l0": jnp.sum((values > 0) & real) / count}


@functools.partial(jax.jit, static_argnames=("sae_cfg", "cfg", "unit"), donate_argnames=("params", "moments"))
def finetune_step(params, moments, sae_cfg, cfg, lm, batch, weights, rate, clip, sizes, *, unit: bool):
    """One update: (parameters, Adam's moments, metrics). Thresholds stay; sizes: of `typical_sizes`; unit: decoder rows stay at norm 1."""
    objective = functools.partial(spliced_loss, sae_cfg=sae_cfg, cfg=cfg, lm=lm, weights=weights)
    tokens, lengths, keep = batch
    (value, parts), gradient = jax.value_and_grad(lambda p: objective(p, tokens_BT=tokens, lengths_B=lengths, keep_BT=keep), has_aux=True)(params)
    if unit:
        gradient["W_dec"] = without_parallel(gradient["W_dec"], params["W_dec"])
    gradient = {name: g * sizes[name] for name, g in gradient.items()}
    norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30)), gradient)
    updates, moments = optax.scale_by_adam().update(gradient, moments)
    new = {name: p - rate * sizes[name] * updates[name] for name, p in params.items()}
    if unit:
        new["W_dec"] = unit_rows(new["W_dec"])
    return new, moments, {"loss": value, **parts}


def finetune(
    d: Dictionary,
    cfg: Any,
    lm: Any,
    token_rows: Sequence[Sequence[int]],
    settings: FinetuneConfig,
    *,
    on_log: Callable[[dict[str, float]], None] | None = None,
    progress: bool | None = None,
) -> tuple[Dictionary, list[dict[str, float]]]:
    """Fine-tunes a trained dictionary on the model (cfg, lm) over `token_rows`: (dictionary, a record of each step).

    Best an fp32 one. Updates are measured in each parameter's own size, as in training, by the scale of the first batch. What decides
    whether latents fire and takes no gradient, thresholds and gates' biases, stays.
    Records hold step, loss, kl, fvu and l0. Decoder rows that all have norm 1 keep it. Raises SAEError for a dictionary that names no tap,
    too few tokens, and a loss that is not finite.
    """
    if d.cfg.hook_name is None or d.cfg.place is None:
        raise SAEError("SAE fine-tuning: the dictionary's config must name its tap (hook_name), a transcoder's both (hook_name_out)")
    if settings.sparsity_coefficient and d.cfg.architecture != "relu":
        raise SAEError(f"SAE fine-tuning: sparsity_coefficient is of 'relu' dictionaries; what a {d.cfg.architecture} one keeps is decided elsewhere")
    if blocks_needed(d.cfg.place) is None:
        raise SAEError(f"SAE fine-tuning: nothing of the model follows {d.cfg.place}; choose a tap inside it")
    context = min(settings.context_size or d.cfg.context_size or cfg.max_position, cfg.max_position)
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32), d.params)
    unit = bool(jnp.all(jnp.abs(jnp.linalg.norm(params["W_dec"], axis=1) - 1) < 1e-3))
    moments, batches, history = optax.scale_by_adam().init(params), _shuffled(token_rows, cfg, settings, context), []
    first = next(batches)
    batches = itertools.chain([first], batches)
    rows = _rows(d.cfg, cfg, lm, *first)
    if not len(rows):
        raise SAEError("SAE fine-tuning: skip_first and drop_tokens leave no token of the first batch")
    scale = scale_of(d.cfg, rows)
    sizes = typical_sizes(d.cfg, scale.unit, scale.unit_out)
    weights = {"kl": settings.kl_coefficient, "fvu": settings.fvu_coefficient, "sparsity": settings.sparsity_coefficient}
    hidden = None if progress is None else not progress
    for step in tqdm(range(settings.steps), desc="SAE end to end", unit="step", mininterval=0.5, disable=hidden):
        rate = settings.learning_rate * (1 - step / settings.steps)
        clip = settings.grad_clip or math.inf
        params, moments, metrics = finetune_step(params, moments, d.cfg, cfg, lm, next(batches), weights, rate, clip, sizes, unit=unit)
        record = {"step": step + 1} | {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(record["loss"]):
            raise SAEError(f"SAE fine-tuning: the loss is {record['loss']} at step {step + 1}; a smaller learning_rate may help")
        history.append(record)
        if on_log is not None:
            on_log(record)
    return Dictionary(jax.tree.map(lambda a: a.astype(d.cfg.dtype), params), d.cfg), history


def _rows(sae_cfg: Any, cfg: Any, lm: Any, tokens: np.ndarray, lengths: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """[n, d_in] activations ([x | y] of a transcoder) of the batch's tokens that the dictionary is for."""
    hooks = (sae_cfg.hook_name,) if sae_cfg.d_out is None else (sae_cfg.hook_name, sae_cfg.hook_name_out)
    real = (np.arange(tokens.shape[1]) < lengths[:, None]) & ~keep
    return np.asarray(tap(cfg, lm, tokens, lengths, hooks))[real]


def _shuffled(rows: Sequence[Sequence[int]], cfg: Any, settings: FinetuneConfig, context: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless (tokens, lengths, kept positions) of rows in a new order each epoch; rows of one token predict nothing and are left out."""
    usable = [row for row in rows if len(row) > 1]
    if len(usable) < settings.batch_rows:
        raise SAEError(f"SAE fine-tuning: {len(usable)} rows of two tokens or more are fewer than batch_rows {settings.batch_rows}")
    rng = np.random.default_rng(settings.seed)
    while True:
        order = rng.permutation(len(usable))
        for tokens, lengths, _ in token_batches((usable[i] for i in order), settings.batch_rows, context):
            if (lengths < 2).any():
                continue  # the last, short batch of an epoch, or the one-token end of a cut row
            yield tokens, lengths, left_out(tokens, settings.skip_first, settings.drop_tokens)
