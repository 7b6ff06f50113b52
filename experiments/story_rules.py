"""GRPO of a real stories model on rule-checked continuations of real openings.

    jaxrl-llm story_rules --config.model=FOLDER --config.stories=FILE --workdir=DIR

Reads: stories -> openings with rules -> policy before -> GRPO -> policy after -> figures with intervals, samples side by side,
guards against degeneration -> a Hugging Face folder (DIR/policy) and DIR/report.html. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import models
from jaxrl_llm import report
from jaxrl_llm.data.prompts import PromptBatch, tokenise_prompts
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.data.sources import parse_fields
from jaxrl_llm.data.story_prompts import OpeningFilter, StoryRules, make_story_prompts, read_stories, split_opening
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals import degeneration
from jaxrl_llm.evals.statistics import paired_bootstrap
from jaxrl_llm.report.run import DATA_FILE
from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.constraints import check, read_constraints
from jaxrl_llm.rewards.verdict import Reward, Status, Verdict
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_mesh
from jaxrl_llm.train.checks import check_dtype, check_grpo
from jaxrl_llm.train.config import GRPOConfig, from_mapping
from jaxrl_llm.train.loop import train_grpo
from jaxrl_llm.train.rollout import decode_completions, judge

POLICY = "policy"  # folder of the trained policy, inside the workdir
RULE_NAMES = {
    "keywords:words": "takes the opening's word up",
    "punctuation:no_comma": "no comma",
    "length_constraints:number_words at least": "long enough",
    "length_constraints:number_words less than": "short enough",
    "startend:full_sentence": "ends with a whole sentence",
}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Continuations of the held-out openings, several an opening: texts, verdicts, and the figures made of them.

    reward_P, passed_P: mean reward and share of PASS of each opening, over its continuations that have a verdict; NaN where none has.
    without_verdict: the others, which no figure counts for or against. rules: share of continuations that keep each rule, of those
    where that could be said. health: the guards of `evals.degeneration`.
    """

    texts: list[str]
    verdicts: list[Verdict]
    group_ids: np.ndarray
    reward_P: np.ndarray
    passed_P: np.ndarray
    without_verdict: int
    rules: dict[str, float]
    health: dict[str, float]


def run(config: Any, workdir: str) -> None:
    """Runs the experiment; see configs/story_rules.py for the fields.

    Raises UserError where the model or the stories are not named or cannot be used.
    """
    for name in ("model", "stories"):
        if not config[name]:
            raise UserError(f"no {name}: give --config.{name}=...")
    check_dtype(config.dtype)
    grpo = dataclasses.replace(from_mapping(GRPOConfig, config.grpo.to_dict(), "grpo."), seed=config.seed)
    check_grpo(grpo)
    for name in ("held_out", "judge_samples"):
        if config[name] < 1:
            raise UserError(f"config key '{name}' is {config[name]}: at least 1 is needed to compare before with after")
    run_dir = RunDir(workdir, config, kind="story_rules", owns=(POLICY,))

    # ---------------------------------------------------------------------------------------------- openings and their rules
    stories = read_stories(config.stories, parse_fields(config.fields), config.separator or None)
    train_rows, held_rows = make_story_prompts(
        stories,
        rules=StoryRules(**config.rules),
        openings=OpeningFilter(**config.openings),
        held_out=config.held_out,
        limit=config.limit,
        seed=config.seed,
    )
    reward = registry.get_reward("constraints", reduce=config.reduce)
    print(f"{len(stories)} stories: {len(train_rows)} openings to train on, {len(held_rows)} held out")

    # ---------------------------------------------------------------------------------------------------- the policy before
    mesh = parse_mesh(config.mesh)
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which take longer to come
    cfg, params = models.load(config.model, dtype=config.dtype, mesh=mesh)
    cfg = _with_story_end(cfg, tokenizer, config.story_end)
    train, held_out = (tokenise_prompts(rows, tokenizer, max_length=config.max_prompt_tokens) for rows in (train_rows, held_rows))
    judged = lambda policy: judge_policy(cfg, policy, params, tokenizer, held_out, reward, grpo, config.judge_samples, stories, mesh)  # noqa: E731
    before = judged(params)

    # ---------------------------------------------------------------------------------------------------------------- GRPO
    schedule = ShuffledSchedule(len(train), config.batch_prompts, config.seed)
    trained, summary = train_grpo(cfg, params, tokenizer, train, reward, schedule, grpo, run_dir, {"held_out": held_out}, mesh=mesh)

    # ----------------------------------------------------------------------------------------------------- the policy after
    after = judged(trained)
    real = judge_real(cfg, params, tokenizer, held_out, reward, stories)
    figures = compare(before, after, real)
    models.save(run_dir.path / POLICY, cfg, trained, tokenizer_from=config.model)
    run_dir.summary({**summary, "story_rules": figures, "policy": POLICY})

    # -------------------------------------------------------------------------------------------------------------- report
    if not run_dir.is_writer:
        return
    (run_dir.path / DATA_FILE).unlink(missing_ok=True)  # of an earlier end of this run: the curves are read anew
    data = report_data(report.run_report(run_dir.path), held_out, before, after, figures, config.shown)
    report.save_data(run_dir.path, data)
    report.write_report(run_dir.path / "report.html", data)
    print(f"{data['headline']}\npolicy: {run_dir.path / POLICY}\nreport: {run_dir.path / 'report.html'}")


def _with_story_end(cfg: models.ModelConfig, tokenizer: Any, token: str) -> models.ModelConfig:
    """The model with one more end token: story models often end a story by the token that begins one."""
    if not token:
        return cfg
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        raise UserError(f"story_end: this tokenizer has no token {token!r}; name one of its tokens, or leave it empty")
    return dataclasses.replace(cfg, eos_token_ids=tuple(sorted({number, *cfg.eos_token_ids})))


def judge_policy(
    cfg: models.ModelConfig,
    policy: Any,
    original: Any,
    tokenizer: Any,
    prompts: PromptBatch,
    reward: Reward,
    grpo: GRPOConfig,
    samples: int,
    stories: Sequence[str],
    mesh: Any = None,
) -> Judged:
    """Samples `samples` continuations of each prompt from `policy`, as in training, and judges them; NLL is under `original`."""
    rollout = models.generate(
        cfg,
        policy,
        prompts.token_lists(),
        max_new_tokens=grpo.max_new_tokens,
        num_samples=samples,
        temperature=grpo.temperature,
        stop_strings=grpo.stop_strings,
        tokenizer=tokenizer,
        seed=grpo.seed + 1,
        max_rows=grpo.eval_batch,
        mesh=mesh,
    )
    texts = decode_completions(tokenizer, rollout)
    return _judged(cfg, original, prompts, reward, texts, rollout.completions(), rollout.group_ids_N, stories)


def judge_real(
    cfg: models.ModelConfig, original: Any, tokenizer: Any, prompts: PromptBatch, reward: Reward, stories: Sequence[str]
) -> Judged:
    """The same for how the real stories go on, up to the end of their first paragraph: what the figures are like for real text."""
    numbers: list[int] = [row["story"] for row in prompts.rows]
    rests = [split_opening(stories[number])[1] for number in numbers]
    texts = [rest.lstrip().split("\n")[0].strip() for rest in rests]
    whole = tokenizer([f"{row['prompt']} {text}" for row, text in zip(prompts.rows, texts, strict=True)])["input_ids"]
    completions = [tokens[length : cfg.max_position] for tokens, length in zip(whole, prompts.lengths_N, strict=True)]
    return _judged(cfg, original, prompts, reward, texts, completions, np.arange(len(prompts)), stories)


def _judged(cfg, original, prompts: PromptBatch, reward, texts, completions, group_ids, stories) -> Judged:
    verdicts = judge(reward, prompts, group_ids, texts)
    scored = np.array([verdict.value is not None for verdict in verdicts])
    if not scored.any():
        raise UserError(f"no continuation of the held-out openings got a verdict; the first: {verdicts[0].status} ({verdicts[0].reason})")
    return Judged(
        texts=list(texts),
        verdicts=verdicts,
        group_ids=np.asarray(group_ids),
        reward_P=_mean_by_prompt([verdict.value for verdict in verdicts], scored, group_ids, len(prompts)),
        passed_P=_mean_by_prompt([verdict.status is Status.PASS for verdict in verdicts], scored, group_ids, len(prompts)),
        without_verdict=int((~scored).sum()),
        rules=_rules_kept(prompts, group_ids, texts),
        health={
            "nll": degeneration.mean_nll(cfg, original, prompts, group_ids, completions),
            "distinct_2": degeneration.distinct_n(_first_each(texts, group_ids), 2),
            "repeated_3": degeneration.repeated_share(texts, 3),
            "known_words": degeneration.known_word_share(texts, degeneration.vocabulary_of(stories)),
            "different_texts": len(set(texts)) / len(texts),
            "words": float(np.mean([len(text.split()) for text in texts])),
        },
    )


def _mean_by_prompt(values: Sequence[Any], scored: np.ndarray, group_ids: np.ndarray, prompts: int) -> np.ndarray:
    """[P] means of each prompt's scored rows; NaN where it has none: an error is no score."""
    numbers, rows = np.array(values, dtype=float)[scored], np.asarray(group_ids)[scored]
    count = np.bincount(rows, minlength=prompts)
    return np.where(count > 0, np.bincount(rows, numbers, minlength=prompts) / np.maximum(count, 1), np.nan)


def _rules_kept(prompts: PromptBatch, group_ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
    """The share of texts that keep each rule, of those where that could be said; NaN where it never could."""
    kept: dict[str, list[bool]] = {}
    for group, text in zip(group_ids, texts, strict=True):
        for name, kwargs in read_constraints(prompts.rows[group]):
            verdict = check(name, text, **kwargs)
            known = kept.setdefault(RULE_NAMES.get(f"{name} {kwargs.get('relation', '')}".strip(), name), [])
            known += [] if verdict.value is None else [verdict.status is Status.PASS]
    return {rule: float(np.mean(values)) if values else float("nan") for rule, values in kept.items()}


def _first_each(texts: Sequence[str], group_ids: np.ndarray) -> list[str]:
    """One text a prompt, so that distinct-n is of as many texts for policies as for the real stories."""
    first = {int(group): text for group, text in zip(group_ids[::-1], texts[::-1], strict=True)}
    return list(first.values())


def compare(before: Judged, after: Judged, real: Judged) -> dict[str, Any]:
    """The figures of the summary: reward and pass rate with their paired differences, rules, and guards.

    Differences are over the openings that have a verdict both times.
    """

    def difference(name: str) -> dict[str, float]:
        new, old = getattr(after, name), getattr(before, name)
        both = np.isfinite(new) & np.isfinite(old)
        if not both.any():
            return dict.fromkeys(("value", "low", "high"), float("nan"))
        interval = paired_bootstrap(new[both], old[both])
        return {"value": interval.estimate, "low": interval.low, "high": interval.high}

    figures: dict[str, Any] = {
        label: {
            "reward": float(np.nanmean(judged.reward_P)),
            "passed": float(np.nanmean(judged.passed_P)),
            "without_verdict": judged.without_verdict,
            "rules": judged.rules,
            "health": judged.health,
        }
        for label, judged in (("before", before), ("after", after), ("real", real))
    }
    return figures | {"reward_gain": difference("reward_P"), "passed_gain": difference("passed_P")}


HEALTH = {  # guard -> its column in the report
    "nll": "NLL under the original (nats a token)",
    "distinct_2": "distinct word pairs",
    "repeated_3": "repeated word triples",
    "known_words": "words the corpus knows",
    "different_texts": "different texts",
    "words": "words a text",
}


def report_data(
    page: Mapping[str, Any], prompts: PromptBatch, before: Judged, after: Judged, figures: Mapping[str, Any], shown: int
) -> dict[str, Any]:
    """The run's page with what this experiment adds: the gain, rules kept before and after, guards, and samples side by side."""
    gain, passed = figures["reward_gain"], figures["passed_gain"]
    old, new, real = figures["before"], figures["after"], figures["real"]
    nll = [f"{f['health']['nll']:.2f}" for f in (new, old, real)]
    known = [f"{100 * f['health']['known_words']:.1f}%" for f in (new, old)]
    points = [f"{100 * passed[key]:+.1f}" for key in ("value", "low", "high")]
    rules = list(old["rules"])
    kept = _table("Rules kept", "share of continuations of held-out openings", ["all rules", *rules])
    unsaid = [figures[key]["without_verdict"] for key in ("before", "after", "real")]
    kept["note"] = "Real stories were not written to these rules." + (
        " Left out, since no verdict could be reached: {} continuations before, {} after, {} real.".format(*unsaid) if any(unsaid) else ""
    )
    guards = _table("Stories still?", "guards against degeneration", list(HEALTH.values()))
    guards["higher_is_better"] = None
    guards["note"] = "Read them together and against both other rows: none of them is to be made as large or as small as it can be."
    for key, name, kind in (
        ("before", "before training", "baseline"),
        ("after", "after training", "ours"),
        ("real", "real stories", "bound"),
    ):
        shares = [figures[key]["passed"], *(figures[key]["rules"][rule] for rule in rules)]
        kept["rows"].append({"name": name, "kind": kind, "cells": _cells(shares)})
        guards["rows"].append({"name": name, "kind": kind, "cells": _cells([figures[key]["health"][guard] for guard in HEALTH])})
    return {
        **page,
        "kind": "run",
        "title": "Story rules",
        "subtitle": "GRPO on rule-checked stories",
        "headline": (
            f"On {len(prompts)} held-out openings the reward went from {old['reward']:.3f} to {new['reward']:.3f}, and continuations "
            f"that keep every rule from {100 * old['passed']:.1f}% to {100 * new['passed']:.1f}%. Under the original model a sampled token "
            f"costs {nll[0]} nats (before {nll[1]}, real stories {nll[2]})."
        ),
        "facts": [
            {"label": "held-out reward", "value": f"{gain['value']:+.3f}", "detail": f"95% {gain['low']:+.3f} to {gain['high']:+.3f}"},
            {"label": "every rule kept", "value": f"{points[0]} points", "detail": f"95% {points[1]} to {points[2]}"},
            {"label": "words the corpus knows", "value": known[0], "detail": f"before {known[1]}"},
        ],
        "tables": [kept, guards],
        "rollouts": [_side_by_side(prompts, group, before, after) for group in range(min(shown, len(prompts)))],
    }


def _table(title: str, metric: str, columns: list[str]) -> dict[str, Any]:
    return {"title": title, "metric": metric, "columns": columns, "rows": []}


def _cells(values: Sequence[float]) -> list[dict[str, float] | None]:
    """Cells of a table: None, a dash, where there is no number."""
    return [{"value": value} if np.isfinite(value) else None for value in values]


def _side_by_side(prompts: PromptBatch, group: int, before: Judged, after: Judged) -> dict[str, Any]:
    responses = []
    for label, judged in (("before", before), ("after", after)):
        for row in np.flatnonzero(judged.group_ids == group)[:2]:
            verdict = judged.verdicts[row]
            responses.append(
                {
                    "text": judged.texts[row],
                    "status": verdict.status.name,
                    "score": verdict.value,
                    "reason": verdict.reason,
                    "arm": label,
                }
            )
    return {"prompt": prompts.rows[group]["prompt"], "responses": responses, "tags": {"word": ", ".join(prompts.rows[group]["words"])}}
