"""What `jaxrl-llm verif` refuses before it computes anything."""

from __future__ import annotations

from math import inf

from jaxrl_llm.commands.grpo import parse_options
from jaxrl_llm.config import check_fields
from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.judge import MODES
from jaxrl_llm.rewards.verif import COMBINES, RULE_REDUCES, USES
from jaxrl_llm.train.checks import check_dtype, check_grpo
from jaxrl_llm.train.config import GRPOConfig, from_mapping

ONES = ("data.held_out", "data.max_prompt_tokens", "stories.held_out", "stories.pieces", "stories.least_words", "stories.most_words",
        "made.least_rules", "made.most_rules", "sft.batch", "judge.steps", "judge.batch", "judge.places", "batch_prompts")  # fmt: skip


def check(config) -> None:
    """Raises UserError for what is missing, unknown, or would only be noticed after a long time."""
    import jax

    c = config
    if not c.policy.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.policy.model=...")
    if not c.data.source and not c.stories.source:
        raise UserError("no instructions: give --config.stories.source=... to make them from stories, or --config.data.source=... to read them")
    if not c.arms or not c.seeds:
        raise UserError("config.arms and config.seeds: name at least one of each")
    for arm in c.arms:
        if arm not in c.arm_table:
            raise UserError(f"config.arms: no arm {arm!r}; {nearest(arm, list(c.arm_table))}")
    asks = [arm for arm in c.arms if c.arm_table[arm].use != "rules"]
    if c.data.source and not c.judge.url and asks:
        raise UserError(f"no judge: arm {asks[0]!r} asks one; it is taught here only for instructions made from stories: give --config.judge.url=...")
    if c.judge.url and not c.judge.model:
        raise UserError("no model of the judge: name it as the server does, with --config.judge.model=...")
    if not c.judge.url and not c.data.source:
        _check_taught(c, jax.process_count())
    check_dtype(c.policy.dtype)
    choices = {"judge.mode": MODES, "reward.combine": COMBINES, "reward.rule_reduce": RULE_REDUCES, "data.overflow": ("error", "drop", "truncate")}
    choices |= {f"arm_table.{arm}.use": USES for arm in c.arm_table}
    ranges = dict.fromkeys(ONES, (1, inf)) | {"sft.steps": (0, inf), "judge.sampled": (0, 1), "sft.stories": (0, 0.99), "shown": (0, inf)}
    check_fields(c, choices, ranges | {"sft.learning_rate": (1e-12, inf), "judge.learning_rate": (1e-12, inf)})
    check_grpo(from_mapping(GRPOConfig, c.grpo.to_dict(), "grpo."))
    parse_options("judge.options", c.judge.options)
    _check_types(c)


def _check_taught(c, processes: int) -> None:
    if c.judge.mode != "logprobs":
        raise UserError(f"config key 'judge.mode' is {c.judge.mode!r}: a judge that is taught here says one token, which mode 'logprobs' reads")
    if c.judge.show_instruction:
        raise UserError("config key 'judge.show_instruction' is True: a judge that is taught here is asked about the response alone")
    if processes > 1:
        raise UserError("a judge that is taught here is served to one process: serve it by `jaxrl-llm serve`, and give --config.judge.url=...")


def _check_types(c) -> None:
    from jaxrl_llm.rewards.constraints import names
    from jaxrl_llm.rewards.constraints.table import TABLE

    for field in ("seen", "unseen"):
        for name in c.made[field]:
            if name not in TABLE:
                raise UserError(f"config key 'made.{field}': unknown constraint {name!r}; {nearest(name, names())}")
            if TABLE[name].derive is None:
                raise UserError(f"config key 'made.{field}': constraint {name} cannot be read off a text: leave it out")
    if both := sorted(set(c.made.seen) & set(c.made.unseen)):
        raise UserError(f"config keys 'made.seen' and 'made.unseen' both name {both[0]}: what is trained on is not unseen")
    if c.made.least_rules > c.made.most_rules:
        raise UserError(f"config key 'made.least_rules' is {c.made.least_rules}, above made.most_rules={c.made.most_rules}")
