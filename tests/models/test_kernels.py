"""Attention by kernels equals the plain path: Pallas interprets splash attention here; for cuDNN's its caller with XLA's product in its place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest

import models
from models import ModelError, kernels

B, T = 4, 21
LENGTHS = np.array([T, 5, 13, 1])


@pytest.fixture(autouse=True)
def without_cudnn(monkeypatch):
    monkeypatch.setattr(kernels, "CUDNN", "xla")


@functools.cache
def model(name, dtype="float32"):
    cfg = dataclasses.replace(models.ModelConfig.from_hf(cases.CASES[name]), dtype=dtype)
    return cfg, cases.random_params(cfg)


def loss_and_grads(cfg, params, tokens, segments=None):
    """Of the states of real tokens: a prompt of 5, of which some are padding, then what follows it; or texts packed into rows."""

    def loss(params):
        if segments is not None:
            hidden, real = models.forward(cfg, params, tokens, segments=segments).hidden, segments >= 0
        else:
            prompts, prompt_lengths = tokens[:2, :5], np.array([5, 3])
            prompt = models.forward(cfg, params, prompts, lengths=prompt_lengths, return_kv=True)
            real = np.arange(T) < LENGTHS[:, None]
            positions = np.where(real, np.repeat(prompt_lengths, 2)[:, None] + np.arange(T), -1)
            hidden = models.forward(cfg, params, tokens, positions=positions, prefix=prompt.kv, remat=True).hidden
        return jnp.sum(jnp.where(real[..., None], jnp.sin(hidden.astype(jnp.float32)), 0))

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_equal(found, wanted, tolerance):
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted[1]))  # that of a bias of the keys is 0 but for rounding
    atol = lambda leaf: tolerance * max(float(np.abs(leaf).max()), 1e-2 * largest)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol(b)), found[1], wanted[1])


TOKENS = np.random.default_rng(0).integers(3, 60, (B, T))
PACKED = np.array([[0] * 8 + [1] * 13, [0] * 21, [0] * 3 + [1] * 4 + [2] * 9 + [-1] * 5, [0] + [1] * 20])


@pytest.mark.parametrize(
    "kind,name,packed",
    [
        ("splash", "qwen3", False),
        ("splash", "qwen3", True),
        ("splash", "gemma2", False),
        ("splash", "gpt2", True),
        ("splash", "mistral_window", True),
        ("splash", "gemma3", False),
        ("cudnn", "qwen3", False),
        ("cudnn", "llama2", True),
        ("cudnn", "gemma2_uncapped", False),
        ("cudnn", "mistral_window", True),
    ],
)
def test_a_kernel_equals_the_plain_path(kind, name, packed):
    """Grouped heads, a q/k norm, a soft-cap with a query scale, learned positions; forward and backward."""
    cfg, params = model(name)
    given = (params, TOKENS, PACKED if packed else None)
    assert_equal(loss_and_grads(dataclasses.replace(cfg, attention=kind), *given), loss_and_grads(cfg, *given), 2e-5)


@pytest.mark.parametrize("kind", ["splash", "cudnn"])
def test_a_kernel_in_bfloat16_is_near(kind):
    cfg, params = model("qwen3", "bfloat16")
    wanted = loss_and_grads(*model("qwen3"), TOKENS)
    found = loss_and_grads(dataclasses.replace(cfg, attention=kind), params, TOKENS)
    norm = lambda tree: np.sqrt(sum(float(jnp.sum(jnp.square(a.astype(jnp.float32)))) for a in jax.tree.leaves(tree)))  # noqa: E731
    apart = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, found[1], wanted[1])
    assert 1e-4 < norm(apart) / norm(wanted[1]) < 0.05


def test_more_queries_than_a_tile_and_keys_than_one(monkeypatch):
    """Tiles of 128 over 150 queries: two tiles, the second mostly padding."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    cfg, params = model("qwen3")
    tokens = np.random.default_rng(1).integers(3, 60, (2, 150))
    how, z = {"lengths": np.array([150, 131]), "taps": ("blocks.1.attn_z",)}, "blocks.1.attn_z"
    found = [models.apply(dataclasses.replace(cfg, attention=kind), params, tokens, **how) for kind in ("splash", "plain")]
    logits = [one for one, _ in found]
    np.testing.assert_allclose(found[0][1][z][0], found[1][1][z][0], atol=2e-4)  # what the heads give is seen of a kernel too
    np.testing.assert_allclose(logits[0][0], logits[1][0], atol=2e-4)
    np.testing.assert_allclose(logits[0][1, :131], logits[1][1, :131], atol=2e-4)


@pytest.mark.parametrize("length", [20, 21])
def test_cudnn_takes_what_it_is_given(length, monkeypatch):
    """Its shapes are checked where the gradient is traced: lengths must be even, numbers of 16 bits. No GPU is asked."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(kernels, "CUDNN", "cudnn")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    cfg = dataclasses.replace(model("qwen3")[0], dtype="bfloat16", attention="cudnn")

    def loss(params, tokens):
        prompt = models.forward(cfg, params, tokens[:2, :5], return_kv=True)
        positions = jnp.broadcast_to(5 + jnp.arange(length), tokens.shape)
        return jnp.sum(models.forward(cfg, params, tokens, positions=positions, prefix=prompt.kv).hidden.astype(jnp.float32))

    jax.eval_shape(jax.grad(loss), models.abstract_params(cfg), jax.ShapeDtypeStruct((4, length), "int32"))


def test_probabilities_asked_for_are_those_of_the_plain_path():
    cfg, params = model("llama2")
    splash = dataclasses.replace(cfg, attention="splash")
    name = "blocks.0.attn_probs"
    found, wanted = (models.apply(each, params, TOKENS, taps=(name,))[1][name] for each in (splash, cfg))
    np.testing.assert_array_equal(found, wanted)


def test_a_model_trained_by_a_kernel_is_saved_without_it(tmp_path):
    cfg, params = model("llama2")
    models.save(tmp_path / "out", dataclasses.replace(cfg, attention="splash"), params)
    assert models.load(tmp_path / "out")[0].attention == "plain"


def test_what_a_kernel_cannot_do_is_said():
    with pytest.raises(ModelError, match="attention='cudnn' does not cap scores, which this gemma2 model does"):
        dataclasses.replace(model("gemma2")[0], attention="cudnn")
    with pytest.raises(ModelError, match="attention='flash' is not known; known: plain, splash, cudnn"):
        dataclasses.replace(model("llama2")[0], attention="flash")


EIGHT = """
import sys; sys.path.insert(0, "tests/models")
import dataclasses, jax, numpy as np
import models, test_kernels as t
from models import sharding
cfg, params = t.model("qwen3")
wanted = t.loss_and_grads(cfg, params, t.TOKENS)
t.kernels.CUDNN = "xla"
for shape in ({"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"data": 4}):  # two prompts over two devices; heads that do not divide; rows that do not
    mesh = sharding.make_mesh(shape)
    placed = jax.device_put(params, sharding.param_shardings(cfg, mesh))
    for kind in ("splash", "cudnn"):
        found = t.loss_and_grads(dataclasses.replace(cfg, attention=kind), placed, jax.device_put(t.TOKENS, sharding.replicated(mesh)))
        t.assert_equal(jax.device_get(found), jax.device_get(wanted), 2e-5)
print("equal")
"""


def test_devices_of_a_mesh_equal_one(run_python):
    assert "equal" in run_python(EIGHT, devices=4)
