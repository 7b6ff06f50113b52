"""The update's rules with a policy of one table of logits, so that no model is compiled: knobs, masks, groups, inner epochs, KL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grpo_step import C, N, S, assert_same, counted, in_micro_batches, make_batch, spec

import jaxrl_llm.train.step as step
from jaxrl_llm.train.config import LossConfig

VOCAB = 16


@pytest.fixture(autouse=True)
def table_policy(monkeypatch):
    """params = {"table": [C, V] logits}: position c's token has probability softmax(table[c])."""

    def logprobs(spec, params, micro, with_entropy=False):
        logps_CV = jax.nn.log_softmax(params["table"] / spec.temperature)
        logps = logps_CV[jnp.arange(C), micro["completions"]]
        return logps, jnp.broadcast_to(-(jnp.exp(logps_CV) * logps_CV).sum(-1), logps.shape)

    monkeypatch.setattr(step, "policy_logprobs", logprobs)


@pytest.fixture
def params():
    return {"table": jnp.asarray(np.random.default_rng(5).normal(size=(C, VOCAB)), jnp.float32)}


def grads_of(s, params, batch):
    loss, metrics, grads, logps = step.loss_and_grads(s, params, jax.tree.map(jnp.asarray, batch))
    return float(loss), jax.tree.map(float, metrics), grads, np.asarray(logps)


def climb(s, params, batch, count, rate=0.5):
    """Plain gradient descent on the loss."""
    for _ in range(count):
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads_of(s, params, batch)[2])
    return params


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_accumulated_gradient_equals_the_whole_batch(params, aggregation):
    batch = make_batch()
    assert len(set(counted(in_micro_batches(batch, 1)).sum((1, 2)))) > 1  # the micro-batches have different token counts
    s = spec(LossConfig(aggregation=aggregation))
    whole, parts = grads_of(s, params, batch), grads_of(s, params, in_micro_batches(batch, 1))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5, atol=1e-7)
    assert_same(parts[1], whole[1])
    assert_same(parts[2], whole[2])


def test_a_group_may_be_spread_over_micro_batches(params):
    """Advantages come from the whole batch: all twelve rows are one group here, in four micro-batches."""
    batch = make_batch() | {"group_ids": np.zeros((1, N), np.int32)}
    whole, parts = grads_of(spec(), params, batch), grads_of(spec(), params, in_micro_batches(batch, 1))
    assert_same(parts[2], whole[2])
    assert np.abs(np.asarray(whole[2]["table"] - grads_of(spec(), params, make_batch())[2]["table"])).max() > 1e-4


def test_a_group_with_equal_rewards_has_no_gradient(params):
    batch = make_batch()
    batch["valid"][0, S:] = False
    assert np.all(np.asarray(grads_of(spec(), params, batch)[2]["table"]) == 0)


def test_a_batch_without_any_verdict_has_no_gradient_and_no_nan(params):
    batch = make_batch() | {"valid": np.zeros((1, N), bool)}
    loss, metrics, grads, _ = grads_of(spec(), params, batch)
    assert loss == 0 and np.isfinite(list(metrics.values())).all() and np.all(np.asarray(grads["table"]) == 0)


def test_metrics_compare_with_the_sampler(params):
    batch = make_batch()
    _, metrics, _, logps = grads_of(spec(), params, batch)
    difference = np.abs(logps - batch["sampler_logps"])[counted(batch)]
    np.testing.assert_allclose(metrics["logp_diff_mean"], difference.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logp_diff_max"], difference.max(), rtol=1e-5)
    assert 0 < metrics["entropy"] < np.log(VOCAB)
    parts = grads_of(spec(), params, in_micro_batches(batch, 1))[1]
    np.testing.assert_allclose(parts["logp_diff_max"], difference.max(), rtol=1e-5)


def test_later_inner_epochs_are_measured_against_the_stored_logprobs(params):
    batch = make_batch()
    _, first, _, logps = grads_of(spec(), params, batch)
    moved = climb(spec(), params, batch, 3, rate=5.0)
    _, later, _, _ = grads_of(spec(), moved, batch | {"old_logps": logps})
    assert first["ratio"] == pytest.approx(1.0) and first["clip_share"] == 0
    assert abs(later["ratio"] - 1) > 1e-3 and later["clip_share"] > 0


def test_kl_term_pulls_towards_the_reference(params):
    batch = make_batch()
    s = spec(LossConfig(kl="k3", kl_coef=1.0))
    assert "kl" not in grads_of(spec(), params, batch)[1]
    with_reference = batch | {"ref_logps": grads_of(spec(), params, batch)[3]}
    kl = lambda p: grads_of(s, p, with_reference)[1]["kl"]  # noqa: E731
    free, pulled = climb(spec(), params, batch, 5, rate=2.0), climb(s, params, with_reference, 5, rate=2.0)
    assert kl(params) == pytest.approx(0, abs=1e-6) and kl(pulled) < 0.8 * kl(free)


KNOBS = [
    {"clip_low": 0.9},
    {"clip_high": 5.0},
    {"aggregation": "sequence_mean"},
    {"aggregation": "dr_grpo"},
    {"advantage_scale": "none"},
    {"advantage_scale": "batch_std"},
    {"advantage_ddof": 0},
    {"advantage_eps": 1.0},
    {"kl": "k2", "kl_coef": 0.5},
    {"entropy_coef": 0.5},
    {"ratio": "sequence"},
    {"ratio": "sequence_token"},
    {"surrogate": "cispo"},
    {"mismatch": "token"},
    {"mismatch": "sequence"},
    {"baseline": "leave_one_out"},
    {"baseline": "batch_mean", "advantage_scale": "batch_std"},
]
# With advantages over the whole batch, or by token, and a KL estimate that the rewards pay for.
PAID = {"kl": "k1", "kl_coef": 0.5, "advantage_scale": "none"}
PAIRS = [
    ({"mismatch": "token", "mismatch_cap": 1.0}, {"mismatch": "token"}),
    ({**PAID, "kl_place": "sequence_reward"}, {"advantage_scale": "none"}),
    ({**PAID, "kl_place": "sequence_reward", "kl_coef": 0.1}, {**PAID, "kl_place": "sequence_reward"}),
    ({**PAID, "kl_place": "token_reward", "baseline": "batch_mean"}, {**PAID, "kl_place": "sequence_reward", "baseline": "batch_mean"}),
    ({"baseline": "batch_mean", "advantage_scale": "batch_std"}, {"baseline": "batch_mean", "advantage_scale": "none"}),
]


def test_every_knob_of_the_loss_changes_the_gradient(params):
    batch = make_batch()
    batch["ref_logps"] = batch["sampler_logps"] - 0.3
    batch["old_logps"] = batch["sampler_logps"] + np.random.default_rng(4).normal(size=(1, N, C)).astype(np.float32)
    batch["kl"] = np.random.default_rng(6).normal(size=(1, N, C)).astype(np.float32)
    gradient = lambda change: np.asarray(grads_of(spec(LossConfig(**change)), params, batch)[2]["table"])  # noqa: E731
    for one, other in PAIRS:
        assert np.abs(gradient(one) - gradient(other)).max() > 1e-5, one
    base = np.asarray(grads_of(spec(), params, batch)[2]["table"])
    for change in KNOBS:
        assert np.abs(np.asarray(grads_of(spec(LossConfig(**change)), params, batch)[2]["table"]) - base).max() > 1e-5, change
    assert np.abs(np.asarray(grads_of(spec(temperature=0.5), params, batch)[2]["table"]) - base).max() > 1e-5


def kl_of(batch):
    """[1, N, C] estimates, 0 where a token does not count."""
    return np.where(counted(batch), batch["kl"], 0)


def test_reward_pays_for_the_kl_of_a_completion(params):
    """RLOO: with the KL of each row taken from its reward by hand, the same gradient; groups, masks and leave-one-out included."""
    batch = make_batch() | {"kl": np.random.default_rng(6).normal(size=(1, N, C)).astype(np.float32)}
    by_hand = {k: v for k, v in batch.items() if k != "kl"} | {"rewards": (batch["rewards"] - 0.1 * kl_of(batch).sum(-1)).astype(np.float32)}
    rloo = LossConfig(baseline="leave_one_out", advantage_scale="none", aggregation="dr_grpo")
    paid = dataclasses.replace(rloo, kl="k1", kl_coef=0.1, kl_place="sequence_reward")
    _, metrics, grads, _ = grads_of(spec(paid), params, batch)
    assert_same(grads, grads_of(spec(rloo), params, by_hand)[2])
    np.testing.assert_allclose(metrics["kl"], kl_of(batch)[counted(batch)].mean(), rtol=1e-4)
    assert_same(grads_of(spec(paid), params, in_micro_batches(batch, 1))[1:3], (metrics, grads))


def test_reinforce_pp_advantages_equal_numpy(params):
    """Eq. 8-10 by token over the whole batch, whatever the micro-batches and prompts."""
    batch = make_batch() | {"kl": np.random.default_rng(6).normal(size=(1, N, C)).astype(np.float32)}
    s = spec(LossConfig(baseline="batch_mean", advantage_scale="batch_std", kl="k1", kl_coef=0.1, kl_place="token_reward"))
    returns = batch["rewards"][..., None] - 0.1 * np.flip(np.cumsum(np.flip(kl_of(batch), -1), -1), -1)
    chosen = returns[counted(batch)]
    want = np.where(counted(batch), (returns - chosen.mean()) / (chosen.std(ddof=1) + 1e-4), 0)
    np.testing.assert_allclose(step.advantages(s, batch), want, rtol=1e-5, atol=1e-6)
    parts = in_micro_batches(batch, 1)
    np.testing.assert_allclose(np.asarray(step.advantages(s, parts)).reshape(want.shape), want, rtol=1e-5, atol=1e-6)
    assert_same(grads_of(s, params, parts)[1:3], grads_of(s, params, batch)[1:3])
    mixed_up = batch | {"group_ids": np.roll(batch["group_ids"], 1)}
    assert_same(grads_of(s, params, mixed_up)[2], grads_of(s, params, batch)[2])


def test_kl_that_rewards_pay_for_is_between_the_policy_and_the_reference(params):
    batch, s = make_batch(), spec(LossConfig(kl="k2", kl_coef=0.1, kl_place="sequence_reward"))
    reference = {"table": params["table"] + jnp.asarray(np.random.default_rng(7).normal(size=(C, VOCAB)), jnp.float32)}
    ours, theirs = (grads_of(spec(), p, batch)[3] for p in (params, reference))
    got = step.compiled_kl.__wrapped__(s)(params, reference, batch)
    np.testing.assert_allclose(got, 0.5 * (ours - theirs) ** 2, rtol=1e-4, atol=1e-6)


def test_samplers_weight_is_of_the_trainers_old_policy_in_every_inner_epoch(params):
    """The sampler's numbers are off by a token's noise: the weight corrects for it, is the same when the policy has moved, and the ratio
    is that of new to old trainer, 1 at first."""
    batch = make_batch()
    _, _, _, logps = grads_of(spec(), params, batch)
    noise = np.random.default_rng(8).normal(0, 0.3, logps.shape)
    batch["sampler_logps"] = (logps + noise).astype(np.float32)
    s = spec(LossConfig(mismatch="token", mismatch_cap=1.3))
    _, first, grads, _ = grads_of(s, params, batch)
    assert first["ratio"] == pytest.approx(1.0)
    weight = np.minimum(np.exp(-noise), 1.3)
    assert first["mismatch_weight"] == pytest.approx(weight[counted(batch)].mean(), rel=1e-5)
    assert first["mismatch_share"] == pytest.approx((np.exp(-noise) > 1.3)[counted(batch)].mean(), rel=1e-5)
    _, again, same, _ = grads_of(s, params, batch | {"old_logps": logps})
    assert_same(same, grads)
    moved = climb(s, params, batch, 3, rate=5.0)
    _, later, _, _ = grads_of(s, moved, batch | {"old_logps": logps})
    assert later["mismatch_weight"] == pytest.approx(first["mismatch_weight"], rel=1e-6) and abs(later["ratio"] - 1) > 1e-3
    parts = grads_of(s, params, in_micro_batches(batch, 1))
    assert_same(parts[1:3], (first, grads))
