"""Harvesting and k-means spread their rows over both batch axes of a mesh and give what one device gives."""

CODE = """
import jax, numpy as np, scipy.sparse
import models, sae
import sae.harvest
from models.sharding import make_mesh, param_shardings
from sae.points import Points

assert jax.device_count() == 8
rng = np.random.default_rng(0)
both = make_mesh({"fsdp": 4, "data": 2})
cfg = models.ModelConfig(
    vocab_size=23, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_position=32, bos_token_id=1, eos_token_ids=(2,)
)
params = models.init(cfg, jax.random.key(0))
spread = jax.device_put(params, param_shardings(cfg, both))
rows = [[1, *rng.integers(3, 23, n).tolist()] for n in rng.integers(0, 31, 21)]

parts, fetch = set(), sae.harvest.fetch
def watched(tapped, mesh):
    parts.add((tapped.shape[0], *(shard.data.shape[0] for shard in tapped.addressable_shards)))
    return fetch(tapped, mesh)
sae.harvest.fetch = watched
for hook in ("blocks.0.resid_post", "final_norm"):
    plain = np.concatenate(list(sae.harvest_activations(cfg, params, rows, hook, batch_size=8)))
    parts.clear()
    batches = list(sae.harvest_activations(cfg, spread, rows, hook, batch_size=6, mesh=both))  # 6 rows are rounded up to 8
    assert len(batches) == 3 and parts == {(8, *[1] * 8)}, parts
    np.testing.assert_allclose(np.concatenate(batches), plain, atol=1e-5)

x = (3 * rng.standard_normal((6, 7))[rng.integers(0, 6, 1001)] + 2 * rng.standard_normal((1001, 7)) + 10).astype(np.float32)
lost = np.concatenate([x[:5], np.full((1, 7), 1e3, np.float32)])  # a start whose last cluster is empty
for mesh in (both, make_mesh({"fsdp": 8}), make_mesh({"tensor": 8})):
    ways = 1 if mesh.shape["tensor"] == 8 else 8
    for kwargs in ({"init": x[:6]}, {"init": lost}, {"seed": 3, "spherical": True}, {"init": x[:6], "chunk": 100}, {"init": x[:6], "stream": True}):
        alone, shared = sae.kmeans(x, 6, **kwargs), sae.kmeans(x, 6, mesh=mesh, **kwargs)
        np.testing.assert_array_equal(shared.labels, alone.labels)
        np.testing.assert_allclose(shared.centers, alone.centers, atol=1e-4)
    points = Points(x, chunk=100, spherical=False, stream=False, mesh=mesh)
    assert {shard.data.shape[0] for shard in points.resident[0][0].addressable_shards} == {points.chunk // ways}
thin = scipy.sparse.csr_matrix(np.where(rng.random(x.shape) < 0.05, x, 0))  # entries alone, against chunks made dense on a mesh
np.testing.assert_array_equal(sae.kmeans(thin, 6, mesh=both, chunk=100).labels, sae.kmeans(thin, 6).labels)
try:
    sae.kmeans(np.where(np.arange(1001)[:, None] == 777, np.nan, x), 6, mesh=both, chunk=100)
    raise AssertionError("no error")
except sae.SAEError as error:
    assert "row 777" in str(error), error
print("equal")
"""


def test_both_batch_axes_share_the_rows(run_python):
    assert run_python(CODE, devices=8).strip().endswith("equal")
