"""Chunked token log-probabilities against a float64 numpy oracle, and their memory by ahead-of-time compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.logprobs import default_chunk, token_logprobs

B, T, D, V = 3, 7, 5, 11


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, D)), rng.normal(size=(D, V)), rng.integers(0, V, (B, T))


def oracle(hidden, unembed, targets, temperature=1.0):
    logits = hidden @ unembed / temperature
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logps, targets[..., None], -1)[..., 0], -(np.exp(logps) * logps).sum(-1)


def call(hidden, unembed, targets, **kwargs):
    return token_logprobs(jnp.asarray(hidden, jnp.float32), jnp.asarray(unembed, jnp.float32), jnp.asarray(targets), **kwargs)


def test_hand_computed():
    # Two tokens, logits (0, ln 3): probabilities 1/4 and 3/4.
    logps, entropy = call(np.ones((1, 2, 1)), np.array([[0.0, np.log(3.0)]]), np.array([[0, 1]]), with_entropy=True)
    np.testing.assert_allclose(logps, [[np.log(0.25), np.log(0.75)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[-(0.25 * np.log(0.25) + 0.75 * np.log(0.75))] * 2], rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1, 3, 6, 8, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_numpy_at_every_chunk_size(inputs, chunk, temperature):
    logps, entropy = call(*inputs, temperature=temperature, chunk=chunk, with_entropy=True)
    want_logps, want_entropy = oracle(*inputs, temperature)
    np.testing.assert_allclose(logps, want_logps, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(entropy, want_entropy, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradient_equals_finite_differences(inputs, chunk):
    hidden, unembed, targets = inputs
    weights = np.random.default_rng(1).normal(size=(B, T))

    def loss(h, w):
        return jnp.sum(call(h, w, targets, temperature=0.8, chunk=chunk, with_entropy=True)[0] * weights)

    grads = jax.grad(loss, argnums=(0, 1))(jnp.asarray(hidden, jnp.float32), jnp.asarray(unembed, jnp.float32))
    eps = 1e-6
    for which, grad in enumerate(grads):
        array = inputs[which]
        for flat in (0, 3, array.size - 1):
            moved = []
            for sign in (1, -1):
                bumped = array.copy()
                bumped.flat[flat] += sign * eps
                args = [bumped, unembed] if which == 0 else [hidden, bumped]
                moved.append((oracle(*args, targets, 0.8)[0] * weights).sum())
            np.testing.assert_allclose(grad.reshape(-1)[flat], (moved[0] - moved[1]) / (2 * eps), rtol=1e-4, atol=1e-5)


def test_without_entropy_returns_none(inputs):
    assert call(*inputs)[1] is None
    assert call(*inputs, chunk=3)[1] is None


def test_entropy_carries_no_gradient(inputs):
    hidden, unembed, targets = inputs
    grad = jax.grad(lambda h: call(h, unembed, targets, with_entropy=True)[1].sum())(jnp.asarray(hidden, jnp.float32))
    assert np.all(np.asarray(grad) == 0)


@pytest.mark.parametrize("chunk", [None, 4])
def test_entropy_of_a_loss_has_a_gradient(inputs, chunk):
    hidden, unembed, targets = inputs
    weights = np.random.default_rng(1).normal(size=(B, T))
    told = lambda h: call(h, unembed, targets, temperature=0.8, chunk=chunk, with_entropy="gradient")  # noqa: E731
    metric = call(hidden, unembed, targets, temperature=0.8, chunk=chunk, with_entropy=True)[1]
    np.testing.assert_array_equal(told(hidden)[1], metric)
    grad = jax.grad(lambda h: jnp.sum(told(h)[1] * weights))(jnp.asarray(hidden, jnp.float32))
    for flat in (0, 3, hidden.size - 1):
        moved = [hidden.copy(), hidden.copy()]
        moved[0].flat[flat] += 1e-6
        moved[1].flat[flat] -= 1e-6
        up, down = ((oracle(h, unembed, targets, 0.8)[1] * weights).sum() for h in moved)
        np.testing.assert_allclose(grad.reshape(-1)[flat], (up - down) / 2e-6, rtol=1e-4, atol=1e-5)


def test_bf16_head_accumulates_in_fp32():
    rng = np.random.default_rng(2)
    hidden, unembed = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((1, 4, 896), (896, 64)))
    targets = rng.integers(0, 64, (1, 4))
    logps, _ = token_logprobs(hidden, unembed, jnp.asarray(targets))
    want, _ = oracle(np.asarray(hidden, np.float64), np.asarray(unembed, np.float64), targets)
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, want, atol=2e-3)  # bf16 logits would be off by about 0.1 here


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {"temperature": -1.0}, {"chunk": 0}])
def test_refuses_what_has_no_meaning(inputs, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        call(*inputs, **kwargs)


def test_gradient_temporaries_stay_under_2_gib_at_a_152k_vocabulary():
    """The issue's bar: 8 x 512 tokens, Qwen2's vocabulary and width. Compiles only, no array is made."""
    struct = jax.ShapeDtypeStruct
    args = (struct((8, 512, 896), jnp.float32), struct((896, 151_936), jnp.float32), struct((8, 512), jnp.int32))

    def loss(hidden, unembed, targets):
        return token_logprobs(hidden, unembed, targets)[0].mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    assert step.lower(*args).compile().memory_analysis().temp_size_in_bytes < 2 * 2**30
    assert 8 * 512 * 151_936 * 4 > 2 * 2**30  # the bar excludes even one copy of the full logits
    assert default_chunk(151_936) * 151_936 * 4 <= 2**27
