"""What holds for every constraint of the table: declared whole, checked arguments, examples that pass and fail, no state, hostile texts."""

# ruff: noqa: E501 - wide scripts count double

import json
import os
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.constraints import back_translate, check, check_loose, describe, example, names
from jaxrl_llm.rewards.constraints.kinds import Optional, WrongKind, count, letter, number, place, positive, share, texts, wanted, word
from jaxrl_llm.rewards.constraints.table import LONGEST_RESPONSE, TABLE, constraint
from jaxrl_llm.rewards.verdict import Status

TEXTS = int(os.environ.get("JAXRL_LLM_HOSTILE", "200"))  # 10000 takes minutes
IFEVAL_GROUPS = {"length_constraints", "detectable_content", "detectable_format", "combination"}
SEEDS = range(25)


def test_the_table_holds_ifeval_and_at_least_forty_more():
    ifeval = [name for name in names() if TABLE[name].check.__module__.endswith(".ifeval")]
    assert len(ifeval) == 25 and len(names()) - len(ifeval) >= 80
    groups = {TABLE[name].group for name in names()} - IFEVAL_GROUPS
    assert groups >= {"length", "keywords", "startend", "copy", "punctuation", "change_case", "format", "numbers", "citations", "language", "tools", "logic"}


def test_the_document_lists_every_constraint(repo):
    page = (repo / "docs/constraints.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in page.partition("## All types")[2].splitlines() if line.startswith("| `")]
    assert tuple(listed) == names(), "run python docs/constraints_table.py"


def test_a_name_is_declared_once():
    with pytest.raises(ValueError, match="declared twice"):
        constraint("punctuation:no_comma", "", examples=lambda rng: ({}, "", ""))(lambda response: (True, ""))


@pytest.mark.parametrize("name", names())
def test_examples_satisfy_and_violate(name):
    good_texts = set()
    for seed in SEEDS:
        kwargs, good, bad = example(name, random.Random(seed))
        assert example(name, random.Random(seed)) == (kwargs, good, bad)
        assert check(name, good, **kwargs).status is Status.PASS, (kwargs, good, check(name, good, **kwargs))
        assert check(name, bad, **kwargs).status is Status.FAIL, (kwargs, bad, check(name, bad, **kwargs))
        good_texts.add(good)
        # As data holds them: JSON, and whole numbers made floats by a table.
        stored = json.loads(json.dumps(kwargs), parse_int=float)
        assert check(name, good, **stored) == check(name, good, **kwargs)


@pytest.mark.parametrize("name", names())
def test_the_sentence_names_every_parameter(name):
    for seed in SEEDS:
        kwargs, _, _ = example(name, random.Random(seed))
        said = describe(name, **kwargs)
        assert said.strip()
        if name.startswith("logic:") or name in ("language:response_language", "language:is", "language:every_paragraph"):
            continue  # their parameters are said in words
        for value in kwargs.values():
            for entry in value if isinstance(value, list) else [value]:
                assert str(entry) in said or json.dumps(entry) in said or re.search(r"(first|last|\dth|\drd|\dnd) (sentence|paragraph)|exactly once", said)


@pytest.mark.parametrize("low, high, said", [(1, 1, "exactly once"), (3, 3, "exactly 3 times"), (1, 3, "1 to 3 times"), (0, 0, "exactly 0 times")])
def test_how_often_is_said(low, high, said):
    assert describe("keywords:count", word="cat", low=low, high=high) == f'Use the word "cat" {said}.'
    assert describe("format:headings", low=low, high=high, level=2).endswith("markdown headings of level 2.")


@pytest.mark.parametrize("name", names())
def test_arguments_are_checked_by_name_and_kind(name):
    kwargs, good, _ = example(name, random.Random(0))
    with pytest.raises(UserError, match="has no parameter 'colour'"):
        check(name, good, colour="red", **kwargs)
    for key, kind in TABLE[name].parameters.items():
        with pytest.raises(UserError, match=f"parameter '{key}' of constraint {re.escape(name)} is .*; it must be "):
            check(name, good, **{**kwargs, key: object()})
        if not isinstance(kind, Optional):
            for missing in ({k: v for k, v in kwargs.items() if k != key}, {**kwargs, key: None}):
                with pytest.raises(UserError, match=f"{re.escape(name)} needs the parameter '{key}'"):
                    check(name, good, **missing)
        assert len(wanted(kind)) > 5
    if {"low", "high"} <= set(kwargs):
        with pytest.raises(UserError, match="low must not be above high"):
            check(name, good, **{**kwargs, "low": kwargs["high"] + 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 2.5, "3", True, [1], b"1", None])
def test_no_odd_number_is_taken(value):
    for kind in (count, positive):
        with pytest.raises(WrongKind):
            kind(value)
    if value not in (-1, 2.5):
        with pytest.raises(WrongKind):
            number(value)
    for kind, wrong in ((positive, 0), (place, 0), (share, 1.1), (number, 10**400), (letter, "ab"), (word, "a b"), (texts, ["a", " "]), (texts, "a")):
        with pytest.raises(WrongKind):
            kind(wrong)
    assert (count(3.0), place(-1), share(1), number(10**20)) == (3, -1, 1.0, 1e20)


def test_no_checker_leaves_a_trace():
    cases = [(name, *example(name, random.Random(seed))) for name in names() for seed in range(3)]
    first = [check(name, good, **kwargs) for name, kwargs, good, _ in cases]
    random.Random(1).shuffle(order := list(range(len(cases))))
    again = {place: check(cases[place][0], cases[place][2], **cases[place][1]) for place in order}
    assert first == [again[place] for place in range(len(cases))]


def test_a_response_beyond_any_length_is_an_error_and_no_verdict():
    verdict = check("punctuation:no_comma", "a" * (LONGEST_RESPONSE + 1))
    assert verdict.status is Status.ERROR and verdict.value is None


def test_unknown_names():
    for ask in (lambda: check("format:tabel", "a"), lambda: describe("format:tabel"), lambda: example("format:tabel", random.Random(0))):
        with pytest.raises(UserError, match="did you mean format:table"):
            ask()
    with pytest.raises(UserError, match="unknown constraint"):
        check(None, "a")  # type: ignore[arg-type]


# ---- hostile texts: no exception, a verdict that makes a statement, the same twice

PIECES = [
    "a", "Ab", " ", "\n", "\n\n", "\t", "\r\n", "\u2028", "\x00", "\x1f", ".", "?!", "...", "…", ",", ";", ":", "-", "--", "_", "__", "*", "**", "***", "******",
    "#", "# ", "> ", "- ", "1. ", "1)", "[", "]", "[1]", "[1, 2]", "(", ")", "{", "}", "<", ">", "<<", ">>", "```", "```json\n", "~~~", "`", "|", "|-|\n", "|a|b|\n",
    '"', "'", "“", "”", "\\", "/", "0", "1,000", "1e999", "-1", "+", "1.2.3", "٣", "²", "2024-02-30", "9" * 400, "NaN", "true", '{"a": 1}', '{"a"', '"\\ud800"', "[[[[",
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "<answer>", "</answer>", "P.S.", "p. p. s", "Section 1", "My answer is yes.", "References\n",
    "Dr. ", "e.g. ", "U.S. ", "I'M", "CANNOT", "the", "The ", "好", "们", "們", "です", "한국", "العربية", "नमस्ते", "\u0301", "\u200d", "\u202e", "\ufeff", "ß", "İ", "ſ", "ﬁ",
    "😀", "👨‍👩‍👧", "\ud800", "\U0010ffff", "river", "lighthouse", "km", "%", "5 km",
]  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
repeated = st.builds(lambda piece, times, end: piece * times + end, st.sampled_from(PIECES), st.integers(0, 300), st.sampled_from(PIECES))
any_text = st.one_of(st.text(max_size=200), hostile, repeated)
KWARGS = {name: [example(name, random.Random(seed))[0] for seed in range(3)] for name in names()}


@settings(max_examples=TEXTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=any_text, which=st.integers(0, 2))
def test_no_text_breaks_a_checker(text, which):
    """TEXTS texts through each of the hundred-odd checkers, twice."""
    for name, options in KWARGS.items():
        verdict = check(name, text, **options[which])
        closed = Status.NOT_APPLICABLE if name == "logic:if" else Status.PASS
        assert verdict.status in (Status.PASS, Status.FAIL, closed), (name, verdict)
        assert verdict.reason.startswith(f"{name}: ") and len(verdict.reason) < 5_000
        assert check(name, text, **options[which]) == verdict


@settings(max_examples=TEXTS // 3, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=any_text, seed=st.integers(0, 5))
def test_what_is_read_off_any_text_holds_for_it(text, seed):
    for entry in back_translate(text, 200, seed=seed):
        assert check(entry["name"], text, **entry["kwargs"]).status is Status.PASS
        assert entry["text"].strip()
        if text.strip():
            assert check_loose(entry["name"], text, **entry["kwargs"]).status is Status.PASS
