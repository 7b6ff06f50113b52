"""Latents and activations of whole texts: their means over a text's tokens, streamed.

Letters: N texts, n tokens of a piece, D width, F latents, S texts that a piece touches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

from sae.config import SAEConfig
from sae.dictionary import Dictionary, architecture, check_width, encode, encode_topk, normalise
from sae.errors import SAEError
from sae.metrics import BLOCK, Documents, blocks, padded, piece_tokens

MOST_TEXTS = 64  # of a piece: its dense sums [S, F] stay small


class Pooled(NamedTuple):
    """Means over the tokens of each text. latents: CSR [N, F] fp32; contributions: the same on the scale of what is reconstructed, so that the
    text's mean reconstruction is contributions @ W_dec + a part without latents (`latents` itself where the SAE undoes no scale);
    activations: [N, D] fp32, of the tap that is read."""

    latents: Any
    contributions: Any
    activations: np.ndarray


def written_scale(cfg: SAEConfig, x_nD: Float[Array, "n D"]) -> Any:
    """What `decode` multiplies each row's z W_dec by: a number, or [n, 1]."""
    if not cfg.undo_normalization or cfg.normalize_activations == "none":
        return 1.0
    if cfg.normalize_activations == "expected_average_only_in":
        return 1.0 / (cfg.input_scale if cfg.d_out is None else cfg.output_scale)
    return normalise(cfg, x_nD)[1][1]


@functools.partial(jax.jit, static_argnames=("texts", "scaled"))
def _piece_sums(
    d: Dictionary, x_nD: Float[Array, "n D"], text_n: Int[Array, "n"], texts: int, scaled: bool
) -> tuple[Float[Array, "S F"], Float[Array, "S D"]]:
    """Sums over the tokens of each of `texts` texts of the latents and activations; tokens of text `texts` take no part."""
    x = x_nD.astype(jnp.float32)
    scale = jnp.broadcast_to(jnp.asarray(written_scale(d.cfg, x) if scaled else 1.0, jnp.float32), (len(x), 1))
    if architecture(d.cfg).encode_sparse is not None:
        values, indices = encode_topk(d, x)
        sums = jnp.zeros((texts + 1, d.cfg.d_sae), jnp.float32).at[text_n[:, None], indices].add(values * scale)[:texts]
    else:
        sums = jax.ops.segment_sum(encode(d, x) * scale, text_n, texts + 1)[:texts]
    return sums, jax.ops.segment_sum(x, text_n, texts + 1)[:texts]


def pool(d: Dictionary, batches: Iterable[np.ndarray], lengths: Sequence[int]) -> Pooled:
    """Mean latents and activations of texts.

    batches: arrays [n, D] of the texts' activations (of a transcoder: of its input alone), one text behind the other, however cut
    (`harvest_activations`); lengths: how many each text has (`token_counts`), at least one. Raises SAEError for a text without tokens,
    lengths that do not add up to the stream, another width and NaN activations.
    """
    if not len(lengths) or min(lengths) < 1:
        raise SAEError(f"pool: text {int(np.argmin(lengths)) if len(lengths) else 0} has no token; leave empty texts out")
    rescaled = d.cfg.undo_normalization and d.cfg.normalize_activations != "none"
    of = Documents(lengths)
    plain, scaled = _Rows(of.count, d.cfg.d_sae), _Rows(of.count, d.cfg.d_sae) if rescaled else None
    activations, tokens, size = np.zeros((of.count, d.cfg.d_in)), 0, piece_tokens(d)
    for block in blocks(batches, BLOCK):
        check_width("activations", block, d.cfg.d_in)
        if not np.isfinite(block).all():
            raise SAEError(f"pool: NaN or infinite activations after {tokens} tokens")
        start = 0
        while start < len(block):
            numbers = of.of(tokens, tokens + min(size, len(block) - start))
            numbers = numbers[numbers < numbers[0] + MOST_TEXTS]
            rows, first = block[start : start + len(numbers)], int(numbers[0])
            fits = min(size, max(MOST_TEXTS, 1 << (len(rows) - 1).bit_length()))  # short texts fill little of a piece; few shapes are compiled
            texts = np.pad(numbers - first, (0, fits - len(rows)), constant_values=MOST_TEXTS).astype(np.int32)
            for into, is_scaled in ((plain, False), (scaled, True)):
                if into is not None:
                    sums, x_sums = jax.device_get(_piece_sums(d, padded(rows, fits), texts, MOST_TEXTS, is_scaled))
                    into.add(first, sums[: numbers[-1] - first + 1])
            activations[first : numbers[-1] + 1] += x_sums[: numbers[-1] - first + 1]
            start, tokens = start + len(rows), tokens + len(rows)
    if tokens != of.total:
        raise SAEError(f"pool: the lengths sum to {of.total} tokens, but the stream has {tokens}")
    counts = np.asarray(lengths, float)
    latents = plain.over(counts)
    return Pooled(latents, latents if scaled is None else scaled.over(counts), (activations / counts[:, None]).astype(np.float32))


class _Rows:
    """Sums of texts as sparse rows; a text whose tokens lie in several pieces is added up."""

    def __init__(self, texts: int, width: int):
        self.shape, self.parts = (texts, width), []

    def add(self, first: int, sums_SF: np.ndarray) -> None:
        row, column = np.nonzero(sums_SF)
        self.parts.append((row + first, column.astype(np.int32), sums_SF[row, column]))

    def over(self, counts_N: np.ndarray) -> Any:
        row, column, value = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        return scipy.sparse.csr_matrix(((value / counts_N[row]).astype(np.float32), (row, column)), shape=self.shape)
