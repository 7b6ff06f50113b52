"""Plain texts for examples, made of a seed: words, sentences, paragraphs."""

from __future__ import annotations

import random

_NOUN_LIST = (
    "river mill child stone lamp bread winter garden letter horse window cloud road basket music paper bridge island market teacher"
)
NOUNS = _NOUN_LIST.split()
VERBS = ["found", "carried", "watched", "painted", "followed", "opened", "kept", "forgot"]
ADJECTIVES = ["old", "small", "quiet", "green", "heavy", "bright", "narrow", "warm"]


def noun(rng: random.Random) -> str:
    """A noun."""
    return rng.choice(NOUNS)


def nouns(rng: random.Random, number: int) -> list[str]:
    """Different nouns, up to twenty."""
    return rng.sample(NOUNS, number)


def words(rng: random.Random, number: int) -> str:
    """So many words, without punctuation."""
    return " ".join(rng.choice(NOUNS) for _ in range(number))


def sentence(rng: random.Random) -> str:
    """A sentence of nine words without a comma."""
    one, two = rng.sample(NOUNS, 2)
    return f"The {rng.choice(ADJECTIVES)} {one} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {two} that day."


def prose(rng: random.Random, sentences: int) -> str:
    """So many sentences in one paragraph."""
    return " ".join(sentence(rng) for _ in range(sentences))


def paragraphs(rng: random.Random, number: int, sentences: int = 2) -> str:
    """So many paragraphs with a blank line between them."""
    return "\n\n".join(prose(rng, sentences) for _ in range(number))


def number_near(found: int, rng: random.Random) -> int:
    """A lower bound that a count keeps: from 70% of it up."""
    return max(1, found - rng.randint(0, max(1, found * 3 // 10)))
