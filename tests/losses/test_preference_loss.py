"""Preference losses: by hand, against a float64 numpy oracle, gradients, and what must not matter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.preference import (
    dpo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    pair_totals,
    row_totals,
    sequence_logprobs,
    simpo_loss,
)

P, T = 3, 5
PAIR_CASES = {
    "sigmoid": dict(beta=0.4),
    "conservative": dict(beta=0.4, label_smoothing=0.1),
    "robust": dict(kind="robust", beta=0.4, label_smoothing=0.2),
    "hinge": dict(kind="hinge", beta=0.4),
    "ipo": dict(kind="ipo", beta=0.4),
    "simpo": dict(beta=2.0, gamma=0.5, label_smoothing=0.1),
    "orpo": dict(beta=0.3),
}


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def batch():
    """(token log-probabilities [P, 2, T], mask [P, 2, T], reference sums [P, 2], labels [P])."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([[5, 2], [1, 4], [3, 3]])[..., None]
    logps = -rng.uniform(0.05, 2.0, (P, 2, T))
    return logps, mask, np.where(mask, logps, 0).sum(-1) + rng.normal(0, 1.0, (P, 2)), np.array([True, False, True])


def run(case, logps, mask, ref, totals=None):
    """(loss, metrics) of a case of PAIR_CASES on token log-probabilities."""
    sums, lengths = sequence_logprobs(f32(logps), jnp.asarray(mask))
    options = PAIR_CASES[case] | {"totals": totals}
    if case == "simpo":
        return simpo_loss(sums, lengths, **options)
    if case == "orpo":
        return orpo_loss(sums, lengths, **options)
    return dpo_loss(sums, lengths, f32(ref), **options)


def run_kto(logps, mask, ref, labels, unrelated, unrelated_ref, totals=None, baseline=None, **options):
    sums, lengths = sequence_logprobs(f32(logps), jnp.asarray(mask))
    baseline = kto_baseline(f32(unrelated), lengths, f32(unrelated_ref)) if baseline is None else baseline
    options = dict(beta=0.4, desirable_weight=1.0, undesirable_weight=1.5) | options
    return kto_loss(sums, lengths, f32(ref), jnp.asarray(labels), baseline, totals=totals, **options)


def log_s(x):
    return -np.log1p(np.exp(-x))


def oracle(case, logps, mask, ref):
    o = {"kind": "sigmoid", "label_smoothing": 0.0} | PAIR_CASES[case]
    e, beta = o["label_smoothing"], o["beta"]
    sums, lengths = np.where(mask, logps, 0).sum(-1), mask.sum(-1)
    ratio, mean = sums - ref, sums / lengths
    d = ratio[:, 0] - ratio[:, 1]
    if case == "simpo":
        z = beta * (mean[:, 0] - mean[:, 1]) - o["gamma"]
        return np.mean(-(1 - e) * log_s(z) - e * log_s(-z))
    if case == "orpo":
        odds = mean - np.log(1 - np.exp(mean))
        return -sums[:, 0].sum() / lengths[:, 0].sum() - beta * log_s(odds[:, 0] - odds[:, 1]).mean()
    if case == "hinge":
        return np.maximum(0, 1 - beta * d).mean()
    if case == "ipo":
        d = ratio / lengths
        return ((d[:, 0] - d[:, 1] - 1 / (2 * beta)) ** 2).mean()
    if case == "robust":
        return np.mean((-(1 - e) * log_s(beta * d) + e * log_s(-beta * d)) / (1 - 2 * e))
    return np.mean(-(1 - e) * log_s(beta * d) - e * log_s(-beta * d))


def kto_oracle(logps, mask, ref, labels, unrelated, unrelated_ref, beta=0.4, desirable=1.0, undesirable=1.5):
    ratio = np.where(mask, logps, 0).sum(-1) - ref
    baseline = max((unrelated - unrelated_ref).mean(), 0)
    gain = beta * np.where(labels, ratio - baseline, baseline - ratio)
    return np.mean(np.where(labels, desirable, undesirable) * (1 - 1 / (1 + np.exp(-gain))))


@pytest.fixture(scope="module")
def kto_batch(batch):
    logps, mask, ref, labels = batch
    return logps[:, 0], mask[:, 0], ref[:, 0], labels, np.array([-3.0, -1.0, -2.0]), np.array([-4.0, -1.5, -1.0])


# --- by hand ---------------------------------------------------------------------------------------------------------

ONE = jnp.array([[2, 1]])  # a chosen completion of two tokens, a rejected one of one


def test_dpo_by_hand():
    """Log-ratios 1 and -1, so d = 2; at beta 0.5 the logit is 1."""
    sums, ref = f32([[-3.0, -4.0]]), f32([[-4.0, -3.0]])
    loss, metrics = dpo_loss(sums, ONE, ref, beta=0.5)
    np.testing.assert_allclose(loss, np.log(1 + np.exp(-1)), rtol=1e-6)
    want = {"margin": 1, "accuracy": 1, "implicit_chosen": 0.5, "implicit_rejected": -0.5, "logp_chosen": -3, "logp_rejected": -4}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(want)
    smooth = 0.9 * np.log(1 + np.exp(-1)) + 0.1 * np.log(1 + np.exp(1))
    np.testing.assert_allclose(dpo_loss(sums, ONE, ref, beta=0.5, label_smoothing=0.1)[0], smooth, rtol=1e-6)
    robust = (0.9 * np.log(1 + np.exp(-1)) - 0.1 * np.log(1 + np.exp(1))) / 0.8
    np.testing.assert_allclose(dpo_loss(sums, ONE, ref, kind="robust", beta=0.5, label_smoothing=0.1)[0], robust, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(sums, ONE, ref, kind="hinge", beta=0.25)[0], 0.5, rtol=1e-6)
    # Per token the log-ratios are 1/2 and -1: (1.5 - 1 / (2 x 0.5))^2.
    np.testing.assert_allclose(dpo_loss(sums, ONE, ref, kind="ipo", beta=0.5)[0], 0.25, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(sums, ONE, None, beta=0.5)[0], np.log(1 + np.exp(-0.5)), rtol=1e-6)


def test_simpo_by_hand():
    """Means a token -1.5 and -4: 2 x 2.5 - 1 = 4."""
    loss, metrics = simpo_loss(f32([[-3.0, -4.0]]), ONE, beta=2.0, gamma=1.0)
    np.testing.assert_allclose(loss, np.log(1 + np.exp(-4)), rtol=1e-5)
    assert metrics["margin"] == 5 and metrics["implicit_chosen"] == -3


def test_orpo_by_hand():
    """p = 1/2 and 1/4 a token: odds 1 and 1/3, odds ratio 3, s(log 3) = 3/4; the NLL is log 2 a token."""
    loss, metrics = orpo_loss(f32([[-2 * np.log(2), -np.log(4)]]), ONE, beta=0.2)
    np.testing.assert_allclose(loss, np.log(2) - 0.2 * np.log(0.75), rtol=1e-6)
    np.testing.assert_allclose([metrics["nll"], metrics["log_odds"]], [np.log(2), np.log(3)], rtol=1e-6)


def test_kto_by_hand():
    """Unrelated log-ratios 2 and 0: baseline 1. Desirable log-ratio 3: 1 - s(0.5 x 2); undesirable -1: 2 (1 - s(0.5 x 2))."""
    lengths, labels = jnp.array([1, 1]), jnp.array([True, False])
    baseline = kto_baseline(f32([-1.0, -3.0]), lengths, f32([-3.0, -3.0]))
    assert baseline == 1
    loss, metrics = kto_loss(f32([-1.0, -5.0]), lengths, f32([-4.0, -4.0]), labels, baseline, beta=0.5, undesirable_weight=2.0)
    np.testing.assert_allclose(loss, 1.5 / (1 + np.exp(1)), rtol=1e-6)
    want = {"accuracy": 1, "kl": 1, "implicit_chosen": 1.5, "implicit_rejected": -0.5, "margin": 2, "logp_chosen": -1, "logp_rejected": -5}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(want)
    assert kto_baseline(f32([-3.0]), lengths[:1], f32([-1.0])) == 0  # an estimate below 0 of what cannot be


# --- oracle and gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PAIR_CASES)
def test_loss_equals_numpy(batch, case):
    logps, mask, ref, _ = batch
    np.testing.assert_allclose(run(case, logps, mask, ref)[0], oracle(case, logps, mask, ref), rtol=1e-5)


def test_kto_equals_numpy(kto_batch):
    np.testing.assert_allclose(run_kto(*kto_batch)[0], kto_oracle(*kto_batch), rtol=1e-5)


def assert_gradient(grad, value, logps):
    eps = 1e-6
    for index in np.ndindex(logps.shape):
        up, down = logps.copy(), logps.copy()
        up[index] += eps
        down[index] -= eps
        np.testing.assert_allclose(grad[index], (value(up) - value(down)) / (2 * eps), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("case", PAIR_CASES)
def test_gradient_equals_finite_differences(batch, case):
    logps, mask, ref, _ = batch
    grad = jax.grad(lambda x: run(case, x, mask, ref)[0])(f32(logps))
    assert_gradient(grad, lambda x: oracle(case, x, mask, ref), logps)


def test_kto_gradient_equals_finite_differences(kto_batch):
    logps, *rest = kto_batch
    grad = jax.grad(lambda x: run_kto(x, *rest)[0])(f32(logps))
    assert_gradient(grad, lambda x: kto_oracle(x, *rest), logps)


def test_no_gradient_reaches_the_reference_or_the_baseline(batch, kto_batch):
    logps, mask, ref, _ = batch
    assert np.all(np.asarray(jax.grad(lambda r: run("sigmoid", logps, mask, r)[0])(f32(ref))) == 0)
    grads = jax.grad(lambda r, u, v: run_kto(*kto_batch[:2], r, kto_batch[3], u, v)[0], argnums=(0, 1, 2))(*map(f32, (kto_batch[2], *kto_batch[4:])))
    assert all(np.all(np.asarray(g) == 0) for g in grads)


# --- what must not matter --------------------------------------------------------------------------------------------


def padded(logps, mask, ref):
    """The same with rubbish under the mask, three more tokens of it, and a pair of it."""
    wide = [(0, 1)] + [(0, 0)] * (logps.ndim - 2) + [(0, 3)]
    dirty = np.pad(np.where(mask, logps, np.nan), wide, constant_values=np.inf)
    return dirty, np.pad(mask, wide, constant_values=False), np.pad(ref, wide[:-1], constant_values=np.nan)


def assert_close(one, other, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), one, other)


@pytest.mark.parametrize("case", PAIR_CASES)
def test_padding_changes_nothing(batch, case):
    logps, mask, ref, _ = batch
    dirty, wide_mask, wide_ref = padded(logps, mask, ref)
    assert_close(run(case, dirty, wide_mask, wide_ref), run(case, logps, mask, ref))
    grad = jax.grad(lambda x: run(case, x, wide_mask, wide_ref)[0])(f32(dirty))
    want = jax.grad(lambda x: run(case, x, mask, ref)[0])(f32(logps))
    np.testing.assert_allclose(grad[:P, :, :T], want, rtol=1e-5, atol=1e-8)
    assert np.all(np.asarray(grad[P:]) == 0) and np.all(np.asarray(grad[..., T:]) == 0)


def test_padding_changes_nothing_in_kto(kto_batch):
    logps, mask, ref, labels, unrelated, unrelated_ref = kto_batch
    dirty, wide_mask, wide_ref = padded(logps, mask, ref)
    rest = (np.append(labels, True), np.append(unrelated, np.nan), np.append(unrelated_ref, 7.0))
    assert_close(run_kto(dirty, wide_mask, wide_ref, *rest), run_kto(*kto_batch))
    grad = jax.grad(lambda x: run_kto(x, wide_mask, wide_ref, *rest)[0])(f32(dirty))
    assert np.isfinite(np.asarray(grad)).all() and np.all(np.asarray(grad[P:]) == 0)


@pytest.mark.parametrize("case", PAIR_CASES)
def test_micro_batches_add_up(batch, case):
    logps, mask, ref, _ = batch
    totals = pair_totals(jnp.asarray(mask).sum(-1))
    parts = [run(case, logps[rows], mask[rows], ref[rows], totals) for rows in (slice(0, 1), slice(1, None))]
    assert_close(jax.tree.map(jnp.add, *parts), run(case, logps, mask, ref))


def test_micro_batches_add_up_in_kto(kto_batch):
    """One of them has desirable rows only; the baseline is that of the whole batch."""
    logps, mask, ref, labels, unrelated, unrelated_ref = kto_batch
    lengths = jnp.asarray(mask).sum(-1)
    whole = dict(totals=row_totals(lengths, jnp.asarray(labels)), baseline=kto_baseline(f32(unrelated), lengths, f32(unrelated_ref)))
    parts = [run_kto(logps[r], mask[r], ref[r], labels[r], None, None, **whole) for r in (slice(0, 1), slice(1, None))]
    assert_close(jax.tree.map(jnp.add, *parts), run_kto(*kto_batch))


@pytest.mark.parametrize("case", PAIR_CASES)
def test_a_batch_of_padding_is_zero_without_nan(batch, case):
    logps, mask, ref, _ = batch
    loss, grad = jax.value_and_grad(lambda x: run(case, x, mask & False, ref)[0])(f32(logps))
    assert loss == 0 and np.all(np.asarray(grad) == 0)


def test_certainty_makes_no_nan_in_orpo():
    sums = f32([[0.0, -1e-9], [-200.0, 0.0]])
    loss, grad = jax.value_and_grad(lambda x: orpo_loss(x, jnp.full((2, 2), 3))[0])(sums)
    assert np.isfinite(loss) and np.isfinite(np.asarray(grad)).all()


def test_a_tie_counts_half():
    """The policy that is its own reference has no preference: accuracy 0.5, not 0."""
    sums = f32([[-3.0, -4.0]])
    assert dpo_loss(sums, ONE, sums)[1]["accuracy"] == 0.5
    assert dpo_loss(sums, ONE, sums - f32([[0.1, 0.0]]))[1]["accuracy"] == 1


def test_ipo_does_not_grow_with_length():
    """Repeating every token leaves the loss as it is: log-ratios are taken per token."""
    sums, ref = f32([[-3.0, -4.0]]), f32([[-4.0, -3.5]])
    short, long = dpo_loss(sums, ONE, ref, kind="ipo")[0], dpo_loss(8 * sums, 8 * ONE, 8 * ref, kind="ipo")[0]
    np.testing.assert_allclose(long, short, rtol=1e-6)
    assert abs(dpo_loss(8 * sums, 8 * ONE, 8 * ref)[0] - dpo_loss(sums, ONE, ref)[0]) > 0.1


def test_each_option_changes_the_loss(batch, kto_batch):
    sums, lengths = sequence_logprobs(f32(batch[0]), jnp.asarray(batch[1]))
    dpo = lambda **o: dpo_loss(sums, lengths, f32(batch[2]), **o)  # noqa: E731
    calls = {
        "dpo": (dpo, [dict(beta=0.5), dict(label_smoothing=0.1), dict(kind="ipo"), dict(kind="hinge")]),
        "simpo": (lambda **o: simpo_loss(sums, lengths, **o), [dict(beta=1.0), dict(gamma=0.0), dict(label_smoothing=0.1)]),
        "orpo": (lambda **o: orpo_loss(sums, lengths, **o), [dict(beta=1.0)]),
        "kto": (lambda **o: run_kto(*kto_batch, **o), [dict(beta=1.0), dict(desirable_weight=2.0), dict(undesirable_weight=1.0)]),
    }  # fmt: skip
    for name, (call, changes) in calls.items():
        for change in changes:
            assert abs(float(call(**change)[0]) - float(call()[0])) > 1e-4, (name, change)
    smooth = [float(dpo_loss(sums, lengths, f32(batch[2]), kind=kind, label_smoothing=0.2)[0]) for kind in ("sigmoid", "robust")]
    assert abs(smooth[0] - smooth[1]) > 1e-3


@pytest.mark.parametrize("options,message", [({"kind": "sigmod"}, "sigmoid"), ({"label_smoothing": 0.5}, "0.5"), ({"label_smoothing": -0.1}, "-0.1")])
def test_refuses_what_has_no_meaning(batch, options, message):
    sums, lengths = sequence_logprobs(f32(batch[0]), jnp.asarray(batch[1]))
    with pytest.raises(ValueError, match=message):
        dpo_loss(sums, lengths, f32(batch[2]), **options)


def test_robust_loss_is_unbiased_under_flipped_labels():
    """With a share e of labels flipped, the expected robust loss is the loss on the true labels (Chowdhury et al., eq. 10)."""
    e, ref = 0.3, f32([[-4.0, -3.0]])
    true, flipped = f32([[-3.0, -4.5]]), f32([[-4.5, -3.0]])
    robust = lambda s, r: dpo_loss(s, ONE, r, kind="robust", label_smoothing=e)[0]  # noqa: E731
    np.testing.assert_allclose((1 - e) * robust(true, ref) + e * robust(flipped, ref[:, ::-1]), dpo_loss(true, ONE, ref)[0], rtol=1e-5)


def test_pairs_may_come_in_any_order(batch):
    logps, mask, ref, _ = batch
    for case, order in itertools.product(("sigmoid", "orpo"), ([2, 0, 1],)):
        assert_close(run(case, logps[order], mask[order], ref[order]), run(case, logps, mask, ref))
