"""SIGKILL at random moments of a run on the lab's world with the schedule that follows the policy, as the demo trains: every restart
goes on from a checkpoint, and the final parameters, and the prompts of every step, are those of a run left in peace.

JAXRL_LLM_KILLS=10 kills ten times rather than three. This file is also the program that is killed: python test_grpo_kill.py FOLDER
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

STEPS, CHECKPOINT_EVERY = 30, 2
FIRST_KILL, LAST_KILL = 4, 22  # a finished step after which the run is killed: a checkpoint is there, and enough is left to do


def start(folder, repo):
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=env, cwd=repo, stdout=subprocess.DEVNULL)


def starts(folder):
    """The first step of each start so far."""
    path = folder / "starts.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def finished_steps(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(folder, repo, step, delay, patience):
    """Starts the run and kills it `delay` seconds after it has done `step` steps; it must be at work then."""
    process, before, deadline = start(folder, repo), len(starts(folder)), time.monotonic() + patience
    while (len(starts(folder)) == before or finished_steps(folder) < step) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run ended by itself before it was killed after step {step}"
    assert len(starts(folder)) == before + 1, f"after {patience:.0f} s the run had not begun"


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_runs_end_with_the_parameters_of_an_undisturbed_one(repo, tmp_path):
    kills = int(os.environ.get("JAXRL_LLM_KILLS", "3"))
    peace, killed, began = tmp_path / "peace", tmp_path / "killed", time.monotonic()
    assert start(peace, repo).wait() == 0
    patience, wanted = 20 * (time.monotonic() - began) + 60, records(peace)
    # Equal parameters would say little of a run that learns nothing, or whose schedule sees the same pass rates at every step.
    assert len(wanted) == STEPS and sum(record["grad_norm"] > 0 for record in wanted) > 0.9 * STEPS
    assert len({record["pass_rate"] for record in wanted}) >= 8

    rng = random.Random(kills)
    longest = max(record["seconds"] for record in wanted[2:])
    for step in sorted(rng.choices(range(FIRST_KILL, LAST_KILL + 1), k=kills)):
        kill_after(killed, repo, step, rng.random() * 2 * longest, patience)
    assert start(killed, repo).wait() == 0

    begun = starts(killed)
    assert len(begun) == kills + 1 and begun[0] == 0 and min(begun[1:]) >= CHECKPOINT_EVERY and begun == sorted(begun)
    np.testing.assert_array_equal(np.load(killed / "final.npy"), np.load(peace / "final.npy"))
    for name in ("step", "rows", "reward", "loss"):
        assert [record[name] for record in records(killed)] == [record[name] for record in wanted], name


def run(folder):
    """A GRPO run as the demo's, but in seconds."""
    import jax

    import models
    from jaxrl_llm.curation.trainability import TrainabilityBand
    from jaxrl_llm.data import lab_world
    from jaxrl_llm.data.prompts import tokenise_prompts
    from jaxrl_llm.rewards.verdict import Status, Verdict
    from jaxrl_llm.run_dir import RunDir
    from jaxrl_llm.train.config import GRPOConfig, OptimizerConfig
    from jaxrl_llm.train.loop import train_grpo

    class Band(TrainabilityBand):
        """Writes down where it begins."""

        begun = False

        def batch(self, step):
            if not self.begun:
                with open(folder / "starts.txt", "a") as file:
                    file.write(f"{step}\n")
            self.begun = True
            return super().batch(step)

    def ends_right(inputs):
        """PASS when the answer's last word is written: a policy that knows nothing does so now and then, then learns to."""
        return [Verdict(Status.PASS if item.answer.split()[-1] in item.response.split() else Status.FAIL) for item in inputs]

    tokenizer = lab_world.build_tokenizer()
    rows = lab_world.corrupt(lab_world.generate_problems(96, 5), {"wrong_answer": 0.25}, 5)
    prompts = tokenise_prompts(rows, tokenizer, max_length=24, overflow="drop")
    cfg = models.ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, tie_embeddings=True,
        qkv_bias=True, max_position=64, initializer_range=0.05, bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    topics = sorted(lab_world.TOPICS)
    topic = np.array([topics.index(row["topic"]) for row in prompts.rows])
    level = np.array([row["level"] for row in prompts.rows])
    schedule = Band(1 - level / 6, np.eye(len(topics), dtype=np.float32)[topic], 4, seed=1, cluster=topic, samples_per_prompt=8, epoch_share=0.3)
    optimizer = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    config = GRPOConfig(steps=STEPS, num_samples=8, max_new_tokens=12, checkpoint_every=CHECKPOINT_EVERY, optimizer=optimizer, seed=2)
    run_dir = RunDir(folder, {"name": "killed"}, kind="grpo")
    params = models.init(cfg, jax.random.key(0))
    trained, _ = train_grpo(cfg, params, tokenizer, prompts, ends_right, schedule, config, run_dir, progress=False)
    np.save(folder / "final.npy", np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(trained)]))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
