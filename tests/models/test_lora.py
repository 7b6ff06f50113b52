"""Adapters: the arithmetic by hand, gradients to A and B alone, PEFT's folders both ways, a mesh, and what is refused."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest
from jax.test_util import check_grads

import models
from models import ModelError, lora
from models.adapted import Adapted, merged, side_by_side
from models.layers import dense

CONFIG = lora.LoraConfig(rank=3, alpha=6.0)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, cfg, params) of a small Qwen3, whose head_dim is not d_model / n_heads and whose queries are more than its keys."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    cases.write_checkpoint(folder, cases.CASES["qwen3"], 0)
    return folder, *models.load(folder)


def drawn(cfg, config=CONFIG, seed=0):
    """An adapter whose B is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, x.dtype), lora.init_lora(cfg, config, jax.random.key(0)))


def tokens(cfg, rows=2, length=9):
    return np.random.default_rng(3).integers(3, cfg.vocab_size, (rows, length)).astype(np.int32)


def test_merge_is_w_plus_the_scaled_product(base):
    """By numpy loops, for a matrix with heads on its output, one with heads on its input and a plain one."""
    _, cfg, params = base
    adapter = drawn(cfg)
    merged = lora.merge(params, adapter, CONFIG.scale)
    for leaf, rule in (("q", "dr,rnh->dnh"), ("o", "nhr,rd->nhd"), ("down", "fr,rd->fd")):
        pair, weight = adapter["blocks"][leaf], np.asarray(params["blocks"][leaf])
        for layer in range(cfg.n_layers):
            expected = weight[layer] + 2.0 * np.einsum(rule, np.asarray(pair["a"][layer], np.float64), np.asarray(pair["b"][layer], np.float64))
            np.testing.assert_allclose(merged["blocks"][leaf][layer], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["blocks"]["attn_norm"], params["blocks"]["attn_norm"])
    assert params["blocks"]["q"] is base[2]["blocks"]["q"]


def test_a_fresh_adapter_changes_nothing_and_learns_through_b(base):
    _, cfg, params = base
    adapter = lora.init_lora(cfg, CONFIG, jax.random.key(1))
    loss = lambda a: models.apply(cfg, lora.adapt(params, a, CONFIG.scale), tokens(cfg))[0].std()  # noqa: E731
    np.testing.assert_array_equal(models.apply(cfg, lora.adapt(params, adapter, 2.0), tokens(cfg))[0], models.apply(cfg, params, tokens(cfg))[0])
    grads = jax.grad(loss)(adapter)["blocks"]
    for leaf, pair in grads.items():
        assert (np.asarray(pair["a"]) == 0).all() and (np.abs(np.asarray(pair["b"])).max() > 0), leaf
    bound = cfg.d_model**-0.5
    a = np.asarray(adapter["blocks"]["q"]["a"])
    assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_adapted_parameters_run_as_merged_ones_do(base):
    """Logits of the scan; tokens and log-probabilities of the sampler, which joins queries, keys and values."""
    _, cfg, params = base
    adapter = drawn(cfg)
    adapted, plain = lora.adapt(params, adapter, 2.0), lora.merge(params, adapter, 2.0)
    jax.tree.map(np.testing.assert_array_equal, lora.adapter_of(adapted), adapter)
    assert adapted["blocks"]["q"].base is params["blocks"]["q"] and lora.adapter_of(plain) == {}
    ours, theirs = (models.apply(cfg, p, tokens(cfg))[0] for p in (adapted, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(jnp.abs(theirs).max()))
    how = dict(max_new_tokens=4, seed=1, stop_tokens=())
    ours, theirs = (models.generate(cfg, p, tokens(cfg).tolist(), **how) for p in (adapted, plain))
    assert ours.completions() == theirs.completions()
    np.testing.assert_allclose(ours.logps_NT, theirs.logps_NT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaves", ["q", "kv", "qkv", ""])
def test_kernels_side_by_side_keep_their_adapters(leaves):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernels = [Adapted(array(4, n, 3), array(4, 2), array(2, n, 3), 0.5) for n in (4, 2, 2)]
    kernels = [kernel if leaf in leaves else kernel.base for leaf, kernel in zip("qkv", kernels, strict=True)]
    joined = side_by_side(kernels)
    assert isinstance(joined, Adapted) == bool(leaves)
    np.testing.assert_allclose(merged(joined), np.concatenate([merged(kernel) for kernel in kernels], axis=1), rtol=1e-5, atol=1e-6)
    x = array(2, 5, 4)
    expected = np.einsum("btd,dnh->btnh", x, merged(joined))
    np.testing.assert_allclose(dense("BTD,DNH->BTNH", x, joined), expected, rtol=1e-5, atol=1e-5)
    assert dense("BTD,DNH->BTNH", x.astype(jnp.bfloat16), joined).dtype == jnp.bfloat16


def test_a_head_of_its_own_may_be_adapted(base):
    _, cfg, params = base
    cfg = dataclasses.replace(cfg, tie_embeddings=False)
    params = params | {"lm_head": {"kernel": params["embed"]["embedding"].T}}
    config = lora.LoraConfig(("lm_head.*",), 3, 6.0)
    adapted = lora.adapt(params, drawn(cfg, config), config.scale)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, cfg.d_model)), jnp.bfloat16)
    logits = models.unembed(cfg, adapted, hidden.astype(jnp.float32))
    np.testing.assert_allclose(logits, hidden.astype(jnp.float32) @ merged(adapted)["lm_head"]["kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(models.unembed_matrix(cfg, adapted), merged(adapted)["lm_head"]["kernel"])
    assert models.unembed(cfg, adapted, hidden).dtype == jnp.float32


def test_an_adapted_model_is_exported_merged(base, tmp_path):
    _, cfg, params = base
    adapter = drawn(cfg)
    models.save(tmp_path / "out", cfg, lora.adapt(params, adapter, 2.0))
    plain = jax.tree.map(np.asarray, lora.merge(params, adapter, 2.0))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7), models.load(tmp_path / "out")[1], plain)


def test_gradients_are_those_of_finite_differences(base):
    _, cfg, params = base
    adapter = drawn(cfg, dataclasses.replace(CONFIG, targets=("blocks.q", "blocks.down")))
    loss = lambda a: models.apply(cfg, lora.adapt(params, a, CONFIG.scale), tokens(cfg))[0].std()  # noqa: E731
    check_grads(loss, (adapter,), order=1, modes=["rev"], rtol=0.05, atol=0.01, eps=1e-2)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2.0), ({"alpha": 12.0}, 4.0), ({"rank": 6}, 1.0), ({"rank": 4, "rank_stabilised": True}, 3.0)],
    ids=str,
)
def test_the_scale(changes, scale):
    assert dataclasses.replace(CONFIG, **changes).scale == scale


def test_targets_are_patterns_over_names(base):
    _, cfg, _ = base
    named = lambda *targets: lora.lora_targets(cfg, lora.LoraConfig(targets))  # noqa: E731
    assert named("blocks.[qv]") == ["blocks.q", "blocks.v"] and named("blocks.q", "blocks.*")[:2] == ["blocks.q", "blocks.down"]
    assert set(named("blocks.*")) == {f"blocks.{leaf}" for leaf in ("q", "k", "v", "o", "gate", "up", "down")}  # no norm
    untied = dataclasses.replace(cfg, tie_embeddings=False)
    assert lora.lora_targets(untied, lora.LoraConfig(("lm_head.*",))) == ["lm_head.kernel"]
    with pytest.raises(ModelError, match="'blocks.query' names no matrix of this qwen3 model; nearest: blocks.*blocks.*all of a block"):
        named("blocks.query")
    for theirs, ours in (("q_proj", "blocks.q"), ("model.layers.*.down_proj", "blocks.down"), ("blocks.gates", "blocks.gate")):
        with pytest.raises(ModelError, match=f"nearest: {ours}, "):
            named(theirs)
    with pytest.raises(ModelError, match="'embed.embedding' names no matrix"):
        named("embed.embedding")
    with pytest.raises(ModelError, match="rank of at least 1"):
        lora.lora_targets(cfg, dataclasses.replace(CONFIG, rank=0))


@pytest.mark.parametrize("name", ["llama_biases_linear", "qwen2", "qwen3", "mistral", "gemma2", "gptj"])
def test_folders_round_trip_bit_for_bit(name, tmp_path):
    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    config = lora.LoraConfig(("blocks.*",) if cfg.tie_embeddings else ("blocks.*", "lm_head.*"), 2, 3.0, rank_stabilised=name == "qwen2")
    adapter = drawn(cfg, config)
    lora.save_lora(tmp_path, cfg, adapter, config, base="somewhere")
    again, found = lora.load_lora(tmp_path, cfg)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    assert set(found.targets) == set(lora.lora_targets(cfg, config)) and (found.rank, found.scale) == (2, config.scale)


def test_a_save_that_stops_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    """Between the two files, say: new weights beside an old config would be another adapter."""
    cfg = models.ModelConfig.from_hf(cases.CASES["qwen2"])
    folder, before = tmp_path / "adapter", drawn(cfg)
    lora.save_lora(folder, cfg, before, CONFIG)
    monkeypatch.setattr(lora.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lora.save_lora(folder, cfg, jax.tree.map(lambda x: x + 1, before), CONFIG)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, lora.load_lora(folder, cfg)[0], before)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"neither empty nor an adapter \(it holds notes.txt\); give another folder"):
        lora.save_lora(folder, cfg, before, CONFIG)


FUSED = {"phi3": ("blocks.*",), "gpt2": ("blocks.q", "blocks.v"), "gpt_neox": ("blocks.q", "blocks.k", "blocks.v")}


@pytest.mark.parametrize("name", FUSED)
def test_matrices_that_share_a_tensor_round_trip(name, tmp_path):
    """In one module of as many ranks, the others' rows of B zero; some of them, or one alone, too."""
    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    for targets in (FUSED[name], ("blocks.v",)):
        config = dataclasses.replace(CONFIG, targets=targets, rank_stabilised=name == "gpt2")
        adapter = drawn(cfg, config)
        lora.save_lora(tmp_path, cfg, adapter, config)
        again, found = lora.load_lora(tmp_path, cfg)
        jax.tree.map(np.testing.assert_array_equal, again, adapter)
        assert set(found.targets) == set(lora.lora_targets(cfg, config)) and (found.rank, found.scale) == (config.rank, config.scale)
    damaged(tmp_path, rank_pattern={"qkv_proj": 5})
    with pytest.raises(ModelError, match="rank_pattern={'qkv_proj': 5} is not supported"):
        lora.load_lora(tmp_path, cfg)


@needs_peft
@pytest.mark.parametrize("name", FUSED)
def test_peft_reads_matrices_that_share_a_tensor_and_we_read_peft_s(name, tmp_path):
    import peft
    import torch
    import transformers

    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    params, config = cases.random_params(cfg), dataclasses.replace(CONFIG, targets=FUSED[name], rank_stabilised=name == "gpt2")
    adapter, given = drawn(cfg, config), tokens(cfg)
    models.save(tmp_path / "base", cfg, params)
    lora.save_lora(tmp_path / "ours", cfg, adapter, config, base=str(tmp_path / "base"))
    fresh = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")  # noqa: E731

    def by_peft(model):
        with torch.no_grad():
            return model(torch.tensor(given, dtype=torch.long)).logits.numpy()

    theirs = by_peft(peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours"))
    ours, plain = (np.asarray(models.apply(cfg, p, given)[0]) for p in (lora.merge(params, adapter, config.scale), params))
    assert cases.relative_error(ours, theirs) < 2e-5 < cases.relative_error(plain, theirs)

    module = {"phi3": "qkv_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value"}[name]
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[module], fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    made = peft.get_peft_model(fresh(), settings)
    for key, weight in made.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(tmp_path / "theirs")
    read, found = lora.load_lora(tmp_path / "theirs", cfg)
    assert set(found.targets) == {"blocks.q", "blocks.k", "blocks.v"}
    ours = np.asarray(models.apply(cfg, lora.merge(params, read, found.scale), given)[0])
    assert cases.relative_error(ours, by_peft(made)) < 2e-5 < cases.relative_error(plain, by_peft(made))


@needs_peft
def test_peft_reads_ours_and_we_read_peft_s(base, tmp_path):
    """The same logits on both sides, whoever wrote the adapter."""
    import peft
    import torch
    import transformers

    folder, cfg, params = base
    given = tokens(cfg)

    def by_peft(model):
        with torch.no_grad():
            return model(torch.tensor(given, dtype=torch.long)).logits.numpy()

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    adapter = drawn(cfg)
    lora.save_lora(tmp_path / "ours", cfg, adapter, CONFIG, base=str(folder))
    theirs = by_peft(peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours"))
    ours = np.asarray(models.apply(cfg, lora.merge(params, adapter, CONFIG.scale), given)[0])
    plain = np.asarray(models.apply(cfg, params, given)[0])
    assert cases.relative_error(ours, theirs) < 2e-5 < cases.relative_error(plain, theirs)

    settings = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    made = peft.get_peft_model(fresh(), settings)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(tmp_path / "theirs")
    read, config = lora.load_lora(tmp_path / "theirs", cfg)
    assert set(config.targets) == {"blocks.q", "blocks.down"}
    ours = np.asarray(models.apply(cfg, lora.merge(params, read, config.scale), given)[0])
    assert cases.relative_error(ours, by_peft(made)) < 2e-5 < cases.relative_error(plain, by_peft(made))


def damaged(folder, **fields):
    path = folder / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; known: 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported: its base is not the model itself; convert it"),
        ({"r": "3"}, "r must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha above 0"),
        ({"r": 4}, r"layers.0.*lora_A.weight: expected shape \[4, (\d+)\], found \[3, \1\]"),
    ],
)
def test_a_config_that_we_cannot_follow_is_refused(base, tmp_path, fields, message):
    _, cfg, _ = base
    lora.save_lora(tmp_path, cfg, drawn(cfg), CONFIG)
    damaged(tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        lora.load_lora(tmp_path, cfg)


def test_files_that_do_not_fit_are_named(base, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, cfg, _ = base
    with pytest.raises(ModelError, match="adapter_config.json: no such file"):
        lora.load_lora(tmp_path / "nowhere", cfg)
    lora.save_lora(tmp_path, cfg, drawn(cfg), CONFIG)
    path = tmp_path / lora.WEIGHTS
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-40])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: not a complete safetensors file"):
        lora.load_lora(tmp_path, cfg)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(ModelError, match=f"missing tensor {key}: a matrix is adapted in every layer or in none"):
        lora.load_lora(tmp_path, cfg)
    save_file(tensors | {"base_model.model.else.lora_A.weight": np.zeros((3, 4), np.float32)}, path)
    with pytest.raises(ModelError, match="unexpected tensor base_model.model.else.lora_A.weight"):
        lora.load_lora(tmp_path, cfg)


MESH = """
import sys; sys.path.insert(0, "tests/models")
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import models, models.sharding, test_lora as t, parity_cases as cases
from models import lora
cfg = models.ModelConfig.from_hf(cases.CASES["qwen3"])
params, adapter = cases.random_params(cfg), t.drawn(cfg)
mesh = models.sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
axes = lora.lora_axes(cfg, t.CONFIG)
assert axes["blocks"]["q"] == {"a": ("layers", "embed", "rank"), "b": ("layers", "rank", "heads", "head_dim")}
placed = jax.device_put(params, models.sharding.param_shardings(cfg, mesh))
spread = jax.device_put(adapter, models.sharding.shardings_of(adapter, axes, mesh))
assert spread["blocks"]["q"]["a"].sharding.spec != PartitionSpec() and spread["blocks"]["q"]["b"].sharding.spec != PartitionSpec()
one = lora.merge(params, adapter, 2.0)
many = jax.jit(lambda p, a: lora.merge(p, a, 2.0))(placed, spread)
logits = [np.asarray(models.apply(cfg, p, t.tokens(cfg))[0]) for p in (lora.adapt(placed, spread, 2.0), one)]
np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), many, one)
assert many["blocks"]["q"].sharding.is_equivalent_to(placed["blocks"]["q"].sharding, 4)
print("equal")
"""


def test_an_adapter_is_spread_over_a_mesh_as_its_matrices_are(run_python):
    assert "equal" in run_python(MESH, devices=4)
