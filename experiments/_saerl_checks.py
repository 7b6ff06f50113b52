"""What `jaxrl-llm saerl` refuses before it computes anything: a mistake there would only be noticed after hours."""

from __future__ import annotations

from math import inf

from jaxrl_llm.config import check_fields
from jaxrl_llm.errors import UserError, nearest

# Feature kinds an arm may name; "sae" is ours, the others are its controls.
FEATURES = ("sae", "random_sae", "dense", "tfidf")
UNASKED = ("none", "oracle", "sae_alone", "tfidf_alone")  # filters that do not ask the policy
FILTERS = (*UNASKED, "logprob", "tuned", *FEATURES)


def check(config) -> None:
    """Raises UserError for what would only be noticed after hours, before anything is computed."""
    for what, names, table in (("arm", config.arms, config.arm_table), ("pool", config.pools, config.pool_table)):
        for name in names:
            if name not in table:
                raise UserError(f"config.{what}s: no {what} {name!r}; {nearest(name, list(table))}")
    if config.main_arm not in config.arms:
        raise UserError(f"config.main_arm is {config.main_arm!r}, which is not in config.arms {tuple(config.arms)}")
    if not (config.arms and config.pools and config.bases and config.seeds):
        raise UserError("config.arms, config.pools, config.bases and config.seeds: name at least one of each")
    check_values(config)
    for name in config.arms:
        check_arm(config, name)
    if config.data.source and not any(held_out.source for held_out in config.data.evals.values()):
        raise UserError("config.data.source is set but no held-out set: give config.data.evals.test.source too, to compare the arms on")


def check_values(config) -> None:
    """Raises UserError for a value that some stage would refuse, or run into the ground with."""
    import jax

    import sae
    from jaxrl_llm.curation import curated_set, features, orders, trainability
    from jaxrl_llm.losses import grpo
    from jaxrl_llm.rewards.registry import get_reward

    choices = {
        "formats": curated_set.FORMATS,
        "policy.dtype": ("float32", "bfloat16"),
        "sae.pooling": features.POOLINGS,
        "curation.band_balance": trainability.BALANCES,
        "grpo.baseline": tuple(kind for kind in grpo.BASELINES if kind != "value"),  # a critic is set in more ways than these fields tell
        "grpo.aggregation": grpo.AGGREGATIONS,
        "grpo.advantage_scale": grpo.ADVANTAGE_SCALES,
    }
    counts = (
        "workers", "map_prompts", "data.rows", "data.test_rows", "data.max_prompt_tokens", "policy.d_model", "policy.n_layers", "policy.n_heads",
        "policy.d_ff", "policy.clean_steps", "policy.mixed_steps", "policy.batch", "sae.d_sae", "sae.k", "sae.context", "sae.steps", "sae.batch",
        "curation.label_samples", "curation.label_batch", "curation.clusters", "curation.dims", "curation.told_epochs", "curation.strata",
        "grpo.steps", "grpo.prompts_per_step", "grpo.max_new_tokens", "grpo.rollout_tries", "grpo.eval_samples",
    )  # fmt: skip
    naught = ("curation.quality_labels", "curation.refilter_every", "curation.copies", "grpo.eval_every", "grpo.checkpoint_every",
              "grpo.micro_batch_rows", "grpo.overlong_penalty")
    shares = ("curation.band_easy_floor", "curation.band_epoch_share")
    ranges = dict.fromkeys(counts, (1, inf)) | dict.fromkeys(naught, (0, inf)) | dict.fromkeys(shares, (0, 1)) | {
        "grpo.num_samples": (2, inf),  # advantages compare the samples of a prompt
        "grpo.overlong_buffer": (0, config.grpo.max_new_tokens),
        "curation.labels": (2, inf),
        "curation.rho": orders.ALLOWED["rho"],
        "curation.drop": (0, 0.999),
        "curation.drop_most": (0, 0.999),
        "curation.drop_per_bad": (0, inf),
        "curation.strata_drop_per_bad": (0, inf),
        "curation.band_temperature": (1e-6, inf),
        "policy.learning_rate": (0, inf),
        "sae.learning_rate": (0, inf),
        "grpo.learning_rate": (0, inf),
    }  # fmt: skip
    check_fields(config, choices, ranges)
    if config.policy.d_model % config.policy.n_heads:
        raise UserError(f"config.policy.d_model={config.policy.d_model} is no multiple of config.policy.n_heads={config.policy.n_heads}")
    if config.grpo.overlap_rewards and (config.grpo.rollout_tries > 1 or jax.process_count() > 1):
        raise UserError("config.grpo.overlap_rewards needs config.grpo.rollout_tries=1 and one process: set it to False")
    get_reward(config.data.reward)
    if config.sae.path:
        sae.load(config.sae.path)


def check_arm(config, name: str) -> None:
    """Raises UserError for an arm that names what there is not, or needs what the run does not have."""
    arm = config.arm_table[name]
    choices = dict(features=FEATURES, filter=FILTERS, clusters=("features", "random"), difficulty=("proxy", "oracle"), start=("base", "told"))
    for key, known in choices.items():
        if arm[key] not in known:
            raise UserError(f"config.arm_table.{name}.{key} is {arm[key]!r}; {nearest(arm[key], known)}")
    c = config.curation
    told = config.data.told if config.data.source else c.quality_labels
    if not told and (arm.start == "told" or arm.filter == "tuned"):
        raise UserError(
            f"arm {name!r} needs rows told to be sound: config.data.told, a column of the rows, or in the generated world "
            "config.curation.quality_labels"
        )
    if arm.filter == "tuned" and not (c.tuned and c.answers):
        raise UserError(f"arm {name!r} filters by tuned policies: it needs config.curation.tuned and config.curation.answers")
    if arm.schedule == "band" and config.grpo.overlap_rewards:
        raise UserError(
            f"arm {name!r} follows the policy, so its prompts of a step wait for the verdicts of the step before: set "
            "config.grpo.overlap_rewards=False, or take it out of config.arms"
        )
    if config.data.source and "oracle" in (arm.filter, arm.difficulty):
        raise UserError(f"arm {name!r} needs the truth, which only the generated world has; take it out of config.arms")
