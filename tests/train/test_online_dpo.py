"""Online DPO: pairs by hand, the batch, the loop with its resume, learning, and the golden curve."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.train.checks import check_online_dpo
from jaxrl_llm.train.config import OnlineDPOConfig, from_mapping
from jaxrl_llm.train.online_dpo import pair_batch, pick_pairs
from jaxrl_llm.train.rollout import collect
from jaxrl_llm.train.signals import Interrupted


def records(folder, kind="train"):
    return [r for line in (folder / "metrics.jsonl").read_text().splitlines() if (r := json.loads(line))["kind"] == kind]


def test_pairs_by_hand():
    rewards = np.array([0.2, 0.9, 0.9, 0.1, 0.5, 0.5, 9.0, 0.3])
    groups = np.array([0, 1, 0, 1, 2, 2, 1, 3])
    valid = np.array([1, 1, 1, 1, 1, 1, 0, 1], bool)
    pairs, tied = pick_pairs(rewards, valid, groups)
    # Group 0: rows 2 over 0; group 1: rows 1 over 3, row 6 has no verdict; group 2 is tied; group 3 has one row.
    assert pairs.tolist() == [[2, 0], [1, 3]] and tied == 1
    assert pick_pairs(rewards, valid & False, groups)[0].shape == (0, 2)
    assert pick_pairs(np.array([1.0, 1.0, 0.0, 0.0]), np.ones(4, bool), np.zeros(4, int))[0].tolist() == [[0, 2]]  # the first of equals


def test_the_same_pairs_whatever_the_order_of_rows():
    rng = np.random.default_rng(0)
    rewards, groups, valid = rng.normal(size=24), np.repeat(np.arange(6), 4), rng.random(24) > 0.2
    order = rng.permutation(24)
    pairs, tied = pick_pairs(rewards, valid, groups)
    moved, tied_moved = pick_pairs(rewards[order], valid[order], groups[order])
    assert order[moved].tolist() == pairs.tolist() and tied == tied_moved


def experience(reward, ids=None, config=prefs.ONLINE):
    batch = tiny.prompts().take([0, 1, 2])
    if ids:
        batch.ids[:] = ids
    return collect(prefs.CONFIG, prefs.params(), tiny.Tokenizer(), batch, reward, config, jax.random.key(1))


def by_position(scores):
    """Scores by row; None is an error."""
    return lambda inputs: [Verdict(Status.ERROR) if s is None else Verdict(Status.FAIL, score=s) for s in scores]


def test_batch_holds_the_best_and_the_worst_of_each_prompt_and_padding():
    made = experience(by_position([0.1, 0.5, None, 0.9, 0.3, 0.3, 0.3, 0.3, 0.0, 0.7, 0.2, None]))
    pairs, tied = pick_pairs(made.rewards_N, made.valid_N, made.groups_N)
    assert pairs.tolist() == [[3, 0], [9, 8]] and tied == 1
    batch = pair_batch(made, pairs, prefs.ONLINE)
    completions, prompts = made.rollout.completions(), made.prompts.token_lists()
    assert batch["prompts"].shape[0] == 1 and batch["prompts"].shape[1] == 3  # one shape, whatever is tied
    for slot, row in enumerate([3, 0, 9, 8]):
        length = len(completions[row])
        assert batch["completions"][0, slot, :length].tolist() == completions[row] and batch["lengths"][0, slot] == length
        np.testing.assert_array_equal(batch["sampler_logps"][0, slot, :length], made.rollout.logps_NT[row, :length])
    assert batch["lengths"][0, 4:].tolist() == [0, 0]
    assert batch["prompts"][0, 1, : len(prompts[2])].tolist() == prompts[2]
    micro = pair_batch(made, pairs, dataclasses.replace(prefs.ONLINE, micro_batch_rows=1), multiple=2)
    assert micro["completions"].shape[:2] == (2, 4)


def test_long_completions_lose_reward_before_pairs_are_made():
    """Of equal rewards the shorter completion is chosen; all of one length are tied, as without the penalty all are."""
    same, longest = by_position([0.5] * 12), prefs.ONLINE.max_new_tokens
    plain = experience(same)
    made = experience(same, config=dataclasses.replace(prefs.ONLINE, overlong_buffer=longest, overlong_penalty=0.5))
    lengths = made.rollout.completion_lengths_N
    np.testing.assert_allclose(made.rewards_N, 0.5 - 0.5 * lengths / longest, rtol=1e-6)
    assert len(pick_pairs(plain.rewards_N, plain.valid_N, plain.groups_N)[0]) == 0
    pairs, _ = pick_pairs(made.rewards_N, made.valid_N, made.groups_N)
    assert len(pairs) > 0 and (lengths[pairs[:, 0]] < lengths[pairs[:, 1]]).all()


def test_completions_that_are_cut_off_are_in_no_pair():
    rising = by_position(np.linspace(0, 1, 12))
    plain, masked = (experience(rising, config=dataclasses.replace(prefs.ONLINE, mask_cut_off=mask)) for mask in (False, True))
    cut = plain.rollout.finish_reason_N == 0
    assert (masked.valid_N == plain.valid_N).all() and (masked.learnt_N == ~cut).all() and 0 < cut.sum() < 12
    pairs, _ = pick_pairs(masked.rewards_N, masked.learnt_N, masked.groups_N)
    assert not cut[pairs].any() and cut[pick_pairs(plain.rewards_N, plain.learnt_N, plain.groups_N)[0]].any()


def test_one_prompt_that_comes_twice_is_one_group():
    made = experience(by_position(np.linspace(0, 1, 12)), ids=["a", "b", "a"])
    pairs, _ = pick_pairs(made.rewards_N, made.valid_N, made.groups_N)
    assert pairs.tolist() == [[11, 0], [7, 4]]
    assert pair_batch(made, pairs, prefs.ONLINE)["lengths"].shape == (1, 6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    params, summary = prefs.train_online(folder)
    return folder, params, summary


def test_the_curve_is_the_golden_one(undisturbed):
    golden = json.loads(prefs.GOLDEN.read_text())["curves"]["online_dpo"]
    for name, values in golden.items():
        found = [r[name] for r in records(undisturbed[0])]
        np.testing.assert_allclose(found, values, rtol=2e-3, atol=2e-3, err_msg=name)


def test_every_step_is_measured(undisturbed):
    folder, _, summary = undisturbed
    first, *_, last = found = records(folder)
    assert [r["step"] for r in found] == [1, 2, 3, 4] and summary["steps"] == 4
    assert abs(first["margin"]) < 1e-5 and first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    for r in found:
        assert r["pairs"] + r["tied"] <= 4 and r["logp_diff_max"] < 1e-5 and r["errors"] == 0 and r["tokens_per_s"] > 0
    assert abs(last["margin"]) > 1e-3 and last["grad_norm"] > 0


def kills_itself_at(batch_number):
    calls = []

    def reward(inputs):
        calls.append(0)
        if len(calls) == batch_number:
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.reward(inputs)

    return reward


def test_sigterm_saves_and_resume_is_bit_exact(undisturbed, tmp_path):
    folder, params, _ = undisturbed
    never = dataclasses.replace(prefs.ONLINE, checkpoint_every=0)
    with pytest.raises(Interrupted, match="after step 2"):
        prefs.train_online(tmp_path / "run", never, reward=kills_itself_at(2))
    resumed, _ = prefs.train_online(tmp_path / "run", never)
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(params))
    untimed = lambda f: [{k: v for k, v in r.items() if "second" not in k and k != "tokens_per_s"} for r in records(f)]  # noqa: E731
    assert untimed(tmp_path / "run") == untimed(folder)


def test_micro_batches_train_the_same_policy(tmp_path):
    one = dataclasses.replace(prefs.ONLINE, steps=1)
    whole, _ = prefs.train_online(tmp_path / "whole", one)
    for buckets in (1, 8):
        parts, _ = prefs.train_online(tmp_path / str(buckets), dataclasses.replace(one, micro_batch_rows=1, length_buckets=buckets))
        np.testing.assert_allclose(tiny.flat(parts), tiny.flat(whole), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(records(tmp_path / str(buckets))[0]["loss"], records(tmp_path / "whole")[0]["loss"], rtol=1e-5)


def test_with_buckets_pairs_come_by_length():
    """Each with its own prompt and sampler's log-probabilities; padding comes last."""
    made = experience(by_position(np.linspace(0, 1, 12)))
    lengths = made.rollout.completion_lengths_N
    lengths[:] = [1, 1, 1, 6, 2, 2, 2, 3, 5, 1, 1, 1]
    pairs, _ = pick_pairs(made.rewards_N, made.valid_N, made.groups_N)
    assert pairs.tolist() == [[3, 0], [7, 4], [11, 8]]
    cut = dataclasses.replace(prefs.ONLINE, micro_batch_rows=1, length_buckets=2)
    batch = pair_batch(made, pairs, cut, multiple=2)
    assert batch["lengths"].tolist() == [[3, 2, 1, 5], [6, 1, 0, 0]]
    for slot, row in enumerate([7, 4, 11, 8, 3, 0]):
        where = slot // 4, slot % 4
        np.testing.assert_array_equal(batch["sampler_logps"][where][: lengths[row]], made.rollout.logps_NT[row, : lengths[row]])
        prompt = made.prompts.token_lists()[made.rollout.group_ids_N[row]]
        assert batch["prompts"][slot // 4, slot % 4 // 2, : len(prompt)].tolist() == prompt


def test_a_step_of_ties_or_errors_teaches_nothing(tmp_path):
    for name, status in (("ties", Status.FAIL), ("errors", Status.ERROR)):
        one = dataclasses.replace(prefs.ONLINE, steps=1)
        params, _ = prefs.train_online(tmp_path / name, one, reward=lambda inputs, s=status: [Verdict(s)] * len(inputs))
        (record,) = records(tmp_path / name)
        np.testing.assert_array_equal(tiny.flat(params), tiny.flat(prefs.params()))
        assert record["pairs"] == 0 and record["tied"] == (4 if name == "ties" else 0) and record["loss"] == 0
        assert record["errors"] == (0 if name == "ties" else 16)


def test_policy_learns_and_the_held_out_figures_show_it(tmp_path):
    config = dataclasses.replace(prefs.ONLINE, steps=30, eval_every=15, eval_samples=4, checkpoint_every=0, sample_every=0)
    data = tiny.prompts()
    data.rows[:] = [r | {"answer": "5"} for r in data.rows]
    _, summary = prefs.train_online(tmp_path / "run", config, data=data, evals={"train": data})
    assert [r["step"] for r in records(tmp_path / "run", "eval")] == [0, 15, 30]
    assert summary["evals"]["train"]["last_avg_at_k"] > summary["evals"]["train"]["first_avg_at_k"] + 0.3
    assert not (tmp_path / "run" / "samples.jsonl").exists()


CHANGES = [
    dict(num_samples=3), dict(max_new_tokens=4), dict(temperature=0.7), dict(top_k=3), dict(top_p=0.7), dict(stop_strings=("1", "5")), dict(seed=1),
]  # fmt: skip


def test_every_field_of_the_sampling_changes_the_policy(tmp_path):
    """Those of the loss are in test_preference_step.py."""
    quiet = dataclasses.replace(prefs.ONLINE, checkpoint_every=0, sample_every=0, steps=1)
    base = tiny.flat(prefs.train_online(tmp_path / "base", quiet)[0])
    for i, change in enumerate(CHANGES):
        found, _ = prefs.train_online(tmp_path / str(i), dataclasses.replace(quiet, **change))
        assert np.abs(tiny.flat(found) - base).max() > 1e-6, change


def test_what_saves_memory_or_work_does_not_change_the_result(tmp_path):
    one = dataclasses.replace(prefs.ONLINE, steps=1)
    base = tiny.flat(prefs.train_online(tmp_path / "base", one)[0])
    for i, change in enumerate((dict(remat=True, logprob_chunk=7, rollout_rows=4), dict(shared_prefix=False, rollout_rows=4, rollout_refill=True))):
        found, _ = prefs.train_online(tmp_path / str(i), dataclasses.replace(one, **change))
        np.testing.assert_allclose(tiny.flat(found), base, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_samples": 1}, "'num_samples' must be at least 2"),
        ({"loss": {"kind": "kto"}}, "online DPO makes pairs"),
        ({"loss": {"kind": "dpo"}}, "loss.kind"),
        ({"max_new_tokens": 0}, "'max_new_tokens'"),
        ({"temperature": 0.0}, "'temperature'"),
        ({"loss": {"desirable_weight": 1.0}}, "unknown setting 'loss.desirable_weight'"),
    ],
)
def test_settings_without_meaning_are_one_clear_line(change, message):
    with pytest.raises(UserError, match=message):
        check_online_dpo(from_mapping(OnlineDPOConfig, change))


def test_prompt_too_long_for_the_context_is_named(tmp_path):
    with pytest.raises(UserError, match="prompt p.* has 7 tokens.*context of 32"):
        prefs.train_online(tmp_path / "run", dataclasses.replace(prefs.ONLINE, max_new_tokens=30))


MESH = """
import sys; sys.path.insert(0, "tests/train")
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny, tiny_preferences as prefs
config = dataclasses.replace(prefs.ONLINE, steps=2)
one, _ = prefs.train_online(sys.argv[1] + "/one", config)
many, _ = prefs.train_online(sys.argv[1] + "/many", config, mesh=models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
np.testing.assert_allclose(tiny.flat(many), tiny.flat(one), rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_mesh_of_eight_devices_trains_the_same(run_python, tmp_path):
    assert "equal" in run_python(MESH, (str(tmp_path),), devices=8)
