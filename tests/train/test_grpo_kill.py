"""SIGKILL at random moments: every restart goes on, and the final parameters are those of a run left in peace.

JAXRL_LLM_KILLS=10 kills ten times rather than twice.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).with_name("tiny_grpo.py")
STEPS = "12"


def start(folder, repo):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), STEPS], env=env, cwd=repo, stdout=subprocess.DEVNULL)


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_runs_end_with_the_parameters_of_an_undisturbed_one(repo, tmp_path):
    kills = int(os.environ.get("JAXRL_LLM_KILLS", "2"))
    peace = tmp_path / "peace"
    began = time.monotonic()
    assert start(peace, repo).wait() == 0
    patience = 20 * (time.monotonic() - began) + 60
    killed, rng = tmp_path / "killed", random.Random(kills)
    for _ in range(kills):
        process, before = start(killed, repo), lines(killed)
        deadline = time.monotonic() + patience
        # Most of a start is imports and compilation: wait for progress, then a random moment within the steps.
        while process.poll() is None and lines(killed) <= min(before, int(STEPS) - 2) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(killed, repo).wait() == 0
    np.testing.assert_array_equal(np.load(killed / "final.npy"), np.load(peace / "final.npy"))
