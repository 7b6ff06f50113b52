"""Structured text: JSON, JSON lines, CSV, tagged parts, and regular expressions."""

from __future__ import annotations

import csv
import json
import random
import re

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.json_schema import read_json, schema, violation
from jaxrl_llm.rewards.constraints.kinds import count, positive, texts, word
from jaxrl_llm.rewards.constraints.lengths import lines
from jaxrl_llm.rewards.constraints.patterns import count_matches, matches_whole, pattern
from jaxrl_llm.rewards.constraints.table import Found, between, compare, constraint, listed


def _schema_examples(rng: random.Random):
    name = samples.noun(rng)
    wanted = {"type": "object", "properties": {name: {"type": "integer", "minimum": 1}}, "required": [name], "additionalProperties": False}
    bad = rng.choice((f'{{"{name}": 0}}', f'{{"{name}": "1"}}', "{}", f'{{"{name}": 1, "more": 2}}', f'The answer: {{"{name}": 1}}'))
    return {"schema": wanted}, f'```json\n{{"{name}": {rng.randint(1, 9)}}}\n```', bad


def _schema_of(response: str, rng: random.Random):
    try:
        value = read_json(response)
    except ValueError:
        return None
    if not isinstance(value, dict) or not value:
        return None
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return {"schema": {"type": "object", "properties": {k: {"type": kinds[type(v)]} for k, v in value.items()}, "required": list(value)}}


@constraint(
    "format:json_schema", lambda schema: f"Answer with one JSON value, and nothing else, that keeps this schema: {json.dumps(schema)}",
    examples=_schema_examples, derive=_schema_of, schema=schema,
)  # fmt: skip
def _json_schema(response: str, schema: dict) -> Found:
    try:
        value = read_json(response)
    except ValueError as error:
        return False, f"not JSON: {error}"
    problem = violation(value, schema)
    return problem is None, problem or "keeps the schema"


def _key_examples(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    return {"keys": [one, two]}, f'{{"{two}": 1, "{one}": [], "x": 0}}', f'{{"{two}": 1, "x": {{"{one}": 1}}}}'


def _keys_of(response: str, rng: random.Random):
    found = _schema_of(response, rng)
    keys = [key for key in found["schema"]["required"] if key.strip()] if found else []
    return {"keys": keys[:1000]} if keys else None


@constraint("format:json_keys", "Answer with one JSON object that has the keys {keys}.", examples=_key_examples, derive=_keys_of, keys=texts)
def _json_keys(response: str, keys: list[str]) -> Found:
    try:
        value = read_json(response)
    except ValueError as error:
        return False, f"not JSON: {error}"
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all keys present"


def _json_line_examples(rng: random.Random):
    number = rng.randint(2, 4)
    given = [f'{{"{samples.noun(rng)}": {place}}}' for place in range(number)]
    return {"records": number}, "\n".join(given), "\n".join([*given[:-1], "{'a': 1}"])


@constraint("format:json_lines", "Write {records} JSON objects, one a line, and nothing else.", examples=_json_line_examples, records=positive)
def _json_lines(response: str, records: int) -> Found:
    found = lines(response)
    for place, line in enumerate(found, 1):
        try:
            value = read_json(line)
        except ValueError as error:
            return False, f"line {place} is not JSON: {error}"
        if not isinstance(value, dict):
            return False, f"line {place} is no object"
    return len(found) == records, f"{len(found)} objects, wanted exactly {records}"


def _csv_examples(rng: random.Random):
    columns = samples.nouns(rng, 3)
    rows = [",".join(samples.nouns(rng, 3)) for _ in range(3)]
    return {"columns": columns, "rows": 3}, "\n".join([",".join(columns), *rows]), "\n".join([",".join(columns), *rows[:-1], "a,b"])


@constraint(
    "format:csv", lambda columns, rows: f"Write CSV with the columns {listed(columns)} and at least {rows} rows, and nothing else.",
    examples=_csv_examples, columns=texts, rows=count,
)  # fmt: skip
def _csv(response: str, columns: list[str], rows: int) -> Found:
    try:
        table = [row for row in csv.reader(response.strip().splitlines(), strict=True) if row]
    except csv.Error as error:
        return False, f"not CSV: {error}"
    if not table or [cell.strip() for cell in table[0]] != [column.strip() for column in columns]:
        return False, f"the first line is {str(table[0] if table else '')[:80]}"
    wrong = [place for place, row in enumerate(table[1:], 1) if len(row) != len(columns)]
    if wrong:
        return False, f"row {wrong[0]} has {len(table[wrong[0]])} cells, wanted {len(columns)}"
    return compare(len(table) - 1, rows, "at least", "rows")


def tagged(response: str, tag: str) -> list[str]:
    """The texts between <tag> and </tag>, in order; tags of one name do not nest."""
    found, place, opening, closing = [], 0, f"<{tag}>", f"</{tag}>"
    while (start := response.find(opening, place)) >= 0 and (end := response.find(closing, start + len(opening))) >= 0:
        found.append(response[start + len(opening) : end])
        place = end + len(closing)
    return found


def _tag_examples(rng: random.Random):
    first, second = samples.sentence(rng), samples.sentence(rng)
    good = f"<thinking>{first}</thinking>\n<answer>{second}</answer>"
    bad = rng.choice((f"{good} Bye.", good.replace("</answer>", ""), f"<answer>{second}</answer><thinking>{first}</thinking>", good + good))
    return {"tags": ["thinking", "answer"]}, good, bad


def _tags_of(response: str, rng: random.Random):
    tags = list(dict.fromkeys(re.findall(r"<(\w{1,40})>", response)))
    return {"tags": tags} if tags else None


@constraint(
    "format:tags", lambda tags: f"Answer in {' then '.join(f'<{tag}>...</{tag}>' for tag in tags)}, each once, and nothing outside of them.",
    examples=_tag_examples, derive=_tags_of, tags=texts,
)  # fmt: skip
def _tags(response: str, tags: list[str]) -> Found:
    rest = response.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(opening):
            return False, f"{opening} does not come where it should"
        inner, found, rest = rest[len(opening) :].partition(closing)
        if not found or opening in inner:
            return False, f"{opening} is not closed"
        rest = rest.lstrip()
    return not rest, f"text after the last tag: {rest[:80]!r}" if rest else "all tags in order"


def _one_tag_examples(rng: random.Random):
    said = samples.sentence(rng)
    return {"tag": "answer", "low": 1, "high": 1}, f"So: <answer>{said}</answer>", rng.choice((f"<answer>{said}", f"<Answer>{said}</Answer>", said))


@constraint(
    "format:tagged", "Put parts of the answer between <{tag}> and </{tag}>, {times}.", examples=_one_tag_examples,
    derive=lambda response, rng: {"tag": found["tags"][0], "low": 1, "high": len(tagged(response, found["tags"][0])) or 1}
    if (found := _tags_of(response, rng)) else None, tag=word, low=count, high=count,
)  # fmt: skip
def _tagged(response: str, tag: str, low: int, high: int) -> Found:
    return between(len(tagged(response, tag)), low, high, f"parts in <{tag}>")


def _matching(rng: random.Random):
    number = rng.randint(100, 999)
    return {"pattern": r"[A-Z]{2}-\d{3}"}, f"AB-{number}", rng.choice((f"ab-{number}", f"AB-{number} ", f"AB{number}")).replace(" ", "!")


@constraint("format:matches", "Answer with a text that matches the regular expression {pattern} as a whole.", examples=_matching, pattern=pattern)
def _matches(response: str, pattern: str) -> Found:
    found = matches_whole(pattern, response.strip())
    return found, f"{'matches' if found else 'does not match'} {pattern!r}"


def _counting(rng: random.Random):
    number = rng.randint(1, 4)
    return {"pattern": r"\b[A-Z]{2}-\d{3}\b", "low": number, "high": number}, "so AB-123 " * number, "so AB-123 " * (number + 1)


@constraint(
    "format:pattern_count", "Write {range} parts that match the regular expression {pattern}.", examples=_counting, pattern=pattern,
    low=count, high=count,
)  # fmt: skip
def _pattern_count(response: str, pattern: str, low: int, high: int) -> Found:
    return between(count_matches(pattern, response, high + 1), low, high, f"matches of {pattern!r}")
