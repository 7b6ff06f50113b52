"""What the processes of one job must agree on.

Every process runs the same host code, and a program on a mesh that spans processes runs only when all of them call it. So what hangs
on the disk is decided by the first process, which alone writes, and told to the others. With one process nothing is told.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxrl_llm.run_dir import _process_index


def is_writer() -> bool:
    """Whether this process is the one that writes files and prints."""
    return _process_index() == 0


def from_first(value: Any) -> np.ndarray:
    """The first process's array or number, bit for bit, on every process; all call with the same shape and dtype."""
    import jax

    array = np.asarray(value)
    if jax.process_count() == 1 or not array.size:
        return array
    from jax.experimental import multihost_utils

    # As bytes: sent as it is, a float64 would be rounded to float32.
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(array.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(told).astype(np.uint8).tobytes(), array.dtype).reshape(array.shape)


def on_this_process(tree: Any, mesh: Any) -> Any:
    """Arrays that lie on a mesh, perhaps on other hosts too, whole on this process."""
    import jax

    from models.sharding import fetch

    return tree if mesh is None else jax.tree.map(jax.numpy.asarray, fetch(tree, mesh))


def on_host(array: Any) -> np.ndarray:
    """An array whole on this process's host, wherever its parts lie; every process calls."""
    import jax

    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
