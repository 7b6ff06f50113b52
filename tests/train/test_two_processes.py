"""Multi-controller JAX on localhost: two processes of one device each train one policy, and one of them writes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs

START = """
import sys; sys.path.insert(0, "tests/train")
import jax
address, number, folder, processes = *sys.argv[1:4], int(sys.argv[4])
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


def run(repo, folder, middle, processes):
    """A job of so many processes and two devices, to its end."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // processes}"
    where, code = address(), START + middle + END
    started = [
        subprocess.Popen([sys.executable, "-c", code, where, str(i), str(folder), str(processes)], env=env, cwd=repo, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    errors = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "".join(error[-3000:] for error in errors)
    return [np.load(folder / f"final_{i}.npy") for i in range(processes)]


@pytest.mark.parametrize("verb", MIDDLES)
def test_two_processes_train_one_policy(repo, tmp_path, verb):
    folder, middle = tmp_path / "run", MIDDLES[verb]
    one, other = run(repo, folder, middle, 2)
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
    if verb in ("grpo", "sft"):  # and as one process that has both devices
        (alone,) = run(repo, tmp_path / "alone", middle, 1)
        assert np.abs(one - alone).max() <= 1e-5 and np.abs(alone - tiny.flat(tiny.params())).max() > 1e-3
