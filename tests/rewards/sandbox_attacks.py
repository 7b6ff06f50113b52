"""Attacks on the sandbox, each a function that gets the facts of the host and returns True where it got through.

`ends` is the pattern of how the attack must end inside, "status: reason or value". `outside` says that the attack is harmless and must
succeed in an ordinary process of this host: so an attack that fails inside because it is badly written would be noticed.
`processes` is the limit that it runs under. Only the source of a function is used, so each imports what it needs.
"""

import dataclasses
import inspect
from collections.abc import Callable

REFUSED = r"error: (PermissionError|FileNotFoundError|OSError|ProcessLookupError|ModuleNotFoundError)|value: False"


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    code: str
    ends: str
    outside: bool
    processes: int


ATTACKS: list[Attack] = []


def attack(ends: str = REFUSED, outside: bool = False, processes: int = 1) -> Callable:
    def add(function):
        lines = inspect.getsource(function).splitlines(keepends=True)
        code = "".join(line for line in lines if not line.startswith("@attack"))
        ATTACKS.append(Attack(function.__name__, code, ends, outside, processes))
        return function

    return add
