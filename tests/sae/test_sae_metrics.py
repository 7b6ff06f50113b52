"""Metrics by hand: sparsity, global explained variance, dead share, cross-entropy recovered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sae

D = 4


def identity(scale=1.0, architecture="relu", keep=2 * D):
    """A dictionary whose reconstruction is `scale` times its input: latents are the signed coordinates."""
    both = np.concatenate([np.eye(D), -np.eye(D)], axis=1).astype(np.float32)
    cfg = sae.SAEConfig(architecture=architecture, d_in=D, d_sae=2 * D, k=keep if architecture == "topk" else None)
    params = {"W_enc": both, "b_enc": np.zeros(2 * D, np.float32), "W_dec": scale * both.T, "b_dec": np.zeros(D, np.float32)}
    return sae.Dictionary(params, cfg)


def data(n=100, offset=50.0):
    return (np.random.default_rng(0).standard_normal((n, D)) + offset).astype(np.float32)


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_perfect_reconstruction(architecture):
    found = sae.evaluate(identity(architecture=architecture), [data()])
    assert found["explained_variance"] == pytest.approx(1.0) and found["l0"] == D and found["rows"] == 100
    assert found["dead_share"] == 0.5  # with an offset of 50 the negative coordinates never fire


def test_explained_variance_is_global():
    """1 - sum of squared errors / sum of squared distances to the mean of the whole set, whatever the batches."""
    x, d = data(offset=3.0) * np.array([1, 2, 3, 4], np.float32), identity(0.9)
    expected = 1 - np.sum((0.1 * x) ** 2) / np.sum((x - x.mean(axis=0)) ** 2)
    for cut in (10, 50, 100):
        batches = [x[i : i + cut] for i in range(0, 100, cut)]
        assert sae.evaluate(d, batches)["explained_variance"] == pytest.approx(expected, rel=1e-5)
    mean_of_batches = np.mean([sae.evaluate(d, [x[i : i + 10]])["explained_variance"] for i in range(0, 100, 10)])
    assert abs(mean_of_batches - expected) > 1e-2


def test_large_offsets_do_not_spoil_the_variance():
    x = data(offset=5000.0)
    batches = [x[:7], x[7:60], x[60:]]
    expected = 1 - np.sum((1e-4 * x.astype(np.float64)) ** 2) / np.sum((x - x.mean(axis=0, dtype=np.float64)) ** 2)
    assert sae.evaluate(identity(1 - 1e-4), batches)["explained_variance"] == pytest.approx(expected, rel=2e-2)


def test_sparsity_counts_only_positive_latents():
    x = np.array([[1, -2, 0, 0], [0, 3, 0, 0]], np.float32)
    found = sae.evaluate(identity(), [x])
    assert found["l0"] == 1.5 and found["dead_share"] == 1 - 3 / 8
    kept = sae.evaluate(identity(architecture="topk", keep=1), [x])
    assert kept["l0"] == 1.0 and kept["dead_share"] == 1 - 2 / 8


def test_mistakes():
    with pytest.raises(sae.SAEError, match="no activations"):
        sae.evaluate(identity(), [])
    with pytest.raises(sae.SAEError, match="NaN or infinite"):
        sae.evaluate(identity(), [data(), np.full((3, D), np.nan, np.float32)])


@pytest.fixture(scope="module")
def lm():
    cfg = models.ModelConfig(
        vocab_size=11, d_model=D, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=2, d_ff=8, max_position=16, bos_token_id=1, initializer_range=1.0
    )
    return cfg, models.init(cfg, jax.random.key(0))


ROWS = [[1, 5, 6, 7, 3], [4, 9, 2], [8], [1, 3, 3, 8, 9, 10, 4]]


def spliced(d, hook):
    return d.replace(cfg=d.cfg.replace(hook_name=hook))


def cross_entropy(lm, hook=None, scale=1.0):
    """Mean next-token loss over all rows with the tap multiplied by `scale` except where the row opens with BOS."""
    total, count = 0.0, 0
    for row in ROWS:
        keep = np.arange(len(row)) < (row[0] == 1)
        edit = {hook: lambda x, keep=keep: jnp.where(keep[None, :, None], x, scale * x)} if hook else None
        logits = np.asarray(models.apply(*lm, np.array([row], np.int32), interventions=edit)[0][0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(logp[t, row[t + 1]] for t in range(len(row) - 1))
        count += len(row) - 1
    return total / count


@pytest.mark.parametrize("hook", ["blocks.0.resid_post", "blocks.1.mlp_out"])
def test_ce_recovered_by_hand(lm, hook):
    d = spliced(identity(0.8), hook)
    found = sae.ce_recovered(d, *lm, ROWS, batch_size=3)
    clean, zero, cut = cross_entropy(lm), cross_entropy(lm, hook, 0.0), cross_entropy(lm, hook, 0.8)
    np.testing.assert_allclose([found["ce_clean"], found["ce_zero"], found["ce_sae"]], [clean, zero, cut], rtol=1e-4)
    assert found["ce_recovered"] == pytest.approx((zero - cut) / (zero - clean), rel=1e-3)


def test_ce_recovered_ends(lm):
    assert sae.ce_recovered(spliced(identity(1.0), "blocks.0.resid_post"), *lm, ROWS)["ce_recovered"] == pytest.approx(1.0, abs=1e-4)
    assert sae.ce_recovered(spliced(identity(0.0), "blocks.0.resid_post"), *lm, ROWS)["ce_recovered"] == pytest.approx(0.0, abs=1e-4)


def test_bos_position_counts_on_request(lm):
    d = spliced(identity(0.5), "blocks.0.resid_post")
    assert sae.ce_recovered(d, *lm, ROWS)["ce_sae"] != sae.ce_recovered(d, *lm, ROWS, skip_bos=False)["ce_sae"]


def test_evaluate_adds_the_model_part(lm):
    d = spliced(identity(0.9), "blocks.0.resid_post")
    acts = list(sae.harvest_activations(*lm, ROWS, "blocks.0.resid_post"))
    found = sae.evaluate(d, acts, lm=(*lm, ROWS))
    assert found["ce_recovered"] == sae.ce_recovered(d, *lm, ROWS)["ce_recovered"] and found["explained_variance"] > 0.5


def test_ce_mistakes(lm):
    with pytest.raises(sae.SAEError, match="names no hook_name"):
        sae.ce_recovered(identity(), *lm, ROWS)
    with pytest.raises(sae.SAEError, match="nothing is predicted"):
        sae.ce_recovered(spliced(identity(), "embed"), *lm, [[3]])
