"""RLOO, REINFORCE++, GSPO, CISPO, the sampler's weight and DAPO's length penalty: by hand, against a float64 numpy oracle, gradients, and
what must not matter. Plain GRPO is in test_grpo_loss.py, the numbers of TRL in test_trl_parity.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.grpo import batch_advantages, batch_totals, group_advantages, grpo_loss, kl_estimate, overlong_penalty, to_go

B, T = 4, 6
MASK = np.arange(T) < np.array([6, 2, 4, 1])[:, None]
NAMES = ("logps", "old", "sampler", "ref", "advantages")


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def batch():
    """Log-probabilities under four policies, and an advantage a row."""
    rng = np.random.default_rng(0)
    logps = -rng.uniform(0.1, 3.0, (B, T))
    others = [logps + rng.normal(0, scale, (B, T)) for scale in (0.4, 0.3, 0.5)]
    return dict(zip(NAMES, (logps, *others, rng.normal(size=B)), strict=True))


def run(batch, mask=MASK, **kwargs):
    kwargs = {"max_length": 9, "sampler_logps": f32(batch["sampler"]), "ref_logps": f32(batch["ref"])} | kwargs
    return grpo_loss(f32(batch["logps"]), f32(batch["old"]), f32(batch["advantages"]), jnp.asarray(mask), **kwargs)


def row_mean(x, mask):
    return np.where(mask, x, 0).sum(1, keepdims=True) / mask.sum(1, keepdims=True)


def oracle(batch, mask=MASK, frozen=None, *, ratio, surrogate, mismatch, cap=2.0, low=0.2, high=0.2, aggregation="token_mean", kl_coef=0.0):
    """The loss in numpy. frozen: log-probabilities at which what has no gradient is taken; those of the batch otherwise."""
    logps, adv = batch["logps"], batch["advantages"]
    frozen = logps if frozen is None else frozen
    adv = adv[:, None] if adv.ndim == 1 else adv
    at = {
        "token": logps - batch["old"],
        "sequence": row_mean(logps - batch["old"], mask) + 0 * logps,
        "sequence_token": row_mean(frozen - batch["old"], mask) + logps - frozen,
    }[ratio]
    r = np.exp(at)
    if surrogate == "cispo":
        still = row_mean(frozen - batch["old"], mask) if ratio == "sequence" else frozen - batch["old"]
        loss = -np.clip(np.exp(still), 1 - low, 1 + high) * adv * logps
    else:
        loss = -np.minimum(r * adv, np.clip(r, 1 - low, 1 + high) * adv)
    if mismatch:
        gap = batch["old"] - batch["sampler"]
        loss = loss * np.minimum(np.exp(row_mean(gap, mask) if mismatch == "sequence" else gap), cap)
    d = batch["ref"] - logps
    loss = np.where(mask, loss + kl_coef * (np.exp(d) - 1 - d), 0)
    if aggregation == "token_mean":
        return loss.sum() / mask.sum()
    return (loss.sum(1) / mask.sum(1)).mean() if aggregation == "sequence_mean" else loss.sum() / (len(mask) * 9)


OBJECTIVES = [
    dict(ratio=ratio, surrogate=surrogate, mismatch=mismatch)
    for ratio, surrogate, mismatch in itertools.product(("token", "sequence", "sequence_token"), ("clip", "cispo"), (None, "token", "sequence"))
    if (ratio, surrogate) != ("sequence_token", "cispo")
]
AGGREGATIONS = ("token_mean", "sequence_mean", "dr_grpo")


# --- advantages ------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    # Group 0: 1 against the mean of (0, 0.5) = 0.25, 0 against 0.75, 0.5 against 0.5; group 1: 3 against 1 and 1 against 3.
    rewards, ids = f32([1, 3, 0, 0.5, 1]), jnp.array([0, 1, 0, 0, 1])
    got = group_advantages(rewards, ids, 2, jnp.ones(5, bool), baseline="leave_one_out", scale="none")
    np.testing.assert_allclose(got, [0.75, 2, -0.75, 0, -2], atol=1e-6)


@pytest.mark.parametrize("scale,ddof", [("none", 1), ("batch_std", 0), ("batch_std", 1), ("group_std", 1)])
def test_leave_one_out_equals_numpy(scale, ddof):
    rng = np.random.default_rng(3)
    ids, rewards, valid = rng.permutation(np.repeat(np.arange(4), 5)), rng.normal(size=20), rng.random(20) > 0.2
    want, std = np.zeros(20), np.ones(20)
    for i in np.flatnonzero(valid):
        group = (ids == ids[i]) & valid
        want[i] = rewards[i] - rewards[group & (np.arange(20) != i)].mean()
        std[i] = rewards[group].std(ddof=ddof) + 1e-4
    if scale == "batch_std":
        std = np.sqrt((want**2).sum() / (valid.sum() - ddof)) + 1e-4
    want = want if scale == "none" else want / std
    if scale == "group_std":  # the std of n / (n - 1) times the centred rewards
        counts = np.array([((ids == i) & valid).sum() for i in ids])
        want = want * (counts - 1) / np.maximum(counts, 1)
    got = group_advantages(f32(rewards), jnp.asarray(ids), 4, jnp.asarray(valid), baseline="leave_one_out", scale=scale, ddof=ddof)
    np.testing.assert_allclose(got, want, rtol=3e-4 if scale == "group_std" else 2e-5, atol=1e-6)


def test_leave_one_out_teaches_nothing_where_there_is_nothing_to_compare():
    how = dict(baseline="leave_one_out", scale="none")
    assert np.all(np.asarray(group_advantages(jnp.full(7, 0.1), jnp.zeros(7, int), 1, jnp.ones(7, bool), **how)) == 0)
    alone = group_advantages(f32([3.0, 9.0]), jnp.zeros(2, int), 1, jnp.array([True, False]), **how)
    assert np.all(np.asarray(alone) == 0)
    with pytest.raises(ValueError, match="leave_one_out"):
        group_advantages(f32([1.0]), jnp.zeros(1, int), 1, jnp.ones(1, bool), baseline="batch_mean")


def test_batch_advantages_by_hand():
    # Tokens 1, 1, 1 of one row and 5 of another: mean 2, deviations -1, -1, -1, 3, std (n - 1) = sqrt(12 / 3) = 2.
    returns, mask = f32([[1, 1, 1], [5, 99, np.nan]]), jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    np.testing.assert_allclose(batch_advantages(returns, mask, eps=0.0), [[-0.5, -0.5, -0.5], [1.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(batch_advantages(returns, mask, scale="none"), [[-1, -1, -1], [3, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_batch_advantages_equal_numpy_and_padding_changes_nothing(ddof):
    returns = np.random.default_rng(1).normal(size=(B, T))
    chosen = returns[MASK]
    want = np.where(MASK, (returns - chosen.mean()) / (chosen.std(ddof=ddof) + 1e-4), 0)
    got = batch_advantages(f32(returns), jnp.asarray(MASK), ddof=ddof)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    wide = np.pad(np.where(MASK, returns, np.inf), ((0, 2), (0, 3)), constant_values=np.nan)
    padded = batch_advantages(f32(wide), jnp.asarray(np.pad(MASK, ((0, 2), (0, 3)))), ddof=ddof)
    np.testing.assert_allclose(padded[:B, :T], got, rtol=1e-6)
    assert np.all(np.asarray(padded[B:]) == 0) and np.all(np.asarray(padded[:, T:]) == 0)


def test_batch_of_equal_or_no_returns_has_exactly_zero():
    equal = batch_advantages(jnp.full((3, 7), 0.1), jnp.ones((3, 7), bool), eps=1e-8)
    empty = batch_advantages(jnp.full((3, 7), 0.1), jnp.zeros((3, 7), bool))
    assert np.all(np.asarray(equal) == 0) and np.all(np.asarray(empty) == 0)
    with pytest.raises(ValueError, match="batch_std"):
        batch_advantages(jnp.ones((1, 1)), jnp.ones((1, 1), bool), scale="group_std")


def test_to_go_sums_what_is_left_of_the_row():
    values, mask = f32([[1, 2, 4, 8], [16, np.nan, 1, 1]]), jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(to_go(values, mask), [[7, 6, 4, 0], [16, 0, 0, 0]])


def test_reinforce_pp_returns_by_hand():
    """Eq. 8: the reward, less beta times the KL of a token and of those after it."""
    mask = jnp.ones((1, 3), bool)
    kl = kl_estimate(f32([[-1.0, -1.0, -1.0]]), f32([[-1.5, -1.0, -2.0]]), "k1")  # 0.5, 0, 1
    returns = 2.0 - 0.1 * to_go(kl, mask)
    np.testing.assert_allclose(returns, [[1.85, 1.9, 1.9]], rtol=1e-6)


def test_overlong_penalty_by_hand():
    # DAPO's own numbers in thousands: 20 is the limit, the last 4 are the buffer.
    np.testing.assert_allclose(overlong_penalty(jnp.array([1, 16, 17, 18, 20, 25]), 20, 4), [0, 0, -0.25, -0.5, -1, -1])
    for buffer in (0, 21):
        with pytest.raises(ValueError, match="from 1 to the limit of 20"):
            overlong_penalty(jnp.array([1]), 20, buffer)


# --- objectives ------------------------------------------------------------------------------------------------------


def test_gspo_by_hand():
    # Log-ratios 0.3 and -0.1 have the mean 0.1: one ratio of e^0.1, inside the clip; a second row of 0.5 and 0.5 is clipped at 1.2.
    logps, old = f32([[-0.7, -1.1], [-0.5, -0.5]]), f32([[-1.0, -1.0], [-1.0, -1.0]])
    loss, metrics = grpo_loss(logps, old, f32([2.0, 1.0]), jnp.ones((2, 2), bool), ratio="sequence", aggregation="sequence_mean")
    np.testing.assert_allclose(loss, -(2 * np.exp(0.1) + 1.2) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_share"], 0.5)
    np.testing.assert_allclose(metrics["ratio"], (np.exp(0.1) + np.exp(0.5)) / 2, rtol=1e-6)


def test_cispo_by_hand_and_no_token_loses_its_gradient():
    logps, old, ones = f32([[-0.5, -1.1]]), f32([[-1.0, -1.0]]), jnp.ones((1, 2), bool)
    objective = lambda x, surrogate: grpo_loss(x, old, f32([2.0]), ones, surrogate=surrogate)[0]  # noqa: E731
    np.testing.assert_allclose(objective(logps, "cispo"), (1.2 * 2 * 0.5 + np.exp(-0.1) * 2 * 1.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(objective)(logps, "cispo"), [[-1.2, -np.exp(-0.1)]], rtol=1e-6)
    assert jax.grad(objective)(logps, "clip")[0, 0] == 0


def test_mismatch_weight_by_hand():
    # Trainer over sampler: e^0.2 and e^1.5, the second capped at 2; over the sequence e^0.85, capped too.
    old, sampler, adv, ones = f32([[-1.0, -1.0]]), f32([[-1.2, -2.5]]), f32([3.0]), jnp.ones((1, 2), bool)
    loss, metrics = grpo_loss(old, None, adv, ones, mismatch="token", sampler_logps=sampler)
    np.testing.assert_allclose(loss, -3 * (np.exp(0.2) + 2) / 2, rtol=1e-6)
    np.testing.assert_allclose([metrics["mismatch_weight"], metrics["mismatch_share"]], [(np.exp(0.2) + 2) / 2, 0.5], rtol=1e-6)
    loss, metrics = grpo_loss(old, None, adv, ones, mismatch="sequence", sampler_logps=sampler, mismatch_cap=4.0)
    np.testing.assert_allclose(loss, -3 * np.exp(0.85), rtol=1e-6)
    assert metrics["mismatch_share"] == 0


@pytest.mark.parametrize("how", OBJECTIVES)
def test_objective_equals_numpy(batch, how):
    for aggregation, high in itertools.product(AGGREGATIONS, (0.2, 4.0)):
        got, metrics = run(batch, clip_high=high, mismatch_cap=1.2, aggregation=aggregation, kl="k3", kl_coef=0.3, **how)
        want = oracle(batch, high=high, cap=1.2, aggregation=aggregation, kl_coef=0.3, **how)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert ("mismatch_weight" in metrics) == (how["mismatch"] is not None)


@pytest.mark.parametrize("how", OBJECTIVES)
def test_gradient_equals_finite_differences(batch, how):
    kwargs = dict(aggregation="sequence_mean", kl_coef=0.3, **how)
    grad = jax.grad(lambda x: run(batch | {"logps": x}, kl="k3", **kwargs)[0])(f32(batch["logps"]))
    eps = 1e-6
    for i, j in itertools.product(range(B), range(T)):
        up, down = batch["logps"].copy(), batch["logps"].copy()
        up[i, j] += eps
        down[i, j] -= eps
        slope = np.subtract(*(oracle(batch | {"logps": x}, frozen=batch["logps"], **kwargs) for x in (up, down))) / (2 * eps)
        np.testing.assert_allclose(grad[i, j], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", OBJECTIVES)
def test_padding_and_rubbish_under_the_mask_change_nothing(batch, how):
    kwargs = dict(kl="k3", kl_coef=0.1, **how)
    loss, metrics = run(batch, **kwargs)
    grad = jax.grad(lambda x: run(batch | {"logps": x}, **kwargs)[0])(f32(batch["logps"]))
    wide = {"advantages": np.pad(batch["advantages"], (0, 2), constant_values=7.0)}
    for name, bad in zip(NAMES[:4], (np.nan, -1e30, np.inf, np.inf), strict=True):
        wide[name] = np.pad(np.where(MASK, batch[name], bad), ((0, 2), (0, 3)), constant_values=bad)
    mask = np.pad(MASK, ((0, 2), (0, 3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(wide, mask, **kwargs), (loss, metrics))
    wide_grad = np.asarray(jax.grad(lambda x: run(wide | {"logps": x}, mask, **kwargs)[0])(f32(wide["logps"])))
    np.testing.assert_allclose(wide_grad[:B, :T], grad, rtol=1e-6)
    assert np.all(wide_grad[B:] == 0) and np.all(wide_grad[:, T:] == 0)


@pytest.mark.parametrize("how", OBJECTIVES)
def test_micro_batches_add_up(batch, how):
    for aggregation in AGGREGATIONS:
        kwargs = dict(aggregation=aggregation, kl="k2", kl_coef=0.1, totals=batch_totals(jnp.asarray(MASK)), **how)
        parts = [run({name: x[rows] for name, x in batch.items()}, MASK[rows], **kwargs) for rows in (slice(0, 1), slice(1, 4))]
        summed = jax.tree.map(lambda a, b: a + b, *parts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, run(batch, **kwargs))


@pytest.mark.parametrize("how", [h for h in OBJECTIVES if h["surrogate"] == "clip"])
def test_length_moves_no_ratio(batch, how):
    """A row of two equal halves has the ratio, the weight and the loss of one half: nothing is summed over the sequence inside exp."""
    kwargs = dict(aggregation="sequence_mean", **how)
    half = {name: x[:1] for name, x in batch.items()}
    double = {name: x if x.ndim == 1 else np.tile(x, (1, 2)) for name, x in half.items()}
    short, long = (run(b, np.ones_like(b["logps"], bool), **kwargs) for b in (half, double))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), long, short)
    assert abs(float(short[1]["ratio"]) - 1) > 1e-3


def test_gspo_token_has_the_value_and_gradient_of_gspo_until_advantages_differ_by_token(batch):
    """Eq. 14-17: with one advantage a row both are one objective; by token they are not."""
    both = [
        jax.value_and_grad(lambda x, r=ratio: run(batch | {"logps": x}, ratio=r, aggregation="sequence_mean")[0])(f32(batch["logps"]))
        for ratio in ("sequence", "sequence_token")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), *both)
    by_token = batch | {"advantages": np.random.default_rng(2).normal(size=(B, T))}
    grads = [
        np.asarray(jax.grad(lambda x, r=ratio: run(by_token | {"logps": x}, ratio=r, aggregation="sequence_mean")[0])(f32(batch["logps"])))
        for ratio in ("sequence", "sequence_token")
    ]
    assert np.abs(grads[0] - grads[1]).max() > 1e-3


@pytest.mark.parametrize("how", OBJECTIVES)
def test_advantages_by_token_equal_numpy_and_those_by_row_where_they_agree(batch, how):
    by_token = batch | {"advantages": np.random.default_rng(2).normal(size=(B, T))}
    np.testing.assert_allclose(run(by_token, **how)[0], oracle(by_token, **how), rtol=1e-5)
    spread = batch | {"advantages": np.repeat(batch["advantages"][:, None], T, axis=1)}
    np.testing.assert_allclose(run(spread, **how)[0], run(batch, **how)[0], rtol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
def test_on_policy_every_ratio_is_the_plain_policy_gradient(batch, ratio):
    for surrogate in ("clip", "cispo"):
        grad = jax.grad(
            lambda x, s=surrogate: grpo_loss(
                x, None, f32(batch["advantages"]), jnp.asarray(MASK), ratio=ratio, surrogate=s, aggregation="sequence_mean"
            )[0]
        )(f32(batch["logps"]))
        want = np.where(MASK, -batch["advantages"][:, None] / MASK.sum(1, keepdims=True) / B, 0)
        np.testing.assert_allclose(grad, want, rtol=1e-6)


def test_mismatch_weight_stays_as_it_is_while_the_policy_moves(batch):
    """It compares the trainer's old policy with the sampler, whatever the trained policy is by now."""
    weights = {
        float(run(batch | {"logps": batch["logps"] + shift}, mismatch="token")[1]["mismatch_weight"]) for shift in (0.0, 0.3, -0.4)
    }
    assert len(weights) == 1


def test_each_option_changes_the_loss(batch):
    base = float(run(batch)[0])
    for change in (dict(ratio="sequence"), dict(surrogate="cispo"), dict(mismatch="token"), dict(mismatch="sequence")):
        assert abs(float(run(batch, **change)[0]) - base) > 1e-4, change
    assert run(batch, mismatch="token", mismatch_cap=1.1)[0] != run(batch, mismatch="token")[0]


@pytest.mark.parametrize(
    "kwargs,message", [({"ratio": "row"}, "sequence_token"), ({"surrogate": "ppo"}, "cispo"), ({"mismatch": "geo"}, "token")]
)
def test_refuses_unknown_options(batch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(batch, **kwargs)


def test_mismatch_without_the_samplers_numbers_is_refused(batch):
    with pytest.raises(ValueError, match="sampler_logps"):
        run(batch, mismatch="token", sampler_logps=None)
