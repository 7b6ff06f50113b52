"""PPO in the update: the critic's targets, its head in the training state, one forward pass for policy and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_grpo as tiny
from test_grpo_step import C, N, assert_same, counted, grads_of, in_micro_batches, make_batch, spec

import models
from jaxrl_llm.train.config import LossConfig
from jaxrl_llm.train.forward import completion_hidden
from jaxrl_llm.train.state import VALUE_HEAD, abstract_state, init_state, policy_params, trunk
from jaxrl_llm.train.step import compiled_update, compiled_values, critic_targets

PPO = LossConfig(baseline="value", advantage_scale="batch_std", gae_lambda=0.9, gamma=0.95)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    head = {"kernel": jnp.asarray(rng.normal(size=tiny.CONFIG.d_model) / 4, jnp.float32), "bias": jnp.float32(0.3)}
    return tiny.params() | {VALUE_HEAD: head}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(6)
    return make_batch() | {name: rng.normal(size=(1, N, C)).astype(np.float32) for name in ("values", "kl", "old_logps")}


def test_values_are_the_heads_of_the_states_before_each_token(params, batch):
    micro = jax.tree.map(lambda x: x[0], batch)
    hidden = completion_hidden(
        tiny.CONFIG, trunk(params), *(micro[k] for k in ("prompts", "prompt_lengths", "completions", "lengths")), shared_prefix=False
    )
    want = np.asarray(hidden, np.float64) @ np.asarray(params[VALUE_HEAD]["kernel"], np.float64) + 0.3
    for how in (spec(PPO), spec(PPO, shared_prefix=False)):
        got = np.asarray(compiled_values(how)(params, batch))[0]
        np.testing.assert_allclose(got[counted(batch)[0]], want[counted(batch)[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["loss", "sequence_reward", "token_reward"])
def test_targets_equal_numpy(batch, place):
    s = spec(dataclasses.replace(PPO, kl="k1", kl_coef=0.1, kl_place=place))
    mask, lengths = counted(batch)[0], batch["lengths"][0]
    rewards = np.zeros((N, C))
    for i in np.flatnonzero(batch["valid"][0]):
        kl = batch["kl"][0, i, : lengths[i]]
        rewards[i, lengths[i] - 1] = batch["rewards"][0, i] - (0.1 * kl.sum() if place == "sequence_reward" else 0)
        rewards[i, : lengths[i]] -= 0.1 * kl if place == "token_reward" else 0
    raw = np.zeros((N, C))
    for i in np.flatnonzero(batch["valid"][0]):
        after, advantage = 0.0, 0.0
        for t in reversed(range(lengths[i])):
            advantage = rewards[i, t] + 0.95 * after - batch["values"][0, i, t] + 0.95 * 0.9 * advantage
            raw[i, t], after = advantage, batch["values"][0, i, t]
    scaled = np.where(mask, (raw - raw[mask].mean()) / (raw[mask].std(ddof=1) + 1e-4), 0)
    for data in (batch, in_micro_batches(batch, 1)):
        targets = critic_targets(s, data)
        np.testing.assert_allclose(np.asarray(targets["advantages"]).reshape(N, C), scaled, rtol=1e-4, atol=1e-5)
        returns = np.asarray(targets["returns"]).reshape(N, C)
        np.testing.assert_allclose(returns[mask], (raw + batch["values"][0])[mask], rtol=1e-4, atol=1e-5)


def test_micro_batches_and_paths_give_one_gradient(params, batch):
    whole = grads_of(spec(PPO), params, batch)
    assert np.abs(np.asarray(whole[2][VALUE_HEAD]["kernel"])).max() > 1e-3 and whole[1]["value_loss"] > 0
    for how, groups in ((spec(PPO), 1), (spec(PPO, shared_prefix=False, remat=True), 2), (spec(PPO, length_buckets=3), 1)):
        parts = grads_of(how, params, in_micro_batches(batch, groups))
        np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
        assert_same(parts[1:3], whole[1:3], atol=1e-6)


def test_every_knob_of_the_critic_changes_the_gradient(params, batch):
    base = tiny.flat(grads_of(spec(PPO), params, batch)[2])
    for change in ({"gamma": 0.5}, {"gae_lambda": 0.2}, {"value_coef": 2.0}, {"value_clip": 0.01}, {"advantage_scale": "none"}):
        other = tiny.flat(grads_of(spec(dataclasses.replace(PPO, **change)), params, batch)[2])
        assert np.abs(other - base).max() > 1e-5, change


def test_state_with_a_critic_has_its_head_and_the_policy_has_none(params):
    s = spec(PPO)
    state = init_state(tiny.CONFIG, s.optimizer, tiny.params(), critic=True)
    assert not np.asarray(state["params"][VALUE_HEAD]["kernel"]).any()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_state(tiny.CONFIG, s.optimizer, critic=True))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.structure(policy_params(tiny.CONFIG, state["params"])) == jax.tree.structure(models.abstract_params(tiny.CONFIG))
    batch = make_batch() | {"values": np.zeros((1, N, C), np.float32)}
    values = [np.asarray(compiled_values(s)(state["params"], batch))]
    for _ in range(30):
        state, metrics, _ = compiled_update(s)(state, batch)
        values.append(np.asarray(compiled_values(s)(state["params"], batch)))
    # The critic comes to know the returns: with old values of 0 and nothing discounted they are the rewards.
    target = np.asarray(critic_targets(s, batch)["returns"])
    miss = [np.square(v - target)[counted(batch)].mean() for v in values]
    assert miss[-1] < 0.9 * miss[0]


MESH = """
import sys; sys.path.insert(0, "tests/train")
import jax, numpy as np, models.sharding
import tiny_grpo as tiny, test_grpo_step as t
from jaxrl_llm.train.config import LossConfig
from jaxrl_llm.train.state import abstract_state, init_state, trunk
from jaxrl_llm.train.step import batch_shardings, compiled_kl, compiled_update, compiled_values
assert len(jax.devices()) == 8
spec = t.spec(LossConfig(baseline="value", advantage_scale="batch_std", kl="k1", kl_coef=0.1, kl_place="token_reward"))
def run(mesh):
    state = init_state(tiny.CONFIG, spec.optimizer, tiny.params(), mesh, critic=True)
    batch = t.make_batch() if mesh is None else jax.device_put(t.make_batch(), batch_shardings(mesh))
    batch["kl"] = compiled_kl(spec, mesh)(trunk(state["params"]), tiny.params(1), batch)
    for _ in range(2):
        batch["values"] = compiled_values(spec, mesh)(state["params"], batch)
        state, metrics, logps = compiled_update(spec, mesh)(state, batch, None)
    return state, jax.device_get(metrics), np.asarray(batch["values"])
mesh = models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
one, many = run(None), run(mesh)
wanted = abstract_state(tiny.CONFIG, spec.optimizer, mesh, critic=True)
assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, many[0], wanted))
np.testing.assert_allclose(tiny.flat(many[0]["params"]), tiny.flat(one[0]["params"]), rtol=1e-3, atol=1e-4)
for a, b in zip(jax.tree.leaves(many[1:]), jax.tree.leaves(one[1:])):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
print("equal")
"""


def test_mesh_of_eight_devices_gives_the_same_update(run_python):
    assert "equal" in run_python(MESH, devices=8)
