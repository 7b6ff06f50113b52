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


@pytest.fixture(scope="module")
def stream(params):
    """The activations of HOOK."""
    return models.forward(CFG, params, TOKENS, taps=(HOOK,)).taps[HOOK]


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


@pytest.mark.parametrize("architecture,normalisation", [*(("topk", n) for n in NORMALISATIONS), ("relu", "none"), ("relu", "layer_norm")])
def test_scores_are_the_gradient_by_the_code(params, stream, architecture, normalisation, monkeypatch):
    """Against jax.grad by a dense code spliced in with its error kept; dense codes in pieces of 4 tokens."""
    monkeypatch.setattr("sae.attribution.PIECE_BYTES", 4 * 4 * 48)
    d = dictionary(architecture=architecture, normalisation=normalisation)
    found = attribute(CFG, params, d, TOKENS, METRIC)
    h, z = stream, sae.encode(d, stream)

    def metric(code):
        splice = lambda x: h + sae.decode(d, code, h) - sae.decode(d, z, h)  # noqa: E731
        return METRIC(models.unembed(CFG, params, models.forward(CFG, params, TOKENS, interventions={HOOK: splice}).hidden[:, -1])).sum()

    expected = np.asarray(z * jax.jit(jax.grad(metric))(z))
    dense = np.zeros_like(expected)
    np.put_along_axis(dense, np.asarray(found.features_BTK), np.asarray(found.scores_BTK), axis=-1)
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    np.testing.assert_allclose(found.totals_BF, expected.sum(1), atol=2e-6)
    assert np.abs(expected).max() > 1e-3 and np.abs(found.rest_BT).max() < 1e-6


@pytest.mark.parametrize("architecture,steps", [("topk", 0), ("relu", 3)])
def test_what_is_not_told_of_a_token_is_in_the_rest(params, architecture, steps):
    """Fewer latents told change no score: the largest are kept, and the sums are of all."""
    d = dictionary(architecture=architecture)
    whole, few = (attribute(CFG, params, d, TOKENS, METRIC, steps=steps, k=k) for k in (48, 2))
    assert whole.scores_BTK.shape[2] == (6 if architecture == "topk" else 48)
    order = np.argsort(-np.abs(whole.scores_BTK), axis=2, kind="stable")[:, :, :2]
    for name in ("features_BTK", "activations_BTK", "scores_BTK"):
        told = np.take_along_axis(np.asarray(getattr(whole, name)), order, axis=2)
        live = np.take_along_axis(np.asarray(whole.scores_BTK), order, axis=2) != 0  # which of the empty ones is told says nothing
        np.testing.assert_allclose(np.where(live, getattr(few, name), 0), np.where(live, told, 0), atol=1e-6)
    np.testing.assert_allclose(few.rest_BT, whole.scores_BTK.sum(2) - few.scores_BTK.sum(2), atol=2e-6)
    np.testing.assert_allclose(few.totals_BF, whole.totals_BF, atol=1e-6)
    told, all_told = few.top_features(48), whole.top_features(48)
    assert [one["score"] for one in told] == pytest.approx([one["score"] for one in all_told], abs=1e-6) and np.abs(few.rest_BT).max() > 1e-4


def test_memory_does_not_grow_with_tokens_times_latents(params, monkeypatch):
    """Of 4 texts of 64 tokens and 8,192 latents the dense code is 8 MiB, and a text of it at a time, in three arrays, 6."""
    monkeypatch.setattr("sae.attribution.PIECE_BYTES", 64 << 10)
    d = sae.init(sae.SAEConfig("relu", 16, 8192, hook_name=HOOK), jax.random.key(1))
    given = jnp.zeros((4, 64), jnp.int32), jnp.full(4, 64), jnp.full(4, 63), jax.tree_util.Partial(METRIC), jnp.int32(0)
    program = _attribute.lower(CFG, params, d, *given, 0, 64).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 << 20


def transcoder(**fields):
    fields = {"d_out": 16, "skip": True, "hook_name": "blocks.0.mlp_in", "hook_name_out": "blocks.0.mlp_out"} | fields
    d = sae.init(sae.SAEConfig("relu", 16, 48, **fields), jax.random.key(1))
    return d.replace(params=d.params | {"b_dec": jnp.full(16, 0.1), "W_skip": 0.2 * jnp.eye(16), "W_dec": 0.2 * d.params["W_dec"]})


def test_a_transcoder_owes_to_the_latents_of_what_it_reads(params):
    """The gradient by a code of the MLP's input that is spliced in at its output, and real ablations there."""
    d = transcoder()
    found = attribute(CFG, params, d, TOKENS, METRIC)
    taps = models.forward(CFG, params, TOKENS, taps=(d.cfg.hook_name, d.cfg.place)).taps
    x, y = taps[d.cfg.hook_name], taps[d.cfg.place]
    z = sae.encode(d, x)

    def metric(code):
        splice = lambda _: y + sae.decode(d, code, x) - sae.decode(d, z, x)  # noqa: E731
        return METRIC(models.unembed(CFG, params, models.forward(CFG, params, TOKENS, interventions={d.cfg.place: splice}).hidden[:, -1])).sum()

    np.testing.assert_allclose(found.totals_BF, (z * jax.jit(jax.grad(metric))(z)).sum(1), atol=2e-6)
    items = found.top(20)
    assert np.corrcoef(effects(params, d, found, 0, items), [i["score"] for i in items])[0, 1] > 0.9


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
def test_integrated_gradients_add_up_to_the_effect_of_all_latents(params, stream, normalisation):
    d = dictionary(normalisation=normalisation)
    found = attribute(CFG, params, d, TOKENS, METRIC, steps=32)
    without = stream - sae.reconstruct(d, stream) + sae.decode(d, jnp.zeros((2, 9, 48)), stream)
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
    late = attribute(CFG, params, d, TOKENS, METRIC, start=4)
    assert not np.asarray(late.scores_BTK[:, :4]).any()
    behind = [i["feature"] for i in late.top_features(8)]
    real, everywhere = (ablation_effects(CFG, params, d, TOKENS[0], METRIC, behind, start=first) for first in (4, 0))
    assert np.corrcoef(real, [i["score"] for i in late.top_features(8)])[0, 1] > 0.95 and (np.abs(everywhere - real) > 1e-3).any()
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, how: attribute(*how, d.replace(cfg=d.cfg.replace(hook_name=None)), TOKENS, METRIC), "names no hook_name"),
        (lambda d, how: attribute(*how, d, TOKENS, METRIC, steps=-1), "steps is -1"),
        (lambda d, how: attribute(*how, d, TOKENS, lambda logits: logits.sum()), "one number a row"),
        (lambda d, how: attribute(*how, d, TOKENS, METRIC, k=0), "k is 0"),
        (lambda d, how: attribute(*how, transcoder(hook_name_out=None), TOKENS, METRIC), "names no hook_name_out"),
        (lambda d, how: ablation_effects(*how, d, TOKENS[0], METRIC, [48]), "no latent 48"),
    ],
)
def test_mistakes_are_named(params, call, message):
    with pytest.raises(sae.SAEError, match=message):
        call(dictionary(), (CFG, params))
