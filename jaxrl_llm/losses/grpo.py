"""Group-relative policy optimisation: advantages and the token-level clipped objective. Arrays in, (loss, metrics) out.

Sources: GRPO, Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4.1.2); Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783,
section 3.2: no division by the group's std, a constant length); DAPO, Yu et al. 2025 (arXiv 2503.14476, eq. 8-12: a higher upper clip,
mean over all tokens of the batch); KL estimators, Schulman 2020, "Approximating KL divergence".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AGGREGATIONS = ("token_mean", "sequence_mean", "dr_grpo")
KL_KINDS = (None, "k1", "k2", "k3")
ADVANTAGE_SCALES = ("group_std", "batch_std", "none")
# exp of a log-ratio past this overflows the product with an advantage; an honest policy step never comes near it.
MAX_LOG_RATIO = 20.0


class Totals(NamedTuple):
    """Counts over the whole batch of an update. Given to `grpo_loss` on a micro-batch, they make losses and metrics add up."""

    tokens: Float[Array, ""]  # unmasked completion tokens
    sequences: Float[Array, ""]  # rows with at least one unmasked token


def batch_totals(mask_BT: Bool[Array, "batch seq"]) -> Totals:
    """Token and sequence counts of a mask; rows whose mask is empty (errors, padding rows) count nowhere."""
    mask_BT = mask_BT.astype(bool)
    return Totals(jnp.sum(mask_BT, dtype=jnp.float32), jnp.sum(mask_BT.any(axis=-1), dtype=jnp.float32))


def group_stats(
    rewards_N: Float[Array, "rows"], group_ids_N: Int[Array, "rows"], num_groups: int, valid_N: Bool[Array, "rows"]
) -> dict[str, Float[Array, "groups"]]:
    """Count, mean and spread (max - min) of the valid rewards of each group; a group with no valid row has spread 0 and mean 0."""
    valid_N = valid_N.astype(bool)
    rewards_N = jnp.where(valid_N, rewards_N.astype(jnp.float32), 0.0)
    count_G = jax.ops.segment_sum(valid_N.astype(jnp.float32), group_ids_N, num_groups)
    mean_G = jax.ops.segment_sum(rewards_N, group_ids_N, num_groups) / jnp.maximum(count_G, 1.0)
    top_G = jax.ops.segment_max(jnp.where(valid_N, rewards_N, -jnp.inf), group_ids_N, num_groups)
    low_G = jax.ops.segment_min(jnp.where(valid_N, rewards_N, jnp.inf), group_ids_N, num_groups)
    return {"count": count_G, "mean": mean_G, "spread": jnp.where(count_G > 0, top_G - low_G, 0.0)}


def group_advantages(
    rewards_N: Float[Array, "rows"],
    group_ids_N: Int[Array, "rows"],
    num_groups: int,
    valid_N: Bool[Array, "rows"],
    *,
    scale: str = "group_std",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Float[Array, "rows"]:
    """Advantage of each row: its reward minus its group's mean, over a scale.

    group_ids_N: integers in [0, num_groups), one value for each prompt id, rows in any order. valid_N: False for rows without a
    verdict (errors, timeouts); they take part in no mean and get advantage 0.
    scale: "group_std" divides by (std of the group + eps), std with `ddof` (1 = the n-1 estimator); "batch_std" by the std of the
    centred rewards over the whole batch (+ eps); "none" leaves the difference (Dr. GRPO). A group whose valid rewards are all equal
    gets exactly 0, whatever the rounding of its mean.
    """
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"group_advantages: scale must be one of {ADVANTAGE_SCALES}, got {scale!r}")
    valid_N = valid_N.astype(bool)
    stats = group_stats(rewards_N, group_ids_N, num_groups, valid_N)
    centred_N = rewards_N.astype(jnp.float32) - stats["mean"][group_ids_N]
    centred_N = jnp.where(valid_N & (stats["spread"][group_ids_N] > 0), centred_N, 0.0)
    if scale == "none":
        return centred_N
    if scale == "batch_std":
        freedom = jnp.maximum(jnp.sum(valid_N, dtype=jnp.float32) - ddof, 1.0)
        return centred_N / (jnp.sqrt(jnp.sum(centred_N**2) / freedom) + eps)
    square_G = jax.ops.segment_sum(centred_N**2, group_ids_N, num_groups)
    std_G = jnp.sqrt(square_G / jnp.maximum(stats["count"] - ddof, 1.0))
    return centred_N / (std_G[group_ids_N] + eps)


def kl_estimate(
    logps_BT: Float[Array, "batch seq"], ref_logps_BT: Float[Array, "batch seq"], kind: str
) -> Float[Array, "batch seq"]:
    """Per-token estimate of KL(policy || reference) from a token sampled by the policy.

    k1 = log p - log r (unbiased, can be negative); k2 = (log p - log r)^2 / 2; k3 = r/p - 1 - log(r/p) (unbiased, never negative).
    As a loss term k1 has a gradient of zero mean: use k2 or k3 to pull the policy.
    """
    log_ratio_BT = jnp.clip(ref_logps_BT - logps_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -log_ratio_BT
    if kind == "k2":
        return 0.5 * log_ratio_BT**2
    if kind == "k3":
        return jnp.expm1(log_ratio_BT) - log_ratio_BT
    raise ValueError(f"kl_estimate: kind must be one of {KL_KINDS[1:]}, got {kind!r}")


def grpo_loss(
    logps_BT: Float[Array, "batch seq"],
    old_logps_BT: Float[Array, "batch seq"] | None,
    advantages_B: Float[Array, "batch"],
    mask_BT: Bool[Array, "batch seq"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "token_mean",
    kl: str | None = None,
    kl_coef: float = 0.0,
    ref_logps: Float[Array, "batch seq"] | None = None,
    max_length: int | None = None,
    totals: Totals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped surrogate -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), plus kl_coef x KL, aggregated over completion tokens.

    logps_BT: log-probabilities of the completion tokens under the trained policy, at the sampling temperature. old_logps_BT: under
    the policy that sampled; None means on-policy: old = stop_gradient(logps), the ratio is 1 and the gradient is A grad log p.
    mask_BT: True on completion tokens that count; an empty row contributes nothing and is counted nowhere.
    aggregation: "token_mean" divides the sum over all tokens by the batch's token count (DAPO); "sequence_mean" averages each row
    over its tokens, then over rows (GRPO); "dr_grpo" divides the sum by rows x max_length (the generation limit, required then).
    totals: counts of the whole batch when these rows are one micro-batch of it; the loss and each metric then sum to the batch's.
    Metrics: "clip_share" (share of tokens whose gradient the clip removed), "ratio" (mean ratio), "kl" (mean estimate; only with kl).
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"grpo_loss: aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    if kl not in KL_KINDS:
        raise ValueError(f"grpo_loss: kl must be one of {KL_KINDS}, got {kl!r}")
    mask_BT = mask_BT.astype(bool)
    totals = batch_totals(mask_BT) if totals is None else totals
    token_count = jnp.maximum(totals.tokens, 1.0)
    # Values under the mask are replaced before exp, so that rubbish there can make no NaN in the gradient either.
    logps_BT = jnp.where(mask_BT, logps_BT, 0.0)
    old_BT = jax.lax.stop_gradient(logps_BT if old_logps_BT is None else jnp.where(mask_BT, old_logps_BT, 0.0))
    ratio_BT = jnp.exp(jnp.clip(logps_BT - old_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain_BT = ratio_BT * advantages_B[:, None]
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high) * advantages_B[:, None]
    loss_BT = -jnp.minimum(plain_BT, clipped_BT)
    metrics = {
        "clip_share": jnp.sum((clipped_BT < plain_BT) & mask_BT) / token_count,
        "ratio": jnp.sum(jnp.where(mask_BT, ratio_BT, 0.0)) / token_count,
    }
    if kl is not None:
        if ref_logps is None:
            raise ValueError(f"grpo_loss: kl={kl!r} needs ref_logps")
        kl_BT = kl_estimate(logps_BT, jax.lax.stop_gradient(jnp.where(mask_BT, ref_logps, 0.0)), kl)
        loss_BT = loss_BT + kl_coef * kl_BT
        metrics["kl"] = jnp.sum(jnp.where(mask_BT, kl_BT, 0.0)) / token_count
    loss = _aggregate(jnp.where(mask_BT, loss_BT, 0.0), mask_BT, aggregation, max_length, totals)
    return loss, jax.lax.stop_gradient(metrics)


def _aggregate(loss_BT, mask_BT, aggregation, max_length, totals):
    """Sum of masked token losses over the batch-wide denominator of the aggregation."""
    rows = jnp.maximum(totals.sequences, 1.0)
    if aggregation == "token_mean":
        return jnp.sum(loss_BT) / jnp.maximum(totals.tokens, 1.0)
    if aggregation == "sequence_mean":
        lengths_B = jnp.maximum(jnp.sum(mask_BT, axis=-1), 1)
        return jnp.sum(jnp.sum(loss_BT, axis=-1) / lengths_B) / rows
    if max_length is None:
        raise ValueError("grpo_loss: aggregation 'dr_grpo' needs max_length, the generation limit in tokens")
    return jnp.sum(loss_BT) / (rows * max_length)
