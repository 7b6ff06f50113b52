"""The gather form of the TopK autoencoder against its plain definition, values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae.select import top_k
from sae.sparse import reconstruct_dense, reconstruct_sparse, row_dots, rows_by_latent, scatter_rows, weighted_rows
from sae.sparse_batch import entries_of, reconstruct_batch, reconstruct_batch_dense

D, F, K, B = 5, 24, 4, 30


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def code(seed=0, b=B, k=K, f=F):
    """A sparse code in which latent 0 is kept in every row, so that its entries take many blocks."""
    rng = np.random.default_rng(seed)
    indices = np.stack([np.r_[0, 1 + rng.permutation(f - 1)[: k - 1]] for _ in range(b)]).astype(np.int32)
    return jnp.asarray(indices), jnp.asarray(rng.standard_normal((b, k)), jnp.float32)


def dense_code(indices, weights, f=F):
    z = np.zeros((len(indices), f), np.float32)
    np.put_along_axis(z, np.asarray(indices), np.asarray(weights), axis=1)
    return z


@pytest.mark.parametrize("k", [1, K, 40])
def test_weighted_rows_and_row_dots(k):
    indices, weights = code(k=k, f=60)
    rng = np.random.default_rng(1)
    table, rows = (rng.standard_normal((n, D)).astype(np.float32) for n in (60, B))
    z = dense_code(indices, weights, 60)
    np.testing.assert_allclose(weighted_rows(jnp.asarray(table), indices, weights), z @ table, atol=1e-4)
    expected = np.take_along_axis(rows @ table.T, np.asarray(indices), axis=1)
    np.testing.assert_allclose(row_dots(jnp.asarray(table), indices, jnp.asarray(rows)), expected, atol=1e-4)


@pytest.mark.parametrize(("b", "k", "f"), [(B, K, F), (1, 1, 3), (200, 2, 3), (7, 3, 1000), (1100, 3, 50)])
def test_scatter_rows_is_the_transpose(b, k, f):
    indices, weights = code(b=b, k=k, f=f)
    rows = np.random.default_rng(2).standard_normal((b, D)).astype(np.float32)
    found = scatter_rows(rows_by_latent(indices, f), weights, jnp.asarray(rows), f)
    np.testing.assert_allclose(found, dense_code(indices, weights, f).T @ rows, atol=1e-4)


def test_every_entry_is_in_one_block_of_its_latent():
    indices, _ = code()
    positions, latents = rows_by_latent(indices, F)
    positions, latents, flat = np.asarray(positions), np.asarray(latents), np.asarray(indices).reshape(-1)
    assert sorted(positions[positions >= 0]) == list(range(indices.size))
    for block, latent in zip(positions, latents, strict=True):
        assert all(flat[p] == latent for p in block if p >= 0)


@pytest.mark.parametrize("centre", [True, False])
def test_value_and_gradient_equal_the_definition(centre):
    params = parameters()
    x, target = (jnp.asarray(np.random.default_rng(s).standard_normal((B, D)), jnp.float32) for s in (1, 2))

    def objective(form):
        def f(params, x):
            x_hat, values, indices = form(params, x, K, centre)
            return jnp.sum((x_hat - target) ** 2) + jnp.sum(jnp.sin(values)), indices

        return f

    (plain, indices), gradients = jax.value_and_grad(objective(reconstruct_dense), argnums=(0, 1), has_aux=True)(params, x)
    (fast, fast_indices), fast_gradients = jax.value_and_grad(objective(reconstruct_sparse), argnums=(0, 1), has_aux=True)(params, x)
    np.testing.assert_array_equal(indices, fast_indices)
    np.testing.assert_allclose(fast, plain, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), fast_gradients, gradients)


def test_rows_are_gathered_from_arrays_that_exist():
    """A gather that XLA fuses with what makes its table computes that anew for each row that it reads: K times the work."""
    objective = jax.grad(lambda params, x: jnp.sum(reconstruct_sparse(params, x, K, True)[0] ** 2))
    program = jax.jit(objective).lower(parameters(), jax.ShapeDtypeStruct((B, D), jnp.float32))
    program = program.compile({"xla_cpu_use_fusion_emitters": True}).as_text()  # as users have it; conftest.py turns it off
    tables = re.findall(rf"= f32\[\d+,1,{D}\]\S* gather\(%?(\S+?),", program)
    assert len(tables) > 2 * K and all(table.startswith(("param", "get-tuple-element")) for table in tables)


def test_gradient_of_the_definition_by_finite_differences():
    params = jax.tree.map(lambda a: a.astype(jnp.float32), parameters())
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, D)), jnp.float32)

    def f(params):
        return jnp.sum(reconstruct_sparse(params, x, K, True)[0] ** 2)

    gradient, rng = jax.grad(f)(params), np.random.default_rng(0)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), params)
    step = 1e-3
    up, down = (jax.tree.map(lambda p, v, s=s: p + s * step * v, params, direction) for s in (1, -1))
    slope = sum(float(jnp.vdot(g, v)) for g, v in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert (float(f(up)) - float(f(down))) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_dead_rows_give_no_gradient():
    """A row whose pre-activations are all negative reconstructs to the bias and moves the encoder nowhere."""
    params = parameters() | {"b_enc": jnp.full(F, -100.0)}
    x = jnp.ones((2, D))
    x_hat, values, _ = reconstruct_sparse(params, x, K, False)
    np.testing.assert_array_equal(values, 0.0)
    np.testing.assert_array_equal(x_hat, jnp.broadcast_to(params["b_dec"], (2, D)))
    gradient = jax.grad(lambda p: jnp.sum(reconstruct_sparse(p, x, K, False)[0] ** 2))(params)
    assert not np.any(gradient["W_enc"]) and not np.any(gradient["W_dec"])


@pytest.mark.parametrize("shape", [(7, 4096), (3, 1000), (2, 3, 512), (5, 33), (4096,)])
@pytest.mark.parametrize("k", [1, 5, 32])
def test_top_k_equals_a_stable_sort(shape, k):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = np.round(x, 1)  # many equal entries: the first of them must win
    values, indices = jax.jit(top_k, static_argnums=1)(x, k)
    expected = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=-1))


def test_dictionary_uses_the_same_selection():
    cfg = sae.SAEConfig(d_in=D, d_sae=F, k=K)
    d = sae.Dictionary(parameters(), cfg)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((B, D)), jnp.float32)
    _, values, indices = reconstruct_sparse(d.params, x, K, True)
    found_values, found_indices = sae.encode_topk(d, x)
    np.testing.assert_array_equal(indices, found_indices)
    np.testing.assert_allclose(values, found_values, rtol=1e-6)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("shape", [(12, 6, 16, 3), (40, 16, 250, 5), (7, 4, 33, 1)])
def test_batches_by_gathers_equal_the_definition(shape, centre):
    """Value, kept entries and every gradient, rows with unlike numbers of latents, widths that are no multiple of a group."""
    B, D, F, k = shape
    rng = np.random.default_rng(B)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    params = {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}
    x, weights = (jnp.asarray(rng.standard_normal((B, D)), jnp.float32) for _ in range(2))
    found, expected = (
        jax.value_and_grad(lambda p, x, f=f: jnp.sum(f(p, x, k, centre)[0] * weights), argnums=(0, 1))(params, x)
        for f in (reconstruct_batch, reconstruct_batch_dense)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    for a, b in zip(reconstruct_batch(params, x, k, centre)[1:], reconstruct_batch_dense(params, x, k, centre)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_entries_are_found_in_order_and_the_rest_is_empty():
    z = np.zeros((3, 20), np.float32)
    z[0, 17], z[2, 0], z[2, 19] = 1, 2, 3
    values, rows, latents = entries_of(jnp.asarray(z), 5)
    np.testing.assert_array_equal(values, [1, 2, 3, 0, 0])
    np.testing.assert_array_equal(rows, [0, 2, 2, 3, 3])
    np.testing.assert_array_equal(latents, [17, 0, 19, 20, 20])
    np.testing.assert_array_equal(entries_of(jnp.asarray(z), 2)[0], [1, 2])
    assert not np.any(np.asarray(entries_of(jnp.zeros((3, 20)), 2)[0]))


def test_equal_entries_in_a_batch_are_all_kept():
    """Every latent fires alike: there are more than B k entries, and the reconstruction has them all, as the definition does."""
    params = {"W_enc": jnp.ones((2, 6)), "b_enc": jnp.zeros(6), "W_dec": jnp.arange(12.0).reshape(6, 2), "b_dec": jnp.zeros(2)}
    x = jnp.ones((3, 2))
    found, expected = (f(params, x, 2, False)[0] for f in (reconstruct_batch, reconstruct_batch_dense))
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(expected, 2 * np.ones((3, 6)) @ np.arange(12.0).reshape(6, 2))
