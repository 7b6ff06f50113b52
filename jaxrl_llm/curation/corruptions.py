"""Ways to spoil a row, for training and scoring quality probes without labels.

Each takes (rng, row, donor), the row a dict with "prompt" and maybe "answer", the donor another row, and returns the changed
fields, or None where it cannot apply. They know nothing of the data's language or subject.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CLAUSE_END = re.compile(r"(?<=[.,;:?!\n])\s+")
Corruption = Callable[[np.random.Generator, dict[str, Any], dict[str, Any]], dict[str, Any] | None]


def _answer(row: dict[str, Any]) -> str:
    return (row.get("answer") or "").strip()


def garble(rng, row, donor):
    """A third to two thirds of the words change places or take the letters of another order."""
    words = row["prompt"].split()
    if len(words) < 3:
        return None
    picked = rng.choice(len(words), max(2, int(len(words) * rng.uniform(0.33, 0.67))), replace=False)
    moved = [words[i] for i in rng.permutation(picked)]
    for i, word in zip(picked, moved, strict=True):
        words[i] = "".join(rng.permutation(list(word))) if len(word) > 3 and rng.random() < 0.5 else word
    return _changed(row, "prompt", " ".join(words))


def drop_clause(rng, row, donor):
    """One clause is missing; in a text without punctuation, a run of a sixth to a third of its words."""
    clauses = [c for c in CLAUSE_END.split(row["prompt"]) if c.strip()]
    if len(clauses) > 1:
        gone = int(rng.integers(len(clauses)))
        return _changed(row, "prompt", " ".join(clauses[:gone] + clauses[gone + 1 :]))
    words = row["prompt"].split()
    if len(words) < 3:
        return None
    size = max(1, round(len(words) * rng.uniform(1 / 6, 1 / 3)))
    start = int(rng.integers(len(words) - size + 1))
    return _changed(row, "prompt", " ".join(words[:start] + words[start + size :]))


def drop_number(rng, row, donor):
    """One number is missing from the prompt."""
    found = list(NUMBER.finditer(row["prompt"]))
    if not found:
        return None
    gone = found[int(rng.integers(len(found)))]
    return _changed(row, "prompt", " ".join((row["prompt"][: gone.start()] + row["prompt"][gone.end() :]).split()))


def truncate(rng, row, donor):
    """The prompt ends after 30 to 70% of its words."""
    words = row["prompt"].split()
    return _changed(row, "prompt", " ".join(words[: max(1, int(len(words) * rng.uniform(0.3, 0.7)))])) if len(words) > 3 else None


def wrong_answer(rng, row, donor):
    """Another row's answer."""
    return _changed(row, "answer", donor["answer"]) if _answer(row) and _answer(donor) else None


def changed_number(rng, row, donor):
    """One number of the answer (the last one more often) is off by a little, or has a wrong digit."""
    found = list(NUMBER.finditer(_answer(row)))
    if not found:
        return None
    hit = found[-1] if rng.random() < 0.7 else found[int(rng.integers(len(found)))]
    text, digits = _answer(row), re.sub(r"\D", "", hit.group())
    if rng.random() < 0.5:
        new = str(max(0, int(digits) + int(rng.choice([-10, -2, -1, 1, 2, 10]))))
    else:
        at = int(rng.integers(len(digits)))
        new = digits[:at] + str((int(digits[at]) + int(rng.integers(1, 10))) % 10) + digits[at + 1 :]
    return _changed(row, "answer", text[: hit.start()] + new + text[hit.end() :])


def _changed(row: dict[str, Any], name: str, text: str) -> dict[str, Any] | None:
    """The changed field; None where nothing changed or nothing is left."""
    same = text.split() == (row.get(name) or "").split()
    return None if same or not text.strip() else {name: text}


CORRUPTIONS: dict[str, Corruption] = {
    "garble": garble,
    "drop_clause": drop_clause,
    "drop_number": drop_number,
    "truncate": truncate,
    "wrong_answer": wrong_answer,
    "changed_number": changed_number,
}
OF_ANSWERS = ("wrong_answer", "changed_number")


def corrupt_rows(
    rows: Sequence[dict[str, Any]], sources: Sequence[int], kinds: Sequence[str], seed: int = 0
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """One corrupted copy of each source row that some kind applies to: (copies, [M] their source indices, [M] their kinds).

    Kinds are dealt out evenly; where one does not apply to a row the next one is tried. Raises UserError for an unknown kind."""
    unknown = [k for k in kinds if k not in CORRUPTIONS]
    if unknown:
        raise UserError(f"quality: no corruption {unknown[0]!r}; some of {', '.join(CORRUPTIONS)}")
    rng = np.random.default_rng(seed)
    copies, source_of, kind_of = [], [], []
    for turn, i in enumerate(rng.permutation(np.asarray(sources, int))):
        donor = rows[int(rng.integers(len(rows)))]
        for step in range(len(kinds)):
            kind = kinds[(turn + step) % len(kinds)]
            change = CORRUPTIONS[kind](rng, rows[i], donor)
            if change is not None:
                copies.append({**rows[i], **change})
                source_of.append(int(i))
                kind_of.append(kind)
                break
    return copies, np.array(source_of, int), np.array(kind_of, dtype=object)
