"""The update: two forward paths that agree, micro-batches, masks, inner epochs, and every knob."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import tiny_grpo as tiny

from jaxrl_llm.train.config import GRPOConfig, LossConfig, OptimizerConfig
from jaxrl_llm.train.forward import completion_logprobs
from jaxrl_llm.train.state import init_state
from jaxrl_llm.train.step import compiled_logprobs, compiled_update, loss_and_grads, step_spec

G, S, P, C = 4, 3, 5, 6
N = G * S


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def make_batch(seed=0):
    """One micro-batch; ragged lengths, rubbish in the padding, one row without a verdict, one group with equal rewards."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, C + 1, (1, N))
    lengths[0, 0] = C
    rewards = rng.normal(size=(1, N)).astype(np.float32)
    rewards[0, :S] = 0.5
    return {
        "prompts": rng.integers(0, tiny.VOCAB, (1, G, P)).astype(np.int32),
        "prompt_lengths": np.array([[1, P, 2, 3]], np.int32),
        "completions": rng.integers(0, tiny.VOCAB, (1, N, C)).astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "sampler_logps": -rng.uniform(0, 3, (1, N, C)).astype(np.float32),
        "rewards": rewards,
        "valid": np.arange(N)[None] != 7,
        "group_ids": np.repeat(np.arange(G), S)[None].astype(np.int32),
    }


def in_micro_batches(batch, groups):
    return {k: v.reshape(-1, (1 if k.startswith("prompt") else S) * groups, *v.shape[2:]) for k, v in batch.items()}


def spec(loss=LossConfig(), **kwargs):
    return step_spec(tiny.CONFIG, GRPOConfig(max_new_tokens=C, loss=loss, optimizer=OptimizerConfig(learning_rate=1e-2), **kwargs))


def grads_of(spec, params, batch):
    loss, metrics, grads, logps = jax.jit(loss_and_grads, static_argnums=0)(spec, params, batch)
    return float(loss), jax.tree.map(float, metrics), grads, np.asarray(logps)


def assert_same(one, other, rtol=2e-5, atol=2e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


# --- forward paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_logprobs_equal_the_models_own_logits(params, shared):
    batch = jax.tree.map(lambda x: x[0], make_batch())
    args = [batch[k] for k in ("prompts", "prompt_lengths", "completions", "lengths")]
    logps, entropy = completion_logprobs(tiny.CONFIG, params, *args, temperature=0.7, shared_prefix=shared, with_entropy=True)
    for row in range(N):
        p, c = batch["prompt_lengths"][row // S], batch["lengths"][row]
        tokens = np.concatenate([batch["prompts"][row // S, :p], batch["completions"][row, :c]])
        logits, _ = models.apply(tiny.CONFIG, params, tokens[None])
        want = jax.nn.log_softmax(logits[0, p - 1 : p - 1 + c] / 0.7)
        np.testing.assert_allclose(logps[row, :c], want[np.arange(c), tokens[p:]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(entropy[row, :c], -(np.exp(want) * want).sum(-1), rtol=1e-5, atol=1e-6)


def test_shared_prefix_equals_plain_loss_and_gradient(params):
    batch = make_batch()
    plain = grads_of(spec(shared_prefix=False), params, batch)
    shared = grads_of(spec(shared_prefix=True), params, batch)
    np.testing.assert_allclose(shared[0], plain[0], rtol=1e-5, atol=1e-7)
    assert_same(shared[1], plain[1])
    assert_same(shared[2], plain[2])


def test_completion_of_one_token_needs_no_completion_forward(params):
    batch = make_batch() | {"lengths": np.ones((1, N), np.int32)}
    short = batch | {k: batch[k][..., :1] for k in ("completions", "sampler_logps")}
    whole, cut = grads_of(spec(), params, batch), grads_of(spec(), params, short)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5, atol=1e-7)
    assert_same(cut[2], whole[2])


def test_remat_and_chunks_change_memory_not_the_gradient(params):
    batch = make_batch()
    base = grads_of(spec(), params, batch)
    assert_same(grads_of(spec(remat=True, logprob_chunk=N * 2), params, batch)[2], base[2])


@pytest.mark.parametrize("shared", [False, True])
def test_padding_changes_nothing(params, shared):
    batch = make_batch()
    rng = np.random.default_rng(9)
    wide = dict(batch)
    for name, more in (("prompts", 3), ("completions", 4), ("sampler_logps", 4)):
        fill = rng.integers(0, tiny.VOCAB, (1, batch[name].shape[1], more)).astype(batch[name].dtype)
        wide[name] = np.concatenate([batch[name], fill], -1)
    one, other = (grads_of(spec(shared_prefix=shared), params, b) for b in (batch, wide))
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5, atol=1e-7)
    assert_same(other[2], one[2])


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_accumulated_gradient_equals_the_whole_batch(params, aggregation):
    batch = make_batch()
    s = spec(LossConfig(aggregation=aggregation))
    whole, parts = grads_of(s, params, batch), grads_of(s, params, in_micro_batches(batch, 1))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5, atol=1e-7)
    assert_same(parts[1], whole[1])
    assert_same(parts[2], whole[2])
    np.testing.assert_allclose(parts[3].reshape(whole[3].shape), whole[3], rtol=1e-4, atol=1e-5)


def test_a_group_may_be_spread_over_micro_batches(params):
    """Advantages come from the whole batch: all twelve rows are one group here, in four micro-batches."""
    batch = make_batch() | {"group_ids": np.zeros((1, N), np.int32)}
    whole, parts = grads_of(spec(), params, batch), grads_of(spec(), params, in_micro_batches(batch, 1))
    assert_same(parts[2], whole[2])
    assert abs(whole[0] - grads_of(spec(), params, make_batch())[0]) > 1e-4


# --- masks -----------------------------------------------------------------------------------------------------------


def test_rows_without_a_verdict_contribute_nothing(params):
    batch = make_batch()
    other = {k: v.copy() for k, v in batch.items()}
    other["completions"][0, 7] = 3
    other["rewards"][0, 7] = 1e6
    other["lengths"][0, 7] = C
    assert_same(grads_of(spec(), params, other)[2], grads_of(spec(), params, batch)[2], rtol=1e-6)
    other["valid"][0, 7] = True
    assert abs(grads_of(spec(), params, other)[0] - grads_of(spec(), params, batch)[0]) > 1e-4


def test_a_group_with_equal_rewards_has_no_gradient(params):
    batch = make_batch()
    batch["valid"][0, S:] = False
    _, _, grads, _ = grads_of(spec(), params, batch)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) == 0


# --- the update ------------------------------------------------------------------------------------------------------


def run_updates(s, params, batch, count=1):
    state = init_state(tiny.CONFIG, s.optimizer, params)
    for _ in range(count):
        state, metrics, logps = compiled_update(s)(state, batch)
    return state, jax.device_get(metrics), logps


def test_update_raises_the_advantaged_tokens_and_leaves_the_callers_params(params):
    before = tiny.flat(params)
    batch = make_batch()
    state, metrics, logps = run_updates(spec(), params, batch)
    assert int(state["step"]) == 1 and np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    np.testing.assert_array_equal(tiny.flat(params), before)
    after = compiled_logprobs(spec())(state["params"], batch)
    centred = batch["rewards"] - np.repeat(batch["rewards"].reshape(G, S).mean(1), S)
    mask = (np.arange(C) < batch["lengths"][..., None]) & batch["valid"][..., None]
    assert np.sum(np.where(mask, np.asarray(after - logps) * centred[..., None], 0)) > 0


def test_metrics_compare_with_the_sampler_and_report_entropy(params):
    batch = make_batch()
    _, _, logps = run_updates(spec(), params, batch)
    mask = (np.arange(C) < batch["lengths"][..., None]) & batch["valid"][..., None]
    difference = np.abs(np.asarray(logps) - batch["sampler_logps"])[mask]
    _, metrics, _ = run_updates(spec(), params, batch)
    np.testing.assert_allclose(metrics["logp_diff_mean"], difference.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logp_diff_max"], difference.max(), rtol=1e-5)
    assert 0 < metrics["entropy"] <= np.log(tiny.VOCAB) + 1e-6
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2)


def test_second_inner_epoch_uses_the_stored_logprobs(params):
    batch = make_batch()
    s = spec()
    state, first, logps = run_updates(s, params, batch)
    _, second, _ = compiled_update(s)(state, batch | {"old_logps": np.asarray(logps)})
    assert first["ratio"] == pytest.approx(1.0) and first["clip_share"] == 0
    assert abs(float(second["ratio"]) - 1) > 1e-3 and float(second["clip_share"]) > 0


def test_kl_term_pulls_towards_the_reference(params):
    batch = make_batch()
    s = spec(LossConfig(kl="k3", kl_coef=5.0))
    reference = compiled_logprobs(s)(params, batch)
    batch_kl = batch | {"ref_logps": np.asarray(reference)}
    moved, first, _ = run_updates(spec(), params, batch, count=3)
    assert "kl" not in first
    kl = lambda p: grads_of(s, p, batch_kl)[1]["kl"]  # noqa: E731
    assert kl(params) == pytest.approx(0, abs=1e-6) and kl(moved["params"]) > 1e-4
    assert kl(run_updates(s, params, batch_kl, count=3)[0]["params"]) < kl(moved["params"])


def test_every_loss_knob_changes_the_gradient(params):
    batch = make_batch()
    batch["old_logps"] = batch["sampler_logps"]
    batch["ref_logps"] = batch["sampler_logps"] - 0.3
    base = tiny.flat(grads_of(spec(), params, batch)[2])
    for change in (
        {"clip_low": 0.9},
        {"clip_high": 5.0},
        {"aggregation": "dr_grpo"},
        {"advantage_scale": "none"},
        {"advantage_ddof": 0},
        {"advantage_eps": 1.0},
        {"kl": "k2", "kl_coef": 0.5},
    ):
        assert np.abs(tiny.flat(grads_of(spec(LossConfig(**change)), params, batch)[2]) - base).max() > 1e-5, change
    assert np.abs(tiny.flat(grads_of(spec(temperature=0.5), params, batch)[2]) - base).max() > 1e-5


def test_equal_settings_share_one_compiled_update():
    assert compiled_update(spec()) is compiled_update(spec())
    # The number of steps shapes nothing where the learning rate does not fall.
    assert compiled_update(spec(steps=7)) is compiled_update(spec(steps=9))
    falling = dataclasses.replace(OptimizerConfig(), schedule="linear")
    made = [step_spec(tiny.CONFIG, GRPOConfig(steps=n, optimizer=falling)) for n in (7, 9)]
    assert made[0] != made[1]


def test_bf16_model_trains_an_fp32_master_copy(params):
    """An update of 1e-5 would be lost in bf16 weights of about 0.3."""
    cfg = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    s = step_spec(cfg, GRPOConfig(max_new_tokens=C, optimizer=OptimizerConfig(learning_rate=1e-5)))
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    state = init_state(cfg, s.optimizer, low)
    start = tiny.flat(state["params"])
    state, metrics, _ = compiled_update(s)(state, make_batch())
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state["params"])) and np.isfinite(float(metrics["loss"]))
    moved = np.abs(tiny.flat(state["params"]) - start)
    assert 0 < moved.max() < 2e-5


MESH = """
import sys; sys.path.insert(0, "tests/train")
import jax, numpy as np, models.sharding
import tiny_grpo as tiny, test_grpo_step as t
from jaxrl_llm.train.state import init_state
from jaxrl_llm.train.step import batch_shardings, compiled_logprobs, compiled_update
assert len(jax.devices()) == 8
batch = t.in_micro_batches(t.make_batch(), 4)
spec = t.spec()
def run(mesh):
    state = init_state(tiny.CONFIG, spec.optimizer, tiny.params(), mesh)
    b = batch if mesh is None else jax.device_put(batch, batch_shardings(mesh))
    for _ in range(2):
        state, metrics, logps = compiled_update(spec, mesh)(state, b)
    reference = compiled_logprobs(spec, mesh)(state["params"], b)
    return state, jax.device_get(metrics), np.asarray(logps), np.asarray(reference)
one = run(None)
for shape in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}):
    mesh = models.sharding.make_mesh(shape)
    many = run(mesh)
    kernel = many[0]["params"]["blocks"]["gate"]
    assert not kernel.sharding.is_fully_replicated
    assert many[0]["opt_state"][1][0].mu["blocks"]["gate"].sharding == kernel.sharding
    np.testing.assert_allclose(tiny.flat(many[0]["params"]), tiny.flat(one[0]["params"]), rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(many[1:]), jax.tree.leaves(one[1:])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_mesh_of_eight_devices_gives_the_same_update(run_python):
    assert "equal" in run_python(MESH, devices=8)
