"""SFT loss: by hand, gradient, masking and micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.losses.sft import sft_loss

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
