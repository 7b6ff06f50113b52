"""Which latents a number of the model's output owes what: gradient times activation, and real ablation to check it.

The dictionary is spliced in with its error kept, h' = h + decode(z) - stop_gradient(decode(z)), so that the output stays the model's own
and the gradient goes through the latents. The score of latent f at token t is z_tf d metric / d z_tf: to first order what the metric
loses when that latent is ablated there (Marks et al. 2024, "Sparse feature circuits", equation 1, with zero as the other value). With
`steps` the gradient is the mean along the line from no latent to all (integrated gradients, Sundararajan et al. 2017), by the midpoint
rule; the scores then add up to the metric with all latents less the metric with none, as the number of steps grows.
Letters: B rows, T tokens, D d_in, F d_sae, K latents a token, N items, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

import models
from sae.dictionary import Dictionary, architecture, decode_topk, encode_topk
from sae.errors import SAEError
from sae.interventions import FeatureEdit, ablate, intervene, on_input_scale, writes_elsewhere

Metric = Callable[[Array], Array]


class Attribution(NamedTuple):
    """metric_B: the metric of each row, of the clean model. For each token its K most active latents, in no order that matters: features_BTK,
    their activations_BTK (0 = an empty slot) and scores_BTK, in the metric's units; 0 where the token is padding or kept out."""

    metric_B: Float[Array, " B"]
    features_BTK: Int[Array, "B T K"]
    activations_BTK: Float[Array, "B T K"]
    scores_BTK: Float[Array, "B T K"]

    def top(self, n: int, row: int = 0) -> list[dict[str, Any]]:
        """The n (token, latent) pairs of a row with the largest absolute score: token, feature, activation, score, largest first."""
        features, activations, scores = (np.asarray(a[row]) for a in self[1:])
        order = np.argsort(-np.abs(scores), axis=None, kind="stable")[:n]
        places = [np.unravel_index(i, scores.shape) for i in order if scores.flat[i] != 0]
        return [
            {"token": int(at[0]), "feature": int(features[at]), "activation": float(activations[at]), "score": float(scores[at])} for at in places
        ]

    def top_features(self, n: int, row: int = 0) -> list[dict[str, Any]]:
        """The n latents of a row whose scores, added up over its tokens, are largest in absolute value: feature, score."""
        ids, inverse = np.unique(np.asarray(self.features_BTK[row]), return_inverse=True)
        sums = np.bincount(inverse.reshape(-1), np.asarray(self.scores_BTK[row], np.float64).reshape(-1), len(ids))
        order = np.argsort(-np.abs(sums), kind="stable")[:n]
        return [{"feature": int(ids[i]), "score": float(sums[i])} for i in order if sums[i] != 0]


def logit_difference(tokens: Any, others: Any) -> Metric:
    """The metric logit(tokens) - logit(others) of logits [B, V]; tokens and others are ids, one for all rows or one a row.

    A pytree: other ids need no new compilation.
    """
    return jax.tree_util.Partial(_logit_difference, jnp.asarray(tokens, jnp.int32), jnp.asarray(others, jnp.int32))


def _logit_difference(tokens, others, logits_BV):
    pick = lambda ids: jnp.take_along_axis(logits_BV, jnp.broadcast_to(ids, logits_BV.shape[:1])[:, None], axis=1)[:, 0]  # noqa: E731
    return pick(tokens) - pick(others)


def attribute(
    cfg: Any,
    params: Any,
    d: Dictionary,
    tokens_BT: Int[Array, "B T"],
    metric: Metric,
    *,
    lengths: Int[Array, " B"] | None = None,
    positions: Int[Array, " B"] | None = None,
    every_position: bool = False,
    start: int = 0,
    steps: int = 0,
    k: int | None = None,
) -> Attribution:
    """Scores of every token's latents for a metric of the logits.

    cfg, params: of the model; d: its dictionary, whose cfg.hook_name is the place. tokens_BT are right-padded, `lengths` their lengths.
    metric: a function of the fp32 logits [B, V] at `positions` (default: each row's last token), or of all of them [B, T, V] with
    every_position, that gives one number a row, which may depend on its own row only. A plain function is compiled once for each object, a
    `jax.tree_util.Partial` once for each structure. start: tokens before it have no scores (1: the beginning-of-text token, without
    which dictionaries are trained). steps: 0 = the gradient at the model's own activations; n = integrated gradients with n points.
    k: latents a token; by default the dictionary's own k, else 64: what is less active is left out.

    Raises SAEError for a dictionary without a hook_name, one that writes another activation than it reads, one of another width, steps
    below 0, and a metric that does not give one number a row.
    """
    if d.cfg.hook_name is None:
        raise SAEError("attribute: the SAE's config names no hook_name; set it to the tap it was trained on")
    if writes_elsewhere(d):
        raise SAEError("attribute: this dictionary reads one activation and writes another; its latents cannot be spliced in at one place")
    if steps < 0:
        raise SAEError(f"attribute: steps is {steps}; give 0 for the plain gradient, or the number of points of integrated gradients")
    tokens = jnp.asarray(tokens_BT, jnp.int32)
    lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    if not every_position:
        positions = lengths - 1 if positions is None else jnp.asarray(positions, jnp.int32)
    metric = jax.tree_util.Partial(metric) if jax.tree_util.all_leaves([metric]) else metric
    k = k or (d.cfg.k if architecture(d.cfg).encode_sparse is not None else min(64, d.cfg.d_sae))
    return _attribute(cfg, params, d, tokens, lengths, positions, metric, jnp.int32(start), steps, k)


@functools.partial(jax.jit, static_argnames=("cfg", "steps", "k"))
def _attribute(cfg, params, d, tokens_BT, lengths_B, positions_B, metric, start, steps, k) -> Attribution:
    run = functools.partial(_metric, cfg, params, d.cfg.hook_name, tokens_BT, lengths_B, positions_B, metric)
    h_BTD = models.forward(cfg, params, tokens_BT, lengths=lengths_B, taps=(d.cfg.hook_name,)).taps[d.cfg.hook_name].astype(jnp.float32)
    values, features = encode_topk(d, h_BTD, k)
    place_T = jnp.arange(tokens_BT.shape[1])
    keep_BT = (place_T < lengths_B[:, None]) & (place_T >= start)
    values = jnp.where(keep_BT[..., None], values, 0.0)
    # What all latents together add at each token, and the gradient by what is added.
    part = lambda row: decode_topk(d, *row) - decode_topk(d, jnp.zeros_like(row[0]), *row[1:])  # noqa: E731
    part_BTD = lax.map(part, (values, features, h_BTD))  # a row at a time: K decoder rows a token are large
    slope = jax.grad(lambda added, share: jnp.sum(run(lambda x: x + added - (1 - share) * part_BTD)))
    zero = jnp.zeros_like(h_BTD)
    if steps:
        shares = (jnp.arange(steps) + 0.5) / steps
        total, _ = lax.scan(lambda total, share: (total + slope(zero, share), None), zero, shares)
        g_BTD = total / steps
    else:
        g_BTD = slope(zero, jnp.float32(1.0))
    g_BTD = on_input_scale(d, g_BTD, h_BTD)  # a scale of each row, which is its own transpose
    slopes = lambda row: jnp.einsum("td,tkd->tk", row[0], d.params["W_dec"][row[1]].astype(jnp.float32))  # noqa: E731
    return Attribution(run(None), features, values, values * lax.map(slopes, (g_BTD, features)))


def _metric(cfg, params, hook, tokens_BT, lengths_B, positions_B, metric, edit) -> Array:
    """The metric [B] with an edit (or None) at the hook."""
    edits = None if edit is None else {hook: edit}
    hidden = models.forward(cfg, params, tokens_BT, lengths=lengths_B, interventions=edits).hidden
    if positions_B is not None:
        hidden = jnp.take_along_axis(hidden, positions_B[:, None, None], axis=1)[:, 0]
    found = metric(models.unembed(cfg, params, hidden))
    if found.shape != tokens_BT.shape[:1]:
        raise SAEError(f"attribute: the metric gives shape {found.shape} of {len(tokens_BT)} rows; give one number a row")
    return found


def ablation_effects(
    cfg: Any,
    params: Any,
    d: Dictionary,
    tokens_T: Int[Array, " T"],
    metric: Metric,
    features: Any,
    places: Any = None,
    *,
    position: int | None = None,
    every_position: bool = False,
) -> np.ndarray:
    """[N] what the metric of one text really loses when a latent is ablated: metric(clean) - metric(ablated), each by a pass of its own.

    features: [N] latents; places: [N] the token of each, or None: at every token. The model's error term is kept (see
    `sae.interventions`). metric and position: as of `attribute`, for this one row. Raises what `intervene` raises.
    """
    features = np.atleast_1d(np.asarray(features, np.int32))
    if not len(features):
        return np.zeros(0, np.float32)
    tokens = jnp.asarray(tokens_T, jnp.int32)[None]
    T = tokens.shape[1]
    intervene(d, [ablate(int(f)) for f in np.unique(features)])  # checks them all
    one_hot = np.ones((len(features), T), bool) if places is None else np.arange(T) == np.asarray(places)[:, None]
    positions = None if every_position else jnp.array([T - 1 if position is None else position], jnp.int32)
    metric = jax.tree_util.Partial(metric) if jax.tree_util.all_leaves([metric]) else metric
    edit = intervene(d, ablate(0), mask=one_hot[0])
    return np.asarray(_ablations(cfg, params, edit, tokens, positions, metric, jnp.asarray(features), jnp.asarray(one_hot)))


@functools.partial(jax.jit, static_argnames="cfg")
def _ablations(cfg, params, edit: FeatureEdit, tokens_1T, positions, metric, features_N, masks_NT) -> Array:
    lengths = jnp.array([tokens_1T.shape[1]], jnp.int32)
    run = functools.partial(_metric, cfg, params, edit.dictionary.cfg.hook_name, tokens_1T, lengths, positions, metric)
    clean = run(None)[0]
    return lax.map(lambda item: clean - run(edit.replace(features_N=item[0][None], mask=item[1]))[0], (features_N, masks_NT))
