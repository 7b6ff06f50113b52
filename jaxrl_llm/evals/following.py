"""How well responses follow their instructions: rules strictly and loosely, soft constraints by the truth and by a judge, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.evals.statistics import Interval, bootstrap_sums, paired_bootstrap, share_limits, wilson
from jaxrl_llm.rewards.constraints import loose_variants
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict
from jaxrl_llm.rewards.verif import THOUGHTS_END, VerifReward
from jaxrl_llm.rewards.verinstruct import read_requirements

# What is asked of a set of responses -> what it says. The first is over instructions, the others over prompts.
FIGURES = {
    "instructions": "rules kept, strict",
    "instructions_loose": "rules kept, loose",
    "prompts": "prompts with every rule kept, strict",
    "prompts_loose": "prompts with every rule kept, loose",
    "soft": "soft constraint kept, by the truth",
    "everything": "every rule and the soft constraint kept",
    "judged": "the judge says yes",
}
Followed = dict[str, Any]  # of one set: "strict", "loose" [P][rules], "soft", "judged" [P]; 1, 0 or None where nothing can be said


def follow(
    rows: Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    rules: VerifReward,
    truth: Callable[[str, str], bool] | None = None,
    judged: Sequence[Verdict] | None = None,
) -> Followed:
    """The verdicts on one response a row, without what stands before its last </think>.

    rules: decides the rules, by name and as Python. Loosely a rule is kept by any of IFEval's variants of a response, see `loose_variants`.
    truth: (soft constraint, response) -> whether it is kept; a row's are all kept or not. judged: what a judge says of each response.
    """
    texts = [response.rpartition(THOUGHTS_END)[2].strip() for response in responses]
    variants = [loose_variants(text) or [""] for text in texts]  # the first is the text itself
    inputs = [RewardInput(row.get("prompt", ""), text, row=dict(row)) for row, of in zip(rows, variants, strict=True) for text in of]
    verdicts, strict, loose = iter(rules.rule_verdicts(inputs)), [], []
    for of in variants:
        found = [[_number(verdict) for verdict in next(verdicts)] for _ in of]
        strict.append(found[0])
        loose.append([1 if 1 in each else None if None in each else 0 for each in zip(*found, strict=True)])
    soft = [read_requirements(row).soft for row in rows]
    return {
        "strict": strict,
        "loose": loose,
        "soft": [int(all(truth(s, text) for s in of)) if truth and of else None for of, text in zip(soft, texts, strict=True)],
        "judged": [None] * len(rows) if judged is None else [_number(verdict) for verdict in judged],
    }


def _number(verdict: Verdict) -> int | None:
    return None if verdict.value is None else int(verdict.status is Status.PASS)


def by_prompt(found: Followed, figure: str) -> np.ndarray:
    """float64 [P]: 1, 0, or of "instructions" the share of a prompt's rules; NaN where nothing can be said."""
    rules = found["loose" if figure.endswith("loose") else "strict"]
    if figure in ("soft", "judged"):
        return np.array([np.nan if value is None else value for value in found[figure]], float)
    if figure.startswith("instructions"):
        stated = [[value for value in values if value is not None] for values in rules]
        return np.array([np.mean(values) if values else np.nan for values in stated], float)
    every = np.array([_all(values) for values in rules], float)
    return every if figure != "everything" else np.array([_all([a, b]) for a, b in zip(every, by_prompt(found, "soft"), strict=True)], float)


def _all(values: Sequence[float | None]) -> float:
    """1 where all hold, 0 where one does not, NaN where none fails and one is unknown or there is none."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    if 0 in known:
        return 0.0
    return 1.0 if values and len(known) == len(values) else float("nan")


def figure_of(runs: Sequence[Followed], figure: str) -> Interval | None:
    """A figure over the runs of one arm (its seeds, on the same prompts), with 95% limits; None where nothing can be said.

    Of one run Wilson's interval, over prompts; of "instructions", and of several runs, a bootstrap over prompts, each with all its instructions
    and runs; a share of 0 or 1 has Wilson's limits for as many prompts there too.
    """
    if figure.startswith("instructions"):
        rules = "loose" if figure.endswith("loose") else "strict"
        values = [[[value for value in run[rules][p] if value is not None] for run in runs] for p in range(len(runs[0][rules]))]
        sums = {"kept": np.array([sum(map(sum, of)) for of in values], float), "all": np.array([sum(map(len, of)) for of in values], float)}
    else:
        table = np.array([by_prompt(run, figure) for run in runs])
        sums = {"kept": np.nansum(table, axis=0), "all": np.sum(~np.isnan(table), axis=0).astype(float)}
    if not sums["all"].sum():
        return None
    if len(runs) == 1 and not figure.startswith("instructions"):
        return wilson(int(sums["kept"].sum()), int(sums["all"].sum()))
    span = bootstrap_sums(sums, lambda total: {"share": total["kept"] / total["all"]})["share"]
    return share_limits(span, int((sums["all"] > 0).sum()))


def gain_of(after: Sequence[Followed], before: Followed, figure: str) -> Interval | None:
    """The mean difference of an arm's runs from the policy before, paired by prompt, with the limits of `paired_bootstrap`."""
    new = np.array([by_prompt(run, figure) for run in after])
    old = np.tile(by_prompt(before, figure), (len(new), 1))
    return None if np.isnan(new - old).all() else paired_bootstrap(new, old)


def agreement(found: Followed) -> dict[str, Any]:
    """How often the judge and the truth agree on the soft constraint: "accuracy" with Wilson's limits; "sensitivity" and "specificity" likewise, of
    what the truth keeps and breaks; "n" verdicts, "without" one."""
    truth, said = by_prompt(found, "soft"), by_prompt(found, "judged")
    both = ~np.isnan(truth) & ~np.isnan(said)

    def share(of: np.ndarray) -> Interval | None:
        return wilson(int((truth == said)[of].sum()), int(of.sum())) if of.any() else None

    told = {"accuracy": share(both), "sensitivity": share(both & (truth == 1)), "specificity": share(both & (truth == 0))}
    return told | {"n": int(both.sum()), "without": int((~np.isnan(truth) & np.isnan(said)).sum())}
