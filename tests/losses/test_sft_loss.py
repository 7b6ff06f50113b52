"""SFT loss: by hand, gradient, masking and micro-batches; the balance of a mixture's experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.sft import load_balancing_loss, sft_loss

LOGPS = jnp.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
MASK = jnp.array([[1, 1, 0], [0, 1, 0]], bool)


def test_by_hand_and_gradient():
    value, grad = jax.value_and_grad(lambda x: sft_loss(x, MASK)[0])(LOGPS)
    np.testing.assert_allclose(value, (1 + 2 + 5) / 3, rtol=1e-6)
    np.testing.assert_allclose(grad, np.asarray(MASK) / -3, rtol=1e-6)
    np.testing.assert_allclose(sft_loss(LOGPS, MASK)[1]["nll"], value)


def test_rubbish_under_the_mask_changes_nothing():
    dirty = jnp.where(MASK, LOGPS, jnp.nan)
    value, grad = jax.value_and_grad(lambda x: sft_loss(x, MASK)[0])(dirty)
    np.testing.assert_allclose(value, sft_loss(LOGPS, MASK)[0])
    assert np.isfinite(np.asarray(grad)).all()


def test_micro_batches_add_up_by_tokens_not_by_rows():
    total = jnp.float32(MASK.sum())
    parts = [sft_loss(LOGPS[i : i + 1], MASK[i : i + 1], total_tokens=total)[0] for i in range(2)]
    np.testing.assert_allclose(sum(parts), sft_loss(LOGPS, MASK)[0], rtol=1e-6)


def test_empty_mask_is_zero():
    assert sft_loss(LOGPS, MASK & False)[0] == 0


ROUTER = np.random.default_rng(0).normal(size=(3, 2, 5, 4)).astype(np.float32)  # layers, rows, tokens, experts
REAL = np.arange(5) < np.array([[5], [2]])


def balance_of(logits, real, k):
    """The published formula in float64, one token after the other."""
    shares, means = np.zeros(logits.shape[-1]), np.zeros(logits.shape[-1])
    for layer in logits:
        for scores in layer[real].astype(float):
            probs = np.exp(scores - scores.max())
            probs /= probs.sum()
            means += probs
            shares[np.argsort(-probs)[:k]] += 1
    count = len(logits) * real.sum()
    return logits.shape[-1] * np.sum(shares * means) / count**2


@pytest.mark.parametrize("k", [1, 2])
def test_balance_of_experts_against_the_formula(k):
    np.testing.assert_allclose(load_balancing_loss(ROUTER, REAL, k), balance_of(ROUTER, REAL, k), rtol=1e-6)
    dirty = np.where(REAL[..., None], ROUTER, 1e4)
    np.testing.assert_allclose(load_balancing_loss(dirty, REAL, k), balance_of(ROUTER, REAL, k), rtol=1e-6)
    assert load_balancing_loss(ROUTER, REAL & False, k) == 0


def test_the_most_uneven_balance_is_the_number_of_experts():
    same = jnp.zeros((1, 1, 3, 4)).at[..., 1].set(90.0).at[..., 2].set(90.0)
    np.testing.assert_allclose(load_balancing_loss(same, jnp.ones((1, 3), bool), 2), 4.0, rtol=1e-6)


def test_balance_by_hand():
    """Two tokens, two experts, one a token: each its own with certainty gives 1, both the same 2; half-certain 1 + (2 p - 1) of the way."""
    certain = jnp.array([[[[50.0, 0.0], [0.0, 50.0]]]])
    everyone = jnp.ones((1, 2), bool)
    np.testing.assert_allclose(load_balancing_loss(certain, everyone, 1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(load_balancing_loss(certain.at[..., 1, :].set(certain[..., 0, :]), everyone, 1), 2.0, rtol=1e-6)
    leaning = jnp.log(jnp.array([[[[0.75, 0.25], [0.75, 0.25]]]]))
    np.testing.assert_allclose(load_balancing_loss(leaning, everyone, 1), 1.5, rtol=1e-6)


def test_gradient_of_balance_leads_away_from_the_crowded_expert():
    crowded = jnp.asarray(ROUTER).at[..., 2].add(3.0)
    grad = jax.grad(lambda x: load_balancing_loss(x, REAL, 1))(crowded)
    assert (np.asarray(grad[..., 2])[:, REAL] > 0).all() and not np.asarray(grad)[:, ~REAL].any()
    step = 1e-3
    moved = [load_balancing_loss(crowded.at[0, 0, 0, 2].add(sign * step), REAL, 1) for sign in (1, -1)]
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), grad[0, 0, 0, 2], rtol=0.05)


def test_balance_equals_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    flat = tuple(torch.tensor(layer.reshape(-1, 4)) for layer in ROUTER)
    wanted = load_balancing_loss_func(flat, num_experts=4, top_k=2, attention_mask=torch.tensor(REAL.astype(np.int64)))
    np.testing.assert_allclose(load_balancing_loss(ROUTER, REAL, 2), float(wanted), rtol=1e-6)
