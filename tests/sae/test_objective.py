"""The training loss against a numpy oracle, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae.architectures import ARCHITECTURES, topk
from sae.base import Architecture, Context, dense_outcome
from sae.objective import aux_k_loss, loss
from sae.sparse import topk_encode_sparse
from sae.train_config import default_learning_rate

D, F, K, B = 6, 16, 3, 12


def setup(architecture="topk", seed=0):
    cfg = sae.SAEConfig(architecture=architecture, d_in=D, d_sae=F, k=K if architecture == "topk" else None)
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return cfg, params, rng.standard_normal((B, D)).astype(np.float32)


def run(cfg, params, x, dead=None, variance=2.0, l1=0.0, aux=0.0, aux_k=4, method="dense", **context):
    dead = jnp.asarray(np.zeros(F, bool) if dead is None else dead)
    context = Context(variance=jnp.float32(variance), dead_F=dead, method=method, **context)
    return loss(params, cfg, x, x, dead, context, sparsity=l1, aux=aux, aux_k=aux_k)


def numpy_forward(cfg, p, x):
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    z = np.maximum(pre, 0)
    if cfg.architecture == "topk":
        floor = -np.sort(-pre, axis=1)[:, K - 1 : K]
        z = np.where(pre >= floor, z, 0)
    return z, z @ p["W_dec"] + p["b_dec"]


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_error_and_penalty(architecture):
    cfg, p, x = setup(architecture)
    z, x_hat = numpy_forward(cfg, p, x)
    fvu = np.mean(np.sum((x - x_hat) ** 2, axis=1)) / 2.0
    penalty = np.mean(z @ np.linalg.norm(p["W_dec"], axis=1)) / np.sqrt(2.0) if architecture == "relu" else 0.0
    total, parts = run(cfg, p, x, l1=0.5)
    assert float(parts["fvu"]) == pytest.approx(fvu, rel=1e-5)
    assert float(parts["sparsity"]) == pytest.approx(penalty, rel=1e-5)
    assert float(total) == pytest.approx(fvu + 0.5 * penalty, rel=1e-5)
    assert float(parts["l0"]) == pytest.approx((z > 0).sum() / B)
    np.testing.assert_array_equal(parts["fired"], (z > 0).any(axis=0))


def test_a_third_row_is_trained_by_its_own_encoder(monkeypatch):
    """An architecture is its row: one that keeps k latents by another rule than TopK's is trained by that rule, penalty or none."""

    def halved(params, x, cfg):
        return 0.5 * topk.encode(params, x, cfg)

    def halved_sparse(params, x, k):
        values, indices = topk_encode_sparse(params, x, k)
        return 0.5 * values, indices

    def halved_train(params, cfg, x, target, context):
        return dense_outcome(params, halved(params, x - params["b_dec"], cfg), x, target, context)

    row = Architecture(encode=halved, train=halved_train, encode_sparse=halved_sparse, saelens=None, sparse_by="k")
    monkeypatch.setitem(ARCHITECTURES, "halved", row)
    _, p, x = setup("topk")
    cfg = sae.SAEConfig(architecture="halved", d_in=D, d_sae=F, k=K)
    z = 0.5 * numpy_forward(setup("topk")[0], p, x)[0]
    expected = np.mean(np.sum((x - z @ p["W_dec"] - p["b_dec"]) ** 2, axis=1)) / 2.0
    for method in ("dense", "sparse"):
        total, parts = run(cfg, p, x, l1=0.5, method=method)
        assert float(total) == pytest.approx(expected, rel=1e-5) and float(parts["l0"]) == pytest.approx((z > 0).sum() / B)
    np.testing.assert_allclose(sae.reconstruct(sae.Dictionary(p, cfg), x), z @ p["W_dec"] + p["b_dec"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_loss_is_blind_to_the_scale_of_activations(architecture):
    cfg, p, x = setup(architecture)
    c = 7.0
    scaled = {"W_enc": p["W_enc"], "b_enc": p["b_enc"] * c, "W_dec": p["W_dec"], "b_dec": p["b_dec"] * c}
    dead = np.arange(F) < 5
    first = run(cfg, p, x, dead, variance=2.0, l1=0.5, aux=0.3)[0]
    second = run(cfg, scaled, x * c, dead, variance=2.0 * c * c, l1=0.5, aux=0.3)[0]
    assert float(second) == pytest.approx(float(first), rel=1e-4)


def numpy_aux(p, rows, residual, dead, aux_k):
    pre = np.maximum(rows @ p["W_enc"] + p["b_enc"], 0)
    z = np.zeros_like(pre)
    for i, row in enumerate(pre):
        candidates = np.flatnonzero(dead)
        keep = candidates[np.argsort(-row[candidates], kind="stable")[:aux_k]]
        z[i, keep] = row[keep]
    error = np.mean(np.sum((residual - z @ p["W_dec"]) ** 2, axis=1))
    return error / np.mean(np.sum((residual - residual.mean(axis=0)) ** 2, axis=1))


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 8, 9, F])
def test_aux_k_by_numpy(number):
    """With aux_k 2 the sizes run are 2, 8 and 16: all of them, their edges, and none."""
    _, p, x = setup()
    dead = np.random.default_rng(3).permutation(F) < number
    residual = np.random.default_rng(4).standard_normal((B, D)).astype(np.float32)
    expected = numpy_aux(p, x, residual, dead, 2) if number else 0.0
    assert float(aux_k_loss(p, x, residual, jnp.asarray(dead), 2)) == pytest.approx(expected, rel=1e-4)


def test_aux_k_moves_only_dead_latents():
    _, p, x = setup()
    dead = np.arange(F) < 3
    residual = np.random.default_rng(4).standard_normal((B, D)).astype(np.float32)
    g = jax.grad(lambda q: aux_k_loss(q, x, residual, jnp.asarray(dead), 2))(p)
    assert np.any(np.asarray(g["W_enc"])[:, :3]) and np.any(np.asarray(g["W_dec"])[:3])
    assert not np.any(np.asarray(g["W_enc"])[:, 3:]) and not np.any(np.asarray(g["W_dec"])[3:])


def test_aux_k_target_carries_no_gradient():
    """Raising aux changes the gradient of dead latents only: the residual is a constant."""
    cfg, p, x = setup()
    cfg = cfg.replace(apply_b_dec_to_input=False)
    fired = np.asarray(run(cfg, p, x)[1]["fired"])
    p["b_enc"] = np.where(np.arange(F) < 4, np.float32(-3.0), p["b_enc"])  # rarely among the kept
    dead = ~np.asarray(run(cfg, p, x)[1]["fired"])
    assert dead.any() and fired.any()
    grads = [jax.grad(lambda q, a=a: run(cfg, q, x, dead, aux=a)[0])(p) for a in (0.0, 1.0)]
    difference = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)), *grads)
    assert difference["W_dec"][~dead].max() < 1e-5 < difference["W_dec"][dead].max()
    assert difference["b_dec"].max() < 1e-5


def test_constant_residual_gives_no_nan():
    _, p, x = setup()
    value = aux_k_loss(p, x, np.zeros((B, D), np.float32), jnp.ones(F, bool), 2)
    assert float(value) == 0.0
    g = jax.grad(lambda q: aux_k_loss(q, x, np.zeros((B, D), np.float32), jnp.ones(F, bool), 2))(p)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(g))


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_gradient_by_finite_differences(architecture):
    cfg, p, x = setup(architecture)
    dead = np.arange(F) < 4
    kwargs = {"l1": 0.3, "aux": 0.0, "method": "sparse"}
    gradient = jax.grad(lambda q: run(cfg, q, x, dead, **kwargs)[0])(p)
    rng = np.random.default_rng(5)
    direction = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in p.items()}
    step = 1e-4
    ends = [float(run(cfg, {n: p[n] + s * step * direction[n] for n in p}, x, dead, **kwargs)[0]) for s in (1, -1)]
    slope = sum(float(np.vdot(gradient[n], direction[n])) for n in p)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=3e-2)


def test_methods_give_one_loss():
    cfg, p, x = setup()
    dead = np.arange(F) < 4
    (a, parts), (b, other) = (run(cfg, p, x, dead, aux=0.2, method=m) for m in ("dense", "sparse"))
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    np.testing.assert_array_equal(parts["fired"], other["fired"])


def test_learning_rate_rule():
    assert default_learning_rate(2**14) == pytest.approx(2e-4)
    assert default_learning_rate(2**18) == pytest.approx(5e-5)
