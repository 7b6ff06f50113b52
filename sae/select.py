"""Exact top-k along the last axis."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def top_k(x: Float[Array, "... F"], k: int) -> tuple[Float[Array, "... K"], Int[Array, "... K"]]:
    """The k largest entries of each row, largest first, and their int32 positions; equal entries by position."""
    return lax.top_k(x, k)
