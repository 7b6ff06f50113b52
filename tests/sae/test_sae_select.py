"""Top-k by groups, by shards and by blocks of rows: equal to `lax.top_k`, and sure only when it may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sae.select import DEPTH, RESCUED, grouped_positions, grouped_top_k, in_row_blocks, sharded_top_k

F, K, SIZE = 1024, 8, 16


def rows(n=20, seed=0):
    return np.random.default_rng(seed).standard_normal((n, F)).astype(np.float32)


def assert_equal(x, k=K):
    for found, expected in zip(grouped_top_k(jnp.asarray(x), k), lax.top_k(jnp.asarray(x), k), strict=True):
        np.testing.assert_array_equal(found, expected)


def sure(x):
    return bool(grouped_positions(jnp.asarray(x), K, SIZE)[1].all())


def test_distinct_entries_are_found_without_asking():
    x = rows()
    assert sure(x)
    np.testing.assert_array_equal(grouped_positions(jnp.asarray(x), K, SIZE)[0], lax.top_k(x, K)[1])
    assert_equal(x)
    assert_equal(x.reshape(4, 5, F))


@pytest.mark.parametrize("crowd", [DEPTH, DEPTH + 1, SIZE])
def test_a_crowded_group_is_noticed(crowd):
    """Up to DEPTH of the largest may share a group; with more the answer is not sure, and is right all the same."""
    x = rows()
    x[3, 5 * SIZE : 5 * SIZE + crowd] = 10 + np.arange(crowd)
    assert sure(x) == (crowd <= DEPTH)
    assert_equal(x)


@pytest.mark.parametrize("crowded", [1, RESCUED, RESCUED + 1, 20])
def test_rows_that_are_not_sure_are_looked_at_alone(crowded):
    x = rows()
    chosen = np.random.default_rng(1).permutation(20)[:crowded]
    x[chosen, 7 * SIZE : 8 * SIZE] = 10 + np.arange(SIZE)
    np.testing.assert_array_equal(grouped_positions(jnp.asarray(x), K, SIZE)[1], ~np.isin(np.arange(20), chosen))
    assert_equal(x)


@pytest.mark.parametrize("where", [(32, 48), (32, 33), (900, 5)])
def test_equal_entries_are_noticed(where):
    x = rows()
    x[2, list(where)] = 9.0
    assert not sure(x)
    assert_equal(x)


def test_equal_to_the_last_kept_entry():
    x = rows()
    values, indices = lax.top_k(x, K)
    other = next(i for i in range(F) if i // SIZE not in set(np.asarray(indices[0]) // SIZE))
    x[0, other] = values[0, -1]
    assert not sure(x)
    assert_equal(x)


@pytest.mark.parametrize("value", [0.0, -np.inf, np.inf, np.nan])
def test_constant_rows_and_special_values(value):
    x = rows()
    x[1] = value
    x[4, 7] = value
    assert_equal(x)


def test_a_nan_alone_is_noticed():
    x = rows()
    x[4, 7] = np.nan
    assert not sure(x)


@pytest.mark.parametrize(("width", "k"), [(1024, 1), (1000, 8), (96, 8), (1024, 129), (64, 64), (1024, 3)])
def test_all_widths_and_k(width, k):
    assert_equal(rows()[:, :width], k)


def test_gradient_is_that_of_the_kept_entries():
    x, weights = jnp.asarray(rows(3)), jnp.arange(1.0, K + 1)
    found, expected = (jax.grad(lambda x, f=f: jnp.sum(weights * f(x, K)[0] ** 2))(x) for f in (grouped_top_k, lax.top_k))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 8, 64, 512])
def test_shards(shards):
    x = np.round(rows(), 1)  # many equal entries
    for found, expected in zip(sharded_top_k(jnp.asarray(x), K, shards), lax.top_k(x, K), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("block_bytes", [1, 40, 100, 10**9])
@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (3,)])
@pytest.mark.parametrize("apart", [False, True])
def test_row_blocks(shape, block_bytes, apart):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    heights = []

    def function(rows):
        heights.append(len(rows))
        return rows * 2, jnp.sum(rows, axis=1, keepdims=True)

    double, total = in_row_blocks(function, x, 10, block_bytes, apart)
    np.testing.assert_array_equal(double, 2 * x)
    np.testing.assert_allclose(total, x.sum(axis=-1, keepdims=True), rtol=1e-6)
    assert max(heights) <= max(1, block_bytes // 10)


BLOCKS = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrl_llm.commands.plan_cost import collectives
from models.sharding import batch_sharding, make_mesh
from sae.select import in_row_blocks
mesh = make_mesh({"fsdp": 8})
x = np.random.default_rng(0).standard_normal((16, 12, 6)).astype(np.float32)
moved = {}
for apart, block_bytes in ((False, 800), (True, 800), (True, 1600)):  # of 192 rows, six blocks are made eight, and three four
    how = dict(bytes_per_row=24, block_bytes=block_bytes, apart=apart)
    run = functools.partial(in_row_blocks, lambda rows: jnp.sin(rows) * rows.sum(1, keepdims=True), **how)
    placed = jax.device_put(x, batch_sharding(mesh))
    program = jax.jit(run, out_shardings=batch_sharding(mesh)).lower(placed).compile()
    np.testing.assert_allclose(program(placed), np.sin(x) * x.sum(-1, keepdims=True), rtol=1e-5, atol=1e-6)
    moved[apart, block_bytes] = sum(collectives(program.as_text()).values())
assert moved[True, 800] == moved[True, 1600] == 0 < moved[False, 800], moved
print("stay")
"""


def test_rows_of_blocks_apart_stay_on_their_devices(run_python):
    assert "stay" in run_python(BLOCKS, devices=8)
