"""Checks that share a process: which code is plain enough for it, and that none of them can change, forge or spend another's verdict."""

import importlib
import types

import pytest

from jaxrl_llm.rewards.sandbox import layers, plain
from jaxrl_llm.rewards.sandbox.pool import MOST_TOGETHER, Job, Limits, Outcome, Sandbox
from tests.rewards import sandbox_attacks_host, sandbox_attacks_limits, sandbox_attacks_verdicts  # noqa: F401
from tests.rewards.sandbox_attacks import ATTACKS

needs_isolation = pytest.mark.skipif(bool(layers.missing()), reason=f"this host lets nobody isolate code: {layers.missing()}")

ASKS = "def check_following(instruction, response):\n    "
PLAIN = {
    "words": f"{ASKS}return 80 <= len(response.split()) <= 100",
    "pattern": f"import re\n{ASKS}return bool(re.search(r'\\bsea\\b', response, flags=re.IGNORECASE))",
    "aliased": "import re as pattern\nfrom collections import Counter\nLEAST = 3\ndef helper(x: str) -> int:\n"
    f"    return Counter(pattern.findall(r'\\w+', x.lower())).most_common(1)[0][1]\n{ASKS}return helper(response) >= LEAST",
    "json": f"import json\n{ASKS}try:\n        found = json.loads(response.strip().strip('`'))\n    except json.JSONDecodeError as error:\n"
    "        return error.pos < 0\n    return set(found.keys()) == {'a', 'b'} and all(v for v in found.values())",
    "sentences": f"import re\n{ASKS}parts = [p.strip() for p in re.split(r'[.!?]+', response) if p.strip()]\n"
    "    longest = max((len(p.split()) for p in parts), default=0)\n"
    "    return f'{longest:d}'.isdigit() and sorted(parts, key=lambda p: -len(p))[0] != ''",
    "state": f"import math\nCOUNT = []\n{ASKS}COUNT.append(response)\n    return len(COUNT) == math.floor(1.5)",
}

# One way each by which code might reach what it shares with others; `re.search`, `len` and the like are what fellow checks use.
TAMPERING = {
    "builtin": "import builtins\nbuiltins.len = lambda _: 100",
    "module's attribute": "import re\nre.search = lambda *_: True",
    "deleted attribute": "import re\ndel re.search",
    "augmented attribute": "import string\nstring.digits += 'a'",
    "loop over an attribute": "import string\nfor string.digits in 'ab': pass",
    "with an attribute": "import string\nwith open('x') as string.digits: pass",
    "setattr": "import re\nsetattr(re, 'search', None)",
    "own dict": "import re\nre.__dict__['search'] = None",
    "vars": "import re\nvars(re)['search'] = None",
    "globals of a function": "import json\njson.loads.__globals__['_default_decoder'] = None",
    "builtins by name": "__builtins__['len'] = None",
    "builtins bound": "def f(__builtins__): pass",
    "a frame": "g = (x for x in [1])\ng.gi_frame.f_back.f_globals.clear()",
    "a frame of an error": "try: 1 / 0\nexcept Exception as e: e.__traceback__.tb_frame.f_back.f_locals.clear()",
    "a frame by a method": "e = Exception()\ne.with_traceback(None)",
    "a module's module": "import json\njson.decoder.scanstring = None",
    "a module's table": "import json\njson.encoder.ESCAPE_DCT.clear()",
    "a module's hidden table": "import re\nre._cache.clear()",
    "another module": "import sys\nsys.modules.clear()",
    "another module's part": "from os import path",
    "a part that is not listed": "from re import functools",
    "everything of a module": "from re import *",
    "a relative module": "from . import runner",
    "the seed": "import random\nrandom.seed(1)",
    "exec": "exec('import os')",
    "eval": "eval('1')",
    "the response as code": "def check_following(instruction, response): return eval(response)",
    "compile": "compile('1', '', 'eval')",
    "import by name": "__import__('os')",
    "getattr": "getattr('', 'join')",
    "type": "type('A', (), {})",
    "a class": "class A: pass",
    "a class of builtins": "class A(str):\n    def __eq__(self, other): return True",
    "object": "object.__subclasses__()",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "format": "'{0.__class__}'.format(1)",
    "format_map": "'{a.__class__}'.format_map({'a': 1})",
    "files": "open('x', 'w')",
    "printing": "print('{\"value\": true}')",
    "a decorator": "@len\ndef f(): pass",
    "a builtin behind a name of its own": "if 0: open = 1\ndef f(): return open('x')",
    "a builtin behind a parameter": "def f(exec): pass\nexec('1')",
    "a builtin behind an import": "def g():\n    import re as eval\ndef f(): return eval('1')",
    "a builtin in other letters": "ｅｖａｌ('1')",
    "an attribute in other letters": "import re\nre.ｓub＿ = 1",
    "asynchronous": "async def f(): pass",
    "a match": "match 1:\n    case str(): pass",
    "a handle on the loop": "def f():\n    yield from g",
    "no Python": "def f(",
    "too deep": "(" * 5000 + ")" * 5000,
    "a null": "x = 1\0",
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_rules_are_made_of_is_plain(name):
    assert plain.is_plain(PLAIN[name])


@pytest.mark.parametrize("name", TAMPERING)
def test_what_reaches_for_others_is_not(name):
    assert not plain.is_plain(TAMPERING[name])


def test_no_attack_of_the_escape_suite_is_plain_but_those_on_its_own_time_memory_and_result():
    own = {"memory_bomb_of_small_objects", "regex_bomb", "number_bomb", "infinite_iterator", "infinite_generator", "huge_result"}
    assert {attack.name for attack in ATTACKS if plain.is_plain(attack.code)} == own | {"return_what_is_no_number"}


def test_each_name_that_plain_code_may_use_is_there_and_no_module_is_reached_by_it():
    for module, names in plain.PARTS_OF.items():
        assert module in plain.MODULES
        for name in names:
            assert not isinstance(getattr(importlib.import_module(module), name), types.ModuleType), (module, name)
    for module in plain.MODULES:  # by any of the attributes, on any of the modules
        found = {name: getattr(importlib.import_module(module), name, None) for name in plain.ATTRIBUTES}
        assert [name for name, value in found.items() if isinstance(value, (types.ModuleType, dict, list, set))] == [], module


# --- in a room ---


@pytest.fixture(scope="module")
def sandbox():
    if layers.missing():
        pytest.skip("this host lets nobody isolate code")
    with Sandbox(workers=1, limits=Limits(wall_s=1.5, cpu_s=1, memory_mb=128)) as made:
        yield made


def jobs(*codes, group=0, args=("", "a sea of words")):
    return [Job(code, "check_following", args, as_bool=True, group=group) for code in codes]


def runs(sandbox, monkeypatch):
    """The units that are sent from now on."""
    sent, send = [], Sandbox._send
    monkeypatch.setattr(Sandbox, "_send", lambda self, room, unit, payload: (sent.append(list(unit)), send(self, room, unit, payload))[1])
    return sent


def test_plain_rules_of_a_group_share_a_process_and_say_what_each_says_alone(sandbox, monkeypatch):
    sent = runs(sandbox, monkeypatch)
    alone = sandbox.run(jobs(*PLAIN.values(), group=None))
    together = sandbox.run(jobs(*PLAIN.values()) + jobs(*PLAIN.values(), group=1, args=("", '{"a": 1, "b": 2}')))
    assert together[: len(PLAIN)] == alone and {outcome.status for outcome in together} == {"value"}
    assert together[len(PLAIN) + list(PLAIN).index("json")].value is True
    assert sent == [[index] for index in range(6)] + [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_a_process_has_at_most_so_many(sandbox, monkeypatch):
    sent = runs(sandbox, monkeypatch)
    sandbox.run(jobs(*[PLAIN["words"]] * (2 * MOST_TOGETHER + 1)))
    assert [len(unit) for unit in sent] == [MOST_TOGETHER, MOST_TOGETHER, 1]


SPEAKS = "def check_following(instruction, response):\n    return False"
GREEDY = "x = []\nfor _ in range(9): x.append('a' * (9 << 20) + str(len(x)))\nx.append(x)\n" + PLAIN["words"].replace("80 <=", "0 <")


@pytest.mark.parametrize("name", [name for name in TAMPERING if name not in ("too deep",)])
def test_a_check_that_reaches_for_others_runs_alone_and_changes_none(sandbox, name):
    code = TAMPERING[name] + "\ndef check_following(instruction, response): return True"
    before, after = sandbox.run(jobs(PLAIN["pattern"], code, SPEAKS, PLAIN["pattern"]))[0::3]
    assert before == after == Outcome("value", True)
    assert sandbox.run(jobs(code, SPEAKS, PLAIN["pattern"]))[1:] == [Outcome("value", False), Outcome("value", True)]


def test_no_attack_on_verdicts_reaches_those_of_its_group(sandbox):
    """Each attack of the suite that forges one, between two honest checks that would say yes and no."""
    forgers = [attack for attack in ATTACKS if hasattr(sandbox_attacks_verdicts, attack.name)]
    batch = [
        job
        for number, attack in enumerate(forgers)
        for job in (*jobs(PLAIN["pattern"], group=number), Job(attack.code, attack.name, [{}], group=number), *jobs(SPEAKS, group=number))
    ]
    outcomes = sandbox.run(batch)
    assert len(forgers) >= 20
    assert [outcome.value for outcome in outcomes[0::3]] == [True] * len(forgers)
    assert [outcome.value for outcome in outcomes[2::3]] == [False] * len(forgers)


def test_what_does_not_end_costs_no_other_its_verdict(sandbox, monkeypatch):
    loop = "def check_following(instruction, response):\n    while True: pass"
    sent = runs(sandbox, monkeypatch)
    outcomes = sandbox.run(jobs(SPEAKS, loop, PLAIN["pattern"]))
    assert [outcome.status for outcome in outcomes] == ["value", "timeout", "value"] and outcomes[2].value is True
    assert sent == [[0, 1, 2], [0], [1], [2]]
    sandbox.run(jobs(SPEAKS, loop, PLAIN["pattern"]))
    assert sent[4:] == [[0, 2], [1]]  # and the next group does not wait for it


@needs_isolation
def test_checks_that_take_too_long_only_together_are_parted_for_good(monkeypatch):
    slow = f"{ASKS}n = 0\n    while n < {{}}:\n        n += 1\n    return True"
    codes = [slow.format(6_000_000 + i) for i in range(MOST_TOGETHER)]  # a fraction of a second of CPU time each
    with Sandbox(workers=1, limits=Limits(wall_s=60.0, cpu_s=1)) as sandbox:
        sent = runs(sandbox, monkeypatch)
        assert [outcome.value for outcome in sandbox.run(jobs(*codes))] == [True] * MOST_TOGETHER
        assert sent == [list(range(MOST_TOGETHER)), *[[i] for i in range(MOST_TOGETHER)]]
        assert [outcome.value for outcome in sandbox.run(jobs(*codes[:2]))] == [True] * 2 and sent[-2:] == [[0], [1]]


def test_what_one_holds_is_gone_before_the_next(sandbox, monkeypatch):
    """Each of these takes most of the memory that one process has."""
    sent = runs(sandbox, monkeypatch)
    assert [outcome.value for outcome in sandbox.run(jobs(GREEDY, GREEDY, GREEDY))] == [True] * 3
    assert sent == [[0, 1, 2]]


def test_memory_that_runs_out_is_each_check_s_own(sandbox):
    hog = "def check_following(instruction, response):\n    return len('a' * (1 << 30))"
    assert [o.status for o in sandbox.run(jobs(SPEAKS, hog, PLAIN["pattern"]))] == ["value", "timeout", "value"]


def test_errors_and_arguments_that_are_not_json_are_each_check_s_own(sandbox):
    fails = "def check_following(instruction, response):\n    return 1 / 0"
    outcomes = sandbox.run([*jobs(SPEAKS, fails), *jobs(SPEAKS, args=({1}, "")), *jobs("import re"), *jobs(SPEAKS)])
    assert [outcome.status for outcome in outcomes] == ["value", "error", "error", "error", "value"]
    assert "ZeroDivisionError: division by zero (line 2)" in outcomes[1].reason and "not JSON" in outcomes[2].reason
    assert "defines no check_following" in outcomes[3].reason
