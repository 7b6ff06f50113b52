"""Policy optimisation without a critic: advantages and objectives of the GRPO family. Arrays in, (loss, metrics) out.

Sources: GRPO, Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4.1.2); Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783,
section 3.2: no division by the group's std, a constant length); DAPO, Yu et al. 2025 (arXiv 2503.14476, eq. 8-13: a higher upper clip,
mean over all tokens of the batch, a soft penalty of long completions); RLOO, Ahmadian et al. 2024 (arXiv 2402.14740, section 2: a baseline
that leaves the row out); REINFORCE++, Hu et al. 2025 (arXiv 2501.03262, eq. 8-10: KL in the reward, normalised over the batch); GSPO, Zheng
et al. 2025 (arXiv 2507.18071, eq. 5-7 and 13-14: one ratio a sequence); CISPO, MiniMax 2025 (MiniMax-M1, arXiv 2506.13585, eq. 4-5: the
ratio is a clipped weight without gradient); KL estimators, Schulman 2020, "Approximating KL divergence".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AGGREGATIONS = ("token_mean", "sequence_mean", "dr_grpo")
KL_KINDS = (None, "k1", "k2", "k3")
KL_PLACES = ("loss", "sequence_reward", "token_reward")
BASELINES = ("group_mean", "leave_one_out", "batch_mean", "value")  # the last: a critic, see jaxrl_llm.losses.ppo
ADVANTAGE_SCALES = ("group_std", "batch_std", "none")
RATIOS = ("token", "sequence", "sequence_token")
SURROGATES = ("clip", "cispo")
MISMATCHES = (None, "token", "sequence")
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
    baseline: str = "group_mean",
    scale: str = "group_std",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Float[Array, "rows"]:
    """Advantage of each row: its reward minus its group's baseline, over a scale.

    group_ids_N: integers in [0, num_groups), one value for each prompt id, rows in any order. valid_N: False for rows without a
    verdict (errors, timeouts); they take part in no mean and get advantage 0.
    baseline: "group_mean" (GRPO), or "leave_one_out", the mean of the group's other rows (RLOO): n / (n - 1) times as large.
    scale: "group_std" divides by (std of the group + eps), std with `ddof` (1 = the n-1 estimator); "batch_std" by the std of the
    rewards minus baselines over the whole batch (+ eps); "none" leaves the difference (Dr. GRPO, RLOO). A group whose valid rewards are
    all equal, or that has one valid row only, gets exactly 0, whatever the rounding of its mean.
    """
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"group_advantages: scale must be one of {ADVANTAGE_SCALES}, got {scale!r}")
    if baseline not in BASELINES[:2]:
        raise ValueError(f"group_advantages: baseline must be one of {BASELINES[:2]}, got {baseline!r}")
    valid_N = valid_N.astype(bool)
    stats = group_stats(rewards_N, group_ids_N, num_groups, valid_N)
    centred_N = rewards_N.astype(jnp.float32) - stats["mean"][group_ids_N]
    centred_N = jnp.where(valid_N & (stats["spread"][group_ids_N] > 0), centred_N, 0.0)
    if baseline == "leave_one_out":
        # r - (n mean - r) / (n - 1), written so that a group of equal rewards stays at exactly 0.
        centred_N = centred_N * (stats["count"] / jnp.maximum(stats["count"] - 1, 1.0))[group_ids_N]
    if scale == "none":
        return centred_N
    if scale == "batch_std":
        freedom = jnp.maximum(jnp.sum(valid_N, dtype=jnp.float32) - ddof, 1.0)
        return centred_N / (jnp.sqrt(jnp.sum(centred_N**2) / freedom) + eps)
    square_G = jax.ops.segment_sum(centred_N**2, group_ids_N, num_groups)
    std_G = jnp.sqrt(square_G / jnp.maximum(stats["count"] - ddof, 1.0))
    return centred_N / (std_G[group_ids_N] + eps)


def batch_advantages(
    returns_NT: Float[Array, "rows seq"], mask_NT: Bool[Array, "rows seq"], *, scale: str = "batch_std", ddof: int = 1, eps: float = 1e-4
) -> Float[Array, "rows seq"]:
    """Advantage of each token: its return minus the mean return of the batch's tokens, over their std (REINFORCE++ eq. 10).

    Every token counts once, so a long row weighs more than a short one. scale: "batch_std" divides by (std + eps), std with `ddof`; "none"
    leaves the difference. Exactly 0 where all returns are equal, and under the mask.
    """
    if scale not in ("batch_std", "none"):
        raise ValueError(f"batch_advantages: scale must be 'batch_std' or 'none', got {scale!r}")
    mask_NT = mask_NT.astype(bool)
    tokens = jnp.sum(mask_NT, dtype=jnp.float32)
    returns_NT = jnp.where(mask_NT, returns_NT.astype(jnp.float32), 0.0)
    spread = jnp.max(jnp.where(mask_NT, returns_NT, -jnp.inf)) - jnp.min(jnp.where(mask_NT, returns_NT, jnp.inf))
    centred_NT = jnp.where(mask_NT & (spread > 0), returns_NT - jnp.sum(returns_NT) / jnp.maximum(tokens, 1.0), 0.0)
    if scale == "none":
        return centred_NT
    return centred_NT / (jnp.sqrt(jnp.sum(centred_NT**2) / jnp.maximum(tokens - ddof, 1.0)) + eps)


def to_go(values_NT: Float[Array, "rows seq"], mask_NT: Bool[Array, "rows seq"]) -> Float[Array, "rows seq"]:
    """Sum of a row's unmasked values from each token to its end: what a cost at each token takes from the return there (undiscounted)."""
    values_NT = jnp.where(mask_NT, values_NT, 0.0)
    return jnp.flip(jnp.cumsum(jnp.flip(values_NT, axis=-1), axis=-1), axis=-1)


def overlong_penalty(lengths_N: Int[Array, "rows"], limit: int, buffer: int) -> Float[Array, "rows"]:
    """What a completion's length takes from its reward (DAPO eq. 13): 0 up to limit - buffer tokens, then falling to -1 at the limit.

    limit: the longest completion, in tokens; buffer: the last tokens before it, over which the penalty grows (at least 1).
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"overlong_penalty: buffer must be from 1 to the limit of {limit} tokens, got {buffer}")
    return jnp.clip(((limit - buffer) - lengths_N) / buffer, -1.0, 0.0)


def kl_estimate(
    logps_BT: Float[Array, "batch seq"], ref_logps_BT: Float[Array, "batch seq"], kind: str
) -> Float[Array, "batch seq"]:
    """Per-token estimate of KL(policy || reference) from a token sampled by the policy.

    k1 = log p - log r (unbiased, can be negative); k2 = (log p - log r)^2 / 2; k3 = r/p - 1 - log(r/p) (unbiased, never negative).
    As a loss term, over tokens of the policy as it is, k1 has a gradient of zero mean, k2 that of KL(policy || reference) and k3 that of
    KL(reference || policy): use k2 or k3 to pull the policy.
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
    advantages: Float[Array, "batch"] | Float[Array, "batch seq"],
    mask_BT: Bool[Array, "batch seq"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: str = "token",
    surrogate: str = "clip",
    mismatch: str | None = None,
    mismatch_cap: float = 2.0,
    sampler_logps: Float[Array, "batch seq"] | None = None,
    aggregation: str = "token_mean",
    kl: str | None = None,
    kl_coef: float = 0.0,
    ref_logps: Float[Array, "batch seq"] | None = None,
    entropy_coef: float = 0.0,
    entropy: Float[Array, "batch seq"] | None = None,
    max_length: int | None = None,
    totals: Totals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Surrogate of the policy gradient, plus kl_coef x KL, minus entropy_coef x entropy, aggregated over completion tokens.

    logps_BT: log-probabilities of the completion tokens under the trained policy, at the sampling temperature. old_logps_BT: under
    the policy that sampled, by the trainer's forward pass; None means on-policy: old = stop_gradient(logps), the ratio is 1 and the
    gradient is A grad log p. advantages: one a row, or one a token. mask_BT: True on completion tokens that count; an empty row
    contributes nothing and is counted nowhere.
    ratio: new over old probability r of each "token"; or of the "sequence", the geometric mean over its tokens (GSPO eq. 7), the same at
    each of them; "sequence_token" has that value and each token's own gradient (GSPO-token eq. 14, for advantages by token).
    surrogate: "clip" is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); "cispo" is -w A log p with the weight
    w = stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)), so that no token loses its gradient.
    mismatch: weigh the surrogate by min(old / sampler probability, mismatch_cap) without gradient, since the completions come from the
    sampler's numbers and not from the trainer's: truncated importance sampling, by "token" or by the geometric mean of a "sequence"
    (needs sampler_logps). old is the trainer's, so the weight stays as it is over several updates on one rollout.
    entropy: of each predictive distribution (nats, with its gradient); needed where entropy_coef is not 0, a bonus that keeps the policy open.
    aggregation: "token_mean" divides the sum over all tokens by the batch's token count (DAPO); "sequence_mean" averages each row
    over its tokens, then over rows (GRPO); "dr_grpo" divides the sum by rows x max_length (the generation limit, required then).
    totals: counts of the whole batch when these rows are one micro-batch of it; the loss and each metric then sum to the batch's.
    Metrics: "clip_share" (share of tokens whose gradient the clip removed, or whose weight it changed), "ratio" (mean ratio), "kl" (mean
    estimate; only with kl), "mismatch_weight" and "mismatch_share" (mean weight, share of tokens at the cap; only with mismatch).
    """
    for name, value, known in (
        ("aggregation", aggregation, AGGREGATIONS), ("kl", kl, KL_KINDS), ("ratio", ratio, RATIOS),
        ("surrogate", surrogate, SURROGATES), ("mismatch", mismatch, MISMATCHES),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"grpo_loss: {name} must be one of {known}, got {value!r}")
    mask_BT = mask_BT.astype(bool)
    totals = batch_totals(mask_BT) if totals is None else totals
    mean = lambda x_BT: jnp.sum(jnp.where(mask_BT, x_BT, 0.0)) / jnp.maximum(totals.tokens, 1.0)  # noqa: E731
    # Values under the mask are replaced before exp, so that rubbish there can make no NaN in the gradient either.
    logps_BT = jnp.where(mask_BT, logps_BT, 0.0)
    old_BT = jax.lax.stop_gradient(logps_BT if old_logps_BT is None else jnp.where(mask_BT, old_logps_BT, 0.0))
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    ratio_BT = _ratios(logps_BT - old_BT, mask_BT, ratio)
    bounded_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    if surrogate == "cispo":
        loss_BT, changed_BT = -jax.lax.stop_gradient(bounded_BT) * advantages * logps_BT, bounded_BT != ratio_BT
    else:
        plain_BT, clipped_BT = ratio_BT * advantages, bounded_BT * advantages
        changed_BT = clipped_BT < plain_BT
        loss_BT = -jnp.where(changed_BT, clipped_BT, plain_BT)  # the smaller; on the bound, where a clip of 0 begins, with the whole gradient
    metrics = {"clip_share": mean(changed_BT), "ratio": mean(ratio_BT)}
    if mismatch is not None:
        if sampler_logps is None:
            raise ValueError(f"grpo_loss: mismatch={mismatch!r} needs sampler_logps")
        weight_BT = jax.lax.stop_gradient(_ratios(old_BT - jnp.where(mask_BT, sampler_logps, 0.0), mask_BT, mismatch))
        loss_BT = loss_BT * jnp.minimum(weight_BT, mismatch_cap)
        metrics |= {"mismatch_weight": mean(jnp.minimum(weight_BT, mismatch_cap)), "mismatch_share": mean(weight_BT > mismatch_cap)}
    if kl is not None:
        if ref_logps is None:
            raise ValueError(f"grpo_loss: kl={kl!r} needs ref_logps")
        kl_BT = kl_estimate(logps_BT, jax.lax.stop_gradient(jnp.where(mask_BT, ref_logps, 0.0)), kl)
        loss_BT = loss_BT + kl_coef * kl_BT
        metrics["kl"] = mean(kl_BT)
    if entropy_coef:
        if entropy is None:
            raise ValueError(f"grpo_loss: entropy_coef={entropy_coef:g} needs entropy")
        loss_BT = loss_BT - entropy_coef * jnp.where(mask_BT, entropy, 0.0)
    loss = _aggregate(jnp.where(mask_BT, loss_BT, 0.0), mask_BT, aggregation, max_length, totals)
    return loss, jax.lax.stop_gradient(metrics)


def _ratios(log_ratio_BT, mask_BT, level):
    """exp of the log-ratios (0 under the mask), or of their mean over a row: never of their sum, which grows with the length."""
    if level != "token":
        own_BT = log_ratio_BT
        mean_B1 = jnp.sum(own_BT, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask_BT, axis=-1, keepdims=True), 1)
        log_ratio_BT = jnp.broadcast_to(mean_B1, mask_BT.shape)
        if level == "sequence_token":
            log_ratio_BT = jax.lax.stop_gradient(log_ratio_BT - own_BT) + own_BT
    return jnp.exp(jnp.clip(log_ratio_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))


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
