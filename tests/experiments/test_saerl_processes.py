"""The SAERL experiment in processes of its own: shared by two workers, over two hosts, and killed while an arm filters anew.

Each is compared with one run of one process (`alone`). JAXRL_LLM_KILLS=10 kills ten times rather than twice; JAXRL_LLM_KILL_DEMO=10 kills
the demo itself, at its own size (ten minutes or more, so that the suite leaves it out).
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_saerl as tiny

import models
from jaxrl_llm.curation.curated_set import CuratedSet

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"  # what `workers` gives each of its processes: sums are then the same everywhere
QUICK = os.environ["XLA_FLAGS"]  # tests/conftest.py's
CELL = "cells/wrong-base0-seed0"
SAMPLES = {"grpo.num_samples": 8}  # so many that the verdicts of nearly every step differ
CHANGES = {"seeds": [0, 1]} | SAMPLES  # two cells
REFILTERS = (4, 8)  # of 10 steps, with a checkpoint every 3: some starts go on before one, some after


def environment(repo, cache, flags=f"{QUICK} {ONE_THREAD} {ONE_THREAD}"):
    given = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    given |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | given


def start(folder, changes, env, repo, *hold):
    command = [sys.executable, tiny.__file__, str(folder), json.dumps(changes), *map(str, hold)]
    return subprocess.Popen(command, env=env, cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    error = process.communicate(timeout=900)[1]
    assert process.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def alone(repo, tmp_path_factory):
    """(workdir of a run of two cells by one process, environment of further ones that are to compute the same)."""
    root = tmp_path_factory.mktemp("saerl")
    env = environment(repo, root / "cache")
    finish(start(root / "alone", CHANGES, env, repo))
    return root / "alone", env


def records(folder, arm="full"):
    lines = [json.loads(line) for line in (folder / CELL / arm / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_two_workers_leave_the_files_of_a_serial_run(repo, alone, tmp_path):
    """One more flag for the workers, which the parent gives them: together the two of `alone`, so that they find its compiled programs."""
    folder, env = alone
    finish(start(tmp_path / "run", CHANGES | {"workers": 2}, env | {"XLA_FLAGS": f"{QUICK} {ONE_THREAD}"}, repo))
    wanted, found = tiny.contents(folder), tiny.contents(tmp_path / "run")
    pages = [files.pop(name) for files in (wanted, found) for name in ("report.html", "report.json")]
    assert all(pages) and set(found) == set(wanted) and {f"{CELL}/full/policy/model.safetensors", f"{CELL}/signals.npz"} <= set(found)
    assert [name for name in wanted if found[name] != wanted[name]] == []


# --------------------------------------------------------------------------------------------------------- two hosts

TWO = """
import sys; sys.path.insert(0, "tests/experiments")
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import json, pathlib
import tiny_saerl
assert jax.process_count() == 2 and jax.device_count() == 2
tiny_saerl.watch(pathlib.Path(sys.argv[3] + sys.argv[2]) / tiny_saerl.MOMENTS)
tiny_saerl.run(sys.argv[3], **json.loads(sys.argv[4]))
"""


def test_two_processes_of_one_job_run_it_as_one_does(repo, alone, tmp_path):
    folder, env = alone
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    run, changes = tmp_path / "run", json.dumps({"mesh": "fsdp=2"} | SAMPLES)
    command = [sys.executable, "-c", TWO, address]
    processes = [
        subprocess.Popen([*command, str(i), str(run), changes], env=env, cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]

    names = lambda files: {name for name in files if name.startswith((CELL, "policies"))}  # noqa: E731
    wanted, found = tiny.contents(folder), tiny.contents(run)
    assert names(found) == names(wanted) and "report.html" in found
    for name in ("pass_rates-labels.jsonl", "pass_rates-truth.jsonl"):
        assert found[f"{CELL}/{name}"] == wanted[f"{CELL}/{name}"]
    with np.load(folder / CELL / "signals.npz") as one, np.load(run / CELL / "signals.npz") as two:
        for name in one.files:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(two[name], one[name], rtol=0.01, atol=0.01, err_msg=name)  # log-odds from tuned policies among them
            else:
                np.testing.assert_array_equal(two[name], one[name], err_msg=name)
    sets = [CuratedSet.read(place / CELL / "curated") for place in (folder, run)]
    assert sets[0].rows == sets[1].rows and all((getattr(sets[0], name) == getattr(sets[1], name)).all() for name in ("keep", "order", "cluster"))

    # Rounding moves qualities by a thousandth, so that rows at the cut of a later filter may fall to the other side: from then on batches are
    # drawn from other rows. Both processes must keep the same ones, though.
    kept, *of_both = (tiny.kept_by(path / tiny.MOMENTS) for path in (folder, tmp_path / "run0", tmp_path / "run1"))
    for step in range(10):
        np.testing.assert_array_equal(*(of[step] for of in of_both))
        if step < REFILTERS[1]:
            differ = int(np.unpackbits(kept[step] ^ of_both[0][step]).sum())
            assert differ <= (8 if step >= REFILTERS[0] else 0), (step, differ)
    for arm, steps in (("vanilla", 10), ("full", REFILTERS[0])):
        for name in ("rows", "reward", "pass_rate"):
            assert [r[name] for r in records(run, arm)][:steps] == [r[name] for r in records(folder, arm)][:steps], (arm, name)
    ends = [models.load(place / CELL / "vanilla" / "policy")[1] for place in (folder, run)]
    for one, two in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ killed


def moments(folder):
    """What the last start has done so far."""
    path = folder / tiny.MOMENTS
    return path.read_text().splitlines() if path.exists() else []


def kill_in(folder, step, delay, env, repo, patience):
    """Starts the run and kills it `delay` seconds after its schedule was shown the policy of `step`. One that is faster than the run by which
    the delay was drawn waits two steps later, so that it cannot end before it is killed."""
    before, process, deadline = len(moments(folder)), start(folder, CHANGES, env, repo, step + 2), time.monotonic() + patience
    while f"{step} begins" not in moments(folder)[before:] and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, f"the run ended by itself before it was killed in step {step}: {error[-2000:]}"
    assert f"{step} begins" in moments(folder)[before:], f"after {patience:.0f} s the run had not come to step {step}"


def test_an_arm_killed_around_its_refilters_ends_as_an_undisturbed_one(repo, alone, tmp_path):
    """The `full` arm: a band that follows the policy, and a filter made anew from policies tuned on the told rows."""
    kills, (folder, env), killed = int(os.environ.get("JAXRL_LLM_KILLS", "2")), alone, tmp_path / "alone"
    wanted = records(folder)
    kept = tiny.kept_by(folder / tiny.MOMENTS)
    assert len(wanted) == 10 and sum(record["grad_norm"] > 0 for record in wanted) >= 9 and len({record["pass_rate"] for record in wanted}) >= 4
    assert len({kept[step].tobytes() for step in (3, 4, 8)}) == 3, "the filter changes nothing, so its loss would not be seen"

    shutil.copytree(folder, killed)
    shutil.rmtree(killed / CELL / "full")
    (killed / CELL / "rollouts.json").unlink()
    (killed / tiny.MOMENTS).unlink()
    rng, seconds = random.Random(kills), {record["step"] - 1: record["seconds"] for record in wanted}
    steps = sorted(rng.choice((at - 1, at, at, at + 1)) for at, _ in zip(REFILTERS * kills, range(kills), strict=False))
    for step in steps:
        longest = seconds[REFILTERS[-1]] if step in REFILTERS else 3 * seconds[step]
        kill_in(killed, step, rng.random() * longest, env, repo, patience=600)
    finish(start(killed, CHANGES, env, repo))

    lines = moments(killed)
    assert lines.count("start") == kills + 1
    told = [line.split(" keeps ") for line in lines if "keeps" in line]
    assert all(kept[int(step)].tobytes().hex() == rows for step, rows in told)
    wanted, found = tiny.contents(folder), tiny.contents(killed)
    copied = f"{CELL}/sae/cfg.json"  # names the policy in the folder that it was copied from
    assert [name for name in wanted if name.startswith(CELL) and name != copied and found.get(name) != wanted[name]] == []


@pytest.mark.skipif("JAXRL_LLM_KILL_DEMO" not in os.environ, reason="takes ten minutes or more: set JAXRL_LLM_KILL_DEMO to a number of kills")
def test_the_demo_itself_killed_at_random_moments_of_its_training_ends_as_an_undisturbed_one(repo, tmp_path):
    kills, folder, killed = int(os.environ["JAXRL_LLM_KILL_DEMO"]), tmp_path / "alone" / "demo", tmp_path / "killed" / "demo"

    def demo(workdir):
        command = [sys.executable, "-m", "jaxrl_llm", "saerl", "--config=configs/saerl.py:demo", f"--workdir={workdir}"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)}
        return subprocess.Popen(command, env=env, cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def trained(workdir):
        lines = [path.read_bytes().splitlines() for path in (workdir / CELL).glob("*/metrics.jsonl")]
        return sum(b'"kind": "train"' in line for run in lines for line in run)

    finish(demo(folder))
    total, rng, hits = trained(folder), random.Random(kills), 0
    assert total == 480, "two arms of 240 steps"
    for step in sorted(rng.sample(range(total), kills)):
        before, process = trained(killed), demo(killed)
        while trained(killed) <= max(step, before) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        process.stderr.close()
        print(f"killed after {trained(killed)} of {total} steps", flush=True)
    assert hits == kills
    finish(demo(killed))
    wanted, found = tiny.contents(folder), tiny.contents(killed)
    arms = [name for name in wanted if name.startswith(CELL) and name != f"{CELL}/sae/cfg.json"]
    assert any(name.endswith("full/metrics.jsonl") for name in arms) and [name for name in arms if found.get(name) != wanted[name]] == []
