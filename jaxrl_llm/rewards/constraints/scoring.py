"""IFEval's strict and loose verdicts, and its four figures.

Strict: the response as it stands. Loose: one of eight variants passes: the response, without its first line, without its last, without
both, and each of these without any star. A blank response or variant never passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.rewards.constraints.table import evaluate, validate
from jaxrl_llm.rewards.verdict import Status, Verdict


def loose_variants(response: str) -> list[str]:
    """The eight variants of a response, in a fixed order, each once; blank ones are left out."""
    lines = response.split("\n")
    cut = [response, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [text for text in dict.fromkeys(cut + [text.replace("*", "") for text in cut]) if text.strip()]


def check_strict(name: str, response: str, /, **kwargs: Any) -> Verdict:
    """As `check`, but a blank response fails. Raises UserError as `validate` does."""
    accepted = validate(name, kwargs)
    if not response.strip():
        return Verdict(Status.FAIL, reason=f"{name}: the response is blank")
    return evaluate(name, response, accepted)


def check_loose(name: str, response: str, /, **kwargs: Any) -> Verdict:
    """The first verdict among the variants' that is a PASS; else that of the response itself, or of one that could not be decided."""
    accepted = validate(name, kwargs)
    verdicts = [evaluate(name, text, accepted) for text in loose_variants(response)]
    if not verdicts:
        return Verdict(Status.FAIL, reason=f"{name}: the response is blank")
    passed = [verdict for verdict in verdicts if verdict.status is Status.PASS]
    undecided = [verdict for verdict in verdicts if verdict.value is None]
    return (passed or undecided or verdicts)[0]


def accuracies(verdicts: Sequence[Sequence[Verdict]]) -> Mapping[str, float | int]:
    """From the verdicts of each prompt's instructions: "prompt" and "instruction" accuracy, how many of each count, and how many verdicts
    make no statement ("undecided"); a prompt with one of those counts in neither, unless another of its instructions failed."""
    flat = [verdict for of_prompt in verdicts for verdict in of_prompt]
    stated = [verdict.status is Status.PASS for verdict in flat if verdict.value is not None]
    prompts = [
        all(verdict.status is Status.PASS for verdict in of_prompt)
        for of_prompt in verdicts
        if of_prompt and (any(v.status is Status.FAIL for v in of_prompt) or all(v.value is not None for v in of_prompt))
    ]
    return {
        "prompt": sum(prompts) / len(prompts) if prompts else float("nan"),
        "instruction": sum(stated) / len(stated) if stated else float("nan"),
        "prompts": len(prompts),
        "instructions": len(stated),
        "undecided": len(flat) - len(stated),
    }
