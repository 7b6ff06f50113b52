"""Accuracy and reward of a policy on a held-out set: greedy, and the mean over k samples (avg@k), with a breakdown by row fields."""

from collections.abc import Sequence

import jax
import numpy as np

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.rewards.verdict import Reward, Status
from jaxrl_llm.train.rollout import decode_completions, judge


def evaluate(
    model: models.ModelConfig,
    params,
    tokenizer,
    prompts: PromptBatch,
    reward: Reward,
    *,
    max_new_tokens: int,
    samples: int = 0,
    temperature: float = 1.0,
    batch_rows: int = 256,
    by: Sequence[str] = (),
    stop_strings: Sequence[str] = (),
    seed: int | jax.Array = 0,
    mesh=None,
) -> dict:
    """A record: "accuracy" (share of PASS among greedy completions with a verdict), "n" (those), "errors" (rows without a verdict),
    "reward" (their mean value), "avg_at_k", "reward_at_k" and "k" when `samples` > 0 (share of PASS and mean value over all samples at
    `temperature`), "completion_length" (tokens, greedy),
    and "by": {field: {value: accuracy}} for each field of `by`, avg@k under "by_avg_at_k". "passed": one entry a prompt, greedy
    (None without a verdict), and with samples "rates", each prompt's share of PASS, so that paired tests can be made from the record.
    """
    how = dict(max_new_tokens=max_new_tokens, batch_rows=batch_rows, stop_strings=stop_strings, seed=seed, mesh=mesh)
    rollout, greedy, values = judged_samples(model, params, tokenizer, prompts, reward, samples=1, temperature=0.0, **how)
    greedy = greedy[:, 0]
    record = {
        "accuracy": _mean(greedy),
        "reward": _mean(values),
        "n": int(np.sum(~np.isnan(greedy))),
        "errors": int(np.sum(np.isnan(greedy))),
        "completion_length": float(rollout.completion_lengths_N.mean()),
        "by": _breakdown(greedy, prompts, by),
        "passed": [None if np.isnan(p) else int(p) for p in greedy],
    }
    if samples:
        _, sampled, values = judged_samples(model, params, tokenizer, prompts, reward, samples=samples, temperature=temperature, **how)
        rates = np.array([_mean(row) for row in sampled])
        record |= {"avg_at_k": _mean(sampled), "reward_at_k": _mean(values), "k": samples, "by_avg_at_k": _breakdown(rates, prompts, by)}
        record["rates"] = [None if np.isnan(r) else round(float(r), 6) for r in rates]
    return record


def judged_samples(
    model: models.ModelConfig,
    params,
    tokenizer,
    prompts: PromptBatch,
    reward: Reward,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_rows: int = 256,
    stop_strings: Sequence[str] = (),
    seed: int | jax.Array = 0,
    mesh=None,
) -> tuple[models.Rollout, np.ndarray, np.ndarray]:
    """Rolls out `samples` completions a prompt: (rollout, [prompts, samples] 1 for PASS and 0 for not, [prompts, samples] values of the
    verdicts); NaN without a verdict."""
    rollout = models.generate(
        model,
        params,
        prompts.token_lists(),
        max_new_tokens=max_new_tokens,
        num_samples=samples,
        temperature=temperature,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        seed=seed,
        max_rows=batch_rows,
        mesh=mesh,
    )
    verdicts = judge(reward, prompts, rollout.group_ids_N, decode_completions(tokenizer, rollout))
    values = np.array([np.nan if v.value is None else v.value for v in verdicts], dtype=float)
    passed = np.where(np.isnan(values), np.nan, [v.status is Status.PASS for v in verdicts])
    order = np.argsort(rollout.group_ids_N, kind="stable")
    return rollout, passed[order].reshape(len(prompts), samples), values[order].reshape(len(prompts), samples)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _breakdown(values: np.ndarray, prompts: PromptBatch, by: Sequence[str]) -> dict[str, dict[str, float]]:
    """{field: {value: mean}} over the rows that have the field, values in sorted order."""
    tables = {}
    for field in by:
        labels = np.array([str(row[field]) if field in row else "" for row in prompts.rows])
        tables[field] = {label: _mean(values[labels == label]) for label in sorted(set(labels)) if label}
    return tables
