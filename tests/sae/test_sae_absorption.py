"""Feature absorption: dictionaries with and without planted absorption, features split in two, the vocabulary's first letters."""

import dataclasses

import numpy as np
import pytest

import sae
import sae.absorption
from sae.absorption import AbsorptionConfig, absorbed_fraction, absorption_figures, feature_absorption, first_letters

LETTERS, WORDS, COPIES = "abcd", 40, 3


def world(noise=0.02, seed=0):
    """Each word's activation is its letter's direction plus its own, all at right angles: (x, letters, word of each row, D)."""
    D = len(LETTERS) + len(LETTERS) * WORDS
    word = np.repeat(np.arange(len(LETTERS) * WORDS), COPIES)
    x = np.eye(D)[word // WORDS] * 2 + np.eye(D)[len(LETTERS) + word]
    x += noise * np.random.default_rng(seed).standard_normal(x.shape)
    return x.astype(np.float32), [LETTERS[w // WORDS] for w in word], word, D


def dictionary(absorbed, D, split=False, helper=0.0):
    """A latent a letter and a latent a word. The latents of the words in `absorbed` write their letter's direction too, and the letter's is
    silent on them. split: each letter has two latents, for even and odd words. helper: a part of each word's direction is its letter's."""
    C, W = len(LETTERS), len(LETTERS) * WORDS
    encoder, decoder = np.eye(D), np.eye(D)
    for w in range(W):
        c = w // WORDS
        if w in absorbed:
            encoder[C + w, c] -= 3.0  # word w fires: letter c does not
            decoder[C + w] = np.eye(D)[C + w] + 2 * np.eye(D)[c]
        elif helper:
            decoder[C + w] = np.eye(D)[C + w] + 2 * helper * np.eye(D)[c]
    if not absorbed and helper:
        encoder[np.arange(C), np.arange(C)] = 1 - helper
    if split:
        more = np.eye(D)[:, :C].copy()
        for w in range(W):
            (encoder if w % 2 else more)[C + w, w // WORDS] -= 3.0
        encoder, decoder = np.c_[encoder, more], np.r_[decoder, np.eye(D)[:C]]
    bias = np.full(encoder.shape[1], -0.2)  # noise fires nothing
    params = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": np.zeros(D)}
    cfg = sae.SAEConfig(architecture="relu", d_in=D, d_sae=encoder.shape[1])
    return sae.Dictionary({name: value.astype(np.float32) for name, value in params.items()}, cfg)


def test_without_absorption_the_scores_are_zero():
    x, letters, words, D = world()
    found = feature_absorption(dictionary(set(), D), x, letters, words)
    figures = absorption_figures(found)
    assert figures["mean_full_absorption_score"] == 0 == figures["mean_absorption_fraction_score"]
    assert figures["mean_num_split_features"] == 1 and figures["mean_probe_f1"] > 0.95
    assert [(f.letter, f.main) for f in found] == [(c, [i]) for i, c in enumerate(LETTERS)]


@pytest.mark.parametrize("rate", [0.2, 0.3])
def test_planted_absorption_is_found_at_its_rate(rate):
    x, letters, words, D = world()
    absorbed = {w for w in range(len(LETTERS) * WORDS) if w % WORDS < rate * WORDS}
    found = feature_absorption(dictionary(absorbed, D), x, letters, words)
    for letter in found:
        expected = np.isin(words[letter.rows], list(absorbed))
        np.testing.assert_array_equal(letter.full, expected)
        np.testing.assert_array_equal(letter.absorber, np.where(expected, len(LETTERS) + words[letter.rows], -1))
        np.testing.assert_allclose(letter.fraction, expected, atol=1e-6)
    assert absorption_figures(found)["mean_full_absorption_score"] == pytest.approx(rate, abs=0.12)


def test_the_fraction_by_hand():
    """SAEBench's arithmetic: of an activation's 10 along the probe the main latents give so much, absorbing ones so much."""
    cases = [  # projection, main, absorbers, fraction
        (10, 9, 2, 0.0),  # the gate: 2 is less than 0.4 of 10
        (10, 9, 6, 0.1),  # capped: the main latents leave 1, and 1 / (1 + 9)
        (10, 5, 4, 4 / 9),  # at the gate, below the cap
        (10, 5, 3.9, 0.0),
        (10, 10, 6, 0.0),  # the main latents give all
        (10, 12, 6, 0.0),
        (10, 0, 6, 1.0),  # they give nothing, or less
        (10, -3, 6, 1.0),
        (-10, -12, 6, 0.0),  # the activation does not point along the probe
        (0, 0, 0, 0.0),
    ]
    projection, main, absorbers, fraction = np.array(cases, float).T
    np.testing.assert_allclose(absorbed_fraction(projection, main, absorbers, 0.4), fraction)
    assert absorbed_fraction(projection, main, absorbers, 0.2)[0] == 0.1  # with a lower gate the first counts, too, capped


def oracle(d, x, found, cfg, direction):
    """(fractions, full absorption) of a letter's rows, from dense latents in float64, one row after the other."""
    z, W = np.asarray(sae.encode(d, x), np.float64), np.asarray(d.params["W_dec"], np.float64)
    cosines, along = W @ direction / np.maximum(np.linalg.norm(W, axis=1), 1e-30), W @ direction
    fractions, full = [], []
    for row in found.rows:
        given, whole = z[row] * along, float(x[row].astype(np.float64) @ direction)
        main = sum(given[j] for j in found.main)
        may = sorted((given[j] for j in range(len(W)) if j not in found.main and cosines[j] >= cfg.cosine and given[j] > 0), reverse=True)
        absorbers = sum(may[: cfg.max_absorbing])
        if whole <= 0 or absorbers / whole < cfg.share or main >= whole:
            fractions.append(0.0)
        else:
            fractions.append(1.0 if main <= 0 else min(absorbers, whole - main) / (min(absorbers, whole - main) + main))
        top = max(range(len(W)), key=lambda j: given[j])
        silent = all(z[row, j] == 0 for j in found.main)
        full.append(silent and whole > 0 and cosines[top] >= cfg.full_cosine and given[top] / whole >= cfg.share)
    return np.array(fractions), np.array(full)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_rows_against_numpy_on_a_random_dictionary(monkeypatch, share):
    """Random latents of many sizes on top of the planted ones, so that gate, cap and both thresholds decide."""
    x, letters, words, D = world()
    d = dictionary({w for w in range(len(LETTERS) * WORDS) if w % 3 == 0}, D, helper=0.5)
    rng = np.random.default_rng(1)
    more = {"W_enc": rng.standard_normal((D, 60)) / 2, "b_enc": np.zeros(60), "W_dec": rng.standard_normal((60, D)) / 10}
    more["W_dec"][:, : len(LETTERS)] += 0.3 * rng.standard_normal((60, len(LETTERS)))
    joined = {name: np.concatenate([d.params[name], value], axis=1 if name == "W_enc" else 0) for name, value in more.items()}
    params = {**d.params, **{name: value.astype(np.float32) for name, value in joined.items()}}
    d = sae.Dictionary(params, d.cfg.replace(d_sae=D + 60))
    probes, fit = [], sae.absorption.fit_probe

    def remember(*args, **how):
        probe = fit(*args, **how)
        if how.get("per_column") is False:
            probes.append(probe)
        return probe

    monkeypatch.setattr(sae.absorption, "fit_probe", remember)
    cfg = AbsorptionConfig(share=share, cosine=0.15)
    found = feature_absorption(d, x, letters, words, cfg=cfg)
    several, sums = set(), {"mean_absorption_fraction_score": [], "mean_full_absorption_score": []}
    for letter, probe in zip(found, probes, strict=True):
        fractions, full = oracle(d, x, letter, cfg, probe.weights / np.linalg.norm(probe.weights))
        assert {letters[row] for row in letter.rows} == {letter.letter} and (probe.scores(x[letter.rows]) > 0).all()  # the true positives
        for each, values in zip(sums.values(), (fractions, full), strict=True):
            each.append(values.sum() / len(letter.rows))
        np.testing.assert_allclose(letter.fraction, fractions, atol=1e-5)
        np.testing.assert_array_equal(letter.full, full)
        several |= set(np.round(fractions, 3).tolist())
    assert 0.0 in several and len(several) > 5
    figures = absorption_figures(found)  # SAEBench's aggregation: of a letter its sum over the true positives, then the mean over letters
    assert {name: figures[name] for name in sums} == pytest.approx({name: np.mean(values) for name, values in sums.items()})


def test_a_part_that_word_latents_carry_is_a_fraction_and_no_full_absorption():
    x, letters, words, D = world(noise=0.0)
    # The letter's latent reads 2 * 0.4 - 0.2 = 0.6 and writes that; the word's reads 1 - 0.2 and writes 0.8 * 1.2 = 0.96 of the letter's 2.
    found = absorption_figures(feature_absorption(dictionary(set(), D, helper=0.6), x, letters, words, cfg=AbsorptionConfig(cosine=0.3)))
    assert found["mean_full_absorption_score"] == 0 and found["mean_absorption_fraction_score"] == pytest.approx(0.96 / 1.56, abs=0.02)
    # With a smaller part, 0.8 * 0.8 = 0.64 is below 0.4 of 2: no absorption.
    found = absorption_figures(feature_absorption(dictionary(set(), D, helper=0.4), x, letters, words, cfg=AbsorptionConfig(cosine=0.3)))
    assert found["mean_absorption_fraction_score"] == 0


def test_a_letter_split_in_two_has_two_main_latents_and_no_absorption():
    x, letters, words, D = world()
    found = feature_absorption(dictionary(set(), D, split=True), x, letters, words)
    assert [sorted(f.main) for f in found] == [[i, D + i] for i in range(len(LETTERS))]
    assert absorption_figures(found)["mean_full_absorption_score"] == 0


OTHER = {"max_k": 1, "f1_jump": 0.5, "cosine": 0.99, "full_cosine": 0.99, "share": 0.999, "max_absorbing": 0, "least": 1000}


@pytest.mark.parametrize("field", OTHER)
def test_every_setting_matters(field):
    x, letters, words, D = world()
    absorbed = {w for w in range(len(LETTERS) * WORDS) if w % WORDS < 0.2 * WORDS}
    d = dictionary(absorbed, D, split=field in ("max_k", "f1_jump"))
    if field == "share":  # a second latent for each absorbed word, with a part of its letter
        d = d.replace(params={**d.params, "b_enc": d.params["b_enc"] * 0})
    assert set(OTHER) == {f.name for f in dataclasses.fields(AbsorptionConfig)}

    def figures(cfg):
        return absorption_figures(feature_absorption(d, x, letters, words, cfg=cfg))

    plain = figures(AbsorptionConfig())
    if field == "least":
        with pytest.raises(sae.SAEError, match="0 letter"):
            figures(AbsorptionConfig(least=1000))
        return
    assert figures(dataclasses.replace(AbsorptionConfig(), **{field: OTHER[field]})) != plain


def test_no_word_is_on_both_sides_and_mistakes_are_named():
    x, letters, words, D = world()
    d = dictionary(set(), D)
    one, other = (feature_absorption(d, x, letters, words, seed=seed) for seed in (0, 1))
    assert one[0].rows.tolist() != other[0].rows.tolist()
    for letter in one:  # all copies of a word, or none
        assert set(np.unique(words[letter.rows], return_counts=True)[1]) == {COPIES}
    few = feature_absorption(d, x, letters, words, test_share=0.25)
    assert len(few[0].rows) < len(one[0].rows)
    with pytest.raises(sae.SAEError, match="have 3 dimensions"):
        feature_absorption(d, x[:, :3], letters, words)
    with pytest.raises(sae.SAEError, match="a transcoder writes to another tap"):
        feature_absorption(d.replace(cfg=d.cfg.replace(d_out=D, apply_b_dec_to_input=False)), x, letters, words)
    with pytest.raises(sae.SAEError, match="two letters"):
        feature_absorption(d, x, letters, np.zeros(len(x), int))


def test_first_letters_of_vocabularies():
    assert first_letters({"▁the": 3, "ing": 4, "▁Tom": 5, "▁": 6, "▁a1": 7, "▁é": 8, "<s>": 0}) == {3: "t", 5: "t"}
    assert first_letters({"▁the": 3, "ing": 4}, words_only=False) == {3: "t", 4: "i"}
    assert first_letters({"red": 1, "Blue": 2, "+": 3}) == {1: "r", 2: "b"}
    assert first_letters({"Ġso": 1, "no": 2}) == {1: "s"}
