"""GRPO advantages and objective: by hand, against a float64 numpy oracle, gradients, and what must not matter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.grpo import batch_totals, group_advantages, group_stats, grpo_loss, kl_estimate

B, T = 4, 6


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    logps = -rng.uniform(0.1, 3.0, (B, T))
    old = logps + rng.normal(0, 0.4, (B, T))
    ref = logps + rng.normal(0, 0.5, (B, T))
    mask = np.arange(T) < np.array([6, 2, 4, 1])[:, None]
    return logps, old, ref, rng.normal(size=B), mask


def oracle_loss(logps, old, ref, advantages, mask, clip_low, clip_high, aggregation, kl, kl_coef, max_length):
    ratio = np.exp(logps - old)
    adv = advantages[:, None]
    loss = -np.minimum(ratio * adv, np.clip(ratio, 1 - clip_low, 1 + clip_high) * adv)
    d = ref - logps
    loss = loss + (0 if kl is None else kl_coef * {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - 1 - d}[kl])
    loss = np.where(mask, loss, 0)
    if aggregation == "token_mean":
        return loss.sum() / mask.sum()
    if aggregation == "sequence_mean":
        return (loss.sum(1) / mask.sum(1)).mean()
    return loss.sum() / (len(mask) * max_length)


def run(batch, **kwargs):
    logps, old, ref, adv, mask = batch
    kwargs.setdefault("max_length", 9)
    return grpo_loss(f32(logps), f32(old), f32(adv), jnp.asarray(mask), ref_logps=f32(ref), **kwargs)


# --- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards, ids, valid = f32([1, 0, 0, 1, 5]), jnp.array([0, 0, 0, 1, 1]), jnp.ones(5, bool)
    adv = group_advantages(rewards, ids, 2, valid, ddof=1, eps=0.0)
    # Group 0: mean 1/3, std (n-1) = sqrt((4/9 + 1/9 + 1/9) / 2) = 1/sqrt(3); group 1: mean 3, std sqrt(8).
    np.testing.assert_allclose(adv, [2 / np.sqrt(3), -1 / np.sqrt(3), -1 / np.sqrt(3), -2 / np.sqrt(8), 2 / np.sqrt(8)], rtol=1e-6)


@pytest.mark.parametrize("ddof,scale", list(itertools.product([0, 1], ["group_std", "batch_std", "none"])))
def test_advantages_equal_numpy(ddof, scale):
    rng = np.random.default_rng(3)
    ids = rng.permutation(np.repeat(np.arange(4), 5))
    rewards, valid = rng.normal(size=20), rng.random(20) > 0.2
    centred = np.zeros(20)
    want = np.zeros(20)
    for g in range(4):
        rows = (ids == g) & valid
        centred[rows] = rewards[rows] - rewards[rows].mean()
        want[rows] = centred[rows] / (rewards[rows].std(ddof=ddof) + 1e-4)
    if scale == "batch_std":
        want = centred / (np.sqrt((centred**2).sum() / (valid.sum() - ddof)) + 1e-4)
    want = centred if scale == "none" else want
    got = group_advantages(f32(rewards), jnp.asarray(ids), 4, jnp.asarray(valid), scale=scale, ddof=ddof)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_zero_spread_group_gets_exactly_zero():
    # The fp32 mean of seven 0.1 is not 0.1; a plain (r - mean) / (std + eps) would give noise.
    adv = group_advantages(jnp.full(7, 0.1), jnp.zeros(7, int), 1, jnp.ones(7, bool), eps=1e-8)
    assert np.all(np.asarray(adv) == 0)


def test_rows_without_a_verdict_change_no_other_row():
    rewards, ids = f32([1, 0, 1, 0, 99, -99]), jnp.array([0, 0, 0, 0, 0, 1])
    valid = jnp.array([1, 1, 1, 1, 0, 0], bool)
    adv = group_advantages(rewards, ids, 2, valid)
    np.testing.assert_array_equal(adv[:4], group_advantages(rewards[:4], ids[:4], 2, valid[:4]))
    assert np.all(np.asarray(adv[4:]) == 0)
    stats = group_stats(rewards, ids, 2, valid)
    np.testing.assert_array_equal(stats["count"], [4, 0])
    np.testing.assert_array_equal(stats["spread"], [1, 0])
    np.testing.assert_array_equal(stats["mean"], [0.5, 0])


def test_nan_reward_of_a_masked_row_stays_out():
    adv = group_advantages(f32([1, 0, np.nan]), jnp.zeros(3, int), 1, jnp.array([1, 1, 0], bool))
    assert np.isfinite(np.asarray(adv)).all() and adv[0] > 0 > adv[1]


def test_groups_are_ids_not_positions():
    rewards, ids = f32([1, 0, 0, 3]), jnp.array([0, 1, 0, 1])
    order = jnp.array([2, 1, 3, 0])
    adv = group_advantages(rewards, ids, 2, jnp.ones(4, bool))
    np.testing.assert_allclose(group_advantages(rewards[order], ids[order], 2, jnp.ones(4, bool)), adv[order], rtol=1e-6)


def test_single_row_group_is_zero():
    assert group_advantages(f32([3.0]), jnp.zeros(1, int), 1, jnp.ones(1, bool))[0] == 0


def test_unknown_scale():
    with pytest.raises(ValueError, match="group_std"):
        group_advantages(f32([1.0]), jnp.zeros(1, int), 1, jnp.ones(1, bool), scale="grup_std")


# --- objective -------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    # One row, two tokens. ratio e^0.5 = 1.649 with A = 2 is clipped to 1.2: -2.4; ratio e^-0.1 with A = 2: -1.8097.
    loss, metrics = grpo_loss(f32([[-0.5, -1.1]]), f32([[-1.0, -1.0]]), f32([2.0]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(loss, -(2.4 + 2 * np.exp(-0.1)) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_share"], 0.5)
    np.testing.assert_allclose(metrics["ratio"], (np.exp(0.5) + np.exp(-0.1)) / 2, rtol=1e-6)


CASES = list(itertools.product(["token_mean", "sequence_mean", "dr_grpo"], [None, "k1", "k2", "k3"], [0.2, 0.28]))


@pytest.mark.parametrize("aggregation,kl,clip_high", CASES)
def test_loss_equals_numpy(batch, aggregation, kl, clip_high):
    loss, metrics = run(batch, aggregation=aggregation, kl=kl, kl_coef=0.3, clip_high=clip_high)
    np.testing.assert_allclose(loss, oracle_loss(*batch, 0.2, clip_high, aggregation, kl, 0.3, 9), rtol=1e-5)
    assert ("kl" in metrics) == (kl is not None)


@pytest.mark.parametrize("aggregation,kl", [("token_mean", "k3"), ("sequence_mean", "k2"), ("dr_grpo", "k1"), ("token_mean", None)])
def test_gradient_equals_finite_differences(batch, aggregation, kl):
    logps, old, ref, adv, mask = batch
    kwargs = dict(aggregation=aggregation, kl=kl, kl_coef=0.3)
    grad = jax.grad(lambda x: run((x, old, ref, adv, mask), **kwargs)[0])(f32(logps))
    eps = 1e-6
    for i, j in itertools.product(range(B), range(T)):
        moved = [logps.copy(), logps.copy()]
        moved[0][i, j] += eps
        moved[1][i, j] -= eps
        up, down = (oracle_loss(m, old, ref, adv, mask, 0.2, 0.2, aggregation, kl, 0.3, 9) for m in moved)
        np.testing.assert_allclose(grad[i, j], (up - down) / (2 * eps), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_the_entropy_bonus_equals_numpy_and_stays_under_the_mask(batch, aggregation):
    logps, old, ref, adv, mask = batch
    entropy = np.random.default_rng(7).uniform(0, 2, (B, T))
    told = lambda h, **more: run(batch, aggregation=aggregation, entropy=f32(h), **more)[0]  # noqa: E731
    bonus = {"token_mean": np.where(mask, entropy, 0).sum() / mask.sum(), "dr_grpo": np.where(mask, entropy, 0).sum() / (B * 9)}
    bonus["sequence_mean"] = (np.where(mask, entropy, 0).sum(1) / mask.sum(1)).mean()
    plain = told(entropy)
    np.testing.assert_allclose(plain, run(batch, aggregation=aggregation)[0], rtol=1e-7)  # without a coefficient it is no part of the loss
    np.testing.assert_allclose(told(entropy, entropy_coef=0.3), plain - 0.3 * bonus[aggregation], rtol=1e-5)
    np.testing.assert_allclose(told(np.where(mask, entropy, np.nan), entropy_coef=0.3), plain - 0.3 * bonus[aggregation], rtol=1e-5)
    grad = jax.grad(lambda h: told(h, entropy_coef=0.3))(f32(entropy))
    assert np.all(np.asarray(grad)[mask] < 0) and np.all(np.asarray(grad)[~mask] == 0)


def test_the_entropy_bonus_by_hand():
    # One row of two tokens, advantage 1, on policy: -1 a token; entropies 0.5 and 1.5 at 0.1: -1 - 0.1.
    ones = jnp.ones((1, 2), bool)
    loss, _ = grpo_loss(f32([[-0.5, -1.1]]), None, f32([1.0]), ones, entropy_coef=0.1, entropy=f32([[0.5, 1.5]]))
    np.testing.assert_allclose(loss, -1.1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"entropy_coef=0.1 needs entropy"):
        grpo_loss(f32([[-0.5, -1.1]]), None, f32([1.0]), ones, entropy_coef=0.1)


def test_on_policy_equals_old_being_the_same(batch):
    logps, _, ref, adv, mask = batch

    def with_old(x, old):
        return grpo_loss(x, old, f32(adv), jnp.asarray(mask))[0]

    x = f32(logps)
    np.testing.assert_array_equal(jax.grad(with_old)(x, None), jax.grad(with_old)(x, x))
    # The gradient is A / tokens on each token, the plain policy gradient.
    want = np.where(mask, -adv[:, None] / mask.sum(), 0)
    np.testing.assert_allclose(jax.grad(with_old)(x, None), want, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_padding_and_rubbish_under_the_mask_change_nothing(batch, aggregation):
    logps, old, ref, adv, mask = batch
    kwargs = dict(aggregation=aggregation, kl="k3", kl_coef=0.1)
    loss, metrics = run(batch, **kwargs)
    grad = jax.grad(lambda x: run((x, old, ref, adv, mask), **kwargs)[0])(f32(logps))
    pad = lambda x, fill: np.pad(x, ((0, 0), (0, 3)), constant_values=fill)  # noqa: E731
    dirty = [pad(np.where(mask, x, bad), bad) for x, bad in ((logps, np.nan), (old, -1e30), (ref, np.inf))]
    wide = (*dirty, adv, pad(mask, False))
    np.testing.assert_allclose(run(wide, **kwargs)[0], loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(wide, **kwargs)[1], metrics)
    wide_grad = jax.grad(lambda x: run((x, *wide[1:]), **kwargs)[0])(f32(wide[0]))
    np.testing.assert_allclose(wide_grad[:, :T], grad, rtol=1e-6)
    assert np.all(np.asarray(wide_grad[:, T:]) == 0)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_masked_rows_contribute_nothing(batch, aggregation):
    kwargs = dict(aggregation=aggregation, kl="k2", kl_coef=0.1)
    loss, metrics = run(batch, **kwargs)
    extra = [np.concatenate([x, x[:1] + 1.0]) for x in batch[:4]]
    mask = np.concatenate([batch[4], np.zeros((1, T), bool)])
    loss_more, metrics_more = run((*extra, mask), **kwargs)
    np.testing.assert_allclose(loss_more, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), metrics_more, metrics)


def test_ratio_is_per_token_so_length_does_not_move_it():
    """Repeating a row's tokens leaves mean ratio and sequence_mean loss as they are (no sum over the sequence inside exp)."""
    logps, old = f32([[-0.5, -1.1]]), f32([[-0.6, -1.0]])
    long = [jnp.tile(x, (1, 8)) for x in (logps, old)]
    for aggregation in ("token_mean", "sequence_mean"):
        short_loss, short = grpo_loss(logps, old, f32([1.5]), jnp.ones((1, 2), bool), aggregation=aggregation)
        long_loss, longer = grpo_loss(*long, f32([1.5]), jnp.ones((1, 16), bool), aggregation=aggregation)
        np.testing.assert_allclose(long_loss, short_loss, rtol=1e-6)
        np.testing.assert_allclose(longer["ratio"], short["ratio"], rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_micro_batches_add_up(batch, aggregation):
    kwargs = dict(aggregation=aggregation, kl="k3", kl_coef=0.1)
    totals = batch_totals(jnp.asarray(batch[4]))
    parts = [run(tuple(x[rows] for x in batch), totals=totals, **kwargs) for rows in (slice(0, 1), slice(1, 4))]
    whole = run(batch, **kwargs)
    summed = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, whole)


def test_each_option_changes_the_loss(batch):
    base = float(run(batch)[0])
    for change in (
        dict(clip_low=0.05),
        dict(clip_high=0.05),
        dict(aggregation="sequence_mean"),
        dict(aggregation="dr_grpo"),
        dict(kl="k1", kl_coef=0.5),
        dict(kl="k2", kl_coef=0.5),
        dict(kl="k3", kl_coef=0.5),
    ):
        assert abs(float(run(batch, **change)[0]) - base) > 1e-4, change
    assert run(batch, aggregation="dr_grpo", max_length=9)[0] != run(batch, aggregation="dr_grpo", max_length=18)[0]


def test_at_the_bound_the_gradient_is_whole(batch):
    """A clip of 0 binds from the second update on, not in the first."""
    logps, _, _, advantages, mask = batch
    grad = lambda **how: jax.grad(lambda x: grpo_loss(x, None, f32(advantages), jnp.asarray(mask), **how)[0])(f32(logps))  # noqa: E731
    np.testing.assert_array_equal(grad(clip_low=0.0, clip_high=0.0), grad())


def test_clip_higher_lets_rare_tokens_rise():
    """At ratio 1.25 and A > 0 the symmetric clip kills the gradient, DAPO's 0.28 does not."""
    grad = lambda high: jax.grad(  # noqa: E731
        lambda x: grpo_loss(x, f32([[-1.0]]), f32([1.0]), jnp.ones((1, 1), bool), clip_high=high)[0]
    )(f32([[-1.0 + np.log(1.25)]]))
    assert grad(0.2)[0, 0] == 0 and grad(0.28)[0, 0] < 0


def test_kl_estimators():
    logps, ref = f32([[-1.0, -2.0]]), f32([[-1.5, -1.0]])
    np.testing.assert_allclose(kl_estimate(logps, ref, "k1"), [[0.5, -1.0]], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logps, ref, "k2"), [[0.125, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logps, ref, "k3"), [[np.exp(-0.5) - 0.5, np.exp(1.0) - 2.0]], rtol=1e-6)
    # In expectation over the policy k1 and k3 are both KL(p || r).
    p, r = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    want = (p * np.log(p / r)).sum()
    for kind in ("k1", "k3"):
        np.testing.assert_allclose((p * np.asarray(kl_estimate(f32(np.log(p)), f32(np.log(r)), kind))).sum(), want, rtol=1e-5)


def test_gradients_of_the_estimators_as_loss_terms():
    """Over all tokens of a vocabulary, weighted by the policy's probabilities: k1's is zero, k2's that of KL(policy || reference), k3's that of
    the reverse. And k3 times the ratio, as TRL has it by default, has k2's at each token."""
    policy, reference = (jnp.asarray(np.random.default_rng(seed).normal(size=7), jnp.float32) for seed in (0, 1))
    ref_V = jax.nn.log_softmax(reference)

    def mean(kind):
        def loss(logits):
            logps_V = jax.nn.log_softmax(logits)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(logps_V)) * kl_estimate(logps_V[None], ref_V[None], kind)[0])

        return jax.grad(loss)(policy)

    forwards = jax.grad(lambda logits: jnp.sum(jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - ref_V)))(policy)
    backwards = jax.grad(lambda logits: -jnp.sum(jnp.exp(ref_V) * jax.nn.log_softmax(logits)))(policy)
    for kind, wanted in (("k1", jnp.zeros(7)), ("k2", forwards), ("k3", backwards)):
        np.testing.assert_allclose(mean(kind), wanted, atol=1e-6)
    assert float(jnp.abs(forwards - backwards).max()) > 0.1
    corrected = lambda x: jnp.sum(jnp.exp(x - jax.lax.stop_gradient(x)) * kl_estimate(x, ref_V, "k3"))  # noqa: E731
    plain = lambda x: jnp.sum(kl_estimate(x, ref_V, "k2"))  # noqa: E731
    np.testing.assert_allclose(jax.grad(corrected)(policy), jax.grad(plain)(policy), atol=1e-5)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"aggregation": "mean"}, "token_mean"),
        ({"kl": "k4"}, "k3"),
        ({"aggregation": "dr_grpo", "max_length": None}, "max_length"),
    ],
)
def test_refuses_unknown_options(batch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(batch, **kwargs)


def test_kl_without_a_reference_is_refused(batch):
    with pytest.raises(ValueError, match="ref_logps"):
        grpo_loss(f32(batch[0]), None, f32(batch[3]), jnp.asarray(batch[4]), kl="k3", kl_coef=0.1)


def test_all_rows_masked_gives_zero_and_no_nan(batch):
    logps, old, ref, adv, mask = batch
    for aggregation in ("token_mean", "sequence_mean", "dr_grpo"):
        value, grad = jax.value_and_grad(lambda x, a=aggregation: run((x, old, ref, adv, mask & False), aggregation=a)[0])(f32(logps))
        assert value == 0 and np.all(np.asarray(grad) == 0)
