"""`jaxrl-llm online_dpo`: trains a policy by DPO on pairs of its own samples and writes it as a Hugging Face folder."""

from typing import Any

from jaxrl_llm.commands.grpo import train_policy


def run(config: Any, workdir: str) -> None:
    """Reads, trains, evaluates and exports as `grpo` does; see configs/online_dpo.py for the fields and `grpo.run` for the errors."""
    from jaxrl_llm.train.checks import check_online_dpo
    from jaxrl_llm.train.config import OnlineDPOConfig, from_mapping
    from jaxrl_llm.train.online_dpo import train_online_dpo

    settings = from_mapping(OnlineDPOConfig, config.train)
    check_online_dpo(settings)
    train_policy(config, workdir, "online_dpo", settings, train_online_dpo)
