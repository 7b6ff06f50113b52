"""What latents fire on, against the whole codes held in memory; nothing depends on how texts are cut into batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sae
from sae.feature_data import CollectConfig, collect, readout
from sae.feature_stats import CoFiring, Histogram, Kept, peaks, priorities
from sae.harvest import tap

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOOK = "blocks.0.resid_post"
CFG = models.ModelConfig(
    family="llama", vocab_size=40, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
    tie_embeddings=True, max_position=16, bos_token_id=1, eos_token_ids=(), initializer_range=0.3,
)  # fmt: skip
RNG = np.random.default_rng(0)
ROWS = [[1, *RNG.integers(2, 40, n).tolist()] for n in RNG.integers(1, 30, 23)]
SMALL = dict(top=3, sampled=2, random=5, before=3, after=2, related=4, batch_rows=4)


@pytest.fixture(scope="module")
def params():
    return models.init(CFG, jax.random.key(0))


def dictionary(architecture="topk"):
    d = sae.init(sae.SAEConfig(architecture, 16, 30, 4 if architecture == "topk" else None, hook_name=HOOK), jax.random.key(1))
    return d.replace(params=d.params | {"b_enc": jnp.full(30, -0.1) - (jnp.arange(30) % 7 == 0) * 100.0})  # some are dead


def gather(params, d, **changes):
    unembed = models.unembed_matrix(CFG, params)
    return collect(CFG, params, d, ROWS, CollectConfig(**SMALL | changes), unembed_DV=unembed)


@pytest.fixture(scope="module", params=["topk", "relu"])
def world(request, params):
    """(dictionary, its whole codes: a list of [T, F] for each piece of text with NaN where a token does not count)."""
    d, codes = dictionary(request.param), []
    for row in ROWS:
        for start in range(0, len(row), 16):
            piece = np.array([row[start : start + 16]])
            z = np.array(sae.encode(d, tap(CFG, params, piece, np.array([piece.shape[1]]), (HOOK,)))[0])
            z[0] = np.nan  # of every piece, with BOS or without
            codes.append(z)
    return d, codes


def test_statistics_are_those_of_the_whole_codes(world, params):
    d, codes = world
    whole = np.concatenate(codes)
    whole = whole[~np.isnan(whole[:, 0])]
    found = gather(params, d)
    alive = np.flatnonzero((whole > 0).any(0))
    assert [f["id"] for f in found["features"]] == alive.tolist() and found["alive"] == len(alive) < 30
    assert (found["tokens"], found["texts"]) == (len(whole), len(codes))
    for record in found["features"]:
        z = whole[:, record["id"]]
        fired = z[z > 0]
        assert record["count"] == len(fired) and record["density"] == len(fired) / len(whole)
        np.testing.assert_allclose([record["mean"], record["max"]], [fired.mean(), fired.max()], rtol=1e-5)
        width, counts = record["histogram"]["width"], record["histogram"]["counts"]
        edges = np.arange(len(counts) + 1) * width
        assert sum(counts) == len(fired) and edges[-2] <= fired.max() <= edges[-1] <= 2 * fired.max() + width
        assert np.abs(np.histogram(fired, edges)[0] - counts).sum() <= 2  # a value on an edge may fall to either side
        on = whole > 0
        for other, jaccard, phi in record["together"]:
            np.testing.assert_allclose(jaccard, (on[:, other] & on[:, record["id"]]).sum() / (on[:, other] | on[:, record["id"]]).sum())
            np.testing.assert_allclose(phi, np.corrcoef(on[:, other], on[:, record["id"]])[0, 1], atol=1e-6)
        best = [(on[:, f] & on[:, record["id"]]).sum() / max((on[:, f] | on[:, record["id"]]).sum(), 1) for f in alive if f != record["id"]]
        np.testing.assert_allclose([j for _, j, _ in record["together"]], [b for b in sorted(best, reverse=True)[:4] if b > 0])


def test_contexts_are_where_a_latent_fires_most_and_their_activations(world, params):
    d, codes = world
    found = gather(params, d)
    for record in found["features"]:
        most = np.array([np.nanmax(z[:, record["id"]], initial=0) for z in codes])
        tops = [c for c in record["contexts"] if c["kind"] == "top"]
        rest = [c for c in record["contexts"] if c["kind"] == "sampled"]
        assert len(tops) == min(3, (most > 0).sum()) and len(rest) == min(2, max((most > 0).sum() - 3, 0))
        assert len({c["text"] for c in record["contexts"]}) == len(record["contexts"])
        strengths = [most[c["text"]] for c in tops]
        np.testing.assert_allclose(strengths, np.sort(most)[::-1][: len(tops)], rtol=1e-5)
        for context in record["contexts"]:
            z = codes[context["text"]][:, record["id"]]
            first, size, peak = context["first"], len(context["tokens"]), context["peak"]
            assert 0 < size <= 6 and first + peak == np.nanargmax(z) and (peak == 3 or first == 0)
            shown = np.zeros(size)
            for place, value in context["fires"]:
                shown[place] = value
            np.testing.assert_allclose(shown, np.nan_to_num(z[first : first + size]), atol=1e-5)
    assert len(found["random"]) == 5 and len({c["text"] for c in found["random"]}) == 5
    for context in found["random"]:
        window = np.nan_to_num(codes[context["text"]][context["first"] : context["first"] + len(context["tokens"])])
        assert context["fired"] == np.flatnonzero((window > 0).any(0)).tolist()
    texts = [row[i : i + 16] for row in ROWS for i in range(0, len(row), 16)]
    context = found["features"][0]["contexts"][0]
    assert context["tokens"] == texts[context["text"]][context["first"] :][: len(context["tokens"])]


def test_relations_of_the_decoder(world, params):
    d, _ = world
    record = gather(params, d)["features"][3]
    rows = np.asarray(d.params["W_dec"])
    cosine = rows @ rows[record["id"]] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[record["id"]])
    order = [f for f in np.argsort(-cosine) if f != record["id"]][:4]
    assert [f for f, _ in record["near"]] == order
    np.testing.assert_allclose([c for _, c in record["near"]], cosine[order], atol=1e-5)
    logits = rows[record["id"]] @ np.asarray(models.unembed_matrix(CFG, params))
    assert [t for t, _ in record["logits"]["raised"]] == np.argsort(-logits)[:10].tolist()
    np.testing.assert_allclose([v for _, v in record["logits"]["lowered"]], np.sort(logits)[:10], atol=1e-5)


def same(one, other):
    """Equal up to rounding, of nested records."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == pytest.approx(other, abs=1e-5) if isinstance(one, float) else one == other


def test_batches_and_other_features_change_nothing(params):
    d = dictionary()
    whole = gather(params, d)
    assert same(whole, gather(params, d, batch_rows=23))
    ids = tuple(f["id"] for f in whole["features"][2:5])
    some = gather(params, d, features=ids[::-1])
    drop = lambda records: [{k: v for k, v in f.items() if k != "together"} for f in records]  # noqa: E731
    assert same(drop(some["features"]), drop(whole["features"][2:5])) and some["alive"] is None
    few = gather(params, d, features=6)
    assert len(few["features"]) == 6 and few["alive"] == whole["alive"]


# Another value of each field, and what it must change.
CHANGES = {
    "features": 5, "top": 2, "sampled": 1, "random": 2, "before": 1, "after": 0, "bins": 8, "related": 2, "context_size": 8,
    "skip_first": 0, "drop_tokens": (5, 6), "seed": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_what_is_found(params, field):
    d = dictionary()
    base = {"sampled": 4, "features": 6} if field == "seed" else {}
    assert not same(gather(params, d, **base), gather(params, d, **base | {field: CHANGES[field]}))
    assert set(CHANGES) | {"batch_rows"} == {f.name for f in CollectConfig.__dataclass_fields__.values()}


def test_no_logits_where_the_decoder_writes_elsewhere(params):
    d = sae.init(sae.SAEConfig("topk", 24, 30, 4, hook_name="blocks.0.mlp_pre"), jax.random.key(1))
    assert gather(params, d)["features"][0]["logits"] is None


def test_what_is_written_before_an_output_projection_is_read_behind_it(params):
    unembed = np.asarray(models.unembed_matrix(CFG, params))
    for kind, name, width in (("attn_z", "o", CFG.n_heads * CFG.head_dim), ("mlp_act", "down", CFG.d_ff)):
        d = sae.init(sae.SAEConfig("topk", width, 30, 4, hook_name=f"blocks.0.{kind}"), jax.random.key(1))
        expected = np.asarray(d.params["W_dec"]) @ np.asarray(params["blocks"][name][0]).reshape(width, -1) @ unembed
        np.testing.assert_allclose(np.asarray(d.params["W_dec"]) @ readout(CFG, params, d, unembed), expected, atol=1e-5)
        assert readout(dataclasses.replace(CFG, block="pre_post"), params, d, unembed) is None
    feature = gather(params, d)["features"][0]
    token, logit = feature["logits"]["raised"][0]
    assert token == expected[feature["id"]].argmax() and logit == pytest.approx(expected[feature["id"]].max(), rel=1e-5)


def test_progress_is_told_by_name(params):
    seen = []
    collect(CFG, params, dictionary(), ROWS, CollectConfig(**SMALL), progress=lambda items, name: seen.append(name) or items)
    assert seen == ["counting", "statistics", "contexts"]


def test_the_histogram_does_not_depend_on_the_order():
    values = np.abs(np.random.default_rng(0).standard_cauchy(400)).astype(np.float32)
    slots = np.arange(400) % 3
    one, other = Histogram(3, 16), Histogram(3, 16)
    one.add(slots, values)
    for i in np.argsort(values):
        other.add(slots[i : i + 1], values[i : i + 1])
    np.testing.assert_array_equal(one.counts_NB, other.counts_NB)
    np.testing.assert_array_equal(one.range_N, other.range_N)
    assert one.counts_NB.sum(1).tolist() == [134, 133, 133]
    assert Histogram(1).of(0) == {"width": 2.0**-26, "counts": []}


def test_co_firing_by_hand():
    """Six tokens; latent 0 fires at 0, 1, 2, latent 1 at 1, 2, 3, latent 2 at 5."""
    together = CoFiring(3)
    together.add(np.array([0, 1, 1, 2, 2]), np.array([0, 0, 1, 0, 1]), 3)
    together.add(np.array([0, 2]), np.array([1, 2]), 3)
    assert together.of(0, 5) == [(1, pytest.approx(2 / 4), pytest.approx((6 * 2 - 9) / 9))]
    assert together.of(2, 5) == []


def test_kept_contexts_and_peaks_by_hand():
    slots, texts, places, values = peaks(*map(np.array, ([1, 0, 1, 1], [5, 5, 5, 6], [2, 0, 4, 1], [3.0, 1.0, 3.0, 2.0])))
    assert list(zip(slots, texts, places, values)) == [(0, 5, 0, 1.0), (1, 5, 2, 3.0), (1, 6, 1, 2.0)]
    kept = Kept(2, 2)
    kept.add(slots, -values, values, texts, places)
    kept.add(np.array([1, 1]), np.array([-2.0, -9.0]), np.array([2.0, 9.0]), np.array([4, 7]), np.array([0, 3]))
    assert kept.of(1) == [(9.0, 7, 3), (3.0, 5, 2)] and kept.of(0) == [(1.0, 5, 0)]
    u = priorities(0, np.arange(5000), np.full(5000, 3))
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and len(np.unique(u)) == 5000
    assert (priorities(1, np.arange(5), np.arange(5)) != priorities(0, np.arange(5), np.arange(5))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, d: gather(p, d, features=(30,)), "no latent 30"),
        (lambda p, d: gather(p, d, features=(3, 3)), "named twice"),
        (lambda p, d: gather(p, d, features=0), "0 features; give 1 to 8192"),
        (lambda p, d: gather(p, d, top=0), "top is 0; give 1"),
        (lambda p, d: gather(p, d, bins=3), "even number"),
        (lambda p, d: gather(p, d.replace(cfg=d.cfg.replace(hook_name=None))), "names no hook_name"),
        (lambda p, d: gather(p, d.replace(params=d.params | {"b_enc": jnp.full(30, -1e4)})), "no latent fires"),
        (lambda p, d: collect(CFG, p, d, [[]]), "there is no text"),
    ],
)
def test_mistakes_are_named(params, call, message):
    with pytest.raises(sae.SAEError, match=message):
        call(params, dictionary())
