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
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny, tiny_preferences as prefs
from jaxrl_llm.rewards.verdict import Status, Verdict
assert jax.process_count() == 2 and jax.device_count() == 2
folder = sys.argv[3]
def reward(inputs):
    # What one process says differs from what the other would say: both must train on the gathered verdicts.
    assert len(inputs) in (8, 4)
    return [v if v.status is Status.PASS else Verdict(Status.FAIL, score=0.1 * int(sys.argv[2])) for v in tiny.reward(inputs)]
mesh = models.sharding.make_mesh({"fsdp": 2})
def placed(params, config):
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]),
        params, models.sharding.param_shardings(config, mesh),
    )
"""
END = """
whole = jax.jit(lambda t: t, out_shardings=models.sharding.replicated(mesh))(trained)
np.save(folder + f"/final_{sys.argv[2]}.npy", tiny.flat(whole))
"""
GRPO = """
config = dataclasses.replace(tiny.TINY, steps=2)
start = placed(tiny.params(), tiny.CONFIG)
trained, _ = tiny.run(folder, config, reward=reward, mesh=mesh, start=start, evals={"held_out": tiny.prompts(7)})
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


@pytest.mark.parametrize("middle", [GRPO, DPO, ONLINE], ids=["grpo", "dpo", "online_dpo"])
def test_two_processes_train_one_policy(repo, tmp_path, middle):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    folder, code = tmp_path / "run", START + middle + END
    processes = [
        subprocess.Popen([sys.executable, "-c", code, address, str(i), str(folder)], env=env, cwd=repo, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    one, other = (np.load(folder / f"final_{i}.npy") for i in range(2))
    np.testing.assert_array_equal(one, other)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]  # one process writes
    if middle == DPO:
        wanted.insert(2, ("eval", 1))  # at the end of the first run
    assert [(line["kind"] if line["kind"] == "eval" else "step", line["step"]) for line in lines] == wanted
    if middle == DPO:  # the same policy as one process trains at one go
        config = dataclasses.replace(prefs.QUICK, steps=2, loss=prefs.LOSSES["kto"], micro_batch_rows=4, forward_rows=5)
        np.testing.assert_allclose(one, tiny.flat(prefs.train(config)[0]), rtol=1e-4, atol=1e-5)
