"""Losses on preferences: pairs (chosen, rejected) or single labelled completions. Arrays in, (loss, metrics) out.

Sources: DPO, Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); conservative DPO, its appendix and Mitchell 2023, "A note on DPO with noisy
preferences"; robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409, eq. 10); hinge, SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425); IPO,
Azar et al. 2023 (arXiv 2310.12036, eq. 17); SimPO, Meng et al. 2024 (arXiv 2405.14734, eq. 6); ORPO, Hong et al. 2024
(arXiv 2403.07691, eq. 6-7); KTO, Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 7-8). Every value equals TRL 1.16's on the same
log-probabilities (tests/losses/test_preference_golden.py); where the paper and TRL differ, the function says which it follows.

All of them take a completion's summed log-probability and its length, so that a whole data set's are a few numbers a row: references are
computed once and kept, and held-out figures are one call. Axis 2 of a pair is (chosen, rejected). A pair with an empty completion is
padding: it contributes nothing and is counted nowhere. Losses and metrics are means over pairs (or rows); with `totals` of the whole
batch, those of micro-batches sum to the batch's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DPO_KINDS = ("sigmoid", "robust", "hinge", "ipo")
# Closer to certainty than this (nats a token), ORPO's log(1 - p) is lost in fp32; the odds stop growing there.
MIN_NATS = 1e-6


class PairTotals(NamedTuple):
    """Counts over the whole batch of an update."""

    pairs: Float[Array, ""]  # pairs with two completions
    chosen_tokens: Float[Array, ""]  # of those pairs' chosen completions


class RowTotals(NamedTuple):
    """Counts over the whole batch of a KTO update."""

    desirable: Float[Array, ""]
    undesirable: Float[Array, ""]


def sequence_logprobs(logps: Float[Array, "*rows seq"], mask: Bool[Array, "*rows seq"]) -> tuple[Float[Array, "*rows"], Int[Array, "*rows"]]:
    """(sum of the unmasked log-probabilities of each row in nats, number of them); what stands under the mask may be rubbish."""
    mask = mask.astype(bool)
    return jnp.sum(jnp.where(mask, logps, 0.0), axis=-1), jnp.sum(mask, axis=-1)


def pair_totals(lengths_P2: Int[Array, "pairs 2"]) -> PairTotals:
    """Counts of the pairs that are no padding."""
    valid_P = (lengths_P2 > 0).all(axis=-1)
    tokens = jnp.sum(jnp.where(valid_P, lengths_P2[:, 0], 0), dtype=jnp.float32)
    return PairTotals(jnp.sum(valid_P, dtype=jnp.float32), tokens)


def row_totals(lengths_B: Int[Array, "rows"], labels_B: Bool[Array, "rows"]) -> RowTotals:
    """Counts of desirable and undesirable rows; rows of length 0 are padding."""
    valid_B, labels_B = lengths_B > 0, labels_B.astype(bool)
    return RowTotals(jnp.sum(valid_B & labels_B, dtype=jnp.float32), jnp.sum(valid_B & ~labels_B, dtype=jnp.float32))


def dpo_loss(
    sums_P2: Float[Array, "pairs 2"],
    lengths_P2: Int[Array, "pairs 2"],
    ref_sums_P2: Float[Array, "pairs 2"] | None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    totals: PairTotals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """DPO and its relatives on the difference d of the log-ratios log p - log r of chosen and rejected, r the reference.

    kind: "sigmoid" -log s(beta d), or with label_smoothing e (the share of labels taken to be flipped, below 0.5) the conservative
    -(1 - e) log s(beta d) - e log s(-beta d); "robust" (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e), unbiased under flips;
    "hinge" max(0, 1 - beta d); "ipo" (d' - 1 / (2 beta))^2, where d' is the difference of log-ratios per token, as in TRL: the paper
    writes sums, its authors' results are those of means. ref_sums_P2: None is reference-free, a reference that is the same everywhere.
    Metrics: "margin" (mean of implicit reward chosen - rejected), "accuracy" (share of pairs with a margin above 0, a tie counts half:
    TRL counts it as wrong), "implicit_chosen", "implicit_rejected" (beta x log-ratio), "logp_chosen", "logp_rejected" (sums, nats).
    """
    if kind not in DPO_KINDS:
        raise ValueError(f"dpo_loss: kind must be one of {DPO_KINDS}, got {kind!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo_loss: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    valid_P, sums_P2, totals = _pairs(sums_P2, lengths_P2, totals)
    ratios_P2 = sums_P2
    if ref_sums_P2 is not None:
        ratios_P2 = sums_P2 - jax.lax.stop_gradient(jnp.where(valid_P[:, None], ref_sums_P2, 0.0))
    if kind == "ipo":
        loss_P = (_difference(ratios_P2 / jnp.maximum(lengths_P2, 1)) - 1 / (2 * beta)) ** 2
    elif kind == "hinge":
        loss_P = jax.nn.relu(1 - beta * _difference(ratios_P2))
    elif kind == "robust":
        right_P, flipped_P = _log_sigmoids(beta * _difference(ratios_P2))
        loss_P = (-(1 - label_smoothing) * right_P + label_smoothing * flipped_P) / (1 - 2 * label_smoothing)
    else:
        loss_P = _smoothed(beta * _difference(ratios_P2), label_smoothing)
    return _mean(loss_P, valid_P, totals), _pair_metrics(beta * ratios_P2, sums_P2, valid_P, totals)


def simpo_loss(
    sums_P2: Float[Array, "pairs 2"],
    lengths_P2: Int[Array, "pairs 2"],
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    totals: PairTotals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """-log s(beta d - gamma), d the difference of the mean log-probabilities a token: no reference. gamma: the margin asked for.

    label_smoothing as in `dpo_loss`. Metrics as there; the implicit reward is beta x mean log-probability.
    """
    valid_P, sums_P2, totals = _pairs(sums_P2, lengths_P2, totals)
    means_P2 = sums_P2 / jnp.maximum(lengths_P2, 1)
    loss_P = _smoothed(beta * _difference(means_P2) - gamma, label_smoothing)
    return _mean(loss_P, valid_P, totals), _pair_metrics(beta * means_P2, sums_P2, valid_P, totals)


def orpo_loss(
    sums_P2: Float[Array, "pairs 2"],
    lengths_P2: Int[Array, "pairs 2"],
    *,
    beta: float = 0.1,
    totals: PairTotals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """NLL of the chosen completions (mean over the batch's tokens) - beta x log s(log odds ratio): no reference.

    The odds of a completion are p / (1 - p) of p = exp(mean log-probability a token); beta is the paper's lambda. The NLL is over the
    completion, as in the paper; TRL counts the prompt's tokens too. Metrics: those of `dpo_loss` with the implicit reward
    beta x mean log-probability, "nll" (nats a token) and "log_odds" (mean of the log odds ratio).
    """
    valid_P, sums_P2, totals = _pairs(sums_P2, lengths_P2, totals)
    means_P2 = jnp.where(valid_P[:, None], sums_P2 / jnp.maximum(lengths_P2, 1), -1.0)
    log_odds_P = _difference(means_P2) - _difference(_log1mexp(jnp.minimum(means_P2, -MIN_NATS)))
    nll = -jnp.sum(sums_P2[:, 0]) / jnp.maximum(totals.chosen_tokens, 1.0)
    loss = nll - beta * _mean(jax.nn.log_sigmoid(log_odds_P), valid_P, totals)
    metrics = _pair_metrics(beta * means_P2, sums_P2, valid_P, totals)
    return loss, metrics | jax.lax.stop_gradient({"nll": nll, "log_odds": _mean(log_odds_P, valid_P, totals)})


def kto_baseline(sums_B: Float[Array, "rows"], lengths_B: Int[Array, "rows"], ref_sums_B: Float[Array, "rows"]) -> Float[Array, ""]:
    """The batch's estimate of KL(policy || reference), the point that KTO measures gains and losses from: the mean log-ratio of
    completions under prompts that they do not belong to, not below 0. No gradient flows through it."""
    valid_B = lengths_B > 0
    ratio_B = jnp.where(valid_B, sums_B - ref_sums_B, 0.0)
    return jax.lax.stop_gradient(jnp.maximum(jnp.sum(ratio_B) / jnp.maximum(jnp.sum(valid_B), 1), 0.0))


def kto_loss(
    sums_B: Float[Array, "rows"],
    lengths_B: Int[Array, "rows"],
    ref_sums_B: Float[Array, "rows"],
    labels_B: Bool[Array, "rows"],
    baseline: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    totals: RowTotals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w (1 - s(beta (log-ratio - baseline))) over desirable rows, with the sign turned in s over undesirable ones.

    labels_B: True = desirable. baseline: of `kto_baseline` over the whole batch. Metrics: "accuracy" (share of rows on the right side
    of the baseline, on it counts half), "kl" (the baseline), "implicit_chosen", "implicit_rejected" (mean beta x log-ratio of
    desirable and of undesirable rows), "margin" (their difference), "logp_chosen", "logp_rejected" (sums, nats).
    """
    totals = row_totals(lengths_B, labels_B) if totals is None else totals
    count = jnp.maximum(totals.desirable + totals.undesirable, 1.0)
    valid_B, labels_B = lengths_B > 0, labels_B.astype(bool)
    sums_B = jnp.where(valid_B, sums_B, 0.0)
    ratio_B = sums_B - jax.lax.stop_gradient(jnp.where(valid_B, ref_sums_B, 0.0))
    gain_B = jnp.where(labels_B, 1.0, -1.0) * beta * (ratio_B - jax.lax.stop_gradient(baseline))
    weight_B = jnp.where(labels_B, desirable_weight, undesirable_weight)
    loss = jnp.sum(jnp.where(valid_B, weight_B * (1 - jax.nn.sigmoid(gain_B)), 0.0)) / count
    of = lambda x_B, row_B, total: jnp.sum(jnp.where(valid_B & row_B, x_B, 0.0)) / jnp.maximum(total, 1.0)  # noqa: E731
    metrics = {
        "accuracy": jnp.sum(jnp.where(valid_B, _share_above_zero(gain_B), 0.0)) / count,
        "kl": baseline * jnp.sum(valid_B) / count,  # so that those of micro-batches add up to it
        "implicit_chosen": of(beta * ratio_B, labels_B, totals.desirable),
        "implicit_rejected": of(beta * ratio_B, ~labels_B, totals.undesirable),
        "logp_chosen": of(sums_B, labels_B, totals.desirable),
        "logp_rejected": of(sums_B, ~labels_B, totals.undesirable),
    }
    metrics["margin"] = metrics["implicit_chosen"] - metrics["implicit_rejected"]
    return loss, jax.lax.stop_gradient(metrics)


def _pairs(sums_P2, lengths_P2, totals):
    """(which pairs are no padding, sums with 0 in the others, counts of the batch)."""
    valid_P = (lengths_P2 > 0).all(axis=-1)
    return valid_P, jnp.where(valid_P[:, None], sums_P2, 0.0), pair_totals(lengths_P2) if totals is None else totals


def _difference(x_P2):
    return x_P2[:, 0] - x_P2[:, 1]


def _log_sigmoids(x):
    return jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)


def _smoothed(logit_P, label_smoothing):
    right_P, flipped_P = _log_sigmoids(logit_P)
    return -(1 - label_smoothing) * right_P - label_smoothing * flipped_P


def _log1mexp(x):
    """log(1 - exp(x)) for x < 0, by the form that keeps its digits on either side of -ln 2 (Maechler 2012)."""
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _mean(x_P, valid_P, totals):
    return jnp.sum(jnp.where(valid_P, x_P, 0.0)) / jnp.maximum(totals.pairs, 1.0)


def _share_above_zero(x):
    return 0.5 * (jnp.sign(x) + 1.0)


def _pair_metrics(implicit_P2, sums_P2, valid_P, totals):
    mean = lambda x_P: _mean(x_P, valid_P, totals)  # noqa: E731
    return jax.lax.stop_gradient(
        {
            "margin": mean(_difference(implicit_P2)),
            "accuracy": mean(_share_above_zero(_difference(implicit_P2))),
            "implicit_chosen": mean(implicit_P2[:, 0]),
            "implicit_rejected": mean(implicit_P2[:, 1]),
            "logp_chosen": mean(sums_P2[:, 0]),
            "logp_rejected": mean(sums_P2[:, 1]),
        }
    )
