"""The table of rules behind constraints.py.

A rule is a function `(text, **parameters) -> (satisfied, what was found)` with a name and the kinds of its parameters. The first 25
are those of IFEval (Zhou et al. 2023, arXiv:2311.07911) with its names, parameters and strict semantics; the last three serve
continuations of a story. To add a rule, write its function here and name its parameters' kinds in the decorator.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxrl_llm.rewards.text_measures import count_sentences, looks_english, words

RELATIONS = ("at least", "less than")
CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


class Undecidable(Exception):
    """A rule that cannot be checked here; the message says what is missing."""


# ---- kinds of parameters: each returns the value as the rule wants it, or None where it is of another kind


def count(value) -> int | None:
    """A whole number from 0 up; 3.0 counts, as tables read from parquet make floats of integers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        return None
    return int(value)


def text(value) -> str | None:
    """A string that is not blank."""
    return value if isinstance(value, str) and value.strip() else None


def letter(value) -> str | None:
    """One character."""
    return value if isinstance(value, str) and len(value.strip()) == 1 else None


def texts(value) -> list[str] | None:
    """A list of strings, none blank, at least one."""
    found = list(value) if isinstance(value, (list, tuple)) or hasattr(value, "tolist") else []
    return found if found and all(text(entry) for entry in found) else None


def relation(value) -> str | None:
    """One of RELATIONS."""
    return value if value in RELATIONS else None


KINDS = {
    count: "a whole number from 0 up",
    text: "a string that is not blank",
    letter: "one character",
    texts: "a list of strings",
    relation: f"one of {', '.join(RELATIONS)}",
}


@dataclass(frozen=True)
class Rule:
    """One rule: its check and its parameters' kinds by name."""

    check: Callable[..., tuple[bool, str]]
    parameters: dict[str, Callable]


RULES: dict[str, Rule] = {}


def rule(name: str, **parameters: Callable):
    """Adds a rule to the table under `name`."""

    def add(check: Callable[..., tuple[bool, str]]):
        RULES[name] = Rule(check, parameters)
        return check

    return add


def _compare(found: int, wanted: int, how: str, what: str) -> tuple[bool, str]:
    satisfied = found >= wanted if how == "at least" else found < wanted
    return satisfied, f"{found} {what}, wanted {how} {wanted}"


def _exactly(found: int, wanted: int, what: str) -> tuple[bool, str]:
    return found == wanted, f"{found} {what}, wanted exactly {wanted}"


def _whole_word(word: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)


# ---- keywords


@rule("keywords:existence", keywords=texts)
def _existence(response: str, keywords: list[str]):
    missing = [word for word in keywords if word.lower() not in response.lower()]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all keywords present"


@rule("keywords:frequency", keyword=text, frequency=count, relation=relation)
def _frequency(response: str, keyword: str, frequency: int, relation: str):
    return _compare(response.lower().count(keyword.strip().lower()), frequency, relation, f"of {keyword!r}")


@rule("keywords:forbidden_words", forbidden_words=texts)
def _forbidden(response: str, forbidden_words: list[str]):
    present = [word for word in forbidden_words if _whole_word(word).search(response)]
    return not present, f"forbidden: {', '.join(present)}" if present else "no forbidden word"


@rule("keywords:letter_frequency", letter=letter, let_frequency=count, let_relation=relation)
def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str):
    return _compare(response.lower().count(letter.strip().lower()), let_frequency, let_relation, f"of letter {letter!r}")


# ---- language


@rule("language:response_language", language=text)
def _language(response: str, language: str):
    try:
        langdetect = importlib.import_module("langdetect")
    except ImportError:
        raise Undecidable("the package langdetect is not installed (pip install langdetect)") from None
    langdetect.DetectorFactory.seed = 0  # without a seed its answer varies from call to call
    try:
        found = langdetect.detect(response)
    except langdetect.LangDetectException:
        return True, "the language cannot be detected"
    return found == language, f"detected {found}, wanted {language}"


# ---- lengths


@rule("length_constraints:number_sentences", num_sentences=count, relation=relation)
def _number_sentences(response: str, num_sentences: int, relation: str):
    return _compare(count_sentences(response), num_sentences, relation, "sentences")


@rule("length_constraints:number_paragraphs", num_paragraphs=count)
def _number_paragraphs(response: str, num_paragraphs: int):
    blocks = [block.strip() for block in re.split(r"\s?\*\*\*\s?", response)]
    if not all(blocks[1:-1]):
        return False, "an empty paragraph between two dividers ***"
    return _exactly(sum(map(bool, blocks)), num_paragraphs, "paragraphs divided by ***")


@rule("length_constraints:number_words", num_words=count, relation=relation)
def _number_words(response: str, num_words: int, relation: str):
    return _compare(len(words(response)), num_words, relation, "words")


@rule("length_constraints:nth_paragraph_first_word", num_paragraphs=count, nth_paragraph=count, first_word=text)
def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str):
    blocks = [block.strip() for block in response.split("\n\n") if block.strip()]
    if len(blocks) != num_paragraphs:
        return _exactly(len(blocks), num_paragraphs, "paragraphs divided by blank lines")
    if not 1 <= nth_paragraph <= len(blocks):
        return False, f"there is no paragraph {nth_paragraph}"
    start = re.split(r"[\s.,?!'\"]", blocks[nth_paragraph - 1].lstrip("'\""), maxsplit=1)[0]
    return start.lower() == first_word.strip().lower(), f"paragraph {nth_paragraph} starts with {start!r}, wanted {first_word!r}"


# ---- content


@rule("detectable_content:number_placeholders", num_placeholders=count)
def _placeholders(response: str, num_placeholders: int):
    return _compare(len(re.findall(r"\[.*?\]", response)), num_placeholders, "at least", "placeholders in square brackets")


@rule("detectable_content:postscript", postscript_marker=text)
def _postscript(response: str, postscript_marker: str):
    # P.S. and P.P.S may be written with spaces after the dots; any other marker stands as it is.
    initials = re.fullmatch(r"((?:p\.\s?)+)s\.?", postscript_marker.strip().lower())
    if initials:
        pattern = r"p\.\s?" * initials[1].count("p") + "s" + (r"\." if postscript_marker.strip().endswith(".") else "")
    else:
        pattern = re.escape(postscript_marker.strip().lower())
    found = re.search(pattern, response.lower()) is not None
    return found, f"{'a' if found else 'no'} postscript {postscript_marker}"


# ---- format


@rule("detectable_format:number_bullet_lists", num_bullets=count)
def _bullets(response: str, num_bullets: int):
    lines = [line.lstrip() for line in response.splitlines()]
    found = sum(line.startswith("-") or re.match(r"\*[^*]", line) is not None for line in lines)
    return _exactly(found, num_bullets, "bullet points")


@rule("detectable_format:constrained_response")
def _constrained(response: str):
    found = [answer for answer in CONSTRAINED_ANSWERS if answer in response]
    return bool(found), f"says {found[0]!r}" if found else f"none of {', '.join(CONSTRAINED_ANSWERS)}"


@rule("detectable_format:number_highlighted_sections", num_highlights=count)
def _highlights(response: str, num_highlights: int):
    single = [part for part in re.findall(r"\*[^\n*]*\*", response) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", response) if part.strip("*").strip()]
    return _compare(len(single) + len(double), num_highlights, "at least", "highlighted sections")


@rule("detectable_format:multiple_sections", section_spliter=text, num_sections=count)
def _sections(response: str, section_spliter: str, num_sections: int):
    found = len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response))
    return _compare(found, num_sections, "at least", f"headings {section_spliter} N")


@rule("detectable_format:json_format")
def _json(response: str):
    fenced = re.fullmatch(r"```(?:json)?(.*?)(?:```)?", response.strip(), re.IGNORECASE | re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else response)
    except (ValueError, RecursionError) as error:
        return False, f"not JSON: {str(error) or type(error).__name__}"
    return True, "valid JSON"


@rule("detectable_format:title")
def _title(response: str):
    found = any(part.strip("<>").strip() for part in re.findall(r"<<[^\n]+>>", response))
    return found, f"{'a' if found else 'no'} title in double angular brackets"


# ---- combinations, start and end


@rule("combination:two_responses")
def _two_responses(response: str):
    parts = [part.strip() for part in response.split("******")]
    if not all(parts[1:-1]):
        return False, "an empty response between two dividers ******"
    given = [part for part in parts if part]
    if len(given) != 2:
        return _exactly(len(given), 2, "responses divided by ******")
    return given[0] != given[1], "two responses" + (" that are the same" if given[0] == given[1] else "")


@rule("combination:repeat_prompt", prompt_to_repeat=text)
def _repeat_prompt(response: str, prompt_to_repeat: str):
    found = response.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return found, f"{'starts' if found else 'does not start'} with the prompt"


@rule("startend:end_checker", end_phrase=text)
def _end(response: str, end_phrase: str):
    found = response.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    return found, f"{'ends' if found else 'does not end'} with {end_phrase!r}"


@rule("startend:quotation")
def _quotation(response: str):
    found = len(response.strip()) > 1 and response.strip()[0] == response.strip()[-1] == '"'
    return found, f"{'is' if found else 'is not'} wrapped in double quotes"


# ---- case and punctuation


@rule("change_case:capital_word_frequency", capital_frequency=count, capital_relation=relation)
def _capital_words(response: str, capital_frequency: int, capital_relation: str):
    found = sum(token.isupper() for token in re.findall(r"\w+(?:[-.'’]\w+)*", response))
    return _compare(found, capital_frequency, capital_relation, "words in capitals")


def _english_in(response: str, right_case: bool, case: str) -> tuple[bool, str]:
    if not right_case:
        return False, f"not all in {case} letters"
    english = looks_english(response)
    return english, f"all in {case} letters" + ("" if english else ", but not English")


@rule("change_case:english_capital")
def _english_capital(response: str):
    return _english_in(response, response.isupper(), "capital")


@rule("change_case:english_lowercase")
def _english_lowercase(response: str):
    return _english_in(response, response.islower(), "small")


@rule("punctuation:no_comma")
def _no_comma(response: str):
    return "," not in response, f"{response.count(',')} commas"


# ---- beyond IFEval: what a story may be asked for


@rule("keywords:words", words=texts)
def _words(response: str, words: list[str]):
    missing = [word for word in words if not _whole_word(word).search(response)]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all words present"


@rule("startend:opening", opening=text)
def _opening(response: str, opening: str):
    found = response.lstrip().startswith(opening.strip())
    return found, f"{'starts' if found else 'does not start'} with {opening.strip()!r}"


@rule("startend:full_sentence")
def _full_sentence(response: str):
    found = re.search(r"\w[^\w]*?[.!?][\"'”’)\]]*\s*$", response) is not None
    return found, f"{'ends' if found else 'does not end'} with a whole sentence"
