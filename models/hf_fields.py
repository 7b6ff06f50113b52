"""Typed reads of a `config.json`: each knows the family's defaults and says, by name, what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from models.errors import ModelError
from models.families import Family


def is_whole(value) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)  # Python counts True as 1, JSON does not


def are_strings(value) -> bool:
    """Whether a JSON value is a list of texts."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def told_value(value) -> str:
    """A wrong value as an error shows it: as Python writes it, but null, true and false as JSON does."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """Typed reads of a config.json with the family's defaults, each failure naming its field.

    inside: the object of the file that is read ("rope_scaling"), which has no defaults; "" for the file itself.
    Fields go by their usual names here; where the family has others (`Family.names`), those are read and told.
    """

    def __init__(self, hf: Mapping[str, Any], family: Family, inside: str = ""):
        self.hf, self.family = hf, family
        self.inside, self.prefix = inside, f"{inside}." if inside else ""
        self.defaults = {} if inside else family.defaults
        self.names = {} if inside else family.names

    def key(self, name: str) -> str | None:
        """What the file calls `name`: of several names the one that says something; None where the family has no such field."""
        names = self.names.get(name, (name,))
        said = (key for said in (lambda k: self.hf.get(k) is not None, self.hf.__contains__) for key in names if said(key))
        return next(said, names[0] if names else None)

    def told(self, name: str) -> str:
        """The field as an error names it."""
        return self.prefix + (self.key(name) or name)

    def has(self, name: str) -> bool:
        """Whether the file holds `name`, be it null."""
        return self.key(name) in self.hf

    def wrong(self, name: str, wanted: str, value) -> ModelError:
        return ModelError(f"config.json: {self.told(name)} must be {wanted}, not {told_value(value)}")

    def get(self, name: str, default=None):
        """The value of `name`, null included; where absent the family's default, else `default`."""
        return self.hf[self.key(name)] if self.has(name) else self.defaults.get(name, default)

    def integer(self, name: str, derived: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; `derived` where it is null or has no default."""
        value = self.get(name, derived)
        value = derived if value is None else value
        if value is None and not self.has(name):
            raise ModelError(f"config.json: missing field '{self.told(name)}'")
        if value is None or not is_whole(value) or value < least:
            raise self.wrong(name, "a positive integer" if least == 1 else f"an integer of at least {least}", value)
        return value

    def number(self, name: str, default: float | None = None, least: float | None = None) -> float:
        """A finite number above zero, or of at least `least`; `default` where it is absent."""
        value = self.get(name, default)
        if value is None and not self.has(name):
            raise ModelError(f"config.json: missing field '{self.told(name)}'")
        wanted = "a number above 0" if least is None else f"a number of at least {least:g}"
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(name, wanted, value)
        if not (value > 0 if least is None else value >= least):
            raise self.wrong(name, wanted, value)
        return float(value)

    def switch(self, rule: bool | str, default: bool = False) -> bool:
        """true or false; a rule of the family that is no field's name is the answer itself."""
        if isinstance(rule, bool):
            return rule
        value = self.get(rule, default)
        if not isinstance(value, bool):
            raise self.wrong(rule, "true or false", value)
        return value

    def token(self, name: str, vocab_size: int) -> int | None:
        """A token id, or None where it is null or absent."""
        value = self.get(name)
        if value is not None and (not is_whole(value) or not 0 <= value < vocab_size):
            raise self.wrong(name, f"null or a token id (0..{vocab_size - 1}, by vocab_size)", value)
        return value

    def optional_number(self, name: str) -> float | None:
        """A finite number above zero, or None where it is null or absent."""
        return None if self.get(name) is None else self.number(name)

    def nested(self, name: str) -> Fields:
        """The object `name`; one without fields where it is null or absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "null or an object", value)
        return Fields(value or {}, self.family, self.prefix + name)

    def only(self, name: str, value, known):
        """`value` if it is one of `known`; otherwise a ModelError naming the field."""
        if value not in known:
            known = ", ".join(one if isinstance(one, str) else told_value(one) for one in known)
            told = f"{self.told(name)}={told_value(value)} is not supported; known: {known}"
            raise ModelError(f"config.json: {told}")
        return value
