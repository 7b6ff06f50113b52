"""BLAS threads on small matrices cost many times what they save where other work shares the cores."""

import contextlib
from contextlib import AbstractContextManager

from threadpoolctl import threadpool_limits

SMALL_MATRIX = 4_000_000  # elements


def blas_threads_for(size: int) -> AbstractContextManager:
    """A context with one BLAS thread for work on matrices of fewer than SMALL_MATRIX elements, else with as many as there are."""
    return threadpool_limits(1, "blas") if size < SMALL_MATRIX else contextlib.nullcontext()
