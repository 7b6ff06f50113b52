"""The update on preferences with a policy of one table of logits, so that no model is compiled: knobs, masks, accumulation, baseline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_preferences as prefs

import jaxrl_llm.train.preference_step as step
from jaxrl_llm.train.config import OnlineDPOConfig, OptimizerConfig, PreferenceLossConfig

VOCAB = 16


@pytest.fixture(autouse=True)
def table_policy(monkeypatch):
    """params = {"table": [C, V] logits}: position c's token has probability softmax(table[c])."""

    def logps(spec, params, micro):
        table_CV = jax.nn.log_softmax(params["table"] / spec.temperature)
        return table_CV[jnp.arange(micro["completions"].shape[-1]), micro["completions"]]

    monkeypatch.setattr(step, "policy_logprobs", lambda *given: (logps(*given), None))


@pytest.fixture(scope="module")
def params():
    return {"table": jnp.asarray(np.random.default_rng(5).normal(size=(16, VOCAB)), jnp.float32)}


def spec(loss, **changes):
    return step.PreferenceSpec(prefs.CONFIG, loss, OptimizerConfig(), **changes)


def batch_of(kind, rows=0, extra=0):
    """Seven rows in micro-batches of `rows`, and `extra` rows of padding."""
    data = prefs.rows_for(kind, 7)
    columns = {} if data.labels_N is None else {"labels": np.append(data.labels_N, [True] * extra)}
    ref = np.random.default_rng(1).normal(-12, 3, (7, 2)).astype(np.float32)
    columns |= {"ref_sums": np.concatenate([ref, np.full((extra, 2), np.nan, np.float32)])}
    prompts, completions = data.prompts + [[]] * extra, data.completions + [([], [])] * extra
    return step.preference_batch(prompts, completions, rows, **columns)


def grads_of(s, params, batch):
    loss, metrics, grads = step.loss_and_grads(s, params, jax.tree.map(jnp.asarray, batch))
    return float(loss), jax.tree.map(float, metrics), np.asarray(grads["table"])


@pytest.mark.parametrize("kind", prefs.LOSSES)
def test_accumulated_gradient_equals_the_whole_batch(params, kind):
    s, whole = spec(prefs.LOSSES[kind]), batch_of(kind)
    wanted = grads_of(s, params, whole)
    assert np.abs(wanted[2]).max() > 1e-3
    for parts in (batch_of(kind, 2), batch_of(kind, 3, extra=4)):
        found = grads_of(s, params, parts)
        assert parts["prompts"].shape[0] == 4
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
        assert found[1] == pytest.approx(wanted[1], rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(found[2], wanted[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", prefs.LOSSES)
def test_micro_batches_sorted_and_cut_to_their_length_give_the_same_gradient(params, kind, monkeypatch):
    """... each as wide as its own longest completion asks, within the widths of the buckets; the same rows in another order are the same batch."""
    monkeypatch.setattr(step, "LEAST_WIDTH", 8)
    data, widths = prefs.rows_for(kind, 9), []
    ref = np.random.default_rng(1).normal(-12, 3, (9, 2)).astype(np.float32)
    columns = {"ref_sums": ref} if data.labels_N is None else {"ref_sums": ref, "labels": data.labels_N}
    lengths = data.lengths(range(9))
    order = step.by_length(lengths)
    longest = lengths.max(axis=1)[order]
    assert (np.diff(longest) >= 0).all() and longest[0] < longest[-1] and sorted(order) == list(range(9))
    made = [data.batch(rows, micro, **columns) for rows, micro in ((np.arange(9), 0), (order, 3))]
    assert made[1]["lengths"].max(axis=1).tolist() == longest[2::3].tolist()
    logps = step.policy_logprobs

    def seen(s, policy, micro):
        jax.debug.callback(lambda width: widths.append(int(width)), micro["completions"].shape[-1])
        return logps(s, policy, micro)

    wanted = grads_of(spec(prefs.LOSSES[kind]), params, made[0])
    monkeypatch.setattr(step, "policy_logprobs", seen)
    found = grads_of(spec(prefs.LOSSES[kind], length_buckets=8), params, made[1])
    jax.effects_barrier()
    assert set(widths) >= set(longest[2::3].tolist()) and max(widths) < 8 and len(set(widths)) > 1
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-4, atol=1e-6)


def test_the_whole_batch_at_once_equals_the_loss_on_its_sums(params):
    """What an evaluation does with a held-out set's sums is what an update minimises."""
    for kind in ("sigmoid", "kto"):
        s, batch = spec(prefs.LOSSES[kind]), batch_of(kind)
        sums = step._sums(s, params, jax.tree.map(lambda x: x[0], batch)).reshape(-1, 2)
        pairs = [batch[name].reshape(-1, 2) for name in ("lengths", "ref_sums")]
        loss, metrics = step.preference_loss(s.loss, sums, *pairs, batch["labels"][0] if kind == "kto" else None)
        found = grads_of(s, params, batch)
        np.testing.assert_allclose(found[0], loss, rtol=1e-6)
        assert found[1] == pytest.approx(jax.tree.map(float, metrics), rel=1e-5, abs=1e-6)


def test_no_gradient_comes_from_the_unrelated_completions(params):
    batch = batch_of("kto")
    unrelated = batch["completions"].copy()
    unrelated[:, 1::2] = (unrelated[:, 1::2] + 1) % VOCAB
    ref = batch["ref_sums"].copy()
    s = spec(prefs.LOSSES["kto"])
    ref[:, 1::2] += 1000.0  # the baseline is 0 either way
    one, other = (grads_of(s, params, batch | {"completions": c, "ref_sums": ref}) for c in (batch["completions"], unrelated))
    np.testing.assert_array_equal(one[2], other[2])
    assert one[1]["kl"] == 0
    assert np.abs(grads_of(s, params, batch | {"ref_sums": ref - 1005.0})[2] - one[2]).max() > 1e-5, "a baseline above 0 counts"


def test_a_batch_of_padding_has_no_gradient_and_no_nan(params):
    for kind in ("sigmoid", "orpo", "ipo"):
        batch = batch_of(kind)
        loss, metrics, grads = grads_of(spec(prefs.LOSSES[kind]), params, batch | {"lengths": batch["lengths"] * 0})
        assert loss == 0 and np.isfinite(list(metrics.values())).all() and np.all(grads == 0)


def test_the_sampler_is_compared_with_the_trainer(params):
    batch = batch_of("sigmoid", 2)
    s = spec(prefs.LOSSES["sigmoid"])
    assert "logp_diff_max" not in grads_of(s, params, batch)[1]
    logps = np.stack([np.asarray(step.policy_logprobs(s, params, jax.tree.map(lambda x, m=m: x[m], batch))[0]) for m in range(4)])
    logps[2, 1, 0] += 0.25
    logps[3, 1, batch["lengths"][3, 1] :] += 9.0  # past the end nothing counts
    assert grads_of(s, params, batch | {"sampler_logps": logps})[1]["logp_diff_max"] == pytest.approx(0.25, rel=1e-4)


CHANGES = {
    "sigmoid": [dict(beta=0.1), dict(label_smoothing=0.2), dict(reference=False), dict(kind="hinge"), dict(kind="ipo"), dict(kind="orpo")],
    "robust": [dict(label_smoothing=0.3)],
    "simpo": [dict(gamma=0.2), dict(beta=1.0), dict(label_smoothing=0.2)],
    "orpo": [dict(beta=0.1)],
    "kto": [dict(desirable_weight=0.3), dict(undesirable_weight=0.3), dict(beta=0.1)],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_field_of_the_loss_changes_the_gradient(params, kind):
    loss, batch = prefs.LOSSES[kind], batch_of(kind)
    base = grads_of(spec(loss), params, batch)[2]
    for change in CHANGES[kind]:
        assert np.abs(grads_of(spec(dataclasses.replace(loss, **change)), params, batch)[2] - base).max() > 1e-5, change
    assert np.abs(grads_of(spec(loss, temperature=0.5), params, batch)[2] - base).max() > 1e-5


def test_settings_reach_the_compiled_update():
    config = OnlineDPOConfig(steps=7, temperature=0.6, remat=True, shared_prefix=False, logprob_chunk=3, optimizer=OptimizerConfig(schedule="linear"))
    config = dataclasses.replace(config, micro_batch_rows=2, length_buckets=3)
    made = step.preference_spec(prefs.CONFIG, config)
    assert (made.temperature, made.remat, made.shared_prefix, made.logprob_chunk) == (0.6, "nothing", False, 3)
    assert made.length_buckets == 3 and made.optimizer.decay_steps == 7 and made.loss is config.loss
    assert not PreferenceLossConfig(kind="simpo").needs_reference and PreferenceLossConfig(kind="kto").needs_reference
