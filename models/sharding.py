"""One table from logical axes to mesh axes, and the shardings of parameters and batches that follow from it.

Mesh axes: "data" (batch only), "fsdp" (batch, and parameters along d_model: ZeRO-3), "expert" (batch, and the experts of a
mixture), "tensor" (heads, MLP width and vocabulary). Axis types are Auto: XLA's partitioner places the collectives (GSPMD, Xu et al. 2021).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.config import ModelConfig
from models.errors import ModelError
from models.layers import BATCH_AXES
from models.transformer import Params, abstract_params, logical_axes

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "routes": None,  # the router's score of each expert
    "head_dim": None,
    "norm": None,
    "positions": None,
    "layers": None,
    "rank": None,  # of an adapter (models.lora)
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, expert and tensor (absent = 1; one may be -1 = all remaining devices).

    Raises ModelError for an unknown axis or a shape that does not use exactly the devices there are.
    """
    devices = jax.devices() if devices is None else devices
    # An axis of 8 on a torus of 4 x 4 x 4 takes part of one of its sides.
    array = mesh_utils.create_device_mesh(_sizes(shape, len(devices)), list(devices), allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(shape: Mapping[str, int], devices: int) -> list[int]:
    """The size of each of MESH_AXES."""
    for name, size in shape.items():
        if name not in MESH_AXES:
            raise ModelError(f"unknown mesh axis {name!r}; known: {', '.join(MESH_AXES)}")
        if size != -1 and size < 1:
            raise ModelError(f"mesh axis {name}={size} must be at least 1, or -1 for all remaining devices")
    sizes = [shape.get(name, 1) for name in MESH_AXES]
    if sizes.count(-1) > 1:
        raise ModelError(f"mesh {dict(shape)}: only one axis may be -1")
    fixed = math.prod(s for s in sizes if s != -1)
    sizes = [devices // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != devices:
        raise ModelError(f"mesh {dict(shape)} needs {math.prod(sizes) or fixed} devices, there are {devices}")
    return sizes


def relaid(mesh: Mesh, shape: Mapping[str, int]) -> Mesh:
    """The devices of `mesh`, in their order, as a mesh of another shape, so that one program may move arrays between the two.

    Raises ModelError as `make_mesh`.
    """
    return Mesh(mesh.devices.reshape(_sizes(shape, mesh.size)), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def moved(array: jax.Array, source: NamedSharding, target: NamedSharding) -> jax.Array:
    """Inside jit, an array that lies as `source` says where `target`, on the mesh of `relaid`, wants it.

    Arrays of more than two dimensions have layers in front, which are not spread. Where one dimension is spread over
    all devices (fsdp alone), XLA finds no way to other dimensions but by the whole array on each device. The way is shown to it: the parts are
    put in another order, gathered along the axes that the target does not use, then exchanged. Other layouts move a layer at a time.
    """
    mesh, specs = target.mesh, []
    axes = lambda spec: [() if name is None else (name,) if isinstance(name, str) else tuple(name) for name in spec]  # noqa: E731
    spread = [dim for dim, names in enumerate(axes(source.spec)) if math.prod(source.mesh.shape[name] for name in names) > 1]
    wanted = axes(target.spec)
    if len(spread) == 1 and math.prod(source.mesh.shape[name] for name in axes(source.spec)[spread[0]]) == mesh.size:
        here = [*wanted[spread[0]], *(name for dim, names in enumerate(wanted) if dim != spread[0] for name in names)]
        for names in (mesh.axis_names, [*here, *(name for name in mesh.axis_names if name not in here)], here):
            specs.append(PartitionSpec(*[tuple(names) if dim == spread[0] else None for dim in range(array.ndim)]))
    elif array.ndim > 2:  # a layer at a time, as XLA may take the way by the whole array after all
        here, there = (NamedSharding(at.mesh, PartitionSpec(*at.spec[1:])) for at in (source, target))
        return lax.map(lambda layer: moved(layer, here, there), array)
    for spec in (*specs, target.spec):
        array = lax.with_sharding_constraint(array, NamedSharding(mesh, spec))
    return array


def partition_spec(shape: Sequence[int], axes: Sequence[str], mesh: Mesh) -> PartitionSpec:
    """The spec of one array of `shape` with logical `axes`; a dimension that does not divide is replicated."""
    names = [RULES[axis] for axis in axes]
    divides = [name in mesh.shape and size % mesh.shape[name] == 0 for size, name in zip(shape, names, strict=True)]
    return PartitionSpec(*(name if ok else None for name, ok in zip(names, divides, strict=True)))


def param_shardings(cfg: ModelConfig, mesh: Mesh) -> Params:
    """A NamedSharding for each parameter. Dimensions that do not divide are replicated and logged as a warning."""
    for line in fallbacks(cfg, mesh):
        logging.getLogger(__name__).warning(line)
    return shardings_of(abstract_params(cfg), logical_axes(cfg), mesh)


def shardings_of(tree: Params, axes: Params, mesh: Mesh) -> Params:
    """A NamedSharding for each array of `tree`, whose logical axes stand in a tree of the same shape; what does not divide is replicated."""
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, partition_spec(leaf.shape, names, mesh)), tree, axes)


def fallbacks(cfg: ModelConfig, mesh: Mesh) -> list[str]:
    """One line for each logical axis that should be sharded over `mesh` but does not divide, so is replicated."""
    lines = {}
    for leaf, axes in zip(jax.tree.leaves(abstract_params(cfg)), _axes_leaves(cfg), strict=True):
        for size, axis in zip(leaf.shape, axes, strict=True):
            ways = mesh.shape.get(RULES[axis], 1)
            if size % ways:
                lines[axis] = f"{axis}={size} does not divide over {RULES[axis]}={ways} devices: replicated"
    return list(lines.values())


def _axes_leaves(cfg: ModelConfig) -> list[tuple[str, ...]]:
    return jax.tree.leaves(logical_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over "data", "fsdp" and "expert" together; all later dimensions replicated."""
    return NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[name] for name in _batch_axes(mesh))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in BATCH_AXES if name in mesh.shape)  # a mesh of one's own may have fewer axes


def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """A global array of which each process holds its own part; every process has the whole host array."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def place_rows(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A batch on the device, its rows over the batch axes of the mesh where there is one."""
    return jnp.asarray(array) if mesh is None else place(array, batch_sharding(mesh))


def rows_of_all(array: np.ndarray) -> np.ndarray:
    """The host arrays [rows, ...] of all processes, one below the other in their order, bit for bit; every process calls, with one shape."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    # As 32-bit words: a gather over devices would round float64 to float32.
    words = multihost_utils.process_allgather(np.ascontiguousarray(array).view(np.uint32), tiled=True)
    return np.ascontiguousarray(words).view(array.dtype)


def fetch(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays on the host, whole, on every process."""
    return jax.device_get(tree if mesh is None else _everywhere(replicated(mesh))(tree))


@functools.lru_cache(maxsize=8)
def _everywhere(where: NamedSharding):
    return jax.jit(lambda tree: tree, out_shardings=where)
