"""The constraints beyond IFEval's: verdicts worked out by hand, at the edges of each definition."""

# ruff: noqa: E501 - wide scripts count double

import json
import sys

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.constraints import check
from jaxrl_llm.rewards.constraints.json_schema import equal, schema, violation
from jaxrl_llm.rewards.constraints.kinds import WrongKind
from jaxrl_llm.rewards.constraints.language import LANGUAGES, detect
from jaxrl_llm.rewards.constraints.numbers import numbers
from jaxrl_llm.rewards.constraints.tools import Call, read_calls
from jaxrl_llm.rewards.text_measures import count_words, words
from jaxrl_llm.rewards.verdict import Status

FENCED = "Here:\n```python\n# not a heading\n- not an item\n**no**\n```\n"
TABLE = "| a | b |\n|:--|--:|\n| 1 | 2 |\n| 3 | 4 |\n"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call>'
# name, parameters, texts that satisfy, texts that violate
CASES = [
    ("length:words", {"low": 3, "high": 3}, ["don't go", "你好吗", "Tokyo 東京"], ["one two", "你好", ""]),
    ("length:sentences", {"low": 2, "high": 2}, ["Dr. A. B. Ito came. He left."], ["One.", "One. Two. Three."]),
    ("length:characters", {"low": 2, "high": 3}, ["ab", " abc\n", "你好"], ["a", "abcd", ""]),
    ("length:lines", {"low": 2, "high": 2}, ["a\n\n \nb", "a\r\nb"], ["a", "a\nb\nc"]),
    ("length:paragraphs", {"low": 2, "high": 2}, ["a\nb\n\n\n\nc", "\n\na\n \t\nb\n\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("length:words_per_sentence", {"most": 2}, ["Go on. Stop it!", ""], ["Go on now. Stop."]),
    ("length:sentences_per_paragraph", {"low": 1, "high": 2}, ["A b. C d.\n\nE f."], ["A b. C d. E f.", ""]),
    ("length:words_per_line", {"most": 2}, ["one two\nthree", ""], ["one two three"]),
    ("length:different_words", {"least": 2}, ["a A b"], ["a A a"]),
    ("length:variety", {"least": 0.5, "window": 2}, ["a b b b b b"], ["", "   "]),
    ("length:variety", {"least": 0.6}, ["a b c"], ["a b b b", "a a"]),
    ("keywords:order", {"words": ["cat", "dog"]}, ["Cat, dog, cat"], ["dog cat", "cats dog", "cat"]),
    ("keywords:order", {"words": ["cat", "cat"]}, ["cat cat"], ["cat"]),
    ("keywords:in_sentence", {"word": "cat", "sentence": -1}, ["A dog. A cat!"], ["A cat. A dog.", "", "A dog. Cats."]),
    ("keywords:in_paragraph", {"word": "cat", "paragraph": 2}, ["a\n\ncat"], ["cat\n\na", "cat"]),
    ("keywords:every_paragraph", {"word": "cat"}, ["cat\n\na CAT"], ["cat\n\na", ""]),
    ("keywords:count", {"word": "cat", "low": 1, "high": 1}, ["cat cats concat"], ["cat cat", "cats"]),
    ("keywords:forbidden_phrases", {"phrases": ["as an AI"]}, ["as an aid? no: as one"], ["As\nan  ai model"]),
    ("keywords:some_of", {"words": ["a", "b", "c"], "least": 2}, ["a c"], ["a a", "ab"]),
    ("keywords:no_doubled_word", {}, ["so, so", "1 1", "a-a"], ["the the", "The the"]),
    ("keywords:no_repeated_sentence", {}, ["A b. A b c."], ["A b. A B!"]),
    ("startend:first_word", {"word": "once"}, ['"Once" upon'], ["At once", ""]),
    ("startend:last_word", {"word": "end"}, ["The END!", "the (end)."], ["ends", "end it"]),
    ("startend:every_line", {"start": "- "}, ["- a\n\n  -b"], ["- a\nb", ""]),
    ("startend:acrostic", {"letters": "hi"}, ["*Ho\n- it"], ["ho", "ho\nho\nit"]),
    ("startend:every_sentence_letter", {"letter": "s"}, ["So it is. “Such” is life."], ["So. No.", ""]),
    ("copy:exact", {"copy": "a  b"}, [" a  b\n"], ["a b", "A  b", "a  b."]),
    ("copy:contains", {"copy": "a  b"}, ["xa  by"], ["a b"]),
    ("copy:one_of", {"options": ["yes", "no"]}, ["yes\n"], ["Yes", "yes no", ""]),
    ("punctuation:forbidden", {"characters": "! ;"}, ["a b"], ["a!", "a;"]),
    ("punctuation:count", {"mark": "?", "low": 0, "high": 1}, ["a?", ""], ["a??"]),
    ("punctuation:balanced", {}, ["([{}])", ""], ["(]", ")(", "("]),
    ("change_case:sentence_starts", {}, ["A b. “C d.”", "1 a.", "", "At 3 p.m. they left... and so on."], ["A b. c d.", "a b."]),
    ("change_case:words_in_capitals", {"words": ["nasa"]}, ["NASA, NASA!"], ["Nasa", "NASA nasa", "none"]),
    ("format:headings", {"low": 1, "high": 1}, ["# A\n" + FENCED, "### A #"], [FENCED, "#A", "# A\n## B", "####### A"]),
    ("format:headings", {"low": 1, "high": 1, "level": 2}, ["# A\n## B"], ["# A"]),
    ("format:heading_titles", {"titles": ["One", "Two"]}, ["# ONE\n## x\n# two ##"], ["# Two\n# One", "# One\nTwo"]),
    ("format:table", {"columns": 2, "rows": 2}, [TABLE, "a|b\n-|-\n1|2\n3|4"], [TABLE[:-10], "| a | b |\n| 1 | 2 |", f"```\n{TABLE}```"]),
    ("format:code_blocks", {"least": 1, "language": "python"}, [FENCED, "~~~python\nx\n~~~"], ["```\nx\n```", "```python\nx", "`python`"]),
    ("format:numbered_list", {"items": 2}, ["1. a\n2) b", "1. a\n   - x\n\n2. b"], ["1. a\n3. b", "1. a", "1.a\n2.b"]),
    ("format:nested_list", {"depth": 2}, ["- a\n  - b", "1. a\n\t* b"], ["- a\n- b", "- a\nText\n  - b", FENCED]),
    ("format:bullet_list", {"items": 2}, ["- a\n  * b", "- a\n+ b\n---\n**c**"], ["- a", "-a\n-b", FENCED]),
    ("format:bold", {"least": 1}, ["a **b c** d", "__b__"], ["** **", "*b*", "**b\nc**", FENCED, "****"]),
    ("format:links", {"least": 1}, ["[a](http://b)"], ["[a] (b)", "[](b)", "[a]()"]),
    ("format:block_quotes", {"least": 2}, ["> a\n> b\n\n> c"], ["> a\n> b", "a > b"]),
    ("format:plain", {}, ["Plain, 3 * 4 = 12. - so", "#hashtag"], ["# A", "- a", "1. a", TABLE, "**b**", "[a](b)", FENCED]),
    ("format:json_keys", {"keys": ["a"]}, ['{"a": null}', '```json\n{"a": 1}\n```'], ['[{"a": 1}]', '{"b": {"a": 1}}', "a", '{"a": NaN}']),
    ("format:json_lines", {"records": 2}, ['{"a": 1}\n\n{}'], ['{"a": 1}', "{}\n[]", "{}\n{"]),
    ("format:csv", {"columns": ["a", "b"], "rows": 1}, ['a,b\n"x, y",2'], ["a,b", "a,b\n1", "b,a\n1,2", 'a,b\n"1,2', ""]),
    ("format:tags", {"tags": ["t", "a"]}, ["<t>x</t> \n<a>y</a>", "<t></t><a></a>"], ["<a>y</a><t>x</t>", "<t>x</t>", "so <t>x</t><a>y</a>", "<t><t>x</t></t><a></a>"]),
    ("format:tagged", {"tag": "a", "low": 1, "high": 1}, ["<a>x</a>", "<a>x</a><a>"], ["</a>x<a>", "<a>x</a><a>y</a>", "<A>x</A>"]),
    ("numbers:count", {"low": 2, "high": 2}, ["1,234.5 and -3", "B2 and 3rd: 4, 5"], ["1.2.3", "2024", "1 2 3"]),
    ("numbers:contains", {"value": 1234.5, "tolerance": 0.1}, ["about 1,234.5!", "1234.45"], ["12,345", "x1234.5x", ""]),
    ("numbers:range", {"low": 0, "high": 10}, ["0, 5.5 and 10"], ["-1", "10.1", "none"]),
    ("numbers:sum", {"total": 0.3}, ["0.1 + 0.2"], ["0.1 + 0.3", ""]),
    ("numbers:ascending", {}, ["1, 2, 2, 3"], ["2, 1", "none"]),
    ("numbers:no_digits", {}, ["three", ""], ["3", "٣", "²"]),
    ("numbers:with_unit", {"unit": "km", "least": 2}, ["3 km and 4km", "1\u00a0km, 2 km."], ["3 km", "3 kmh 4 km", "km km"]),
    ("numbers:dates", {"least": 1}, ["on 2024-02-29."], ["2023-02-29", "12024-02-29", "2024-2-9", "2024-01-01-5"]),
    ("citations:number", {"least": 2}, ["a [1] b [2].", "a [1, 3]"], ["a [1] [1]", "[1](http://a) [2]", "a [x]", "a [1]\n\nReferences\n[2] b"]),
    ("citations:known", {"sources": 2}, ["a [1]"], ["a [3]", "a [0]", "a", "a [1, 9]"]),
    ("citations:every_paragraph", {}, ["a [1]\n\nb [2]\n\n# References\n\n[1] x"], ["a [1]\n\nb", ""]),
    ("citations:listed", {}, ["a [1; 2]\n\n**Sources:**\n1. x\n2. y"], ["a [1]", "a [1]\nReferences\n[2] y", "a [1]\nReferences\n[1] x\n[2] y"]),
    ("language:is", {"language": "zh"}, ["他们在河边玩。OK"], ["They play.", "こんにちは、元気ですか。", "123", ""]),
    ("language:every_paragraph", {"language": "de"}, ["Das ist gut.\n\n123\n\nWir sind hier und das ist alles."], ["Das ist gut.\n\nThis is not what we want.", "123"]),
    ("language:script", {"script": "Han", "least": 0.5}, ["你好 ok", "你"], ["你 hello", "123"]),
    ("language:without_script", {"script": "Latin"}, ["你好 1", "Привет", ""], ["你好 a", "Ａ"]),
    ("language:chinese_characters", {"low": 2, "high": 3}, ["你好 abc", "你，好。吗"], ["你", "你好你好", "カナ"]),
    ("language:chinese_form", {"form": "simplified"}, ["我们说话", "你们好"], ["我們說話", "我们說话", "你好"]),
    ("tools:calls", {"tool": "weather"}, [CALL, '[{"name": "weather"}]', 'So:\n```json\n{"name": "weather", "arguments": {}}\n```'], ["weather()", CALL[:-3], ""]),
    ("tools:only", {"tools": ["weather"]}, [CALL, "no call"], ['<tool_call>{"name": "rm"}</tool_call>', "<tool_call>{}</tool_call>"]),
    ("tools:order", {"tools": ["a", "b"]}, ['[{"name": "a"}, {"name": "c"}, {"name": "b"}]'], ['[{"name": "b"}, {"name": "a"}]', ""]),
    ("tools:count", {"low": 2, "high": 2}, [CALL * 2], [CALL, CALL * 3, CALL + "<tool_call>"]),
    ("tools:arguments", {"tool": "weather", "arguments": {"days": 2.0}}, [CALL], [CALL.replace("2", '"2"'), CALL.replace("2", "true"), ""]),
    ("tools:none", {}, ["Sunny.", '{"answer": 1}'], [CALL, "<tool_call>", '{"tool_calls": [{"function": {"name": "a"}}]}']),
]  # fmt: skip


@pytest.mark.parametrize("name, kwargs, good, bad", CASES, ids=[f"{case[0]}-{place}" for place, case in enumerate(CASES)])
def test_by_hand(name, kwargs, good, bad):
    assert [(text, check(name, text, **kwargs).reason) for text in good if check(name, text, **kwargs).status is not Status.PASS] == []
    assert [(text, check(name, text, **kwargs).reason) for text in bad if check(name, text, **kwargs).status is not Status.FAIL] == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("1,234,567.5 then 12,34", [1234567.5, 12, 34]), ("-3, −4 and +5", [-3, -4, 5]), (".5 or 2e3", [0.5, 2000]), ("3.", [3]), ("v1.2.3 B2 3rd x4y", []),
        ("1e999", []), ("e5", []), ("10%", [10]), ("", []), ("2, 3", [2, 3]), ("a-1", []), ("1,2,3 and 4-5", [1, 2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_numbers_in_text(text, found):
    assert numbers(text) == found


def test_words_of_other_scripts():
    assert len(words("नमस्ते दुनिया")) == 2  # by `re` it would be more: its \w leaves out the vowel signs
    assert [count_words(text) for text in ("你好吗", "東京 Tokyo", "안녕 하세요", "don't", "")] == [3, 3, 2, 2, 0]


def test_languages_of_the_declaration(repo):
    sys.path.insert(0, str(repo / "tests"))
    try:
        from ifeval_responses import ARTICLE_1
    finally:
        sys.path.remove(str(repo / "tests"))
    assert {code: detect(text) for code, text in ARTICLE_1.items()} == {code: code for code in ARTICLE_1}
    assert {code: detect(text.upper()) for code, text in ARTICLE_1.items()} == {code: code for code in ARTICLE_1}
    assert set(ARTICLE_1) < set(LANGUAGES) and detect("123 ...") is None and detect("xyzzy") is None
    assert detect("𝕳𝖊𝖑𝖑𝖔") is None


# ---- JSON Schema


@pytest.mark.parametrize(
    "found, good, bad",
    [
        ({"type": "integer"}, [1, 1.0, -3], [1.5, True, "1", None]),
        ({"type": ["string", "null"]}, ["", None], [0, []]),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, [0, 0.5], [1, -0.1]),
        ({"multipleOf": 0.1}, [0.3, "any"], [0.35]),
        ({"multipleOf": 3}, [9, 10**30 * 3], [10]),
        ({"enum": [1, "a"]}, [1, 1.0, "a"], [True, "b"]),
        ({"const": {"a": [1]}}, [{"a": [1]}, {"a": [1.0]}], [{"a": [True]}, {"a": [1], "b": 2}]),
        ({"minLength": 1, "maxLength": 2, "pattern": "^a"}, ["a", "ab"], ["", "abc", "ba"]),
        ({"items": {"type": "integer"}, "minItems": 1, "uniqueItems": True}, [[1, 2]], [[], [1, 1], ["1"]]),
        ({"properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}, [{"a": "x"}], [{}, {"a": 1}, {"a": "x", "b": 1}]),
        ({"additionalProperties": {"type": "integer"}}, [{"b": 1}, {}], [{"b": "1"}]),
        ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["a", 6], [4]),
        ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, [0, 4], [2]),
        ({"allOf": [{"minimum": 1}, {"maximum": 3}], "not": {"const": 2}}, [1, 3], [0, 2]),
        ({"maxProperties": 1, "items": False}, [{}, []], [{"a": 1, "b": 2}, [1]]),
    ],
)
def test_json_schema(found, good, bad):
    accepted = schema(json.dumps(found))
    assert [violation(value, accepted) for value in good] == [None] * len(good)
    assert all(violation(value, accepted) for value in bad)


@pytest.mark.parametrize(
    "found, message",
    [
        ({"type": "int"}, "type 'int' is unknown"), ({"propertys": {}}, "'propertys' is not checked here"), ({"$ref": "#/a"}, "is not checked here"),
        ({"required": "a"}, "list of names"), ({"anyOf": []}, "list of schemas"), ({"minimum": "1"}, "must be a number"), ({"items": 3}, "no schema"),
        ({"pattern": "(a+)+"}, "pattern"), ("{", "JSON schema"), ([], "JSON schema"), ({"properties": {"a": {"type": "x"}}}, "type 'x'"),
    ],
)  # fmt: skip
def test_a_schema_that_is_not_checked_is_refused(found, message):
    with pytest.raises(WrongKind, match=message):
        schema(found)
    with pytest.raises(UserError, match="parameter 'schema' of constraint format:json_schema"):
        check("format:json_schema", "{}", schema=found)


def test_the_first_violation_is_named_with_its_place():
    found = schema({"properties": {"a": {"items": {"type": "integer"}}}})
    assert violation({"a": [1, "x"]}, found) == "$.a[1] is str, wanted integer"
    assert equal({"a": [1, None]}, {"a": [1.0, None]}) and not equal({"a": 1}, {"a": True}) and not equal([1], [1, 2])


# ---- tool calls


def test_the_three_ways_of_writing_a_call():
    call = Call("f", {"x": 1})
    ways = [
        'So <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        '{"name": "f", "arguments": {"x": 1}}',
        '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]}',
        'First:\n```json\n[{"name": "f", "arguments": {"x": 1}}]\n```\nDone.',
    ]
    assert [read_calls(way) for way in ways] == [([call], None)] * 4
    assert read_calls("no call") == ([], None) and read_calls('{"name": "f"}')[0] == [Call("f", {})]


@pytest.mark.parametrize(
    "response, problem",
    [
        ("<tool_call>{}</tool_call>", "no name"), ("<tool_call>x</tool_call>", "not JSON"), ("<tool_call>", "do not pair"), ("</tool_call><tool_call>", "do not pair"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no object"), ('<tool_call>{"name": "f", "arguments": "{"}</tool_call>', "are not JSON"),
        ('<tool_call>{"name": 3}</tool_call>', "no name"), ("<tool_call>[1]</tool_call>", "no name"),
    ],
)  # fmt: skip
def test_a_malformed_call_is_said(response, problem):
    assert problem in read_calls(response)[1]
    assert check("tools:none", response).status is Status.FAIL
