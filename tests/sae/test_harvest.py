"""Activations from a model: which rows, in what shapes, equal to the plain forward pass; the shuffling buffer."""

import itertools

import jax
import numpy as np
import pytest

import models
import sae
from sae.harvest import blocks_needed, left_out, token_batches


@pytest.fixture(scope="module")
def lm():
    cfg = models.ModelConfig(
        vocab_size=23, d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_position=32, bos_token_id=1, eos_token_ids=(2,)
    )
    return cfg, models.init(cfg, jax.random.key(0))


ROWS = [[1, 5, 6, 7], [4, 9], [], [1, 3, 3, 8, 9, 10, 11, 12, 13], [1, 14, 15]]


def plain(lm, row, hook):
    cfg, params = lm
    return np.asarray(models.apply(cfg, params, np.array([row], np.int32), taps=(hook,))[1][hook][0])


@pytest.mark.parametrize("hook", ["embed", "blocks.0.resid_pre", "blocks.1.resid_post", "blocks.2.mlp_act", "final_norm"])
def test_equals_the_forward_pass_row_by_row(lm, hook):
    found = np.concatenate(list(sae.harvest_activations(*lm, ROWS, hook, batch_size=2)))
    expected = np.concatenate([plain(lm, row, hook)[1:] for row in ROWS if row])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_size_changes_the_chunks_and_not_the_rows(lm):
    small, large = (list(sae.harvest_activations(*lm, ROWS, "blocks.1.resid_post", batch_size=b)) for b in (1, 8))
    assert len(small) == 4 and len(large) == 1
    np.testing.assert_allclose(np.concatenate(small), large[0], atol=1e-5)


@pytest.mark.parametrize("skip_first", [0, 1, 2])
def test_the_first_positions_of_each_piece_are_kept_on_request(lm, skip_first):
    found = np.concatenate(list(sae.harvest_activations(*lm, ROWS, "embed", skip_first=skip_first, context_size=5)))
    pieces = [row[i : i + 5] for row in ROWS for i in range(0, len(row), 5)]
    np.testing.assert_allclose(found, np.concatenate([plain(lm, piece, "embed")[skip_first:] for piece in pieces]), atol=1e-6)


def test_no_sink_is_harvested(lm):
    """A model that writes a huge activation wherever a context begins, BOS or not (token 20 stands for it): no piece gives it away."""
    cfg, params = lm
    planted = params | {"embed": {"embedding": params["embed"]["embedding"].at[20].set(1e3)}}
    rows = [[20, 5, 6, 7, 20, 8, 9, 10, 20, 3], [20, 4, 9], [20]]  # cut at 4: each piece begins with it
    found = np.concatenate(list(sae.harvest_activations(cfg, planted, rows, "embed", context_size=4)))
    assert len(found) == 9 == sum(sae.token_counts(rows, 4)) and np.abs(found).max() < 10
    kept = np.concatenate(list(sae.harvest_activations(cfg, planted, rows, "embed", context_size=4, skip_first=0)))
    assert len(kept) == 14 and np.abs(kept).max() == 1e3
    for tokens, _, _ in token_batches(rows, 2, 4):  # what splicing, fine-tuning and pages of features leave as it is
        assert left_out(tokens, 1)[tokens == 20].all() and left_out(tokens, 1).sum() == len(tokens)


def test_long_rows_are_cut_at_the_context_and_each_piece_loses_its_first(lm):
    cfg, params = lm
    row = [1] + [3 + i % 19 for i in range(20)]
    found = np.concatenate(list(sae.harvest_activations(cfg, params, [row], "blocks.0.resid_post", context_size=8)))
    pieces = [row[i : i + 8] for i in (0, 8, 16)]
    expected = np.concatenate([plain(lm, p, "blocks.0.resid_post")[1:] for p in pieces])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.concatenate(list(sae.harvest_activations(cfg, params, [row * 3], "embed")))) == 61  # max_position 32


def test_few_shapes_are_compiled():
    rows = [[3] * n for n in range(1, 33)]
    widths = {tokens.shape for tokens, _, _ in token_batches(rows, 4, 24)}
    assert widths == {(4, 4), (4, 8), (4, 16), (4, 24)}


def test_only_the_blocks_below_the_tap_run():
    assert [blocks_needed(h) for h in ("embed", "blocks.0.resid_pre", "blocks.11.mlp_out", "final_norm")] == [0, 1, 12, None]


def test_mistakes(lm):
    cfg, params = lm
    with pytest.raises(sae.SAEError, match="token id 23 is outside the model's vocabulary of 23"):
        list(sae.harvest_activations(cfg, params, [[1, 23]], "embed"))
    with pytest.raises(sae.SAEError, match="token id -1"):
        list(sae.harvest_activations(cfg, params, [[1, -1]], "embed"))
    with pytest.raises(sae.SAEError, match="no vector a token"):
        list(sae.harvest_activations(cfg, params, ROWS, "blocks.0.attn_probs"))
    with pytest.raises(sae.SAEError, match="no blocks.3.resid_post: the model has 3 blocks"):
        list(sae.harvest_activations(cfg, params, ROWS, "blocks.3.resid_post"))
    with pytest.raises(models.ModelError, match="resid_pots"):
        list(sae.harvest_activations(cfg, params, ROWS, "blocks.1.resid_pots"))
    bad = jax.tree.map(lambda a: a * np.nan, params)
    with pytest.raises(sae.SAEError, match="NaN or infinite activations"):
        list(sae.harvest_activations(cfg, bad, ROWS, "blocks.0.resid_post"))


def numbered(n, chunk=7):
    """A stream whose row i is [i]."""
    rows = np.arange(n, dtype=np.float32)[:, None]
    return (rows[i : i + chunk] for i in range(0, n, chunk))


def test_buffer_serves_every_row_once_in_another_order():
    batches = list(sae.ActivationBuffer(numbered(200), batch_size=10, buffer_size=60))
    served = np.concatenate(batches)[:, 0]
    assert {len(b) for b in batches} == {10} and sorted(served) == list(range(200))
    assert np.abs(np.diff(served)).mean() > 5


def test_buffer_holds_a_window():
    """A batch cannot hold rows further ahead than the buffer, and half of the window stays for later batches."""
    buffer = sae.ActivationBuffer(numbered(1000), batch_size=10, buffer_size=100)
    batches = list(itertools.islice(buffer, 10))
    assert np.max(batches[:5]) < 100 and 100 <= np.max(batches[5:]) < 150
    assert np.min(batches[5:]) < 50


def test_buffer_seed_and_part_batch():
    a, b, c = (np.concatenate(list(sae.ActivationBuffer(numbered(55), 10, 40, seed=s)))[:, 0] for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert len(a) == 50 and np.any(a != c)


def test_buffer_opens_its_source_again():
    served = np.concatenate(list(itertools.islice(sae.ActivationBuffer(lambda: numbered(30), 10, 20), 9)))[:, 0]
    assert np.bincount(served.astype(int), minlength=30).min() >= 2


def test_buffer_mistakes():
    with pytest.raises(sae.SAEError, match="at least twice"):
        sae.ActivationBuffer(numbered(5), 10, 15)
    with pytest.raises(sae.SAEError, match="gives no activations"):
        next(iter(sae.ActivationBuffer(lambda: [np.zeros((0, 3), np.float32)], 2, 4)))
    assert list(sae.ActivationBuffer([], 2, 4)) == []


def test_array_batches_use_every_row_once_an_epoch():
    rows = np.arange(10, dtype=np.float32)[:, None]
    stream = sae.array_batches(rows, 5)
    first, second = (np.concatenate([next(stream), next(stream)])[:, 0] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and np.any(first != second)
    assert np.any(next(sae.array_batches(rows, 5, seed=1)) != next(sae.array_batches(rows, 5)))
    with pytest.raises(sae.SAEError, match="fewer than batch_size"):
        next(sae.array_batches(rows, 11))
