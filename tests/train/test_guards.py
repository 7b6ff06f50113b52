"""What keeps a long run from being lost: updates of spikes left out, the best checkpoint kept, a stuck step ended."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs
from tqdm import tqdm

from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.train import state as train_state
from jaxrl_llm.train.checks import check_dpo, check_grpo
from jaxrl_llm.train.config import DPOConfig, GRPOConfig, OptimizerConfig

# ------------------------------------------------------------------------------------------------------------- spikes


def run_norms(norms, factor, learning_rate=0.1):
    """(parameters after each update, state) of gradients (n, 0) of these norms n, by SGD with momentum."""
    tx = train_state.without_spikes(optax.sgd(learning_rate, momentum=0.5), factor)
    params = {"w": jnp.zeros(2)}
    state, seen = tx.init(params), []
    for norm in norms:
        updates, state = tx.update({"w": jnp.array([norm, 0.0])}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    return seen, state


def test_a_spike_moves_neither_parameters_nor_moments():
    calm = [1.0] * train_state.SPIKE_WARMUP
    seen, state = run_norms([*calm, 50.0, 1.0], factor=5.0)
    without, _ = run_norms([*calm, 1.0], factor=5.0)
    assert seen[-2] == seen[-3] and seen[-1] == pytest.approx(without[-1], rel=1e-6), "the momentum is that of the calm updates"
    assert int(state.skipped) == 1
    taken, state = run_norms([*calm, 4.9, 1.0], factor=5.0)
    assert int(state.skipped) == 0 and taken[-2] < seen[-2]


def test_the_running_mean_by_hand():
    """Norms 1, ..., 1, then 50 at factor 5: it enters as the limit, 5 times the mean of 1."""
    calm = [1.0] * train_state.SPIKE_WARMUP
    _, state = run_norms([*calm, 50.0], factor=5.0)
    n, d = len(calm), train_state.SPIKE_DECAY
    assert float(state.mean) == pytest.approx(d * (1 - d**n) + (1 - d) * 5.0, rel=1e-5)


def test_early_updates_are_all_taken_and_a_lasting_rise_is_believed_in_time():
    _, state = run_norms([1.0] * (train_state.SPIKE_WARMUP - 1) + [50.0], factor=5.0)
    assert int(state.skipped) == 0, "nothing is known of norms yet"
    _, state = run_norms([1.0] * train_state.SPIKE_WARMUP + [20.0] * 60, factor=5.0)
    assert 0 < int(state.skipped) < 40


def test_what_is_not_finite_is_left_to_its_own_guard():
    _, state = run_norms([1.0] * train_state.SPIKE_WARMUP + [np.nan], factor=5.0)
    assert int(state.skipped) == 0


def test_an_update_tells_of_a_spike_and_the_state_keeps_its_shape(monkeypatch):
    monkeypatch.setattr(train_state, "SPIKE_WARMUP", 1)
    config = OptimizerConfig(learning_rate=1e-2, spike_factor=3.0, warmup_steps=4)
    params = prefs.params()
    state = train_state.init_state(prefs.CONFIG, config, params)
    assert jax.tree.structure(state) == jax.tree.structure(train_state.abstract_state(prefs.CONFIG, config))
    grads, spikes, rates = jax.tree.map(jnp.ones_like, params), [], []
    for scale in (1.0, 1.0, 10.0, 1.0):
        before = state["params"]
        state, metrics = train_state.apply_gradients(config, state, jax.tree.map(lambda g, s=scale: s * g, grads))
        spikes.append(float(metrics["spike"]))
        rates.append(float(metrics["learning_rate"]))
        moved = any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state["params"]), strict=True))
        assert moved == (scale == 1.0 and len(spikes) > 1), "the first step of a warm-up moves nothing and is no spike"
    assert spikes == [0, 0, 1, 0] and int(state["step"]) == 4
    assert rates == pytest.approx([0.0, 0.25e-2, 0.5e-2, 0.5e-2]), "the warm-up waits with the update"
    assert {int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state["opt_state"].inner, "count")} == {3}
    assert "spike" not in train_state.apply_gradients(OptimizerConfig(), train_state.init_state(prefs.CONFIG, OptimizerConfig(), params), grads)[1]


def test_a_factor_without_meaning_is_refused():
    for check, kind in ((check_grpo, GRPOConfig), (check_dpo, DPOConfig)):
        with pytest.raises(UserError, match="optimizer.spike_factor.*1 or less"):
            check(kind(optimizer=OptimizerConfig(spike_factor=0.5)))
        with pytest.raises(UserError, match="optimizer.spike_factor.*not be below 0"):
            check(kind(optimizer=OptimizerConfig(spike_factor=-1.0)))


def test_training_logs_spikes(tmp_path):
    config = dataclasses.replace(prefs.QUICK, optimizer=dataclasses.replace(prefs.OPTIMIZER, spike_factor=2.0))
    _, history = prefs.train(config)
    assert [record["spike"] for record in history] == [0.0] * 4


# --------------------------------------------------------------------------------------------------------------- best


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        if step in (2, 4):
            checkpoints.name_best(step)
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
    assert checkpoints.steps() == [4, 5, 6]
    found = checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.int32)}, at=4)
    assert found is not None and found[0] == 4 and found[1]["x"].tolist() == [4, 4, 4]
    checkpoints.close()


class Waning:
    """A reward after which the policy's evaluations are best in the middle: what the policy writes counts less and less. PASS for the
    evaluated rows in the evaluations `good`, counted from 0, else FAIL; training rewards are the plain ones."""

    def __init__(self, shares):
        self.shares, self.evaluations = shares, 0

    def __call__(self, inputs):
        if "held" not in inputs[0].row["id"]:
            return tiny.reward(inputs)
        share, self.evaluations = self.shares[self.evaluations], self.evaluations + 1
        return [Verdict(Status.PASS if i < share * len(inputs) else Status.FAIL) for i in range(len(inputs))]


def held_out():
    data = tiny.prompts(10, seed=5)
    for row in data.rows:
        row["id"] = f"held {row['id']}"
    return data


def with_best(folder, shares, **changes):
    config = dataclasses.replace(tiny.TINY, steps=5, eval_every=1, checkpoint_every=100, keep_checkpoints=1, keep_best="held", **changes)
    reward = Waning(shares)
    trained, summary = tiny.run(folder, config, reward=reward, evals={"held": held_out()})
    return trained, summary


def test_the_policy_of_the_best_evaluation_is_returned(tmp_path):
    """Evaluations of steps 0 to 5: the start does not count, the first of two equals does."""
    trained, summary = with_best(tmp_path / "run", [1.0, 0.2, 0.6, 0.6, 0.4, 0.1])
    assert summary["best"] == {"set": "held", "step": 2, "accuracy": 0.6, "reward": 0.6}
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()) == [2, 5]
    two, _ = tiny.run(tmp_path / "two", dataclasses.replace(tiny.TINY, steps=2))
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(two))
    again, summary = with_best(tmp_path / "run", [])
    np.testing.assert_array_equal(tiny.flat(again), tiny.flat(two))
    assert summary["best"]["step"] == 2


def test_of_equally_accurate_policies_the_one_of_higher_reward_is_kept(tmp_path):
    """A graded reward, of which no completion is good enough to pass."""

    class Graded(Waning):
        def __call__(self, inputs):
            return [Verdict(Status.FAIL, score=0.5 * (v.status is Status.PASS)) for v in super().__call__(inputs)]

    config = dataclasses.replace(tiny.TINY, steps=4, eval_every=1, checkpoint_every=100, keep_checkpoints=1, keep_best="held")
    _, summary = tiny.run(tmp_path / "run", config, reward=Graded([1.0, 0.2, 0.4, 0.8, 0.8]), evals={"held": held_out()})
    assert summary["best"] == {"set": "held", "step": 3, "accuracy": 0.0, "reward": 0.4}


def test_a_resumed_run_knows_what_was_best(tmp_path):
    shares = [0.0, 0.2, 0.6, 0.3, 0.4, 0.1]
    trained, _ = with_best(tmp_path / "run", shares)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "5")
    resumed, summary = with_best(tmp_path / "cut", shares[3:])
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(trained))
    assert summary["best"]["step"] == 2
    last, summary = with_best(tmp_path / "last", [0.0, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert summary["best"]["step"] == 5 and not np.array_equal(tiny.flat(last), tiny.flat(trained))


def test_dpo_keeps_the_checkpoint_of_least_loss(tmp_path, monkeypatch):
    from jaxrl_llm.train import dpo

    losses = iter([0.1, 0.6, 0.3, 0.3, 0.5])  # of steps 0 to 4
    real = dpo.preference_loss
    monkeypatch.setattr(dpo, "preference_loss", lambda *given: (next(losses), real(*given)[1]))
    config = dataclasses.replace(prefs.QUICK, eval_every=1, keep_best="held", keep_checkpoints=1)
    trained, history = prefs.train(config, folder=tmp_path / "run", held_out={"held": prefs.pairs(4, seed=2)})
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4]
    two, _ = prefs.train(dataclasses.replace(prefs.QUICK, steps=2))
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(two))
    assert [record["loss"] for record in history if record["kind"] == "eval"] == [0.1, 0.6, 0.3, 0.3, 0.5]


def test_a_process_that_reads_before_the_metrics_are_cut_knows_the_same_best(tmp_path, monkeypatch):
    """On several processes one cuts metrics.jsonl back to the checkpoint and the others read it, perhaps before: a best step that is to come
    again would be known to these alone, and their saves would part."""
    from jaxrl_llm.train import dpo

    evals = {"held": prefs.pairs(4, seed=2)}
    config = dataclasses.replace(prefs.QUICK, eval_every=1, checkpoint_every=1, keep_best="held", keep_checkpoints=4)
    prefs.train(config, folder=tmp_path / "run", held_out=evals)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    seen = []

    def train(run, *_):
        seen.append((run.best, [record["step"] for record in run.history if record["kind"] == "eval"]))
        raise InterruptedError

    monkeypatch.setattr(dpo, "_train", train)
    monkeypatch.setattr(dpo.RunDir, "truncate_after", lambda *_: None)  # as a process that does not write has it
    with pytest.raises(InterruptedError):
        prefs.train(config, folder=tmp_path / "run", held_out=evals)
    assert seen[0][0][1] <= 2 and seen[0][1] == [0, 1, 2]


def test_a_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="'keep_best' is 'hold', which is no evaluation set: did you mean held"):
        tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, keep_best="hold"), evals={"held": tiny.prompts(4)})
    with pytest.raises(UserError, match="'keep_best' is 'hold', which is no held-out set: did you mean held"):
        prefs.train(dataclasses.replace(prefs.QUICK, keep_best="hold"), held_out={"held": prefs.pairs(4)})
    with pytest.raises(UserError, match="'keep_best' keeps a checkpoint: give a run directory"):
        prefs.train(dataclasses.replace(prefs.QUICK, keep_best="held"), held_out={"held": prefs.pairs(4)})


# ---------------------------------------------------------------------------------------------------- reference figures


def test_the_references_figures_are_saved_before_the_first_step(tmp_path, monkeypatch):
    """Of many pairs they take as long as steps do: a run that dies after them does not compute them anew. It is watched and shows a bar."""
    from jaxrl_llm.train import dpo

    config, evals = dataclasses.replace(prefs.QUICK, forward_rows=5, watchdog_seconds=1000, steps=2), {"held": prefs.pairs(4, seed=2)}
    calls, bars, real, beat = [], [], dpo.compiled_sums, dpo.Alive.__call__
    watched = lambda alive: (calls.append("alive"), beat(alive))  # noqa: E731
    monkeypatch.setattr(dpo.Alive, "__call__", watched)
    monkeypatch.setattr(dpo, "tqdm", lambda **how: (bars.append((how["desc"], how["total"])), tqdm(**how))[1])
    monkeypatch.setattr(dpo, "compiled_update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prefs.train(config, folder=tmp_path / "run", held_out=evals)
    assert bars == [("figures of training rows", 12), ("figures of held", 4)] and calls.count("alive") == 1 + 3 + 1
    monkeypatch.undo()
    counts = []
    monkeypatch.setattr(dpo, "compiled_sums", lambda *how: (counts.append(1), real(*how))[1])
    trained, _ = prefs.train(config, folder=tmp_path / "run", held_out=evals)
    assert len(counts) == 2, "those of the evaluations before and after, not those of the reference"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("eval", 0), ("dpo", 1), ("dpo", 2), ("eval", 2)]
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(prefs.train(config, held_out=evals)[0]))


# ------------------------------------------------------------------------------------------------------------ watchdog

STUCK = """
import dataclasses, sys, time
sys.path.insert(0, "tests/train")
import tiny_grpo as tiny
calls = []
def reward(inputs):
    calls.append(1)
    if len(calls) == 3:
        waits_for_ever()
    return tiny.reward(inputs)
def waits_for_ever():
    time.sleep(600)
config = dataclasses.replace(tiny.TINY, watchdog_seconds=int(sys.argv[2]))
tiny.run(sys.argv[1], config, reward=reward)
"""


def test_a_stuck_step_ends_the_run_and_says_where_it_stood(repo, tmp_path):
    import os
    import subprocess
    import sys

    env = os.environ | {"PYTHONPATH": str(repo), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", STUCK, str(tmp_path / "run"), "20"]
    done = subprocess.run(command, env=env, cwd=repo, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "waits_for_ever" in done.stderr and "Timeout" in done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    config = dataclasses.replace(tiny.TINY, watchdog_seconds=300)
    trained, _ = tiny.run(tmp_path / "run", config)  # goes on from the checkpoint of step 2
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(tiny.run(tmp_path / "whole")[0]))
