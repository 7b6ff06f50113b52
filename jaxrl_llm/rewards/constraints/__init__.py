"""Constraints that a text must follow, by name: IFEval's 25 and 84 more, and what is made of them.

kinds.py, table.py   kinds of parameters; the one table, `validate`, `check`, `describe`, `example`
ifeval.py            IFEval's types (ifeval_text.py counts as it does); scoring.py its strict and loose verdicts
lengths.py, keywords.py, places.py, markdown.py, structured.py, numbers.py, citations.py, languages.py, tools.py   the others, by group
logic.py             all, any, not, if-then, on a part of the response
patterns.py          regular expressions from users and data; json_schema.py a checked part of JSON Schema
backtranslate.py     from a response, constraints that it satisfies
reward.py            the reward that reads a row's constraints

>>> check("length_constraints:number_words", "one two three", num_words=3, relation="at least").status
<Status.PASS: 'pass'>
"""

from jaxrl_llm.rewards.constraints import (
    citations,
    ifeval,
    keywords,
    languages,
    lengths,
    logic,
    markdown,
    numbers,
    places,
    structured,
    tools,
)
from jaxrl_llm.rewards.constraints.backtranslate import back_translate
from jaxrl_llm.rewards.constraints.reward import ConstraintsReward, read_constraints
from jaxrl_llm.rewards.constraints.scoring import accuracies, check_loose, check_strict, loose_variants
from jaxrl_llm.rewards.constraints.table import Constraint, check, describe, example, names, validate

GROUPS = (ifeval, lengths, keywords, places, markdown, structured, numbers, citations, languages, tools, logic)  # importing them fills the table

__all__ = [
    "Constraint",
    "ConstraintsReward",
    "accuracies",
    "back_translate",
    "check",
    "check_loose",
    "check_strict",
    "describe",
    "example",
    "loose_variants",
    "names",
    "read_constraints",
    "validate",
]
