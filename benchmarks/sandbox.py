"""How many checks a second the sandbox runs, each in a fresh and closed process.

    python -m benchmarks.sandbox [--record]

`sandbox_checks` runs small checks (a word count and a search in a text of 300 words) in two rooms; its peer is a fresh Python for each
check, two at a time, which has the process and none of the walls. `sandbox_start` is what the first check of a pool waits.
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Iterable

from benchmarks.common import Figure, median, progress, run_benchmark
from jaxrl_llm.rewards.sandbox.pool import Job, Sandbox

CHECKS, PEER_CHECKS, WORKERS = 400, 60, 2
CODE = """
import re
def check_following(instruction, response):
    return len(response.split()) >= 100 and re.search(r"\\bsea\\b", response) is not None
"""
RESPONSE = "the ship went out to sea and came back " * 34


def seconds_of_pool(sandbox: Sandbox) -> float:
    """Wall seconds of CHECKS small checks."""
    jobs = [Job(CODE, "check_following", ("Write about a ship.", f"{RESPONSE} {i}")) for i in range(CHECKS)]
    begin = time.perf_counter()
    outcomes = sandbox.run(jobs)
    seconds = time.perf_counter() - begin
    if any(outcome.value is not True for outcome in outcomes):
        sys.exit(f"a check failed: {next(outcome for outcome in outcomes if outcome.value is not True)}")
    return seconds


def seconds_of_fresh_pythons() -> float:
    """Wall seconds of PEER_CHECKS, each in a Python started for it."""
    program = f"import json, sys\n{CODE}\nprint(json.dumps(check_following(*json.load(sys.stdin))))"
    request = json.dumps(["Write about a ship.", RESPONSE])

    def one(_: int) -> str:
        return subprocess.run([sys.executable, "-I", "-S", "-c", program], input=request, capture_output=True, text=True, check=True).stdout

    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as threads:
        answers = list(threads.map(one, range(PEER_CHECKS)))
    if any(answer.strip() != "true" for answer in answers):
        sys.exit("a check of the peer failed")
    return time.perf_counter() - begin


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """The start of a pool, then checks in it and beside it, in turn."""
    starts, ours, peers = [], [], []
    for number in range(args.repeats):
        progress(f"round {number + 1} of {args.repeats}")
        begin = time.perf_counter()
        with Sandbox(workers=WORKERS) as sandbox:
            sandbox.run([Job(CODE, "check_following", ("", ""))])
            starts.append(time.perf_counter() - begin)
            ours.append(seconds_of_pool(sandbox))
        peers.append(seconds_of_fresh_pythons())
    rate, peer_rate = CHECKS / median(ours), PEER_CHECKS / median(peers)
    shape = f"{CHECKS} checks of 300 words, {WORKERS} rooms on 2 cores; goal at least 100"
    yield Figure("sandbox_checks", rate, "checks/s", "a fresh Python a check, no walls", peer_rate, shape=shape)
    yield Figure("sandbox_start", median(starts), "s", shape="the first check of a pool, with its room", better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
