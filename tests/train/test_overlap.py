"""Rewards beside the next rollout: one step late and not otherwise, exact over stops, truly at the same time."""

import dataclasses
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs
from test_grpo_loop import LearningSchedule

import jaxrl_llm.train.rollout as rollout_module
import models
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.curation.trainability import TrainabilityBand
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.errors import UserError
from jaxrl_llm.train import overlap
from jaxrl_llm.train.checks import check_grpo
from jaxrl_llm.train.config import GRPOConfig, LoraSettings, LossConfig
from jaxrl_llm.train.online_dpo import pair_batch, pick_pairs
from jaxrl_llm.train.preference_step import compiled_sums, preference_spec
from jaxrl_llm.train.preference_step import compiled_update as compiled_pair_update
from jaxrl_llm.train.rollout import build_batch, collect
from jaxrl_llm.train.signals import Interrupted
from jaxrl_llm.train.state import init_state, policy_params
from jaxrl_llm.train.step import compiled_kl, compiled_logprobs, compiled_update, compiled_values, completion_mask, step_spec
from models import lora

LATE = dataclasses.replace(tiny.TINY, overlap_rewards=True)
PRICED = LossConfig(kl="k1", kl_coef=0.1, kl_place="sequence_reward")
CRITIC = LossConfig(baseline="value", advantage_scale="batch_std")


def records(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if "second" not in k and k != "tokens_per_s"} for record in lines if record["kind"] == kind]


def by_hand(config):
    """(final parameters, experience of each step, mean ratio of each step's first update): the loop written out, with nothing at the same time."""
    spec, data, schedule = step_spec(tiny.CONFIG, config), tiny.prompts(), ShuffledSchedule(12, 4, seed=3)
    critic, late = config.loss.critic, config.overlap_rewards
    state = init_state(tiny.CONFIG, spec.optimizer, tiny.params(), None, critic)
    update, experiences, ratios = compiled_update(spec), [], []

    def roll(step):
        policy, key = policy_params(tiny.CONFIG, state["params"], None, None), jax.random.fold_in(jax.random.key(config.seed), step)
        plain = dataclasses.replace(config, overlap_rewards=False)
        return collect(tiny.CONFIG, policy, tiny.Tokenizer(), data.take(schedule.batch(step)), tiny.reward, plain, key)

    for step in range(config.steps):
        if step == 0 or not late:
            experiences.append(roll(step))
        if late and step + 1 < config.steps:
            experiences.append(roll(step + 1))  # before the update: by the same policy as the one that the update begins with
        batch = build_batch(experiences[step], config)
        logps = np.asarray(compiled_logprobs(spec)(state["params"], batch)) if not critic else None
        if logps is not None and late:
            mask = np.asarray(completion_mask(batch))
            ratios.append(np.exp(np.float64(logps) - batch["sampler_logps"])[mask].mean())
        if config.loss.kl_place != "loss":
            reference = compiled_logprobs(spec)(tiny.params(), batch)
            batch["kl"] = batch["sampler_logps"] - np.asarray(reference) if late else compiled_kl(spec)(state["params"], tiny.params(), batch)
        if critic:
            batch["values"] = compiled_values(spec)(state["params"], batch)
        if late:
            batch["old_logps"] = batch["sampler_logps"]
        for epoch in range(config.inner_epochs):
            state, _, found = update(state, batch, None)
            if not late and epoch == 0 and config.inner_epochs > 1:
                batch["old_logps"] = found
    return policy_params(tiny.CONFIG, state["params"], None, None), experiences, ratios


CASES = {"plain": {}, "two epochs": {"inner_epochs": 2}, "priced": {"loss": PRICED}, "critic": {"loss": CRITIC}}


@pytest.mark.parametrize("late", [True, False], ids=["late", "off"])
@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_the_one_written_out(tmp_path, case, late):
    config = dataclasses.replace(tiny.TINY, overlap_rewards=late, **CASES[case])
    trained, _ = tiny.run(tmp_path / "run", config)
    wanted, experiences, ratios = by_hand(config)
    found = records(tmp_path / "run")
    assert [record["reward"] for record in found] == [pytest.approx(float(e.rewards_N.mean()), rel=1e-6) for e in experiences]
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(wanted))
    if late and case == "plain":
        assert [record["ratio"] for record in found] == pytest.approx(ratios, rel=1e-5)
        assert abs(ratios[0] - 1) < 1e-5 and min(abs(ratio - 1) for ratio in ratios[1:]) > 1e-4
    if late:
        other, _ = tiny.run(tmp_path / "other", dataclasses.replace(config, overlap_rewards=False))
        assert np.abs(tiny.flat(other) - tiny.flat(trained)).max() > 1e-4
        assert records(tmp_path / "other")[0]["reward"] == found[0]["reward"], "the first two steps are of one policy"


def test_online_dpo_is_one_step_late_too(tmp_path):
    config = dataclasses.replace(prefs.ONLINE, overlap_rewards=True)
    trained, _ = prefs.train_online(tmp_path / "run", config)
    spec, data, schedule = preference_spec(prefs.CONFIG, config), tiny.prompts(), ShuffledSchedule(12, 4, seed=3)
    state, experiences = init_state(prefs.CONFIG, spec.optimizer, prefs.params()), []

    def roll(step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        return collect(prefs.CONFIG, state["params"], tiny.Tokenizer(), data.take(schedule.batch(step)), tiny.reward, config, key)

    for step in range(config.steps):
        experiences += [roll(s) for s in ([0, 1] if step == 0 else [step + 1] if step + 1 < config.steps else [])]
        made = experiences[step]
        pairs, _ = pick_pairs(made.rewards_N, made.valid_N, made.groups_N)
        batch = pair_batch(made, pairs, config)
        batch["ref_sums"] = compiled_sums(spec)(prefs.params(), batch)
        state, _ = compiled_pair_update(spec)(state, batch, None)
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(state["params"]))
    other, _ = prefs.train_online(tmp_path / "other", prefs.ONLINE)
    assert np.abs(tiny.flat(other) - tiny.flat(trained)).max() > 1e-4


# -------------------------------------------------------------------------------------------------- at the same time


class Meeting:
    """Step t's reward and step t + 1's sampling begin only when both are there."""

    def __init__(self, steps, patience):
        self.barrier, self.steps, self.patience = threading.Barrier(2), steps, patience
        self.judged = self.sampled = 0
        self.threads = set()

    def reward(self, inputs):
        self.judged += 1
        self.threads.add(threading.current_thread())
        if self.judged < self.steps:
            self.barrier.wait(self.patience)
        return tiny.reward(inputs)

    def generate(self, real):
        def call(*given, **how):
            self.sampled += 1
            if self.sampled > 1:
                self.barrier.wait(self.patience)
            return real(*given, **how)

        return call


def test_judging_and_sampling_are_under_way_together(tmp_path, monkeypatch):
    meeting, real = Meeting(4, 120), models.generate
    monkeypatch.setattr(rollout_module.models, "generate", meeting.generate(real))
    trained, _ = tiny.run(tmp_path / "met", LATE, reward=meeting.reward)
    assert meeting.judged == meeting.sampled == 4 and threading.main_thread() not in meeting.threads
    monkeypatch.undo()
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(tiny.run(tmp_path / "run", LATE)[0]))
    assert all(record["errors"] == 0 for record in records(tmp_path / "met"))
    meeting = Meeting(4, 0.1)
    monkeypatch.setattr(rollout_module.models, "generate", meeting.generate(real))
    with pytest.raises(threading.BrokenBarrierError):  # one after the other they never meet
        tiny.run(tmp_path / "off", tiny.TINY, reward=meeting.reward)


def test_a_reward_that_raises_gives_errors_and_training_goes_on(tmp_path):
    calls = []

    def reward(inputs):
        calls.append(1)
        if len(calls) == 2 or len(inputs) == 1:  # of the second step, together and one by one
            raise ValueError("no judge")
        return tiny.reward(inputs)

    tiny.run(tmp_path / "run", LATE, reward=reward)
    assert [record["errors"] for record in records(tmp_path / "run")] == [0, 16, 0, 0]


def test_where_the_seconds_went_is_told(tmp_path):
    _, summary = tiny.run(tmp_path / "run", LATE)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        parts = [line[f"seconds_{name}"] for name in ("rollout", "reward_waited", "update", "schedule")]
        assert min(parts) >= 0 and sum(parts) <= line["seconds"] and line["seconds_reward"] > 0
    assert lines[-1]["seconds_rollout"] < lines[0]["seconds_rollout"], "the last step samples nothing, the first twice"
    assert summary["seconds"].keys() == {"rollout", "reward", "update", "reward_waited"}
    _, summary = tiny.run(tmp_path / "off")
    assert summary["seconds"].keys() == {"rollout", "reward", "update"}
    assert "seconds_reward_waited" not in (tmp_path / "off" / "metrics.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------------- stopped


class Stops:
    """The tiny reward; its call `at` sends a signal to the process, or ends as a crash does."""

    def __init__(self, at, signum=None):
        self.calls, self.at, self.signum = 0, at, signum

    def __call__(self, inputs):
        self.calls += 1
        if self.calls == self.at:
            if self.signum is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.signum)
        return tiny.reward(inputs)


class Told(LearningSchedule):
    """One whose batches depend on what it observed; it writes down in which order it is asked and told."""

    def __init__(self):
        super().__init__()
        self.log = []

    def batch(self, step):
        self.log.append(("batch", step))
        return super().batch(step)

    def observe(self, step, indices, pass_rates):
        self.log.append(("observe", step))
        super().observe(step, indices, pass_rates)


WHOLE = dataclasses.replace(LATE, steps=6, inner_epochs=2, eval_every=2, checkpoint_every=2, stop_strings=("5",))


def grpo(folder, config=WHOLE, **given):
    return tiny.run(folder, config, schedule=given.pop("schedule", None) or Told(), evals={"held_out": tiny.prompts(6, seed=1)}, **given)


def online(folder, config=None, **given):
    config = config or dataclasses.replace(prefs.ONLINE, steps=6, eval_every=2, checkpoint_every=2, overlap_rewards=True)
    return prefs.train_online(folder, config, schedule=given.pop("schedule", None) or Told(), evals={"held_out": tiny.prompts(6, seed=1)}, **given)


@pytest.fixture(scope="module", params=[grpo, online])
def undisturbed(request, tmp_path_factory):
    folder, schedule = tmp_path_factory.mktemp("undisturbed") / "run", Told()
    trained, _ = request.param(folder, schedule=schedule)
    return request.param, folder, trained, schedule


def test_a_batch_is_asked_for_before_the_step_before_is_told(undisturbed):
    log = undisturbed[3].log
    middle = [event for step in range(1, 6) for event in (("batch", step), ("observe", step - 1))]
    assert log == [("batch", 0), *middle, ("observe", 5)]


@pytest.mark.parametrize(("at", "signum"), [(4, signal.SIGTERM), (8, None)], ids=["told to stop", "crashed"])
def test_a_stopped_run_ends_bit_for_bit_as_an_undisturbed_one(undisturbed, tmp_path, at, signum):
    """Calls of the reward: the evaluation before the first step, two steps, an evaluation, and so on."""
    run, folder, params, whole = undisturbed
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        run(tmp_path / "run", reward=Stops(at, signum))
    done = len(records(tmp_path / "run"))
    assert 0 < done < 6
    schedule = Told()
    resumed, _ = run(tmp_path / "run", schedule=schedule)
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(params))
    for kind in ("train", "eval"):
        assert records(tmp_path / "run", kind) == records(folder, kind)
    assert schedule.log == whole.log[-len(schedule.log) :], "the batch that was in flight is not drawn again"


BESIDE = {
    "an adapter": {"lora": LoraSettings(rank=2, targets=("blocks.q", "blocks.down"))},
    "places filled again": {"rollout_refill": True, "rollout_rows": 6},
    "the best checkpoint": {"keep_best": "held_out", "keep_checkpoints": 1},
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_stopped_run_ends_as_an_undisturbed_one_also_with(name, tmp_path):
    config = dataclasses.replace(WHOLE, inner_epochs=1, **BESIDE[name])
    trained, _ = grpo(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path / "run", config, reward=Stops(8))
    assert 0 < len(records(tmp_path / "run")) < 6
    resumed, _ = grpo(tmp_path / "run", config)
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(trained))
    for kind in ("train", "eval"):
        assert records(tmp_path / "run", kind) == records(tmp_path / "whole", kind)
    kept = [sorted(path.name for path in (tmp_path / folder / "checkpoints").iterdir()) for folder in ("run", "whole")]
    assert kept[0] == kept[1]
    if name == "the best checkpoint":
        accuracy = {record["step"]: record["accuracy"] for record in records(tmp_path / "whole", "eval")}
        print(accuracy, kept)
    if name == "an adapter":
        assert lora.adapter_of(resumed)


def test_a_checkpoint_holds_what_waits_to_be_judged_and_no_more(tmp_path, monkeypatch):
    """After the last step nothing waits; a run that goes on without overlap samples its next step as it is, and drops what waited."""
    saved, save = {}, Checkpoints.save

    def watched(self, step, state, host):
        saved[step] = {name for name in host if name != "shift"}
        save(self, step, state, host)

    monkeypatch.setattr(Checkpoints, "save", watched)
    config = dataclasses.replace(LATE, steps=3, keep_checkpoints=3)
    tiny.run(tmp_path / "run", config, schedule=LearningSchedule())
    waits = {overlap.AHEAD + name for name in (*overlap.ROLLOUT, "rows")}
    assert saved == {1: waits, 2: waits, 3: set()}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    saved.clear()
    tiny.run(tmp_path / "run", dataclasses.replace(config, overlap_rewards=False), schedule=LearningSchedule())
    assert saved == {2: set(), 3: set()} and [abs(r["ratio"] - 1) < 1e-5 for r in records(tmp_path / "run")] == [True] * 3


def test_a_finished_run_that_is_given_more_steps_samples_the_next_one_anew(tmp_path):
    tiny.run(tmp_path / "run", dataclasses.replace(LATE, steps=2))
    tiny.run(tmp_path / "run", LATE)
    first, second, third, fourth = records(tmp_path / "run")
    assert abs(third["ratio"] - 1) < 1e-5 and abs(second["ratio"] - 1) > 1e-4 and abs(fourth["ratio"] - 1) > 1e-4


# ----------------------------------------------------------------------------------------------------------- refused


def test_what_needs_the_verdicts_first_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'overlap_rewards' is True and 'rollout_tries' 2: .* set rollout_tries=1"):
        check_grpo(GRPOConfig(overlap_rewards=True, rollout_tries=2))
    with pytest.raises(UserError, match="'loss.mismatch' is 'token'.*set it to None, or overlap_rewards=False"):
        check_grpo(GRPOConfig(overlap_rewards=True, loss=LossConfig(mismatch="token")))
    check_grpo(GRPOConfig(overlap_rewards=True))
    band = TrainabilityBand(np.full(12, 0.5), None, 4)
    with pytest.raises(UserError, match="'overlap_rewards' is True with a schedule that follows the policy"):
        tiny.run(tmp_path / "run", LATE, schedule=band)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="'overlap_rewards' is True with 2 processes"):
        overlap.check_overlap(ShuffledSchedule(12, 4, seed=3))
