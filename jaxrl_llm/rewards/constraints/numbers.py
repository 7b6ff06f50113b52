"""Numbers, their sums and order, units, dates."""

from __future__ import annotations

import datetime
import math
import random
import re

from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.kinds import count, number, positive, word
from jaxrl_llm.rewards.constraints.table import Found, between, compare, constraint

# 12, 1,234.5, -3, .5, 2e10; the digits of a word (B2, 3rd, C-3) are no number, and a version (1.2.3) is none.
_NUMBER = re.compile(
    r"(?<![\w.])(?<![^\W\d]-)[-−+]?(?:\d{1,3}(?:,\d{3}){1,20}(?![\d,])|\d{1,400})?(?:\.\d{1,400})?(?:[eE][-+]?\d{1,4})?(?!\w|\.\d)"
)
_DATE = re.compile(r"(?<![\d-])(\d{4})-(\d{2})-(\d{2})(?![\d-])")


def numbers(response: str) -> list[float]:
    """The numbers of a text in order, thousands separators read; those beyond a float's range are left out."""
    found = [match[0].replace(",", "").replace("−", "-") for match in _NUMBER.finditer(response) if any(map(str.isdigit, match[0]))]
    values = [float(text) for text in found if not text.lower().startswith(("e", "-e", "+e"))]
    return [value for value in values if math.isfinite(value)]


def _shown(found: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in found[:20]) or "none"


def _count_examples(rng: random.Random):
    amount = rng.randint(1, 5)
    good = " and ".join(str(rng.randint(1, 1000)) for _ in range(amount))
    return {"low": amount, "high": amount}, f"Room B2: {good} on the 3rd.", f"Room B2: {good} and 7."


def _count_of(response: str, rng: random.Random):
    amount = len(numbers(response))
    return {"low": amount, "high": amount} if amount else None


@constraint(
    "numbers:count", "Give {range} numbers in digits.", examples=_count_examples, derive=_count_of, low=count, high=count,
)  # fmt: skip
def _count(response: str, low: int, high: int) -> Found:
    return between(len(numbers(response)), low, high, "numbers")


def _value_examples(rng: random.Random):
    value = rng.randint(2, 9999)
    return {"value": value, "tolerance": 0.5}, f"So it is {value:,}.", f"So it is {value + 1} or {value}{value}."


def _value_of(response: str, rng: random.Random):
    found = numbers(response)
    return {"value": rng.choice(found), "tolerance": 0} if found else None


@constraint(
    "numbers:contains", "Name the number {value}, within {tolerance}.", examples=_value_examples, derive=_value_of, value=number, tolerance=number,
)  # fmt: skip
def _contains(response: str, value: float, tolerance: float) -> Found:
    found = numbers(response)
    return any(abs(entry - value) <= tolerance for entry in found), f"the numbers are {_shown(found)}, wanted {value:g}"


def _range_examples(rng: random.Random):
    low = rng.randint(1, 50)
    return {"low": low, "high": low + 10}, f"{low}, {low + 5} and {low + 10.0}", f"{low} and {low + 11}"


def _range_of(response: str, rng: random.Random):
    found = numbers(response)
    return {"low": math.floor(min(found)), "high": math.ceil(max(found))} if found else None


@constraint("numbers:range", "Let every number lie from {low} to {high}.", examples=_range_examples, derive=_range_of, low=number, high=number)
def _range(response: str, low: float, high: float) -> Found:
    found = numbers(response)
    outside = [value for value in found if not low <= value <= high]
    return bool(found) and not outside, f"outside: {_shown(outside)}" if outside else f"{len(found)} numbers from {low:g} to {high:g}"


def _sum_examples(rng: random.Random):
    one, two = rng.randint(1, 99), rng.randint(1, 99)
    return {"total": one + two}, f"{one} and {two}", f"{one} and {two + 1}"


def _sum_of(response: str, rng: random.Random):
    found = numbers(response)
    return {"total": sum(found)} if len(found) > 1 and all(value == int(value) for value in found) else None


@constraint("numbers:sum", "Let all your numbers add up to {total}.", examples=_sum_examples, derive=_sum_of, total=number)
def _sum(response: str, total: float) -> Found:
    found = numbers(response)
    added = sum(found)
    return bool(found) and math.isclose(added, total, rel_tol=1e-9, abs_tol=1e-9), f"the numbers add up to {added:g}, wanted {total:g}"


def _ascending_examples(rng: random.Random):
    found = sorted(rng.sample(range(100), 4))
    return {}, ", ".join(map(str, found)), ", ".join(map(str, [*found[1:], found[0]]))


@constraint(
    "numbers:ascending", "Order your numbers from the smallest to the largest.", examples=_ascending_examples,
    derive=lambda response, rng: {} if len(numbers(response)) > 1 else None,
)  # fmt: skip
def _ascending(response: str) -> Found:
    found = numbers(response)
    return bool(found) and all(one <= two for one, two in zip(found, found[1:], strict=False)), f"the numbers are {_shown(found)}"


def _digit_examples(rng: random.Random):
    return {}, samples.sentence(rng), f"{samples.sentence(rng)} It took {rng.randint(2, 9)} days."


@constraint("numbers:no_digits", "Write no digits.", examples=_digit_examples, derive=lambda response, rng: {})
def _no_digits(response: str) -> Found:
    found = [char for char in response if char.isdigit()]
    return not found, f"{len(found)} digits"


def _unit_examples(rng: random.Random):
    amount, unit = rng.randint(1, 3), rng.choice(("km", "kg", "%", "°C"))
    given = [f"{rng.randint(1, 99)} {unit}" for _ in range(amount)]
    return {"unit": unit, "least": amount}, ", ".join(given), ", ".join([*given[1:], "7 m", f"many {unit}"])


def _unit_of(response: str, rng: random.Random):
    found = re.findall(r"\d ?(km|kg|cm|mm|m|g|%|°C|°F|s|h|ml|l)(?!\w)", response)
    return {"unit": found[0], "least": found.count(found[0])} if found else None


@constraint(
    "numbers:with_unit", "Give at least {least} amounts in {unit}, each a number before its unit.", examples=_unit_examples, derive=_unit_of,
    unit=word, least=positive,
)  # fmt: skip
def _with_unit(response: str, unit: str, least: int) -> Found:
    found = re.findall(rf"\d[ \u00a0\u202f]?{re.escape(unit)}(?!\w)", response)
    return compare(len(found), least, "at least", f"amounts in {unit}")


def dates(response: str) -> int:
    """Days of the calendar written as 2024-02-29."""
    found = 0
    for year, month, day in _DATE.findall(response):
        try:
            datetime.date(int(year), int(month), int(day))
        except ValueError:
            continue
        found += 1
    return found


def _date_examples(rng: random.Random):
    amount = rng.randint(1, 3)
    given = [f"{rng.randint(1900, 2099)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" for _ in range(amount)]
    return {"least": amount}, " ".join(given), " ".join([*given[1:], "2023-02-29", "1/2/2024"])


@constraint(
    "numbers:dates", "Give at least {least} dates, written as YEAR-MONTH-DAY in digits (2024-02-29).", examples=_date_examples,
    derive=lambda response, rng: {"least": dates(response)} if dates(response) else None, least=positive,
)  # fmt: skip
def _dates(response: str, least: int) -> Found:
    return compare(dates(response), least, "at least", "dates")
