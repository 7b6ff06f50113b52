"""New AgentIF rows of any length: a system prompt with tools, rules, a manual and examples, a request, and checkers that are known.

A row is made of a plan and a seed. The plan says which rules there are, where they stand (in the list of rules, somewhere in the manual, in an
earlier turn) and how long the whole is; the seed gives the content: names, codes, requests, the manual's text. So rows of one plan under
several seeds ask for the same in other words, and a model that does better on a seed that has been published has seen it.

Each row comes with a response that keeps every rule and, for each rule, one that breaks that rule alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.agentif import fresh_text as text
from jaxrl_llm.evals.agentif.fresh_rules import CORE, MORE, Draft, Rule, World
from jaxrl_llm.rewards.text_measures import count_words

FEWEST, MOST_WORDS = 100, 20_000
HEADS = {"list": "Rule {n}. {ask}", "manual": "Rule {n}, for every answer. {ask}", "turn": "One more rule for your answers, number {n}. {ask}"}
SECTION_WORDS = ("Case", "Finding", "Cause", "Next step", "Advice", "Record", "Outcome", "Contact")


@dataclass(frozen=True)
class Made:
    """row: in the published schema. reference: a response that keeps every rule. violations: of each constraint, one that breaks it alone."""

    row: dict[str, Any]
    reference: str
    violations: tuple[str, ...]


@dataclass(frozen=True)
class _Ask:
    """A sentence of a rule and where it stands: "list", "manual" (at a depth from 0 to 1) or "turn"."""

    rule: int
    part: int
    place: str
    depth: float


def make_rows(rows: int, seeds: Sequence[int], words: Sequence[int]) -> list[Made]:
    """`rows` plans under each seed; plan i is about words[i % len(words)] words long, or as short as its rules allow.

    Raises UserError for no rows, no or repeated seeds, and lengths outside of FEWEST to MOST_WORDS.
    """
    if rows < 1:
        raise UserError(f"make.rows is {rows}: give 1 or more")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"make.seeds is {tuple(seeds)}: give one seed or more, each once")
    if not words or not all(FEWEST <= length <= MOST_WORDS for length in words):
        raise UserError(f"make.words is {tuple(words)}: give lengths from {FEWEST} to {MOST_WORDS} words")
    return [make_row(plan, seed, words[plan % len(words)]) for seed in seeds for plan in range(rows)]


def make_row(plan: int, seed: int, words: int) -> Made:
    """The row of a plan under a seed; the same arguments give the same row."""
    layout, rng = random.Random(f"plan {plan}"), random.Random(f"content {seed} {plan}")
    makers = [*CORE, *layout.sample(MORE, layout.randint(4, len(MORE)))]
    number_of_sections, has_turn = layout.randint(3, 5), layout.random() < 0.3
    world, trade = _world(rng, number_of_sections)
    rules = [make(world) for make in makers]
    asks = _places(rules, layout, has_turn)
    numbers = {(ask.rule, ask.part): n for n, ask in enumerate(asks, 1)}

    def said(ask: _Ask) -> str:
        sentence = rules[ask.rule].ask[ask.part].replace("{n}", str(numbers[ask.rule, 0]))
        return HEADS[ask.place].format(n=numbers[ask.rule, ask.part], ask=sentence)

    turns = _turns(world, trade, rng, [said(ask) for ask in asks if ask.place == "turn"])
    parts = _system(world, trade, rng, [said(ask) for ask in asks if ask.place == "list"])
    inserted = [(ask.depth, said(ask)) for ask in asks if ask.place == "manual"] + [(layout.random(), fact) for fact in world.facts]
    room = words - count_words("\n".join([*parts, *(turn["content"] for turn in turns), *(what for _, what in inserted)]))
    parts.insert(-1, "# Manual\n" + _manual(world, trade, rng, room, inserted))
    messages = [{"role": "system", "content": "\n\n".join(parts)}, *turns]
    order = list(range(len(rules)))
    layout.shuffle(order)
    row = {
        "id": f"fresh-{seed}-{plan}", "agent_name": f"{world.company} ({trade[0]})", "input": messages,
        "constraints": [_constraint(place, rules[i], [ask for ask in asks if ask.rule == i], said) for place, i in enumerate(order)],
        "made": {"plan": plan, "seed": seed, "words": sum(count_words(message["content"]) for message in messages)},
    }  # fmt: skip
    draft = _draft(world, trade, rng, rules)
    return Made(row, draft.render(), tuple(_broken(draft, rules[i]) for i in order))


def _world(rng: random.Random, number_of_sections: int) -> tuple[World, tuple[str, str, str]]:
    world, trade = World(rng), rng.choice(text.TRADES)
    world.company, world.customer = world.name(), world.name()
    world.known = [world.name() for _ in range(12)]
    world.section_names = [f"{word} {world.name()}" for word in rng.sample(SECTION_WORDS, number_of_sections)]
    world.case = {"Channel": world.name(), "Tier": world.name(), "Region": world.name()}
    tools = [f"{verb}_{world.name().lower()}" for verb in ("find", "move", "note", "ask")]
    world.tools = {tool: {"slip": "string", "days": "integer"} if i == 0 else {"text": "string", "count": "integer"} for i, tool in enumerate(tools)}
    return world, trade


def _places(rules: Sequence[Rule], layout: random.Random, has_turn: bool) -> list[_Ask]:
    """Where each sentence stands, in the order of the text. What corrects a rule stands behind it."""
    asks = []
    for i, rule in enumerate(rules):
        place = layout.choice(("list", "list", "manual"))
        depths = sorted(layout.random() for _ in rule.ask)
        for part in range(len(rule.ask)):
            asks.append(_Ask(i, part, "manual" if part and place == "list" and layout.random() < 0.5 else place, depths[part]))
    if has_turn:
        late = next(ask for ask in reversed(asks) if ask.part == len(rules[ask.rule].ask) - 1)
        asks[asks.index(late)] = _Ask(late.rule, late.part, "turn", 1.0)
    return sorted(asks, key=lambda ask: (("list", "manual", "turn").index(ask.place), ask.depth))


def _turns(world: World, trade: tuple[str, str, str], rng: random.Random, extra: list[str]) -> list[dict[str, str]]:
    head = "\n".join(f"{key}: {value}" for key, value in world.case.items())
    last = f"{head}\n\n{text.request(rng, trade[1])}\n\n{world.customer}"
    if not extra:
        return [{"role": "user", "content": last}]
    first = "Before the first message comes in: " + " ".join(extra)
    return [
        {"role": "user", "content": first}, {"role": "assistant", "content": "Understood. I keep to it in every answer."},
        {"role": "user", "content": last},
    ]  # fmt: skip


def _system(world: World, trade: tuple[str, str, str], rng: random.Random, listed: list[str]) -> list[str]:
    """Role, tools, rules and examples, each a part."""
    kinds = {
        tool: {"name": tool, "parameters": {name: {"type": kind} for name, kind in parameters.items()}} for tool, parameters in world.tools.items()
    }
    role = (
        f"# Role\nYou answer the messages that customers of {world.company}, a {trade[0]}, send in. Keep to every rule below, wherever it stands, "
        "also to those inside the manual."
    )
    tools = "# Tools\nA call is written as <tool_call>{\"name\": ..., \"arguments\": {...}}</tool_call>, on a line of its own.\n"
    tools += "\n".join(json.dumps(kind) for kind in kinds.values())
    examples = "# Examples\n" + "\n\n".join(_example(world, trade, rng) for _ in range(2))
    return [role, tools, "# Rules\n" + "\n".join(listed), examples]


def _example(world: World, trade: tuple[str, str, str], rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2031, 2089)
    answer = "\n".join(f"[{name}] {_statement(trade, rng)}" for name in world.section_names)
    return f"Message of {year}-{month:02}-{day:02}: {text.request(rng, trade[1])}\nAnswer:\n{answer}\n\nReceived: {day:02}.{month:02}.{year}"


def _statement(trade: tuple[str, str, str], rng: random.Random) -> str:
    return f"The {trade[1]} is at {rng.choice(text.PLACES)} and is {rng.choice(text.CHECKS)} {rng.choice(text.TIMES)}."


def _manual(world: World, trade: tuple[str, str, str], rng: random.Random, words: int, inserted: list[tuple[float, str]]) -> str:
    """About so many words in paragraphs, with what is inserted at its depth."""
    paragraphs, left = [], words
    while left > 0:
        sentences = []
        for _ in range(rng.randint(3, 6)):
            sentence = text.manual_sentence(rng, trade[1], trade[2], world.known)
            if left <= 0:
                break
            sentences.append(sentence)
            left -= count_words(sentence)
        paragraphs.append(" ".join(sentences))
    count = len(paragraphs)
    for depth, what in sorted(inserted, key=lambda one: -one[0]):
        paragraphs.insert(round(depth * count), what)
    return "\n\n".join(paragraphs)


def _constraint(place: int, rule: Rule, asks: list[_Ask], said: Any) -> dict[str, Any]:
    where = {"kind": rule.kind, "from": [ask.place for ask in asks], "depth": [round(ask.depth, 3) for ask in asks if ask.place == "manual"]}
    return {
        "id": place, "desc": " ".join(said(ask) for ask in asks), "other_info": where, "dimension": rule.dimension, "type": rule.types,
        "is_meta": rule.meta, "evaluation": [{"type": "code", "exec": rule.code}],
    }  # fmt: skip


def _draft(world: World, trade: tuple[str, str, str], rng: random.Random, rules: Sequence[Rule]) -> Draft:
    """A response that keeps every rule."""
    draft = Draft(opening="Good day.", closing="Goodbye.", sections=[(name, _statement(trade, rng)) for name in world.section_names])
    for rule in rules:
        rule.keep(draft)
    return draft


def _broken(draft: Draft, rule: Rule) -> str:
    other = copy.deepcopy(draft)
    rule.violate(other)
    return other.render()
