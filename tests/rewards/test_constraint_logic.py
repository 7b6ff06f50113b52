"""Composition, regular expressions from data, back-translation, and the public code's defects that ours must not have."""

import json
import random
import sys

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.constraints import ConstraintsReward, back_translate, check, check_strict, describe, example, names
from jaxrl_llm.rewards.constraints.patterns import count_matches, nested_repetition, written_out
from jaxrl_llm.rewards.constraints.table import TABLE
from jaxrl_llm.rewards.verdict import RewardInput, Status

CATASTROPHIC = r"(a|aa)+$"
ENDLESS = {"name": "format:pattern_count", "kwargs": {"pattern": CATASTROPHIC, "low": 1, "high": 1}}
BOMB = "a" * 5000 + "!"


def has(*words):
    return {"name": "keywords:words", "kwargs": {"words": list(words)}}


CLOSED = {"name": "logic:if", "kwargs": {"condition": has("zebra"), "then": has("stripes")}}


def status(name, text, **kwargs):
    return check(f"logic:{name}", text, **kwargs).status


# ---- three-valued logic


@pytest.mark.parametrize(
    "parts, of_all, of_any",
    [
        ([has("a"), has("b")], Status.FAIL, Status.PASS), ([has("a")], Status.PASS, Status.PASS), ([has("b")], Status.FAIL, Status.FAIL),
        ([CLOSED], Status.NOT_APPLICABLE, Status.NOT_APPLICABLE), ([CLOSED, has("a")], Status.PASS, Status.PASS),
        ([CLOSED, has("b")], Status.FAIL, Status.FAIL),
    ],
)  # fmt: skip
def test_all_and_any(parts, of_all, of_any):
    assert status("all", "a", parts=parts) is of_all and status("any", "a", parts=parts) is of_any


def test_what_cannot_be_decided_stays_open_unless_the_others_settle_it():
    assert check(ENDLESS["name"], BOMB, **ENDLESS["kwargs"]).status is Status.TIMEOUT
    assert status("all", BOMB, parts=[ENDLESS, has("zebra")]) is Status.FAIL
    assert status("all", BOMB, parts=[ENDLESS, {"name": "punctuation:no_comma"}]) is Status.TIMEOUT
    assert status("any", BOMB, parts=[ENDLESS, {"name": "punctuation:no_comma"}]) is Status.PASS
    assert status("any", BOMB, parts=[ENDLESS, has("zebra")]) is Status.TIMEOUT
    for name, kwargs in (
        ("not", {"part": ENDLESS}),
        ("if", {"condition": ENDLESS, "then": has("a")}),
        ("on", {"span": {"kind": "line"}, "part": ENDLESS}),
    ):
        assert status(name, BOMB, **kwargs) is Status.TIMEOUT


def test_not_and_if():
    assert status("not", "a", part=has("b")) is Status.PASS and status("not", "b", part=has("b")) is Status.FAIL
    assert status("not", "a", part=CLOSED) is Status.NOT_APPLICABLE
    assert status("if", "a", condition=has("b"), then=has("c")) is Status.NOT_APPLICABLE
    assert status("if", "b", condition=has("b"), then=has("c")) is Status.FAIL
    assert status("if", "b c", condition=has("b"), then=has("c")) is Status.PASS
    assert status("if", "a", condition=has("b"), then=has("c"), otherwise=has("a")) is Status.PASS


@pytest.mark.parametrize(
    "span, text",
    [
        ({"kind": "sentence", "place": 2}, "Go. A cat! No."), ({"kind": "sentence", "place": -2}, "Go. A cat! No."),
        ({"kind": "paragraph"}, "cat\n\ndog"),
        ({"kind": "line", "place": -1}, "dog\ncat\n"), ({"kind": "code block", "place": 1.0}, "```\ncat\n```"),
        ({"kind": "tag", "tag": "a"}, "dog <a>cat</a>"),
        ({"after": "So:"}, "dog So: cat"), ({"before": "So:"}, "cat So: dog"), ('{"kind": "line"}', "cat\ndog"),
        ({"kind": "line", "place": None}, "cat"),
    ],
)  # fmt: skip
def test_on_a_part_of_the_response(span, text):
    assert status("on", text, span=span, part=has("cat")) is Status.PASS
    assert status("on", text, span=span, part=has("dog")) is Status.FAIL
    assert status("on", "", span=span, part={"name": "punctuation:no_comma"}) is Status.FAIL  # there is no such part


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("all", {"parts": []}, "list of 1 to 30 constraints"), ("all", {"parts": [{"name": "no:such"}]}, "unknown constraint 'no:such'"),
        ("not", {"part": {"name": "keywords:words", "kwargs": {}}}, "needs the parameter 'words'"),
        ("not", {"part": "punctuation:no_comma"}, "a constraint"),
        ("not", {"part": {"name": "punctuation:no_comma", "more": 1}}, "a constraint"), ("if", {"condition": has("a")}, "needs the parameter 'then'"),
        ("on", {"span": {"kind": "word"}, "part": has("a")}, "a part of the response"),
        ("on", {"span": {"kind": "tag"}, "part": has("a")}, "a part of the response"),
        ("on", {"span": {"kind": "line", "place": 0}, "part": has("a")}, "1 is the first"),
        ("on", {"span": {"after": " "}, "part": has("a")}, "not blank"),
    ],
)  # fmt: skip
def test_careless_compositions(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        check(f"logic:{name}", "a", **kwargs)


def test_compositions_nest_up_to_a_depth():
    part = has("a")
    for _ in range(5):
        part = {"name": "logic:not", "kwargs": {"part": part}}
    assert check(part["name"], "a", **part["kwargs"]).status is Status.FAIL  # five times not
    assert describe(part["name"], **json.loads(json.dumps(part["kwargs"]))).count("Do not do this") == 5
    with pytest.raises(UserError, match="nested at most 6 deep"):
        check("logic:not", "a", part={"name": "logic:not", "kwargs": {"part": {"name": "logic:not", "kwargs": {"part": part}}}})
    endless: dict = {"name": "logic:not", "kwargs": {}}
    endless["kwargs"]["part"] = endless
    with pytest.raises(UserError, match="nested at most 6 deep"):
        check("logic:not", "a", part=endless)


# ---- regular expressions from data


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"([a-z]*)*b", r"(?:\w+)+!", r"(.*){2,}x", r"([^]\]]+)*"])
def test_a_repetition_of_a_repetition_is_refused(pattern):
    assert nested_repetition(pattern)
    with pytest.raises(UserError, match="repeats no repetition without bound"):
        check("format:matches", "a", pattern=pattern)


@pytest.mark.parametrize("pattern", [r"(?:\d+,)*\d+", r"\(a+\)+", r"(ab+c)*", r"(a+){2}", r"[(a+)+]", r"(a)+", r"a{2,}"])
def test_others_are_taken(pattern):
    assert not nested_repetition(pattern)
    assert check("format:matches", "zzz", pattern=pattern).status is Status.FAIL


@pytest.mark.parametrize(
    "pattern, size", [("(ab{3}){5}", 20), ("a{2,}b", 3), (r"[abc]{,4}\d", 5), ("a{x}", 4), ("((a{10}){10}){10}", 1000), ("", 0), (r"\(a\){3}", 5)]
)
def test_the_size_of_a_pattern(pattern, size):
    assert written_out(pattern) == size


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){1000}", "(?:a{200}){200}", "a{10001}", "a{0,99999999999999999999}"])
def test_a_pattern_that_would_fill_the_memory_is_refused_before_it_is_compiled(pattern):
    with pytest.raises(UserError, match="at most 10000 parts"):
        check("format:matches", "a", pattern=pattern)


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a", "\\", "a" * 501, "", 3])
def test_no_pattern(pattern):
    with pytest.raises(UserError, match="it must be a regular expression"):
        check("format:matches", "a", pattern=pattern)


@pytest.mark.parametrize("pattern", [CATASTROPHIC, r"(.*a){20}b", r"(a?){30}a{30}b"])
def test_a_catastrophic_pattern_is_a_timeout_and_no_score(pattern):
    verdict = check("format:pattern_count", BOMB, pattern=pattern, low=1, high=2)
    assert verdict.status is Status.TIMEOUT and verdict.value is None and "given up" in verdict.reason
    rules = [{"name": "format:pattern_count", "kwargs": {"pattern": pattern, "low": 1, "high": 2}}]
    assert ConstraintsReward(reduce="mean")([RewardInput("", BOMB, row={"constraints": rules})])[0].status is Status.TIMEOUT


def test_patterns_count_and_match():
    assert count_matches("a", "aaaa") == 4 and count_matches("a", "aaaa", 2) == 2
    assert check("format:matches", " ab\n", pattern="a.").status is Status.PASS
    assert check("format:matches", "abc", pattern="a.").status is Status.FAIL
    assert count_matches(r"^\d", "1\n2\nx3") == 2  # ^ is the start of a line


# ---- back-translation

TEXT = "# The Mill\n\nThe old mill stood by the river [1]. Nobody had opened it for 30 years.\n\n"
TEXT += "- A lamp\n- A letter\n\nWho wrote the letter? The teacher did."


def test_constraints_are_read_off_a_text():
    found = back_translate(TEXT, 8, seed=3)
    assert len(found) == 8 == len({entry["name"] for entry in found})
    assert found == back_translate(TEXT, 8, seed=3) != back_translate(TEXT, 8, seed=4)
    json.dumps(found)
    for entry in found:
        assert check(entry["name"], TEXT, **entry["kwargs"]).status is Status.PASS and entry["text"] == describe(entry["name"], **entry["kwargs"])
    reward = ConstraintsReward()([RewardInput("", TEXT, row={"constraints": found and [{"name": e["name"], "kwargs": e["kwargs"]} for e in found]})])
    assert reward[0].status is Status.PASS


def test_back_translation_covers_the_table_and_keeps_to_it():
    seen, broken = set(), 0
    for name in names():
        _, good, bad = example(name, random.Random(1))
        for seed in range(2):
            found = back_translate(good, 200, seed=seed)
            seen |= {entry["name"] for entry in found}
            broken += sum(check(entry["name"], bad, **entry["kwargs"]).status is Status.FAIL for entry in found)
    readable = {name for name in names() if TABLE[name].derive is not None}
    assert seen == readable and len(readable) >= 85
    assert broken > 1000  # what is asked for is no truism: another text breaks it


def test_what_to_draw_from():
    assert {entry["name"] for entry in back_translate(TEXT, 9, only=["length:words", "numbers:count"])} == {"length:words", "numbers:count"}
    with pytest.raises(UserError, match="did you mean length:words"):
        back_translate(TEXT, 1, only=["length:word"])
    with pytest.raises(UserError, match="cannot be read off a response"):
        back_translate(TEXT, 1, only=["logic:all"])
    assert back_translate("", 5, only=["length:words"]) == []


def test_bounds_come_from_below_and_from_above():
    relations = {back_translate(TEXT, 1, seed=seed, only=["length_constraints:number_words"])[0]["kwargs"]["relation"] for seed in range(12)}
    assert relations == {"at least", "less than"}


# ---- defects of the public code, each one a test


def test_one_broken_row_does_not_cost_the_batch_its_scores(repo):
    """VerIF: an exception in one worker makes every reward of the batch -1."""
    from jaxrl_llm.rewards.registry import get_reward, score

    rows = [{"constraints": [{"name": name}]} for name in ("punctuation:no_comma", "no:such", "punctuation:no_comma")]
    verdicts = score(get_reward("constraints"), [RewardInput("", "a, b", row=row) for row in rows])
    assert [verdict.status for verdict in verdicts] == [Status.FAIL, Status.ERROR, Status.FAIL]
    assert verdicts[1].value is None


def test_a_closed_gate_an_error_and_a_failure_are_three_things():
    """AgentIF: null stands for a gate that is closed, an error and an answer that could not be read, and all leave the denominator."""
    rules = {"closed": [CLOSED], "timeout": [ENDLESS], "failed": [has("zebra")]}
    found = {name: ConstraintsReward()([RewardInput("", BOMB, row={"constraints": given})])[0].status for name, given in rules.items()}
    assert found == {"closed": Status.NOT_APPLICABLE, "timeout": Status.TIMEOUT, "failed": Status.FAIL}


def test_a_gate_with_nothing_behind_it_is_refused():
    """AgentIF: twelve constraints are a condition alone, and are judged by searching the response for YES."""
    with pytest.raises(UserError, match="needs the parameter 'then'"):
        check("logic:if", "YES", condition=has("YES"))


def test_an_unknown_rule_is_said_and_not_dropped():
    """VerIF: a checker without a known tag is dropped in silence."""
    with pytest.raises(UserError, match="row 7: unknown constraint"):
        ConstraintsReward().validate_rows([{"id": 7, "constraints": [{"name": "Number_Paragraphs"}]}])


def test_a_missing_argument_is_no_random_one():
    """IFEval's code draws an argument that is missing (or 0, or a letter that is none from a to z) at random."""
    with pytest.raises(UserError, match="needs the parameter 'num_words'"):
        check("length_constraints:number_words", "a", relation="at least")
    verdicts = {check("keywords:letter_frequency", "# #", letter="#", let_frequency=2, let_relation="at least").status for _ in range(20)}
    assert verdicts == {Status.PASS}
    assert check("keywords:frequency", "", keyword="a", frequency=0, relation="at least").status is Status.PASS


def test_a_keyword_is_no_pattern():
    """IFEval's code searches keywords as regular expressions: "C++" is an error there, "a.b" is found in "axb"."""
    assert check("keywords:existence", "I like C++.", keywords=["C++"]).status is Status.PASS
    assert check("keywords:existence", "axb", keywords=["a.b"]).status is Status.FAIL
    assert check("keywords:forbidden_words", "I like C++!", forbidden_words=["C++"]).status is Status.FAIL
    assert check("detectable_format:multiple_sections", "PartX 1", section_spliter="Part.", num_sections=1).status is Status.FAIL
    assert check("keywords:frequency", "(( (", keyword="(", frequency=3, relation="at least").status is Status.PASS


def test_a_language_is_the_same_at_every_call(monkeypatch):
    """IFEval's code asks langdetect, which draws at random without a seed; ours needs neither that package nor a download."""
    monkeypatch.setitem(sys.modules, "langdetect", None)
    verdicts = {check("language:response_language", "la casa no es tan grande", language="es").status for _ in range(20)}
    assert verdicts == {Status.PASS}


def test_deep_json_is_a_verdict():
    """IFEval's code lets the RecursionError of deeply nested JSON end the run."""
    for name, kwargs in (("detectable_format:json_format", {}), ("format:json_schema", {"schema": {}}), ("tools:none", {})):
        assert check(name, "[" * 100_000, **kwargs).status is (Status.PASS if name == "tools:none" else Status.FAIL)


def test_white_space_does_not_count_chinese_words():
    """WildReward counts words between white space, so that a Chinese text has one."""
    assert check("length:words", "他们在河边玩。", low=6, high=6).status is Status.PASS


def test_a_blank_answer_follows_nothing_in_ifeval():
    assert {check_strict(name, " ", **example(name, random.Random(0))[0]).status for name in names()} == {Status.FAIL}
