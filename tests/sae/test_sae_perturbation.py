"""Targeted probe perturbation: dictionaries whose latents carry one class each, and dictionaries whose latents carry several."""

import numpy as np
import pytest
import scipy.sparse

import sae
from sae.perturbation import targeted_probe_perturbation
from sae.pooling import Pooled
from sae.probing import split

C, D, F = 4, 12, 16


def planted(entangled, n=600, seed=0):
    """Texts of C classes. Latents c and C + c fire for class c; the others are noise. entangled: the decoder rows of latents c are a mixture
    of all classes' directions, so that taking one out moves every probe."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, n)
    decoder = np.zeros((F, D))
    decoder[:C, :C] = decoder[C : 2 * C, :C] = np.eye(C)
    decoder[2 * C :, C:] = np.eye(F - 2 * C, D - C)
    if entangled:
        decoder[: 2 * C, :C] += 2.0 * rng.standard_normal((2 * C, C))
    latents = np.zeros((n, F))
    latents[:, 2 * C :] = rng.exponential(1.0, (n, F - 2 * C)) * (rng.random((n, F - 2 * C)) < 0.5)
    latents[np.arange(n), labels], latents[np.arange(n), C + labels] = 2 + rng.random(n), 1 + rng.random(n)
    x = latents @ decoder + 0.2 * rng.standard_normal((n, D))
    cfg = sae.SAEConfig(architecture="relu", d_in=D, d_sae=F)
    zeros = {"W_enc": np.zeros((D, F)), "b_enc": np.zeros(F), "b_dec": np.zeros(D)}
    sparse = scipy.sparse.csr_matrix(latents.astype(np.float32))
    return sae.Dictionary({"W_dec": decoder, **zeros}, cfg), Pooled(sparse, sparse, x.astype(np.float32)), labels


def found(entangled, **how):
    d, pooled, labels = planted(entangled)
    return targeted_probe_perturbation(d, pooled, labels, *split(labels), **how)


def test_latents_of_one_class_each_are_told_from_mixed_ones():
    clean = found(False, ns=(2, 500))
    assert [set(own[:2]) for own in clean.latents] == [{c, C + c} for c in range(C)]
    scores = {n: {name: v[0] for name, v in row.items()} for n, row in clean.scores().items()}
    assert scores.keys() == {"2", "16", "diff_mean"}  # 500 is cut to the number of latents
    assert scores["2"]["intended"] == pytest.approx(0.5, abs=0.05) and abs(scores["2"]["unintended"]) < 0.1
    assert scores["2"]["tpp"] == scores["2"]["intended"] - scores["2"]["unintended"] > 0.35
    mixed = found(True, ns=(2,)).scores()["2"]
    assert mixed["unintended"][0] > scores["2"]["unintended"] + 0.05 and mixed["tpp"][0] < scores["2"]["tpp"]
    assert scores["diff_mean"]["intended"] > 0.2


def test_what_is_taken_out_is_the_contribution_of_each_token():
    """By hand for one class and one n: the probe on activations less the latents' part, the rest (the error, too) as it was."""
    d, pooled, labels = planted(False)
    result = targeted_probe_perturbation(d, pooled, labels, *split(labels), ns=(3,))
    taken = result.latents[1][:3]
    x = pooled.activations - pooled.contributions.toarray()[:, taken] @ d.params["W_dec"][taken]
    for j, (probe, problem) in enumerate(zip(result.probes, result.problems)):
        np.testing.assert_array_equal(result.ablated[3][1][j], (probe.scores(x[problem.test]) > 0) == problem.test_labels)


def test_more_latents_take_out_more_and_only_those_that_speak_for_the_class():
    result = found(False, ns=(1, 2, 10))
    scores = result.scores()
    assert scores["1"]["intended"][0] < scores["2"]["intended"][0]
    assert all(len(own) < F for own in result.latents)


def test_a_latent_that_fires_elsewhere_and_writes_against_the_class_is_none_of_it():
    """Negative (fires less on the class) times negative (writes against its probe) is positive, yet it is not of the class."""
    d, pooled, labels = planted(False)
    train, test = split(labels)
    decoder, latents = d.params["W_dec"].copy(), pooled.contributions.toarray()
    against = 2 * C
    decoder[against], latents[:, against] = -5 * np.eye(D)[1], 9 * (labels != 1)
    sparse = scipy.sparse.csr_matrix(latents.astype(np.float32))
    x = pooled.activations + latents[:, [against]] @ decoder[[against]] * 0.1
    pooled, d = Pooled(sparse, sparse, x.astype(np.float32)), d.replace(params={**d.params, "W_dec": decoder})
    result = targeted_probe_perturbation(d, pooled, labels, train, test, ns=(500,))
    probe, problem = result.probes[1], result.problems[1]
    assert decoder[against] @ probe.weights < 0  # it would come first of all, were signs not looked at
    difference = latents[problem.train][problem.train_labels == 1].mean(axis=0) - latents[problem.train][problem.train_labels == 0].mean(axis=0)
    assert np.argmax(difference * (decoder @ probe.weights)) == against and against not in result.latents[1]
    effect = np.maximum(difference, 0) * (decoder @ probe.weights)
    assert set(result.latents[1]) == set(np.flatnonzero(effect > 0)) and {1, C + 1} == set(result.latents[1][:2])


def test_resampled_texts_are_the_texts_that_were_drawn():
    result = found(True, ns=(2,))
    weights = np.random.default_rng(1).multinomial(600, np.full(600, 1 / 600), 3)
    scores, once = result.scores(weights)["2"]["tpp"], result.scores(np.ones((1, 600)))["2"]["tpp"]
    assert scores.shape == (3,) and len(set(scores)) == 3
    assert once[0] == pytest.approx(result.scores()["2"]["tpp"][0])
    problem, right = result.problems[0], result.clean[0]
    by_hand = np.average(right, weights=weights[0][problem.test])
    assert result._accuracy(right, problem, weights)[0] == pytest.approx(by_hand)


def test_mistakes_and_the_seed():
    d, pooled, labels = planted(False)
    with pytest.raises(sae.SAEError, match="three classes or more"):
        targeted_probe_perturbation(d, pooled, labels % 2, *split(labels % 2))
    narrow = pooled._replace(activations=pooled.activations[:, :3])
    with pytest.raises(sae.SAEError, match="writes 12 dimensions"):
        targeted_probe_perturbation(d, narrow, labels, *split(labels))
    with pytest.raises(sae.SAEError, match="a transcoder writes to another tap"):
        targeted_probe_perturbation(d.replace(cfg=d.cfg.replace(d_out=D, apply_b_dec_to_input=False)), pooled, labels, *split(labels))
    rows = [targeted_probe_perturbation(d, pooled, labels, *split(labels), ns=(2,), seed=s).problems[0].test for s in (0, 1)]
    assert rows[0].tolist() != rows[1].tolist()
