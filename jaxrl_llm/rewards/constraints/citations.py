"""Citations: numbers in square brackets, where they stand and what they point to."""

from __future__ import annotations

import random
import re

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.kinds import positive
from jaxrl_llm.rewards.constraints.lengths import paragraphs
from jaxrl_llm.rewards.constraints.table import Found, compare, constraint

_CITATION = re.compile(r"\[(\d{1,4}(?:[,;] ?\d{1,4}){0,20})\](?!\()")
_ENTRY = re.compile(r"[ \t]*\[?(\d{1,4})[\].:][ \t]+\S")
_REFERENCES = re.compile(r"(?im)^[#* \t]{0,10}(?:references|sources|bibliography)[*: \t]{0,10}$")


def split_references(response: str) -> tuple[str, list[int]]:
    """The text before its list of references, and the numbers of that list's entries; no entries where there is no list."""
    heads = list(_REFERENCES.finditer(response))
    if not heads:
        return response, []
    entries = [_ENTRY.match(line) for line in response[heads[-1].end() :].splitlines()]
    return response[: heads[-1].start()], [int(entry[1]) for entry in entries if entry]


def cited(text: str) -> list[int]:
    """The numbers cited in a text, in order, [2, 3] as two."""
    return [int(number) for group in _CITATION.findall(text) for number in re.findall(r"\d+", group)]


def _least_examples(rng: random.Random):
    number = rng.randint(1, 4)
    said = [f"{samples.sentence(rng)} [{place}]" for place in range(1, number + 1)]
    return {"least": number}, " ".join(said), " ".join([*said[1:], "[a] [link](1)"])


def _different(response: str) -> int:
    return len(set(cited(split_references(response)[0])))


@constraint(
    "citations:number", "Cite at least {least} different sources by their number in square brackets, such as [1].", examples=_least_examples,
    derive=lambda response, rng: {"least": _different(response)} if _different(response) else None, least=positive,
)  # fmt: skip
def _number(response: str, least: int) -> Found:
    return compare(_different(response), least, "at least", "cited sources")


def _known_examples(rng: random.Random):
    sources = rng.randint(2, 6)
    return {"sources": sources}, f"{samples.sentence(rng)} [1, {sources}]", f"{samples.sentence(rng)} [1] [{sources + 1}]"


@constraint(
    "citations:known", "Cite only the sources 1 to {sources}, and at least one of them.", examples=_known_examples,
    derive=lambda response, rng: {"sources": max(found)} if (found := cited(split_references(response)[0])) and max(found) else None,
    sources=positive,
)  # fmt: skip
def _known(response: str, sources: int) -> Found:
    found = cited(split_references(response)[0])
    unknown = sorted({number for number in found if not 1 <= number <= sources})
    return bool(found) and not unknown, f"unknown: {unknown[:20]}" if unknown else f"{len(found)} citations"


def _paragraph_examples(rng: random.Random):
    blocks = [f"{samples.sentence(rng)} [{place}]" for place in (1, 2)]
    return {}, "\n\n".join(blocks), "\n\n".join([*blocks, samples.sentence(rng)])


@constraint(
    "citations:every_paragraph", "Cite a source, such as [1], in every paragraph.", examples=_paragraph_examples, derive=lambda response, rng: {},
)  # fmt: skip
def _every_paragraph(response: str) -> Found:
    blocks = paragraphs(split_references(response)[0])
    without = [place for place, block in enumerate(blocks, 1) if not cited(block)]
    return bool(blocks) and not without, f"paragraphs without a citation: {without[:20]}" if without else "cited in every paragraph"


def _list_examples(rng: random.Random):
    head = f"{samples.sentence(rng)} [1] {samples.sentence(rng)} [2]\n\n## References\n\n[1] A book.\n"
    return {}, head + "[2] A letter.", rng.choice((head, head + "[2] A letter.\n[3] Not cited.", "A claim [1]."))


@constraint(
    "citations:listed", "End with a list headed References: one entry for each cited number, and none that is not cited.", examples=_list_examples,
    derive=lambda response, rng: {},
)  # fmt: skip
def _listed(response: str) -> Found:
    text, entries = split_references(response)
    missing, unused = sorted(set(cited(text)) - set(entries)), sorted(set(entries) - set(cited(text)))
    return bool(entries) and not missing and not unused, f"without an entry: {missing[:20]}, never cited: {unused[:20]}"
