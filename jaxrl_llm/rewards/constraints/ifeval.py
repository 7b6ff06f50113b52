"""The 25 types of IFEval (Zhou et al. 2023, arXiv:2311.07911), with its names, parameters and verdicts.

Where we differ from lm-eval's code on purpose, docs/constraints.md says why. scoring.py holds strict and loose accuracy; the
parameters with which a response satisfies a type are found in ifeval_derive.py.
"""

from __future__ import annotations

import json
import re

from jaxrl_llm.rewards.constraints import ifeval_derive as derive
from jaxrl_llm.rewards.constraints import ifeval_examples as examples
from jaxrl_llm.rewards.constraints.ifeval_text import count_capital_words, count_sentences
from jaxrl_llm.rewards.constraints.kinds import count, letter, relation, text, texts
from jaxrl_llm.rewards.constraints.language import LANGUAGES, detect, language
from jaxrl_llm.rewards.constraints.table import compare, constraint, exactly, listed
from jaxrl_llm.rewards.text_measures import looks_english, words

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def whole_word(word: str) -> re.Pattern:
    """A pattern that finds a word or phrase, not as part of a longer word, in either case."""
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)


# ---- keywords


@constraint("keywords:existence", "Use the keywords {keywords}.", examples=examples.existence, derive=derive.existence, keywords=texts)
def _existence(response: str, keywords: list[str]):
    missing = [word for word in keywords if word.lower() not in response.lower()]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all keywords present"


@constraint(
    "keywords:frequency", 'Use the word "{keyword}" {relation} {frequency} times.', examples=examples.frequency, derive=derive.frequency,
    keyword=text, frequency=count, relation=relation,
)  # fmt: skip
def _frequency(response: str, keyword: str, frequency: int, relation: str):
    return compare(response.lower().count(keyword.strip().lower()), frequency, relation, f"of {keyword!r}")


@constraint(
    "keywords:forbidden_words", lambda forbidden_words: f"Do not use {listed(forbidden_words)}.", examples=examples.forbidden,
    derive=derive.forbidden, forbidden_words=texts,
)  # fmt: skip
def _forbidden(response: str, forbidden_words: list[str]):
    present = [word for word in forbidden_words if whole_word(word).search(response)]
    return not present, f"forbidden: {', '.join(present)}" if present else "no forbidden word"


@constraint(
    "keywords:letter_frequency", 'Let the letter "{letter}" appear {let_relation} {let_frequency} times.', examples=examples.letters,
    derive=derive.letters, letter=letter, let_frequency=count, let_relation=relation,
)  # fmt: skip
def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str):
    return compare(response.lower().count(letter.strip().lower()), let_frequency, let_relation, f"of letter {letter!r}")


# ---- language


@constraint(
    "language:response_language", lambda language: f"Answer in {LANGUAGES[language]} only.", examples=examples.in_language,
    derive=derive.in_language, language=language,
)  # fmt: skip
def _language(response: str, language: str):
    found = detect(response)
    if found is None and not any(map(str.isalpha, response)):
        return True, "no letters, no language"  # IFEval lets such a response pass; language:is does not
    return found == language, f"looks {LANGUAGES.get(found or '', 'like no language')}, wanted {LANGUAGES[language]}"


# ---- lengths


@constraint(
    "length_constraints:number_sentences", "Write {relation} {num_sentences} sentences.", examples=examples.sentences, derive=derive.sentences,
    num_sentences=count, relation=relation,
)  # fmt: skip
def _number_sentences(response: str, num_sentences: int, relation: str):
    return compare(count_sentences(response), num_sentences, relation, "sentences")


@constraint(
    "length_constraints:number_paragraphs", "Write exactly {num_paragraphs} paragraphs, with *** between them.", examples=examples.starred,
    derive=derive.starred, num_paragraphs=count,
)  # fmt: skip
def _number_paragraphs(response: str, num_paragraphs: int):
    blocks = [block.strip() for block in response.split("***")]
    if not all(blocks[1:-1]):
        return False, "an empty paragraph between two dividers ***"
    return exactly(sum(map(bool, blocks)), num_paragraphs, "paragraphs divided by ***")


@constraint(
    "length_constraints:number_words", "Write {relation} {num_words} words.", examples=examples.words, derive=derive.words,
    num_words=count, relation=relation,
)  # fmt: skip
def _number_words(response: str, num_words: int, relation: str):
    return compare(len(words(response)), num_words, relation, "words")


@constraint(
    "length_constraints:nth_paragraph_first_word",
    'Write exactly {num_paragraphs} paragraphs with a blank line between them; paragraph {nth_paragraph} starts with the word "{first_word}".',
    examples=examples.first_word, derive=derive.first_word, num_paragraphs=count, nth_paragraph=count, first_word=text,
)  # fmt: skip
def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str):
    blocks = [block.strip() for block in response.split("\n\n")]
    given = sum(map(bool, blocks))
    if given != num_paragraphs:
        return exactly(given, num_paragraphs, "paragraphs divided by blank lines")
    # The place is counted over blank blocks too, as IFEval's verdicts do: two blank lines in a row make one.
    if not 1 <= nth_paragraph <= given or not blocks[nth_paragraph - 1]:
        return False, f"there is no paragraph {nth_paragraph}, counted with one blank line between two"
    opening = blocks[nth_paragraph - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    start = re.split(r"[.,?!'\"]", opening, maxsplit=1)[0]
    return start.lower() == first_word.strip().lower(), f"paragraph {nth_paragraph} starts with {start!r}, wanted {first_word!r}"


# ---- content


def placeholders(response: str) -> int:
    """Stretches of a line in square brackets; the first closing one ends each."""
    found = 0
    for line in response.split("\n"):
        place = line.find("[")
        while place >= 0 and (end := line.find("]", place)) >= 0:
            found, place = found + 1, line.find("[", end + 1)
    return found


@constraint(
    "detectable_content:number_placeholders", "Use at least {num_placeholders} placeholders in square brackets, such as [name].",
    examples=examples.placeholders, derive=derive.placeholders, num_placeholders=count,
)  # fmt: skip
def _placeholders(response: str, num_placeholders: int):
    return compare(placeholders(response), num_placeholders, "at least", "placeholders in square brackets")


@constraint(
    "detectable_content:postscript", "At the end, add a postscript that starts with {postscript_marker}", examples=examples.postscript,
    derive=derive.postscript, postscript_marker=text,
)  # fmt: skip
def _postscript(response: str, postscript_marker: str):
    # P.S. and P.P.S may be written with spaces after the dots; any other marker stands as it is.
    initials = re.fullmatch(r"((?:p\.\s?){1,9})s\.?", postscript_marker.strip().lower())
    if initials:
        pattern = r"p\.\s?" * initials[1].count("p") + "s" + (r"\." if postscript_marker.strip().endswith(".") else "")
    else:
        pattern = re.escape(postscript_marker.strip().lower())
    found = re.search(pattern, response.lower()) is not None
    return found, f"{'a' if found else 'no'} postscript {postscript_marker}"


# ---- format


def bullets(response: str) -> int:
    """Lines that open with - or a single *, after white space; a * alone on its line takes the next line as its text."""
    dashes = stars = 0
    lines, passed = response.split("\n"), -1
    for index, line in enumerate(lines):
        mark = line.lstrip()
        dashes += mark.startswith("-")
        if index != passed and mark.startswith("*") and not mark.startswith("**") and (len(mark) > 1 or index + 1 < len(lines)):
            stars, passed = stars + 1, index + 1 if len(mark) == 1 else -1
    return dashes + stars


@constraint(
    "detectable_format:number_bullet_lists", "Write exactly {num_bullets} bullet points, each on a line that starts with *.",
    examples=examples.bullets, derive=derive.bullets, num_bullets=count,
)  # fmt: skip
def _bullets(response: str, num_bullets: int):
    return exactly(bullets(response), num_bullets, "bullet points")


@constraint(
    "detectable_format:constrained_response", "Answer with one of: " + " ".join(CONSTRAINED_ANSWERS), examples=examples.constrained,
    derive=derive.without_parameters,
)  # fmt: skip
def _constrained(response: str):
    found = [answer for answer in CONSTRAINED_ANSWERS if answer in response]
    return bool(found), f"says {found[0]!r}" if found else f"none of {', '.join(CONSTRAINED_ANSWERS)}"


@constraint(
    "detectable_format:number_highlighted_sections", "Highlight at least {num_highlights} parts in markdown, such as *this part*.",
    examples=examples.highlights, derive=derive.highlights, num_highlights=count,
)  # fmt: skip
def _highlights(response: str, num_highlights: int):
    return compare(highlights(response), num_highlights, "at least", "highlighted sections")


def highlights(response: str) -> int:
    """Parts of a line between single stars, and between double stars, that are not blank."""
    single, double = re.findall(r"\*[^\n*]*\*", response), re.findall(r"\*\*[^\n*]*\*\*", response)
    return sum(bool(part.strip("*").strip()) for part in single + double)


@constraint(
    "detectable_format:multiple_sections",
    "Write at least {num_sections} sections and open each with {section_spliter} and its number, such as {section_spliter} 1.",
    examples=examples.sections, derive=derive.sections, section_spliter=text, num_sections=count,
)  # fmt: skip
def _sections(response: str, section_spliter: str, num_sections: int):
    found = len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response))
    return compare(found, num_sections, "at least", f"headings {section_spliter} N")


@constraint("detectable_format:json_format", "Answer in JSON, and nothing else.", examples=examples.json_text, derive=derive.without_parameters)
def _json(response: str):
    inner = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        inner = inner.removeprefix(fence)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError) as error:
        return False, f"not JSON: {str(error) or type(error).__name__}"
    return True, "valid JSON"


@constraint(
    "detectable_format:title", "Give a title in double angular brackets, such as <<a title>>.", examples=examples.title,
    derive=derive.without_parameters,
)  # fmt: skip
def _title(response: str):
    found = False
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        found |= 0 <= start <= end - 3 and bool(line[start : end + 2].lstrip("<").rstrip(">").strip())
    return found, f"{'a' if found else 'no'} title in double angular brackets"


# ---- combinations, start and end


@constraint(
    "combination:two_responses", "Give two different answers, with ****** between them.", examples=examples.two_responses,
    derive=derive.without_parameters,
)  # fmt: skip
def _two_responses(response: str):
    parts = [part.strip() for part in response.split("******")]
    if not all(parts[1:-1]):
        return False, "an empty response between two dividers ******"
    given = [part for part in parts if part]
    if len(given) != 2:
        return exactly(len(given), 2, "responses divided by ******")
    return given[0] != given[1], "two responses" + (" that are the same" if given[0] == given[1] else "")


@constraint(
    "combination:repeat_prompt", "First repeat this request word for word, then answer it: {prompt_to_repeat}", examples=examples.repeat,
    prompt_to_repeat=text,
)  # fmt: skip
def _repeat_prompt(response: str, prompt_to_repeat: str):
    found = response.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return found, f"{'starts' if found else 'does not start'} with the prompt"


@constraint(
    "startend:end_checker", "End with these words and nothing after them: {end_phrase}", examples=examples.end, derive=derive.end,
    end_phrase=text,
)  # fmt: skip
def _end(response: str, end_phrase: str):
    found = response.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    return found, f"{'ends' if found else 'does not end'} with {end_phrase!r}"


@constraint("startend:quotation", "Wrap the whole answer in double quotes.", examples=examples.quotation, derive=derive.without_parameters)
def _quotation(response: str):
    found = len(response.strip()) > 1 and response.strip()[0] == response.strip()[-1] == '"'
    return found, f"{'is' if found else 'is not'} wrapped in double quotes"


# ---- case and punctuation


@constraint(
    "change_case:capital_word_frequency", "Use words in all capital letters {capital_relation} {capital_frequency} times.",
    examples=examples.capital_words, derive=derive.capital_words, capital_frequency=count, capital_relation=relation,
)  # fmt: skip
def _capital_words(response: str, capital_frequency: int, capital_relation: str):
    return compare(count_capital_words(response), capital_frequency, capital_relation, "words in capitals")


def _english_in(response: str, right_case: bool, case: str) -> tuple[bool, str]:
    if not right_case:
        return False, f"not all in {case} letters"
    english = looks_english(response)
    return english, f"all in {case} letters" + ("" if english else ", but not English")


@constraint(
    "change_case:english_capital", "Write in English and in capital letters only.", examples=examples.capitals, derive=derive.without_parameters
)
def _english_capital(response: str):
    return _english_in(response, response.isupper(), "capital")


@constraint(
    "change_case:english_lowercase", "Write in English and in small letters only.", examples=examples.small, derive=derive.without_parameters
)
def _english_lowercase(response: str):
    return _english_in(response, response.islower(), "small")


@constraint("punctuation:no_comma", "Use no comma.", examples=examples.no_comma, derive=derive.without_parameters)
def _no_comma(response: str):
    return "," not in response, f"{response.count(',')} commas"
