"""The update with a real (tiny) model: two forward paths that agree, micro-batches, padding, precision, a mesh.

What does not depend on the model (knobs, masks, inner epochs, KL) is in test_grpo_update_rules.py.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_grpo as tiny

import models
from jaxrl_llm.losses.logprobs import default_chunk
from jaxrl_llm.train import forward as train_forward
from jaxrl_llm.train.config import GRPOConfig, LossConfig, OptimizerConfig
from jaxrl_llm.train.forward import completion_logprobs
from jaxrl_llm.train.state import init_state
from jaxrl_llm.train.step import chunk_on, compiled_logprobs, compiled_update, cut_to_length, loss_and_grads, step_spec

G, S, P, C = 4, 3, 5, 6
N = G * S
# A large eps keeps the first Adam step smooth in the gradient: g / (|g| + eps) of a rounding error is then no whole step.
SMOOTH = OptimizerConfig(learning_rate=1e-2, eps=1e-2)


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


def counted(batch):
    """[M, r, C] bool: the tokens that take part in the loss."""
    return (np.arange(batch["completions"].shape[-1]) < batch["lengths"][..., None]) & batch["valid"][..., None]


def spec(loss=LossConfig(), dtype="float32", **kwargs):
    return step_spec(dataclasses.replace(tiny.CONFIG, dtype=dtype), GRPOConfig(max_new_tokens=C, loss=loss, optimizer=SMOOTH, **kwargs))


_jitted = jax.jit(loss_and_grads, static_argnums=0)


def grads_of(spec, params, batch):
    loss, metrics, grads, logps = _jitted(spec, params, batch)
    return float(loss), jax.tree.map(float, metrics), grads, np.asarray(logps)


def assert_same(one, other, rtol=2e-5, atol=2e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


@pytest.fixture(scope="module")
def reference(params):
    """Loss, metrics, gradients and log-probabilities of the plain path on the whole batch."""
    return grads_of(spec(shared_prefix=False), params, make_batch())


@pytest.mark.parametrize("shared", [False, True])
def test_logprobs_equal_the_models_own_logits(params, shared):
    batch = jax.tree.map(lambda x: x[0], make_batch())
    args = [batch[k] for k in ("prompts", "prompt_lengths", "completions", "lengths")]
    logps, entropy = completion_logprobs(tiny.CONFIG, params, *args, temperature=0.7, shared_prefix=shared, with_entropy=True)
    p_N = np.repeat(batch["prompt_lengths"], S)
    rows = [np.concatenate([batch["prompts"][i // S, : p_N[i]], batch["completions"][i]]) for i in range(N)]
    tokens = np.array([np.pad(row, (0, P + C - len(row))) for row in rows])
    logits, _ = models.apply(tiny.CONFIG, params, tokens, lengths=p_N + C)
    for i in range(N):
        c = batch["lengths"][i]
        want = np.asarray(jax.nn.log_softmax(logits[i, p_N[i] - 1 : p_N[i] - 1 + C] / 0.7))[:c]
        np.testing.assert_allclose(logps[i, :c], want[np.arange(c), rows[i][p_N[i] : p_N[i] + c]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(entropy[i, :c], -(np.exp(want) * want).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "how,groups,unrolled",
    [
        (spec(), G, 8),  # each prompt forwarded once
        (spec(), 1, 8),  # ... and four micro-batches
        (spec(logprob_chunk=N), G, 0),  # ... the layers in a scan, as deep models train
        (spec(shared_prefix=False, remat=True, logprob_chunk=2 * N), G, 8),
        (spec(remat=True, remat_keep="products"), 1, 0),
        (spec(length_buckets=4), 1, 8),  # micro-batches cut to widths of 2, 3, 5 or 6
        (spec(length_buckets=2, remat=True, logprob_chunk=N), 2, 0),
    ],
)
def test_every_fast_or_lean_path_equals_the_plain_loss_and_gradient(params, reference, how, groups, unrolled, monkeypatch):
    monkeypatch.setattr(train_forward, "UNROLLED_LAYERS", unrolled)
    got = grads_of(how, params, in_micro_batches(make_batch(), groups))
    np.testing.assert_allclose(got[0], reference[0], rtol=1e-5, atol=1e-7)
    assert_same(got[1], reference[1])
    assert_same(got[2], reference[2])
    mask = counted(make_batch())
    np.testing.assert_allclose(got[3].reshape(mask.shape)[mask], reference[3][mask], rtol=1e-4, atol=1e-5)


def test_micro_batches_are_cut_to_the_smallest_width_that_holds_them():
    micro = {"completions": np.zeros((2, 6), int), "values": np.zeros((2, 6)), "prompts": np.zeros((1, 6), int), "advantages": np.ones(2)}

    def run(cut):
        assert cut["values"].shape == cut["completions"].shape and cut["prompts"].shape == (1, 6) and cut["advantages"].shape == (2,)
        return jnp.float32(cut["completions"].shape[1]), jnp.ones(cut["completions"].shape)

    for longest, width in ((0, 2), (1, 2), (2, 2), (3, 3), (4, 5), (5, 5), (6, 6)):
        found, tokens = cut_to_length(spec(length_buckets=4), run, micro | {"lengths": np.array([1, longest])})
        assert float(found) == width and tokens.shape == (2, 6) and np.asarray(tokens).sum() == 2 * width
    assert float(cut_to_length(spec(), run, micro | {"lengths": np.array([1, 1])})[0]) == 6


def test_padding_changes_nothing(params, reference):
    rng = np.random.default_rng(9)
    wide = make_batch()
    for name, more in (("prompts", 3), ("completions", 4), ("sampler_logps", 4)):
        fill = rng.integers(0, tiny.VOCAB, (1, wide[name].shape[1], more)).astype(wide[name].dtype)
        wide[name] = np.concatenate([wide[name], fill], -1)
    got = grads_of(spec(), params, wide)
    np.testing.assert_allclose(got[0], reference[0], rtol=1e-5, atol=1e-7)
    assert_same(got[2], reference[2])


def test_completion_of_one_token_needs_no_completion_forward(params, reference):
    batch = make_batch()
    first = {k: batch[k][..., :1] if k in ("completions", "sampler_logps") else batch[k] for k in batch}
    logps = compiled_logprobs(spec())(params, first)
    np.testing.assert_allclose(logps[..., 0], reference[3][..., 0], rtol=1e-5, atol=1e-6)


def test_rows_without_a_verdict_contribute_nothing(params):
    one, other = make_batch(), make_batch()
    other["completions"][0, 7], other["rewards"][0, 7], other["lengths"][0, 7] = 3, 1e6, C
    assert_same(grads_of(spec(), params, other)[2], grads_of(spec(), params, one)[2], rtol=1e-6)
    other["valid"][0, 7] = True
    assert abs(grads_of(spec(), params, other)[0] - grads_of(spec(), params, one)[0]) > 1e-4


def test_update_raises_the_advantaged_tokens_and_leaves_the_callers_params(params):
    before = tiny.flat(params)
    batch = make_batch()
    state = init_state(tiny.CONFIG, spec().optimizer, params)
    state, metrics, logps = compiled_update(spec())(state, batch)
    assert int(state["step"]) == 1 and np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2)
    np.testing.assert_array_equal(tiny.flat(params), before)
    after = compiled_logprobs(spec())(state["params"], batch)
    centred = batch["rewards"] - np.repeat(batch["rewards"].reshape(G, S).mean(1), S)
    assert np.sum(np.where(counted(batch), np.asarray(after - logps) * centred[..., None], 0)) > 0


def test_equal_settings_share_one_compiled_update():
    assert compiled_update(spec()) is compiled_update(spec())
    # The number of steps shapes nothing where the learning rate does not fall.
    assert compiled_update(spec(steps=7)) is compiled_update(spec(steps=9))
    falling = dataclasses.replace(OptimizerConfig(), schedule="linear")
    made = [step_spec(tiny.CONFIG, GRPOConfig(steps=n, optimizer=falling)) for n in (7, 9)]
    assert made[0] != made[1]


def assert_near_in_bf16(found, expected):
    """The rounding of some ten bf16 products (2^-9 each) in a row is there, and no more than it."""
    error = np.linalg.norm(tiny.flat(found) - tiny.flat(expected)) / np.linalg.norm(tiny.flat(expected))
    assert 1e-3 < error < 0.05


@pytest.mark.parametrize("kwargs,groups", [({}, G), ({"remat": True, "logprob_chunk": 2 * N}, 1), ({"shared_prefix": False}, G)])
def test_bf16_gradients_are_near_those_of_fp32(params, reference, kwargs, groups):
    loss, _, grads, logps = grads_of(spec(dtype="bfloat16", **kwargs), params, in_micro_batches(make_batch(), groups))
    assert_near_in_bf16(grads, reference[2])
    mask = counted(make_batch())
    assert_near_in_bf16(logps.reshape(mask.shape)[mask], reference[3][mask])


def test_bf16_model_trains_an_fp32_master_copy(params):
    """An update of 1e-5 would be lost in bf16 weights of about 0.3."""
    cfg = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    s = step_spec(cfg, GRPOConfig(max_new_tokens=C, optimizer=OptimizerConfig(learning_rate=1e-5)))
    state = init_state(cfg, s.optimizer, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
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
batch, spec = t.make_batch(), t.spec(length_buckets=2)
batch["lengths"] = np.minimum(batch["lengths"], t.C // 2)  # the narrower of two widths
def run(mesh):
    state = init_state(tiny.CONFIG, spec.optimizer, tiny.params(), mesh)
    b = batch if mesh is None else jax.device_put(batch, batch_shardings(mesh))
    state, metrics, logps = compiled_update(spec, mesh)(state, b, None)
    reference = compiled_logprobs(spec, mesh)(state["params"], b)
    return state, jax.device_get(metrics), np.asarray(logps), np.asarray(reference)
mesh = models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
one, many = run(None), run(mesh)
kernel = many[0]["params"]["blocks"]["gate"]
assert not kernel.sharding.is_fully_replicated
assert many[0]["opt_state"].inner[1][0].mu["blocks"]["gate"].sharding == kernel.sharding
np.testing.assert_allclose(tiny.flat(many[0]["params"]), tiny.flat(one[0]["params"]), rtol=1e-4, atol=1e-5)
for a, b in zip(jax.tree.leaves(many[1:]), jax.tree.leaves(one[1:])):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
spec = t.spec(dtype="bfloat16")
t.assert_near_in_bf16(run(mesh)[0]["opt_state"].inner[1][0].mu, one[0]["opt_state"].inner[1][0].mu)
print("equal")
"""


def test_mesh_of_eight_devices_gives_the_same_update(run_python):
    assert "equal" in run_python(MESH, devices=8)


def test_a_chunk_of_logits_is_as_large_on_each_device_as_on_one():
    """Rows of a batch are shared by the batch axes; the tensor axis shares no rows."""
    spec = dataclasses.replace(step_spec(tiny.CONFIG, GRPOConfig()), logprob_chunk=None)
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 3})
    assert chunk_on(spec, None) is spec
    assert chunk_on(spec, mesh).logprob_chunk == 8 * default_chunk(tiny.CONFIG.vocab_size)
    assert chunk_on(dataclasses.replace(spec, logprob_chunk=5), mesh).logprob_chunk == 40
