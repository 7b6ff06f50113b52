"""Where parameters lie in a checkpoint: parts of one tensor, read piece by piece and written back; other names; buffers."""

import jax
import numpy as np
import parity_cases as cases
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import ModelError
from models.families import FAMILIES, tensor_of
from models.hf import leaves_of
from models.tensors import Tensor

SHARED = ("phi3", "gpt2", "gpt_neox")


def pieces(shape):
    """Index tuples that cut one axis into its first part and the rest, and the whole."""
    whole = (slice(None),) * len(shape)
    yield whole
    for axis, size in enumerate(shape):
        for cut in (slice(0, size // 2), slice(size // 2, size)):
            yield (*whole[:axis], cut, *whole[axis + 1 :])


@pytest.mark.parametrize("name", SHARED)
def test_parts_are_read_and_written_back(name):
    """Each leaf of each tensor, whole and in pieces, through no more of the tensor than it needs."""
    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    stored = cases.tensors(cases.CASES[name], 0)
    again = {}
    for leaf, abstract in leaves_of(models.abstract_params(cfg)):
        tensor = tensor_of(cfg, leaf)
        shape = abstract.shape[-len(tensor.ours) :]
        source = stored[tensor.names(cfg).flat[0]]
        assert tensor.stored_shape(shape) == source.shape, leaf
        asked = []
        whole = tensor.read(lambda index, s=source, a=asked: a.append(s[index].size) or s[index], shape, (slice(None),) * len(shape))
        assert whole.shape == tuple(shape)
        per_head = "|" in tensor.stored and not tensor.stored.split()[0].startswith("|") and "D |" not in tensor.stored
        assert asked == [source.size if per_head else whole.size], leaf
        for index in pieces(shape):
            np.testing.assert_array_equal(tensor.read(source.__getitem__, shape, index), whole[index], err_msg=leaf)
        tensor.write(again.setdefault(tensor.name, np.full(source.shape, np.nan, np.float32)), whole)
    for name, value in again.items():
        np.testing.assert_array_equal(value, stored[name.format(layer=0)], err_msg=name)


def test_parts_by_hand():
    """Two heads of three units, one key head: rows of the tensor by number."""
    cfg = models.ModelConfig(n_heads=2, n_kv_heads=1, head_dim=2, d_model=1)
    rows = np.arange(8.0)[:, None]
    read = lambda tensor, shape: tensor.at(cfg).read(rows.__getitem__, shape, (slice(None),) * 3)[0].tolist()  # noqa: E731
    after = ("NH", "KH", "KH")
    assert read(Tensor("", "DNH", "|NH D", after, 0), (1, 2, 2)) == [[0, 1], [2, 3]]
    assert read(Tensor("", "DKH", "|KH D", after, 1), (1, 1, 2)) == [[4, 5]]
    assert read(Tensor("", "DKH", "|KH D", after, 2), (1, 1, 2)) == [[6, 7]]
    rows = np.arange(12.0)[:, None]
    assert read(Tensor("", "DNH", "N|H D", ("H",) * 3, 1), (1, 2, 2)) == [[2, 3], [8, 9]]


@pytest.mark.parametrize("name", [*SHARED, "qwen3_layer_types", "mixtral"])
def test_a_tensor_is_read_in_pieces_of_few_numbers(name, monkeypatch, tmp_path):
    """As few as asked, or those of one row, head, ...; together they are the leaf, whole or cut; loading gives the same parameters."""
    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    stored = cases.tensors(cases.CASES[name], 0)
    for leaf, abstract in leaves_of(models.abstract_params(cfg)):
        tensor = tensor_of(cfg, leaf)
        shape = abstract.shape[-len(tensor.ours) :]
        source = stored[tensor.names(cfg).flat[0]]
        row = int(np.prod(shape)) // shape[tensor.ours.index(tensor.stored.replace("|", "")[0])]
        for index in pieces(shape):
            whole = tensor.read(source.__getitem__, shape, index)
            for most in (1, 3 * row + 1, 10**9):
                found, counts = np.full(whole.shape, np.nan, whole.dtype), []
                for place, piece in tensor.pieces(shape, index, most):
                    found[place] = tensor.read(source.__getitem__, shape, piece)
                    counts.append(found[place].size)
                np.testing.assert_array_equal(found, whole, err_msg=leaf)
                assert max(counts) <= max(most, row) and (most < 10**9 or len(counts) == 1), leaf
    cases.write_checkpoint(tmp_path, cases.CASES[name])
    _, expected = models.load(tmp_path)
    monkeypatch.setattr("models.hf._PIECE_BYTES", 64)
    same(models.load(tmp_path)[1], expected)


def test_one_tensor_has_one_dtype(tmp_path):
    cfg = models.ModelConfig.from_hf(cases.CASES["phi3"])
    params = cases.random_params(cfg)
    mixed = {**params, "blocks": {**params["blocks"], "k": params["blocks"]["k"].astype("bfloat16")}}
    with pytest.raises(ModelError, match=r"lie in one tensor, model.layers.\{layer\}.self_attn.qkv_proj.weight, have several dtypes"):
        models.save(tmp_path / "mixed", cfg, mixed)
    assert list(tmp_path.iterdir()) == []


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_gpt2_names_with_and_without_the_prefix_and_buffers(tmp_path):
    """As on the hub: names without "transformer.", causal masks as buffers, an unused dtype among them."""
    tensors = cases.write_checkpoint(tmp_path, cases.CASES["gpt2"])
    cfg, params = models.load(tmp_path)
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8), "h.1.attn.masked_bias": np.full(1, -1e4, np.float32)}
    save_file({**bare, **masks}, tmp_path / "model.safetensors")
    same(models.load(tmp_path)[1], params)
    models.save(tmp_path / "export", cfg, params)
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == tensors.keys()
    save_file({**bare, "h.0.attn.gate": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="unexpected tensor h.0.attn.gate for this gpt2"):
        models.load(tmp_path)
    save_file({**bare, "transformer.wte.weight": bare["wte.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="wte.weight are the same parameter"):
        models.load(tmp_path)


def test_the_head_of_gpt_neox_by_either_name(tmp_path):
    tensors = cases.write_checkpoint(tmp_path, cases.CASES["gpt_neox"])
    _, params = models.load(tmp_path)
    renamed = {name.replace("embed_out.", "lm_head."): value for name, value in tensors.items()}
    layer = "gpt_neox.layers.0.attention"
    buffers = {f"{layer}.bias": np.ones((1, 1, 4, 4), bool), f"{layer}.rotary_emb.inv_freq": np.ones(2, np.float32)}
    save_file({**renamed, **buffers}, tmp_path / "model.safetensors")
    same(models.load(tmp_path)[1], params)


def test_a_mask_is_a_buffer_of_some_families_alone(tmp_path):
    tensors = cases.write_checkpoint(tmp_path, cases.CASES["qwen2"])
    save_file({**tensors, "model.layers.0.attn.bias": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected tensor model.layers.0.attn.bias"):
        models.load(tmp_path)


def test_every_family_says_where_its_leaves_lie():
    for config in cases.CASES.values():
        cfg = models.ModelConfig.from_hf(config)
        names = [tensor_of(cfg, leaf).name for leaf, _ in leaves_of(models.abstract_params(cfg))]
        assert set(names) <= set(map(FAMILIES[cfg.family].name_of, names))  # no family renames its own names


ON_A_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
import models
from models import hf, sharding

tokens = jnp.asarray(np.random.default_rng(0).integers(3, 60, (8, 12)))
made = []
aligned = hf._aligned
hf._aligned = lambda shape, dtype: made.append(aligned(shape, dtype)) or made[-1]
for folder in sys.argv[1:]:
    cfg, whole = models.load(folder)
    logits = lambda params, tokens: models.unembed(cfg, params, models.forward(cfg, params, tokens).hidden)
    loss = lambda params, tokens: jnp.mean(jnp.sin(logits(params, tokens)))
    expected, grads = jax.jit(logits)(whole, tokens), jax.jit(jax.grad(loss))(whole, tokens)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = sharding.param_shardings(cfg, mesh)
    made.clear()
    _, params = models.load(folder, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert all(a.sharding == s for a, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True))
    assert max(a.nbytes for a in made) == max(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards)
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-3))
    close(jax.jit(logits)(params, rows), expected)
    jax.tree.map(close, jax.jit(jax.grad(loss), out_shardings=shardings)(params, rows), grads)
    greedy = [models.generate(cfg, p, [[5, 6, 7], [8, 9]], max_new_tokens=6, temperature=0.0, mesh=m) for p, m in ((whole, None), (params, mesh))]
    np.testing.assert_array_equal(greedy[0].completion_tokens_NT, greedy[1].completion_tokens_NT)
    models.save(folder + "-again", cfg, params)
    jax.tree.map(np.testing.assert_array_equal, models.load(folder + "-again")[1], whole)
    print("equal", cfg.family)
"""


def test_eight_devices_equal_one_for_each_kind_of_block(run_python, tmp_path):
    """Read in shards, logits, gradients, greedy samples and the export, for fused tensors and each kind of block."""
    names = ("olmo2_biases", "gemma3", "phi3_part", "gpt2", "gpt_neox", "gptj")
    for name in names:
        cases.write_checkpoint(tmp_path / name, cases.CASES[name])
    out = run_python(ON_A_MESH, args=tuple(str(tmp_path / name) for name in names), devices=8)
    assert out.count("equal") == len(names)
