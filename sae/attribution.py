"""Which latents a number of the model's output owes what: gradient times activation, and real ablation to check it.

The dictionary is spliced in with its error kept, h' = h + decode(z) - stop_gradient(decode(z)), so that the output stays the model's own
and the gradient goes through the latents. The score of latent f at token t is z_tf d metric / d z_tf: to first order what the metric
loses when that latent is ablated there (Marks et al. 2024, "Sparse feature circuits", equation 1, with zero as the other value). With
`steps` the gradient is the mean along the line from no latent to all (integrated gradients, Sundararajan et al. 2017), by the midpoint
rule; the scores then add up to the metric with all latents less the metric with none, as the number of steps grows. A transcoder's latents
are of what it reads, and h is what it writes. Nothing is left out of z: dense codes are made a piece of tokens at a time, twice.
Letters: B rows, T tokens, D d_in, E width of h, F d_sae, K latents told of a token, N items, V vocabulary.
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
from sae.base import matmul
from sae.dictionary import Dictionary, architecture, decode_topk, encode, encode_topk
from sae.errors import SAEError
from sae.interventions import FeatureEdit, ablate, intervene, on_output_scale

PIECE_BYTES = 64 << 20  # of the dense codes that are held at once
Metric = Callable[[Array], Array]


class Attribution(NamedTuple):
    """metric_B: the metric of each row, of the clean model. For each token the K latents with the largest absolute scores, in no order that
    matters: features_BTK, their activations_BTK (0 = an empty slot) and scores_BTK, in the metric's units; 0 where the token is padding or kept
    out. rest_BT: the sum of the scores of a token's other latents. totals_BF: every latent's score, added up over the row's tokens."""

    metric_B: Float[Array, " B"]
    features_BTK: Int[Array, "B T K"]
    activations_BTK: Float[Array, "B T K"]
    scores_BTK: Float[Array, "B T K"]
    rest_BT: Float[Array, "B T"]
    totals_BF: Float[Array, "B F"]

    def top(self, n: int, row: int = 0) -> list[dict[str, Any]]:
        """The n (token, latent) pairs of a row with the largest absolute score: token, feature, activation, score, largest first. They are
        those of all latents as long as no token has more than K among them."""
        features, activations, scores = (np.asarray(a[row]) for a in (self.features_BTK, self.activations_BTK, self.scores_BTK))
        order = np.argsort(-np.abs(scores), axis=None, kind="stable")[:n]
        places = [np.unravel_index(i, scores.shape) for i in order if scores.flat[i] != 0]
        return [
            {"token": int(at[0]), "feature": int(features[at]), "activation": float(activations[at]), "score": float(scores[at])} for at in places
        ]

    def top_features(self, n: int, row: int = 0) -> list[dict[str, Any]]:
        """The n latents of a row whose scores, added up over its tokens, are largest in absolute value: feature, score."""
        totals = np.asarray(self.totals_BF[row])
        order = np.argsort(-np.abs(totals), kind="stable")[:n]
        return [{"feature": int(i), "score": float(totals[i])} for i in order if totals[i] != 0]


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
    k: latents that are told of a token, by default the dictionary's own k, else 64. All are computed with: what the others are worth is
    in rest_BT and totals_BF.

    Raises SAEError for a dictionary without a hook_name (a transcoder: or hook_name_out), one of another width, steps below 0, k below 1, and
    a metric that does not give one number a row.
    """
    if d.cfg.hook_name is None or d.cfg.place is None:
        name = "hook_name" if d.cfg.hook_name is None else "hook_name_out"
        raise SAEError(f"attribute: the SAE's config names no {name}; set it to the tap it was trained on")
    if steps < 0:
        raise SAEError(f"attribute: steps is {steps}; give 0 for the plain gradient, or the number of points of integrated gradients")
    tokens = jnp.asarray(tokens_BT, jnp.int32)
    lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    if not every_position:
        positions = lengths - 1 if positions is None else jnp.asarray(positions, jnp.int32)
    metric = jax.tree_util.Partial(metric) if jax.tree_util.all_leaves([metric]) else metric
    own = (d.cfg.k or 0) if architecture(d.cfg).encode_sparse is not None else d.cfg.d_sae
    if k is not None and k < 1:
        raise SAEError(f"attribute: k is {k}; give the number of latents to tell of a token, 1 or more")
    return _attribute(cfg, params, d, tokens, lengths, positions, metric, jnp.int32(start), steps, min(k or (own if own < d.cfg.d_sae else 64), own))


@functools.partial(jax.jit, static_argnames=("cfg", "steps", "k"))
def _attribute(cfg, params, d, tokens_BT, lengths_B, positions_B, metric, start, steps, k) -> Attribution:
    run = functools.partial(_metric, cfg, params, d.cfg.place, tokens_BT, lengths_B, positions_B, metric)
    h_BTD = models.forward(cfg, params, tokens_BT, lengths=lengths_B, taps=(d.cfg.hook_name,)).taps[d.cfg.hook_name].astype(jnp.float32)
    place_T = jnp.arange(tokens_BT.shape[1])
    keep_BT = (place_T < lengths_B[:, None]) & (place_T >= start)
    sparse = architecture(d.cfg).encode_sparse is not None
    part_of, scores_of = _sparse_part if sparse else _dense_part, _sparse_scores if sparse else _dense_scores
    # What all latents together add at each token, and the gradient by what is added; a row at a time, since what they are made of is large.
    part_BTE = lax.map(lambda row: part_of(d, *row), (h_BTD, keep_BT))
    slope = jax.grad(lambda added, share: jnp.sum(run(lambda x: x + added - (1 - share) * part_BTE)))
    zero = jnp.zeros_like(part_BTE)
    if steps:
        shares = (jnp.arange(steps) + 0.5) / steps
        total, _ = lax.scan(lambda total, share: (total + slope(zero, share), None), zero, shares)
        g_BTE = total / steps
    else:
        g_BTE = slope(zero, jnp.float32(1.0))
    g_BTE = on_output_scale(d, g_BTE, h_BTD)  # a scale of each row, which is its own transpose
    return Attribution(run(None), *lax.map(lambda row: scores_of(d, k, *row), (h_BTD, keep_BT, g_BTE)))


def _sparse_code(d: Dictionary, h_TD: Array, keep_T: Array) -> tuple[Array, Array]:
    """The k latents of each token that take part: (activations, features), both [T, K]."""
    values, features = encode_topk(d, h_TD)
    return jnp.where(keep_T[:, None], values, 0.0), features


def _sparse_part(d: Dictionary, h_TD: Array, keep_T: Array) -> Float[Array, "T E"]:
    values, features = _sparse_code(d, h_TD, keep_T)
    return decode_topk(d, values, features, h_TD) - decode_topk(d, jnp.zeros_like(values), features, h_TD)


def _sparse_scores(d: Dictionary, k: int, h_TD: Array, keep_T: Array, g_TE: Array) -> tuple[Array, ...]:
    """(features, activations, scores, rest, totals) of a row's tokens, as in `Attribution`."""
    values, features = _sparse_code(d, h_TD, keep_T)
    scores = values * jnp.einsum("te,tke->tk", g_TE, d.params["W_dec"][features].astype(jnp.float32))
    totals = jnp.zeros(d.cfg.d_sae).at[features].add(scores)
    places = lax.top_k(jnp.abs(scores), k)[1]
    told = tuple(jnp.take_along_axis(a, places, axis=1) for a in (features, values, scores))
    return *told, jnp.sum(scores, axis=1) - jnp.sum(told[2], axis=1), totals


def _pieces(d: Dictionary, *arrays: Array) -> tuple[int, tuple[Array, ...]]:
    """(T, the arrays [T, ...] cut into pieces [n, tokens, ...] whose dense codes stay within PIECE_BYTES, zeros behind the last token)."""
    T = len(arrays[0])
    tokens = max(1, min(T, PIECE_BYTES // (4 * d.cfg.d_sae)))
    fill = -T % tokens
    return T, tuple(jnp.pad(a, ((0, fill), *((0, 0),) * (a.ndim - 1))).reshape(-1, tokens, *a.shape[1:]) for a in arrays)


def _whole(T: int, pieces: Array) -> Array:
    return pieces.reshape(-1, *pieces.shape[2:])[:T]


def _dense_part(d: Dictionary, h_TD: Array, keep_T: Array) -> Float[Array, "T E"]:
    T, pieces = _pieces(d, h_TD, keep_T)

    def part(piece):
        h, keep = piece
        return on_output_scale(d, matmul(jnp.where(keep[:, None], encode(d, h), 0.0), d.params["W_dec"]), h)

    return _whole(T, lax.map(part, pieces))


def _dense_scores(d: Dictionary, k: int, h_TD: Array, keep_T: Array, g_TE: Array) -> tuple[Array, ...]:
    """`_sparse_scores` of a dense code."""
    T, pieces = _pieces(d, h_TD, keep_T, g_TE)

    def piece(totals_F, given):
        h, keep, g = given
        z = jnp.where(keep[:, None], encode(d, h), 0.0)
        scores = z * (g @ d.params["W_dec"].astype(jnp.float32).T)
        places = lax.top_k(jnp.abs(scores), k)[1]
        told = tuple(jnp.take_along_axis(a, places, axis=1) for a in (z, scores))
        return totals_F + jnp.sum(scores, axis=0), (places, *told, jnp.sum(scores, axis=1) - jnp.sum(told[1], axis=1))

    totals_F, told = lax.scan(piece, jnp.zeros(d.cfg.d_sae), pieces)
    return *(_whole(T, a) for a in told), totals_F


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
    start: int = 0,
) -> np.ndarray:
    """[N] what the metric of one text really loses when a latent is ablated: metric(clean) - metric(ablated), each by a pass of its own.

    features: [N] latents; places: [N] the token of each, or None: at every token from `start` on. The model's error term is kept (see
    `sae.interventions`). metric and position: as of `attribute`, for this one row. Raises what `intervene` raises.
    """
    features = np.atleast_1d(np.asarray(features, np.int32))
    if not len(features):
        return np.zeros(0, np.float32)
    tokens = jnp.asarray(tokens_T, jnp.int32)[None]
    T = tokens.shape[1]
    intervene(d, [ablate(int(f)) for f in np.unique(features)])  # checks them all
    one_hot = np.tile(np.arange(T) >= start, (len(features), 1)) if places is None else np.arange(T) == np.asarray(places)[:, None]
    positions = None if every_position else jnp.array([T - 1 if position is None else position], jnp.int32)
    metric = jax.tree_util.Partial(metric) if jax.tree_util.all_leaves([metric]) else metric
    edit = intervene(d, ablate(0), mask=one_hot[0])
    return np.asarray(_ablations(cfg, params, edit, tokens, positions, metric, jnp.asarray(features), jnp.asarray(one_hot)))


@functools.partial(jax.jit, static_argnames="cfg")
def _ablations(cfg, params, edit: FeatureEdit, tokens_1T, positions, metric, features_N, masks_NT) -> Array:
    lengths = jnp.array([tokens_1T.shape[1]], jnp.int32)
    run = functools.partial(_metric, cfg, params, edit.dictionary.cfg.place, tokens_1T, lengths, positions, metric)
    clean = run(None)[0]
    return lax.map(lambda item: clean - run(edit.replace(features_N=item[0][None], mask=item[1]))[0], (features_N, masks_NT))
