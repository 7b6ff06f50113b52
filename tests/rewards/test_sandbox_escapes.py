"""What code in the sandbox tries in order to get out, to outlive its check or to forge a verdict: nothing of it succeeds."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxrl_llm.rewards.sandbox import layers
from jaxrl_llm.rewards.sandbox.pool import Job, Limits, Sandbox
from tests.rewards import sandbox_attacks_host, sandbox_attacks_limits, sandbox_attacks_verdicts
from tests.rewards.sandbox_attacks import ATTACKS

SECRET = "the secret of this host"
LIMITS = {"wall_s": 1.5, "cpu_s": 1, "memory_mb": 128}

if layers.missing():
    pytest.skip(f"this host lets nobody isolate code: {layers.missing()}", allow_module_level=True)


class Listener:
    """Sockets that count who connects."""

    def __init__(self, folder):
        self.count = 0
        self.unix, self.abstract = str(folder / "socket"), f"jaxrl-{os.getpid()}-{id(self)}"
        self.sockets = [socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        for server, address in zip(self.sockets, (("127.0.0.1", 0), self.unix, "\0" + self.abstract)):
            server.bind(address)
            server.listen()
            threading.Thread(target=self.serve, args=(server,), daemon=True).start()
        self.port = self.sockets[0].getsockname()[1]

    def serve(self, server):
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return
            self.count += 1

    def close(self):
        for server in self.sockets:
            server.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory, repo):
    """Things of the host that an attack would like to reach, and what the attacks are told about them."""
    folder = tmp_path_factory.mktemp("host")
    canary = folder / "canary.txt"
    canary.write_text(SECRET)
    listener = Listener(folder)
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
    yield {
        "listener": listener,
        "process": victim,
        "facts": {
            "canary": str(canary),
            "secret": SECRET,
            "port": listener.port,
            "unix": listener.unix,
            "abstract": listener.abstract,
            "repo": str(repo),
            "home": os.path.expanduser("~"),
            "library": os.path.dirname(os.__file__),
            "pid": os.getpid(),
            "victim": victim.pid,
        },
    }
    victim.kill()
    victim.wait()
    listener.close()


@pytest.fixture(scope="module")
def sandboxes():
    """One room for each limit on processes, used by all attacks in turn."""
    made = {}

    def get(processes):
        if processes not in made:
            os.environ["JAXRL_LLM_TEST_SECRET"] = SECRET
            made[processes] = Sandbox(workers=1, limits=Limits(**LIMITS, processes=processes))
            made[processes].run([Job("def f(x):\n  print(x)\n  return x", "f", ["the data of the row before"])] * 3)
            del os.environ["JAXRL_LLM_TEST_SECRET"]
        return made[processes]

    yield get
    for sandbox in made.values():
        sandbox.close()


def descendants(pid):
    """All processes below `pid`, as this host sees them."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(child)]
    return found


def left_of(room):
    """Processes of a room below its launcher; the supervisor ends a moment after its reply."""
    for _ in range(100):
        if (count := len(descendants(room.process.pid))) == 1:
            break
        time.sleep(0.1)
    return count


def told(outcome):
    return f"{outcome.status}: {outcome.reason or repr(outcome.value)}"


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_fails(attack, host, sandboxes):
    sandbox, before = sandboxes(attack.processes), host["listener"].count
    # What neither limit of time is to end may take its time on a busy machine: it ends by itself, or by what it fills.
    overruns = re.search("no result|used up|timeout$", attack.ends) is not None
    patient = {} if overruns else {"wall_s": 30.0, "cpu_s": 30}
    sandbox.limits = dataclasses.replace(sandbox.limits, **{name: LIMITS[name] for name in ("wall_s", "cpu_s")} | patient)
    outcome = sandbox.run([Job(attack.code, attack.name, [host["facts"]])])[0]
    assert re.match(attack.ends, told(outcome)), told(outcome)
    assert SECRET not in outcome.output
    assert len(outcome.output) <= sandbox.limits.output_kb * 1024 + 10
    # Nothing of the host has changed, and of the check nothing is left: the room is its launcher and its keeper.
    assert host["process"].poll() is None and host["listener"].count == before
    assert pathlib.Path(host["facts"]["canary"]).read_text() == SECRET and not os.path.exists(host["facts"]["canary"] + ".hard")
    assert not os.path.exists("/dev/shm/sandboxattack") and not os.path.exists("/dev/mqueue/sandboxattack")
    assert [left_of(room) for room in sandbox._rooms] == [1]
    # The room is as good as before.
    assert sandbox.run([Job("import os\ndef f(): return os.listdir('.') + os.listdir('/tmp')", "f")])[0].value == []


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.outside], ids=lambda attack: attack.name)
def test_the_attack_is_one(attack, host, tmp_path):
    """In an ordinary process it succeeds."""
    code = f"import json, sys\n{attack.code}\nassert {attack.name}(json.loads(sys.argv[1])) is True\n"
    environment = {**os.environ, "JAXRL_LLM_TEST_SECRET": SECRET}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(host["facts"])], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_enough():
    files = (sandbox_attacks_host, sandbox_attacks_limits, sandbox_attacks_verdicts)
    assert all(any(hasattr(file, attack.name) for file in files) for attack in ATTACKS)
    assert len(ATTACKS) >= 40 and len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert sum(attack.outside for attack in ATTACKS) >= 20


def test_the_search_through_memory_finds_what_is_there(host, sandboxes):
    attack = next(attack for attack in ATTACKS if attack.name == "find_another_s_data_in_memory")
    planted = host["facts"] | {"planted": ["the data of the row before"]}
    assert sandboxes(1).run([Job(attack.code, attack.name, [planted])])[0].value is True


SCAN = r"""
import ctypes, os, re
def f(own):
    # All that is mapped around what this process can name, read through a pipe: where nothing is mapped the kernel says so and nothing breaks.
    kernel, found, seen = ctypes.CDLL(None, use_errno=True), set(), set()
    kernel.sbrk.restype, kernel.write.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    read, write = os.pipe()
    for near in (kernel.sbrk(0) - 1, id(own), id(re), id(bytearray(100_000)), ctypes.addressof(ctypes.create_string_buffer(1 << 19))):
        for step in (4096, -4096):
            page = near & ~4095
            while page not in seen and kernel.write(write, page, 4096) == 4096:
                seen.add(page)
                found.update(re.findall(rb"PLANTED-[0-9]{6}", os.read(read, 4096)))
                page += step
            if step > 0:
                seen.discard(near & ~4095)
    return [sorted(text.decode() for text in found), len(seen)]
"""


def test_no_byte_of_another_check_lies_in_memory():
    """Neither of what it was given, nor of what it returned or printed, in what is allocated or in what is free."""
    plant = Job("def f(x):\n  print(x)\n  return x * 3000", "f", ["PLANTED-123456"])
    with Sandbox(workers=1) as sandbox:
        sandbox.run([plant, Job("def f(x): raise ValueError(x)", "f", ["PLANTED-234567"]), plant])
        found, pages = sandbox.run([Job(SCAN, "f", ["PLANTED-345678"])])[0].value
    assert found == ["PLANTED-345678"] and pages > 500  # its own it finds


POLLUTION = """
import builtins, json, os, re, sys, signal, random, decimal, tempfile
def f(x):
    builtins.abs = lambda _: 99
    builtins.__import__ = None
    json.loads = json.dumps = lambda *_: "true"
    re.match = re.search = lambda *_: True
    os.environ["LEFT"] = "yes"
    sys.path.insert(0, "/box")
    for folder in ("/box", "/tmp"):
        for name in ("sitecustomize.py", "usercustomize.py", "left.pth", "json.py", "left.txt"):
            with open(f"{folder}/{name}", "w") as file:
                file.write("raise SystemExit")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    decimal.getcontext().prec = 1
    random.seed(x)
    os.umask(0)
    sys.modules["left"] = sys
    return True
"""
LOOK = """
import json, os, re, sys, random, decimal
def f():
    mask = os.umask(0)
    return [abs(-1), json.dumps([1]), re.match("a", "b") is None, sorted(os.environ), os.listdir("/box"), os.getcwd(), mask,
            "left" in sys.modules, "/box" in sys.path, decimal.getcontext().prec, random.random()]
"""


def test_no_check_changes_what_another_sees():
    with Sandbox(workers=1) as sandbox:
        before = sandbox.run([Job(LOOK, "f")])[0].value
        polluted = sandbox.run([Job(POLLUTION, "f", [7]), Job(LOOK, "f")])
        assert polluted[0].value is True and polluted[1].value == before
        assert before[:3] == [1, "[1]", True] and before[4:10] == [[], "/box", 0o077, False, False, 28]


def test_checks_at_the_same_time_do_not_see_each_other():
    code = """
import os, time
def f(number):
    open(f"{number}", "w").close()
    time.sleep(0.3)
    return sorted(os.listdir("/box"))
"""
    with Sandbox(workers=2) as sandbox:
        assert [outcome.value for outcome in sandbox.run([Job(code, "f", [i]) for i in range(4)])] == [["0"], ["1"], ["2"], ["3"]]


def test_code_that_finds_the_pipe_s_number_speaks_for_itself_alone():
    """One interpreter has no secrets from the code in it: what it can forge is the answer of its own function, which was its to give."""
    forge = """
import json, os, sys
def f():
    frame = sys._getframe()
    while "nonce" not in frame.f_locals:
        frame = frame.f_back
    answer = b'{"value": "forged"}'
    os.write(3, frame.f_locals["nonce"] + len(answer).to_bytes(4, "big") + answer * 3)
    return "honest"
"""
    honest = Job("def f(): return 'honest'", "f")
    with Sandbox(workers=1) as sandbox:
        values = [outcome.value for outcome in sandbox.run([honest, Job(forge, "f"), honest, honest])]
    assert values[0] == values[2] == values[3] == "honest" and values[1] == "forged"
