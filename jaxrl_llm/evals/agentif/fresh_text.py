"""Words for made instructions: names that nobody has written before, manuals of any length, requests. All of a random.Random."""

from __future__ import annotations

import random

ONSETS = ("b", "br", "c", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "or", "el", "an")
ENDS = ("n", "r", "s", "l", "m", "t", "x", "")
TRADES = (
    ("parcel depot", "parcel", "courier"), ("tram company", "ticket", "driver"), ("seed library", "packet", "gardener"),
    ("repair workshop", "machine", "mechanic"), ("ferry line", "crossing", "pilot"), ("archive", "file", "keeper"),
    ("water works", "meter", "fitter"), ("language school", "course", "teacher"), ("radio station", "recording", "editor"),
    ("bicycle hire", "bicycle", "fitter"), ("greenhouse", "tray", "grower"), ("print shop", "order", "printer"),
)  # fmt: skip
PLACES = ("the north gate", "the second floor", "the river side", "the old hall", "the lower yard", "the front desk", "the east wing", "room nine")
TIMES = ("before noon", "after the last round", "on the first workday", "within two days", "at the end of a shift", "every other week")
CHECKS = ("weighed", "listed", "photographed", "labelled", "counted", "signed for", "wiped down", "measured", "set aside", "entered twice")
REASONS = (
    "because the scales drift in cold weather", "so that nobody has to ask twice", "since the old forms are still in use",
    "as the insurer has asked for it", "because two of them once went astray", "so that the night crew finds it",
)  # fmt: skip
REQUESTS = (
    "The {thing} that I handed in last week is not where your letter says it is.",
    "I was told that my {thing} would be ready, and nobody at {place} knows of it.",
    "Somebody has changed the details of my {thing} without telling me.",
    "I would like to know what happens to my {thing} now that {place} is closed.",
)
DETAILS = (
    "I came by twice and was sent away both times.", "The person at the desk was kind but could not find the record.",
    "I have kept the slip, and the number on it can be read.", "It is not the first time that this has happened to me.",
    "Please tell me plainly what you can do and what you cannot.",
)  # fmt: skip


def name(rng: random.Random, syllables: int = 2) -> str:
    """A made-up name, such as "Torvelan"."""
    made = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(ENDS)
    return made.capitalize()


def code(rng: random.Random) -> str:
    """A made-up code, such as "QK-4821"."""
    return "".join(rng.choices("BCDFGHKLMNPQRTVXZ", k=2)) + f"-{rng.randint(1000, 9999)}"


def fact(rng: random.Random, entity: str, value: str) -> str:
    """A sentence that gives an entity's code."""
    return rng.choice((
        f"The register code of {entity} is {value}.", f"{entity} is kept under the register code {value}.",
        f"Whoever looks for {entity} finds it under its register code, {value}.",
    ))  # fmt: skip


def manual_sentence(rng: random.Random, thing: str, worker: str, known: list[str]) -> str:
    """One sentence of a manual, without a rule for the answer in it."""
    who, other, place, when = rng.choice(known), rng.choice(known), rng.choice(PLACES), rng.choice(TIMES)
    check, reason, number = rng.choice(CHECKS), rng.choice(REASONS), rng.randint(2, 60)
    return rng.choice((
        f"A {thing} from {who} is {check} {when}, {reason}.",
        f"The {worker} at {place} keeps {number} of them for {who} and hands the rest to {other}.",
        f"What {who} leaves at {place} is {check} and then {rng.choice(CHECKS)}, {reason}.",
        f"In shelf {number} stands what {other} has {check}; the {worker} looks at it {when}.",
        f"{who} and {other} share {place} and change over {when}.",
        f"Of every {number} {thing}s one is {check} by {who}, {reason}.",
        f"If {place} is full, the {worker} asks {other} for room {when}.",
        f"The list of {who} hangs at {place}, where each {thing} is {check}.",
    ))  # fmt: skip


def request(rng: random.Random, thing: str) -> str:
    """What a customer writes."""
    first = rng.choice(REQUESTS).format(thing=thing, place=rng.choice(PLACES))
    return " ".join([first, *rng.sample(DETAILS, 2)])
