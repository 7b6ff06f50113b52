"""Examples of IFEval's types: each a function `(rng) -> (parameters, a satisfying text, a violating text)`."""

from __future__ import annotations

import random

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.language import SAMPLES, other_sample
from jaxrl_llm.rewards.constraints.table import Example


def _counted(rng: random.Random, number_name: str, relation_name: str, make, low: int = 2, high: int = 9, **more) -> Example:
    """A count that is to be reached or to stay below; make(n): a text with n of what is counted."""
    number, relation = rng.randint(low, high), rng.choice(("at least", "less than"))
    enough, few = make(number + rng.randint(0, 3)), make(number - 1)
    return {number_name: number, relation_name: relation, **more}, *((enough, few) if relation == "at least" else (few, enough))


def existence(rng: random.Random) -> Example:
    """Two keywords; the second is missing."""
    one, two, other = samples.nouns(rng, 3)
    return {"keywords": [one, two]}, f"A {one.upper()} and a {two}.", f"A {one} and a {other}."


def frequency(rng: random.Random) -> Example:
    """A word so many times."""
    word = samples.noun(rng)
    return _counted(rng, "frequency", "relation", lambda n: "So: " + " ".join([word] * n), keyword=word)


def forbidden(rng: random.Random) -> Example:
    """A word that may not come."""
    one, two, other = samples.nouns(rng, 3)
    return {"forbidden_words": [one, two]}, f"A {other} and {one}s.", f"A {other} and a {two.capitalize()}!"


def letters(rng: random.Random) -> Example:
    """A letter so many times."""
    letter = rng.choice("qxzj")
    return _counted(rng, "let_frequency", "let_relation", lambda n: "ab " + letter * n, letter=letter)


def in_language(rng: random.Random) -> Example:
    """A sentence in the language and one in another."""
    code = rng.choice(list(SAMPLES))
    return {"language": code}, SAMPLES[code], other_sample(code, rng.choice)


def sentences(rng: random.Random) -> Example:
    """So many sentences."""
    return _counted(rng, "num_sentences", "relation", lambda n: samples.prose(rng, n))


def starred(rng: random.Random) -> Example:
    """Paragraphs with stars between them, one too many."""
    number = rng.randint(2, 5)
    blocks = [samples.sentence(rng) for _ in range(number)]
    return {"num_paragraphs": number}, "\n***\n".join(blocks), "\n***\n".join([*blocks, "More."])


def words(rng: random.Random) -> Example:
    """So many words."""
    return _counted(rng, "num_words", "relation", lambda n: samples.words(rng, n), 5, 60)


def first_word(rng: random.Random) -> Example:
    """A paragraph that starts with a word, and one that does not."""
    number = rng.randint(2, 5)
    place, word = rng.randint(1, number), samples.noun(rng)
    blocks = [samples.sentence(rng) for _ in range(number)]
    good = [*blocks[: place - 1], f"{word.capitalize()}, they said.", *blocks[place:]]
    return {"num_paragraphs": number, "nth_paragraph": place, "first_word": word}, "\n\n".join(good), "\n\n".join(blocks)


def placeholders(rng: random.Random) -> Example:
    """Placeholders, one too few."""
    number = rng.randint(1, 5)
    return {"num_placeholders": number}, "Dear " + " ".join(["[name]"] * number), "Dear " + " ".join(["[name]"] * (number - 1))


def postscript(rng: random.Random) -> Example:
    """A postscript and a letter without one."""
    marker, letter = rng.choice(("P.S.", "P.P.S")), samples.prose(rng, 2)
    return {"postscript_marker": marker}, f"{letter}\n\n{marker} {samples.sentence(rng)}", letter


def bullets(rng: random.Random) -> Example:
    """Bullet points, one too many."""
    number = rng.randint(1, 6)
    lines = [f"{rng.choice('*-')} {samples.noun(rng)}" for _ in range(number + 1)]
    return {"num_bullets": number}, "\n".join(lines[1:]), "\n".join(lines)


def constrained(rng: random.Random) -> Example:
    """One of the three answers."""
    return {}, f"My answer is {rng.choice(('yes', 'no', 'maybe'))}.", "My answer is perhaps."


def highlights(rng: random.Random) -> Example:
    """Highlighted words, one too few."""
    number = rng.randint(1, 4)
    return {"num_highlights": number}, " ".join([f"*{samples.noun(rng)}*"] * number), " ".join([f"*{samples.noun(rng)}*"] * (number - 1))


def sections(rng: random.Random) -> Example:
    """Numbered sections, one too few."""
    number, head = rng.randint(2, 5), rng.choice(("Section", "SECTION", "Day"))
    parts = [f"{head} {place}\n{samples.sentence(rng)}" for place in range(1, number + 1)]
    return {"section_spliter": head, "num_sections": number}, "\n".join(parts), "\n".join(parts[1:])


def json_text(rng: random.Random) -> Example:
    """JSON and not quite JSON."""
    word = samples.noun(rng)
    return {}, f'```json\n{{"{word}": [1, true]}}\n```', f"{{'{word}': 1}}"


def title(rng: random.Random) -> Example:
    """A title and an empty one."""
    return {}, f"<<The {samples.noun(rng)}>>\n\n{samples.sentence(rng)}", "<< >>\n\n" + samples.sentence(rng)


def two_responses(rng: random.Random) -> Example:
    """Two answers, and one twice."""
    one, two = samples.nouns(rng, 2)
    return {}, f"A {one}.\n******\nA {two}.", f"A {one}.\n******\nA {one}."


def repeat(rng: random.Random) -> Example:
    """The request, then an answer; the answer alone."""
    request, answer = f"Write about a {samples.noun(rng)}.", samples.sentence(rng)
    return {"prompt_to_repeat": request}, f"{request}\n{answer}", answer


def end(rng: random.Random) -> Example:
    """An ending with nothing after it, and with something."""
    phrase, before = f"And that was the {samples.noun(rng)}.", samples.sentence(rng)
    return {"end_phrase": phrase}, f"{before} {phrase}", f"{before} {phrase} Bye."


def quotation(rng: random.Random) -> Example:
    """Quoted as a whole, and left open."""
    said = samples.sentence(rng)
    return {}, f'"{said}"', f'"{said}'


def capital_words(rng: random.Random) -> Example:
    """So many words in capitals."""
    return _counted(rng, "capital_frequency", "capital_relation", lambda n: "so it is " + samples.words(rng, n).upper())


def capitals(rng: random.Random) -> Example:
    """English in capitals, and as usual."""
    said = samples.sentence(rng)
    return {}, said.upper(), said


def small(rng: random.Random) -> Example:
    """English in small letters, and as usual."""
    said = samples.sentence(rng)
    return {}, said.lower(), said


def no_comma(rng: random.Random) -> Example:
    """A sentence without a comma and one with."""
    return {}, samples.sentence(rng), "So, " + samples.sentence(rng)
