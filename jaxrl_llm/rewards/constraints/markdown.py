"""Markdown: headings, lists, tables, code fences, quotes, bold, links; and none of it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.kinds import Optional, count, positive, text, texts
from jaxrl_llm.rewards.constraints.table import Found, between, compare, constraint, exactly, in_words, listed

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*+([^\s`]*+)[^`]*+")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+\S")
_LINK = re.compile(r"\[[^\[\]\n]{1,500}\]\([^()\s]{1,2000}\)")
_BOLD = re.compile(r"\*\*[^\S\n]*+[^*\s][^*\n]*+\*\*|__[^\S\n]*+[^_\s][^_\n]*+__")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language in small letters ("" where none is given), its text, and whether its fence is closed."""

    language: str
    text: str
    closed: bool


def split_code(response: str) -> tuple[list[str], list[Block]]:
    """The lines outside of fenced code, and the code blocks. A fence is closed by one of its kind at least as long."""
    outside, blocks, inside, fence, language = [], [], [], "", ""
    for line in response.splitlines():
        match = _FENCE.fullmatch(line)
        if not fence and match:
            fence, language, inside = match[1], match[2].lower(), []
        elif fence and match and match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[2]:
            blocks.append(Block(language, "\n".join(inside), True))
            fence = ""
        else:
            (inside if fence else outside).append(line)
    if fence:
        blocks.append(Block(language, "\n".join(inside), False))
    return outside, blocks


def headings(response: str) -> list[tuple[int, str]]:
    """(level, title) of each heading outside of code."""
    found = [match for line in split_code(response)[0] if (match := _HEADING.fullmatch(line))]
    return [(len(match[1]), match[2].strip().rstrip("#").rstrip()) for match in found]


def _exact_count(measure):
    def derive(response: str, rng: random.Random):
        found = measure(response)
        return {"low": found, "high": found} if found else None

    return derive


def _least(measure):
    def derive(response: str, rng: random.Random):
        found = measure(response)
        return {"least": found} if found else None

    return derive


def _heading_examples(rng: random.Random):
    number, level = rng.randint(1, 4), rng.randint(1, 3)
    parts = [f"{'#' * level} {samples.noun(rng).capitalize()}\n\n{samples.sentence(rng)}" for _ in range(number + 1)]
    return {"low": number, "high": number, "level": level}, "\n\n".join(parts[1:]), "\n\n".join(parts)


@constraint(
    "format:headings",
    lambda low, high, level: f"Use {in_words(low, high)} markdown headings" + (f" of level {level}." if level else "."),
    examples=_heading_examples, derive=_exact_count(lambda text: len(headings(text))), low=count, high=count, level=Optional(positive),
)  # fmt: skip
def _headings(response: str, low: int, high: int, level: int | None = None) -> Found:
    return between(sum(level in (None, depth) for depth, _ in headings(response)), low, high, "headings")


def _title_examples(rng: random.Random):
    one, two = (word.capitalize() for word in samples.nouns(rng, 2))
    return {"titles": [one, two]}, f"# {one}\n\nText.\n\n## {two.upper()}\n\nText.", f"# {two}\n\nText.\n\n## {one}\n\nText."


@constraint(
    "format:heading_titles", lambda titles: f"Use the headings {listed(titles)}, in this order.", examples=_title_examples,
    derive=lambda response, rng: {"titles": found} if (found := [title for _, title in headings(response) if title][:4]) else None, titles=texts,
)  # fmt: skip
def _heading_titles(response: str, titles: list[str]) -> Found:
    found = iter([title.casefold() for _, title in headings(response)])
    missing = next((title for title in titles if title.strip().casefold() not in found), None)
    return missing is None, "all headings in order" if missing is None else f"no heading {missing!r} in its place"


def _cells(line: str) -> int:
    return len(re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")))


def _is_rule(line: str) -> bool:
    return "|" in line and all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))


def tables(response: str) -> list[tuple[int, int]]:
    """(columns, rows below the head) of each table whose lines all have as many cells as its head."""
    found, lines, place = [], split_code(response)[0], 1
    while place < len(lines):
        columns = _cells(lines[place])
        if _is_rule(lines[place]) and "|" in lines[place - 1] and columns == _cells(lines[place - 1]):
            end = place + 1
            while end < len(lines) and "|" in lines[end] and _cells(lines[end]) == columns:
                end += 1
            found.append((columns, end - place - 1))
            place = end
        place += 1
    return found


def _table_examples(rng: random.Random):
    columns, rows = rng.randint(2, 4), rng.randint(1, 4)
    row = "| " + " | ".join(samples.nouns(rng, columns)) + " |"
    table = [row, "|" + " --- |" * columns, *[row] * rows]
    return {"columns": columns, "rows": rows}, "\n".join(table), "\n".join(table[:-1])


@constraint(
    "format:table", "Give a markdown table with {columns} columns and at least {rows} rows below its head.", examples=_table_examples,
    derive=lambda response, rng: dict(zip(("columns", "rows"), found[0], strict=True)) if (found := tables(response)) else None,
    columns=positive, rows=count,
)  # fmt: skip
def _table(response: str, columns: int, rows: int) -> Found:
    found = tables(response)
    return any(wide == columns and long >= rows for wide, long in found), f"tables (columns, rows): {found[:10]}"


def _code_examples(rng: random.Random):
    number = rng.randint(1, 3)
    block = f"```python\nprint('{samples.noun(rng)}')\n```"
    return {"least": number, "language": "python"}, "\n\n".join([block] * number), "\n\n".join([block] * (number - 1) + ["```\nx\n```"])


@constraint(
    "format:code_blocks", lambda least, language: f"Give at least {least} fenced code blocks" + (f" of {language}." if language else "."),
    examples=_code_examples, derive=_least(lambda text: sum(block.closed for block in split_code(text)[1])), least=positive, language=Optional(text),
)  # fmt: skip
def _code_blocks(response: str, least: int, language: str | None = None) -> Found:
    blocks = [block for block in split_code(response)[1] if block.closed and language in (None, block.language)]
    return compare(len(blocks), least, "at least", "closed code blocks" + (f" of {language}" if language else ""))


def numbered(response: str) -> list[int]:
    """The numbers of the items of numbered lists at the left margin, outside of code."""
    found = [re.match(r" {0,3}(\d{1,9})[.)][ \t]+\S", line) for line in split_code(response)[0]]
    return [int(match[1]) for match in found if match]


def _numbered_examples(rng: random.Random):
    number = rng.randint(2, 6)
    items = [f"{place}. {samples.sentence(rng)}" for place in range(1, number + 1)]
    return {"items": number}, "\n".join(items), "\n".join([*items[:-1], f"{number + 1}. No."])


@constraint(
    "format:numbered_list", "Give a list numbered from 1 to {items}.", examples=_numbered_examples,
    derive=lambda response, rng: {"items": len(numbered(response))} if numbered(response) else None, items=positive,
)  # fmt: skip
def _numbered_list(response: str, items: int) -> Found:
    found = numbered(response)
    return found == list(range(1, items + 1)), f"the numbers are {found[:50]}, wanted 1 to {items}"


def list_depth(response: str) -> int:
    """How deep lists are nested, outside of code: 0 without one."""
    deepest, indents = 0, []
    for line in split_code(response)[0]:
        match = _ITEM.match(line)
        if match:
            indent = len(match[1].expandtabs(4))
            while indents and indents[-1] >= indent:
                indents.pop()
            indents.append(indent)
            deepest = max(deepest, len(indents))
        elif line.strip() and not line.startswith((" ", "\t")):
            indents = []
    return deepest


def _nested_examples(rng: random.Random):
    depth = rng.randint(2, 3)
    items = ["  " * level + "- " + samples.noun(rng) for level in range(depth)]
    return {"depth": depth}, "\n".join(items), "\n".join(items[:-1])


@constraint(
    "format:nested_list", "Give a list nested at least {depth} levels deep.", examples=_nested_examples,
    derive=lambda response, rng: {"depth": list_depth(response)} if list_depth(response) > 1 else None, depth=positive,
)  # fmt: skip
def _nested_list(response: str, depth: int) -> Found:
    return compare(list_depth(response), depth, "at least", "levels of lists")


def _least_examples(mark):
    def examples(rng: random.Random):
        number = rng.randint(1, 4)
        parts = [mark(samples.noun(rng)) for _ in range(number)]
        return {"least": number}, "\n\n".join(parts), "\n\n".join(["So.", *parts[1:]])

    return examples


def _outside(response: str) -> str:
    return "\n".join(split_code(response)[0])


@constraint(
    "format:bold", "Set at least {least} parts in bold, such as **this**.", examples=_least_examples("**{}**".format),
    derive=_least(lambda text: len(_BOLD.findall(_outside(text)))), least=positive,
)  # fmt: skip
def _bold(response: str, least: int) -> Found:
    return compare(len(_BOLD.findall(_outside(response))), least, "at least", "bold parts")


@constraint(
    "format:links", "Give at least {least} markdown links.", examples=_least_examples("[{0}](https://example.org/{0})".format),
    derive=_least(lambda text: len(_LINK.findall(_outside(text)))), least=positive,
)  # fmt: skip
def _links(response: str, least: int) -> Found:
    return compare(len(_LINK.findall(_outside(response))), least, "at least", "links")


def quotes(response: str) -> int:
    """Block quotes: runs of lines that start with >, outside of code."""
    marked = [line.lstrip().startswith(">") for line in split_code(response)[0]]
    return sum(here and not before for here, before in zip(marked, [False, *marked], strict=False))


@constraint(
    "format:block_quotes", "Give at least {least} block quotes (lines that start with >).", examples=_least_examples("> {}".format),
    derive=_least(quotes), least=positive,
)  # fmt: skip
def _block_quotes(response: str, least: int) -> Found:
    return compare(quotes(response), least, "at least", "block quotes")


def _bullet_examples(rng: random.Random):
    number = rng.randint(1, 5)
    items = [f"- {samples.noun(rng)}" for _ in range(number + 1)]
    return {"items": number}, "\n".join(items[1:]), "\n".join(items)


def bullet_items(response: str) -> int:
    """Items of bullet lists at any level, outside of code: a mark and white space, so that a rule --- and **bold** are none."""
    return sum(match is not None and match[2] in "-*+" for match in map(_ITEM.match, split_code(response)[0]))


@constraint(
    "format:bullet_list", "Give exactly {items} bullet points.", examples=_bullet_examples,
    derive=lambda response, rng: {"items": bullet_items(response)} if bullet_items(response) else None, items=positive,
)  # fmt: skip
def _bullet_list(response: str, items: int) -> Found:
    return exactly(bullet_items(response), items, "bullet points")


def _plain_examples(rng: random.Random):
    said = samples.prose(rng, 2)
    return {}, said, rng.choice((f"# Title\n{said}", f"- {said}", f"**So** {said}", f"{said}\n```\nx\n```", "|a|b|\n|-|-|\n|1|2|"))


@constraint(
    "format:plain", "Use no markdown: no headings, lists, tables, bold, links or code blocks.", examples=_plain_examples,
    derive=lambda response, rng: {},
)  # fmt: skip
def _plain(response: str) -> Found:
    outside, blocks = split_code(response)
    joined = "\n".join(outside)
    marks = {
        "code blocks": blocks, "headings": headings(response), "lists": [line for line in outside if _ITEM.match(line)],
        "tables": tables(response), "bold": _BOLD.search(joined), "links": _LINK.search(joined),
    }  # fmt: skip
    present = [name for name, found in marks.items() if found]
    return not present, f"has {', '.join(present)}" if present else "plain text"
