"""The part of JSON Schema (2020-12) that constraints and tool specifications use, checked as deep as the schema goes.

A schema with a keyword that is not known here is refused when it is read: a rule that is not checked must not look kept.
"""

from __future__ import annotations

import json
import math
import operator
from typing import Any

from jaxrl_llm.rewards.constraints import patterns
from jaxrl_llm.rewards.constraints.kinds import WrongKind

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_SCHEMAS, _LISTS = ("items", "additionalProperties", "not"), ("anyOf", "allOf", "oneOf")
_NOTES = ("title", "description", "default", "examples", "$schema", "$id", "$comment", "format")
DEEPEST = 16


def schema(value: Any) -> dict:
    """A kind of parameter: a JSON schema, as a mapping or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise WrongKind(f"a JSON schema ({error})") from None
    if not isinstance(value, dict):
        raise WrongKind("a JSON schema")
    problem = _problem(value, 0)
    if problem:
        raise WrongKind(f"a JSON schema ({problem})")
    return value


def _problem(found: Any, depth: int) -> str | None:
    """What is wrong with a schema, None where nothing is."""
    if isinstance(found, bool):
        return None
    if not isinstance(found, dict):
        return f"{found!r} is no schema"
    if depth > DEEPEST:
        return f"deeper than {DEEPEST}"
    for key, value in found.items():
        problem = None
        if key == "type":
            names = value if isinstance(value, list) else [value]
            if not names or any(not isinstance(name, str) or name not in (*TYPES, "number", "integer") for name in names):
                problem = f"type {value!r} is unknown"
        elif key == "properties":
            problem = _first_problem(value.values(), depth) if isinstance(value, dict) else "properties must be a mapping"
        elif key in _SCHEMAS:
            problem = _problem(value, depth + 1)
        elif key in _LISTS:
            problem = _first_problem(value, depth) if isinstance(value, list) and value else f"{key} must be a list of schemas"
        elif key in _NUMBERS or key in _COUNTS:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or (key == "multipleOf" and value <= 0):
                problem = f"{key} must be a number"
        elif key == "required":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                problem = "required must be a list of names"
        elif key == "enum":
            problem = None if isinstance(value, list) and value else "enum must be a list"
        elif key == "pattern":
            try:
                patterns.pattern(value)
            except WrongKind as error:
                problem = f"pattern must be {error}"
        elif key not in ("const", "uniqueItems", *_NOTES):
            problem = f"the keyword {key!r} is not checked here"
        if problem:
            return problem
    return None


def _first_problem(found: Any, depth: int) -> str | None:
    return next((problem for entry in found if (problem := _problem(entry, depth + 1))), None)


def violation(value: Any, found: Any, where: str = "$") -> str | None:
    """The first way in which a JSON value breaks a schema that `schema` accepted, with its place; None where it keeps it."""
    if isinstance(found, bool):
        return None if found else f"{where}: nothing is allowed here"
    for rule in (_wrong_type, _wrong_value, _wrong_number, _wrong_length, _wrong_members, _wrong_items, _wrong_combination):
        problem = rule(value, found, where)
        if problem:
            return problem
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is(value: Any, name: str) -> bool:
    if name == "number":
        return _is_number(value)
    if name == "integer":
        return _is_number(value) and (isinstance(value, int) or (math.isfinite(value) and value == int(value)))
    return isinstance(value, TYPES[name])


def equal(one: Any, two: Any) -> bool:
    """Equality of JSON values: true is not 1, and 1.0 is 1."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def _wrong_type(value: Any, found: dict, where: str) -> str | None:
    names = found.get("type", [])
    names = names if isinstance(names, list) else [names]
    if names and not any(_is(value, name) for name in names):
        return f"{where} is {type(value).__name__}, wanted {' or '.join(names)}"
    return None


def _wrong_value(value: Any, found: dict, where: str) -> str | None:
    if "enum" in found and not any(equal(value, entry) for entry in found["enum"]):
        return f"{where} is none of {str(found['enum'])[:80]}"
    if "const" in found and not equal(value, found["const"]):
        return f"{where} is not {str(found['const'])[:80]}"
    return None


def _wrong_number(value: Any, found: dict, where: str) -> str | None:
    if not _is_number(value):
        return None
    holds = {"minimum": operator.ge, "maximum": operator.le, "exclusiveMinimum": operator.gt, "exclusiveMaximum": operator.lt}
    for name, compare in holds.items():
        if name in found and not compare(value, found[name]):
            return f"{where} is {str(value)[:40]}, {name} {found[name]}"
    if "multipleOf" in found and not _is_multiple(value, found["multipleOf"]):
        return f"{where} is {str(value)[:40]}, no multiple of {found['multipleOf']}"
    return None


def _is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    try:
        return math.isclose(math.remainder(value, step), 0, abs_tol=1e-9 * step)
    except (OverflowError, ValueError):
        return False


def _wrong_length(value: Any, found: dict, where: str) -> str | None:
    kinds = {"Length": str, "Items": list, "Properties": dict}
    for name, kind in kinds.items():
        if isinstance(value, kind):
            if len(value) < found.get(f"min{name}", 0):
                return f"{where} has {len(value)}, min{name} {found[f'min{name}']}"
            if len(value) > found.get(f"max{name}", math.inf):
                return f"{where} has {len(value)}, max{name} {found[f'max{name}']}"
    if isinstance(value, str) and "pattern" in found and not patterns.count_matches(found["pattern"], value, 1):
        return f"{where} does not match {found['pattern']!r}"
    return None


def _wrong_members(value: Any, found: dict, where: str) -> str | None:
    if not isinstance(value, dict):
        return None
    missing = [name for name in found.get("required", []) if name not in value]
    if missing:
        return f"{where} has no {missing[0]!r}"
    known, others = found.get("properties", {}), found.get("additionalProperties", True)
    for name, entry in value.items():
        if name not in known and others is False:
            return f"{where} may not have {name[:80]!r}"
        problem = violation(entry, known.get(name, others), f"{where}.{name[:80]}")
        if problem:
            return problem
    return None


def _wrong_items(value: Any, found: dict, where: str) -> str | None:
    if not isinstance(value, list):
        return None
    for place, entry in enumerate(value if "items" in found else []):
        problem = violation(entry, found["items"], f"{where}[{place}]")
        if problem:
            return problem
    if found.get("uniqueItems"):
        spelt = {json.dumps(entry, sort_keys=True) for entry in value}
        return None if len(spelt) == len(value) else f"{where} holds an entry twice"
    return None


def _wrong_combination(value: Any, found: dict, where: str) -> str | None:
    if "not" in found and violation(value, found["not"], where) is None:
        return f"{where} matches what it must not"
    for name in _LISTS:
        if name in found:
            problems = [violation(value, entry, where) for entry in found[name]]
            kept = problems.count(None)
            if {"anyOf": kept == 0, "allOf": kept < len(problems), "oneOf": kept != 1}[name]:
                return next((problem for problem in problems if problem), f"{where} matches {kept} schemas, wanted one") + f" ({name})"
    return None


def read_json(text: str) -> Any:
    """JSON from a text, or from the one fenced block that it is; raises ValueError with the reason. NaN and Infinity are not JSON."""
    inner = text.strip()
    if inner.startswith("```") and inner.endswith("```") and "\n" in inner:
        inner = inner[inner.index("\n") + 1 : -3]
    try:
        return json.loads(inner, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")
