"""The rules table, meshes, and eight fake devices giving what one gives."""

import logging

import jax
import numpy as np
import parity_cases as cases
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import models
from models import ModelError, lora, sharding


def abstract_mesh(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, 1, tensor), sharding.MESH_AXES)


def test_every_axis_has_a_rule_and_every_rule_an_axis():
    used = set()
    for config in cases.CASES.values():
        cfg = models.ModelConfig.from_hf(config)
        axes = jax.tree.leaves(models.logical_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
        for names, leaf in zip(axes, jax.tree.leaves(models.abstract_params(cfg)), strict=True):
            assert len(names) == leaf.ndim
            mesh_axes = [sharding.RULES[name] for name in names if sharding.RULES[name]]
            assert len(set(mesh_axes)) == len(mesh_axes)  # no mesh axis twice in one array
            used |= set(names)
        adapter = lora.lora_axes(cfg, lora.LoraConfig())
        used |= {name for names in jax.tree.leaves(adapter, is_leaf=lambda x: isinstance(x, tuple)) for name in names}
    assert used == set(sharding.RULES)


def test_specs_by_hand():
    cfg = models.ModelConfig.from_hf(cases.CASES["llama2"])
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(cfg, abstract_mesh(2, 2, 4)))
    assert specs["blocks"]["q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["blocks"]["o"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["blocks"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["blocks"]["attn_norm"] == PartitionSpec(None, None)
    assert specs["embed"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["lm_head"]["kernel"] == PartitionSpec("fsdp", "tensor")


def test_what_does_not_divide_is_replicated_and_said(caplog):
    cfg = models.ModelConfig.from_hf(cases.CASES["qwen2"])  # two key/value heads, d_ff 48
    mesh = abstract_mesh(tensor=4)
    with caplog.at_level(logging.WARNING):
        shardings = sharding.param_shardings(cfg, mesh)
    assert shardings["blocks"]["k"].spec == PartitionSpec(None, "fsdp", None, None)
    assert shardings["blocks"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    told = sharding.fallbacks(cfg, mesh)
    assert told == ["kv_heads=2 does not divide over tensor=4 devices: replicated"]
    assert [record.getMessage() for record in caplog.records] == told
    assert sharding.fallbacks(cfg, abstract_mesh(tensor=2)) == []


def test_mesh_shapes():
    n = len(jax.devices())
    assert dict(sharding.make_mesh({"fsdp": -1}).shape) == {"data": 1, "fsdp": n, "expert": 1, "tensor": 1}
    assert set(sharding.make_mesh({"data": n}).axis_types) == {AxisType.Auto}
    assert sharding.batch_sharding(sharding.make_mesh({"data": n})).spec == PartitionSpec(("data", "fsdp", "expert"))
    with pytest.raises(ModelError, match="unknown mesh axis 'model'; known: data, fsdp, expert, tensor"):
        sharding.make_mesh({"model": 2})
    with pytest.raises(ModelError, match=f"needs {7 * n} devices, there are {n}"):
        sharding.make_mesh({"fsdp": 7 * n})
    with pytest.raises(ModelError, match=f"there are {n}"):
        sharding.make_mesh({"fsdp": 7 * n, "data": -1})
    with pytest.raises(ModelError, match="only one axis may be -1"):
        sharding.make_mesh({"fsdp": -1, "data": -1})
    with pytest.raises(ModelError, match="tensor=0"):
        sharding.make_mesh({"tensor": 0})


EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
import models
from models import hf, sharding

folder = sys.argv[1]
cfg, whole = models.load(folder)
tokens = jnp.asarray(np.random.default_rng(0).integers(3, 60, (8, 12)))

def loss(params, tokens):
    logits = models.unembed(cfg, params, models.forward(cfg, params, tokens).hidden)
    logps = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], -1).mean(), logits

def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-3))

expected_grads, expected = jax.jit(jax.grad(loss, has_aux=True))(whole, tokens)
made = []
aligned = hf._aligned
hf._aligned = lambda shape, dtype: made.append(aligned(shape, dtype)) or made[-1]
for shape in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(cfg, mesh)
    made.clear()
    _, params = models.load(folder, mesh=mesh)
    for array, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert array.sharding == wanted, (array.sharding, wanted)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    # What the reader built in host memory was never more than one device's share of a leaf.
    share = max(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards)
    built = max(array.nbytes for array in made)
    assert built == share < 0.3 * max(a.nbytes for a in jax.tree.leaves(whole)), (built, share)
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    close(models.apply(cfg, params, rows)[0], expected)
grads, _ = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(shardings, None))(params, rows)
jax.tree.map(close, grads, expected_grads)

# A batch that does not divide, and a call outside jit, still work.
close(models.apply(cfg, params, tokens[:3])[0], expected[:3])
embedded = models.forward(cfg, params, tokens, stop_at=0, taps=("embed",)).taps["embed"]
np.testing.assert_array_equal(embedded, whole["embed"]["embedding"][tokens])

# Twelve completions of different lengths in four places, one a device that shares the rows: each place is filled again.
prompts, limits = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12], [13, 14], [15]], [3, 9, 6, 4, 9, 5]
sample = lambda params, **how: models.generate(cfg, params, prompts, num_samples=2, max_new_tokens=limits, **how)
alone, refilled = sample(whole), sample(params, mesh=mesh, max_rows=4, refill=True)
np.testing.assert_array_equal(refilled.completion_tokens_NT, alone.completion_tokens_NT)
np.testing.assert_allclose(refilled.logps_NT, alone.logps_NT, atol=2e-5)

# Rows stay with their devices: with nothing split over "tensor", only parameters travel, and no product is summed.
mesh = sharding.make_mesh({"fsdp": 8})
like = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
abstract = jax.tree.map(like, whole, sharding.param_shardings(cfg, mesh))
text = jax.jit(loss).lower(abstract, like(tokens, sharding.batch_sharding(mesh))).compile().as_text()
assert "all-gather" in text and "all-reduce(f32[8,12" not in text and "f32[8,12,64]" not in text

# Saving gathers one tensor at a time and gives the same parameters.
models.save(sys.argv[2], cfg, params)
jax.tree.map(np.testing.assert_array_equal, models.load(sys.argv[2])[1], whole)
print("equal")
"""


def test_eight_devices_equal_one(run_python, tmp_path):
    config = {
        **cases.QWEN3,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        **cases.rope("default"),
    }
    cases.write_checkpoint(tmp_path / "model", config)
    assert "equal" in run_python(EIGHT, args=(str(tmp_path / "model"), str(tmp_path / "again")), devices=8)


CLASSES = """
import sys; sys.path.insert(0, "tests/models")
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import models, parity_cases as cases
from models import sharding

# Eight heads, so that tensor=8 splits them; one layer, but for Gemma's two kinds, since twenty programs are compiled. Untied where random
# tied ones would repeat their last token.
wide = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1}
CLASSES = {
    "qwen3": wide | {"num_key_value_heads": 4},  # as llama, with norms of queries and keys; tied
    "gemma2": wide | {"num_key_value_heads": 8, "num_hidden_layers": 2, "sliding_window": 5, "tie_word_embeddings": False},  # norms, caps, windows
    "gpt2": {"n_embd": 64, "n_head": 8, "n_layer": 1, "tie_word_embeddings": False},  # fused, biased, learned positions
    "gpt_neox": wide,  # attention and MLP side by side, fused by head
    "olmo2": wide | {"num_key_value_heads": 8, "tie_word_embeddings": False},  # norms behind, of queries and keys over all heads, which are split
}
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
rng = np.random.default_rng(0)
tokens = jnp.asarray(rng.integers(3, 60, (8, 12)))
counted = jnp.asarray(rng.random((8, 11)) < 0.8)
prompts = [rng.integers(3, 60, length).tolist() for length in (3, 7, 2, 5, 4, 6, 1, 8)]
for name, changes in CLASSES.items():
    cases.write_checkpoint(Path(sys.argv[1]) / name, cases.CASES[name] | changes)
    cfg, whole = models.load(Path(sys.argv[1]) / name)

    def loss(params, tokens, counted):
        logits = models.unembed(cfg, params, models.forward(cfg, params, tokens).hidden)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
        return -jnp.where(counted, logps, 0).sum() / counted.sum()

    def greedy(params, mesh=None):
        return models.generate(cfg, params, prompts, max_new_tokens=6, temperature=0.0, stop_tokens=(), mesh=mesh)

    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(whole, tokens, counted)
    largest, alone = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads)), greedy(whole)
    assert len(np.unique(alone.completion_tokens_NT)) > 8, "each says the same"
    for shape in MESHES:
        mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape)))
        places, rows = sharding.param_shardings(cfg, mesh), sharding.batch_sharding(mesh)
        params = jax.device_put(whole, places)
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        found, grads = run(params, jax.device_put(tokens, rows), jax.device_put(counted, rows))
        off = max(float(np.abs(np.asarray(g) - w).max()) for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads))) / largest
        rel = abs(float(found) / float(expected) - 1)
        many = greedy(params, mesh)
        same = np.array_equal(many.completion_tokens_NT, alone.completion_tokens_NT)
        assert rel < 1e-5 and off < 1e-5 and same, (name, shape, rel, off, same)
        np.testing.assert_allclose(many.logps_NT, alone.logps_NT, atol=1e-5)
print("equal")
"""


def test_every_class_of_family_is_the_same_on_every_mesh(run_python, tmp_path):
    """Loss, gradients (against the largest) and log-probabilities of eight devices to 1e-5, greedy tokens equal. Experts: test_experts.py."""
    assert "equal" in run_python(CLASSES, args=(str(tmp_path),), devices=8)


def test_a_mesh_of_one_device_changes_nothing(tmp_path):
    cases.write_checkpoint(tmp_path / "model", cases.CASES["qwen2"])
    mesh = sharding.make_mesh({"fsdp": 1}, devices=jax.devices()[:1])
    cfg, params = models.load(tmp_path / "model", mesh=mesh)
    _, plain = models.load(tmp_path / "model")
    tokens = cases.inputs("qwen2")["tokens"]
    np.testing.assert_array_equal(models.apply(cfg, params, tokens)[0], models.apply(cfg, plain, tokens)[0])


MOVED = """
import jax, jax.numpy as jnp, numpy as np
from models import sharding
from jax.sharding import NamedSharding, PartitionSpec as P

def check(source, target, before, after, kinds):
    mesh = sharding.make_mesh(source)
    other = sharding.relaid(mesh, target)
    assert list(other.devices.flat) == list(mesh.devices.flat)
    here, there = NamedSharding(mesh, P(*before)), NamedSharding(other, P(*after))
    value = np.arange(16 * 32.0).reshape(16, 32)
    program = jax.jit(lambda x: sharding.moved(x, here, there), in_shardings=here, out_shardings=there)
    compiled = program.lower(jax.ShapeDtypeStruct(value.shape, value.dtype)).compile()
    text = compiled.as_text()
    assert f"f64[16,32]" not in text and "f32[16,32]" not in text, "the whole array lies on a device"
    assert kinds == {kind for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if f" {kind}(" in text}, text
    found = compiled(jax.device_put(value.astype(np.float32), here))
    np.testing.assert_array_equal(found, value)

fsdp, tensor = ("fsdp", None), (None, "tensor")
check({"fsdp": 8}, {"data": 2, "tensor": 4}, fsdp, tensor, {"all-gather", "all-to-all", "collective-permute"})
check({"fsdp": 8}, {"tensor": 8}, fsdp, tensor, {"all-to-all"})
check({"fsdp": 8}, {"fsdp": 2, "tensor": 4}, fsdp, ("fsdp", "tensor"), {"all-to-all"})
check({"fsdp": 4, "tensor": 2}, {"data": 4, "tensor": 2}, ("fsdp", "tensor"), tensor, {"all-gather"})
# Layers in front: whatever way XLA takes, no more than a layer is whole.
for source, before in (({"data": 2, "fsdp": 4}, (None, "fsdp")), ({"fsdp": 4, "expert": 2}, ("expert", "fsdp"))):
    mesh = sharding.make_mesh(source)
    other = sharding.relaid(mesh, {"data": 2, "tensor": 4})
    here, there = NamedSharding(mesh, P(None, *before)), NamedSharding(other, P(None, None, "tensor"))
    value = np.arange(5 * 16 * 32.0, dtype=np.float32).reshape(5, 16, 32)
    program = jax.jit(lambda x: sharding.moved(x, here, there), in_shardings=here, out_shardings=there)
    text = program.lower(jax.ShapeDtypeStruct(value.shape, value.dtype)).compile().as_text()
    assert "f32[5,16,32]" not in text, "the whole array lies on a device"
    np.testing.assert_array_equal(program(jax.device_put(value, here)), value)
print("equal")
"""


def test_arrays_move_to_another_mesh_without_being_whole_on_a_device(run_python):
    assert "equal" in run_python(MOVED, devices=8)


def test_the_mesh_of_another_shape_is_checked():
    with pytest.raises(ModelError, match=f"needs {3 * len(jax.devices())} devices"):
        sharding.relaid(sharding.make_mesh({"fsdp": -1}), {"tensor": 3 * len(jax.devices())})


HEADS = """
import sys; sys.path.insert(0, "tests/models")
import jax, jax.numpy as jnp, numpy as np
import models, parity_cases as cases
from jaxrl_llm.commands.plan_cost import collectives
from jaxrl_llm.losses.logprobs import token_logprobs
from models import lora, sharding

rng, adapter = np.random.default_rng(0), lora.LoraConfig(targets=("lm_head.kernel",), rank=2)
for name, adapted in (("llama2", False), ("llama2", True), ("gptj", False), ("gemma2", False)):  # untied; a bias; tied, with a soft-cap
    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    params = cases.random_params(cfg)
    low = lora.init_lora(cfg, adapter, jax.random.key(0)) if adapted else {}
    low = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), low)
    hidden = jnp.asarray(rng.standard_normal((16, 12, cfg.d_model)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, cfg.vocab_size, (16, 12)))

    def loss(params, low, hidden, targets, spread=True, chunk=1000):
        head = models.head(cfg, lora.adapt(params, low, 0.5))
        return token_logprobs(hidden, head.spread() if spread else head, targets, chunk=chunk)[0].sum()

    grad = jax.grad(loss, argnums=(0, 1, 2))
    expected = grad(params, low, hidden, targets, False)
    for shape in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(shape)
        places, rows, moved = sharding.param_shardings(cfg, mesh), sharding.batch_sharding(mesh), {}
        given = (jax.device_put(params, places), low, jax.device_put(hidden, rows), jax.device_put(targets, rows))
        run = jax.jit(grad, static_argnums=(4, 5), out_shardings=(places, None, rows))
        for spread, chunk in ((False, 48), (False, 16), (True, 48), (True, 16), (True, 1000)):
            found = run.lower(*given, spread, chunk).compile()
            close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-3))
            jax.tree.map(close, found(*given), expected)
            moved[spread, chunk] = sum(collectives(found.as_text()).values())
        # Spread, the sum over devices comes once, however many chunks there are.
        assert moved[True, 16] == moved[True, 48] < 0.6 * moved[False, 48] < 0.4 * moved[False, 16], (name, shape, moved)
    # Rows that do not divide over the devices.
    odd = jax.jit(loss, static_argnums=(4, 5))
    np.testing.assert_allclose(odd(given[0], low, hidden[:3], targets[:3], True, 3), loss(params, low, hidden[:3], targets[:3]), rtol=1e-5)
print("equal")
"""


def test_the_head_s_gradient_is_summed_over_devices_once(run_python):
    assert "equal" in run_python(HEADS, devices=8)
