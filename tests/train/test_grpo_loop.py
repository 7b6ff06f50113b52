"""The whole loop: it learns, it resumes bit for bit, it stops when told or when the numbers break, and it says so."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny_grpo as tiny

from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.config import LossConfig, OptimizerConfig
from jaxrl_llm.train.resample import joined
from jaxrl_llm.train.rollout import build_batch, collect
from jaxrl_llm.train.signals import Interrupted
from jaxrl_llm.train.state import init_state, trunk
from jaxrl_llm.train.step import compiled_logprobs, compiled_targets, compiled_update, compiled_values, critic_targets, step_spec

TIMES = ("seconds_schedule", "seconds_rollout", "seconds_reward", "seconds_update", "tokens_per_s", "seconds")
ISSUE_METRICS = (
    "reward", "pass_rate", "zero_spread", "entropy", "kl", "clip_share", "logp_diff_mean", "logp_diff_max", "completion_length",
    "tokens_per_s", "seconds_rollout", "seconds_reward", "seconds_update", "grad_norm", "loss", "errors",
)  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records(folder)]


class LearningSchedule(ShuffledSchedule):
    """Its batches depend on what it observed, so a resume that loses its state goes another way."""

    def __init__(self):
        super().__init__(12, 4, seed=3)
        self.shift = np.zeros((), np.int64)
        self.seen = []

    def batch(self, step):
        return (super().batch(step) + int(self.shift)) % self.n

    def observe(self, step, indices, pass_rates):
        self.seen.append((step, list(indices)))
        self.shift = self.shift + 1 + int(4 * np.nansum(pass_rates)) % 5

    def state(self):
        return {"shift": self.shift}

    def restore(self, state):
        self.shift = state["shift"]


def kills_itself_at(batch_number, signum=signal.SIGTERM):
    calls = []

    def reward(inputs):
        calls.append(len(inputs))
        if len(calls) == batch_number:
            os.kill(os.getpid(), signum)
        return tiny.reward(inputs)

    return reward


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    params, summary = tiny.run(folder, schedule=LearningSchedule())
    return folder, params, summary


def test_every_metric_of_a_step_is_logged(undisturbed):
    folder, _, summary = undisturbed
    train = [r for r in records(folder) if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    for record in train:
        assert set(ISSUE_METRICS) <= record.keys()
        assert all(record[name] is not None for name in ISSUE_METRICS if name != "kl")
        assert record["logp_diff_max"] < 1e-5 and record["errors"] == 0
    assert summary["steps"] == 4 and json.loads((folder / "summary.json").read_text())["steps"] == 4
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1, 2, 3, 4]


def test_sigterm_saves_and_resume_is_bit_exact(undisturbed, tmp_path):
    folder, params, summary = undisturbed
    never = dataclasses.replace(tiny.TINY, checkpoint_every=0)
    with pytest.raises(Interrupted, match="after step 2") as stopped:
        tiny.run(tmp_path / "run", never, schedule=LearningSchedule(), reward=kills_itself_at(2))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2]
    schedule = LearningSchedule()
    resumed, summary_resumed = tiny.run(tmp_path / "run", never, schedule=schedule)
    assert [step for step, _ in schedule.seen] == [2, 3]
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(params))
    assert untimed(tmp_path / "run") == untimed(folder)
    assert {k: v for k, v in summary.items() if k != "seconds"} == {k: v for k, v in summary_resumed.items() if k != "seconds"}


def test_a_crash_between_checkpoints_repeats_the_lost_steps_exactly(undisturbed, tmp_path):
    folder, params, _ = undisturbed
    every_second = dataclasses.replace(tiny.TINY, checkpoint_every=2)

    class Crash(BaseException):
        pass

    calls = []

    def crashing(inputs):
        calls.append(1)
        if len(calls) == 4:
            raise Crash
        return tiny.reward(inputs)

    with pytest.raises(Crash):
        tiny.run(tmp_path / "run", every_second, schedule=LearningSchedule(), reward=crashing)
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]
    resumed, _ = tiny.run(tmp_path / "run", every_second, schedule=LearningSchedule())
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(params))
    assert untimed(tmp_path / "run") == untimed(folder)


def test_a_finished_run_started_again_changes_nothing(undisturbed):
    folder, params, summary = undisturbed
    before = (folder / "metrics.jsonl").read_bytes()
    again, same = tiny.run(folder, schedule=LearningSchedule(), reward=lambda _: pytest.fail("there is nothing left to do"))
    np.testing.assert_array_equal(tiny.flat(again), tiny.flat(params))
    assert (folder / "metrics.jsonl").read_bytes() == before and same == summary


def test_seed_matters(undisturbed, tmp_path):
    other, _ = tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, seed=1, steps=1))
    base, _ = tiny.run(tmp_path / "base", dataclasses.replace(tiny.TINY, steps=1))
    assert np.abs(tiny.flat(other) - tiny.flat(base)).max() > 0


def test_not_finite_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    explosive = dataclasses.replace(tiny.TINY, optimizer=OptimizerConfig(learning_rate=1e38, clip_norm=0.0, warmup_steps=3), steps=9)
    with pytest.raises(UserError, match=r"step [2-9]: loss .* not finite.*last good checkpoint is step \d") as caught:
        tiny.run(tmp_path / "run", explosive)
    step = int(str(caught.value).split()[1].rstrip(":"))
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == step - 1 and records(tmp_path / "run")[-1]["step"] == step - 1


def constant(inputs):
    return [Verdict(Status.PASS)] * len(inputs)


def mixed(inputs):
    """Every group (its rows are adjacent) has both rewards."""
    return [Verdict(Status.PASS if i % 2 else Status.FAIL) for i in range(len(inputs))]


def spread_warnings(caplog):
    return [m for m in caplog.messages if "have equal rewards" in m]


def test_constant_reward_is_warned_of(tmp_path, caplog):
    """A step of 64 groups is enough to be warned at once, and once."""
    large = {"data": tiny.prompts(64), "schedule": ShuffledSchedule(64, 64, seed=3), "reward": constant}
    tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, steps=2), **large)
    assert [r["zero_spread"] for r in records(tmp_path / "run")] == [1.0, 1.0]
    (warning,) = spread_warnings(caplog)
    assert "step 1: 100% of the groups of the last 1 step(s) have" in warning
    caplog.clear()
    tiny.run(tmp_path / "quiet", dataclasses.replace(tiny.TINY, steps=1, zero_spread_warning=1.0), **large)
    assert not spread_warnings(caplog)


def test_one_sample_a_prompt_is_no_dead_signal_where_the_batch_is_compared(tmp_path, caplog):
    """A group of one has no spread, and with a baseline over the batch needs none; a step of equal rewards teaches nothing there either."""
    loss = LossConfig(baseline="batch_mean", advantage_scale="none")
    alone = dataclasses.replace(tiny.TINY, steps=21, num_samples=1, checkpoint_every=0, sample_every=0, loss=loss)
    tiny.run(tmp_path / "run", alone, reward=mixed)
    assert [r["zero_spread"] for r in records(tmp_path / "run")] == [0.0] * 21 and not spread_warnings(caplog)
    tiny.run(tmp_path / "dead", alone, reward=constant)
    (warning,) = spread_warnings(caplog)
    assert "step 20: 100% of the last 20 step(s) have equal rewards" in warning and "the step is too small" in warning


def test_one_noisy_step_is_not_warned_of_but_a_steady_state_is(tmp_path, caplog):
    """Steps of 4 groups: equal rewards in one step say nothing, in 16 steps (64 groups) they do."""
    short = dataclasses.replace(tiny.TINY, steps=18, checkpoint_every=0, sample_every=0)
    for noisy in (1, 18):  # before and after enough groups were seen
        rewards = iter([constant if step == noisy else mixed for step in range(1, 19)])
        tiny.run(tmp_path / f"noisy{noisy}", short, reward=lambda inputs, rewards=rewards: next(rewards)(inputs))
        assert [r["step"] for r in records(tmp_path / f"noisy{noisy}") if r["zero_spread"] == 1.0] == [noisy]
    assert not spread_warnings(caplog)
    tiny.run(tmp_path / "steady", short, reward=constant)
    (warning,) = spread_warnings(caplog)
    assert "step 16: 100% of the groups of the last 16 step(s) have" in warning


def test_policy_learns_and_evaluations_show_it(tmp_path):
    config = dataclasses.replace(
        tiny.TINY, steps=30, eval_every=15, eval_samples=4, eval_by=("level",), checkpoint_every=0, sample_every=0
    )
    data = tiny.prompts()
    data.rows[:] = [r | {"answer": "5"} for r in data.rows]
    _, summary = tiny.run(tmp_path / "run", config, data=data, evals={"train": data})
    evals = [r for r in records(tmp_path / "run") if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 15, 30]
    assert summary["evals"]["train"]["last_avg_at_k"] > summary["evals"]["train"]["first_avg_at_k"] + 0.3
    assert summary["reward_last"] > summary["reward_first"] + 0.2
    assert set(evals[-1]["by"]["level"]) == {"0", "1"}
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_inner_epochs_and_kl_are_used(tmp_path):
    twice = dataclasses.replace(tiny.TINY, steps=2, inner_epochs=2, loss=LossConfig(kl="k3", kl_coef=0.1))
    tiny.run(tmp_path / "run", twice)
    first, second = records(tmp_path / "run")
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6
    assert first["clip_share"] > 0 and abs(first["ratio"] - 1) > 1e-4 and first["logp_diff_max"] < 1e-5


CRITIC = LossConfig(aggregation="token_mean", baseline="value", advantage_scale="none", kl="k1", kl_coef=0.1, kl_place="token_reward")
PARTED = {"plain": {}, "reference": {"loss": LossConfig(kl="k3", kl_coef=0.1)}, "critic": {"loss": CRITIC}}


@pytest.mark.parametrize("case", PARTED)
def test_parts_of_a_rollout_are_updates_by_their_own_prompts(tmp_path, case):
    """Two steps and two epochs, against the loop written out: for each half of a rollout the batch of its prompts alone, old log-probabilities,
    values and KL by the policy that sampled."""
    config = dataclasses.replace(tiny.TINY, steps=2, inner_epochs=2, updates_per_epoch=2, checkpoint_every=0, **PARTED[case])
    trained, _ = tiny.run(tmp_path / "run", config)
    spec, one = step_spec(tiny.CONFIG, config), dataclasses.replace(config, updates_per_epoch=1)
    data, schedule, first = tiny.prompts(), ShuffledSchedule(12, 4, seed=3), tiny.params()
    state, logprobs, update = init_state(tiny.CONFIG, spec.optimizer, first, None, config.loss.critic), compiled_logprobs(spec), compiled_update(spec)
    for step in range(2):
        key, policy = jax.random.fold_in(jax.random.key(config.seed), step), trunk(state["params"])
        experience = collect(tiny.CONFIG, policy, tiny.Tokenizer(), data.take(schedule.batch(step)), tiny.reward, config, key)
        halves = [build_batch(joined([(experience, np.array(at))]), one) for at in ([0, 1], [2, 3])]
        for half in halves:
            half["old_logps"] = logprobs(policy, half)
            if case == "reference":
                half["ref_logps"] = logprobs(first, half)
            if case == "critic":
                half["kl"] = np.asarray(half["old_logps"]) - np.asarray(logprobs(first, half))
                half["values"] = compiled_values(spec)(state["params"], half)
        if case == "critic":  # advantages are centred over all tokens
            both = critic_targets(spec, jax.tree.map(lambda *parts: np.concatenate(parts), *halves))
            halves = [half | {name: x[i : i + 1] for name, x in both.items()} for i, half in enumerate(halves)]
        for half in halves * 2:
            state, _, _ = update(state, half, None)
    np.testing.assert_allclose(tiny.flat(trained), tiny.flat(trunk(state["params"])), rtol=1e-4, atol=1e-5)
    whole, _ = tiny.run(tmp_path / "whole", dataclasses.replace(one, inner_epochs=4))
    assert np.abs(tiny.flat(whole) - tiny.flat(trained)).max() > 1e-3
    record = records(tmp_path / "run")[0]
    assert record["logp_diff_max"] < 1e-5 and record["clip_share"] > 0 and abs(record["ratio"] - 1) > 1e-4


def test_advantages_are_those_of_the_whole_rollout():
    """With a deviation over the batch, and for a prompt whose samples are in two parts."""
    batch, prompts = tiny.prompts().take([0, 1, 0, 3]), tiny.TINY.num_samples
    config = dataclasses.replace(tiny.TINY, updates_per_epoch=4, loss=LossConfig(advantage_scale="batch_std"))
    made = collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, tiny.reward, config, jax.random.key(1))
    rewards = made.rewards_N.astype(np.float64)
    means = np.array([rewards[made.groups_N == group].mean() for group in made.groups_N])
    laid_out = build_batch(made, config)
    found = compiled_targets(step_spec(tiny.CONFIG, config))(laid_out | {"old_logps": laid_out["sampler_logps"] + 0.5})
    wanted = (rewards - means) / (np.sqrt(((rewards - means) ** 2).sum() / (len(rewards) - 1)) + 1e-4)
    np.testing.assert_allclose(np.asarray(found[0]["advantages"]), wanted.reshape(4, prompts), rtol=1e-5, atol=1e-6)
    assert np.abs(wanted).max() > 0.1 and [float(found[1][f"logp_diff_{name}"]) for name in ("mean", "max")] == pytest.approx([0.5, 0.5], rel=1e-5)


@pytest.mark.parametrize(("rows", "buckets"), [(4, 1), (2, 1), (2, 3)])
def test_micro_batches_train_the_same_policy(tmp_path, rows, buckets):
    whole, _ = tiny.run(tmp_path / "whole", dataclasses.replace(tiny.TINY, steps=1))
    parts, _ = tiny.run(tmp_path / "parts", dataclasses.replace(tiny.TINY, steps=1, micro_batch_rows=rows, length_buckets=buckets))
    np.testing.assert_allclose(tiny.flat(parts), tiny.flat(whole), rtol=1e-4, atol=1e-5)


def test_prompt_too_long_for_the_context_is_named(tmp_path):
    with pytest.raises(UserError, match="prompt p.* has 7 tokens.*context of 32"):
        tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, max_new_tokens=30))


def test_full_disk_while_logging_leaves_the_run_resumable(undisturbed, tmp_path, monkeypatch):
    _, params, _ = undisturbed
    log = RunDir.log

    def full_at_step_3(self, record):
        if record["step"] == 3:
            raise UserError("cannot write metrics.jsonl: the disk is full")
        log(self, record)

    monkeypatch.setattr(RunDir, "log", full_at_step_3)
    with pytest.raises(UserError, match="disk is full"):
        tiny.run(tmp_path / "run", schedule=LearningSchedule())
    monkeypatch.undo()
    resumed, _ = tiny.run(tmp_path / "run", schedule=LearningSchedule())
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(params))


MESHES = """
import sys; sys.path.insert(0, "tests/train")
import dataclasses, jax, numpy as np, models.sharding
import tiny_grpo as tiny
from jaxrl_llm.train import evaluate, loop
from jaxrl_llm.train.config import LoraSettings
sampled = []
def watched(collect):
    def call(model, params, *given, **how):
        sampled.append(params["blocks"]["q"])
        return collect(model, params, *given, **how)
    return call
loop.collect, loop.evaluate = watched(loop.collect), watched(loop.evaluate)

class Seen(tiny.ShuffledSchedule):
    def see_policy(self, step, policy):
        sampled.append(policy["blocks"]["q"])

for adapter in (LoraSettings(), LoraSettings(rank=2)):
    config, found = dataclasses.replace(tiny.TINY, steps=2, lora=adapter, eval_every=2, updates_per_epoch=2 if adapter.rank else 1), []
    for how in ("", "data=2,tensor=4"):
        mesh = models.sharding.make_mesh({"fsdp": 8}) if how else None
        changed = dataclasses.replace(config, rollout_mesh=how)
        sampled.clear()
        schedule, evals = Seen(len(tiny.prompts()), 4, seed=3), {"held_out": tiny.prompts(8)}
        folder = f"{sys.argv[1]}/{adapter.rank}{bool(how)}"
        trained, _ = tiny.run(folder, changed, mesh=mesh, schedule=schedule, evals=evals)
        found.append(tiny.flat(models.adapted.merged(trained)))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    # At the start an evaluation, then twice the schedule's look and a rollout, and an evaluation.
    lie = [models.adapted.base_of(q).sharding for q in sampled]
    spread = [tuple(name for name in at.spec if name and at.mesh.shape[name] > 1) for at in lie]
    assert spread == [("tensor",), ("fsdp",), ("tensor",), ("fsdp",), ("tensor",), ("tensor",)], spread
    q = models.adapted.base_of(trained["blocks"]["q"])
    assert "fsdp" in q.sharding.spec  # what is returned lies as in training
print("equal")
"""


def test_sampling_on_another_mesh_of_the_same_devices_trains_the_same(run_python, tmp_path):
    assert "equal" in run_python(MESHES, (str(tmp_path),), devices=8)


def test_a_mesh_for_sampling_needs_one_for_training(tmp_path):
    with pytest.raises(UserError, match="'rollout_mesh' is 'tensor=2', but there is no mesh to use otherwise"):
        tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, rollout_mesh="tensor=2"))
