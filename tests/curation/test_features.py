"""Pooled features: equal to a plain numpy reference, whatever the shards, batches, devices, kills and lengths."""

import jax
import numpy as np
import pytest

import models
import sae
from jaxrl_llm.curation import streaming
from jaxrl_llm.curation.features import DENSE, POOLINGS, extract_features, hook_width, middle_hook, random_dictionary, tree_fingerprint
from jaxrl_llm.errors import UserError

HOOK = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def model():
    cfg = models.ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        }
    )
    return cfg, models.init(cfg, jax.random.key(0))


@pytest.fixture(scope="module")
def dictionaries():
    topk = sae.init(sae.SAEConfig(d_in=16, d_sae=48, k=4, hook_name=HOOK), jax.random.key(1))
    relu = sae.init(sae.SAEConfig(architecture="relu", d_in=16, d_sae=20, hook_name=HOOK), jax.random.key(2))
    return {"topk": topk, "relu": relu}


def with_config(d, **changes):
    return d.replace(cfg=d.cfg.replace(**changes))


def rows_of(lengths, seed=0, bos=True):
    rng = np.random.default_rng(seed)
    return [[1] * bos + rng.integers(3, 40, n).tolist() for n in lengths]


def reference(model, dictionaries, rows, pooling):
    """One row at a time, no padding, no fusing."""
    cfg, params = model
    out = {name: [] for name in (*dictionaries, *DENSE)}
    for row in rows:
        padded = np.array([row + [0] * (32 - len(row))])
        x = np.asarray(models.apply(cfg, params, padded, lengths=np.array([len(row)]), taps=(HOOK,))[1][HOOK])[0]
        x = x[int(row[0] == cfg.bos_token_id) : len(row)]
        for name, d in dictionaries.items():
            z = np.asarray(sae.encode(d, x))
            pooled = {"max": z.max(0), "mean": z.mean(0), "last": z[-1], "max_log1p": np.log1p(z.max(0))}[pooling]
            out[name].append(pooled)
        for name, value in zip(DENSE, (x.mean(0), x.max(0), x[-1]), strict=True):
            out[name].append(value)
    return {name: np.array(v) for name, v in out.items()}


def assert_equal(results, expected, names):
    for name in names:
        got = results.csr(name).toarray() if f"{name}.data" in results.shards[0]() else results.dense(name)
        np.testing.assert_allclose(got, expected[name], atol=2e-5, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_the_plain_reference(model, dictionaries, pooling):
    rows = rows_of([1, 3, 9, 30, 5, 15, 31])
    results = extract_features(*model, dictionaries, rows, pooling=pooling, dense=DENSE, batch_tokens=64, shard_rows=3)
    assert_equal(results, reference(model, dictionaries, rows, pooling), (*dictionaries, *DENSE))
    assert results.lengths.tolist() == [1, 3, 9, 30, 5, 15, 31] and not results.dropped.any()


def test_rows_without_a_beginning_token_count_from_their_first(model, dictionaries):
    rows = rows_of([4, 7], bos=False)
    results = extract_features(*model, dictionaries, rows, dense=DENSE)
    assert_equal(results, reference(model, dictionaries, rows, "max_log1p"), (*dictionaries, *DENSE))
    assert results.lengths.tolist() == [4, 7]


def test_hook_context_and_pooling_change_the_result(model, dictionaries):
    rows, one = rows_of([12, 9]), {"topk": dictionaries["topk"]}
    base = extract_features(*model, one, rows).csr("topk").toarray()
    moved = {"topk": with_config(one["topk"], hook_name="blocks.0.resid_post")}
    for dictionaries, change in ((moved, {}), (one, {"context": 8}), (one, {"pooling": "mean"})):
        assert not np.allclose(extract_features(*model, dictionaries, rows, **change).csr("topk").toarray(), base), change
    assert middle_hook(model[0]) == HOOK
    unnamed = {"topk": with_config(one["topk"], hook_name=None)}
    np.testing.assert_array_equal(extract_features(*model, unnamed, rows, hook=HOOK).csr("topk").toarray(), base)


@pytest.mark.parametrize("pooling, merge", [("max", "max"), ("mean", "mean"), ("last", "last")])
def test_windows_cover_a_row_longer_than_the_context(model, dictionaries, pooling, merge):
    (row,) = rows_of([25])
    windows = [[1, *row[1 + s : 1 + s + 9]] for s in (0, 9, 18)]
    parts = reference(model, dictionaries, windows, pooling)
    results = extract_features(*model, dictionaries, [row], pooling=pooling, dense=DENSE, context=10)
    counts = np.array([9, 9, 7])[:, None] / 25
    combine = {"max": lambda p: p.max(0), "mean": lambda p: (p * counts).sum(0), "last": lambda p: p[-1]}
    expected = {name: combine[merge](p)[None] for name, p in parts.items() if name in dictionaries}
    expected |= {name: combine[name.removeprefix("dense_")](parts[name])[None] for name in DENSE}
    assert_equal(results, expected, expected)
    assert results.counts["windowed"] == 1 and results.lengths.tolist() == [25]


def test_truncate_drop_error_and_empty_rows(model, dictionaries):
    rows = [*rows_of([25, 5]), [1], []]
    options = {"context": 10, "dense": ("dense_mean",)}
    kept = extract_features(*model, dictionaries, rows, overflow="truncate", **options)
    expected = reference(model, dictionaries, [[1, *rows[0][-9:]], rows[1]], "max_log1p")
    np.testing.assert_allclose(kept.csr("topk").toarray()[:2], expected["topk"], atol=2e-5, rtol=2e-4)
    assert dict(kept.counts) == {"windowed": 0, "truncated": 1, "dropped": 0, "empty": 2}
    assert kept.dropped.tolist() == [False, False, True, True] and kept.csr("topk")[2:].nnz == 0
    dropped = extract_features(*model, dictionaries, rows, overflow="drop", **options)
    assert dropped.dropped.tolist() == [True, False, True, True] and dropped.counts["dropped"] == 1
    assert dropped.csr("relu")[0].nnz == 0 and not dropped.dense("dense_mean")[0].any()
    with pytest.raises(UserError, match="row 0 has 26 tokens"):
        extract_features(*model, dictionaries, rows, overflow="error", **options)


def test_a_killed_run_goes_on_and_gives_the_same(model, dictionaries, tmp_path, monkeypatch):
    rows = rows_of([5, 9, 3, 12, 7, 2, 11])
    whole = extract_features(*model, dictionaries, rows, shard_rows=2)
    run, seen = streaming._run_shard, []

    def killed(program, pieces, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(pieces))
        return run(program, pieces, *rest)

    monkeypatch.setattr(streaming, "_run_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_features(*model, dictionaries, rows, shard_rows=2, folder=tmp_path)
    again = []
    monkeypatch.setattr(streaming, "_run_shard", lambda *a: again.append(1) or run(*a))
    (tmp_path / ".shard-00009.npz.1.part").write_bytes(b"half a file of the killed run")
    resumed = extract_features(*model, dictionaries, rows, shard_rows=2, folder=tmp_path)
    assert len(again) == 2, "the two finished shards are not run again"
    for name in dictionaries:
        assert (resumed.csr(name) != whole.csr(name)).nnz == 0
    assert (resumed.dense("dense_mean") == whole.dense("dense_mean")).all()
    # Other rows, another SAE: nothing stale is used, and nothing stale stays.
    changed = {**dictionaries, "topk": random_dictionary(dictionaries["topk"], seed=5)}
    other = extract_features(*model, changed, rows, shard_rows=2, folder=tmp_path)
    assert (other.csr("topk") != whole.csr("topk")).nnz > 0 and len(list(tmp_path.glob("shard-*"))) == 4


def test_rows_and_blocks_agree(model, dictionaries, tmp_path):
    rows = rows_of([*range(1, 15), 3, 7, 1, 9, 2])
    blocks = extract_features(*model, dictionaries, rows, shard_rows=4, folder=tmp_path).blocks("topk")
    whole = np.concatenate([b.toarray() for b in blocks.blocks()])
    pick = np.array([17, 0, 5, 5, 12])
    assert blocks.shape == whole.shape == (19, 48)
    assert (blocks.rows(pick).toarray() == whole[pick]).all() and blocks.rows(np.array([], int)).shape == (0, 48)


def test_many_devices_give_what_one_gives(run_python):
    code = """
import jax, numpy as np, models, sae
from models.sharding import make_mesh, param_shardings
from jaxrl_llm.curation.features import extract_features
hf = dict(model_type="llama", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
          max_position_embeddings=32, bos_token_id=1, eos_token_id=2)
cfg = models.ModelConfig.from_hf(hf)
params = models.init(cfg, jax.random.key(0))
d = {"sae": sae.init(sae.SAEConfig(d_in=16, d_sae=48, k=4, hook_name="blocks.1.resid_post"), jax.random.key(1))}
rng = np.random.default_rng(0)
rows = [[1, *rng.integers(3, 40, n).tolist()] for n in rng.integers(1, 15, 37)]
one = extract_features(cfg, params, d, rows, batch_tokens=64)
mesh = make_mesh({"data": 2, "fsdp": 2})
sharded = jax.device_put(params, param_shardings(cfg, mesh))
many = extract_features(cfg, sharded, d, rows, batch_tokens=64, mesh=mesh)
assert len(jax.devices()) == 4
np.testing.assert_allclose(many.csr("sae").toarray(), one.csr("sae").toarray(), atol=2e-5)
np.testing.assert_allclose(many.dense("dense_mean"), one.dense("dense_mean"), atol=2e-5)
print("equal")
"""
    assert run_python(code, devices=4, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}).strip().endswith("equal")


def test_padded_widths_waste_at_most_a_third():
    widths = [streaming.padded_width(n, 512) for n in range(1, 513)]
    assert set(widths) == {16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512}
    assert all(n <= w for n, w in enumerate(widths, 1)) and all(n >= 2 * w / 3 for n, w in enumerate(widths, 1) if n > 16)
    assert streaming.padded_width(30, 31) == 31


def test_fingerprint_sees_values_shapes_and_names():
    tree = {"a": np.arange(10.0), "b": np.ones((2, 3), np.float32)}
    changed = [
        {**tree, "a": np.arange(10.0) + (np.arange(10) == 7)},
        {**tree, "b": np.ones((3, 2), np.float32)},
        {"c": tree["a"], "b": tree["b"]},
    ]
    prints = [tree_fingerprint(t) for t in (tree, *changed)]
    assert len(set(prints)) == 4 and tree_fingerprint({k: v.copy() for k, v in tree.items()}) == prints[0]


def test_mistakes_are_named(model, dictionaries):
    rows = rows_of([3])
    with pytest.raises(UserError, match="no pooling 'median'"):
        extract_features(*model, dictionaries, rows, pooling="median")
    with pytest.raises(UserError, match="no dense features 'mean'"):
        extract_features(*model, dictionaries, rows, dense=("mean",))
    with pytest.raises(UserError, match="overflow 'cut'"):
        extract_features(*model, dictionaries, rows, overflow="cut")


def test_an_sae_that_does_not_fit_the_model_is_refused(model, dictionaries):
    rows, topk, relu = rows_of([3]), dictionaries["topk"], dictionaries["relu"]
    wide = sae.init(sae.SAEConfig(d_in=24, d_sae=48, k=4, hook_name=HOOK, model_name="org/wide"), jax.random.key(1))
    with pytest.raises(UserError, match=r"wide reads activations of width 24, this model's blocks.1.resid_post has 16.*\(org/wide\)"):
        extract_features(*model, {"wide": wide}, rows)
    with pytest.raises(UserError, match=r"topk reads activations of width 16, this model's blocks.1.mlp_act has 24"):
        extract_features(*model, {"topk": with_config(topk, hook_name="blocks.1.mlp_act")}, rows)
    with pytest.raises(UserError, match=r"different taps \(topk blocks.1.resid_post, relu blocks.0.resid_post\)"):
        extract_features(*model, {"topk": topk, "relu": with_config(relu, hook_name="blocks.0.resid_post")}, rows)
    with pytest.raises(UserError, match=r"hook is blocks.0.resid_post, but topk was trained on blocks.1.resid_post.*hook_name"):
        extract_features(*model, dictionaries, rows, hook="blocks.0.resid_post")
    with pytest.raises(UserError, match=r"relu does not record the tap that it was trained on.*such as blocks.1.resid_post"):
        extract_features(*model, {"topk": topk, "relu": with_config(relu, hook_name=None)}, rows)
    with pytest.raises(UserError, match="blocks.1.attn_probs is no vector a token"):
        extract_features(*model, {"topk": with_config(topk, hook_name="blocks.1.attn_probs")}, rows)
    with pytest.raises(models.ModelError, match="unknown tap 'blocks.7.resid_post'"):
        extract_features(*model, {"topk": with_config(topk, hook_name="blocks.7.resid_post")}, rows)


def test_the_width_of_each_tap():
    dense = models.ModelConfig(d_model=16, d_ff=24, n_layers=2)
    moe = models.ModelConfig(d_model=16, d_ff=24, n_layers=2, mlp="experts", n_experts=6, experts_per_token=2)
    assert [hook_width(dense, f"blocks.1.{kind}") for kind in ("resid_post", "mlp_pre", "mlp_act", "mlp_out")] == [16, 24, 24, 16]
    assert [hook_width(moe, f"blocks.1.{kind}") for kind in ("resid_post", "router_logits", "mlp_out")] == [16, 6, 16]
    wide = models.ModelConfig(d_model=16, d_ff=24, n_layers=2, head_dim=12)
    assert [hook_width(wide, f"blocks.1.{kind}") for kind in ("attn_z", "mlp_normalized", "mlp_in")] == [12 * wide.n_heads, 16, 16]
    with pytest.raises(models.ModelError, match="unknown tap 'blocks.1.mlp_act'"):
        hook_width(moe, "blocks.1.mlp_act")


def test_a_tap_of_another_width_has_its_own(model):
    """The dense features too are as wide as the tap, which inside an MLP is not the model's width."""
    d = sae.init(sae.SAEConfig(d_in=24, d_sae=48, k=4, hook_name="blocks.1.mlp_act"), jax.random.key(1))
    found = extract_features(*model, {"sae": d}, rows_of([3, 9]))
    assert found.widths == {"sae": 48, "dense_mean": 24, "dense_max": 24} and found.dense("dense_mean").shape == (2, 24)
    alone = extract_features(*model, {}, rows_of([3, 9]))  # without an SAE the middle block's residual
    assert alone.dense("dense_mean").shape == (2, 16)


def test_an_sae_of_another_model_is_used_and_told_once(model, dictionaries, capsys, tmp_path):
    rows, d = rows_of([3]), {"sae": with_config(dictionaries["topk"], model_name="org/base")}
    for _ in range(2):
        extract_features(*model, d, rows, model_name="org/tuned@v2")
    assert capsys.readouterr().err.splitlines() == [
        "warning: the SAE was trained on org/base, the model here is org/tuned@v2: its latents are used as they are"
    ]
    for same in ("org/base", "copies/base", "org/base@v2", None):
        extract_features(*model, d, rows, model_name=same)
    assert capsys.readouterr().err == ""
    a, b = tmp_path / "a" / "model", tmp_path / "b" / "model"  # two folders of one name are two models
    a.mkdir(parents=True)
    b.mkdir(parents=True)
    extract_features(*model, {"sae": with_config(d["sae"], model_name=str(a))}, rows, model_name=str(b))
    assert "warning" in capsys.readouterr().err


def test_the_untrained_control_keeps_the_centre_and_follows_its_seed(dictionaries):
    like = dictionaries["topk"].replace(params=dictionaries["topk"].params | {"b_dec": dictionaries["topk"].params["b_dec"] + 1})
    one, two = random_dictionary(like, 5), random_dictionary(like, 6)
    assert one.cfg == like.cfg and (one.params["b_dec"] == like.params["b_dec"]).all()
    assert (one.params["W_enc"] != two.params["W_enc"]).any() and (one.params["W_enc"] != like.params["W_enc"]).any()
