"""Keywords beyond IFEval's: whole words, their order, place and number; repetitions."""

from __future__ import annotations

import random
import re
from collections import Counter

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.ifeval import whole_word
from jaxrl_llm.rewards.constraints.ifeval_derive import content_words
from jaxrl_llm.rewards.constraints.kinds import count, place, positive, text, texts
from jaxrl_llm.rewards.constraints.lengths import paragraphs
from jaxrl_llm.rewards.constraints.table import Found, between, compare, constraint, listed
from jaxrl_llm.rewards.text_measures import sentences, words


def nth(found: list[str], number: int) -> str | None:
    """The entry at a place from 1, or from -1 at the end; None where there is none."""
    index = number - 1 if number > 0 else number
    return found[index] if -len(found) <= index < len(found) else None


def ordinal(number: int) -> str:
    """A place in words: "first", "12th", "last", "2nd from the end"."""
    if number < 0:
        return "last" if number == -1 else f"{ordinal(-number)} from the end"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{ending}"


def _two_of(response: str, rng: random.Random, number: int = 2) -> list[str] | None:
    found = [word for word in content_words(response) if whole_word(word).search(response)]
    return rng.sample(found, number) if len(found) >= number else None


def _word_examples(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    return {"words": [one, two]}, f"The {two.upper()} and the {one}.", f"The {two} and the {one}s."


@constraint(
    "keywords:words", "Use the words {words}.", examples=_word_examples,
    derive=lambda response, rng: {"words": found} if (found := _two_of(response, rng)) else None, words=texts,
)  # fmt: skip
def _words(response: str, words: list[str]) -> Found:
    missing = [word for word in words if not whole_word(word).search(response)]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all words present"


def _order_examples(rng: random.Random):
    found = samples.nouns(rng, 3)
    return {"words": found}, "First {}, then {}, then {}.".format(*found), "First {1}, then {0}, then {2}.".format(*found)


def _derive_order(response: str, rng: random.Random):
    found = _two_of(response, rng, 3)
    return {"words": sorted(found, key=lambda word: response.lower().find(word))} if found else None


@constraint(
    "keywords:order", lambda words: f"Use the words {listed(words)}, in this order.", examples=_order_examples, derive=_derive_order, words=texts,
)  # fmt: skip
def _order(response: str, words: list[str]) -> Found:
    start = 0
    for word in words:
        match = whole_word(word).search(response, start)
        if match is None:
            return False, f"{word!r} does not come after the words before it" if start else f"{word!r} is missing"
        start = match.end()
    return True, "all words in order"


def _sentence_examples(rng: random.Random):
    word, number = "lighthouse", rng.choice((1, 2, 3, -1))
    said = [samples.sentence(rng) for _ in range(4)]
    index = number - 1 if number > 0 else number
    good, bad = list(said), list(said)
    good[index] = f"They saw the {word} again."
    bad[index - 1] = f"They saw the {word} again."
    return {"word": word, "sentence": number}, " ".join(good), " ".join(bad)


def _derive_sentence(response: str, rng: random.Random):
    found = sentences(response)
    number = rng.choice((1, 2, -1))
    words_there = content_words(nth(found, number) or "")
    return {"word": rng.choice(words_there), "sentence": number} if words_there else None


@constraint(
    "keywords:in_sentence", lambda word, sentence: f'Use the word "{word}" in the {ordinal(sentence)} sentence.', examples=_sentence_examples,
    derive=_derive_sentence, word=text, sentence=place,
)  # fmt: skip
def _in_sentence(response: str, word: str, sentence: int) -> Found:
    found = nth(sentences(response), sentence)
    if found is None:
        return False, f"there is no {ordinal(sentence)} sentence"
    return whole_word(word).search(found) is not None, f"the {ordinal(sentence)} sentence is {found[:80]!r}"


def _paragraph_examples(rng: random.Random):
    number = rng.randint(1, 3)
    blocks = [samples.sentence(rng) for _ in range(3)]
    good, bad = list(blocks), list(blocks)
    good[number - 1] += " A lighthouse."
    bad[number - 2] += " A lighthouse."
    return {"word": "lighthouse", "paragraph": number}, "\n\n".join(good), "\n\n".join(bad)


def _derive_paragraph(response: str, rng: random.Random):
    found = paragraphs(response)
    number = rng.randint(1, len(found)) if found else 1
    words_there = content_words(nth(found, number) or "")
    return {"word": rng.choice(words_there), "paragraph": number} if words_there and len(found) > 1 else None


@constraint(
    "keywords:in_paragraph", lambda word, paragraph: f'Use the word "{word}" in the {ordinal(paragraph)} paragraph.', examples=_paragraph_examples,
    derive=_derive_paragraph, word=text, paragraph=place,
)  # fmt: skip
def _in_paragraph(response: str, word: str, paragraph: int) -> Found:
    found = nth(paragraphs(response), paragraph)
    if found is None:
        return False, f"there is no {ordinal(paragraph)} paragraph"
    return whole_word(word).search(found) is not None, f"the {ordinal(paragraph)} paragraph starts {found[:80]!r}"


def _every_examples(rng: random.Random):
    blocks = [f"{samples.sentence(rng)} A lighthouse." for _ in range(3)]
    return {"word": "lighthouse"}, "\n\n".join(blocks), "\n\n".join([*blocks, samples.sentence(rng)])


def _derive_every(response: str, rng: random.Random):
    found = [set(content_words(block)) for block in paragraphs(response)]
    shared = sorted(set.intersection(*found)) if len(found) > 1 else []
    return {"word": rng.choice(shared)} if shared else None


@constraint("keywords:every_paragraph", 'Use the word "{word}" in every paragraph.', examples=_every_examples, derive=_derive_every, word=text)
def _every_paragraph(response: str, word: str) -> Found:
    blocks, pattern = paragraphs(response), whole_word(word)
    without = [place for place, block in enumerate(blocks, 1) if not pattern.search(block)]
    return bool(blocks) and not without, f"paragraphs without it: {without[:20]}" if without else f"in all {len(blocks)} paragraphs"


def _count_examples(rng: random.Random):
    word, number = samples.noun(rng), rng.randint(2, 5)
    good = f"{' '.join([word] * number)}, {word}s"
    return {"word": word, "low": number, "high": number}, good, f"{good} {word}"


def _derive_count(response: str, rng: random.Random):
    found = _two_of(response, rng, 1)
    number = len(whole_word(found[0]).findall(response)) if found else 0
    return {"word": found[0], "low": number, "high": number} if found else None


@constraint(
    "keywords:count", 'Use the word "{word}" {times}.',
    examples=_count_examples, derive=_derive_count, word=text, low=count, high=count,
)  # fmt: skip
def _count(response: str, word: str, low: int, high: int) -> Found:
    return between(len(whole_word(word).findall(response)), low, high, f"of the word {word!r}")


def _phrase_examples(rng: random.Random):
    return {"phrases": ["in conclusion", "as an AI"]}, samples.prose(rng, 2), f"{samples.sentence(rng)} In  Conclusion it rained."


def _absent_phrases(response: str, rng: random.Random):
    known = ["in conclusion", "as an ai", "on the other hand", "it is important to note", "at the end of the day"]
    absent = [phrase for phrase in known if phrase not in " ".join(response.lower().split())]
    return {"phrases": rng.sample(absent, 2)} if len(absent) > 1 else None


@constraint(
    "keywords:forbidden_phrases", lambda phrases: f"Never write {listed(phrases)}.", examples=_phrase_examples, derive=_absent_phrases, phrases=texts,
)  # fmt: skip
def _forbidden_phrases(response: str, phrases: list[str]) -> Found:
    spelt = " ".join(response.lower().split())
    present = [phrase for phrase in phrases if whole_word(" ".join(phrase.split())).search(spelt)]
    return not present, f"present: {', '.join(present)}" if present else "no forbidden phrase"


def _some_examples(rng: random.Random):
    found = samples.nouns(rng, 4)
    return {"words": found, "least": 2}, f"A {found[1]} and a {found[3]}.", f"A {found[1]} and a {found[1]}."


@constraint(
    "keywords:some_of", lambda words, least: f"Use at least {least} of the words {listed(words)}.", examples=_some_examples,
    derive=lambda response, rng: {"words": [*found, "lighthouse"], "least": 2} if (found := _two_of(response, rng)) else None,
    words=texts, least=positive,
)  # fmt: skip
def _some_of(response: str, words: list[str], least: int) -> Found:
    return compare(sum(whole_word(word).search(response) is not None for word in words), least, "at least", f"of {len(words)} words")


def _doubled_examples(rng: random.Random):
    return {}, samples.sentence(rng), f"{samples.sentence(rng)} It was was so."


@constraint(
    "keywords:no_doubled_word", "Never write the same word twice in a row.", examples=_doubled_examples, derive=lambda response, rng: {},
)  # fmt: skip
def _no_doubled_word(response: str) -> Found:
    found = re.findall(r"\w+|[^\w\s]", response.lower())
    doubled = [word for word, other in zip(found, found[1:], strict=False) if word == other and word[0].isalpha()]
    return not doubled, f"doubled: {', '.join(doubled[:10])}" if doubled else "no word doubled"


def _repeat_examples(rng: random.Random):
    one = samples.sentence(rng)
    return {}, f"{one} And that was all.", f"{one} So it was. {one.upper()}"


@constraint("keywords:no_repeated_sentence", "Never write the same sentence twice.", examples=_repeat_examples, derive=lambda response, rng: {})
def _no_repeated_sentence(response: str) -> Found:
    found = Counter(" ".join(words(sentence.lower())) for sentence in sentences(response))
    repeated = [sentence for sentence, times in found.items() if times > 1]
    return not repeated, f"repeated: {repeated[0][:80]!r}" if repeated else "no sentence repeated"
