"""DAPO's dynamic sampling: which groups are replaced, by what, how it is counted, and that a run that is stopped ends as one that is not."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import tiny_grpo as tiny

import models
from jaxrl_llm.curation.trainability import TrainabilityBand
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.rewards.verdict import Status, Verdict, reward_values
from jaxrl_llm.train.config import LossConfig
from jaxrl_llm.train.resample import fill, joined, mixed_groups
from jaxrl_llm.train.rollout import Experience, build_batch
from jaxrl_llm.train.signals import Interrupted

S, PROMPTS = tiny.TINY.num_samples, 4
TRIES = dataclasses.replace(tiny.TINY, rollout_tries=3)
TIMES = ("seconds_schedule", "seconds_rollout", "seconds_reward", "seconds_update", "tokens_per_s", "seconds")
OUTCOMES = {"p": Verdict(Status.PASS), "f": Verdict(Status.FAIL), "e": Verdict(Status.ERROR)}


def experience(rows, outcomes, width=3, first_token=0):
    """Completions of prompts `rows`; outcomes: a word a prompt, a letter a sample. Tokens are numbered from first_token on."""
    prompts, count = tiny.prompts().take(rows), sum(map(len, outcomes))
    verdicts = [OUTCOMES[letter] for word in outcomes for letter in word]
    of_prompt = np.repeat(np.arange(len(rows)), [len(word) for word in outcomes])
    rewards_N, valid_N = reward_values(verdicts)
    rollout = models.Rollout(
        prompt_tokens_NT=prompts.tokens_NT[of_prompt], prompt_lengths_N=prompts.lengths_N[of_prompt],
        completion_tokens_NT=first_token + np.arange(count * width).reshape(count, width), completion_lengths_N=np.full(count, width),
        logps_NT=np.zeros((count, width), np.float32), group_ids_N=of_prompt, finish_reason_N=np.zeros(count, int),
    )  # fmt: skip
    texts = [f"{prompts.ids[p]}:{i}" for i, p in enumerate(of_prompt)]
    return Experience(prompts, rollout, texts, verdicts, rewards_N, valid_N, valid_N, of_prompt.astype(np.int32), 1.0, 2.0)


def test_a_group_is_mixed_by_its_verdicts_alone():
    made = experience([0, 1, 2, 3, 4], ["pf", "pp", "pe", "ee", "fpe"])
    assert mixed_groups(made).tolist() == [True, False, False, False, True]
    penalised = dataclasses.replace(made, rewards_N=made.rewards_N - np.arange(len(made.rewards_N)))
    assert mixed_groups(penalised).tolist() == mixed_groups(made).tolist()
    learnt_N = made.valid_N & (np.arange(len(made.valid_N)) > 0)  # the first group's "p" was cut off, and masked
    assert mixed_groups(dataclasses.replace(made, learnt_N=learnt_N)).tolist() == [False, False, False, False, True]


def filled(*batches, tries=9):
    asked = []

    def draw(attempt):
        asked.append(attempt)
        return experience(*batches[attempt])

    found = fill(draw, tries)
    assert asked == list(range(found.counts["rollouts"]))
    return found


def test_flat_groups_give_way_to_the_next_mixed_ones():
    found = filled(([0, 1, 2], ["pf", "pp", "fp"]), ([3, 4, 5], ["ff", "fp", "pf"]))
    assert [(number, at.tolist()) for number, at in found.trained] == [(0, [0, 2]), (1, [1])]
    assert found.counts == {"rollouts": 2, "flat_groups": 2, "surplus_groups": 1, "unfilled_groups": 0}
    assert found.experience().prompts.ids == ["p0", "p2", "p4"] and mixed_groups(found.experience()).all()
    assert found.everything().prompts.ids == [f"p{i}" for i in range(6)]


def test_a_full_batch_is_rolled_out_once_and_left_as_it_is():
    found = filled(([0, 1], ["pf", "fp"]))
    assert found.counts == {"rollouts": 1, "flat_groups": 0, "surplus_groups": 0, "unfilled_groups": 0}
    assert found.experience() is found.everything() is found.rollouts[0]


def test_when_the_tries_are_spent_flat_groups_fill_the_batch_in_its_order():
    found = filled(([0, 1, 2], ["pp", "pf", "ff"]), ([3, 4, 5], ["ff", "ff", "fp"]), tries=2)
    assert [(number, at.tolist()) for number, at in found.trained] == [(0, [0, 1]), (1, [2])]
    assert found.counts == {"rollouts": 2, "flat_groups": 4, "surplus_groups": 0, "unfilled_groups": 1}


def test_no_prompt_is_taken_twice():
    found = filled(([0, 1], ["pf", "pp"]), ([0, 2], ["fp", "pf"]))
    assert found.experience().prompts.ids == ["p0", "p2"] and found.counts["surplus_groups"] == 1


def test_joined_keeps_every_row_with_its_prompt():
    """Of rollouts of different widths, prompts in the order asked for; a prompt of two rollouts is one group."""
    one, other = experience([0, 1, 2], ["pf", "ppf", "fp"]), experience([3, 0], ["pf", "fp"], width=5, first_token=100)
    both = joined([(one, np.array([1, 2])), (other, np.array([0, 1])), (one, np.array([0]))])
    assert both.prompts.ids == ["p1", "p2", "p3", "p0", "p0"]
    assert both.texts == ["p1:2", "p1:3", "p1:4", "p2:5", "p2:6", "p3:0", "p3:1", "p0:2", "p0:3", "p0:0", "p0:1"]
    assert both.rollout.group_ids_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert both.groups_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    for i, text in enumerate(both.texts):
        name, number = text.split(":")
        assert both.prompts.ids[both.rollout.group_ids_N[i]] == name
        width, start = (5, 100) if i in (5, 6, 7, 8) else (3, 0)
        want = start + width * int(number) + np.arange(width)
        assert both.rollout.completion_tokens_NT[i].tolist() == [*want, *[0] * (5 - width)] and both.rollout.completion_lengths_N[i] == width
    assert [v.status.name[0].lower() for v in both.verdicts] == list("ppffppffppf")
    assert both.rewards_N.tolist() == reward_values(both.verdicts)[0].tolist() and both.valid_N.all()
    assert both.seconds_rollout == 3.0 and both.seconds_reward == 6.0


# --- in the loop -----------------------------------------------------------------------------------------------------


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in lines]


class Recorder:
    """The tiny reward, which writes down what it was asked and found; it may send a signal at a call, or raise."""

    def __init__(self, stop_at=None, signum=None):
        self.calls, self.stop_at, self.signum = [], stop_at, signum

    def __call__(self, inputs):
        verdicts = tiny.reward(inputs)
        self.calls.append((inputs, np.array([v.status is Status.PASS for v in verdicts]).reshape(-1, S)))
        if len(self.calls) == self.stop_at:
            if self.signum is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.signum)
        return verdicts


class Watched(TrainabilityBand):
    """The schedule that follows the policy; it writes down what it is told."""

    def __init__(self, **options):
        prior = np.linspace(0.3, 0.6, 12)
        super().__init__(prior, np.eye(12, dtype=np.float32)[:, :3], PROMPTS, seed=1, samples_per_prompt=S, **options)
        self.told = []

    def observe(self, step, indices, pass_rates):
        self.told.append((step, list(indices), list(pass_rates)))
        super().observe(step, indices, pass_rates)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, schedule, reward = tmp_path_factory.mktemp("resample") / "run", Watched(), Recorder()
    params, _ = tiny.run(folder, TRIES, schedule=schedule, reward=reward)
    return folder, params, schedule, reward


def test_the_batch_is_filled_from_the_schedule_and_all_is_counted_and_observed(undisturbed):
    folder, _, schedule, reward = undisturbed
    found, told, calls = records(folder), list(schedule.told), list(reward.calls)
    assert [step for step, _, _ in told] == list(range(len(told))) and len(calls) == len(told) == sum(r["rollouts"] for r in found)
    assert any(r["rollouts"] > 1 and r["unfilled_groups"] == 0 for r in found)
    for record in found:
        rolled, mixed, passed = [], [], []
        for _ in range(record["rollouts"]):
            (_, rows, rates), (_, verdicts) = told.pop(0), calls.pop(0)
            np.testing.assert_allclose(rates, verdicts.mean(1))
            rolled += rows
            passed.append(verdicts)
            fresh = [i for i, row in enumerate(rows) if 0 < verdicts[i].sum() < S and row not in mixed]
            mixed += [rows[i] for i in fresh][: PROMPTS - len(mixed)]
        assert record["rows_rolled"] == rolled and len(record["rows"]) == PROMPTS == len(set(record["rows"]))
        assert set(mixed) <= set(record["rows"]) and record["unfilled_groups"] == PROMPTS - len(mixed)
        assert record["rollouts"] == TRIES.rollout_tries or record["unfilled_groups"] == 0
        passed = np.concatenate(passed)
        flat = np.isin(passed.sum(1), (0, S))
        assert record["flat_groups"] == flat.sum() and record["surplus_groups"] == (~flat).sum() - len(mixed)
        assert record["pass_rate"] == pytest.approx(passed.mean())  # of all that was rolled out, not of what was chosen for its spread


@pytest.mark.parametrize("signum", [signal.SIGTERM, None])
def test_a_run_stopped_within_a_step_of_several_rollouts_resumes_bit_for_bit(undisturbed, tmp_path, signum):
    folder, params, schedule, _ = undisturbed
    # The second rollout of the first step past the first checkpoint that has one.
    before = np.cumsum([0] + [r["rollouts"] for r in records(folder)])
    at = next(int(before[i]) + 2 for i, r in enumerate(records(folder)) if i >= 1 and r["rollouts"] > 1)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        tiny.run(tmp_path / "run", TRIES, schedule=Watched(), reward=Recorder(at, signum))
    again = Watched()
    resumed, _ = tiny.run(tmp_path / "run", TRIES, schedule=again)
    assert again.told == schedule.told[-len(again.told) :] and len(again.told) < len(schedule.told)
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(params))
    assert records(tmp_path / "run") == records(folder)


def test_a_run_that_goes_on_without_resampling_keeps_its_place(tmp_path):
    """In the schedule, of which it took more batches than it made steps: however often it is stopped."""

    def run(name, *steps):
        for number, tries in steps:
            tiny.run(tmp_path / name, dataclasses.replace(TRIES, steps=number, rollout_tries=tries), schedule=Watched())
        return records(tmp_path / name)

    assert run("often", (2, 3), (3, 1), (4, 1)) == (found := run("once", (2, 3), (4, 1)))
    assert sum(record.get("rollouts", 0) for record in found) > 2


def test_the_first_rollout_is_that_of_a_run_without_resampling_and_the_next_has_other_randomness(undisturbed, tmp_path):
    """With four prompts each batch is all of them: what differs between rollouts is the randomness."""
    short = dataclasses.replace(TRIES, steps=1)
    answers = {}
    for name, config in (("plain", dataclasses.replace(short, rollout_tries=1)), ("tries", short)):
        reward = Recorder()
        tiny.run(tmp_path / name, config, data=tiny.prompts(PROMPTS), schedule=ShuffledSchedule(PROMPTS, PROMPTS, seed=3), reward=reward)
        answers[name] = [sorted((i.prompt, i.response) for i in inputs) for inputs, _ in reward.calls]
    assert answers["plain"] == answers["tries"][:1]
    assert len(answers["tries"]) > 1 and len({str(texts) for texts in answers["tries"]}) == len(answers["tries"])
    assert "rollouts" not in records(tmp_path / "plain")[0]


def test_where_nothing_is_mixed_the_tries_end_and_nothing_is_learnt(tmp_path):
    config = dataclasses.replace(TRIES, steps=2)
    trained, _ = tiny.run(tmp_path / "run", config, reward=lambda inputs: [Verdict(Status.FAIL)] * len(inputs))
    for record in records(tmp_path / "run"):
        assert (record["rollouts"], record["flat_groups"], record["unfilled_groups"]) == (3, 3 * PROMPTS, PROMPTS)
        assert record["rows"] == record["rows_rolled"][:PROMPTS] and record["loss"] == 0 and record["zero_spread"] == 1
    np.testing.assert_array_equal(tiny.flat(trained), tiny.flat(tiny.params()))


def test_rows_are_judged_anew_by_training_steps_whatever_they_roll_out(tmp_path):
    """Every second step, of three rollouts each: the policy is the same for all of a step's batches."""
    after = []  # batches that the schedule had given when it asked

    def refilter(params):
        after.append(len(schedule.told))
        return np.ones(12, bool)

    schedule = Watched(refilter=refilter, refilter_every=2)
    tiny.run(tmp_path / "run", dataclasses.replace(TRIES, steps=5), schedule=schedule, reward=lambda inputs: [Verdict(Status.FAIL)] * len(inputs))
    assert len(schedule.told) == 15 and after == [6, 12]


def test_resampled_batches_have_one_shape_of_prompts(undisturbed):
    """Prompts of several rollouts make whole groups: each is forwarded once."""
    found = filled(([0, 1, 2], ["pf", "pp", "fp"]), ([3, 4, 5], ["ff", "fp", "pf"])).experience()
    batch = build_batch(found, dataclasses.replace(tiny.TINY, num_samples=2))
    assert batch["prompts"].shape[:2] == (1, 3) and batch["completions"].shape[:2] == (1, 6)
    assert batch["group_ids"].tolist() == [[0, 0, 1, 1, 2, 2]]


FAMILY = {
    "rloo": LossConfig(baseline="leave_one_out", advantage_scale="none", aggregation="dr_grpo", kl="k1", kl_coef=0.05, kl_place="sequence_reward"),
    "reinforce_pp": LossConfig(baseline="batch_mean", advantage_scale="batch_std", kl="k1", kl_coef=0.01, kl_place="token_reward"),
    "gspo": LossConfig(ratio="sequence", aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": LossConfig(surrogate="cispo", clip_low=1.0, clip_high=4.0, mismatch="token"),
    "ppo": LossConfig(baseline="value", advantage_scale="batch_std", kl="k1", kl_coef=0.01, kl_place="token_reward"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_of_the_family_trains_resumes_and_learns(tmp_path, name):
    """Over two inner epochs: KL in the reward is 0 at the start and then grows, the reward rises, a second start goes on exactly."""
    config = dataclasses.replace(TRIES, steps=12, inner_epochs=2, loss=FAMILY[name], checkpoint_every=6, sample_every=0)
    data = tiny.prompts()
    data.rows[:] = [row | {"answer": "5"} for row in data.rows]
    whole, summary = tiny.run(tmp_path / "whole", config, data=data)
    found = records(tmp_path / "whole")
    assert np.mean([r["pass_rate"] for r in found[-4:]]) > np.mean([r["pass_rate"] for r in found[:2]]) + 0.15
    if FAMILY[name].kl:
        assert found[0]["kl"] == pytest.approx(0, abs=1e-5) and abs(found[-1]["kl"]) > 1e-4
    if FAMILY[name].mismatch:
        assert found[-1]["mismatch_weight"] == pytest.approx(1, abs=1e-4) and found[-1]["mismatch_share"] == 0
    assert found[0]["ratio"] != 1
    with pytest.raises(Interrupted):
        tiny.run(tmp_path / "parts", config, data=data, reward=Recorder(7, signal.SIGTERM))
    parts, _ = tiny.run(tmp_path / "parts", config, data=data)
    np.testing.assert_array_equal(tiny.flat(parts), tiny.flat(whole))
    assert records(tmp_path / "parts") == found
