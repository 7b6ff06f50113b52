"""The pool of rooms: what comes back, each limit, order and threads, rooms that end, and the refusal where code cannot be isolated."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.sandbox import layers, pool, syscall_filter
from jaxrl_llm.rewards.sandbox.pool import Job, Limits, Outcome, Sandbox
from jaxrl_llm.rewards.verdict import Status

needs_isolation = pytest.mark.skipif(bool(layers.missing()), reason=f"this host lets nobody isolate code: {layers.missing()}")


@pytest.fixture
def make():
    made = []

    def get(**options):
        limits = {name: options.pop(name) for name in [field.name for field in dataclasses.fields(Limits)] if name in options}
        made.append(Sandbox(**({"workers": 1} | options), limits=Limits(**limits)))
        return made[-1]

    yield get
    for sandbox in made:
        sandbox.close()


def call(sandbox, code, *args, **kwargs):
    return sandbox.run([Job(code, "f", args, kwargs)])[0]


# --- results ---


@needs_isolation
@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "ä\ud800\0", [1, [2, {"a": None}]], {"value": {"error": "x"}}])
def test_arguments_and_results_are_json(make, value):
    assert call(make(), "def f(x, *, y): return [x, y]", value, y=1) == Outcome("value", [value, 1])


@needs_isolation
def test_one_namespace_holds_the_whole_code(make):
    """Two are what makes published runners miss helpers, constants and aliased imports."""
    code = "import re as pattern\nfrom math import pi, floor\nLIMIT = 3\ndef helper(x): return x > LIMIT\ndef f(x): return helper(floor(pi * x))"
    sandbox = make()
    assert call(sandbox, code + "\nassert pattern.match('a', 'a')", 2).value is True
    assert "NameError" in call(sandbox, "def f(): return helper(1)").reason  # nothing stays from the check before
    dataclass = "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n  x: int\ndef f(): return pickle.loads(pickle.dumps(A(3))).x"
    assert call(sandbox, dataclass).value == 3


@needs_isolation
@pytest.mark.parametrize(
    "code, reason",
    [
        ("def f(x):\n  y = 1\n  return 1 / 0", "ZeroDivisionError: division by zero (line 3)"),
        ("def f(", "SyntaxError: "),
        ("def g(x): return x", "NameError: the code defines no f"),
        ("def f(): return 1", "TypeError: f() takes 0 positional arguments but 1 was given"),
        ("f = 3", "TypeError: 'int' object is not callable (line "),
        ("def f(x): return {1, 2}", "TypeError: Object of type set is not JSON serializable"),
        ("raise ValueError('a\\nb' * 1000)", "ValueError: a ba b"),
        ("import os; os._exit(7)", "the process ended without a result (exit code 7)"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(make, code, reason):
    outcome = call(make(), code, 1)
    assert outcome.status == "error" and outcome.reason.startswith(reason.rstrip("(line ")) and "\n" not in outcome.reason
    assert len(outcome.reason) < 400


@needs_isolation
def test_a_caller_s_argument_that_is_not_json_spoils_its_own_job_only(make):
    outcomes = make().run([Job("def f(x): return x", "f", [x]) for x in ({1}, 2, float("nan"), 4)])
    assert [outcome.status for outcome in outcomes] == ["error", "value", "error", "value"]
    assert "arguments are not JSON" in outcomes[0].reason and outcomes[3].value == 4


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"null", b'"value"', b'{"value":', b'{"value": NaN}', b'{"value": -Infinity}', b"\xff", b'{"verdict": true}',
     b'{"value": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"value": ' + b"9" * 100_000 + b"}"],
)  # fmt: skip
def test_a_forged_frame_of_any_kind_is_an_error(body):
    """The frame's content is the code's: the parent reads it as it would read anything from outside."""
    header = {"ended": "sent", "output": "", "cut": False}
    assert pool._read(header, body, Limits()) == Outcome("error", reason="the result is not JSON")


def test_a_reason_of_unknown_origin_is_one_printable_line():
    body = json.dumps({"error": "a\n\x1b[31mb\x07\u2028" + "c" * 1000}).encode()
    reason = pool._read({"ended": "sent", "output": "", "cut": False}, body, Limits()).reason
    assert reason.startswith("a ?[31mb? ccc") and len(reason) == 400


def test_a_check_s_room_that_cannot_be_closed_is_an_error():
    header = {"ended": "failed", "why": "unshare: No space left on device", "output": "", "cut": False}
    assert pool._read(header, b"", Limits()).reason == "the sandbox cannot be closed: unshare: No space left on device"


@needs_isolation
@pytest.mark.parametrize(
    "code, as_bool, status, reason",
    [
        ("def f(): return True", False, Status.PASS, "True"),
        ("def f(): return False", False, Status.FAIL, "False"),
        ("def f(): pass", False, Status.ERROR, "nothing"),
        ("def f(): pass", True, Status.ERROR, "nothing"),
        ("def f(): return 'yes'", False, Status.ERROR, "str"),
        ("def f(): return 'yes'", True, Status.PASS, "True"),
        ("import re\ndef f(): return re.search('a', 'ba')", True, Status.PASS, "True"),
        ("def f(): return []", True, Status.FAIL, "False"),
        ("def f(): 1 / 0", True, Status.ERROR, "ZeroDivisionError"),
        ("import time\ndef f(): time.sleep(60)", True, Status.TIMEOUT, "no result after 1 s"),
    ],
)
def test_verdicts(make, code, as_bool, status, reason):
    verdict = make(wall_s=1.0 if status is Status.TIMEOUT else 60.0).check([Job(code, "f", as_bool=as_bool)])[0]
    assert verdict.status is status and reason in verdict.reason


@needs_isolation
def test_the_same_in_every_room(make):
    code = "import random\ndef f(): return [list({str(i) for i in range(50)}), random.random(), hash('a')]"
    outcomes = make(workers=2).run([Job(code, "f")] * 4)
    assert all(outcome == outcomes[0] for outcome in outcomes)


# --- limits ---

SPIN = "import time\ndef f(s):\n  end = time.process_time() + s\n  while time.process_time() < end: pass\n  return True"
FILES = "def f(n, mb):\n  for i in range(n):\n    open(str(i), 'wb').write(bytes(mb << 20))\n  return True"
FORKS = "import os, time\ndef f(n):\n  for _ in range(n):\n    if os.fork() == 0: time.sleep(60)\n  return True"


@needs_isolation
@pytest.mark.parametrize(
    "limit, small, large, code, args",
    [
        ("wall_s", 0.5, 60.0, "import time\ndef f(): time.sleep(1.5); return True", []),
        ("cpu_s", 1, 30, SPIN, [1.5]),
        ("memory_mb", 128, 512, "def f(): return len(bytearray(200 << 20)) > 0", []),
        ("processes", 2, 4, FORKS, [3]),
        ("file_mb", 1, 8, FILES, [1, 2]),
        ("disk_mb", 2, 16, FILES, [4, 1]),
        ("result_kb", 1, 8, "def f(): return 'x' * 5000", []),
    ],
)
def test_each_limit_holds_and_only_where_it_is_set(make, limit, small, large, code, args):
    generous = {"wall_s": 60.0, "cpu_s": 30}
    assert call(make(**generous | {limit: large}), code, *args).status == "value"
    assert call(make(**generous | {limit: small}), code, *args).status in ("error", "timeout")


@needs_isolation
def test_a_batch_of_overruns_ends_with_the_batch(make):
    sandbox = make(wall_s=30.0, batch_timeout_s=2.0)
    call(sandbox, "def f(): return 0")  # its room is there
    outcomes = sandbox.run([Job("def f(): return 1", "f"), *[Job("import time\ndef f(): time.sleep(60)", "f")] * 50])
    assert outcomes[0].value == 1 and {(o.status, o.reason) for o in outcomes[1:]} == {("timeout", "the batch took its 2 s")}
    assert call(sandbox, "def f(): return 2").value == 2


@needs_isolation
def test_output_is_kept_up_to_its_limit(make):
    code = "import sys\ndef f(n):\n  print('a' * n, end=''); sys.stderr.write('b'); return 1"
    assert call(make(), code, 5).output == "aaaaab"
    assert call(make(output_kb=1), code, 5000).output == "a" * 1024 + "\n[cut]"
    assert call(make(output_kb=8), code, 5000).output == "a" * 5000 + "b"


@pytest.mark.parametrize(
    "limits, told",
    [({"wall_s": 0}, "wall_s is 0"), ({"memory_mb": 10}, "Python needs 64"), ({"cpu_s": 0.5}, "whole number"), ({"processes": -1}, "above 0")],
)
def test_limits_without_a_meaning_are_refused(limits, told):
    with pytest.raises(UserError, match=told):
        Limits(**limits)


@needs_isolation
def test_packages_are_to_be_seen_and_not_to_be_changed(make, tmp_path):
    (tmp_path / "helper_of_the_rows.py").write_text("NUMBER = 7\n")
    tmp_path.chmod(0o755)
    code = "import helper_of_the_rows as h\ndef f():\n  try: open(h.__file__, 'a')\n  except OSError as e: return [h.NUMBER, type(e).__name__]"
    assert call(make(packages=[tmp_path]), code).value in ([7, "OSError"], [7, "PermissionError"])
    assert "ModuleNotFoundError" in call(make(), code).reason
    with pytest.raises(UserError, match="no folder"):
        Sandbox(packages=[tmp_path / "none"])
    if os.geteuid() == 0:
        tmp_path.chmod(0o700)
        with pytest.raises(UserError, match="others than root may not read"):
            Sandbox(packages=[tmp_path])


# --- rooms ---


@needs_isolation
def test_answers_come_in_order_whatever_the_number_of_rooms(make):
    jobs = [Job("import time\ndef f(x): time.sleep(0.02 * (x % 3)); return x", "f", [x]) for x in range(20)]
    one, three = make(workers=1), make(workers=3)
    assert [o.value for o in one.run(jobs)] == [o.value for o in three.run(jobs)] == list(range(20))
    assert (len(one._rooms), len(three._rooms)) == (1, 3)
    assert make().run([]) == []


@needs_isolation
def test_nothing_is_started_before_it_is_needed(make):
    sandbox = make()
    assert sandbox.run([]) == [] and sandbox._rooms == []


@needs_isolation
def test_many_threads_share_the_rooms(make):
    sandbox, found = make(workers=2), {}

    def work(number):
        found[number] = [o.value for o in sandbox.run([Job("def f(x): return x", "f", [[number, i]]) for i in range(10)])]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [[number, i] for i in range(10)] for number in range(5)}
    assert len(sandbox._rooms) == 2 and len(sandbox._idle) == 2


@needs_isolation
def test_a_room_that_was_ended_from_outside_is_replaced(make):
    sandbox = make()
    call(sandbox, "def f(): return 1")
    first = sandbox._rooms[0].process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    outcomes = sandbox.run([Job("def f(): return 1", "f")] * 2)
    # The job that was handed to the dead room may be lost with it, but says so; the next has a new room.
    assert outcomes[0].status in ("value", "error") and outcomes[1].value == 1
    assert sandbox._rooms[0].process.pid != first.pid


@needs_isolation
def test_a_room_that_does_not_answer_is_given_up(make, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.2)
    sandbox = make(wall_s=0.3)
    call(sandbox, "def f(): return 1")
    os.kill(sandbox._rooms[0].process.pid, 0)
    for child in pathlib.Path(f"/proc/{sandbox._rooms[0].process.pid}/task/{sandbox._rooms[0].process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGSTOP)  # the keeper, which this test started
    outcome = call(sandbox, "def f(): return 1")
    assert outcome.status == "timeout" and "no answer" in outcome.reason
    sandbox.limits = Limits()  # a busy machine may take its time
    assert call(sandbox, "def f(): return 2").value == 2


@needs_isolation
def test_closing_ends_what_is_under_way(make):
    sandbox, found = make(wall_s=60.0), []
    thread = threading.Thread(target=lambda: found.append(call(sandbox, "import time\ndef f(): time.sleep(50)")))
    thread.start()
    while not (sandbox._rooms and sandbox._rooms[0].unit == [0]):
        time.sleep(0.02)
    process = sandbox._rooms[0].process
    sandbox.close()
    thread.join()
    assert found[0].status == "error" and process.poll() is not None
    assert call(sandbox, "def f(): return 1").value == 1


@needs_isolation
def test_closing_leaves_no_process(make):
    sandbox = make(workers=2)
    sandbox.run([Job("import time\ndef f(): time.sleep(0.2)", "f")] * 2)
    launchers = [room.process.pid for room in sandbox._rooms]
    keepers = [int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]) for pid in launchers]
    assert len(keepers) == 2
    sandbox.close()
    for _ in range(100):
        if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in launchers + keepers):
            return
        time.sleep(0.1)
    pytest.fail("a room outlived its pool by 10 s")


@needs_isolation
def test_an_interrupted_call_leaves_no_stale_room(make, monkeypatch):
    sandbox = make(wall_s=60.0)
    call(sandbox, "def f(): return 1")

    def interrupt(rooms, end):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(sandbox, "import time\ndef f(): time.sleep(0.2); return 'stale'")
    assert call(sandbox, "def f(): return 'fresh'").value == "fresh"


@needs_isolation
def test_rooms_end_when_their_parent_is_gone(run_python):
    code = (
        "import os\n"
        "from jaxrl_llm.rewards.sandbox.pool import Job, Sandbox\n"
        "sandbox = Sandbox(workers=1)\n"
        "sandbox.run([Job('def f(): return 1', 'f')])\n"
        "print(sandbox._rooms[0].process.pid, flush=True)\n"
        "os._exit(0)\n"  # no clean-up of any kind
    )
    pid = int(run_python(code))
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the room outlived its parent by 10 s")


NO_NETWORK = "import socket\ndef look():\n  try: socket.socket()\n  except PermissionError: return 'refused'"


@needs_isolation
@pytest.mark.parametrize("isolated, code, value", [(True, pool.SELF_TEST, pool.SELF_TEST_RESULT), (False, NO_NETWORK, "refused")])
def test_an_ordinary_user_may_use_it_too(repo, isolated, code, value):
    """The room as another user than root makes it, asked by hand."""
    if os.getuid() != 0 or not pathlib.Path("/usr/bin/python3").exists():
        pytest.skip("the other tests ran as an ordinary user already, or there is no Python that one could run")
    program = (
        "import json, struct, subprocess, sys\n"
        "worker, options, code, limits = sys.argv[1:]\n"
        "room = subprocess.Popen([sys.executable, '-S', '-s', '-P', '-B', worker, options], stdin=-1, stdout=-1, env={})\n"
        "def reply():\n"
        "  header, body = struct.unpack('>II', room.stdout.read(8))\n"
        "  return json.loads(room.stdout.read(header)), room.stdout.read(body)\n"
        "assert reply()[0] == {'ready': True}\n"
        "body = json.dumps({'code': code, 'function': 'look', 'args': [], 'kwargs': {}, 'as_bool': False})\n"
        "room.stdin.write(struct.pack('>II', len(limits), len(body)) + limits.encode() + body.encode())\n"
        "room.stdin.flush()\n"
        "print(reply()[1].decode())\n"
    )
    worker = repo / "jaxrl_llm" / "rewards" / "sandbox" / "worker.py"
    options = json.dumps({"isolated": isolated, "packages": [], "preload": ["socket", "ctypes"]})
    command = ["/usr/bin/python3", "-c", program, str(worker), options, code, json.dumps(dataclasses.asdict(Limits()))]
    done = subprocess.run(command, user=12345, group=12345, extra_groups=[], capture_output=True, text=True, cwd="/", timeout=120, env={})
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert json.loads(done.stdout) == {"value": value}, done.stderr


# --- refusal ---


@pytest.mark.parametrize("layer", layers.NEEDED)
def test_a_missing_layer_is_a_refusal_that_names_it(monkeypatch, layer):
    found = dict.fromkeys([*layers.NEEDED, *layers.EXTRA], "") | {layer: "unshare: Operation not permitted"}
    monkeypatch.setattr(layers, "probe", lambda: found)
    with pytest.raises(UserError, match=f"cannot isolate code on this host .{layer}: unshare.*isolation='weak-i-accept-the-risk'"):
        Sandbox()
    assert Sandbox(isolation=layers.WEAK).isolated is False  # nothing is started yet


def test_a_layer_that_is_only_a_second_lock_may_be_missing(monkeypatch):
    monkeypatch.setattr(layers, "probe", lambda: dict.fromkeys(layers.NEEDED, "") | {"landlock": "the kernel has none"})
    assert Sandbox().isolated is True


@pytest.mark.parametrize("isolation", ["none", "weak", "", "Full"])
def test_an_isolation_of_another_name_is_refused(isolation):
    with pytest.raises(UserError, match="unknown isolation"):
        Sandbox(isolation=isolation)


@needs_isolation
def test_a_room_that_is_not_closed_gets_no_job(make, monkeypatch):
    monkeypatch.setattr(pool, "SELF_TEST_RESULT", [1, 0, True, 1, []])
    sandbox = make()
    with pytest.raises(UserError, match="the room is not closed"):
        call(sandbox, "def f(): return 1")
    assert sandbox._rooms == [] and sandbox._starting == 0


@needs_isolation
def test_a_room_that_cannot_be_made_says_why(make, monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    lines = ["import sys, struct", "t = b'{\"fatal\": \"mount tmpfs: refused\"}'", "sys.stdout.buffer.write(struct.pack('>II', len(t), 0) + t)"]
    worker.write_text("\n".join(lines))
    monkeypatch.setattr("jaxrl_llm.rewards.sandbox.room.WORKER", worker)
    with pytest.raises(UserError, match="mount tmpfs: refused"):
        call(make(), "def f(): return 1")


def test_a_host_that_is_not_linux_has_no_layer(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert set(layers.probe.__wrapped__()) == {*layers.NEEDED, *layers.EXTRA} and "darwin has none" in layers.probe.__wrapped__()["seccomp"]


# --- without isolation, by name ---


def test_what_is_left_without_isolation(make, monkeypatch):
    """Time, memory and files are limited still, and what the host allows anyway is used: here the filter."""
    monkeypatch.setattr(layers, "probe", lambda: dict.fromkeys(layers.NEEDED, "not here"))
    sandbox = make(isolation=layers.WEAK, wall_s=1.5, cpu_s=1, memory_mb=256)
    folder = call(sandbox, "import os\ndef f():\n  open('x', 'w').write('y'); return os.getcwd()").value
    assert "check-" in folder and not os.path.exists(folder)
    assert call(sandbox, "import os\ndef f(): return dict(os.environ).get('PATH')").value is None
    assert call(sandbox, "import time\ndef f(): time.sleep(60)").status == "timeout"
    assert call(sandbox, "def f():\n  while True: pass").status == "timeout"
    assert call(sandbox, "def f(): return 1").value == 1
    if sys.platform == "linux":
        assert call(sandbox, "def f(): return len(bytearray(1 << 30))").status == "timeout"
    if sys.platform == "linux" and syscall_filter.supported():
        assert "PermissionError" in call(sandbox, "import socket\ndef f(): socket.socket()").reason
        assert "PermissionError" in call(sandbox, "import os\ndef f(): os.fork()").reason


def test_isolation_is_what_makes_the_difference(make, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("here")
    code = "def f(path): return open(path).read()"
    assert call(make(isolation=layers.WEAK), code, str(canary)).value == "here"
    if not layers.missing():
        assert "FileNotFoundError" in call(make(), code, str(canary)).reason
