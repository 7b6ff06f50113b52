"""Mixtures of experts against a plain loop over them, on one device and on eight; the families' parity is in test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest
from jax.sharding import AbstractMesh

import models
from models import ModelError, experts, lora, sharding

B, T, D, F, E, K = 2, 7, 6, 5, 4, 2
NO_MESH = AbstractMesh((), ())


def mlp(x, weights, chosen, gate, up, down):
    how = {"activation": jax.nn.silu, "mesh": NO_MESH, "rows": (), "product": "product"}
    return experts.expert_mlp(x, weights, chosen, gate, up, down, **how)


def plain(x, weights, chosen, gate, up, down):
    """Every expert on every token, weighted by how much the token wants of it."""
    each_EBTD = jax.vmap(lambda g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d)(gate, up, down)
    wanted_BTE = jnp.sum(weights[..., None] * (chosen[..., None] == jnp.arange(len(gate))), axis=2)
    return jnp.einsum("bte,ebtd->btd", wanted_BTE, each_EBTD)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return draw(B, T, D), draw(B, T, E), draw(E, D, F), draw(E, D, F), draw(E, F, D)


def close(found, wanted, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max() + 1e-3)), found, wanted)


def test_routing_by_hand():
    """Scores of log 1, 2, 4, 1 are probabilities of 1/8, 1/4, 1/2, 1/8."""
    logits = jnp.log(jnp.array([[[1.0, 2.0, 4.0, 1.0]]]))
    weights, chosen = experts.route(logits, 2, False)
    np.testing.assert_array_equal(chosen, [[[2, 1]]])
    np.testing.assert_allclose(weights, [[[0.5, 0.25]]], rtol=1e-6)
    np.testing.assert_allclose(experts.route(logits, 2, True)[0], [[[2 / 3, 1 / 3]]], rtol=1e-6)
    assert experts.route(logits.astype(jnp.bfloat16), 2, True)[0].dtype == jnp.float32


@pytest.mark.parametrize("where", ["spread", "one expert", "none here"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_experts_equal_a_loop_over_all(given, where, renormalise):
    x, logits, *matrices = given
    logits = logits.at[..., 1].add(0 if where == "spread" else 100)

    def run(how, x, logits, matrices):
        weights, chosen = experts.route(logits, K, renormalise)
        chosen = chosen + E if where == "none here" else chosen
        return how(x, weights, chosen, *matrices)

    found, wanted = (run(how, x, logits, matrices) for how in (mlp, plain))
    assert (np.abs(wanted).max() > 0.1) == (where != "none here")
    close(found, wanted)
    grads = [jax.grad(lambda *a, h=how: jnp.sum(jnp.sin(run(h, *a))), argnums=(0, 1, 2))(x, logits, matrices) for how in (mlp, plain)]
    close(*grads)


def test_experts_in_bfloat16_sum_in_float32(given):
    x, logits, *matrices = (a.astype(jnp.bfloat16) for a in given)
    weights, chosen = experts.route(logits, K, True)
    found = mlp(x, weights, chosen, *matrices)
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), plain(*(a.astype(jnp.float32) for a in (x, weights)), chosen, *(m.astype(jnp.float32) for m in matrices)), 0.02)


@pytest.mark.parametrize("sizes", [[3, 0, 8, 2], [0, 0, 0, 0], [0, 0, 0, 40], [40, 0, 0, 0], [1, 20, 0, 19]], ids=str)
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_tiles_equal_a_ragged_product(sizes, tile, monkeypatch):
    """Groups without rows, groups of several tiles, and rows past the last group; forward and backward."""
    monkeypatch.setattr(experts, "_tile", lambda rows, groups: tile)
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((40, D), (E, D, F)))
    row = np.repeat(np.arange(E + 1), [*sizes, 40 - sum(sizes)])
    by_hand = np.stack([x[i] @ w[e] if e < E else np.zeros(F) for i, e in enumerate(row)])

    def run(product, x, w):
        return product(x, w, jnp.asarray(sizes, jnp.int32))

    def masked(x, w, sizes):
        return jnp.where(jnp.arange(40)[:, None] < jnp.sum(sizes), jax.lax.ragged_dot(x, w, sizes), 0)

    np.testing.assert_allclose(run(experts.grouped_matmul, x, w), by_hand, atol=1e-5)
    np.testing.assert_allclose(run(masked, x, w), by_hand, atol=1e-5)
    grads = [jax.grad(lambda *a, p=p: jnp.sum(jnp.sin(run(p, *a))), argnums=(0, 1))(x, w) for p in (experts.grouped_matmul, masked)]
    close(*grads)


def test_what_a_product_leaves_past_the_last_group_reaches_nobody(monkeypatch):
    """Rows of experts elsewhere: a kernel may leave anything there, in the product and in its gradient by x."""

    @jax.custom_vjp
    def careless(x, w, sizes):
        y = jax.lax.ragged_dot(x, w, sizes)
        return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), y, jnp.nan)

    def backward(kept, g):
        x, w, sizes = kept
        dx, dw = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)[1](jnp.nan_to_num(g))
        return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), dx, jnp.nan), dw, None

    careless.defvjp(lambda *given: (careless(*given), given), backward)
    monkeypatch.setattr(experts, "_tiled_matmul", careless)
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((9, D), (E, D, F)))
    sizes = jnp.array([2, 0, 3, 1])
    found, grads = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(experts.grouped_matmul(x, w, sizes))), argnums=(0, 1))(x, w)
    assert np.isfinite(found) and all(np.isfinite(g).all() for g in grads) and not np.asarray(grads[0][6:]).any() and np.asarray(grads[0][:6]).any()


@pytest.mark.parametrize(("platform", "ragged"), [("tpu", True), ("cuda", False), ("cpu", False)])
def test_only_a_tpu_s_compiler_is_given_a_ragged_product(platform, ragged):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((40, D), "float32"), ((E, D, F), "float32"), ((E,), "int32"))]
    program = jax.jit(jax.grad(lambda x, w, s: jnp.sum(experts.grouped_matmul(x, w, s)), argnums=(0, 1))).trace(*shapes)
    assert ("ragged_dot" in program.lower(lowering_platforms=(platform,)).as_text()) == ragged


def test_a_tile_is_no_larger_than_an_expert_s_share():
    assert [experts._tile(*given) for given in ((8, 8), (4096, 8), (300, 8), (3, 8))] == [1, experts.TILE, 32, 1]


def test_layers_recomputed_but_for_their_products_give_the_same_gradient(monkeypatch):
    """What is kept are the products of the experts too: they are not computed again."""
    cfg = models.ModelConfig.from_hf(cases.CASES["mixtral"])
    params, tokens = cases.random_params(cfg), cases.inputs("mixtral")["tokens"]

    def grads(remat, unroll=False):
        loss = lambda params: jnp.sum(jnp.sin(models.forward(cfg, params, tokens, remat=remat, unroll=unroll).hidden))  # noqa: E731
        return jax.jit(jax.grad(loss))

    wanted = grads(False)(params)
    assert np.abs(np.asarray(wanted["blocks"]["gate"])).max() > 1e-3 and np.abs(np.asarray(wanted["blocks"]["router"])).max() > 1e-4
    for remat, unroll in (("products", False), ("products", True), ("nothing", False)):
        close(grads(remat, unroll)(params), wanted)
    monkeypatch.setattr(experts, "_tiled_matmul", jax.lax.ragged_dot)  # by its name in the program
    products = {remat: str(grads(remat).trace(params).jaxpr).count("= ragged_dot") for remat in (False, "products", "nothing")}
    assert products[False] == products["products"] < products["nothing"]


def test_formulas_count_all_experts_and_run_some():
    cfg = models.ModelConfig.from_hf(cases.CASES["qwen3_moe"])
    assert cfg.param_count() == sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(cfg)))
    one, three = (models.ModelConfig.from_hf(cases.CASES["qwen3_moe"] | {"num_experts_per_tok": k}) for k in (1, 3))
    assert three.flops_per_token() - one.flops_per_token() == 2 * cfg.n_layers * 6 * cfg.d_model * cfg.d_ff


def test_experts_have_taps_of_their_own():
    cfg = models.ModelConfig.from_hf(cases.CASES["mixtral"])
    params, tokens = cases.random_params(cfg), cases.inputs("mixtral")["tokens"]
    name = "blocks.1.router_logits"
    logits, taps = models.apply(cfg, params, tokens, taps=(name, "blocks.1.mlp_out"))
    assert taps[name].shape == (*tokens.shape, 4)
    always_first = {name: lambda scores: scores.at[..., 0].set(1e3)}
    edited, changed = models.apply(cfg, params, tokens, taps=("blocks.1.mlp_out",), interventions=always_first)
    assert np.abs(edited - logits).max() > 1e-3 and np.abs(changed["blocks.1.mlp_out"] - taps["blocks.1.mlp_out"]).max() > 1e-3
    with pytest.raises(ModelError, match=r"unknown tap 'blocks.0.mlp_act'; known: .*router_logits, mlp_out"):
        models.apply(cfg, params, tokens, taps=("blocks.0.mlp_act",))
    dense = models.ModelConfig.from_hf(cases.CASES["qwen3"])
    with pytest.raises(ModelError, match="unknown tap 'blocks.0.router_logits'"):
        models.apply(dense, cases.random_params(dense), tokens, taps=("blocks.0.router_logits",))


def test_adapters_are_of_the_other_matrices():
    cfg = models.ModelConfig.from_hf(cases.CASES["qwen3_moe"])
    assert set(lora.lora_targets(cfg, lora.LoraConfig())) == {"blocks.q", "blocks.k", "blocks.v", "blocks.o"}
    with pytest.raises(ModelError, match="LoRA target 'blocks.up' names no matrix"):
        lora.lora_targets(cfg, lora.LoraConfig(targets=("blocks.up",)))


@pytest.mark.parametrize(
    "case,changes,told",
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than num_local_experts=4"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a positive integer, not 0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ("qwen3_moe", {"num_experts": "8"}, "num_experts must be a positive integer, not '8'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported; known: null, \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; known: 1"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
    ],
)
def test_configs_of_experts_that_are_wrong(case, changes, told):
    with pytest.raises(ModelError, match=told):
        models.ModelConfig.from_hf(cases.CASES[case] | changes)


@pytest.mark.parametrize("changes", [{"n_experts": 4}, {"mlp": "experts"}, {"mlp": "experts", "n_experts": 4, "experts_per_token": 5}], ids=str)
def test_a_model_has_experts_wholly_or_not_at_all(changes):
    with pytest.raises(ModelError, match="experts_per_token="):
        models.ModelConfig(**changes)
    with pytest.raises(ModelError, match="has no biases and at least one expert a token"):
        models.ModelConfig(mlp="experts", n_experts=4)


def test_specs_of_experts_by_hand():
    cfg = models.ModelConfig.from_hf(cases.CASES["mixtral"])
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(cfg, AbstractMesh((1, 2, 4, 2), sharding.MESH_AXES)))
    assert specs["blocks"]["gate"] == jax.sharding.PartitionSpec(None, "expert", "fsdp", "tensor")
    assert specs["blocks"]["down"] == jax.sharding.PartitionSpec(None, "expert", "tensor", "fsdp")
    assert specs["blocks"]["router"] == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert specs["blocks"]["q"] == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)


EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
import models
from models import sharding

cfg, whole = models.load(sys.argv[1])
tokens = jnp.asarray(np.random.default_rng(0).integers(3, 60, (8, 12)))
lengths = jnp.asarray([12, 5, 12, 9, 12, 12, 3, 12])

def loss(params, tokens, lengths):
    hidden = models.forward(cfg, params, tokens, lengths=lengths, remat=True).hidden
    logps = jax.nn.log_softmax(models.unembed(cfg, params, hidden))
    picked = jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(jnp.where(jnp.arange(11) < lengths[:, None] - 1, picked, 0)) / jnp.sum(lengths - 1)

def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1e-3))

expected = jax.jit(jax.value_and_grad(loss))(whole, tokens, lengths)
prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12], [13, 14], [15], [16, 17], [18]]
alone = models.generate(cfg, whole, prompts, max_new_tokens=6)
for shape in ({"expert": 4, "data": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 8}, {"tensor": 8}):
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(cfg, mesh)
    _, params = models.load(sys.argv[1], mesh=mesh)
    rows = [jax.device_put(a, sharding.batch_sharding(mesh)) for a in (tokens, lengths)]
    program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    found = program(params, *rows)
    jax.tree.map(close, found, expected)
    share = found[1]["blocks"]["gate"].addressable_shards[0].data.size / whole["blocks"]["gate"].size
    assert share == {"expert": {4: 1 / 4, 8: 1}.get(shape.get("expert"), 1 / 8), "tensor": 1 / 8}[next(n for n in ("expert", "tensor") if n in shape)]
    sampled = models.generate(cfg, params, prompts, max_new_tokens=6, mesh=mesh)
    np.testing.assert_array_equal(sampled.completion_tokens_NT, alone.completion_tokens_NT)
    np.testing.assert_allclose(sampled.logps_NT, alone.logps_NT, atol=2e-5)
    # Three rows do not divide over the devices.
    close(models.apply(cfg, params, tokens[:3])[0], models.apply(cfg, whole, tokens[:3])[0])
print("equal")
"""


def test_eight_devices_equal_one(run_python, tmp_path):
    """Experts on devices of their own, with and without their width split; eight devices for four experts replicate them."""
    cases.write_checkpoint(tmp_path / "model", cases.MIXTRAL | {"num_key_value_heads": 4, "head_dim": 8} | cases.rope("default", 1e4), seed=3)
    assert "equal" in run_python(EIGHT, args=(str(tmp_path / "model"),), devices=8)
