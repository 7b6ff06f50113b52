"""IFEval's verdicts, strict and loose, against lm-eval's own on all 541 prompts (tests/make_golden_ifeval.py), and the figures made of them."""

import collections
import json
import math
import sys

import pytest

from jaxrl_llm.rewards.constraints import accuracies, check_loose, check_strict, loose_variants, validate
from jaxrl_llm.rewards.constraints.ifeval_text import count_capital_words, count_sentences
from jaxrl_llm.rewards.verdict import Status, Verdict

# Verdicts (strict and loose) that differ, of those of the type; docs/constraints.md says why. All other types: none.
DIFFERENT = {
    "keywords:letter_frequency": 34,
    "language:response_language": 17,
    "change_case:english_capital": 40,
    "change_case:english_lowercase": 232,
}


@pytest.fixture(scope="module")
def compared(repo, assets):
    """(type, kwargs, response, lm-eval's verdict, ours) of every instruction and response, strict and loose."""
    sys.path.insert(0, str(repo / "tests"))
    try:
        import ifeval_responses
    finally:
        sys.path.remove(str(repo / "tests"))
    golden = json.loads((repo / "tests/golden/ifeval.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (assets / "data/ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = ifeval_responses.real_answers(assets)
    found, hashes = [], []
    for index, row in enumerate(rows):
        texts = ifeval_responses.responses(index, row, answers)
        hashes.append(ifeval_responses.digest(texts))
        theirs = golden["verdicts"][index].split()
        for place, response in enumerate(texts):
            for number, (name, kwargs) in enumerate(zip(row["instruction_id_list"], row["kwargs"], strict=True)):
                for way, check in enumerate((check_strict, check_loose)):
                    found.append((name, kwargs, response, theirs[2 * place + way][number], check(name, response, **kwargs)))
    assert ifeval_responses.digest(hashes) == golden["responses"], "the responses changed: run tests/make_golden_ifeval.py again"
    return found


def test_verdicts_are_lm_evals(compared):
    assert len(compared) > 38_000 and len({entry[0] for entry in compared}) == 25
    differ, all_types = collections.Counter(), collections.defaultdict(set)
    for name, _, _, theirs, ours in compared:
        assert ours.value is not None
        all_types[name].add(theirs)
        differ[name] += (ours.status is Status.PASS) != (theirs == "1")
    assert {name: number for name, number in differ.items() if number} == DIFFERENT
    assert all(seen == {"0", "1"} for seen in all_types.values())  # each type's verdict goes both ways


def test_where_we_differ_it_is_for_the_stated_reason(compared):
    for name, kwargs, response, theirs, ours in compared:
        if (ours.status is Status.PASS) == (theirs == "1"):
            continue
        if name == "keywords:letter_frequency":
            assert not kwargs["letter"].isalpha()
        elif name == "language:response_language":  # langdetect on capitals, on two languages at once, on a word or two
            assert response.isupper() or "A title" in response or len(response.split()) < 3 or not response.isascii()


@pytest.mark.parametrize(
    "text, number",
    [
        ("", 0), ("   ", 0), ("no mark", 1), ("One. Two! Three?", 3), ("small. letters. too.", 3), ("Dr. Smith and Mrs. Jones", 1),
        ("J. K. Rowling wrote.", 1), ("In the U.S. They left.", 2), ("wait... what", 1), ("He said (no.) Then yes.", 2), ('"Why?" he said.', 2),
        ("River.*", 2), ("?!?!", 3), ("one.two", 1), ("No. 5 is alive", 2), ("1. First. 2. Second.", 4), ("3. and more", 1),
    ],
)  # fmt: skip
def test_sentences_as_punkt_counts_them(text, number):
    assert count_sentences(text) == number


@pytest.mark.parametrize(
    "text, number",
    [("NASA's IBM", 2), ("I'M HERE", 3), ("DON'T", 2), ("CANNOT", 2), ("AT&T", 2), ("A/B C-3PO", 2), ("U.S. Nasa", 1), ("12 - ...", 0), ("", 0)],
)
def test_capital_words_as_treebank_tokens(text, number):
    assert count_capital_words(text) == number


def test_the_eight_variants():
    assert loose_variants("*a*\nb\n*c*") == ["*a*\nb\n*c*", "b\n*c*", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb"]
    assert loose_variants("one line") == ["one line"]
    assert loose_variants(" \n ") == []
    assert len(loose_variants("*a*\n*b*\n*c*")) == 8


def test_strict_and_loose_by_hand():
    kwargs = {"num_bullets": 1}
    response = "Sure!\n* one\n* two"
    name = "detectable_format:number_bullet_lists"
    assert check_strict(name, response, **kwargs).status is Status.FAIL
    assert check_loose(name, response, **kwargs).status is Status.PASS  # without its last line
    assert check_strict("punctuation:no_comma", " ").status is check_loose("punctuation:no_comma", " ").status is Status.FAIL
    assert "blank" in check_loose("punctuation:no_comma", "").reason
    assert check_loose("startend:quotation", 'Here:\n"so"').status is Status.PASS
    with pytest.raises(Exception, match="needs the parameter"):
        check_loose(name, "")


def test_the_four_figures():
    good, bad, lost = Verdict(Status.PASS), Verdict(Status.FAIL), Verdict(Status.ERROR)
    found = accuracies([[good, good], [good, bad], [good], [lost, good], [lost, bad]])
    assert found == {"prompt": 0.5, "instruction": 5 / 7, "prompts": 4, "instructions": 7, "undecided": 2}
    assert math.isnan(accuracies([])["prompt"])


def test_every_type_of_the_file_is_known(assets):
    for line in (assets / "data/ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            assert set(validate(name, kwargs)) == set(kwargs)
