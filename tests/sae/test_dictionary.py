"""The dictionary as a function: definitions against numpy, shapes, normalisations, folds, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae.architectures import ARCHITECTURES
from sae.dictionary import param_shapes

D, F, K = 6, 20, 3


def random_dictionary(seed=0, **changes) -> sae.Dictionary:
    """A dictionary none of whose parameters is zero or of a special norm."""
    cfg = sae.SAEConfig(**({"architecture": "topk", "d_in": D, "d_sae": F, "k": K} | changes))  # k is read where it has a meaning
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in param_shapes(cfg).items()}
    return sae.Dictionary(params, cfg)


def rows(n=5, seed=1, width=D):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def numpy_topk(pre, k):
    z = np.zeros_like(pre)
    for i, row in enumerate(pre):
        keep = np.argsort(-row, kind="stable")[:k]
        z[i, keep] = np.maximum(row[keep], 0)
    return z


def as_numpy(d):
    return {name: np.asarray(value) for name, value in d.params.items()}


@pytest.mark.parametrize("centre", [True, False])
def test_topk_is_the_k_largest_then_relu(centre):
    d, x = random_dictionary(apply_b_dec_to_input=centre, k=14), rows()
    p = as_numpy(d)
    pre = (x - p["b_dec"] * centre) @ p["W_enc"] + p["b_enc"]
    assert (np.sort(pre, axis=1)[:, -14] < 0).any()  # the ReLU matters
    np.testing.assert_allclose(sae.encode(d, x), numpy_topk(pre, 14), atol=1e-5)


def test_relu_is_relu():
    d, x = random_dictionary(architecture="relu", k=None), rows()
    p = as_numpy(d)
    np.testing.assert_allclose(sae.encode(d, x), np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0), atol=1e-5)


def test_decode_by_hand():
    d = random_dictionary()
    p, z = as_numpy(d), np.zeros((1, F), np.float32)
    z[0, 4], z[0, 7] = 2.0, 0.5
    np.testing.assert_allclose(sae.decode(d, z)[0], 2 * p["W_dec"][4] + 0.5 * p["W_dec"][7] + p["b_dec"], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_and_dense_codes_agree(architecture):
    d, x = random_dictionary(architecture=architecture), rows(8).reshape(2, 4, D)
    z = sae.encode(d, x)
    values, indices = sae.encode_topk(d, x, k=K if architecture == "topk" else F)
    assert z.shape == (2, 4, F) and indices.dtype == jnp.int32
    assert bool(jnp.all(values[..., :-1] >= values[..., 1:]))
    scattered = np.zeros((2, 4, F), np.float32)
    np.put_along_axis(scattered, np.asarray(indices), np.asarray(values), axis=-1)
    np.testing.assert_array_equal(scattered, z)
    np.testing.assert_allclose(sae.decode_topk(d, values, indices), sae.decode(d, z), atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(d, x), sae.decode(d, z), atol=1e-5)


def test_fewer_latents_than_the_dictionary_keeps():
    d, x = random_dictionary(), rows()
    all_values, all_indices = sae.encode_topk(d, x)
    values, indices = sae.encode_topk(d, x, k=2)
    np.testing.assert_array_equal(values, all_values[:, :2])
    np.testing.assert_array_equal(indices, all_indices[:, :2])


def test_more_latents_than_the_dictionary_keeps_are_zero():
    d, x = random_dictionary(), rows()
    values, _ = sae.encode_topk(d, x, k=K + 4)
    np.testing.assert_array_equal(values[:, K:], 0.0)
    np.testing.assert_array_equal(values[:, :K], sae.encode_topk(d, x)[0])


def test_normalisations_are_what_they_say():
    x = rows(40) * 3 + 1
    for name, expected in {
        "expected_average_only_in": x * 0.7,
        "constant_norm_rescale": x / np.linalg.norm(x, axis=1, keepdims=True) * D**0.5,
        "layer_norm": (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5),
    }.items():
        plain = random_dictionary()
        d = sae.Dictionary(plain.params, plain.cfg.replace(normalize_activations=name, input_scale=0.7))
        np.testing.assert_allclose(sae.encode(d, x), sae.encode(plain, expected.astype(np.float32)), atol=2e-5)


@pytest.mark.parametrize("name", ["expected_average_only_in", "constant_norm_rescale", "layer_norm"])
def test_normalisation_is_undone(name):
    """With F = D, identity weights and every latent kept, positive normalised rows come back as they went in."""
    cfg = sae.SAEConfig(d_in=D, d_sae=2 * D, k=2 * D, normalize_activations=name, input_scale=0.3)
    both = np.concatenate([np.eye(D), -np.eye(D)], axis=1).astype(np.float32)
    d = sae.Dictionary({"W_enc": both, "W_dec": both.T, "b_enc": np.zeros(2 * D), "b_dec": np.zeros(D)}, cfg)
    x = rows(7) * 5 + 2
    np.testing.assert_allclose(sae.reconstruct(d, x), x, rtol=1e-4, atol=1e-4)
    if name != "expected_average_only_in":
        with pytest.raises(sae.SAEError, match="needs the input too"):
            sae.decode(d, sae.encode(d, x))


def test_zero_row_stays_finite():
    for name in ("constant_norm_rescale", "layer_norm"):
        assert np.isfinite(sae.reconstruct(random_dictionary(normalize_activations=name), np.zeros((1, D), np.float32))).all()


def test_folding_the_input_scale_keeps_the_function():
    d = random_dictionary(normalize_activations="expected_average_only_in", input_scale=2.5)
    folded, x = sae.fold_input_scale(d), rows()
    assert folded.cfg.normalize_activations == "none" and folded.cfg.input_scale == 1.0
    np.testing.assert_allclose(sae.encode(folded, x), sae.encode(d, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(folded, x), sae.reconstruct(d, x), rtol=1e-5, atol=1e-5)
    back = sae.unfold_input_scale(folded, 2.5)
    assert back.cfg == d.cfg
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back.params, d.params)


def test_folding_decoder_norms_keeps_a_relu_dictionary():
    d, x = random_dictionary(architecture="relu", k=None), rows()
    folded = sae.fold_decoder_norm(d)
    np.testing.assert_allclose(np.linalg.norm(folded.params["W_dec"], axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(folded, x), sae.reconstruct(d, x), rtol=1e-4, atol=1e-4)


def test_folding_decoder_norms_of_topk_selects_by_contribution():
    d, x = random_dictionary(), rows()
    p = as_numpy(d)
    norms = np.linalg.norm(p["W_dec"], axis=1)
    weighted = numpy_topk(((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms, K)
    np.testing.assert_allclose(sae.encode(sae.fold_decoder_norm(d), x), weighted, rtol=1e-5, atol=1e-5)


def test_initial_dictionary():
    cfg = sae.SAEConfig(d_in=D, d_sae=F, k=K)
    p, other = sae.init(cfg, jax.random.key(0)).params, sae.init(cfg, jax.random.key(1)).params
    np.testing.assert_allclose(np.linalg.norm(p["W_dec"], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(p["W_enc"], p["W_dec"].T)
    assert not np.any(p["b_enc"]) and not np.any(p["b_dec"]) and np.any(p["W_dec"] != other["W_dec"])


def test_bfloat16_parameters_give_fp32_codes_near_fp32():
    d, x = random_dictionary(architecture="relu", k=None), rows()
    low = sae.Dictionary(jax.tree.map(lambda a: a.astype(jnp.bfloat16), d.params), d.cfg.replace(dtype="bfloat16"))
    z = sae.encode(low, x)
    assert z.dtype == jnp.float32 and sae.decode(low, z).dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(z - sae.encode(d, x)))) < 0.1


def test_works_inside_jit_and_grad():
    d, x = random_dictionary(), jnp.asarray(rows())
    inside = jax.jit(lambda d, x: sae.reconstruct(d, x))(d, x)
    np.testing.assert_allclose(inside, sae.reconstruct(d, x), atol=1e-6)
    gradient = jax.grad(lambda d: jnp.sum(sae.reconstruct(d, x) ** 2))(d)
    assert float(jnp.abs(gradient.params["W_enc"]).sum()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topkk"}, "did you mean 'topk'"),
        ({"k": None}, "needs 1 <= k"),
        ({"k": F + 1}, "needs 1 <= k"),
        ({"d_in": 0}, "d_in is 0"),
        ({"normalize_activations": "layernorm"}, "did you mean 'layer_norm'"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"input_scale": 0.0}, "input_scale"),
    ],
)
def test_config_mistakes(changes, message):
    with pytest.raises(sae.SAEError, match=message):
        sae.SAEConfig(**({"d_in": D, "d_sae": F, "k": K} | changes))


def test_shape_mistakes():
    d = random_dictionary()
    with pytest.raises(sae.SAEError, match=r"x has shape \(2, 5\); this SAE needs a last axis of 6"):
        sae.encode(d, np.zeros((2, 5), np.float32))
    with pytest.raises(sae.SAEError, match="z has shape"):
        sae.decode(d, np.zeros((2, D), np.float32))
    with pytest.raises(sae.SAEError, match="give 1 <= k"):
        sae.encode_topk(random_dictionary(architecture="relu", k=None), rows())


def test_every_architecture_declares_the_common_parameters():
    for row in ARCHITECTURES.values():
        assert {"W_enc", "W_dec", "b_dec", row.dead_bias} <= row.axes.keys() and set(row.norm_scaled) <= row.axes.keys()
        assert row.sparse_by in ("k", "penalty") and (row.needs_k or row.encode_sparse is None)


def test_config_is_hashable_and_replaceable():
    cfg = sae.SAEConfig(d_in=D, d_sae=F, k=K)
    assert hash(cfg) == hash(sae.SAEConfig(d_in=D, d_sae=F, k=K)) and cfg.replace(k=1).k == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.k = 2
