"""Lengths: words, sentences, characters, lines, paragraphs, and words a sentence."""

from __future__ import annotations

import random

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.kinds import Optional, count, positive, share
from jaxrl_llm.rewards.constraints.table import Found, between, compare, constraint
from jaxrl_llm.rewards.text_measures import count_sentences, count_words, sentences, words


def paragraphs(response: str) -> list[str]:
    """Blocks of lines between blank lines."""
    found: list[list[str]] = [[]]
    for line in response.splitlines():
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(block) for block in found if block]


def lines(response: str) -> list[str]:
    """Lines that are not blank, without the white space around them."""
    return [line.strip() for line in response.splitlines() if line.strip()]


def _range_examples(make, low: int, high: int):
    """Examples of a range: a count within it and one beside it. make(rng, n): a text with n of what is counted."""

    def examples(rng: random.Random):
        least = rng.randint(low, high)
        most = least + rng.randint(0, max(1, least // 4))
        outside = least - 1 if rng.random() < 0.5 else most + 1
        return {"low": least, "high": most}, make(rng, rng.randint(least, most)), make(rng, outside)

    return examples


def _range_of(measure):
    """Parameters of a range around what a response has."""

    def derive(response: str, rng: random.Random):
        found = measure(response)
        return {"low": samples.number_near(found, rng), "high": found + rng.randint(0, max(1, found // 4))} if found else None

    return derive


@constraint(
    "length:words", "Write {range} words (in Chinese and Japanese: characters).",
    examples=_range_examples(samples.words, 5, 80), derive=_range_of(count_words), low=count, high=count,
)  # fmt: skip
def _words(response: str, low: int, high: int) -> Found:
    return between(count_words(response), low, high, "words")


@constraint(
    "length:sentences", "Write {range} sentences.", examples=_range_examples(samples.prose, 2, 9),
    derive=_range_of(count_sentences), low=count, high=count,
)  # fmt: skip
def _sentences(response: str, low: int, high: int) -> Found:
    return between(count_sentences(response), low, high, "sentences")


def _letters(rng: random.Random, number: int) -> str:
    return "".join(rng.choice("abcdefgh") for _ in range(number))


def _stripped(response: str) -> int:
    return len(response.strip())


@constraint(
    "length:characters", "Write {range} characters, spaces included.", examples=_range_examples(_letters, 20, 200),
    derive=_range_of(_stripped), low=count, high=count,
)  # fmt: skip
def _characters(response: str, low: int, high: int) -> Found:
    return between(_stripped(response), low, high, "characters")


@constraint(
    "length:lines", "Write {range} lines, blank ones not counted.",
    examples=_range_examples(lambda rng, n: "\n".join(samples.noun(rng) for _ in range(n)), 2, 9),
    derive=_range_of(lambda text: len(lines(text))), low=count, high=count,
)  # fmt: skip
def _lines(response: str, low: int, high: int) -> Found:
    return between(len(lines(response)), low, high, "lines")


@constraint(
    "length:paragraphs", "Write {range} paragraphs with blank lines between them.",
    examples=_range_examples(samples.paragraphs, 2, 5), derive=_range_of(lambda text: len(paragraphs(text))), low=count, high=count,
)  # fmt: skip
def _paragraphs(response: str, low: int, high: int) -> Found:
    return between(len(paragraphs(response)), low, high, "paragraphs")


def _most_words(response: str) -> int:
    return max((len(words(sentence)) for sentence in sentences(response)), default=0)


def _long_sentence(rng: random.Random):
    limit = rng.randint(5, 20)
    return {"most": limit}, f"{samples.words(rng, limit).capitalize()}. Yes.", f"Yes. {samples.words(rng, limit + 1).capitalize()}."


@constraint(
    "length:words_per_sentence", "Keep every sentence to at most {most} words.", examples=_long_sentence,
    derive=lambda response, rng: {"most": _most_words(response) + rng.randint(0, 3)} if _most_words(response) else None, most=positive,
)  # fmt: skip
def _words_per_sentence(response: str, most: int) -> Found:
    return _most_words(response) <= most, f"{_most_words(response)} words in the longest sentence, wanted at most {most}"


def _sentences_each(response: str) -> list[int]:
    return [count_sentences(block) for block in paragraphs(response)]


def _paragraph_examples(rng: random.Random):
    number = rng.randint(2, 4)
    good = samples.paragraphs(rng, 3, number)
    return {"low": number, "high": number}, good, f"{good}\n\n{samples.prose(rng, number + 1)}"


@constraint(
    "length:sentences_per_paragraph", "Give every paragraph {range} sentences.", examples=_paragraph_examples,
    derive=lambda response, rng: {"low": min(_sentences_each(response)), "high": max(_sentences_each(response))} if lines(response) else None,
    low=count, high=count,
)  # fmt: skip
def _sentences_per_paragraph(response: str, low: int, high: int) -> Found:
    each = _sentences_each(response)
    return bool(each) and all(low <= number <= high for number in each), f"{each[:50]} sentences a paragraph, wanted from {low} to {high}"


def _line_examples(rng: random.Random):
    limit = rng.randint(3, 8)
    good = "\n".join(samples.words(rng, rng.randint(1, limit)) for _ in range(4))
    return {"most": limit}, good, f"{good}\n{samples.words(rng, limit + 1)}"


@constraint(
    "length:words_per_line", "Keep every line to at most {most} words.", examples=_line_examples,
    derive=lambda response, rng: {"most": max(len(words(line)) for line in lines(response)) or 1} if lines(response) else None, most=positive,
)  # fmt: skip
def _words_per_line(response: str, most: int) -> Found:
    longest = max((len(words(line)) for line in lines(response)), default=0)
    return longest <= most, f"{longest} words in the longest line, wanted at most {most}"


def _distinct(response: str) -> int:
    return len({word.lower() for word in words(response)})


def _distinct_examples(rng: random.Random):
    number = rng.randint(3, 12)
    found = samples.nouns(rng, number)
    return {"least": number}, " ".join(found + found[:2]), " ".join(found[1:] + found[1:])


@constraint(
    "length:different_words", "Use at least {least} different words.", examples=_distinct_examples,
    derive=lambda response, rng: {"least": samples.number_near(_distinct(response), rng)} if _distinct(response) else None, least=positive,
)  # fmt: skip
def _different_words(response: str, least: int) -> Found:
    return compare(_distinct(response), least, "at least", "different words")


def _variety_examples(rng: random.Random):
    found = samples.nouns(rng, 8)
    return {"least": 0.75}, " ".join(found), " ".join(found[:2] * 4)


@constraint(
    "length:variety", "Repeat few words: at least a share of {least} of all words must be different ones.", examples=_variety_examples,
    derive=lambda response, rng: {"least": int(20 * _distinct(response) / len(words(response))) / 20} if words(response) else None,
    least=share, window=Optional(positive),
)  # fmt: skip
def _variety(response: str, least: float, window: int | None = None) -> Found:
    found = words(response)[: window or None]
    distinct = len({word.lower() for word in found})
    return bool(found) and distinct >= least * len(found), f"{distinct} of {len(found)} words are different, wanted a share of {least}"
