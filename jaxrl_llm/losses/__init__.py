"""Losses: arrays in, (loss, metrics) out; no model inside."""

from jaxrl_llm.losses.grpo import Totals, batch_totals, group_advantages, group_stats, grpo_loss, kl_estimate
from jaxrl_llm.losses.logprobs import token_logprobs
from jaxrl_llm.losses.preference import dpo_loss, kto_baseline, kto_loss, orpo_loss, sequence_logprobs, simpo_loss
from jaxrl_llm.losses.sft import sft_loss

__all__ = [
    "Totals", "batch_totals", "dpo_loss", "group_advantages", "group_stats", "grpo_loss", "kl_estimate", "kto_baseline", "kto_loss",
    "orpo_loss", "sequence_logprobs", "sft_loss", "simpo_loss", "token_logprobs",
]  # fmt: skip
