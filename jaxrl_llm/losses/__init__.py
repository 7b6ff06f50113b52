"""Losses: arrays in, (loss, metrics) out; no model inside."""

from jaxrl_llm.losses.grpo import (
    Totals,
    batch_advantages,
    batch_totals,
    group_advantages,
    group_stats,
    grpo_loss,
    kl_estimate,
    overlong_penalty,
    to_go,
)
from jaxrl_llm.losses.logprobs import token_logprobs
from jaxrl_llm.losses.ppo import gae, token_values, value_loss
from jaxrl_llm.losses.sft import sft_loss

__all__ = [
    "Totals",
    "batch_advantages",
    "batch_totals",
    "gae",
    "group_advantages",
    "group_stats",
    "grpo_loss",
    "kl_estimate",
    "overlong_penalty",
    "sft_loss",
    "to_go",
    "token_logprobs",
    "token_values",
    "value_loss",
]
