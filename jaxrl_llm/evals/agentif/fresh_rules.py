"""Rules of made instructions: each with the sentence that asks for it, a checker in the published form, how a response keeps it, and how one
breaks it and no other.

A response is made of parts that do not overlap (`Draft`), and every rule speaks of its own part, so that a broken rule leaves the rest kept.
Checkers are Python texts that define check_following(response) and need nothing but the standard library.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.evals.agentif import fresh_text as text

CALLS = r'''import json, re
def calls_of(response):
    found = []
    for part in re.findall(r"<tool_call>(.*?)</tool_call>", response, re.S):
        try:
            call = json.loads(part)
        except ValueError:
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            return None
        found.append(call)
    return found
'''
LINES = r'''def lines_of(response):
    return [line.strip() for line in response.splitlines() if line.strip()]
'''
SECTIONS = r'''import re
def sections_of(response):
    return re.findall(r"^\[([^\]\n]+)\] *(\S[^\n]*)$", response, re.M)
'''
LONGEST_LIMIT = 260  # words of a response, where one is asked for


@dataclass
class Draft:
    """A response in parts: the opening line, sections as (name, text), bullets, calls of tools, further lines, the closing line."""

    opening: str = ""
    sections: list[tuple[str, str]] = field(default_factory=list)
    bullets: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    closing: str = ""

    def render(self) -> str:
        """The response as text."""
        blocks = [
            self.opening, "\n".join(f"[{name}] {said}" for name, said in self.sections), "\n".join(f"- {bullet}" for bullet in self.bullets),
            "\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in self.calls), "\n".join(self.lines), self.closing,
        ]  # fmt: skip
        return "\n\n".join(block for block in blocks if block)

    def add_to(self, place: int, said: str) -> None:
        """Adds a sentence to a section."""
        name, before = self.sections[place]
        self.sections[place] = (name, f"{before} {said}")


@dataclass(frozen=True)
class Rule:
    """One rule. ask: sentences for the prompt, numbered in their order; a "{n}" in one is the number of the first. body: of the checker, after
    its helpers. keep, violate: change a draft so that it keeps, or breaks, the rule."""

    kind: str
    dimension: str
    types: str
    ask: tuple[str, ...]
    code: str
    keep: Callable[[Draft], None]
    violate: Callable[[Draft], None]
    meta: bool = False


@dataclass
class World:
    """What one instruction speaks of. known: who is in the manual. tools: name -> {parameter: JSON type}. case: fields at the head of the
    request. facts: sentences that the manual must hold. taken: names that are in use."""

    rng: random.Random
    taken: list[str] = field(default_factory=list)
    company: str = ""
    customer: str = ""
    known: list[str] = field(default_factory=list)
    section_names: list[str] = field(default_factory=list)
    tools: dict[str, dict[str, str]] = field(default_factory=dict)
    case: dict[str, str] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    def name(self, syllables: int = 2) -> str:
        """A made-up name that is no part of another one here, nor holds one."""
        while True:
            made = text.name(self.rng, syllables)
            if not any(made.lower() in other or other in made.lower() for other in self.taken):
                self.taken.append(made.lower())
                return made


def _check(helpers: str, body: str, **constants: Any) -> str:
    """A checker: helpers, constants by name, and its body."""
    told = "".join(f"{key} = {value!r}\n" for key, value in constants.items())
    return f"{helpers}{told}def check_following(response):\n    {body}\n"


def opening(w: World) -> Rule:
    """The answer begins with a line that is given."""
    line = f"{w.company} case {text.code(w.rng)}"
    return Rule(
        "opening", "unconditional", "formatting", (f"Begin with this line and nothing before it: {line}",),
        _check(LINES, "found = lines_of(response)\n    return bool(found) and found[0] == LINE", LINE=line),
        lambda d: setattr(d, "opening", line), lambda d: setattr(d, "opening", f"Answer of {w.company}"),
    )  # fmt: skip


def closing(w: World) -> Rule:
    """The answer ends with a line that is given."""
    line = f"Yours, {w.name()} of {w.company}"
    return Rule(
        "closing", "unconditional", "formatting", (f"Let the last line be: {line}",),
        _check(LINES, "found = lines_of(response)\n    return bool(found) and found[-1] == LINE", LINE=line),
        lambda d: setattr(d, "closing", line), lambda d: setattr(d, "closing", f"Yours, the people of {w.company}"),
    )  # fmt: skip


def sections(w: World) -> Rule:
    """The sections of the examples, in their order."""
    def swap(d: Draft) -> None:
        d.sections[0], d.sections[1] = d.sections[1], d.sections[0]

    return Rule(
        "sections", "example_driven", "formatting",
        ("Lay the answer out as the examples do: the same sections under the same names, in their order.",),
        _check(SECTIONS, "return [name for name, _ in sections_of(response)] == NAMES", NAMES=list(w.section_names)),
        lambda d: None, swap,
    )  # fmt: skip


def dates(w: World) -> Rule:
    """The day of the message, written as in the examples: the form is in no rule."""
    day, month, year = w.rng.randint(1, 28), w.rng.randint(1, 12), w.rng.randint(2031, 2089)
    w.case["Received"] = f"{year}-{month:02}-{day:02}"
    written = f"Received: {day:02}.{month:02}.{year}"
    return Rule(
        "dates", "example_driven", "formatting",
        ("On a line of its own, give the day on which the message was received, written as in the examples.",),
        _check(LINES, "return LINE in lines_of(response)", LINE=written),
        lambda d: d.lines.append(written), lambda d: _replace(d, written, f"Received: {w.case['Received']}"),
    )  # fmt: skip


def _replace(d: Draft, line: str, other: str) -> None:
    d.lines = [other if found == line else found for found in d.lines]


def bullets(w: World) -> Rule:
    """So many bullet points, no more and no fewer."""
    number = w.rng.randint(3, 6)
    things = [f"{w.name()} has been told" for _ in range(number)]
    return Rule(
        "bullets", "unconditional", "formatting", (f"Give exactly {number} bullet points, each on a line that begins with a hyphen and a space.",),
        _check("", "return sum(line.startswith('- ') for line in response.splitlines()) == NUMBER", NUMBER=number),
        lambda d: d.bullets.extend(things), lambda d: d.bullets.append("one point more"),
    )  # fmt: skip


def keyword(w: World) -> Rule:
    """A word that must occur."""
    word = w.name(3)
    said = f"This goes by the {word} scheme."

    def lose(d: Draft) -> None:
        d.sections = [(name, before.replace(word, "usual")) for name, before in d.sections]

    return Rule(
        "keyword", "unconditional", "semantic", (f'Name the scheme that the answer goes by, "{word}".',),
        _check("", "return WORD in response", WORD=word), lambda d: d.add_to(0, said), lose,
    )  # fmt: skip


def forbidden(w: World) -> Rule:
    """A word that must not occur."""
    word = w.name(3)
    return Rule(
        "forbidden", "unconditional", "semantic", (f"Say nothing of {word}, not even the name.",),
        _check("", "return WORD.lower() not in response.lower()", WORD=word), lambda d: None, lambda d: d.add_to(0, f"{word} has heard of it."),
    )  # fmt: skip


def length(w: World) -> Rule:
    """At most so many words."""
    most = w.rng.randrange(LONGEST_LIMIT - 40, LONGEST_LIMIT, 10)
    filler = "We have looked into this with some care and shall look again"
    return Rule(
        "length", "unconditional", "formatting", (f"Use at most {most} words, by white space.",),
        _check("", "return len(response.split()) <= MOST", MOST=most), lambda d: None,
        lambda d: d.lines.extend([filler] * (most // len(filler.split()) + 1)),
    )  # fmt: skip


def customer(w: World) -> Rule:
    """The customer's name, which only the message has."""
    other = w.name()
    said = f"{w.customer} has our thanks for the message."

    def rename(d: Draft) -> None:
        d.sections = [(name, before.replace(w.customer, other)) for name, before in d.sections]

    return Rule(
        "customer", "unconditional", "semantic", ("Speak of the customer by the name that the message gives.",),
        _check("", "return NAME in response", NAME=w.customer), lambda d: d.add_to(0, said), rename,
    )  # fmt: skip


def lookup(w: World) -> Rule:
    """A code that only the manual has, somewhere in its text."""
    entity, right, wrong = w.rng.choice(w.known), text.code(w.rng), text.code(w.rng)
    w.facts.append(text.fact(w.rng, entity, right))
    line = f"Register: {right}"
    return Rule(
        "lookup", "unconditional", "semantic", (f'Give the register code of {entity}, which the manual holds, on a line "Register: CODE".',),
        _check(LINES, "return LINE in lines_of(response)", LINE=line), lambda d: d.lines.append(line),
        lambda d: _replace(d, line, f"Register: {wrong}"),
    )  # fmt: skip


def tool_call(w: World) -> Rule:
    """A call of a tool with a value from the message."""
    tool = next(iter(w.tools))
    value = text.code(w.rng)
    w.case["Slip"] = value

    def keep(d: Draft) -> None:
        d.calls.append({"name": tool, "arguments": {"slip": value, "days": w.rng.randint(2, 9)}})

    def other_value(d: Draft) -> None:
        d.calls[0]["arguments"]["slip"] = value[::-1]

    return Rule(
        "tool_call", "unconditional", "resource", (f"Call the tool {tool} for the slip that the message names.",),
        _check(CALLS, "return any(c['name'] == TOOL and c['arguments'].get('slip') == SLIP for c in calls_of(response) or [])",
               TOOL=tool, SLIP=value),
        keep, other_value,
    )  # fmt: skip


def tools_only(w: World) -> Rule:
    """No call of a tool that was not specified."""
    unknown = f"open_{w.name().lower()}"
    return Rule(
        "tools_only", "unconditional", "resource", ("Call no tool but those listed above.",),
        _check(CALLS, "found = calls_of(response)\n    return found is not None and all(c['name'] in TOOLS for c in found)", TOOLS=sorted(w.tools)),
        lambda d: None, lambda d: d.calls.append({"name": unknown, "arguments": {}}),
    )  # fmt: skip


def arguments(w: World) -> Rule:
    """Arguments that the tools have, of the types that they are specified with."""
    body = (
        "found = calls_of(response)\n    if found is None:\n        return False\n"
        "    kinds = {'string': str, 'integer': int}\n    for c in found:\n        known = TOOLS.get(c['name'])\n"
        "        if known is None:\n            continue\n        for key, value in c['arguments'].items():\n"
        "            if key not in known or type(value) is not kinds[known[key]]:\n                return False\n    return bool(found)"
    )

    def as_text(d: Draft) -> None:
        d.calls[0]["arguments"]["days"] = str(d.calls[0]["arguments"]["days"])

    return Rule(
        "arguments", "unconditional", "resource", ("Give tools only the parameters that they have, each of the type that its specification says.",),
        _check(CALLS, body, TOOLS=w.tools), lambda d: None, as_text,
    )  # fmt: skip


def _condition(w: World, met: bool) -> str:
    """A condition on the head of the request, true or false of it."""
    key = w.rng.choice(("Channel", "Tier", "Region"))
    value = w.case[key] if met else w.name()
    return f'if the head of the message says "{key}: {value}"'


def condition_met(w: World) -> Rule:
    """A line that is due if something holds, which does."""
    line = f"Passed on to {w.name()}"
    asked = f'Write "{line}" on a line of its own {_condition(w, True)}; else leave it out.'
    return Rule(
        "condition_met", "conditional", "formatting", (asked,), _check(LINES, "return LINE in lines_of(response)", LINE=line),
        lambda d: d.lines.append(line), lambda d: d.lines.remove(line),
    )  # fmt: skip


def condition_unmet(w: World) -> Rule:
    """A line that is due if something holds, which does not."""
    line = f"Refund by {w.name()}"
    asked = f'Write "{line}" on a line of its own {_condition(w, False)}; else do not write it.'
    return Rule(
        "condition_unmet", "conditional", "semantic", (asked,), _check("", "return LINE not in response", LINE=line), lambda d: None,
        lambda d: d.lines.append(line),
    )  # fmt: skip


def override(w: World) -> Rule:
    """A rule that a later one changes: the line of the later one."""
    old, new = (f"Filed as {text.code(w.rng)}" for _ in range(2))
    asks = (f'Write "{old}" on a line of its own.', f'Rule {{n}} is out of date: the line is "{new}" now, and the old one must not be written.')
    return Rule(
        "override", "unconditional", "semantic", asks,
        _check(LINES, "return NEW in lines_of(response) and OLD not in response", NEW=new, OLD=old), lambda d: d.lines.append(new),
        lambda d: _replace(d, new, old), meta=True,
    )  # fmt: skip


def cancelled(w: World) -> Rule:
    """A rule that a later one takes back."""
    line = f"Copy to {w.name()}"
    asks = (f'Add the line "{line}".', "Rule {n} no longer holds: what it asks for must not be written.")
    return Rule(
        "cancelled", "unconditional", "semantic", asks, _check("", "return LINE not in response", LINE=line), lambda d: None,
        lambda d: d.lines.append(line), meta=True,
    )  # fmt: skip


def scope(w: World) -> Rule:
    """A rule that a later one confines to one section."""
    place = w.section_names[-1]
    asks = ("Write in capital letters only.", f"Rule {{n}} is meant for the section {place} alone; the other sections are written as usual.")
    body = "found = dict(sections_of(response))\n    other = any(said.isupper() for name, said in found.items() if name != PLACE)\n"
    body += "    return found.get(PLACE, '').isupper() and not other"

    def upper(d: Draft) -> None:
        name, said = d.sections[-1]
        d.sections[-1] = (name, said.upper())

    def lower(d: Draft) -> None:
        d.sections = [(name, said.capitalize() if name == place else said) for name, said in d.sections]

    return Rule("scope", "unconditional", "formatting", asks, _check(SECTIONS, body, PLACE=place), upper, lower, meta=True)


def no_marks(w: World) -> Rule:
    """No exclamation mark."""
    return Rule(
        "no_marks", "unconditional", "formatting", ("Use no exclamation mark.",), _check("", "return '!' not in response"), lambda d: None,
        lambda d: d.add_to(0, "We are on it!"),
    )  # fmt: skip


# "sections" and "tool_call" come first: others change what they have put into the draft.
CORE: tuple[Callable[[World], Rule], ...] = (sections, tool_call)
MORE: tuple[Callable[[World], Rule], ...] = (
    opening, closing, dates, bullets, keyword, forbidden, length, customer, lookup, tools_only, arguments, condition_met, condition_unmet, override,
    cancelled, scope, no_marks,
)  # fmt: skip
