"""The guards against degeneration, against hand counts, and the NLL against a plain forward pass."""

import jax
import numpy as np
import pytest

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.evals.degeneration import distinct_n, known_word_share, mean_nll, repeated_share, vocabulary_of


def test_distinct_n_counts_over_all_texts():
    assert distinct_n(["a b a b", "b a"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "b a"], 2) == pytest.approx(2 / 4)  # ab ba ab | ba
    assert distinct_n(["A cat.", "a, CAT!"], 2) == 0.5  # capitals and signs do not count
    assert np.isnan(distinct_n(["a"], 2))


def test_repetition_is_inside_a_text():
    assert repeated_share(["a b c", "a b c"], 3) == 0.0
    assert repeated_share(["a b a b a b", "c d e", "x"], 2) == pytest.approx((3 / 5 + 0) / 2)
    assert np.isnan(repeated_share(["a b"], 3))


def test_known_words():
    vocabulary = vocabulary_of(["The cat's cat", "the dog, the cat"], min_count=2)
    assert vocabulary == {"the", "cat"}
    assert vocabulary_of(["a 'b' b"], min_count=1) == {"a", "b"}
    assert known_word_share(["The cat sat", "the"], vocabulary) == 0.75
    assert np.isnan(known_word_share(["..."], vocabulary))


CFG = models.ModelConfig(
    family="llama", vocab_size=16, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, tie_embeddings=True,
    max_position=32, initializer_range=0.3,
)  # fmt: skip


def test_mean_nll_equals_a_plain_forward_whatever_the_batch(quick_compilation):
    params = models.init(CFG, jax.random.key(0))
    rng = np.random.default_rng(0)
    lengths = np.array([3, 5], np.int32)
    prompts = PromptBatch(rng.integers(1, 16, (2, 5)).astype(np.int32), lengths, ["a", "b"], [{}, {}])
    groups, completions = [0, 1, 1, 0, 1], [[1, 2, 3], [4], [], [5, 6, 7, 8], [9, 10]]
    total, count = 0.0, 0
    for group, completion in zip(groups, completions, strict=True):
        tokens = [*prompts.tokens_NT[group, : lengths[group]].tolist(), *completion]
        padded = np.pad(tokens, (0, 9 - len(tokens)))  # of one shape, so that it is compiled once; no token sees what comes after it
        logits_TV = models.apply(CFG, params, padded[None])[0][0]
        logps_TV = np.asarray(jax.nn.log_softmax(logits_TV), np.float64)
        for at in range(lengths[group], len(tokens)):
            total -= logps_TV[at - 1, tokens[at]]
            count += 1
    for batch_rows in (256, 2):
        assert mean_nll(CFG, params, prompts, groups, completions, batch_rows=batch_rows) == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="no completion"):
        mean_nll(CFG, params, prompts, [0], [[]])
