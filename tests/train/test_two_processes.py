"""Multi-controller JAX on localhost: two processes of one device each train the policy that one process trains."""

import os
import socket
import subprocess
import sys

import numpy as np

SCRIPT = """
import sys; sys.path.insert(0, "tests/train")
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny
from jaxrl_llm.rewards.verdict import Status, Verdict
assert jax.process_count() == 2 and jax.device_count() == 2
config = dataclasses.replace(tiny.TINY, steps=2)
def reward(inputs):
    # What one process says differs from what the other would say: both must train on the gathered verdicts.
    assert len(inputs) in (8, 4)
    return [v if v.status is Status.PASS else Verdict(Status.FAIL, score=0.1 * int(sys.argv[2])) for v in tiny.reward(inputs)]
mesh = models.sharding.make_mesh({"fsdp": 2})
params = jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]),
    tiny.params(), models.sharding.param_shardings(tiny.CONFIG, mesh),
)
trained, summary = tiny.run(sys.argv[3], config, reward=reward, mesh=mesh, start=params, evals={"held_out": tiny.prompts(7)})
whole = jax.jit(lambda t: t, out_shardings=models.sharding.replicated(mesh))(trained)
np.save(sys.argv[3] + f"/final_{sys.argv[2]}.npy", tiny.flat(whole))
"""


def test_two_processes_train_one_policy(repo, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    folder = tmp_path / "run"
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, address, str(i), str(folder)], env=env, cwd=repo, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    one, other = (np.load(folder / f"final_{i}.npy") for i in range(2))
    np.testing.assert_array_equal(one, other)
    lines = (folder / "metrics.jsonl").read_text().count("\n")
    assert lines == 4  # one process writes: two steps, two evaluations
