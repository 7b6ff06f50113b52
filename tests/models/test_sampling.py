"""Draws follow the softmax, filters keep what numpy and transformers keep, log-probabilities are the full vocabulary's."""

import functools
import importlib.util

import jax
import numpy as np
import pytest

from models.sampling import BLOCK, draw, keep_top_k, keep_top_p, sample

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: only the numpy oracles are checked")
N = 20_000  # draws a test
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))
INF = np.inf


@pytest.fixture
def rng():
    return np.random.default_rng(0)


drawn_from = jax.jit(draw)
top_p_kept = jax.jit(keep_top_p)


def softmax(logits):
    mass = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def uniforms(n: int, seed: int = 0):
    return jax.random.uniform(jax.random.key(seed), (n, 2))


def check_frequencies(drawn, probs):
    """Chi-square of draws against probabilities, cells of fewer than five expected draws put together.

    The limit is five standard deviations of the statistic; an index of no probability may not occur at all.
    """
    counts = np.bincount(drawn, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected, rare = probs * len(drawn), probs * len(drawn) < 5
    found, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    found, expected = found[expected > 0], expected[expected > 0]
    statistic, freedom = np.sum((found - expected) ** 2 / expected), len(expected) - 1
    assert freedom > 0 and statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("vocabulary", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 7])
def test_draws_follow_the_softmax(vocabulary, rng):
    logits = rng.normal(0, 1.5, vocabulary).astype(np.float32)
    drawn = drawn_from(np.broadcast_to(logits, (N, vocabulary)), uniforms(N, vocabulary))
    assert drawn.dtype == np.int32
    check_frequencies(np.asarray(drawn), softmax(logits))


def test_minus_infinity_is_never_drawn(rng):
    """Single tokens, the first and the last, and a whole block of the vocabulary."""
    logits = rng.normal(0, 1.5, 4 * BLOCK - 30).astype(np.float32)
    logits[rng.random(logits.size) < 0.3] = -INF
    logits[[0, -1]] = logits[BLOCK : 2 * BLOCK] = -INF
    check_frequencies(np.asarray(drawn_from(np.broadcast_to(logits, (N, logits.size)), uniforms(N))), softmax(logits))


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 3 * BLOCK + 2])
def test_the_ends_of_the_uniform_range(vocabulary, rng):
    """0 takes the first token that has any probability, the largest number below 1 the last: nothing outside them."""
    edges = np.array([(0, 0), (0, ALMOST_ONE), (ALMOST_ONE, 0), (ALMOST_ONE, ALMOST_ONE)], np.float32)
    logits = rng.normal(0, 1, vocabulary).astype(np.float32)
    drawn = np.asarray(drawn_from(np.broadcast_to(logits, (4, vocabulary)), edges))
    assert drawn[0] == 0 and drawn[3] == vocabulary - 1
    first, last = vocabulary // 2, vocabulary - 2
    logits[:first] = logits[last + 1 :] = -INF
    drawn = np.asarray(drawn_from(np.broadcast_to(logits, (4, vocabulary)), edges))
    assert drawn[0] == first and drawn[3] == last and ((first <= drawn) & (drawn <= last)).all()
    logits[:] = -INF
    logits[last] = -3.0
    assert (np.asarray(drawn_from(np.broadcast_to(logits, (4, vocabulary)), edges)) == last).all()


def test_rows_are_drawn_for_themselves(rng):
    """Each row follows its own logits, however far apart the rows' logits lie."""
    logits = np.full((3, 300), -400.0, np.float32)
    logits[0, 7], logits[1, 290], logits[2, 130] = 0.0, 3e4, -190.0
    logits[2, 131] = -190.0
    drawn = np.asarray(drawn_from(np.repeat(logits, 500, axis=0), uniforms(1500))).reshape(3, 500)
    assert (drawn[0] == 7).all() and (drawn[1] == 290).all()
    check_frequencies(drawn[2] - 130, np.array([0.5, 0.5]))


# --- filters ---------------------------------------------------------------------------------------------------------


def oracle_top_k(logits, k):
    return np.where(logits >= np.sort(logits)[::-1][k - 1], logits, -INF)


def oracle_top_p(logits, p):
    """Takes tokens from the most likely on until their mass reaches p, then all that tie with the last one taken."""
    order, probs, mass, last = np.argsort(-logits), softmax(logits), 0.0, INF
    for token in order:
        if mass >= p:
            break
        mass, last = mass + probs[token], logits[token]
    return np.where(logits >= last, logits, -INF)


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_top_k(k, rng):
    logits = rng.normal(0, 2, (6, 40)).astype(np.float32)
    logits[3:] = np.round(logits[3:])  # many ties
    kept = np.asarray(keep_top_k(logits, k))
    np.testing.assert_array_equal(kept, [oracle_top_k(row, k) for row in logits])
    assert (np.isfinite(kept[:3]).sum(-1) == k).all()


def test_top_k_ties_by_hand():
    found = keep_top_k(np.array([[1.0, 3.0, 2.0, 2.0, 0.0], [0.0, -INF, -INF, 1.0, -INF]], np.float32), 2)
    np.testing.assert_array_equal(found, [[-INF, 3, 2, 2, -INF], [0, -INF, -INF, 1, -INF]])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p, rng):
    logits = rng.normal(0, 2, (6, 300)).astype(np.float32)
    logits[3:] = np.round(logits[3:], 1)
    logits[5, ::3] = -INF
    kept = np.asarray(top_p_kept(logits, p))
    np.testing.assert_array_equal(kept, [oracle_top_p(row, p) for row in logits])
    assert np.isfinite(kept).any(-1).all()


def test_top_p_by_hand():
    """Masses 0.4, 0.3, 0.2, 0.1: the set that reaches p, not the one that stays below it. Ties stay together."""
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    for p, n in ((0.05, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.91, 4), (1.0, 4)):
        kept = np.isfinite(np.asarray(top_p_kept(logits, p)))[0]
        assert kept.tolist() == [n >= 4, n >= 1, n >= 3, n >= 2], p
    tied = np.array([[2.0, 0.0, 2.0, 2.0]], np.float32)
    assert np.isfinite(np.asarray(top_p_kept(tied, 0.1))).tolist() == [[True, False, True, True]]
    np.testing.assert_array_equal(top_p_kept(tied, 1.0), tied)


@pytest.mark.parametrize("p", [1e-6, 0.5, 0.999999])
def test_one_dominating_token_stays_alone(p):
    logits = np.zeros((1, 200), np.float32)
    logits[0, 150] = 60.0
    kept = np.asarray(top_p_kept(logits, p))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [150] and kept[0, 150] == 60


FILTERS = [(0, None), (8, None), (0, 0.7), (8, 0.7), (3, 0.95), (1, 0.5), (90, 0.9)]


def wanted(logits, temperature, top_k, top_p):
    """The filtered scaled logits by numpy: top-k first, top-p of what it leaves."""
    kept = logits / np.float32(temperature)
    kept = oracle_top_k(kept, top_k) if 0 < top_k < len(kept) else kept
    return kept if top_p is None else oracle_top_p(kept, top_p)


@needs_torch
@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_transformers_keeps_the_same(top_k, top_p, temperature, rng):
    """Its processors in the order in which its `generate` applies them, against ours and the oracle."""
    import torch
    from transformers.generation import logits_process

    logits = rng.normal(0, 2, (5, 80)).astype(np.float32)
    processors = [logits_process.TemperatureLogitsWarper(temperature)]
    processors += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    processors += [logits_process.TopPLogitsWarper(top_p)] if top_p else []
    expected = logits_process.LogitsProcessorList(processors)(None, torch.tensor(logits)).numpy()
    ours = logits / np.float32(temperature)
    ours = keep_top_k(ours, top_k) if 0 < top_k < 80 else ours
    ours = ours if top_p is None else top_p_kept(ours, top_p)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal([wanted(row, temperature, top_k, top_p) for row in logits], expected)


# --- sample ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("top_k",))
def jitted_sample(logits, uniforms, temperature, top_k, top_p):
    return sample(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), [case for case in FILTERS if case[0] != 1])
def test_samples_and_their_log_probabilities(top_k, top_p, temperature, rng):
    """What is drawn follows the filtered softmax; what is reported is of the full vocabulary at the temperature."""
    logits = rng.normal(0, 2, 80).astype(np.float32)
    tokens, logps = jitted_sample(np.broadcast_to(logits, (N, 80)), uniforms(N), temperature, top_k, top_p)
    tokens = np.asarray(tokens)
    check_frequencies(tokens, softmax(wanted(logits, temperature, top_k, top_p)))
    assert logps.dtype == np.float32
    np.testing.assert_allclose(logps, np.log(softmax(logits / np.float64(temperature)))[tokens], atol=2e-5)


def test_top_k_of_one_takes_the_best_and_reports_it_at_the_temperature(rng):
    logits = rng.normal(0, 2, (50, 80)).astype(np.float32)
    tokens, logps = sample(logits, uniforms(50), temperature=2.0, top_k=1)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logps, np.log(softmax(logits / 2).max(-1)), atol=1e-5)


def test_greedy_reports_the_log_probability_at_temperature_one(rng):
    """No uniforms are needed, the temperature (0 is usual) plays no part, and the first of equals is taken."""
    logits = rng.normal(0, 2, (50, 80)).astype(np.float32)
    logits[0, [3, 70]] = 9.0
    for temperature in (0.0, 0.5):
        tokens, logps = sample(logits, None, temperature=temperature, greedy=True)
        assert tokens.dtype == np.int32 and int(tokens[0]) == 3
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        np.testing.assert_allclose(logps, np.log(softmax(logits).max(-1)), atol=1e-5)
