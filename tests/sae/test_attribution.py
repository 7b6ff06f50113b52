"""Scores of latents against the definition, against real ablation, and where both are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sae
from sae.attribution import _attribute, ablation_effects, attribute, logit_difference
from sae.config import NORMALISATIONS

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOOK = "blocks.0.resid_post"
CFG = models.ModelConfig(
    family="llama", vocab_size=60, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
    tie_embeddings=True, max_position=64, eos_token_ids=(), initializer_range=0.15,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9))
METRIC = logit_difference(5, 8)


@pytest.fixture(scope="module")
def params():
    return models.init(CFG, jax.random.key(0))


def dictionary(hook=HOOK, architecture="topk", normalisation="none"):
    scale = {"input_scale": 1.7} if normalisation == "expected_average_only_in" else {}
    k = 6 if architecture == "topk" else None
    d = sae.init(sae.SAEConfig(architecture, 16, 48, k, normalisation, hook_name=hook, **scale), jax.random.key(1))
    return d.replace(params=d.params | {"b_dec": 0.1 * jax.random.normal(jax.random.key(2), (16,)), "W_dec": 0.5 * d.params["W_dec"]})


def effects(params, d, found, row, items, metric=METRIC, **how):
    features, places = [i["feature"] for i in items], [i["token"] for i in items]
    return ablation_effects(CFG, params, d, TOKENS[row], metric, features, places, **how)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_at_the_last_norm_scores_are_by_hand_and_equal_ablation(params, architecture):
    """The logits are linear there: a latent's share is its activation times its row's product with two columns of the unembedding."""
    d = dictionary("final_norm", architecture)
    found = attribute(CFG, params, d, TOKENS, METRIC)
    logits, taps = models.apply(CFG, params, TOKENS, taps=("final_norm",))
    np.testing.assert_array_equal(found.metric_B, logits[:, -1, 5] - logits[:, -1, 8])
    z = np.asarray(sae.encode(d, taps["final_norm"]))
    matrix = np.asarray(models.unembed_matrix(CFG, params))
    expected = z[:, -1] * (np.asarray(d.params["W_dec"]) @ (matrix[:, 5] - matrix[:, 8]))
    dense = np.zeros((2, 9, 48), np.float32)
    np.put_along_axis(dense, np.asarray(found.features_BTK), np.asarray(found.scores_BTK), axis=-1)
    np.testing.assert_allclose(dense[:, -1], expected, atol=1e-6)
    assert (dense[:, :-1] == 0).all()
    for row in (0, 1):
        items = found.top(10, row)
        assert {i["token"] for i in items} == {8}
        np.testing.assert_allclose(effects(params, d, found, row, items), [i["score"] for i in items], atol=2e-6)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_scores_are_the_gradient_by_the_code(params, normalisation):
    """Against jax.grad by a dense code spliced in with its error kept."""
    d = dictionary(normalisation=normalisation)
    found = attribute(CFG, params, d, TOKENS, METRIC)
    h = models.forward(CFG, params, TOKENS, taps=(HOOK,)).taps[HOOK]
    z = sae.encode(d, h)

    def metric(code):
        splice = lambda x: h + sae.decode(d, code, h) - sae.decode(d, z, h)  # noqa: E731
        return METRIC(models.unembed(CFG, params, models.forward(CFG, params, TOKENS, interventions={HOOK: splice}).hidden[:, -1])).sum()

    expected = np.asarray(z * jax.grad(metric)(z))
    dense = np.zeros_like(expected)
    np.put_along_axis(dense, np.asarray(found.features_BTK), np.asarray(found.scores_BTK), axis=-1)
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_scores_follow_real_ablation_through_the_layers(params, architecture):
    d = dictionary(architecture=architecture)
    found, integrated = (attribute(CFG, params, d, TOKENS, METRIC, steps=n) for n in (0, 8))
    for row in (0, 1):
        items = found.top(25, row)
        real = effects(params, d, found, row, items)
        assert np.corrcoef(real, [i["score"] for i in items])[0, 1] > 0.9
        whole = found.top_features(12, row)
        everywhere = ablation_effects(CFG, params, d, TOKENS[row], METRIC, [i["feature"] for i in whole])
        assert np.corrcoef(everywhere, [i["score"] for i in whole])[0, 1] > 0.9
    assert (integrated.scores_BTK != found.scores_BTK).any()


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_integrated_gradients_add_up_to_the_effect_of_all_latents(params, normalisation):
    d = dictionary(normalisation=normalisation)
    found = attribute(CFG, params, d, TOKENS, METRIC, steps=32)
    h = models.forward(CFG, params, TOKENS, taps=(HOOK,)).taps[HOOK]
    without = h - sae.reconstruct(d, h) + sae.decode(d, jnp.zeros((2, 9, 48)), h)
    hidden = models.forward(CFG, params, TOKENS, interventions={HOOK: lambda x: without}).hidden
    lost = found.metric_B - METRIC(models.unembed(CFG, params, hidden[:, -1]))
    np.testing.assert_allclose(found.scores_BTK.sum((1, 2)), lost, rtol=2e-3, atol=1e-4)
    plain = attribute(CFG, params, d, TOKENS, METRIC).scores_BTK.sum((1, 2))
    assert (np.abs(plain - lost) > 5 * np.abs(found.scores_BTK.sum((1, 2)) - lost)).any()


def test_padding_start_and_positions(params):
    d = dictionary()
    padded = np.pad(TOKENS, ((0, 0), (0, 3)), constant_values=7)
    one, other = attribute(CFG, params, d, TOKENS, METRIC), attribute(CFG, params, d, padded, METRIC, lengths=[9, 9])
    np.testing.assert_allclose(other.scores_BTK[:, :9], one.scores_BTK, atol=1e-6)
    assert not np.asarray(other.scores_BTK[:, 9:]).any()
    assert not np.asarray(attribute(CFG, params, d, TOKENS, METRIC, start=4).scores_BTK[:, :4]).any()
    early = attribute(CFG, params, d, TOKENS, METRIC, positions=[3, 5])
    assert not np.asarray(early.scores_BTK[0, 4:]).any() and np.asarray(early.scores_BTK[1, 4:6]).any()
    items = early.top(5, 0)
    real, at_the_end = effects(params, d, early, 0, items, position=3), effects(params, d, early, 0, items)
    assert np.corrcoef(real, [i["score"] for i in items])[0, 1] > 0.95 and (np.sign(real) == np.sign([i["score"] for i in items])).all()
    assert (np.abs(at_the_end - real) > 1e-3).any()
    whole = attribute(CFG, params, d, TOKENS, lambda logits: logits[:, 3, 5] - logits[:, 3, 8], every_position=True)
    np.testing.assert_allclose(whole.scores_BTK[0], early.scores_BTK[0], atol=1e-6)
    few = attribute(CFG, params, d, TOKENS, METRIC, k=2)
    assert few.features_BTK.shape == (2, 9, 2) and [i["score"] for i in one.top(3)] == sorted((i["score"] for i in one.top(3)), key=abs, reverse=True)
    assert ablation_effects(CFG, params, d, TOKENS[0], METRIC, []).shape == (0,)


def test_other_ids_need_no_new_program(params):
    d = dictionary()
    attribute(CFG, params, d, TOKENS, METRIC)
    size = _attribute._cache_size()
    found = attribute(CFG, params, d, TOKENS, logit_difference(3, 9))
    assert _attribute._cache_size() == size
    both = attribute(CFG, params, d, TOKENS, logit_difference([5, 3], [8, 9]))
    np.testing.assert_allclose(both.metric_B[1], found.metric_B[1], atol=1e-6)


def transcoder_of(d):
    cfg = d.cfg.replace(d_out=8, apply_b_dec_to_input=False)
    return d.replace(cfg=cfg, params=d.params | {"W_dec": jnp.zeros((48, 8)), "b_dec": jnp.zeros(8)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, how: attribute(*how, d.replace(cfg=d.cfg.replace(hook_name=None)), TOKENS, METRIC), "names no hook_name"),
        (lambda d, how: attribute(*how, d, TOKENS, METRIC, steps=-1), "steps is -1"),
        (lambda d, how: attribute(*how, d, TOKENS, lambda logits: logits.sum()), "one number a row"),
        (lambda d, how: attribute(*how, transcoder_of(d), TOKENS, METRIC), "writes another"),
        (lambda d, how: ablation_effects(*how, d, TOKENS[0], METRIC, [48]), "no latent 48"),
    ],
)
def test_mistakes_are_named(params, call, message):
    with pytest.raises(sae.SAEError, match=message):
        call(dictionary(), (CFG, params))
