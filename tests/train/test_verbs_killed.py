"""SIGKILL at random moments of every verb that trains: each restart goes on, and what is left at the end is what a run left in peace leaves,
bit for bit, every metrics line once. (GRPO with a schedule that follows the policy: test_grpo_kill.py.)

JAXRL_LLM_KILLS=20 kills twenty times rather than once.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_folder

STEPS, CHECKPOINT_EVERY = 40, 3
FIRST_KILL, LAST_KILL = 4, STEPS  # metrics lines after which it is killed; the last in or after the export
SURE = 30  # a run that has come so far may end before it is killed
TIMES = ("seconds", "tokens_per_s", "seconds_schedule", "seconds_rollout", "seconds_reward", "seconds_reward_waited", "seconds_update")

TRAIN = {"train.steps": STEPS, "train.checkpoint_every": CHECKPOINT_EVERY, "train.optimizer.learning_rate": 0.01}
VERBS = {
    "grpo": TRAIN | {  # with completions in flight between its steps
        "data.fields": "prompt=question,answer=good", "reward.name": "exact", "train.num_samples": 8, "train.max_new_tokens": 2,
        "max_prompt_tokens": 16, "schedule.batch_prompts": 4, "train.overlap_rewards": True,
    },
    "sft": TRAIN | {"data.fields": "prompt=question,answer=good", "batch_rows": 4, "max_length": 16, "train.log_every": 1},
    "dpo": TRAIN | {"data.fields": "prompt=question,chosen=good,rejected=bad", "batch_rows": 4, "max_length": 16},
    "online_dpo": TRAIN | {
        "data.fields": "prompt=question,answer=good", "reward.name": "exact", "train.num_samples": 8, "train.max_new_tokens": 2,
        "max_prompt_tokens": 16, "schedule.batch_prompts": 4,
    },
    "train_sae": {
        "data.fields": "prompt=question", "hook": "blocks.0.resid_post", "sae.d_sae": 32, "sae.k": 4, "batch_size": 16, "data.eval_rows": 4,
        "harvest.buffer_rows": 64, "harvest.context_size": 16, "checkpoint_every": CHECKPOINT_EVERY, "train.steps": STEPS, "train.log_every": 1,
        "train.init_rows": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("model"))


def start(verb, model, folder, repo):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_COMPILATION_CACHE_DIR": str(model[0].parent / "cache")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    fields = VERBS[verb] | {"model": model[0], "data.source": model[1]}
    command = [sys.executable, "-m", "jaxrl_llm", verb, *(f"--config.{name}={value}" for name, value in fields.items()), f"--workdir={folder}"]
    return subprocess.Popen(command, env=env, cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error[-3000:]


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def left(folder):
    """(metrics without times, bytes of every file of weights)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in record.items() if name not in TIMES} for record in records]
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return records, weights


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_run_leaves_what_an_undisturbed_one_leaves(verb, model, repo, tmp_path):
    kills, peace, killed = int(os.environ.get("JAXRL_LLM_KILLS", "1")), tmp_path / "peace", tmp_path / "killed"
    finish(start(verb, model, peace, repo))
    wanted = left(peace)
    assert len(wanted[0]) >= STEPS and len(wanted[1]) == 1
    rng, hit = random.Random(f"{verb} {kills}"), 0
    for step in sorted(rng.choices(range(FIRST_KILL, LAST_KILL + 1), k=kills)):
        came_past, deadline = lines(killed) >= step, time.monotonic() + 300
        process = start(verb, model, killed, repo)
        while lines(killed) < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        # A run that came past this step before it was killed is killed while it starts.
        time.sleep(rng.random() * (2.0 if came_past else 0.2))
        process.send_signal(signal.SIGKILL)
        hit += process.wait() == -signal.SIGKILL or (step > SURE and process.returncode == 0)
        process.stderr.close()
    assert hit == kills, f"{kills - hit} of {kills} starts ended by themselves"
    finish(start(verb, model, killed, repo))
    found = left(killed)
    assert found[0] == wanted[0], "a metrics line was lost, doubled or changed"
    assert found[1] == wanted[1]
    assert not list(killed.glob(".*")), "a part of an export stays for ever"
