"""Calls of tools in a response: their format, names, order, number and arguments.

Three ways of writing a call are read: <tool_call>{"name": ..., "arguments": {...}}</tool_call>; a response (or fenced block) that is such a
JSON object or a list of them; and {"tool_calls": [{"function": {"name": ..., "arguments": "JSON text"}}]}.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.json_schema import equal, read_json, schema, violation
from jaxrl_llm.rewards.constraints.kinds import LONGEST_LIST, WrongKind, count, text, texts
from jaxrl_llm.rewards.constraints.markdown import split_code
from jaxrl_llm.rewards.constraints.structured import tagged
from jaxrl_llm.rewards.constraints.table import Found, between, constraint, listed

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call: the tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def read_calls(response: str) -> tuple[list[Call], str | None]:
    """The calls of a response, in order, and what is wrong with the first that is malformed (None where none is)."""
    if OPEN in response or CLOSE in response:
        parts = tagged(response, "tool_call")
        if response.count(OPEN) != len(parts) or response.count(CLOSE) != len(parts):
            return [], f"{OPEN} and {CLOSE} do not pair"
        values: list[Any] = []
        for part in parts:
            try:
                values.append(read_json(part))
            except ValueError as error:
                return [], f"a call is not JSON: {error}"
        return _as_calls(values)
    for part in (response, *(block.text for block in split_code(response)[1])):
        try:
            value = read_json(part)
        except ValueError:
            continue
        entries = value.get("tool_calls", value) if isinstance(value, dict) else value
        entries = entries if isinstance(entries, list) else [entries]
        if entries and all(isinstance(entry, dict) and ("function" in entry or "name" in entry) for entry in entries):
            return _as_calls(entries)
    return [], None


def _as_calls(values: list[Any]) -> tuple[list[Call], str | None]:
    calls = []
    for value in values:
        entry = value.get("function", value) if isinstance(value, dict) else value
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
            return [], "a call has no name"
        arguments = entry.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = read_json(arguments)
            except ValueError as error:
                return [], f"the arguments of {entry['name'][:80]} are not JSON: {error}"
        if not isinstance(arguments, dict):
            return [], f"the arguments of {entry['name'][:80]} are no object"
        calls.append(Call(entry["name"], arguments))
    return calls, None


def object_of(value: Any) -> dict:
    """A kind of parameter: a mapping, or JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise WrongKind("a mapping from names to values")
    return value


def _call(name: str, **arguments: Any) -> str:
    return f"{OPEN}{json.dumps({'name': name, 'arguments': arguments})}{CLOSE}"


def _names(response: str) -> list[str]:
    return [call.name for call in read_calls(response)[0] if call.name.strip()][:LONGEST_LIST]


def _called(response: str) -> tuple[list[Call], Found | None]:
    """The calls, and the verdict where one of them is malformed."""
    calls, problem = read_calls(response)
    return calls, (False, problem) if problem else None


def _call_examples(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    bad = rng.choice((_call(f"get_{two}", x=1), f'{OPEN}{{"name": "get_{one}", "arguments": {{x: 1}}}}{CLOSE}', f"I call get_{one}(x=1)."))
    return {"tool": f"get_{one}"}, f"Let me see. {_call(f'get_{one}', x=1)}", bad


@constraint(
    "tools:calls", 'Call the tool "{tool}".', examples=_call_examples,
    derive=lambda response, rng: {"tool": rng.choice(found)} if (found := _names(response)) else None, tool=text,
)  # fmt: skip
def _calls(response: str, tool: str) -> Found:
    calls, problem = _called(response)
    return problem or (any(call.name == tool for call in calls), f"called: {[call.name[:80] for call in calls[:20]]}")


def _only_examples(rng: random.Random):
    one, two, three = samples.nouns(rng, 3)
    return {"tools": [one, two]}, _call(two) + _call(one), _call(one) + _call(three)


@constraint(
    "tools:only", lambda tools: f"Call no tool but {listed(tools)}.", examples=_only_examples,
    derive=lambda response, rng: {"tools": list(dict.fromkeys(found))} if (found := _names(response)) else None, tools=texts,
)  # fmt: skip
def _only(response: str, tools: list[str]) -> Found:
    calls, problem = _called(response)
    others = [call.name[:80] for call in calls if call.name not in tools]
    return problem or (not others, f"other tools: {others[:20]}" if others else f"{len(calls)} calls")


def _order_examples(rng: random.Random):
    one, two, three = samples.nouns(rng, 3)
    return {"tools": [one, two]}, _call(one) + _call(three) + _call(two), _call(two) + _call(one)


@constraint(
    "tools:order", lambda tools: f"Call the tools {listed(tools)}, in this order.", examples=_order_examples,
    derive=lambda response, rng: {"tools": found} if len(found := _names(response)) > 1 else None, tools=texts,
)  # fmt: skip
def _order(response: str, tools: list[str]) -> Found:
    calls, problem = _called(response)
    found = iter([call.name for call in calls])
    missing = next((tool for tool in tools if tool not in found), None)
    return problem or (missing is None, "all called in order" if missing is None else f"{missing!r} is not called in its place")


def _number_examples(rng: random.Random):
    number = rng.randint(1, 3)
    return {"low": number, "high": number}, _call("look", x=1) * number, _call("look", x=1) * (number + 1)


@constraint(
    "tools:count", "Make {range} tool calls.", examples=_number_examples,
    derive=lambda response, rng: {"low": len(found), "high": len(found)} if (found := _names(response)) else None, low=count, high=count,
)  # fmt: skip
def _count(response: str, low: int, high: int) -> Found:
    calls, problem = _called(response)
    return problem or between(len(calls), low, high, "tool calls")


def _schema_examples(rng: random.Random):
    wanted = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
    listed_call = {"tool_calls": [{"function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}]}
    good = rng.choice((_call("weather", city="Oslo", days=2), json.dumps(listed_call)))
    bad = rng.choice((_call("weather", days=2), _call("weather", city="Oslo", days="2"), _call("look")))
    return {"tool": "weather", "schema": wanted}, good, bad


@constraint(
    "tools:schema", lambda tool, schema: f'Call the tool "{tool}", each time with arguments that keep this schema: {json.dumps(schema)}',
    examples=_schema_examples, tool=text, schema=schema,
)  # fmt: skip
def _schema(response: str, tool: str, schema: dict) -> Found:
    calls, problem = _called(response)
    if problem:
        return problem
    found = [call.arguments for call in calls if call.name == tool]
    wrong = next((broken for arguments in found if (broken := violation(arguments, schema))), None)
    return bool(found) and wrong is None, wrong or (f"{len(found)} calls of {tool!r}")


def _argument_examples(rng: random.Random):
    city = rng.choice(("Oslo", "Rome"))
    return {"tool": "weather", "arguments": {"city": city}}, _call("weather", city=city, days=1), _call("weather", city=city + "!", days=1)


def _arguments_of(response: str, rng: random.Random):
    calls = read_calls(response)[0]
    return {"tool": calls[0].name, "arguments": calls[0].arguments} if calls and calls[0].name.strip() else None


@constraint(
    "tools:arguments", lambda tool, arguments: f'Call the tool "{tool}" with (at least) these arguments: {json.dumps(arguments, ensure_ascii=False)}',
    examples=_argument_examples, derive=_arguments_of, tool=text, arguments=object_of,
)  # fmt: skip
def _arguments(response: str, tool: str, arguments: dict) -> Found:
    calls, problem = _called(response)
    if problem:
        return problem
    given = [call.arguments for call in calls if call.name == tool]
    found = any(all(key in entry and equal(entry[key], value) for key, value in arguments.items()) for entry in given)
    return found, f"{len(given)} calls of {tool!r}, {'one' if found else 'none'} with these arguments"


def _no_call_examples(rng: random.Random):
    return {}, samples.sentence(rng), samples.sentence(rng) + _call("look")


@constraint("tools:none", "Call no tool.", examples=_no_call_examples, derive=lambda response, rng: {})
def _none(response: str) -> Found:
    calls, problem = _called(response)
    return problem or (not calls, f"{len(calls)} tool calls")
