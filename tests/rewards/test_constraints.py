"""Every rule with a satisfying and a violating response, IFEval's real instructions, and the errors of a careless call."""

import collections
import json

import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import constraints
from jaxrl_llm.rewards.constraints import ConstraintsReward, check
from jaxrl_llm.rewards.text_measures import count_sentences, looks_english
from jaxrl_llm.rewards.verdict import RewardInput, Status

# name -> (kwargs, responses that satisfy, responses that violate)
CASES = {
    "keywords:existence": [
        ({"keywords": ["Cat", "dog"]}, ["A CAT and a dog.", "concatenate dogs"], ["a cat", ""]),
    ],
    "keywords:frequency": [
        ({"keyword": "war", "frequency": 2, "relation": "at least"}, ["War and war", "warwar"], ["war", ""]),
        ({"keyword": "war", "frequency": 2, "relation": "less than"}, ["war", ""], ["War war"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["rock", "C++"]}, ["rocky rocks", "C is fine", ""], ["a Rock!", "I write c++ code"]),
    ],
    "keywords:letter_frequency": [
        ({"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["Quick q", "qQ"], ["quick"]),
        ({"letter": "#", "let_frequency": 1, "let_relation": "less than"}, ["no hash"], ["# title"]),
        ({"letter": "A", "let_frequency": 3, "let_relation": "at least"}, ["banana"], ["bandan"]),
    ],
    "length_constraints:number_sentences": [
        (
            {"num_sentences": 2, "relation": "at least"},
            ["One. Two.", "Really? Yes", "He said. “Go!” She went."],
            ["One", "Mr. Smith went", ""],
        ),
        ({"num_sentences": 2, "relation": "less than"}, ["It cost 3.50 dollars at 3 p.m. here", ""], ["One. Two."]),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb\n***", "a *** b"], ["a\n\nb", "a\n***\n***\nb", "a"]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, "relation": "at least"}, ["one two three", "don't you"], ["one two", ""]),
        ({"num_words": 3, "relation": "less than"}, ["one two", ""], ["one two three"]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
            ["a\n\nweekend plans", 'a b\n\n\n"Weekend," he said', "a\n\n'weekend' x"],
            ["a\n\n\n\nweekend", "a\n\nthe weekend", "weekend\n\na", "a\n\nweekend\n\nb", "a\n\nweekends", "weekend"],
        ),
        ({"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"}, [], ["a"]),
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[name] of [street]", "[a][b][c]"], ["[name]", "name"]),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, ["Bye\nP.S. hi", "bye p. s. hi"], ["Bye", "PS hi"]),
        ({"postscript_marker": "P.P.S"}, ["Bye\nP.P.S hi", "P. P. S. hi"], ["P.S. hi"]),
        ({"postscript_marker": "Note:"}, ["note: x"], ["not x"]),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, ["* a\n* b", "- a\n  * b\ntext", "-a\n-b"], ["* a", "* a\n* b\n* c", "** a **\n* b", ""]),
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", "Well. My answer is maybe. So."], ["my answer is yes.", "Yes.", "My answer is perhaps."]),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, ["*a* and *b*", "**a** and *b*"], ["*a*", "** ** and *b*", "* a\n* b"]),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "Section", "num_sections": 2},
            ["Section 1\na\nSection 2\nb", "Section 1Section2"],
            ["Section 1\na", "SECTION 1 SECTION 2"],
        ),
    ],
    "detectable_format:json_format": [
        ({}, ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[1]\n```", "3"], ["{'a': 1}", "a: 1", "", "[" * 100_000]),
    ],
    "detectable_format:title": [
        ({}, ["<<A title>>\ntext", "text << t >>"], ["<A title>", "<<>>", "<< >>", "<<a\nb>>"]),
    ],
    "combination:two_responses": [
        ({}, ["a\n******\nb", "******a******b"], ["a", "a******a", "a******b******c", "a************b"]),
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Write a poem. "}, ["write a poem.\nRoses", " Write a poem."], ["Sure! Write a poem.", "Write"]),
    ],
    "startend:end_checker": [
        ({"end_phrase": "That is all!"}, ["Hello. that is all!\n", '"So that is all!"'], ["That is all! Bye", ""]),
    ],
    "startend:quotation": [
        ({}, ['"quoted"', ' "" '], ['"open', "none", '"']),
    ],
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 2, "capital_relation": "at least"}, ["NASA and IBM", "I am OK"], ["Nasa IBM"]),
        ({"capital_frequency": 2, "capital_relation": "less than"}, ["A day", "COVID-19 spread"], ["NASA IBM"]),
    ],
    "change_case:english_capital": [
        ({}, ["HELLO THERE 42!"], ["Hello THERE", "", "ПРИВЕТ", "ICH HABE HEUTE KEINE ZEIT UND GEHE JETZT NACH HAUSE ZU MEINER MUTTER"]),
    ],
    "change_case:english_lowercase": [
        (
            {},
            ["hello there, 42!", "once upon a time there was a little girl who loved to play in the park with her mom"],
            ["Hello", "", "привет мир", "había una vez una niña que vivía con sus padres cerca del mar azul"],
        ),
    ],
    "punctuation:no_comma": [
        ({}, ["no pause; here", "", "Chinese，is another"], ["a, b"]),
    ],
    "keywords:words": [
        ({"words": ["needle", "Lily"]}, ["lily had a Needle."], ["needles for Lily", "Lily", "LilyNeedle"]),
    ],
    "startend:opening": [
        ({"opening": "One day, "}, ["One day, a", " One day,"], ["one day, a", "Once", "a One day, b"]),
    ],
    "startend:full_sentence": [
        ({}, ["They played.", 'She said, "Hi!"\n', "Why?"], ["They pl", "", "...", "They played. And"]),
    ],
}
ROWS = [(name, kwargs, good, bad) for name, cases in CASES.items() for kwargs, good, bad in cases]


@pytest.mark.parametrize("name, kwargs, good, bad", ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_satisfying_and_violating_responses(name, kwargs, good, bad):
    assert [(text, check(name, text, **kwargs).reason) for text in good if check(name, text, **kwargs).status is not Status.PASS] == []
    assert [(text, check(name, text, **kwargs).reason) for text in bad if check(name, text, **kwargs).status is not Status.FAIL] == []
    assert all(check(name, text, **kwargs).reason.startswith(name + ": ") for text in good + bad)


def test_all_834_real_instructions_are_accepted_and_can_pass_or_fail(assets):
    lines = (assets / "data/ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    counts, verdicts = collections.Counter(), collections.Counter()
    for row in rows:
        for name, kwargs in constraints.read_constraints(row):
            counts[name] += 1
            verdicts[check(name, row["prompt"], **kwargs).status] += 1
    assert sum(counts.values()) == 834 and len(counts) == 25
    assert counts["punctuation:no_comma"] == 66 and counts["length_constraints:number_words"] == 52
    assert verdicts[Status.PASS] > 100 and verdicts[Status.FAIL] > 100
    assert set(verdicts) == {Status.PASS, Status.FAIL}
    # Tables read from parquet hold every parameter's column, None where it is another rule's.
    every = {key: None for entry in rows for kwargs in entry["kwargs"] for key in kwargs}
    padded = [{**row, "kwargs": [{**every, **kwargs} for kwargs in row["kwargs"]]} for row in rows]
    assert [constraints.read_constraints(row) for row in padded] == [constraints.read_constraints(row) for row in rows]


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("length_constraints:number_word", {"num_words": 3, "relation": "at least"}, "did you mean length_constraints:number_words"),
        ("punctuation:no_comma", {"relation": "at least"}, "has no parameter 'relation'"),
        ("length_constraints:number_words", {"num_wrods": 3, "relation": "at least"}, "did you mean num_words"),
        ("length_constraints:number_words", {"num_words": 3}, "needs the parameter 'relation' (one of at least, less than)"),
        ("length_constraints:number_words", {"num_words": 3, "relation": None}, "needs the parameter 'relation'"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "more than"}, "it must be one of at least, less than"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "it must be a whole number"),
        ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "it must be a whole number"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, "it must be a whole number"),
        ("detectable_format:number_bullet_lists", {"num_bullets": -1}, "it must be a whole number"),
        ("keywords:existence", {"keywords": "cat"}, "it must be a list of strings"),
        ("keywords:existence", {"keywords": []}, "it must be a list of strings"),
        ("keywords:existence", {"keywords": ["cat", " "]}, "it must be a list of strings"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "it must be one character"),
        ("startend:end_checker", {"end_phrase": " "}, "it must be a string that is not blank"),
    ],
)
def test_careless_calls(name, kwargs, message):
    with pytest.raises(UserError) as error:
        check(name, "text", **kwargs)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("...", 0),
        ("no stop", 1),
        ("One. Two! Three? Four", 4),
        ("Dr. Smith met J. K. Rowling at 3.30 p.m. in the U.S. yesterday. They talked.", 2),
        ("1. First item here.\n2. Second item here.", 2),
        ('He said, "Stop!" Then he left...', 2),
        ("It was so... strange. Really?!", 2),
        ("So did I. You too.", 2),
        ("你好。再见。", 2),
        ("A title\n\nThen a sentence.", 1),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "der hund lief durch den garten und sah eine katze die auf dem baum saß",
        "le petit chat est parti dans la forêt avec son ami le chien",
        "il ragazzo andò al mercato con la madre per comprare del pane fresco",
        "de jongen liep naar het park met zijn hond en speelde de hele dag",
        "mtoto alienda sokoni na mama yake kununua matunda mengi sana",
        "это русский текст",
        "한국어 문장입니다",
    ],
)
def test_other_languages_are_not_english(text):
    assert not looks_english(text)


def test_real_stories_are_english(assets):
    stories = (assets / "data/tinystories/tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    assert all(looks_english(story) for story in stories)


def item(response, rules, prompt="", **row):
    return RewardInput(prompt=prompt, response=response, row={"id": "r1", "constraints": rules, **row})


RULES_OF_ROW = [
    {"name": "punctuation:no_comma", "kwargs": {}},
    {"name": "keywords:words", "kwargs": {"words": ["cat"]}},
    {"name": "length_constraints:number_words", "kwargs": {"num_words": 4, "relation": "less than"}},
    {"name": "startend:full_sentence"},
]


def test_the_reward_is_all_or_the_share():
    responses = ["The cat sat.", "The cat sat", "A dog, it is a dog"]
    inputs = [item(response, RULES_OF_ROW) for response in responses]
    assert [v.value for v in ConstraintsReward()(inputs)] == [1.0, 0.0, 0.0]
    shares = ConstraintsReward(reduce="mean")(inputs)
    assert [v.value for v in shares] == [1.0, 0.75, 0.0]
    assert [v.status for v in shares] == [Status.PASS, Status.FAIL, Status.FAIL]
    assert "missing: cat" in shares[2].reason and "1 commas" in shares[2].reason


def test_the_prompt_may_be_part_of_the_text():
    opening = [{"name": "startend:opening", "kwargs": {"opening": "Once upon"}}]
    story = item("a time.", opening, prompt="Once upon ")
    assert ConstraintsReward()([story])[0].status is Status.FAIL
    assert ConstraintsReward(include_prompt=True)([story])[0].status is Status.PASS


@pytest.mark.parametrize("form", [lambda x: x, json.dumps, lambda x: np.array(x, dtype=object)], ids=["list", "json", "array"])
def test_rules_may_be_a_list_or_json(form):
    assert ConstraintsReward()([item("The cat sat.", form(RULES_OF_ROW))])[0].status is Status.PASS
    other = RewardInput("", "The cat sat.", row={"rules": form(RULES_OF_ROW)})
    assert ConstraintsReward(field="rules")([other])[0].status is Status.PASS


CLOSED = {"name": "logic:if", "kwargs": {"condition": {"name": "keywords:words", "kwargs": {"words": ["zebra"]}}, "then": RULES_OF_ROW[0]}}
TOO_LONG = "The cat sat. " * 100_000


def test_a_row_without_rules_and_one_whose_conditions_are_not_met():
    verdicts = ConstraintsReward(reduce="mean")([item("The cat sat.", rules) for rules in ([], None, [CLOSED], [*RULES_OF_ROW, CLOSED])])
    assert [v.status for v in verdicts] == [Status.NOT_APPLICABLE] * 3 + [Status.PASS]
    assert verdicts[3].reason == "all 4 constraints hold"


def test_what_cannot_be_checked_is_an_error_and_no_score():
    verdict = ConstraintsReward(reduce="mean")([item(TOO_LONG, RULES_OF_ROW)])[0]
    assert verdict.status is Status.ERROR and verdict.value is None and "characters" in verdict.reason


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"constraints": [{"name": "punctuation:no_coma"}]},
            "row r1: unknown constraint 'punctuation:no_coma'; did you mean punctuation:no_comma",
        ),
        ({"constraints": ["punctuation:no_comma"]}, "must hold a list of"),
        ({"constraints": {"name": "punctuation:no_comma"}}, "must hold a list"),
        ({"constraints": "[{"}, "is not JSON"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "1 entries in 'instruction_id_list' but 2 in 'kwargs'"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(UserError) as error:
        ConstraintsReward().validate_rows([{"id": "r1", **row}])
    assert message in str(error.value)


def test_an_unknown_way_to_reduce():
    with pytest.raises(UserError, match="'all' or 'mean'"):
        ConstraintsReward(reduce="sum")
