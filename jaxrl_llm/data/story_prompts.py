"""Rule-checked story prompts for a plain language model: the opening of a real story, to be gone on with under given rules.

The model is no chat model and cannot be told the rules in words. So the rules are either the same for every prompt (no comma, a
length, end with a whole sentence), or can be read off the prompt: the continuation must take up again the most specific word of the
opening, its rarest in the corpus (a name, "needle", "pumpkin"). Only openings whose real story does that are kept, so every
row's rules are natural for its story.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrl_llm.data.sampler import epoch_order
from jaxrl_llm.data.sources import read_rows
from jaxrl_llm.errors import UserError

_WORD = re.compile(r"\w+")
_OPENING = re.compile(r".*?(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?][\"”']?(?=\s|$)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class StoryRules:
    """What a continuation must keep to; 0 or False leaves a rule out. Lengths in words."""

    words: int = 1  # so many of the opening's rarest words must come back in the continuation
    no_comma: bool = True
    at_least_words: int = 10
    fewer_than_words: int = 40
    full_sentence: bool = True  # ends with . ! or ?


@dataclasses.dataclass(frozen=True)
class OpeningFilter:
    """Which openings are used."""

    min_words: int = 4
    max_words: int = 20
    min_stories: int = 5  # a word that comes back must be in so many stories of the corpus, so that a model can know it
    max_share: float = 0.2  # and in at most this share of them: "day" is no subject
    min_letters: int = 3


def read_stories(source: str, fields: Mapping[str, str | None] | None = None, separator: str | None = None) -> list[str]:
    """The texts of a source of stories, in order and without repeats.

    fields: a field map of `read_rows`, for tables whose story is not in the column "prompt": {"prompt": "text"}.
    separator: the line between two stories of a txt file, such as "<|endoftext|>"; a blank line where it is None.
    """
    rows = read_rows(source, fields, separator=separator)
    return list(dict.fromkeys(row["prompt"].strip() for row in rows))


def make_story_prompts(
    stories: Sequence[str],
    *,
    rules: StoryRules | None = None,
    openings: OpeningFilter | None = None,
    held_out: int = 200,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes (training rows, held-out rows) from stories: {"id", "prompt", "constraints", "words", "story"}.

    A row's prompt is the first sentence of its story; "constraints" are the rules that its continuation must follow, as
    `rewards.constraints.ConstraintsReward` reads them; "words" the words that must come back. Each story and each opening is used
    once, so the two sets share neither. The order and the split depend on (stories, seed) alone.

    held_out: rows of the second set. limit: at most so many rows of the first.
    Raises UserError where the stories do not give enough rows, or a number of words or rows has no meaning.
    """
    rules, openings = rules or StoryRules(), openings or OpeningFilter()
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give the number of openings to train on, or None for all")
    if min(rules.words, rules.at_least_words, rules.fewer_than_words) < 0:
        raise UserError(f"rules count words, 0 leaves a rule out, and none may be below 0: {rules}")
    if not (rules.words or rules.no_comma or rules.at_least_words or rules.fewer_than_words or rules.full_sentence):
        raise UserError("all rules are left out: a continuation must keep to at least one")
    if rules.fewer_than_words and rules.fewer_than_words <= max(rules.at_least_words, rules.words):
        raise UserError(
            f"no continuation has at least {max(rules.at_least_words, rules.words)} and fewer than {rules.fewer_than_words} words: "
            "raise rules.fewer_than_words"
        )
    counts = document_frequency(stories)
    rows, seen = [], set()
    order: list[int] = epoch_order(len(stories), 0, seed).tolist()
    for index in order:
        row = _make_row(index, stories[index], counts, len(stories), rules, openings)
        if row is not None and row["prompt"].casefold() not in seen:
            seen.add(row["prompt"].casefold())
            rows.append(row)
    if len(rows) <= held_out:
        raise UserError(
            f"{len(stories)} stories give {len(rows)} openings that can be used, too few to hold out {held_out}: "
            "use more stories, hold out fewer, or loosen the openings' filter"
        )
    return rows[held_out:][:limit], rows[:held_out]


def split_opening(story: str) -> tuple[str, str]:
    """(first sentence, what follows it) of a story; the first is empty where no sentence ends."""
    match = _OPENING.match(story)
    return (match[0], story[match.end() :]) if match else ("", story)


def document_frequency(texts: Iterable[str]) -> collections.Counter[str]:
    """How many texts hold each word, capitals and small letters taken as the same."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update({word.casefold() for word in _WORD.findall(text)})
    return counts


def _make_row(
    index: int, story: str, counts: collections.Counter[str], total: int, rules: StoryRules, openings: OpeningFilter
) -> dict[str, Any] | None:
    """The row of one story; None where its opening is not usable."""
    opening, rest = split_opening(story)
    written = _WORD.findall(opening)
    if not openings.min_words <= len(written) <= openings.max_words or opening.count('"') % 2:
        return None
    goes_on = {word.casefold() for word in _WORD.findall(rest)}
    found = {
        word.casefold(): word
        for word in written
        if len(word) >= openings.min_letters
        and word.isalpha()
        and openings.min_stories <= counts[word.casefold()] <= openings.max_share * total
    }
    chosen = sorted(found, key=lambda word: (counts[word], word))[: rules.words]
    if len(chosen) < rules.words or not goes_on.issuperset(chosen):
        return None
    required = [found[word] for word in chosen]
    return {
        "id": f"story-{index:06d}",
        "prompt": re.sub(r"\s+", " ", opening),
        "constraints": rule_list(rules, required),
        "words": required,
        "story": index,
    }


def rule_list(rules: StoryRules, required: Sequence[str]) -> list[dict[str, Any]]:
    """The rules as {"name", "kwargs"} entries for `rewards.constraints`."""
    length = "length_constraints:number_words"
    entries: list[tuple[Any, str, dict[str, Any]]] = [
        (required, "keywords:words", {"words": list(required)}),
        (rules.no_comma, "punctuation:no_comma", {}),
        (rules.at_least_words, length, {"num_words": rules.at_least_words, "relation": "at least"}),
        (rules.fewer_than_words, length, {"num_words": rules.fewer_than_words, "relation": "less than"}),
        (rules.full_sentence, "startend:full_sentence", {}),
    ]
    return [{"name": name, "kwargs": kwargs} for wanted, name, kwargs in entries if wanted]
