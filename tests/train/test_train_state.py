"""Optimizer settings that each matter, and the learning-rate schedules."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_grpo as tiny

from jaxrl_llm.train.config import LossConfig, OptimizerConfig
from jaxrl_llm.train.sft import train_sft
from jaxrl_llm.train.state import abstract_state, init_state, learning_rate, make_optimizer, resolve_decay

BASE = OptimizerConfig(learning_rate=0.1, clip_norm=0.0)


def update(config, scale=1.0, steps=2):
    """Parameters after `steps` updates with a fixed gradient."""
    params = {"blocks": {"q": jnp.ones((2, 3)), "attn_norm": jnp.ones(3), "q_bias": jnp.ones(3)}, "final_norm": {"scale": jnp.ones(3)}}
    tx = make_optimizer(config)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: scale * (i + 1.0) * jnp.arange(1.0, p.size + 1).reshape(p.shape), params)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def test_first_adam_step_by_hand():
    # m_hat = g, v_hat = g^2: the step is lr g / (|g| + eps) = lr.
    np.testing.assert_allclose(update(BASE, steps=1)["blocks"]["q"], np.full((2, 3), 0.9), rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.2}, {"b1": 0.5}, {"b2": 0.5}, {"eps": 1.0}, {"weight_decay": 0.5}, {"clip_norm": 0.1}, {"warmup_steps": 4}]
)
def test_every_optimizer_knob_changes_the_step(change):
    # Clipping rescales each step's gradient to one norm, which Adam sees because the two steps' gradients differ.
    assert np.abs(tiny.flat(update(dataclasses.replace(BASE, **change))) - tiny.flat(update(BASE))).max() > 1e-4


def test_weight_decay_spares_norms_and_biases():
    plain, decayed = update(BASE), update(dataclasses.replace(BASE, weight_decay=0.5))
    assert np.all(np.asarray(decayed["blocks"]["q"]) < np.asarray(plain["blocks"]["q"]))
    for path in (("blocks", "attn_norm"), ("blocks", "q_bias"), ("final_norm", "scale")):
        np.testing.assert_array_equal(decayed[path[0]][path[1]], plain[path[0]][path[1]])


def test_schedules():
    at = lambda steps, **kw: [float(learning_rate(OptimizerConfig(learning_rate=1.0, **kw))(s)) for s in steps]  # noqa: E731
    assert at((0, 100)) == [1.0, 1.0]
    assert at((0, 1, 2, 50), warmup_steps=2) == [0.0, 0.5, 1.0, 1.0]
    np.testing.assert_allclose(at((2, 6, 10, 99), schedule="linear", warmup_steps=2, decay_steps=10, final_share=0.2), [1, 0.6, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(at((0, 5, 10), schedule="cosine", decay_steps=10), [1, 0.5, 0], atol=1e-6)


def test_decay_ends_with_the_run_unless_said_otherwise():
    falling = OptimizerConfig(schedule="cosine")
    assert resolve_decay(falling, 30).decay_steps == 30
    assert resolve_decay(dataclasses.replace(falling, decay_steps=7), 30).decay_steps == 7
    assert resolve_decay(OptimizerConfig(), 30) == resolve_decay(OptimizerConfig(), 40)


def test_abstract_state_has_the_shapes_of_the_state():
    state = init_state(tiny.CONFIG, BASE, tiny.params())
    abstract = abstract_state(tiny.CONFIG, BASE)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)]


def handed_over():
    """(function that gives a policy and keeps no hold of it, function that tells whether it is still in memory)."""
    given = [tiny.params()]
    leaf = weakref.ref(jax.tree.leaves(given[0])[0])

    def alive():
        gc.collect()
        return leaf() is not None

    return given.pop, alive


@pytest.mark.parametrize("kl", [False, True])
def test_the_start_of_grpo_stays_in_memory_for_kl_only(tmp_path, kl):
    start, alive = handed_over()
    seen = []

    def reward(inputs):
        seen.append(alive())
        return tiny.reward(inputs)

    loss = LossConfig(kl="k3", kl_coef=0.1) if kl else LossConfig()
    tiny.run(tmp_path, dataclasses.replace(tiny.TINY, steps=2, loss=loss), reward=reward, start=start)
    assert set(seen) == {kl} and not alive()


def test_the_start_of_fine_tuning_is_let_go():
    start, alive = handed_over()
    seen = []

    def batches():
        for _ in range(2):
            seen.append(alive())
            yield np.full((2, 6), 3), np.ones((2, 6), bool)

    train_sft(tiny.CONFIG, start, batches(), {"steps": 2}, progress=False)
    assert seen == [False, False]
