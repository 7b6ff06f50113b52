"""How good a dictionary is on its activations: sparsity, reconstruction, density of its latents, and the geometry of its weights.

One pass over any number of tokens: what is summed on the device is at most a block of tokens, in fp32 and measured from a point near
their mean, and the sums over blocks are kept in float64 on the host. Letters: B tokens of a piece, D width, F latents, N documents,
U groups of neighbouring documents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae.dictionary import Dictionary, architecture, decode, decode_topk, encode, encode_topk, reads_and_writes
from sae.errors import SAEError
from sae.harvest import TokenRows
from sae.kmeans import unit_rows
from sae.splice import ratio, splice_figures, splice_sums

BLOCK = 4096  # tokens of a block: what the legacy explained variance takes its mean over, however the stream is cut
LATENTS_BYTES = 256 << 20  # of the dense latents of a piece
GROUPS, GROUPS_BYTES = 200, 256 << 20  # groups of documents whose firings are counted apart, fewer where the counts would be larger than this

# What is summed over the tokens of a document; "squared" is about `Statistics.centre_D`, which is near the mean but not at it.
TOKEN_SUMS = ("tokens", "l0", "l1", "error", "squared", "legacy", "legacy_tokens", "cossim", "l2_ratio", "nonzero", "norm_out", "dot")


@functools.partial(jax.jit, donate_argnames="fired_UF")
def piece_statistics(
    d: Dictionary,
    rows_BW: Float[Array, "B W"],
    valid: Int[Array, ""],
    centre_D: Float[Array, "D"],
    mean_D: Float[Array, "D"],
    fired_UF: Int[Array, "U F"],
    groups_B: Int[Array, "B"],
) -> tuple[dict[str, Array], Int[Array, "U F"], Float[Array, "D"]]:
    """Of the first `valid` tokens of a piece: the terms of TOKEN_SUMS [B] (0 for the others), fired_UF with the tokens that each latent fires
    on counted in, by the tokens' groups, and the sum of x - centre [D], x being what is reconstructed. mean_D: of the block that the piece
    is from."""
    x_BD, target_BD = reads_and_writes(d.cfg, rows_BW)
    real = jnp.arange(x_BD.shape[0]) < valid
    if architecture(d.cfg).encode_sparse is not None:
        values, indices = encode_topk(d, x_BD)
        x_hat = decode_topk(d, values, indices, x_BD)
        fires = (values > 0) & real[:, None]
        fired_UF = fired_UF.at[groups_B[:, None], indices].add(fires.astype(jnp.int32))
    else:
        values = encode(d, x_BD)
        x_hat = decode(d, values, x_BD)
        fires = (values > 0) & real[:, None]
        fired_UF = fired_UF.at[groups_B].add(fires.astype(jnp.int32))
    x = target_BD.astype(jnp.float32)
    error, squared_in, squared_out = (jnp.sum(a * a, axis=1) for a in (x - x_hat, x, x_hat))
    dot, offset = jnp.sum(x * x_hat, axis=1), x - centre_D
    about_mean = jnp.sum((x - mean_D) ** 2, axis=1)
    norms = jnp.sqrt(squared_in) * jnp.sqrt(squared_out)
    terms = {
        "tokens": jnp.ones_like(error),
        "l0": jnp.sum(fires, axis=1).astype(jnp.float32),
        "l1": jnp.sum(jnp.abs(values), axis=1),
        "error": error,
        "squared": jnp.sum(offset * offset, axis=1),
        "legacy": jnp.where(about_mean > 0, 1.0 - error / jnp.where(about_mean > 0, about_mean, 1.0), 0.0),
        "legacy_tokens": (about_mean > 0).astype(jnp.float32),
        "cossim": jnp.where(norms > 0, dot / jnp.where(norms > 0, norms, 1.0), 0.0),
        "l2_ratio": jnp.where(squared_in > 0, jnp.sqrt(squared_out) / jnp.sqrt(jnp.where(squared_in > 0, squared_in, 1.0)), 0.0),
        "nonzero": (squared_in > 0).astype(jnp.float32),
        "norm_out": squared_out,
        "dot": dot,
    }
    return {name: jnp.where(real, term, 0.0) for name, term in terms.items()}, fired_UF, jnp.sum(jnp.where(real[:, None], offset, 0.0), axis=0)


@dataclasses.dataclass
class Statistics:
    """Sums over a set of tokens, from which every figure of the set, and of a resample of its documents, follows.

    fired_UF: tokens of each group of neighbouring documents that each latent fires on (int32), group_tokens_U: all of its tokens. mean_D: the
    mean activation. documents: name of TOKEN_SUMS -> [N] sums of each document, float64. variance: sum over tokens of the squared distance to
    mean_D.
    """

    tokens: int
    fired_UF: np.ndarray
    group_tokens_U: np.ndarray
    centre_D: np.ndarray
    mean_D: np.ndarray
    variance: float
    documents: dict[str, np.ndarray]

    @property
    def fired_F(self) -> np.ndarray:
        """Tokens that each latent fires on."""
        return self.fired_UF.sum(axis=0, dtype=np.int64)

    @property
    def density_F(self) -> np.ndarray:
        """Share of the tokens that each latent fires on."""
        return self.fired_F / self.tokens

    def figures(self) -> dict[str, float]:
        """The figures of `evaluate` without the model's part."""
        totals = {name: sums.sum() for name, sums in self.documents.items()}
        return {"rows": self.tokens, **{name: float(v) for name, v in self.of_sums(totals).items()}, **density_figures(self.density_F)}

    def of_sums(self, totals: dict[str, Any]) -> dict[str, Any]:
        """The figures that are ratios of sums, of the totals of TOKEN_SUMS over some documents (scalars, or one entry a resample).

        The total variance of a resample is its sum of squares about the centre, scaled as in the whole set (the centre is near the mean).
        """
        squared = self.documents["squared"].sum()
        variance = totals["squared"] * (self.variance / squared if squared > 0 else 0.0)
        tokens = totals["tokens"]
        return {
            "l0": totals["l0"] / tokens,
            "l1": totals["l1"] / tokens,
            "mse": totals["error"] / tokens,
            "explained_variance": 1.0 - ratio(totals["error"], variance),
            "explained_variance_legacy": ratio(totals["legacy"], totals["legacy_tokens"]),
            "cossim": totals["cossim"] / tokens,
            "l2_ratio": ratio(totals["l2_ratio"], totals["nonzero"]),
            "relative_reconstruction_bias": ratio(totals["norm_out"], totals["dot"]),
        }


def density_figures(density_F: np.ndarray) -> dict[str, float]:
    """Shares of latents: those that never fire, and those that fire on more than 1% and 10% of tokens; the latter's share of all firing."""
    total, figures = density_F.sum(), {"dead_share": float(np.mean(density_F == 0))}
    for percent in (1, 10):
        over = density_F > percent / 100
        figures[f"freq_over_{percent}_percent"] = float(np.mean(over))
        figures[f"normalized_freq_over_{percent}_percent"] = float(ratio(density_F[over].sum(), total))
    return figures


def piece_tokens(d: Dictionary) -> int:
    """Tokens that are encoded at once: a power of two, so that their dense latents stay within LATENTS_BYTES."""
    most = max(1, LATENTS_BYTES // (4 * d.cfg.d_sae))
    return min(BLOCK, 1 << (most.bit_length() - 1))


def blocks(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The stream's rows in arrays of `size` rows, fp32; the last one may be shorter."""
    held: list[np.ndarray] = []
    count = 0
    for batch in batches:
        held.append(np.asarray(batch, np.float32))
        count += len(batch)
        if count >= size:
            rows = np.concatenate(held)
            whole = count // size * size
            yield from np.split(rows[:whole], whole // size)
            held, count = [rows[whole:]], count - whole
    if count:
        yield np.concatenate(held)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` with zero rows after them, `size` in all: few shapes are compiled."""
    return rows if len(rows) == size else np.pad(rows, ((0, size - len(rows)), (0, 0)))


class Documents:
    """Tells which document each token of a stream is of, from the documents' numbers of tokens, in the stream's order."""

    def __init__(self, lengths: Sequence[int]):
        self.ends = np.cumsum(np.asarray(lengths, np.int64))
        self.total, self.count = int(self.ends[-1]) if len(self.ends) else 0, len(self.ends)

    def of(self, start: int, stop: int) -> np.ndarray:
        """The documents' numbers of tokens start .. stop - 1."""
        if stop > self.total:
            raise SAEError(f"documents: their lengths sum to {self.total} tokens, but the stream has more")
        return np.searchsorted(self.ends, np.arange(start, stop), side="right")


def token_counts(token_rows: TokenRows, context_size: int, skip_first: int = 1, drop_tokens: Collection[int] = ()) -> list[int]:
    """The number of activations that `harvest_activations` gives of each row of token ids with these settings (context_size: at most the
    model's)."""
    dropped = frozenset(drop_tokens)
    return [sum(i % context_size >= skip_first and token not in dropped for i, token in enumerate(row)) for row in token_rows]


def activation_statistics(d: Dictionary, batches: Iterable[np.ndarray], documents: Sequence[int] | None = None) -> Statistics:
    """Sums over all rows of `batches` (arrays [n, D], however cut; [n, d_in + d_out] for a transcoder, whose output is what is measured).

    documents: how many rows each document has, in order (`token_counts`); without them all rows are one. Raises SAEError for an empty
    set, rows of another width, NaN activations, and documents that do not add up to the rows.
    """
    of, size = None if documents is None else Documents(documents), piece_tokens(d)
    count = 1 if of is None else of.count
    sums = {name: np.zeros(count) for name in TOKEN_SUMS}
    groups = max(1, min(GROUPS, count, GROUPS_BYTES // (4 * d.cfg.d_sae)))
    group_N = np.arange(count) * groups // max(count, 1)
    fired, shifted, tokens, centre = jnp.zeros((groups, d.cfg.d_sae), jnp.int32), np.zeros(d.cfg.out), 0, None
    for block in blocks(batches, BLOCK):
        mean = reads_and_writes(d.cfg, block)[1].mean(axis=0, dtype=np.float64).astype(np.float32)
        centre = mean if centre is None else centre
        for start in range(0, len(block), size):
            rows = block[start : start + size]
            numbers = np.zeros(len(rows), int) if of is None else of.of(tokens, tokens + len(rows))
            own = np.pad(group_N[numbers], (0, size - len(rows))).astype(np.int32)
            terms, fired, offset = piece_statistics(d, padded(rows, size), len(rows), centre, mean, fired, own)
            terms, offset = jax.device_get((terms, offset))
            if not all(np.isfinite(term).all() for term in terms.values()):
                raise SAEError(f"evaluate: NaN or infinite activations or reconstructions after {tokens} rows")
            for name, total in sums.items():
                total += np.bincount(numbers, terms[name][: len(rows)].astype(np.float64), len(total))
            shifted += offset
            tokens += len(rows)
    if centre is None:
        raise SAEError("evaluate: no activations to evaluate on")
    if of is not None and of.total != tokens:
        raise SAEError(f"documents: their lengths sum to {of.total} tokens, but the stream has {tokens}")
    variance = max(sums["squared"].sum() - float(np.sum(shifted**2)) / tokens, 0.0)
    group_tokens = np.bincount(group_N, sums["tokens"], groups)
    return Statistics(tokens, np.asarray(fired), group_tokens, centre, (centre + shifted / tokens).astype(np.float32), variance, sums)


def evaluate(
    d: Dictionary,
    batches: Iterable[np.ndarray],
    *,
    lm: tuple[Any, Any, TokenRows] | None = None,
    skip_first: int = 1,
    drop_tokens: Collection[int] = (),
) -> dict[str, float]:
    """Metrics over all rows of `batches` (as `activation_statistics` takes them); docs/sae.md has every definition.

    l0, l1: mean number of active latents, mean sum of their values. mse: mean squared length of the error. explained_variance:
    1 - sum |x - x_hat|^2 / sum |x - mean|^2 with the mean of the whole set; explained_variance_legacy: the mean of the tokens' own ratios,
    each about the mean of its block of 4096 tokens. cossim, l2_ratio (|x_hat| / |x|) and relative_reconstruction_bias
    (sum |x_hat|^2 / sum <x, x_hat>) tell shrinkage. dead_share: share of latents that never fire on the set; freq_over_1_percent and
    freq_over_10_percent: that fire on more of it.
    With lm = (model config, params, token rows), also what `splice_figures` gives, the mean ablation by the set's mean; skip_first,
    drop_tokens: where the tap is left as it is, those that the activations were harvested without.
    Raises SAEError for an empty set or NaN activations.
    """
    found = activation_statistics(d, batches)
    result = found.figures()
    if lm is None:
        return result
    return result | splice_figures(splice_sums(d, *lm, mean_D=found.mean_D, skip_first=skip_first, drop_tokens=drop_tokens))


GEOMETRY_BLOCK = 2048  # latents whose cosines with all others are held at once


@functools.partial(jax.jit, static_argnames="size")
def _largest_cosines(unit_FD: Float[Array, "F D"], start: Int[Array, ""], size: int) -> Float[Array, "size"]:
    """The largest cosine of rows start .. start + size - 1 with any other row; the array holds `size` rows more than are real."""
    rows = jax.lax.dynamic_slice_in_dim(unit_FD, start, size)
    cosines = jnp.einsum("nd,fd->nf", rows, unit_FD, precision=jax.lax.Precision.HIGHEST)
    own = jnp.arange(unit_FD.shape[0])[None] == (start + jnp.arange(size))[:, None]
    return jnp.max(jnp.where(own, -jnp.inf, cosines), axis=1)


def max_cosines(w_FD: Any, block: int = GEOMETRY_BLOCK, progress: Any = None) -> Float[np.ndarray, "F"]:
    """Each row's largest cosine with another row, exact, `block` rows at a time. progress: wraps the iterator over blocks (tqdm)."""
    unit = unit_rows(np.asarray(w_FD, np.float32))
    if len(unit) < 2:
        raise SAEError("max_cosines: one row has no other row to be compared with")
    starts, size = range(0, len(unit), block), min(block, len(unit))
    on_device, out = jnp.asarray(unit), np.zeros(len(unit), np.float32)
    for start in starts if progress is None else progress(starts):
        at = min(start, len(unit) - size)  # the last block reaches back, so that one shape is compiled
        out[at : at + size] = jax.device_get(_largest_cosines(on_device, at, size))
    return out


def geometry(d: Dictionary, progress: Any = None) -> dict[str, float]:
    """Figures of the weights alone. average_max_decoder_cosine_sim and average_max_encoder_cosine_sim: mean over latents of the largest
    cosine of its decoder row (encoder column) with another one's; encoder_decoder_cosine_sim: mean cosine of a latent's two vectors;
    decoder_norm: mean length of a decoder row. NaN where encoder and decoder have different widths, or there is one latent."""
    encoder, decoder = np.asarray(d.params["W_enc"], np.float32).T, np.asarray(d.params["W_dec"], np.float32)
    alone = d.cfg.d_sae < 2
    same = encoder.shape == decoder.shape
    return {
        "average_max_decoder_cosine_sim": float("nan") if alone else float(max_cosines(decoder, progress=progress).mean()),
        "average_max_encoder_cosine_sim": float("nan") if alone else float(max_cosines(encoder, progress=progress).mean()),
        "encoder_decoder_cosine_sim": float(np.sum(unit_rows(encoder) * unit_rows(decoder), axis=1).mean()) if same else float("nan"),
        "decoder_norm": float(np.linalg.norm(decoder, axis=1).mean()),
    }
