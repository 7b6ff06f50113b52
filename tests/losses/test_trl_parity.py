"""The same rewards and log-probabilities give the same advantages, losses and gradients as in TRL (tests/make_golden_trl.py).

What TRL defines otherwise is not compared: it multiplies the KL term by the ratio (on by default there, DeepSeek-V3.2; off in the golden
values), its "batch" scale divides by the std of the raw rewards (ours: of the centred ones), its RLOO loss has the product of a sequence's
token ratios, which grows with the length (ours: a ratio by token or a mean, equal to it on-policy), and a row without a reward counts in
its denominators (ours: nowhere; here such a row keeps its place in the mask, with advantage 0).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.grpo import group_advantages, grpo_loss, kl_estimate

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "trl.json").read_text())
REWARDS = np.array(GOLDEN["inputs"]["rewards"], float)  # None, no verdict, becomes NaN
MASK = jnp.arange(GOLDEN["limit"]) < jnp.array(GOLDEN["lengths"])[:, None]
LOGPS = {name: jnp.asarray(GOLDEN["inputs"][name], jnp.float32) for name in ("logps", "old", "sampler", "ref")}


def test_versions_and_command_are_recorded():
    assert GOLDEN["versions"]["trl"] == "1.16.0" and "make_golden_trl.py" in GOLDEN["command"]


@pytest.mark.parametrize("name", GOLDEN["advantages"])
def test_advantages_equal_trls(name):
    ours = dict(GOLDEN["advantages"][name]["ours"])
    kl_N = jnp.sum(jnp.where(MASK, kl_estimate(LOGPS["old"], LOGPS["ref"], "k1"), 0.0), axis=-1)
    rewards_N = jnp.asarray(REWARDS, jnp.float32) - ours.pop("kl_coef", 0.0) * kl_N
    count = len(REWARDS) // GOLDEN["samples"]
    groups_N = jnp.repeat(jnp.arange(count), GOLDEN["samples"])
    got = group_advantages(rewards_N, groups_N, count, jnp.asarray(np.isfinite(REWARDS)), **ours)
    np.testing.assert_allclose(got, GOLDEN["advantages"][name]["advantages"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_loss_and_gradient_equal_trls(name):
    golden = GOLDEN["losses"][name]
    advantages_N = jnp.asarray(GOLDEN["advantages"]["grpo_group"]["advantages"], jnp.float32)

    def objective(logps):
        more = {"sampler_logps": LOGPS["sampler"], "ref_logps": LOGPS["ref"], "max_length": GOLDEN["limit"]}
        return grpo_loss(logps, LOGPS["old"], advantages_N, MASK, **more, **golden["ours"])[0]

    loss, grad = jax.value_and_grad(objective)(LOGPS["logps"])
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, golden["grad"], rtol=1e-5, atol=1e-7)
    assert np.abs(golden["grad"]).max() > 1e-3


def test_rloo_on_policy_gradient_equals_trls():
    """The sum over a sequence is "dr_grpo" times the limit."""
    advantages_N = jnp.asarray(GOLDEN["advantages"]["rloo"]["advantages"], jnp.float32)
    limit = GOLDEN["limit"]
    grad = jax.grad(lambda x: limit * grpo_loss(x, None, advantages_N, MASK, aggregation="dr_grpo", max_length=limit)[0])(LOGPS["logps"])
    np.testing.assert_allclose(grad, GOLDEN["rloo_on_policy_grad"], rtol=1e-5, atol=1e-7)
