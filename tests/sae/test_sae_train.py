"""Training: it learns, every knob acts, mistakes are named."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae.architectures import ARCHITECTURES
from sae.step import geometric_median, init_state, start, step_for, unit_rows, without_parallel
from sae.train_config import Scale, numbers_at

D, F, K, B = 8, 32, 3, 64


def data(n=4096, seed=0, offset=1.0):
    """Rows made of a few of 16 hidden directions, around a constant offset."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((16, D))
    strengths = rng.random((n, 16)) * (rng.random((n, 16)) < 0.1)
    return (strengths @ directions + offset).astype(np.float32)


def config(**changes):
    return sae.SAEConfig(**({"d_in": D, "d_sae": F, "k": K} | changes))


def run(cfg=None, seed=0, x=None, mesh=None, **changes):
    cfg = cfg or config()
    settings = {"steps": 30, "learning_rate": 1e-2, "warmup_steps": 5, "init_rows": 512, "log_every": 10, "method": "dense"} | changes
    x = data() if x is None else x
    return sae.train_sae(cfg, sae.array_batches(x, B), sae.SAETrainConfig(**settings), jax.random.key(seed), mesh=mesh, progress=False)


def test_topk_learns():
    d, history = run(steps=300)
    assert history[-1]["fvu"] < 0.5 * history[0]["fvu"]
    held_out = sae.evaluate(d, [data(seed=0)[:1000]])
    assert held_out["explained_variance"] > 0.8 and held_out["l0"] <= K
    np.testing.assert_allclose(np.linalg.norm(d.params["W_dec"], axis=1), 1.0, rtol=1e-5)


def test_relu_penalty_buys_sparsity():
    cfg = config(architecture="relu", k=None)
    l0 = [run(cfg, steps=200, sparsity_coefficient=c)[1][-1]["l0"] for c in (0.0, 0.3)]
    assert l0[1] < 0.7 * l0[0]


def test_methods_train_to_the_same_dictionary():
    for cfg in (config(), config(architecture="batchtopk")):
        dense, sparse = (run(cfg, method=m, dead_after=256)[0] for m in ("dense", "sparse"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), dense.params, sparse.params)


@pytest.mark.parametrize(
    ("architecture", "d_sae", "k", "method"),
    [
        *(("topk", 1024, 16, "sparse"), ("topk", 6144, 32, "sparse"), ("topk", 256, 16, "sparse")),
        *(("topk", 512, 64, "dense"), ("topk", 1024, 128, "dense"), ("topk", 64, 8, "dense")),
        *(("batchtopk", 6144, 32, "sparse"), ("batchtopk", 1024, 32, "dense"), ("matryoshka", 6144, 32, "dense")),
    ],
)
def test_auto_picks_the_faster_products(monkeypatch, architecture, d_sae, k, method):
    """As timed on one CPU (GATHERS_FROM); dense on accelerators and meshes, and where no latent count is fixed."""

    def picked(mesh=None, **changes):
        cfg = sae.SAEConfig(**({"architecture": architecture, "d_in": 96, "d_sae": d_sae, "k": k} | changes))
        return step_for(cfg, sae.SAETrainConfig(), mesh).keywords["form"].method

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    one, two = (jax.sharding.AbstractMesh((n,), ("data",)) for n in (1, 2))
    assert picked() == picked(one) == method
    assert picked(two) == picked(architecture="relu", k=None) == "dense"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert picked() == "dense"
    assert step_for(config(), sae.SAETrainConfig(method="sparse")).keywords["form"].method == "sparse"


def test_same_seed_same_dictionary_and_other_seed_other():
    a, b, c = run()[0], run()[0], run(seed=1)[0]
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert np.any(a.params["W_dec"] != c.params["W_dec"])


CHANGES = {
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "decay_share": 0.8,
    "beta1": 0.5,
    "beta2": 0.9,
    "grad_clip": 1e-3,
    "aux_coefficient": 0.5,
    "aux_k": 1,
    "dead_after": 10**6,
    "decoder_norm": "free",
    "b_dec_init": "zero",
    "init_rows": 64,
    "steps": 29,
}


@pytest.fixture(scope="module")
def baseline():
    return run(dead_after=128, grad_clip=0.5)[0]


@pytest.mark.parametrize("knob", CHANGES)
def test_every_knob_changes_the_result(knob, baseline):
    changed = run(**({"dead_after": 128, "grad_clip": 0.5} | {knob: CHANGES[knob]}))[0]
    assert np.any(np.asarray(changed.params["W_dec"]) != np.asarray(baseline.params["W_dec"]))


def test_sparsity_knobs_change_the_result():
    cfg = config(architecture="relu", k=None)
    plain, l1, warm = (run(cfg, **c)[0] for c in ({}, {"sparsity_coefficient": 0.1}, {"sparsity_coefficient": 0.1, "sparsity_warmup_steps": 20}))
    assert np.any(plain.params["W_enc"] != l1.params["W_enc"]) and np.any(warm.params["W_enc"] != l1.params["W_enc"])


def test_log_every_sets_the_history():
    assert [r["step"] for r in run(steps=25, log_every=10)[1]] == [10, 20, 25]
    seen = []
    sae.train_sae(
        config(), sae.array_batches(data(), B), sae.SAETrainConfig(steps=4, log_every=2), jax.random.key(0), on_log=seen.append
    )
    assert [r["rows"] for r in seen] == [2 * B, 4 * B]
    assert {"loss", "fvu", "l0", "sparsity", "aux", "dead_share", "learning_rate"} <= seen[0].keys()


def test_rate_schedule():
    train = sae.SAETrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, decay_share=0.2, sparsity_coefficient=2.0, sparsity_warmup_steps=4)
    at = {step: numbers_at(step, F, train, Scale(1.0, 1.0, 1.0)) for step in (0, 3, 9, 50, 80, 90, 99)}
    np.testing.assert_allclose([n.learning_rate for n in at.values()], [0.1, 0.4, 1, 1, 1, 0.5, 0.05], rtol=1e-6)
    np.testing.assert_allclose([n.sparsity for n in at.values()], [0.5, 2, 2, 2, 2, 2, 2])


def test_dead_latents_are_counted_and_revived():
    """Half of the latents start too low to fire, with more directions in the data than latents: AuxK wakes them."""
    rng = np.random.default_rng(0)
    directions = unit_rows(rng.standard_normal((40, D)).astype(np.float32))
    x = np.asarray(directions)[rng.integers(0, 40, 4096)] * rng.uniform(1, 2, (4096, 1)).astype(np.float32)
    cfg, half, result = config(k=1), F // 2, {}
    for coefficient in (0.0, 1 / 32):
        train = sae.SAETrainConfig(steps=200, learning_rate=1e-2, dead_after=4 * B, aux_coefficient=coefficient, decay_share=0.0)
        d, scale = start(cfg, train, x[:512], jax.random.key(0))
        d = d.replace(params=d.params | {"b_enc": jnp.where(jnp.arange(F) < half, -1.0, 0.0)})
        state, step, shares = init_state(d), step_for(cfg, train), []
        for i, batch in enumerate(itertools.islice(sae.array_batches(x, B), train.steps)):
            state, metrics = step(state, batch, numbers_at(i, F, train, scale))
            shares.append(float(metrics["dead_share"]))
        assert shares[3] == 0.0 and shares[4] >= 0.5  # counted as dead after 4 batches, not before
        fires = np.asarray(sae.encode(sae.Dictionary(state.params, cfg), x) > 0).any(axis=0)
        result[coefficient] = (fires[:half].sum(), shares[-1], float(metrics["fvu"]))
    (woken, dead, error), (woken_aux, dead_aux, error_aux) = result.values()
    # Without AuxK a latent may still drift into firing; with it, at least three more do.
    assert woken <= 1 and woken_aux >= woken + 3 and dead_aux < dead and error_aux < 0.8 * error


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aux_k_is_in_the_loss_where_it_is_published(architecture):
    """With a k, at 1/32; by a penalty only where it is asked for."""
    with_k = architecture in ("topk", "batchtopk", "matryoshka")
    cfg = sae.SAEConfig(architecture, D, F, 4 if with_k else None)
    aux_k = lambda **how: step_for(cfg, sae.SAETrainConfig(**how)).keywords["form"].aux_k  # noqa: E731
    assert aux_k() == (D // 2 if with_k else 0) and aux_k(aux_coefficient=0.1) == D // 2 and aux_k(aux_coefficient=0.0) == 0
    assert numbers_at(0, F, sae.SAETrainConfig(), Scale(1.0, 1.0, 1.0)).aux == 1 / 32


def test_decoder_gradient_loses_its_parallel_part():
    rng = np.random.default_rng(0)
    rows, gradient = unit_rows(rng.standard_normal((4, D)).astype(np.float32)), rng.standard_normal((4, D)).astype(np.float32)
    projected = without_parallel(gradient, rows)
    np.testing.assert_allclose(np.sum(projected * rows, axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient - projected, np.sum(gradient * rows, axis=1, keepdims=True) * rows, atol=1e-6)


def test_free_relu_decoder_comes_back_with_unit_rows():
    d, history = run(config(architecture="relu", k=None), decoder_norm="free", sparsity_coefficient=0.1)
    np.testing.assert_allclose(np.linalg.norm(d.params["W_dec"], axis=1), 1.0, rtol=1e-5)
    assert np.isfinite(history[-1]["loss"])


def test_geometric_median_resists_outliers():
    rows = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32) * 0.1 + np.array([1, 2, 3], np.float32)
    rows[:20] = 1e4
    assert np.linalg.norm(geometric_median(rows) - [1, 2, 3]) < 0.1 < np.linalg.norm(rows.mean(0) - [1, 2, 3])
    np.testing.assert_allclose(geometric_median(np.array([[0, 0], [1, 0], [0.5, 0]], np.float32)), [0.5, 0], atol=1e-3)


def test_input_scale_comes_from_the_data():
    x = data() * 50
    d, _ = run(config(normalize_activations="expected_average_only_in"), x=x)
    expected = D**0.5 / np.linalg.norm(x, axis=1).mean()
    assert d.cfg.input_scale == pytest.approx(expected, rel=0.1)
    assert sae.evaluate(d, [x[:500]])["explained_variance"] > 0.3


def test_low_precision_dictionary_is_rounded_after_training():
    d, _ = run(config(dtype="bfloat16"))
    full = run()[0]
    assert d.params["W_dec"].dtype == jnp.bfloat16 and d.cfg.dtype == "bfloat16"
    np.testing.assert_array_equal(d.params["W_dec"], full.params["W_dec"].astype(jnp.bfloat16))


def test_nan_batch_stops_with_the_step():
    x = data()

    def batches():
        for i, batch in enumerate(sae.array_batches(x, B)):
            yield np.where(np.arange(D) == 2, np.nan, batch) if i == 20 else batch

    with pytest.raises(sae.SAEError, match="not finite at step 21"):
        sae.train_sae(config(), batches(), sae.SAETrainConfig(steps=30, init_rows=128, log_every=10), jax.random.key(0))


def test_nan_step_changes_nothing():
    train = sae.SAETrainConfig(steps=5)
    d, scale = start(config(), train, data()[:256], jax.random.key(0))
    before = jax.tree.map(np.asarray, d.params)
    numbers = numbers_at(0, F, train, scale)
    state, _ = step_for(config(), train)(init_state(d), np.full((B, D), np.nan, np.float32), numbers)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert int(state.bad_step) == 0 and int(state.step) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no activations"),
        ([np.zeros((4, D + 1))], r"shape \(4, 9\); the SAE's d_in is 8"),
        ([np.full((4, D), np.nan)], "row 0 holds a NaN"),
        ([np.ones((4, D))], "all equal"),
        ([data(64), data(64)], "ended after 2 of 5 steps"),
    ],
)
def test_batch_mistakes(batches, message):
    with pytest.raises(sae.SAEError, match=message):
        sae.train_sae(config(), batches, sae.SAETrainConfig(steps=5), jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_norm": "unti"}, "'unit'"), ({"b_dec_init": "median"}, "b_dec_init"), ({"steps": 0}, "steps is 0"), ({"decay_share": 2.0}, "share"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"), ({"beta1": 1.5}, "beta1 is 1.5"), ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0"), ({"aux_k": 0}, "aux_k is 0"),
        ({"sparsity_coefficient": float("nan")}, "sparsity_coefficient is nan"), ({"target_l0": 3, "penalty": "tanh"}, "target_l0 is a form"),
        ({"penalty": "l0"}, "penalty"), ({"bandwidth": 0.0}, "bandwidth is 0.0"), ({"matmul_dtype": "int8"}, "matmul_dtype"),
        ({"dead_after": 0}, "dead_after is 0"), ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)  # fmt: skip
def test_setting_mistakes(changes, message):
    with pytest.raises(sae.SAEError, match=message):
        dataclasses.replace(sae.SAETrainConfig(), **changes)
