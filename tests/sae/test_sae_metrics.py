"""Metrics by hand and against numpy: sparsity, reconstruction, density, geometry, cross-entropy and divergence recovered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sae
import sae.metrics
import sae.splice

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


def some_dictionary(architecture, seed=1, F=24):
    rng = np.random.default_rng(seed)
    cfg = sae.SAEConfig(architecture=architecture, d_in=D, d_sae=F, k=3 if architecture == "topk" else None)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return sae.Dictionary({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}, cfg)


def oracle(d, x, block):
    """Every figure of `evaluate` in float64 numpy, from the definitions."""
    x, z = x.astype(np.float64), np.asarray(sae.encode(d, x), np.float64)
    x_hat = z @ np.asarray(d.params["W_dec"], np.float64) + np.asarray(d.params["b_dec"], np.float64)
    error, density = np.sum((x - x_hat) ** 2, axis=1), np.mean(z > 0, axis=0)
    means = np.concatenate([np.repeat(x[i : i + block].mean(axis=0)[None], len(x[i : i + block]), 0) for i in range(0, len(x), block)])
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    return {
        "rows": len(x),
        "l0": np.mean(np.sum(z > 0, axis=1)),
        "l1": np.mean(np.sum(np.abs(z), axis=1)),
        "mse": error.mean(),
        "explained_variance": 1 - error.sum() / np.sum((x - x.mean(axis=0)) ** 2),
        "explained_variance_legacy": np.mean(1 - error / np.sum((x - means) ** 2, axis=1)),
        "cossim": np.mean(np.sum(x * x_hat, axis=1) / norm / norm_hat),
        "l2_ratio": np.mean(norm_hat / norm),
        "relative_reconstruction_bias": np.sum(norm_hat**2) / np.sum(x * x_hat),
        "dead_share": np.mean(density == 0),
        "freq_over_1_percent": np.mean(density > 0.01),
        "normalized_freq_over_1_percent": density[density > 0.01].sum() / density.sum(),
        "freq_over_10_percent": np.mean(density > 0.1),
        "normalized_freq_over_10_percent": density[density > 0.1].sum() / density.sum(),
    }


@pytest.mark.parametrize("architecture", ["relu", "topk"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_every_figure_against_numpy_however_the_stream_is_cut(monkeypatch, architecture, offset):
    monkeypatch.setattr(sae.metrics, "BLOCK", 64)
    monkeypatch.setattr(sae.metrics, "LATENTS_BYTES", 4 * 24 * 16)  # pieces of 16 tokens
    x, d = data(300, offset), some_dictionary(architecture)
    expected = oracle(d, x, 64)
    for batches in ([x], [x[:1], x[1:130], x[130:130], x[130:]], np.split(x, 100)):
        found = sae.evaluate(d, batches)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    assert 0 < expected["freq_over_10_percent"] < 1


def test_zero_tokens_and_constant_ones():
    """A token of length 0 has no direction and no ratio of lengths; a block of equal tokens no variance."""
    d = identity(0.5)
    found = sae.evaluate(d, [np.array([[0, 0, 0, 0], [2, 0, 0, 0]], np.float32)])
    assert found["cossim"] == 0.5 and found["l2_ratio"] == 0.5 and found["relative_reconstruction_bias"] == 0.5
    assert found["explained_variance_legacy"] == pytest.approx(1 - (0 + 1) / 2) and found["mse"] == 0.5
    alike = sae.evaluate(d, [np.ones((3, D), np.float32)])
    assert np.isnan(alike["explained_variance"]) and np.isnan(alike["explained_variance_legacy"])


def test_documents_are_summed_apart():
    x, d, lengths = data(100), some_dictionary("relu"), [0, 30, 1, 69, 0]
    whole, found = sae.activation_statistics(d, [x]), sae.activation_statistics(d, np.split(x, 20), lengths)
    np.testing.assert_array_equal(found.documents["tokens"], lengths)
    alone = sae.activation_statistics(d, [x[30:31]])
    assert found.documents["error"][2] == pytest.approx(alone.documents["error"][0], rel=1e-5)
    assert found.figures() == pytest.approx(whole.figures(), rel=1e-6)
    np.testing.assert_array_equal(found.fired_F, whole.fired_F)
    np.testing.assert_allclose(found.mean_D, x.mean(axis=0), rtol=1e-6)
    resampled = found.of_sums({name: sums[[1, 3]].sum() for name, sums in found.documents.items()})
    assert resampled["mse"] == pytest.approx(sae.evaluate(d, [np.delete(x, 30, axis=0)])["mse"], rel=1e-5)
    for wrong, message in (([100, 1], "have 101"), ([99], "stream has more")):
        with pytest.raises(sae.SAEError, match=message.replace("have 101", "sum to 101 tokens, but the stream has 100")):
            sae.activation_statistics(d, [x], wrong)
    with pytest.raises(sae.SAEError, match="last axis of 4"):
        sae.evaluate(d, [x[:, :3]])


def test_token_counts_are_those_of_the_harvest(lm):
    rows = [*ROWS, [], [1]]
    assert sae.token_counts(rows, 16) == [4, 2, 0, 6, 0, 0] and sae.token_counts(rows, 3, 0) == [5, 3, 1, 7, 0, 1]
    for drop in ([], [3, 4], [1, 8]):  # wherever they stand, BOS among them
        for first, context in ((1, 16), (0, 4), (2, 3)):
            how = {"context_size": context, "skip_first": first, "drop_tokens": drop}
            found = [sum(map(len, sae.harvest_activations(*lm, [row], "embed", **how))) for row in rows]
            assert sae.token_counts(rows, **how) == found


@pytest.mark.parametrize("block", [3, 7, 100])
def test_largest_cosines_in_blocks_and_at_once(block):
    w = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    w[4], w[9] = 3 * w[2], 0.0
    unit = w / np.where(np.linalg.norm(w, axis=1, keepdims=True) > 0, np.linalg.norm(w, axis=1, keepdims=True), 1)
    cosines = unit.astype(np.float64) @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    found = sae.max_cosines(w, block=block)
    np.testing.assert_allclose(found, cosines.max(axis=1), atol=1e-6)
    assert found[2] == pytest.approx(1.0) and found[9] == 0.0


def test_geometry_by_hand():
    found = sae.geometry(identity(2.0))
    assert found["average_max_decoder_cosine_sim"] == 0.0 == found["average_max_encoder_cosine_sim"]  # others are at right angles or opposite
    assert found["encoder_decoder_cosine_sim"] == pytest.approx(1.0) and found["decoder_norm"] == pytest.approx(2.0)
    d, seen = some_dictionary("relu"), []
    found = sae.geometry(d, progress=lambda blocks: seen.extend(blocks) or blocks)
    assert found["average_max_decoder_cosine_sim"] == pytest.approx(sae.max_cosines(d.params["W_dec"]).mean()) and seen == [0, 0]
    one = sae.Dictionary({**d.params, "W_enc": d.params["W_enc"][:, :1], "W_dec": d.params["W_dec"][:1]}, d.cfg.replace(d_sae=1))
    assert np.isnan(sae.geometry(one)["average_max_decoder_cosine_sim"])


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


def log_probabilities(lm, row, hook=None, edit=None, drop=()):
    """[T, V] of a row whose tap is edited, except at its first position and at the tokens in `drop`."""
    keep = (np.arange(len(row)) < 1) | np.isin(row, drop)
    edits = {hook: lambda x: jnp.where(keep[None, :, None], x, edit(x))} if hook else None
    logits = np.asarray(models.apply(*lm, np.array([row], np.int32), interventions=edits)[0][0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(lm, hook=None, scale=1.0, edit=None):
    """Mean next-token loss over all rows with the tap multiplied by `scale`, or edited."""
    found = [(log_probabilities(lm, row, hook, edit or (lambda x: scale * x)), row) for row in ROWS]
    total = -sum(logp[t, row[t + 1]] for logp, row in found for t in range(len(row) - 1))
    return total / sum(len(row) - 1 for row in ROWS)


def divergence(lm, hook, edit):
    """Mean KL(clean || edited) of the predicted tokens' distributions."""
    total = 0.0
    for row in ROWS:
        clean, edited = log_probabilities(lm, row)[:-1], log_probabilities(lm, row, hook, edit)[:-1]
        total += np.sum(np.exp(clean) * (clean - edited))
    return total / sum(len(row) - 1 for row in ROWS)


@pytest.mark.parametrize("hook", ["blocks.0.resid_post", "blocks.1.mlp_out"])
def test_ce_recovered_by_hand(lm, hook):
    d = spliced(identity(0.8), hook)
    found = sae.ce_recovered(d, *lm, ROWS, batch_size=3)
    clean, zero, cut = cross_entropy(lm), cross_entropy(lm, hook, 0.0), cross_entropy(lm, hook, 0.8)
    np.testing.assert_allclose([found["ce_clean"], found["ce_zero"], found["ce_sae"]], [clean, zero, cut], rtol=1e-4)
    assert found["ce_recovered"] == pytest.approx((zero - cut) / (zero - clean), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_divergence_and_mean_ablation_by_hand(lm, batch_size):
    hook = "blocks.0.resid_post"
    d, mean = spliced(identity(0.8), hook), np.array([0.3, -0.2, 0.1, 0.5], np.float32)
    found = sae.ce_recovered(d, *lm, ROWS, batch_size=batch_size, mean_D=mean)
    cut, zero, by_mean = (divergence(lm, hook, edit) for edit in (lambda x: 0.8 * x, lambda x: 0 * x, lambda x: 0 * x + mean))
    np.testing.assert_allclose([found["kl_sae"], found["kl_zero"], found["kl_mean"]], [cut, zero, by_mean], rtol=1e-4)
    assert found["kl_recovered"] == pytest.approx((zero - cut) / zero, rel=1e-4)
    assert found["kl_recovered_mean"] == pytest.approx((by_mean - cut) / by_mean, rel=1e-4)
    ce, clean = cross_entropy(lm, hook, edit=lambda x: 0 * x + mean), cross_entropy(lm)
    assert found["ce_mean"] == pytest.approx(ce, rel=1e-4)
    assert found["ce_recovered_mean"] == pytest.approx((ce - found["ce_sae"]) / (ce - clean), rel=1e-3)
    assert "kl_mean" not in sae.ce_recovered(d, *lm, ROWS)


def test_splice_sums_are_those_of_each_document(lm):
    """Also of documents that are cut into pieces, and of those of one token, in batches of their own."""
    d, rows = spliced(identity(0.2), "blocks.0.resid_post"), [[8], *ROWS, [1]]  # far from whole: a divergence that rounding does not reach
    sums = sae.splice_sums(d, *lm, rows, batch_size=1, context_size=4)
    assert sums["predictions"].tolist() == [0, 3, 2, 0, 5, 0] and sums["ce_sae"][0] == 0 == sums["kl_zero"][-1]
    for i in (1, 2, 4):
        alone = sae.splice_sums(d, *lm, [rows[i]], batch_size=2, context_size=4)
        assert {name: values[i] for name, values in sums.items()} == pytest.approx({name: values[0] for name, values in alone.items()}, rel=1e-4)


def test_dropped_tokens_keep_their_activation(lm):
    """As in training: what stands at these ids is no input of the dictionary, wherever they stand."""
    hook, drop = "blocks.0.resid_post", [3, 9]
    d = spliced(identity(0.5), hook)
    found = sae.ce_recovered(d, *lm, ROWS, drop_tokens=drop)
    logps = [log_probabilities(lm, row, hook, lambda x: 0.5 * x, drop) for row in ROWS]
    expected = -sum(logp[t, row[t + 1]] for logp, row in zip(logps, ROWS) for t in range(len(row) - 1)) / sum(len(row) - 1 for row in ROWS)
    assert found["ce_sae"] == pytest.approx(expected, rel=1e-4) and found["ce_sae"] != sae.ce_recovered(d, *lm, ROWS)["ce_sae"]
    everything = sae.ce_recovered(d, *lm, ROWS, drop_tokens=range(11))
    assert everything["ce_sae"] == everything["ce_clean"] == everything["ce_zero"]


def test_ablations_are_taken_over_from_another_dictionary_of_the_tap(lm, monkeypatch):
    """The same figures with two passes over the model in place of four."""
    one, other = (spliced(identity(scale), "blocks.0.resid_post") for scale in (0.8, 0.4))
    how = {"mean_D": np.full(D, 0.2, np.float32), "batch_size": 2}
    first, alone = sae.splice_sums(one, *lm, ROWS, **how), sae.splice_sums(other, *lm, ROWS, **how)
    asked, plain = [], sae.splice.splice_rows
    monkeypatch.setattr(sae.splice, "splice_rows", lambda *given, **named: asked.append((given[-1], named["zero"])) or plain(*given, **named))
    found = sae.splice_sums(other, *lm, ROWS, **how, ablations=first)
    assert asked == [(None, False)] * 2 and found.keys() == alone.keys()
    for name, values in alone.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    without = sae.splice_sums(other, *lm, ROWS, ablations={name: v for name, v in first.items() if "mean" not in name})
    assert "ce_mean" not in without and asked[-1] == (None, False)
    added = sae.splice_sums(other, *lm, ROWS, **how, ablations={name: v for name, v in first.items() if "mean" not in name})
    assert added["ce_mean"] == pytest.approx(alone["ce_mean"], rel=1e-5) and asked[-1][0] is not None
    with pytest.raises(sae.SAEError, match="ablations are of 4 documents, but there are 2"):
        sae.splice_sums(other, *lm, ROWS[:2], **how, ablations=first)


def test_ce_recovered_ends(lm):
    assert sae.ce_recovered(spliced(identity(1.0), "blocks.0.resid_post"), *lm, ROWS)["ce_recovered"] == pytest.approx(1.0, abs=1e-4)
    assert sae.ce_recovered(spliced(identity(0.0), "blocks.0.resid_post"), *lm, ROWS)["ce_recovered"] == pytest.approx(0.0, abs=1e-4)


def test_first_positions_count_on_request(lm):
    d = spliced(identity(0.5), "blocks.0.resid_post")
    assert sae.ce_recovered(d, *lm, ROWS)["ce_sae"] != sae.ce_recovered(d, *lm, ROWS, skip_first=0)["ce_sae"]


def test_evaluate_adds_the_model_part(lm):
    d = spliced(identity(0.9), "blocks.0.resid_post")
    acts = list(sae.harvest_activations(*lm, ROWS, "blocks.0.resid_post"))
    found = sae.evaluate(d, acts, lm=(*lm, ROWS))
    assert found["ce_recovered"] == sae.ce_recovered(d, *lm, ROWS)["ce_recovered"] and found["explained_variance"] > 0.5
    by_mean = sae.ce_recovered(d, *lm, ROWS, mean_D=np.concatenate(acts).mean(axis=0))
    assert found["kl_recovered_mean"] == pytest.approx(by_mean["kl_recovered_mean"], rel=1e-4)


def test_ce_mistakes(lm):
    with pytest.raises(sae.SAEError, match="names no hook_name"):
        sae.ce_recovered(identity(), *lm, ROWS)
    with pytest.raises(sae.SAEError, match="nothing is predicted"):
        sae.ce_recovered(spliced(identity(), "embed"), *lm, [[3]])


def test_a_transcoder_is_measured_by_what_it_writes(lm):
    """Rows hold [x | y]; the figures are of y, and what is spliced in stands at the output's tap."""
    cfg, params = lm
    reads, writes = "blocks.0.resid_mid", "blocks.0.mlp_out"
    d_cfg = sae.SAEConfig(d_in=cfg.d_model, d_sae=32, k=6, d_out=cfg.d_model, skip=True, hook_name=reads, hook_name_out=writes)
    d = sae.init(d_cfg, jax.random.key(0))
    d = d.replace(params=d.params | {"b_dec": jnp.full(cfg.d_model, 0.1), "W_skip": 0.3 * jnp.eye(cfg.d_model)})
    rows = [[1, 5, 6, 7, 8], [1, 9, 10], [3, 4, 5, 6]]
    both = np.concatenate(list(sae.harvest_activations(cfg, params, rows, (reads, writes))))
    x, y = both[:, : cfg.d_model], both[:, cfg.d_model :]
    found = sae.evaluate(d, [both], lm=(cfg, params, rows))
    y_hat = np.asarray(sae.reconstruct(d, x))
    expected = 1 - np.square(y - y_hat).sum() / np.square(y - y.mean(0)).sum()
    assert found["explained_variance"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    nll, count = {"clean": 0.0, "sae": 0.0}, 0
    for row in rows:
        tokens, keep = np.array([row], np.int32), np.arange(len(row)) < 1
        clean, taps = models.apply(cfg, params, tokens, taps=(reads, writes))
        new = np.where(keep[None, :, None], taps[writes], sae.reconstruct(d, taps[reads]))
        edited, _ = models.apply(cfg, params, tokens, interventions={writes: lambda h, new=new: jnp.asarray(new)})
        for name, logits in (("clean", clean), ("sae", edited)):
            logp = np.asarray(jax.nn.log_softmax(logits[0, :-1]))
            nll[name] -= logp[np.arange(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    assert found["ce_clean"] == pytest.approx(nll["clean"] / count, rel=1e-5) and found["ce_sae"] == pytest.approx(nll["sae"] / count, rel=1e-5)
    assert found["ce_sae"] != pytest.approx(found["ce_clean"], rel=1e-4)
    with pytest.raises(sae.SAEError, match="names no hook_name_out"):
        sae.ce_recovered(d.replace(cfg=d.cfg.replace(hook_name_out=None)), cfg, params, rows)
