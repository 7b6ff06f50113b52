"""The critic of PPO: generalised advantages and the value loss, by hand, against numpy, gradients, and what must not matter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.grpo import batch_totals
from jaxrl_llm.losses.ppo import gae, token_values, value_loss

B, T = 4, 6
MASK = np.arange(T) < np.array([6, 2, 4, 0])[:, None]
RNG = np.random.default_rng(0)
REWARDS, VALUES, OLD, RETURNS = (RNG.normal(size=(B, T)) for _ in range(4))


def f32(x):
    return jnp.asarray(x, jnp.float32)


def oracle_gae(rewards, values, mask, gamma, lam):
    """The definition, sum by sum."""
    out = np.zeros(mask.shape)
    for b, length in enumerate(mask.sum(1)):
        after = np.append(values[b, :length], 0.0)
        delta = rewards[b, :length] + gamma * after[1:] - after[:-1]
        for t in range(length):
            out[b, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
    return out


def oracle_value_loss(values, old, returns, mask, clip):
    error = (values - returns) ** 2
    if clip:
        error = np.maximum(error, (old + np.clip(values - old, -clip, clip) - returns) ** 2)
    return 0.5 * np.where(mask, error, 0).sum() / mask.sum()


def test_gae_by_hand():
    # A reward of 1 at the end, values 0.5, 0.2: delta = 0.2 - 0.5 and 1 - 0.2; with gamma lam = 0.5 the first is -0.3 + 0.5 * 0.8.
    got = gae(f32([[0, 1, 9]]), f32([[0.5, 0.2, np.nan]]), jnp.array([[1, 1, 0]], bool), gamma=1.0, lam=0.5)
    np.testing.assert_allclose(got, [[0.1, 0.8, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("gamma,lam", list(itertools.product((1.0, 0.9, 0.0), (1.0, 0.95, 0.0))))
def test_gae_equals_the_sum_of_its_definition(gamma, lam):
    got = jax.jit(lambda *x: gae(*x, gamma=gamma, lam=lam))(f32(REWARDS), f32(VALUES), jnp.asarray(MASK))
    np.testing.assert_allclose(got, oracle_gae(REWARDS, VALUES, MASK, gamma, lam), rtol=1e-5, atol=1e-6)


def test_gae_at_its_ends_is_the_return_less_the_value_and_the_error_of_one_step():
    whole, one = (gae(f32(REWARDS), f32(VALUES), jnp.asarray(MASK), lam=lam) for lam in (1.0, 0.0))
    to_go = np.flip(np.cumsum(np.flip(np.where(MASK, REWARDS, 0), 1), 1), 1)
    np.testing.assert_allclose(whole, np.where(MASK, to_go - VALUES, 0), rtol=1e-5, atol=1e-6)
    following = np.where(np.roll(MASK, -1, 1) & (np.arange(T) < T - 1), np.roll(VALUES, -1, 1), 0)
    np.testing.assert_allclose(one, np.where(MASK, REWARDS + following - VALUES, 0), rtol=1e-5, atol=1e-6)


def test_padding_and_rubbish_under_the_mask_change_no_advantage():
    want = gae(f32(REWARDS), f32(VALUES), jnp.asarray(MASK))
    wide = [np.pad(np.where(MASK, x, bad), ((0, 1), (0, 3)), constant_values=bad) for x, bad in ((REWARDS, np.nan), (VALUES, np.inf))]
    got = gae(f32(wide[0]), f32(wide[1]), jnp.asarray(np.pad(MASK, ((0, 1), (0, 3)))))
    np.testing.assert_array_equal(got[:B, :T], want)
    assert np.all(np.asarray(got[B:]) == 0) and np.all(np.asarray(got[:, T:]) == 0)


def test_value_loss_by_hand():
    # V = 1 (old 0, return 2): plain error 1, clipped to 0.2 error 3.24; V = 0.1 (old 0, return 1): 0.81 either way.
    got = value_loss(f32([[1.0, 0.1]]), f32([[0.0, 0.0]]), f32([[2.0, 1.0]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(got, 0.5 * (3.24 + 0.81) / 2, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_value_loss_and_gradient_equal_numpy(clip):
    loss = lambda x: value_loss(x, f32(OLD), f32(RETURNS), jnp.asarray(MASK), clip=clip)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(f32(VALUES))
    np.testing.assert_allclose(value, oracle_value_loss(VALUES, OLD, RETURNS, MASK, clip), rtol=1e-5)
    for i, j in itertools.product(range(B), range(T)):
        moved = [VALUES.copy(), VALUES.copy()]
        moved[0][i, j] += 1e-6
        moved[1][i, j] -= 1e-6
        up, down = (oracle_value_loss(x, OLD, RETURNS, MASK, clip) for x in moved)
        np.testing.assert_allclose(grad[i, j], (up - down) / 2e-6, rtol=1e-4, atol=1e-6)
    pad = lambda x, bad: f32(np.pad(np.where(MASK, x, bad), ((0, 0), (0, 2)), constant_values=bad))  # noqa: E731
    wide = lambda x: value_loss(x, pad(OLD, np.inf), pad(RETURNS, np.nan), jnp.pad(jnp.asarray(MASK), ((0, 0), (0, 2))), clip=clip)  # noqa: E731
    value_wide, grad_wide = jax.value_and_grad(wide)(pad(VALUES, np.nan))
    np.testing.assert_allclose(value_wide, value, rtol=1e-6)
    np.testing.assert_allclose(grad_wide[:, :T], grad, rtol=1e-6)
    assert np.all(np.asarray(grad_wide[:, T:]) == 0)
    totals = batch_totals(jnp.asarray(MASK))
    parts = [
        value_loss(*(f32(x[r]) for x in (VALUES, OLD, RETURNS)), jnp.asarray(MASK[r]), clip=clip, totals=totals) for r in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(sum(parts), value, rtol=1e-6)


def test_no_tokens_no_loss():
    assert value_loss(f32(VALUES), f32(OLD), f32(RETURNS), jnp.zeros((B, T), bool)) == 0


def test_values_are_linear_in_the_states_and_fp32():
    hidden = RNG.normal(size=(2, 3, 5))
    kernel = RNG.normal(size=5)
    np.testing.assert_allclose(token_values(f32(hidden), f32(kernel), f32(0.5)), hidden @ kernel + 0.5, rtol=1e-5)
    assert token_values(jnp.asarray(hidden, jnp.bfloat16), f32(kernel), f32(0.5)).dtype == jnp.float32
