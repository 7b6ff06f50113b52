"""Sampling on another mesh of the same devices together with what else moves completions about: filled places, sorted micro-batches, a kill."""

import os
import signal
import subprocess
import sys

import numpy as np

START = """
import sys; sys.path.insert(0, "tests/train")
import jax; jax.config.update("jax_cpu_enable_async_dispatch", False)
import dataclasses, numpy as np, models, models.sharding
import tiny_grpo as tiny
mesh = models.sharding.make_mesh({"fsdp": 8})
"""

REFILLED = START + """
import jaxrl_llm.train.rollout as rollout
seen, real = [], models.generate
def watched(*given, **how):
    found = real(*given, **how)
    seen.append((how["refill"], how["mesh"], found))
    return found
rollout.models.generate = watched
config = dataclasses.replace(tiny.TINY, steps=2, rollout_mesh="data=2,tensor=4", rollout_rows=8)
for refill in (False, True):
    tiny.run(f"{sys.argv[1]}/{refill}", dataclasses.replace(config, rollout_refill=refill), mesh=mesh)
assert [refill for refill, _, _ in seen] == [False, False, True, True]
assert all(dict(where.shape)["tensor"] == 4 for _, where, _ in seen)
lengths = seen[0][2].completion_lengths_N
assert len(lengths) == 16 and lengths.min() < lengths.max()  # more rows than places, and some end before others
for (_, _, plain), (_, _, refilled) in zip(seen[:2], seen[2:]):
    for name in ("completion_tokens_NT", "completion_lengths_N", "finish_reason_N", "group_ids_N"):
        one, other = getattr(plain, name), getattr(refilled, name)
        width = min(one.shape[-1], other.shape[-1])
        np.testing.assert_array_equal(one[..., :width], other[..., :width], err_msg=name)
    width = min(plain.logps_NT.shape[1], refilled.logps_NT.shape[1])
    np.testing.assert_allclose(plain.logps_NT[:, :width], refilled.logps_NT[:, :width], rtol=1e-5, atol=1e-5)
print("the same samples")
"""

TRAINED = START + """
import os
kill = int(sys.argv[2])
config = dataclasses.replace(tiny.TINY, steps=5, rollout_mesh="data=2,tensor=4", micro_batch_rows=8, length_buckets=3, checkpoint_every=1)
calls = 0
def reward(inputs):
    global calls
    calls += 1
    if calls == kill:
        print("there", flush=True)
        import time; time.sleep(600)  # is killed meanwhile
    return tiny.reward(inputs)
trained, _ = tiny.run(sys.argv[1], config, reward=reward, mesh=mesh)
np.save(sys.argv[1] + "/final.npy", tiny.flat(trained))
"""


def test_filled_places_on_a_mesh_of_the_samplers_own_give_the_same_samples(run_python, tmp_path):
    assert "the same samples" in run_python(REFILLED, (str(tmp_path),), devices=8)


def test_a_killed_run_with_a_rollout_mesh_and_length_buckets_resumes_bit_for_bit(run_python, repo, tmp_path):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    quick |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run_python(TRAINED, (str(tmp_path / "peace"), "0"), devices=8, env=quick)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=500"
    env = os.environ | quick | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "XLA_FLAGS": flags, "PJRT_NPROC": "32"}
    command = [sys.executable, "-c", TRAINED, str(tmp_path / "killed"), "4"]
    process = subprocess.Popen(command, env=env, cwd=repo, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.kill()  # the save of step 3 may be under way, that of step 2 is done
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    metrics = tmp_path / "killed" / "metrics.jsonl"
    assert metrics.read_bytes().count(b"\n") == 3 and (tmp_path / "killed" / "checkpoints" / "2").is_dir()
    run_python(TRAINED, (str(tmp_path / "killed"), "0"), devices=8, env=quick)
    np.testing.assert_array_equal(np.load(tmp_path / "killed" / "final.npy"), np.load(tmp_path / "peace" / "final.npy"))
