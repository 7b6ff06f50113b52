"""For back-translation: parameters with which a response satisfies an IFEval type, `(response, rng) -> parameters or None`.

What is proposed here is checked before it is used, so a function may propose what does not hold.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.ifeval_text import count_capital_words, count_sentences
from jaxrl_llm.rewards.constraints.language import detect
from jaxrl_llm.rewards.text_measures import words as words_of

Parameters = dict[str, Any]


def bound(found: int, rng: random.Random, number_name: str, relation_name: str = "relation") -> Parameters | None:
    """A bound that a count keeps, from below or from above, up to 30% away."""
    if found < 1:
        return None
    if rng.random() < 0.5:
        return {number_name: samples.number_near(found, rng), relation_name: "at least"}
    return {number_name: found + 1 + rng.randint(0, max(1, found * 3 // 10)), relation_name: "less than"}


def content_words(response: str) -> list[str]:
    """The different words of at least five letters, in small letters, in the order of their first place."""
    return list(dict.fromkeys(word.lower() for word in words_of(response) if len(word) >= 5 and word.isalpha()))


def without_parameters(response: str, rng: random.Random) -> Parameters:
    """For types that have none: the check decides."""
    return {}


def existence(response: str, rng: random.Random) -> Parameters | None:
    """One to three words of the response."""
    found = content_words(response)
    return {"keywords": rng.sample(found, min(len(found), rng.randint(1, 3)))} if found else None


def frequency(response: str, rng: random.Random) -> Parameters | None:
    """A word that comes more than once."""
    found = [word for word in content_words(response) if response.lower().count(word) > 1]
    if not found:
        return None
    word = rng.choice(found)
    return {"keyword": word, "frequency": response.lower().count(word), "relation": "at least"}


def forbidden(response: str, rng: random.Random) -> Parameters | None:
    """Words that the response does not have."""
    present = set(words_of(response.lower()))
    absent = [word for word in samples.NOUNS if word not in present]
    return {"forbidden_words": rng.sample(absent, 2)} if len(absent) > 1 else None


def letters(response: str, rng: random.Random) -> Parameters | None:
    """How often a letter comes."""
    found = Counter(char for char in response.lower() if "a" <= char <= "z")
    if not found:
        return None
    letter = rng.choice(sorted(found))
    return {"letter": letter, **(bound(found[letter], rng, "let_frequency", "let_relation") or {})}


def in_language(response: str, rng: random.Random) -> Parameters | None:
    """The language that it looks like."""
    code = detect(response)
    return {"language": code} if code else None


def sentences(response: str, rng: random.Random) -> Parameters | None:
    """A bound on the sentences."""
    return bound(count_sentences(response), rng, "num_sentences")


def words(response: str, rng: random.Random) -> Parameters | None:
    """A bound on the words."""
    return bound(len(words_of(response)), rng, "num_words")


def starred(response: str, rng: random.Random) -> Parameters | None:
    """Paragraphs between stars, where there are stars."""
    return {"num_paragraphs": sum(map(bool, map(str.strip, response.split("***"))))} if "***" in response else None


def first_word(response: str, rng: random.Random) -> Parameters | None:
    """The first word of a paragraph, where there are several."""
    blocks = [block.strip() for block in response.split("\n\n") if block.strip()]
    place = rng.randint(1, max(1, len(blocks)))
    if not 2 <= len(blocks) <= 12 or not blocks[place - 1][0].isalpha():
        return None
    return {"num_paragraphs": len(blocks), "nth_paragraph": place, "first_word": re.split(r"[\s.,?!'\"]", blocks[place - 1], maxsplit=1)[0]}


def placeholders(response: str, rng: random.Random) -> Parameters | None:
    """Stretches in square brackets."""
    found = min(response.count("["), response.count("]"))
    return {"num_placeholders": found} if found else None


def postscript(response: str, rng: random.Random) -> Parameters | None:
    """A postscript in one of IFEval's two spellings."""
    return {"postscript_marker": "P.P.S" if "p.p.s" in response.lower() else "P.S."}


def bullets(response: str, rng: random.Random) -> Parameters | None:
    """Lines that open with a bullet."""
    found = sum(line.lstrip()[:2] in ("* ", "- ") for line in response.split("\n"))
    return {"num_bullets": found} if found else None


def highlights(response: str, rng: random.Random) -> Parameters | None:
    """Parts between stars."""
    found = len(re.findall(r"\*[^\n*]+\*", response))
    return {"num_highlights": found} if found else None


def sections(response: str, rng: random.Random) -> Parameters | None:
    """Headings with a number."""
    heads = Counter(re.findall(r"^[#* ]{0,6}(Section|SECTION|Chapter|Part|Day|Step) ?\d", response, re.MULTILINE))
    if not heads:
        return None
    head, times = heads.most_common(1)[0]
    return {"section_spliter": head, "num_sections": times}


def end(response: str, rng: random.Random) -> Parameters | None:
    """Its last words."""
    last = response.strip().strip('"').split()[-rng.randint(3, 6) :]
    return {"end_phrase": " ".join(last)} if len(last) >= 3 else None


def capital_words(response: str, rng: random.Random) -> Parameters | None:
    """A bound on the words in capitals."""
    return bound(count_capital_words(response), rng, "capital_frequency", "capital_relation")
