"""Training and k-means on eight devices give what one device gives."""

CODE = '''
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec
import sae
from sae.step import init_state, start, state_shardings, step_for
from sae.train_config import Scale, numbers_at

assert jax.device_count() == 8
D, F, K, B = 16, 64, 4, 32
rng = np.random.default_rng(0)
x = (rng.random((1024, 12)) * (rng.random((1024, 12)) < 0.2) @ rng.standard_normal((12, D)) + 1).astype(np.float32)

def mesh(**shape):
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))

def train(architecture, mesh, **changes):
    cfg = sae.SAEConfig(architecture=architecture, d_in=D, d_sae=F, k=K)
    settings = sae.SAETrainConfig(steps=12, learning_rate=1e-2, init_rows=256, dead_after=128, sparsity_coefficient=0.1, **changes)
    return sae.train_sae(cfg, sae.array_batches(x, B), settings, jax.random.key(0), mesh=mesh, progress=False)

for architecture in ("topk", "relu", "gated", "jumprelu", "batchtopk", "matryoshka"):
    plain, history = train(architecture, None, method="dense")
    for shape in ({"data": 2, "tensor": 4}, {"data": 4, "fsdp": 2}, {"tensor": 8}):
        for method in ("auto", "sparse") if architecture == "topk" else ("auto",):
            other, other_history = train(architecture, mesh(**shape), method=method)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), other.params, plain.params)
            np.testing.assert_allclose(other_history[-1]["loss"], history[-1]["loss"], rtol=1e-4)

two = mesh(data=2, tensor=4)
cfg = sae.SAEConfig(d_in=D, d_sae=F, k=K)
d, _ = start(cfg, sae.SAETrainConfig(), x, jax.random.key(0))
state = init_state(d)
placed = state_shardings(state, cfg, two)
assert placed.params["W_enc"].spec == PartitionSpec(None, "tensor") and placed.params["W_dec"].spec == PartitionSpec("tensor", None)
moments = [s.spec for s in jax.tree.leaves(placed.moments)]
assert moments.count(PartitionSpec("tensor", None)) == 2 and moments.count(PartitionSpec(None, "tensor")) == 2
step = step_for(cfg, sae.SAETrainConfig(aux_coefficient=0.0), two)
place = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(two, spec))
shapes = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placed)
program = step.func.lower(shapes, place(x[:B], PartitionSpec("data")), numbers_at(0, F, sae.SAETrainConfig(), Scale(1.0, 1.0, 1.0)), **step.keywords)
gathers = [line for line in program.compile().as_text().splitlines() if "all-gather(" in line]
assert not [line for line in gathers if f"[{B // 2},{F}]" in line or f"[{B},{F}]" in line], gathers
try:
    state_shardings(state, cfg.replace(d_sae=62), two)
    raise AssertionError("no error")
except sae.SAEError as error:
    assert "does not divide over 4 devices" in str(error)

alone = sae.kmeans(x, 7, init=x[:7])
for kwargs in ({}, {"chunk": 100}, {"stream": True}):
    spread = sae.kmeans(x, 7, init=x[:7], mesh=mesh(data=8), **kwargs)
    np.testing.assert_array_equal(spread.labels, alone.labels)
    np.testing.assert_allclose(spread.centers, alone.centers, atol=1e-5)
print("equal")
'''


def test_eight_devices_equal_one(run_python):
    assert run_python(CODE, devices=8).strip().endswith("equal")
