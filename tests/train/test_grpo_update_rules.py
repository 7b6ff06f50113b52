"""The update's rules with a policy of one table of logits, so that no model is compiled: knobs, masks, groups, inner epochs, KL."""

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

    monkeypatch.setattr(step, "_logprobs", logprobs)


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
]


def test_every_knob_of_the_loss_changes_the_gradient(params):
    batch = make_batch()
    batch["old_logps"] = batch["sampler_logps"]
    batch["ref_logps"] = batch["sampler_logps"] - 0.3
    base = np.asarray(grads_of(spec(), params, batch)[2]["table"])
    for change in KNOBS:
        assert np.abs(np.asarray(grads_of(spec(LossConfig(**change)), params, batch)[2]["table"]) - base).max() > 1e-5, change
    assert np.abs(np.asarray(grads_of(spec(temperature=0.5), params, batch)[2]["table"]) - base).max() > 1e-5
