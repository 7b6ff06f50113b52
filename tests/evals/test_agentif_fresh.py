"""Made AgentIF rows: a response that keeps every rule, one that breaks each alone, lengths, seeds, and that nothing of a row is forgotten."""

import json
import re
from collections import Counter

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.agentif import fresh_rules
from jaxrl_llm.evals.agentif.figures import PLACES, by_place, place_of
from jaxrl_llm.evals.agentif.fresh import make_row, make_rows
from jaxrl_llm.evals.agentif.outcomes import Outcome, Result
from jaxrl_llm.evals.agentif.rows import parse_row
from jaxrl_llm.evals.agentif.sequences import evaluate
from jaxrl_llm.rewards.sandbox import layers
from jaxrl_llm.rewards.sandbox.pool import Sandbox

PLANS = range(40)


def kinds(made):
    return [constraint["other_info"]["kind"] for constraint in made.row["constraints"]]


def failing(made, response):
    """The constraints whose checkers, which are ours, do not return True."""
    found = []
    for place, constraint in enumerate(made.row["constraints"]):
        space: dict = {}
        exec(constraint["evaluation"][0]["exec"], space)
        if space["check_following"](response) is not True:
            found.append(place)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_each_rule_is_kept_and_broken_alone(seed):
    seen = Counter()
    for plan in PLANS:
        made = make_row(plan, seed, 600)
        assert failing(made, made.reference) == []
        assert len(made.violations) == len(made.row["constraints"])
        for place, response in enumerate(made.violations):
            assert failing(made, response) == [place], kinds(made)[place]
        assert len(failing(made, "I am sorry, I cannot do that.")) >= 2
        seen.update(kinds(made))
    assert set(seen) == {rule.__name__ for rule in (*fresh_rules.CORE, *fresh_rules.MORE)}


@pytest.mark.skipif(bool(layers.missing()), reason=f"this host lets nobody isolate code: {layers.missing()}")
def test_the_evaluator_says_the_same_in_the_sandbox():
    made = make_row(7, 5, 600)
    row = parse_row(made.row, "made", 0, notes := Counter())
    assert not +notes  # clean in the published schema
    responses = [made.reference, *made.violations]
    with Sandbox(2) as sandbox:
        found = evaluate([(part, response) for response in responses for part in row.constraints], None, sandbox)
    number = len(row.constraints)
    for turn in range(len(responses)):
        told = [one.result for one in found[turn * number : (turn + 1) * number]]
        assert told == [Result.FAILED if turn == place + 1 else Result.PASSED for place in range(number)]


def text_of(made):
    return "\n".join(message["content"] for message in made.row["input"])


def test_every_rule_is_asked_for_once_and_numbered_in_order():
    turns = metas = 0
    for plan in PLANS:
        made = make_row(plan, 0, 900)
        whole = text_of(made)
        numbers = [int(one or other) for one, other in re.findall(r"^Rule (\d+)[.,]|for your answers, number (\d+)\.", whole, re.M)]
        asks = sum(len(constraint["other_info"]["from"]) for constraint in made.row["constraints"])
        assert numbers == list(range(1, asks + 1))
        for constraint in made.row["constraints"]:
            for sentence in re.split(r" (?=Rule \d+[.,] |Rule \d+, for|One more rule)", constraint["desc"]):
                assert sentence in whole
        turns += len(made.row["input"]) == 4
        metas += any(constraint["is_meta"] for constraint in made.row["constraints"])
        assert [message["role"] for message in made.row["input"]] in (["system", "user"], ["system", "user", "assistant", "user"])
    assert 3 < turns < len(PLANS) - 3 and metas > 10


def test_a_correction_stands_behind_what_it_corrects():
    for plan in PLANS:
        made = make_row(plan, 0, 900)
        for corrected in re.findall(r"Rule (\d+) (?:is out of date|no longer holds|is meant for)", text_of(made)):
            whole = text_of(made)
            place = min(whole.find(f"Rule {corrected}{mark}") for mark in (".", ",") if f"Rule {corrected}{mark}" in whole)
            assert place < re.search(rf"Rule {corrected} (is|no)", whole).start()


@pytest.mark.parametrize("words", [1000, 4000, 15_000])
def test_any_length(words):
    for plan in range(3):
        made = make_row(plan, 0, words)
        assert abs(made.row["made"]["words"] - words) < 20 and failing(made, made.reference) == []
    short = make_row(0, 0, 100).row["made"]["words"]
    assert short < 800  # as short as its rules allow


def test_rules_and_facts_stand_at_any_depth():
    depths = [depth for plan in PLANS for part in make_row(plan, 0, 3000).row["constraints"] for depth in part["other_info"]["depth"]]
    assert min(depths) < 0.1 and max(depths) > 0.9
    whole = [text_of(make_row(plan, 0, 3000)) for plan in PLANS]
    codes = [(text.index("register code"), len(text)) for text in whole if "register code" in text]
    assert any(place > 0.5 * length for place, length in codes) and any(place < 0.5 * length for place, length in codes)


def test_places_of_rules():
    places = [place_of(info) for info in (
        {"from": ["list"], "depth": []}, {"from": ["list", "manual"], "depth": [0.1]}, {"from": ["manual", "manual"], "depth": [0.1, 0.5]},
        {"from": ["manual"], "depth": [1.0]}, {"from": ["manual", "turn"], "depth": [0.4]},
    )]  # fmt: skip
    assert places == list(PLACES)
    made = make_row(1, 0, 3000)
    row = parse_row(made.row, "made", 0, Counter())
    outcomes = [Outcome(Result.PASSED if place_of(part["other_info"]) == PLACES[0] else Result.FAILED) for part in made.row["constraints"]]
    found = {one["place"]: (one["value"], one["counted"]) for one in by_place([(row, outcomes)], draws=5)}
    assert found[PLACES[0]][0] == 1.0 and {value for place, (value, _) in found.items() if place != PLACES[0]} == {0.0}
    assert sum(count for _, count in found.values()) == len(outcomes)


def test_a_seed_changes_the_content_and_not_the_plan():
    for plan in PLANS:
        one, other = make_row(plan, 0, 1500), make_row(plan, 1, 1500)
        assert make_row(plan, 0, 1500) == one
        plan_of = lambda made: [[part[key] for key in ("other_info", "dimension", "type", "is_meta")] for part in made.row["constraints"]]  # noqa: E731
        assert plan_of(one) == plan_of(other) and abs(one.row["made"]["words"] - other.row["made"]["words"]) < 30
        checkers = [{part["evaluation"][0]["exec"] for part in made.row["constraints"]} for made in (one, other)]
        assert len(checkers[0] & checkers[1]) <= 3  # such as "no exclamation mark", which holds no content
        names = [set(re.findall(r"\b[A-Z][a-z]{4,}\b", text_of(made).partition("# Manual")[2].partition("# Examples")[0])) for made in (one, other)]
        assert len(names[0] & names[1]) < 10


def test_rows_of_several_seeds_and_lengths():
    made = make_rows(3, (4, 9), (700, 1200))
    assert [(one.row["made"]["seed"], one.row["made"]["plan"]) for one in made] == [(seed, plan) for seed in (4, 9) for plan in range(3)]
    assert [one.row["made"]["words"] > 1000 for one in made] == [False, True, False] * 2
    assert len({one.row["id"] for one in made}) == 6 and json.loads(json.dumps(made[0].row)) == made[0].row


@pytest.mark.parametrize(
    ("how", "message"),
    [((0, (0,), (300,)), "make.rows is 0"), ((1, (), (300,)), "make.seeds is ()"), ((1, (2, 2), (300,)), "make.seeds is (2, 2)"),
     ((1, (0,), ()), "make.words is ()"), ((1, (0,), (99,)), "from 100 to 20000"), ((1, (0,), (20_001,)), "from 100 to 20000")],
)  # fmt: skip
def test_what_cannot_be_made(how, message):
    with pytest.raises(UserError) as error:
        make_rows(*how)
    assert message in str(error.value)
