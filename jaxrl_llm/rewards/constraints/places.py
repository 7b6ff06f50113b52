"""Where things stand: how a response starts and ends, first letters, exact copies, marks and letters' case."""

from __future__ import annotations

import random
import re

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.kinds import count, letter, text, texts, word
from jaxrl_llm.rewards.constraints.lengths import lines
from jaxrl_llm.rewards.constraints.table import Found, between, constraint, listed
from jaxrl_llm.rewards.text_measures import sentences, words

_CLOSERS = "\"'”’)]*_"


def _no_parameters(response: str, rng: random.Random) -> dict:
    return {}


@constraint(
    "startend:opening", "Start with: {opening}", examples=lambda rng: ({"opening": "One day,"}, " One day, it rained.", "So one day, it rained."),
    derive=lambda response, rng: {"opening": " ".join(response.split()[:3])} if response.split() else None, opening=text,
)  # fmt: skip
def _opening(response: str, opening: str) -> Found:
    found = response.lstrip().startswith(opening.strip())
    return found, f"{'starts' if found else 'does not start'} with {opening.strip()!r}"


def _cut_short(rng: random.Random):
    said = samples.prose(rng, 2)
    return {}, said, said[: -rng.randint(4, 12)]


@constraint("startend:full_sentence", "End with a whole sentence.", examples=_cut_short, derive=_no_parameters)
def _full_sentence(response: str) -> Found:
    end = response.rstrip().rstrip(_CLOSERS)
    found = end[-1:] in (".", "!", "?") and re.search(r"\w", end) is not None
    return found, f"{'ends' if found else 'does not end'} with a whole sentence"


def _word_at(place: int):
    def examples(rng: random.Random):
        one, two = samples.nouns(rng, 2)
        good, bad = (f"{one} and {two}", f"{two} and {one}") if place == 0 else (f"{two} and {one}.", f"{one} and {two}.")
        return {"word": one}, good.capitalize(), bad.capitalize()

    def derive(response: str, rng: random.Random):
        found = words(response)
        return {"word": found[place]} if found else None

    return {"examples": examples, "derive": derive}


def _is_word(response: str, wanted: str, place: int, what: str) -> Found:
    found = words(response)
    given = found[place] if found else ""
    return given.lower() == wanted.lower(), f"the {what} word is {given[:80]!r}, wanted {wanted!r}"


@constraint("startend:first_word", 'Let "{word}" be the first word.', **_word_at(0), word=word)
def _first_word(response: str, word: str) -> Found:
    return _is_word(response, word, 0, "first")


@constraint("startend:last_word", 'Let "{word}" be the last word.', **_word_at(-1), word=word)
def _last_word(response: str, word: str) -> Found:
    return _is_word(response, word, -1, "last")


def _prefix_examples(rng: random.Random):
    given = ["> " + samples.sentence(rng) for _ in range(3)]
    return {"start": "> "}, "\n".join(given), "\n".join([*given, "And more."])


def _common_start(response: str, rng: random.Random):
    found = lines(response)
    starts = {line[:2] for line in found}
    return {"start": found[0][:2]} if len(found) > 1 and len(starts) == 1 and found[0][:2].strip() else None


@constraint("startend:every_line", 'Start every line with "{start}".', examples=_prefix_examples, derive=_common_start, start=text)
def _every_line(response: str, start: str) -> Found:
    found = lines(response)
    wrong = [line for line in found if not line.startswith(start.strip())]
    return bool(found) and not wrong, f"{len(wrong)} of {len(found)} lines start otherwise"


def _acrostic_examples(rng: random.Random):
    given = ["Rain fell.", "It was cold.", "Very few came.", "Even so, they sang.", "Rivers rose."]
    return {"letters": "RIVER"}, "\n".join(given), "\n".join(given[1:])


def _initials(response: str) -> str:
    return "".join(next((char for char in line if char.isalnum()), "") for line in lines(response))


@constraint(
    "startend:acrostic", 'Let the first letters of the lines spell "{letters}".', examples=_acrostic_examples,
    derive=lambda response, rng: {"letters": _initials(response)} if 3 <= len(_initials(response)) <= 12 else None, letters=word,
)  # fmt: skip
def _acrostic(response: str, letters: str) -> Found:
    found = _initials(response)
    return found.casefold() == letters.casefold(), f"the lines spell {found[:80]!r}, wanted {letters!r}"


def _sentence_starts(rng: random.Random):
    return {"letter": "T"}, samples.prose(rng, 3), f"{samples.prose(rng, 2)} So it was."


def _first_letter(sentence: str) -> str:
    return next((char for char in sentence if char.isalnum()), "").casefold()


def _common_letter(response: str, rng: random.Random):
    found = {_first_letter(sentence) for sentence in sentences(response)}
    return {"letter": found.pop().upper()} if len(found) == 1 else None


@constraint(
    "startend:every_sentence_letter", 'Start every sentence with the letter "{letter}".', examples=_sentence_starts,
    derive=_common_letter, letter=letter,
)  # fmt: skip
def _every_sentence_letter(response: str, letter: str) -> Found:
    found = sentences(response)
    wrong = [sentence for sentence in found if _first_letter(sentence) != letter.strip().casefold()]
    return bool(found) and not wrong, f"{len(wrong)} of {len(found)} sentences start otherwise"


# ---- exact copies


def _copy_examples(rng: random.Random):
    given = samples.prose(rng, 2)
    return {"copy": given}, f"\n{given}\n", given.replace("The", "the", 1)


@constraint("copy:exact", "Copy this text exactly and add nothing: {copy}", examples=_copy_examples, copy=text)
def _exact(response: str, copy: str) -> Found:
    given, wanted = response.strip(), copy.strip()
    same = next((place for place, (one, two) in enumerate(zip(given, wanted, strict=False)) if one != two), min(len(given), len(wanted)))
    return given == wanted, "an exact copy" if given == wanted else f"the copy parts from the text at character {same}"


def _quote_examples(rng: random.Random):
    given, more = samples.sentence(rng), samples.sentence(rng)
    return {"copy": given}, f"They wrote: {given} {more}", f"They wrote: {given.lower()} {more}"


def _one_sentence(response: str, rng: random.Random):
    found = sentences(response)
    return {"copy": rng.choice(found)} if found else None


@constraint("copy:contains", "Include this text, unchanged: {copy}", examples=_quote_examples, derive=_one_sentence, copy=text)
def _contains(response: str, copy: str) -> Found:
    found = copy.strip() in response
    return found, f"{'holds' if found else 'does not hold'} the text"


@constraint(
    "copy:one_of", lambda options: f"Answer with exactly one of {listed(options)}, and nothing else.",
    examples=lambda rng: ({"options": ["positive", "negative"]}, "positive\n", "It is positive."), options=texts,
)  # fmt: skip
def _one_of(response: str, options: list[str]) -> Found:
    return response.strip() in [option.strip() for option in options], f"the answer is {response.strip()[:80]!r}"


# ---- marks and case


def _absent_marks(response: str, rng: random.Random):
    absent = [mark for mark in ";:!?()—\"'" if mark not in response]
    return {"characters": "".join(rng.sample(absent, min(2, len(absent))))} if absent else None


def _mark_examples(rng: random.Random):
    return {"characters": "!;"}, samples.sentence(rng), samples.sentence(rng) + " Oh!"


@constraint("punctuation:forbidden", "Use none of these characters: {characters}", examples=_mark_examples, derive=_absent_marks, characters=text)
def _forbidden(response: str, characters: str) -> Found:
    present = [char for char in dict.fromkeys(characters) if not char.isspace() and char in response]
    return not present, f"present: {' '.join(present)}" if present else "none present"


def _number_of_marks(rng: random.Random):
    number = rng.randint(1, 4)
    return {"mark": "?", "low": number, "high": number}, "Who? " * number + "So.", "Who? " * (number + 1)


def _some_mark(response: str, rng: random.Random):
    present = [mark for mark in "?!;:-" if mark in response]
    mark = rng.choice(present) if present else ""
    return {"mark": mark, "low": response.count(mark), "high": response.count(mark)} if mark else None


@constraint(
    "punctuation:count", 'Use the mark "{mark}" {times}.', examples=_number_of_marks, derive=_some_mark,
    mark=text, low=count, high=count,
)  # fmt: skip
def _marks(response: str, mark: str, low: int, high: int) -> Found:
    return between(response.count(mark.strip()), low, high, f"of {mark.strip()!r}")


_PAIRS = {")": "(", "]": "[", "}": "{"}


def _balance_examples(rng: random.Random):
    return {}, "f(a[0], {b}) is (so)", rng.choice(("f(a[0)]", "f(a", "a)"))


@constraint("punctuation:balanced", "Close every bracket that you open, in order.", examples=_balance_examples, derive=_no_parameters)
def _balanced(response: str) -> Found:
    open_ones = []
    for place, char in enumerate(response):
        if char in "([{":
            open_ones.append(char)
        elif char in _PAIRS and (not open_ones or open_ones.pop() != _PAIRS[char]):
            return False, f"{char!r} at character {place} closes nothing"
    return not open_ones, f"{len(open_ones)} brackets stay open" if open_ones else "all brackets are closed"


def _capital_start(rng: random.Random):
    said = samples.prose(rng, 2)
    return {}, said, said.replace("The", "the", 1)


@constraint("change_case:sentence_starts", "Start every sentence with a capital letter.", examples=_capital_start, derive=_no_parameters)
def _sentence_capitals(response: str) -> Found:
    found = sentences(response, before_small=True)
    wrong = [sentence for sentence in found if next((char for char in sentence if char.isalnum()), "A").islower()]
    return not wrong, f"{len(wrong)} of {len(found)} sentences start with a small letter"


def _upper_words(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    return {"words": [one]}, f"The {one.upper()} and the {two}.", f"The {one.upper()} and a {one}."


@constraint("change_case:words_in_capitals", "Write {words} in capital letters wherever you use it.", examples=_upper_words, words=texts)
def _words_in_capitals(response: str, words: list[str]) -> Found:
    for entry in words:
        found = re.findall(rf"(?<!\w){re.escape(entry.strip())}(?!\w)", response, re.IGNORECASE)
        if not found or not all(spelt == spelt.upper() for spelt in found):
            return False, f"{entry!r} is {'written otherwise' if found else 'missing'}"
    return True, "in capitals everywhere"
