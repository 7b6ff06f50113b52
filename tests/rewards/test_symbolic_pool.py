"""The child processes of the symbolic comparison: limits, replacement, and what happens when a child cannot live."""

import os
import pathlib
import signal
import time

import pytest

from jaxrl_llm.rewards import symbolic, symbolic_worker
from jaxrl_llm.rewards.symbolic import SymbolicPool

TOWER = ("5", "9^{9^{9^{9}}}")


@pytest.fixture
def make_pool():
    pools = []

    def make(**options):
        pools.append(SymbolicPool(**options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_answers_come_in_order_whatever_the_number_of_children(make_pool):
    pairs = [("x", "x"), ("x", "y"), ("{{", "x"), ("x", "{{"), (r"\sqrt{8}", r"2\sqrt{2}")] * 2
    expected = ["equal", "different", "gold_unparsed", "answer_unparsed", "equal"] * 2
    one, three = make_pool(workers=1), make_pool(workers=3)
    assert one.compare(pairs) == three.compare(pairs) == expected
    assert (len(one._alive), len(three._alive)) == (1, 3)


def test_nothing_is_started_before_it_is_needed(make_pool):
    pool = make_pool()
    assert pool.compare([]) == [] and pool._alive == []


def test_an_overrunning_child_is_killed_and_replaced(make_pool):
    pool = make_pool(workers=1, timeout_s=1.5)
    assert pool.compare([("x", "x")]) == ["equal"]
    first = pool._alive[0].process
    assert pool.compare([TOWER, ("x", "x")]) == ["timeout", "equal"]
    assert first.poll() == -signal.SIGKILL
    assert pool._alive[0].process.pid != first.pid


def test_a_batch_of_overruns_ends_with_the_batch(make_pool):
    pool = make_pool(workers=1, timeout_s=0.4, batch_timeout_s=0.6)
    began = time.monotonic()
    assert pool.compare([TOWER] * 200) == ["timeout"] * 200  # 80 s without the limit on the batch
    assert time.monotonic() - began < 60
    pool.timeout_s = pool.batch_timeout_s = 30.0  # a busy machine may take its time
    assert pool.compare([("x", "x")]) == ["equal"]


def test_memory_is_bounded(make_pool):
    pool = make_pool(workers=1, memory_mb=1500)
    assert pool.compare([("x", "x")]) == ["equal"]
    limits = pathlib.Path(f"/proc/{pool._alive[0].process.pid}/limits")
    if not limits.exists():
        pytest.skip("this system shows no limits of a process")
    line = next(line for line in limits.read_text().splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(1500 << 20)


@pytest.mark.parametrize(
    "error, outcome",
    [(MemoryError(), "exhausted"), (RecursionError(), "exhausted"), (TypeError("no order"), "uncomparable: TypeError")],
)
def test_what_a_comparison_raises_is_an_outcome(error, outcome):
    def compare(gold, answer):
        raise error

    assert symbolic_worker.outcome_of(compare, "x", "y") == outcome


@pytest.mark.parametrize("text, value", [("12", 12), ("0.5", 0.5), (" 3. ", 3.0)])
def test_only_plain_numbers_are_read_from_text(text, value):
    assert symbolic_worker.read_number(text) == value


@pytest.mark.parametrize("text", ["x", "1+1", "__import__('os')", "1e9", ""])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="plain number"):
        symbolic_worker.read_number(text)


def test_a_child_killed_from_outside_is_replaced(make_pool):
    pool = make_pool(workers=1)
    pool.compare([("x", "x")])
    os.kill(pool._alive[0].process.pid, signal.SIGKILL)
    pool._alive[0].process.wait()
    outcomes = pool.compare([("x", "x"), ("y", "y")])
    # The pair that was handed to the dead child may be lost with it, but says so; the next has a new child.
    assert outcomes[0] in ("equal", "error: the comparing process died") and outcomes[1] == "equal"


def test_a_child_that_cannot_start_says_why(make_pool, monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("import nothing_of_that_name\n")
    monkeypatch.setattr(symbolic, "WORKER", broken)
    assert make_pool().compare([("x", "x")] * 3) == ["error: the comparing process does not start"] * 3
    without = tmp_path / "math_verify.py"
    without.write_text("raise ImportError('No module named math_verify')\n")
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "math-verify cannot be imported" in make_pool().compare([("x", "x")])[0]


def test_an_interrupted_call_leaves_no_stale_child(make_pool, monkeypatch):
    pool = make_pool(workers=1, timeout_s=30.0)
    pool.compare([("x", "x")])
    wait = pool._wait

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.compare([("x", "x")])
    monkeypatch.setattr(pool, "_wait", wait)
    assert pool.compare([("x", "y"), ("x", "x")]) == ["different", "equal"]


def test_the_child_ends_when_its_parent_is_gone(run_python):
    code = (
        "from jaxrl_llm.rewards.symbolic import SymbolicPool\n"
        "import os\n"
        "pool = SymbolicPool(workers=1)\n"
        "pool.compare([('x', 'x')])\n"
        "print(pool._alive[0].process.pid, flush=True)\n"
        "os._exit(0)\n"  # no clean-up of any kind
    )
    pid = int(run_python(code))
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the comparing process outlived its parent by 10 s")
