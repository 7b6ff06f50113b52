"""Multi-controller JAX on localhost: two processes of one device each train one policy, and one of them writes; one that dies ends the other."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_folder
import tiny_grpo as tiny
import tiny_preferences as prefs
from test_verbs_killed import TIMES, VERBS

START = """
import sys; sys.path.insert(0, "tests/train")
import jax
address, number, root, processes = *sys.argv[1:4], int(sys.argv[4])
if processes > 1:
    jax.distributed.initialize(address, processes, int(number))
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny, tiny_preferences as prefs, test_train_sft as sft
from jaxrl_llm.rewards.verdict import Status, Verdict
assert jax.process_count() == processes and jax.device_count() == 2
def reward(inputs):
    # What one process says differs from what the other would say: both must train on the gathered verdicts.
    assert processes == 1 or len(inputs) in (8, 4, 3)
    half = -(-len(inputs) // 2)  # as they share them
    said = [int(number) if processes > 1 else int(i >= half) for i in range(len(inputs))]
    return [v if v.status is Status.PASS else Verdict(Status.FAIL, score=0.1 * n) for v, n in zip(tiny.reward(inputs), said)]
mesh = models.sharding.make_mesh({"fsdp": 2})
def placed(params, config):
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]),
        params, models.sharding.param_shardings(config, mesh),
    )
"""
END = """
whole = jax.jit(lambda t: t, out_shardings=models.sharding.replicated(mesh))(trained)
np.save(folder + f"/final_{number}.npy", tiny.flat(whole))
"""
GRPO = """
config = dataclasses.replace(tiny.TINY, steps=2)
start = placed(tiny.params(), tiny.CONFIG)
trained, _ = tiny.run(folder, config, reward=reward, mesh=mesh, start=start, evals={"held_out": tiny.prompts(7)})
"""
SFT = """
config = dataclasses.replace(sft.QUICK, steps=2, micro_batch_rows=4)
start, run_dir = placed(tiny.params(), tiny.CONFIG), sft.RunDir(folder, {"name": "sft"}, kind="sft")
trained, _ = sft.train_sft(tiny.CONFIG, start, sft.data(), config, run_dir, mesh=mesh, progress=False)
"""
DPO = """
for steps in (1, 2):  # the second goes on from the first one's checkpoint, in which the reference's figures are
    config = dataclasses.replace(prefs.QUICK, steps=steps, loss=prefs.LOSSES["kto"], micro_batch_rows=4, forward_rows=5)
    start, held_out = placed(prefs.params(steps - 1), prefs.CONFIG), {"held_out": prefs.labelled(7, seed=1)}
    trained, _ = prefs.train(config, folder=folder, start=start, held_out=held_out, mesh=mesh)
"""
ONLINE = """
config = dataclasses.replace(prefs.ONLINE, steps=2, rollout_mesh="data=2")
start = placed(prefs.params(), prefs.CONFIG)
trained, _ = prefs.train_online(folder, config, reward=reward, mesh=mesh, start=start, evals={"held_out": tiny.prompts(7)})
"""


MIDDLES = {"grpo": GRPO, "sft": SFT, "dpo": DPO, "online_dpo": ONLINE}


def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def run(repo, root, verbs, processes):
    """verb -> the final parameters by each process of a job of so many processes and two devices, which trains one after the other."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # As in run_python of conftest.py: two devices of one process on busy cores may wait long for each other, and need threads to do it.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=500"
    env |= {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={2 // processes} {patience}", "PJRT_NPROC": "8"}
    where, pipes = address(), {"stderr": subprocess.PIPE, "text": True}
    code = START + "".join(f"folder = root + '/{verb}'\n{MIDDLES[verb]}{END}" for verb in verbs)
    commands = [[sys.executable, "-c", code, where, str(i), str(root), str(processes)] for i in range(processes)]
    started = [subprocess.Popen(command, env=env, cwd=repo, **pipes) for command in commands]
    errors = [process.communicate(timeout=600 * len(verbs))[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "".join(error[-3000:] for error in errors)
    return {verb: [np.load(root / verb / f"final_{i}.npy") for i in range(processes)] for verb in verbs}


@pytest.fixture(scope="module")
def trained(repo, tmp_path_factory):
    """(folder, what two processes trained, what one process that has both devices trained): one job each for all verbs, since starting costs."""
    root = tmp_path_factory.mktemp("jobs")
    return root / "two", run(repo, root / "two", MIDDLES, 2), run(repo, root / "alone", [verb for verb in MIDDLES if verb != "dpo"], 1)


@pytest.mark.parametrize("verb", MIDDLES)
def test_two_processes_train_one_policy(trained, verb):
    folder, (one, other) = trained[0] / verb, trained[1][verb]
    np.testing.assert_array_equal(one, other)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]  # one process writes
    if verb == "dpo":
        wanted.insert(2, ("eval", 1))  # at the end of the first run
    if verb == "sft":
        wanted = wanted[1:3]
    assert [(line["kind"] if line["kind"] == "eval" else "step", line["step"]) for line in lines] == wanted
    if verb == "dpo":  # the same policy as one process trains at one go
        config = dataclasses.replace(prefs.QUICK, steps=2, loss=prefs.LOSSES["kto"], micro_batch_rows=4, forward_rows=5)
        np.testing.assert_allclose(one, tiny.flat(prefs.train(config)[0]), rtol=1e-4, atol=1e-5)
    else:
        (alone,), start = trained[2][verb], prefs.params() if verb == "online_dpo" else tiny.params()
        assert np.abs(one - alone).max() <= 1e-5 and np.abs(alone - tiny.flat(start)).max() > 1e-3


# ------------------------------------------------------------------------------------------------------ one of them dies

STEPS, HEARTBEAT = 20, 10
COMMON = {"mesh": "fsdp=2", "train.steps": STEPS, "train.checkpoint_every": 3}


def start_verb(verb, repo, model, folder):
    """The two processes of a job."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_COORDINATOR_ADDRESS": address(), "JAX_NUM_PROCESSES": "2", "JAXRL_LLM_HEARTBEAT_S": str(HEARTBEAT)}
    fields = {name: value for name, value in VERBS[verb].items() if name != "train.overlap_rewards"}  # which is for one process
    fields |= COMMON | {"model": model[0], "data.source": model[1]}
    command = [sys.executable, "-m", "jaxrl_llm", verb, *(f"--config.{name}={value}" for name, value in fields.items()), f"--workdir={folder}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, cwd=repo, **pipes) for i in range(2)]


def finish(processes):
    """Their stderr once both have ended well."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(error[-3000:] for error in errors)
    return errors


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def left(folder):
    """(metrics without times, bytes of the weights)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in record.items() if name not in TIMES} for record in records]
    return records, {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(("verb", "victim"), [("sft", 1), ("grpo", 0)])
def test_a_process_that_dies_ends_the_other_and_both_go_on(verb, victim, repo, tmp_path):
    """The one that only trains, or the one that writes and holds the job together."""
    model, peace, killed = tiny_folder.write(tmp_path), tmp_path / "peace", tmp_path / "killed"
    for error in finish(start_verb(verb, repo, model, peace)):
        assert "is gone" not in error, "one that ends well says nothing of the kind"
    wanted = left(peace)
    assert [record["step"] for record in wanted[0]] == list(range(1, STEPS + 1)) and len(wanted[1]) == 1
    job, step = start_verb(verb, repo, model, killed), 8
    while lines(killed) < step and all(process.poll() is None for process in job):
        time.sleep(0.002)
    job[victim].send_signal(signal.SIGKILL)
    assert job[victim].wait() == -signal.SIGKILL, job[victim].communicate()[1][-3000:]
    # Far beyond the heartbeat, within which it must end where the machine is idle, but not for ever.
    error = job[1 - victim].communicate(timeout=10 * HEARTBEAT)[1]
    job[victim].communicate()
    assert job[1 - victim].returncode != 0
    assert f"another process of the job is gone (unheard for {HEARTBEAT} s" in error, error[-3000:]
    assert "The same command on every host goes on from the newest checkpoint" in error
    assert step <= lines(killed) < STEPS
    finish(start_verb(verb, repo, model, killed))
    assert left(killed) == wanted
