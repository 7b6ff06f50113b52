"""Each architecture's training forward against numpy and by hand, what it learns, and what it is once trained."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae.architectures import ARCHITECTURES, batchtopk, jumprelu
from sae.base import Context
from sae.dictionary import param_shapes, training_pair
from sae.objective import loss
from sae.select import cut_for
from sae.step import init_state, resample, start, step_for, train_step
from sae.train_config import numbers_at

D, F, K, B, OUT = 6, 16, 3, 12, 5
TARGETS = {"topk", "batchtopk", "matryoshka"}


def setup(architecture, seed=0, **changes):
    cfg = sae.SAEConfig(architecture=architecture, d_in=D, d_sae=F, k=K if architecture in TARGETS else None, **changes)
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sorted(param_shapes(cfg).items())}
    if "threshold" in params:
        params["threshold"] = np.abs(params["threshold"])
    return cfg, params, rng.standard_normal((B, D)).astype(np.float32)


def run(cfg, params, x, target=None, sparsity=0.0, aux=0.0, aux_k=0, **context):
    context = Context(**({"variance": 2.0} | context))
    return loss(params, cfg, x, x if target is None else target, jnp.zeros(F, bool), context, sparsity=sparsity, aux=aux, aux_k=aux_k)


def relu(x):
    return np.maximum(x, 0)


def fvu(target, x_hat, variance=2.0):
    return np.mean(np.sum((target - x_hat) ** 2, axis=1)) / variance


def test_gated_by_numpy():
    cfg, p, x = setup("gated")
    projected = (x - p["b_dec"]) @ p["W_enc"]
    gate = projected + p["b_gate"]
    z = np.where(gate > 0, relu(projected * np.exp(p["r_mag"]) + p["b_mag"]), 0)
    np.testing.assert_allclose(sae.encode(sae.Dictionary(p, cfg), x), z, rtol=1e-5, atol=1e-5)
    main, own = (fvu(x, code @ p["W_dec"] + p["b_dec"]) for code in (z, relu(gate)))
    penalty = np.mean(relu(gate) @ np.linalg.norm(p["W_dec"], axis=1)) / np.sqrt(2.0)
    total, parts = run(cfg, p, x, sparsity=0.3)
    assert float(total) == pytest.approx(main + own + 0.3 * penalty, rel=1e-5)
    assert float(parts["fvu"]) == pytest.approx(main, rel=1e-5) and float(parts["sparsity"]) == pytest.approx(penalty, rel=1e-5)


def test_gated_second_reconstruction_leaves_the_decoder_alone():
    """The gate's own reconstruction teaches the encoder and not the decoder: with magnitudes shut, the decoder's gradient is b_dec's alone."""
    cfg, p, x = setup("gated")
    p["b_mag"] = np.full(F, -1e3, np.float32)
    g = jax.grad(lambda q: run(cfg, q, x)[0])(p)
    assert not np.any(np.asarray(g["W_dec"])) and np.any(np.asarray(g["W_enc"])) and np.any(np.asarray(g["b_gate"]))


def jumped(cfg, p, x):
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    return pre, np.where(pre > p["threshold"], relu(pre), 0)


def test_jumprelu_by_numpy():
    cfg, p, x = setup("jumprelu")
    _, z = jumped(cfg, p, x)
    np.testing.assert_allclose(sae.encode(sae.Dictionary(p, cfg), x), z, rtol=1e-5, atol=1e-5)
    error, l0 = fvu(x, z @ p["W_dec"] + p["b_dec"]), np.mean((z > 0).sum(axis=1))
    norms = np.linalg.norm(p["W_dec"], axis=1)
    expected = {
        "step": (run(cfg, p, x, sparsity=0.1), l0),
        "target": (run(cfg, p, x, sparsity=0.1, target_l0=4.0), (l0 / 4.0 - 1) ** 2),
        "tanh": (run(cfg, p, x, sparsity=0.1, penalty="tanh", tanh_scale=3.0, unit=0.5), np.mean(np.tanh(3 * z * norms / 0.5).sum(axis=1))),
    }
    for name, ((total, parts), penalty) in expected.items():
        assert float(parts["sparsity"]) == pytest.approx(penalty, rel=1e-5), name
        assert float(total) == pytest.approx(error + 0.1 * penalty, rel=1e-5), name


def test_jumprelu_thresholds_learn_within_the_rectangle():
    """One row, one latent (Rajamanoharan et al. 2024b, equations 11 and 12), by hand: pre 1, threshold 0.9, bandwidth 0.5."""
    pre, theta, width = jnp.array([[1.0]]), jnp.array([0.9]), 0.5
    z, slope = jax.value_and_grad(lambda t: jumprelu.gated_by_threshold(pre, t, width).sum())(theta)
    assert float(z) == 1.0 and float(slope[0]) == pytest.approx(-0.9 / 0.5)
    l0, slope = jax.value_and_grad(lambda t: jumprelu.active(pre, t, width).sum())(theta)
    assert float(l0) == 1.0 and float(slope[0]) == pytest.approx(-1 / 0.5)
    for outside in (0.7, 1.3):  # further than half a bandwidth
        slopes = [jax.grad(lambda t, f=f: f(pre, t, width).sum())(jnp.array([outside])) for f in (jumprelu.gated_by_threshold, jumprelu.active)]
        assert not np.any(np.asarray(slopes))
    assert float(jax.grad(lambda p: jumprelu.gated_by_threshold(p, theta, width).sum())(pre)[0, 0]) == 1.0
    through = jax.grad(lambda p: jumprelu.gated_by_threshold(p, theta, width, to_input=True).sum())(pre)
    assert float(through[0, 0]) == pytest.approx(1.0 + 0.9 / 0.5)


def test_jumprelu_draws_dead_latents_up():
    cfg, p, x = setup("jumprelu")
    pre, _ = jumped(cfg, p, x)
    dead = np.arange(F) < 4
    short = relu(p["threshold"] - pre) * dead * np.linalg.norm(p["W_dec"], axis=1)
    plain, drawn = (run(cfg, p, x, dead_F=jnp.asarray(dead), pre_act=weight)[0] for weight in (0.0, 0.2))
    assert float(drawn - plain) == pytest.approx(0.2 * np.mean(short.sum(axis=1)) / np.sqrt(2.0), rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 7, 24, 25, 26, 40])
def test_cut_for(n):
    x = relu(np.random.default_rng(n).standard_normal((5, 10)).astype(np.float32))
    expected = np.sort(x.ravel())[::-1][n - 1] if n <= x.size else 0.0
    cut = float(cut_for(jnp.asarray(x), n))
    assert (x >= cut).sum() == n if expected > 0 else cut == 0.0


def test_cut_for_among_equals():
    tied = np.array([3.0, 1, 1, 1, 0, 5], np.float32)
    assert [int((tied >= float(cut_for(tied, n))).sum()) for n in (1, 2, 3, 4, 5, 6, 9)] == [1, 2, 5, 5, 5, 6, 6]


def batch_kept(p, x):
    z = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    return np.where(z >= np.sort(z.ravel())[::-1][B * K - 1], z, 0)


def test_batchtopk_by_numpy():
    cfg, p, x = setup("batchtopk")
    z = batch_kept(p, x)
    total, parts = run(cfg, p, x)
    assert (z > 0).sum() == B * K and len(set((z > 0).sum(axis=1))) > 1  # rows differ in how many they keep
    assert float(total) == pytest.approx(fvu(x, z @ p["W_dec"] + p["b_dec"]), rel=1e-5) and float(parts["l0"]) == K
    least = z[z > 0].min()
    moved = 0.75 * p["threshold"] + 0.25 * least
    _, parts = run(cfg, p, x, threshold_decay=0.75)
    np.testing.assert_allclose(parts["buffers"]["threshold"], moved, rtol=1e-5)
    first = batchtopk.moved({"threshold": jnp.zeros(F)}, jnp.float32(least), Context(variance=1.0))
    np.testing.assert_allclose(first["threshold"], least)
    none = batchtopk.moved({"threshold": jnp.ones(F)}, jnp.float32(np.inf), Context(variance=1.0))
    np.testing.assert_array_equal(none["threshold"], 1.0)


def test_matryoshka_by_numpy():
    cfg, p, x = setup("matryoshka", prefixes=(2, 5))
    z = batch_kept(p, x)
    errors = [fvu(x, z[:, :n] @ p["W_dec"][:n] + p["b_dec"]) for n in (2, 5, F)]
    total, parts = run(cfg, p, x)
    assert float(total) == pytest.approx(np.mean(errors), rel=1e-5) and float(parts["fvu"]) == pytest.approx(errors[-1], rel=1e-5)
    assert sae.SAEConfig(architecture="matryoshka", d_in=D, d_sae=F, k=K).prefixes == (1, 2, 4, 8)
    for prefixes in ((5, 2), (0, 4), (4, F), (2, 2)):
        with pytest.raises(sae.SAEError, match="give rising whole numbers"):
            cfg.replace(prefixes=prefixes)
    with pytest.raises(sae.SAEError, match="a topk SAE has none"):
        sae.SAEConfig(d_in=D, d_sae=F, k=K, prefixes=(2,))


def smooth(architecture):
    """Losses with no step in the direction tried: a threshold's gradient is that of no function."""
    return architecture not in ("jumprelu",)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if smooth(name)])
def test_gradient_by_finite_differences(architecture):
    cfg, p, x = setup(architecture)
    gradient = jax.grad(lambda q: run(cfg, q, x, sparsity=0.3)[0])(p)
    rng = np.random.default_rng(5)
    direction = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in p.items()}
    step = 1e-4
    ends = [float(run(cfg, {n: p[n] + s * step * direction[n] for n in p}, x, sparsity=0.3)[0]) for s in (1, -1)]
    if architecture == "gated":  # the second decoder is frozen: its part of the slope is none of the gradient's
        direction |= {"W_dec": np.zeros_like(p["W_dec"]), "b_dec": np.zeros_like(p["b_dec"])}
        ends = [float(run(cfg, {n: p[n] + s * step * direction[n] for n in p}, x, sparsity=0.3)[0]) for s in (1, -1)]
    slope = sum(float(np.vdot(gradient[n], direction[n])) for n in p)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=3e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_blind_to_the_scale_of_activations(architecture):
    cfg, p, x = setup(architecture)
    c = 7.0
    scaled = {n: v * c if n not in ("W_enc", "W_dec", "r_mag") else v for n, v in p.items()}
    first = run(cfg, p, x, sparsity=0.5, variance=2.0, unit=0.6)[0]
    second = run(cfg, scaled, x * c, sparsity=0.5, variance=2.0 * c * c, unit=0.6 * c)[0]
    assert float(second) == pytest.approx(float(first), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transcoders_of_every_architecture(architecture):
    """x in, y out, with a skip: the code is the architecture's own, the reconstruction is of y."""
    cfg, p, x = setup(architecture, d_out=OUT, skip=True)
    y = np.random.default_rng(3).standard_normal((B, OUT)).astype(np.float32)
    plain = {n: v for n, v in p.items() if n != "W_skip"}
    d = sae.Dictionary(p, cfg)
    z = np.asarray(sae.encode(d, x))
    expected = z @ p["W_dec"] + p["b_dec"] + x @ p["W_skip"]
    np.testing.assert_allclose(sae.decode(d, z, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae.reconstruct(d, x), expected, rtol=1e-4, atol=1e-4)
    assert not cfg.apply_b_dec_to_input and plain["b_dec"].shape == (OUT,)
    with pytest.raises(sae.SAEError, match="needs its input too"):
        sae.decode(d, z)
    if architecture not in ("gated", "batchtopk", "matryoshka"):
        assert float(run(cfg, p, x, target=y)[0]) == pytest.approx(fvu(y, expected), rel=1e-4)
    for method in ("dense", "sparse") if architecture == "topk" else ("dense",):
        g = jax.grad(lambda q, m=method: run(cfg, q, x, target=y, method=m)[0])(p)
        assert all(np.any(np.asarray(g[n])) for n in ("W_enc", "W_dec", "b_dec", "W_skip"))


def test_transcoder_mistakes():
    base = {"d_in": D, "d_sae": F, "k": K}
    for changes, message in (({"skip": True}, "skip is for transcoders"), ({"hook_name_out": "embed"}, "hook_name_out is for transcoders"),
                             ({"d_out": 0}, "d_out is 0"), ({"d_out": 4, "apply_b_dec_to_input": True}, "belongs to its output"),
                             ({"d_out": 4, "normalize_activations": "layer_norm"}, "cannot undo 'layer_norm'"),
                             ({"undo_normalization": False}, "which 'none' leaves no use for"),
                             ({"output_scale": 2.0}, "output_scale is for transcoders")):  # fmt: skip
        with pytest.raises(sae.SAEError, match=message):
            sae.SAEConfig(**base, **changes)


def test_a_transcoder_learns_a_map_and_its_scales():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, D)).astype(np.float32) * 30
    weights = rng.standard_normal((D, OUT)).astype(np.float32)
    y = relu(x @ weights) * 0.1
    cfg = sae.SAEConfig(architecture="topk", d_in=D, d_sae=64, k=8, d_out=OUT, skip=True, normalize_activations="expected_average_only_in")
    settings = sae.SAETrainConfig(steps=400, learning_rate=1e-2, init_rows=512)
    d, history = sae.train_sae(cfg, sae.array_batches(np.concatenate([x, y], axis=1), 256), settings, jax.random.key(0), progress=False)
    assert history[-1]["fvu"] < 0.12
    assert d.cfg.input_scale == pytest.approx(D**0.5 / np.linalg.norm(x, axis=1).mean(), rel=0.05)
    assert d.cfg.output_scale == pytest.approx(OUT**0.5 / np.linalg.norm(y, axis=1).mean(), rel=0.1)
    error = np.square(np.asarray(sae.reconstruct(d, x)) - y).sum() / np.square(y - y.mean(0)).sum()
    assert error < 0.12
    folded = sae.fold_input_scale(d)
    np.testing.assert_allclose(sae.reconstruct(folded, x), sae.reconstruct(d, x), rtol=1e-4, atol=1e-3)
    pair = training_pair(d.cfg, jnp.asarray(np.concatenate([x, y], axis=1)))
    np.testing.assert_allclose(pair[1], y * d.cfg.output_scale, rtol=1e-5)


def planted(n=8192, width=16, number=24, share=0.1, seed=0):
    """Rows made of few of `number` known directions: (rows, directions)."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((number, width)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    strengths = rng.uniform(0.5, 1.5, (n, number)) * (rng.random((n, number)) < share)
    return (strengths @ directions).astype(np.float32), directions


SETTINGS = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": {},
    "relu": {"sparsity_coefficient": 0.2},
    "gated": {"sparsity_coefficient": 0.7},
    "jumprelu": {"sparsity_coefficient": 0.3, "target_l0": 2.4, "bandwidth": 1.0, "threshold_init": 0.3},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_directions_are_found(architecture):
    """Mean over the planted directions of the largest cosine of a decoder row. 0.95 is asked of TopK; the prefixes of Matryoshka blend some."""
    x, directions = planted()
    cfg = sae.SAEConfig(architecture=architecture, d_in=16, d_sae=32, k=3 if architecture in TARGETS else None)
    settings = sae.SAETrainConfig(steps=1500, learning_rate=3e-3, init_rows=2048, dead_after=20_000, **SETTINGS[architecture])
    d, history = sae.train_sae(cfg, sae.array_batches(x, 256), settings, jax.random.key(0), progress=False)
    cosine = directions @ np.asarray(sae.decode(d, np.eye(32, dtype=np.float32)) - d.params["b_dec"]).T
    cosine /= np.linalg.norm(np.asarray(d.params["W_dec"]), axis=1)
    least = {"matryoshka": 0.8}.get(architecture, 0.95)
    assert cosine.max(axis=1).mean() > least, cosine.max(axis=1)
    assert history[-1]["fvu"] < 0.25
    if architecture in ("batchtopk", "matryoshka"):
        z = np.asarray(sae.encode(d, x))  # one row at a time, by the threshold
        assert d.cfg.architecture == "jumprelu" and d.cfg.k is None and (z > 0).sum(axis=1).mean() == pytest.approx(3, rel=0.15)
    if architecture == "jumprelu":
        assert history[-1]["l0"] == pytest.approx(2.4, rel=0.25)


JUMPRELU_KNOBS = {
    "penalty": "tanh", "target_l0": 4.0, "bandwidth": 0.7, "threshold_init": 0.5, "sparsity_coefficient": 0.5,
}  # fmt: skip


def trained(architecture, x=None, **settings):
    cfg = sae.SAEConfig(architecture=architecture, d_in=16, d_sae=32, k=3 if architecture in TARGETS else None)
    base = {"steps": 20, "learning_rate": 1e-2, "init_rows": 512, "dead_after": 128, "log_every": 20}
    x = planted()[0] if x is None else x
    return sae.train_sae(cfg, sae.array_batches(x, 64), sae.SAETrainConfig(**(base | settings)), jax.random.key(0), progress=False)[0]


def differ(a, b):
    return any(np.any(np.asarray(a.params[name]) != np.asarray(b.params[name])) for name in a.params)


def test_jumprelu_knobs_change_the_result():
    base = {"sparsity_coefficient": 0.05, "bandwidth": 0.3, "threshold_init": 0.2}
    plain = trained("jumprelu", **base)
    for name, value in JUMPRELU_KNOBS.items():
        assert differ(plain, trained("jumprelu", **(base | {name: value}))), name
    shut = base | {"threshold_init": 3.0}  # most latents are dead
    assert differ(trained("jumprelu", **shut), trained("jumprelu", **shut, pre_act_coefficient=0.5))
    tanh = base | {"penalty": "tanh"}
    assert differ(trained("jumprelu", **tanh), trained("jumprelu", **tanh, tanh_scale=1.0))


def test_other_knobs_change_the_result():
    assert differ(trained("batchtopk"), trained("batchtopk", threshold_decay=0.5))
    plain = trained("topk", method="dense")
    assert differ(plain, trained("topk", method="dense", matmul_dtype="bfloat16"))
    shut = {"sparsity_coefficient": 0.05, "threshold_init": 3.0}
    assert differ(trained("jumprelu", **shut), trained("jumprelu", **shut, resample_every=5))


def test_bf16_products_keep_fp32_parameters_and_learn_alike():
    x, _ = planted()
    for architecture in ("topk", "jumprelu"):
        settings = {"steps": 300} | SETTINGS[architecture]
        full, half = (trained(architecture, x, matmul_dtype=dtype, **settings) for dtype in ("float32", "bfloat16"))
        assert half.params["W_enc"].dtype == jnp.float32
        errors = [1 - sae.evaluate(d, [x[:2000]])["explained_variance"] for d in (full, half)]
        assert abs(errors[0] - errors[1]) < 0.1 * max(errors), errors


def test_resampling_by_hand():
    """Dead latents take a badly reconstructed row's direction, the mean norm of the living, no bias and no moments; the others stay."""
    x, _ = planted(512)
    cfg = sae.SAEConfig(architecture="relu", d_in=16, d_sae=32)
    train = sae.SAETrainConfig(sparsity_coefficient=0.1)
    d, scale = start(cfg, train, x, jax.random.key(0))
    state, step = init_state(d), step_for(cfg, train)
    state, _ = step(state, jnp.asarray(x[:64]), numbers_at(5, 32, train, scale))
    dead = np.arange(32) < 5
    state = state.replace(idle_F=jnp.where(dead, 1000, 0))
    kept = jax.tree.map(np.asarray, state)
    x[100] = 1e3 * np.random.default_rng(9).standard_normal(16)  # by far the worst reconstructed
    new = resample(state, jnp.asarray(x), jax.random.key(1), 1000, 0.0, cfg=cfg)
    direction = (x[100] - kept.params["b_dec"]) / np.linalg.norm(x[100] - kept.params["b_dec"])
    typical = 0.2 * np.linalg.norm(kept.params["W_enc"], axis=0)[~dead].mean()
    np.testing.assert_allclose(np.asarray(new.params["W_dec"])[dead], np.tile(direction, (5, 1)), atol=1e-5)
    np.testing.assert_allclose(np.asarray(new.params["W_enc"])[:, dead], np.tile(direction[:, None] * typical, (1, 5)), atol=1e-5)
    assert not np.any(np.asarray(new.params["b_enc"])[dead]) and not np.any(np.asarray(new.idle_F))
    for moment in (new.moments.mu, new.moments.nu):
        assert not np.any(np.asarray(moment["W_dec"])[dead]) and not np.any(np.asarray(moment["W_enc"])[:, dead])
        assert np.any(np.asarray(moment["W_dec"])[~dead])
    for name, axis in (("W_dec", 0), ("W_enc", 1), ("b_enc", 0)):
        alive = np.flatnonzero(~dead)
        np.testing.assert_array_equal(np.take(np.asarray(new.params[name]), alive, axis), np.take(kept.params[name], alive, axis))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_the_same_at_any_scale(architecture):
    """Rows times 100: the trained dictionary is the same, its biases and thresholds times 100, and so are its figures."""
    x, _ = planted()
    small, large = (trained(architecture, x * c, steps=40, **SETTINGS[architecture]) for c in (1.0, 100.0))
    for name, value in small.params.items():
        grown = 1.0 if name in ("W_enc", "W_dec", "r_mag") else 100.0
        np.testing.assert_allclose(np.asarray(large.params[name]), np.asarray(value) * grown, rtol=2e-3, atol=2e-3 * grown)


def test_several_dictionaries_on_one_stream_equal_each_alone():
    """Two taps side by side in each row, three dictionaries: each ends as it does alone on its own columns."""
    a, b = planted(seed=0)[0], planted(seed=1)[0]
    both = np.concatenate([a, b], axis=1)
    settings = sae.SAETrainConfig(steps=12, learning_rate=1e-2, init_rows=256, log_every=6)
    small, large = sae.SAEConfig(d_in=16, d_sae=32, k=3), sae.SAEConfig(architecture="batchtopk", d_in=16, d_sae=48, k=2)
    over = sae.SAEConfig(d_in=16, d_sae=32, k=3, d_out=16)
    tasks = {"first": sae.SAETask(small, settings), "second": sae.SAETask(large, settings, 16), "over": sae.SAETask(over, settings, 16, 0)}
    seen = []
    found = sae.train_saes(tasks, sae.array_batches(both, 64), jax.random.key(3), progress=False, on_log=seen.append)
    keys = [jax.random.key(3), jax.random.fold_in(jax.random.key(3), 1), jax.random.fold_in(jax.random.key(3), 2)]
    columns = {"first": a, "second": b, "over": np.concatenate([b, a], axis=1)}
    for key, (name, task) in zip(keys, tasks.items(), strict=True):
        alone, history = sae.train_sae(task.cfg, sae.array_batches(columns[name], 64), settings, key, progress=False)
        jax.tree.map(np.testing.assert_array_equal, found[name][0].params, alone.params)
        assert found[name][1] == history and [r for r in seen if r["sae"] == name] == [{"sae": name} | r for r in history]


def test_mistakes_of_several():
    settings = sae.SAETrainConfig(steps=3)
    cfg = sae.SAEConfig(d_in=16, d_sae=32, k=3)
    with pytest.raises(sae.SAEError, match="different numbers of steps"):
        other = sae.SAETrainConfig(steps=4)
        sae.train_saes({"a": sae.SAETask(cfg, settings), "b": sae.SAETask(cfg, other)}, [], jax.random.key(0))
    with pytest.raises(sae.SAEError, match="no dictionaries to train"):
        sae.train_saes({}, [], jax.random.key(0))
    with pytest.raises(sae.SAEError, match=r"a batch has shape \(64, 16\); the SAE's d_in is 32"):
        tasks = {"a": sae.SAETask(cfg, settings), "b": sae.SAETask(cfg, settings, 16)}
        sae.train_saes(tasks, itertools.repeat(planted()[0][:64]), jax.random.key(0))


def test_one_program_for_all_numbers():
    """Other rates, weights, bandwidths and targets compile nothing anew."""
    x = planted()[0]
    trained("jumprelu", x, sparsity_coefficient=0.1, target_l0=3.0)
    before = train_step._cache_size()
    trained("jumprelu", x, sparsity_coefficient=0.2, target_l0=5.0, bandwidth=0.2, learning_rate=2e-3, pre_act_coefficient=0.1, dead_after=77)
    assert train_step._cache_size() == before


def test_what_is_not_gathered_is_not_asked_for():
    half = {"matmul_dtype": "bfloat16"}
    for architecture, changes, message in (("matryoshka", {}, "matryoshka has dense products only"), ("topk", half, "which is fp32")):
        cfg = sae.SAEConfig(architecture=architecture, d_in=16, d_sae=32, k=3)
        with pytest.raises(sae.SAEError, match=message):
            step_for(cfg, sae.SAETrainConfig(method="sparse", **changes))


def test_a_free_decoder_is_folded_in_what_encodes_alone():
    d = trained("batchtopk", decoder_norm="free")
    np.testing.assert_allclose(np.linalg.norm(d.params["W_dec"], axis=1), 1.0, rtol=1e-5)


def test_half_precision_does_not_overflow_in_use():
    cfg = sae.SAEConfig(architecture="relu", d_in=4, d_sae=8, dtype="float16")
    d = sae.init(cfg, jax.random.key(0))
    x = np.full((3, 4), 1e5, np.float32)
    full = sae.cast(d, "float32")
    for f in (sae.encode, sae.reconstruct):
        assert np.isfinite(np.asarray(f(d, x))).all()
        np.testing.assert_allclose(f(d, x), f(full, x), rtol=1e-5)
