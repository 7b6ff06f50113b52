"""What a language model loses when a dictionary's reconstruction takes the place of an activation: cross-entropy and divergence.

Letters: B rows of tokens, T tokens, D width of the tap, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import models
from sae.dictionary import Dictionary, reconstruct
from sae.errors import SAEError
from sae.harvest import TokenRows, left_out, token_batches


@functools.partial(jax.jit, static_argnames=("cfg", "zero"))
def splice_rows(
    cfg: Any,
    params: Any,
    d: Dictionary,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    keep_BT: Bool[Array, "B T"],
    mean_D: Float[Array, "D"] | None,
    zero: bool = True,
) -> dict[str, Float[Array, "B"]]:
    """Sums over the predicted tokens of each row, in nats: "ce_MODE", the negative log-likelihood, and "kl_MODE", KL(clean || MODE).

    MODE: "clean" changes nothing (it has no kl), "sae" puts the reconstruction in the tap's place, "zero" zeros (unless `zero` is False), "mean"
    mean_D (where it is given). Positions in keep_BT stay. A transcoder's place is its output: what it makes of the clean input stands there.
    """
    place, transcodes = d.cfg.place or "", d.cfg.d_out is not None
    clean = models.forward(cfg, params, tokens_BT, lengths=lengths_B, taps=(d.cfg.hook_name,) if transcodes else ())
    written = reconstruct(d, clean.taps[d.cfg.hook_name]) if transcodes else None
    edits = {"sae": lambda x: reconstruct(d, x) if written is None else written.astype(x.dtype)}
    if zero:
        edits["zero"] = jnp.zeros_like
    if mean_D is not None:
        edits["mean"] = lambda x: jnp.broadcast_to(mean_D.astype(x.dtype), x.shape)

    def hidden(edit):
        kept = {place: lambda x: jnp.where(keep_BT[..., None], x, edit(x))}
        return models.forward(cfg, params, tokens_BT, lengths=lengths_B, interventions=kept).hidden

    def log_probabilities(hidden_TD):
        return jax.nn.log_softmax(models.unembed(cfg, params, hidden_TD[:-1]).astype(jnp.float32), axis=-1)

    def row(inputs):
        hiddens, tokens_T, length = inputs
        predicted = jnp.arange(1, tokens_T.shape[0]) < length

        def ce(logp):
            own = jnp.take_along_axis(logp, tokens_T[1:, None], axis=-1)[:, 0]
            return jnp.sum(jnp.where(predicted, -own, 0.0))

        before = log_probabilities(hiddens["clean"])
        out = {"ce_clean": ce(before)}
        for mode in edits:
            logp = log_probabilities(hiddens[mode])
            divergence = jnp.sum(jnp.where(before > -jnp.inf, jnp.exp(before) * (before - logp), 0.0), axis=-1)
            out |= {f"ce_{mode}": ce(logp), f"kl_{mode}": jnp.sum(jnp.where(predicted, divergence, 0.0))}
        return out

    # A row at a time: the logits of a batch are large.
    return lax.map(row, ({"clean": clean.hidden, **{name: hidden(edit) for name, edit in edits.items()}}, tokens_BT, lengths_B))


def splice_sums(
    d: Dictionary,
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    *,
    mean_D: Float[np.ndarray, "D"] | None = None,
    batch_size: int = 16,
    context_size: int | None = None,
    skip_first: int = 1,
    drop_tokens: Collection[int] = (),
    ablations: Mapping[str, Float[np.ndarray, "N"]] | None = None,
) -> dict[str, Float[np.ndarray, "N"]]:
    """Sums of `splice_rows` for each document (non-empty row of token ids), float64, and "predictions", their number.

    Rows longer than context_size (default: the dictionary's) are cut into pieces. mean_D: the tap's mean, for the mean ablation; without
    it there is none. skip_first leaves the tap as it is at the first positions of each piece, and drop_tokens at these ids wherever they
    stand, for dictionaries trained without them (`harvest_activations`). ablations: what this function gave of another dictionary of the same place,
    with the same rows and settings: its zero and mean ablations hang on no dictionary, so that two passes over the model do in place of four.
    Raises SAEError for a dictionary that names no tap, ablations of other rows, and where nothing is predicted.
    """
    if d.cfg.hook_name is None:
        raise SAEError("ce_recovered: the SAE's config names no hook_name; set it to the tap it was trained on")
    if d.cfg.d_out is not None and d.cfg.hook_name_out is None:
        raise SAEError("ce_recovered: the transcoder's config names no hook_name_out; set it to the tap that it reconstructs")
    context_size = min(context_size or d.cfg.context_size or cfg.max_position, cfg.max_position)
    parts: dict[str, list[np.ndarray]] = {}
    numbers, seen = [], 0
    known = {name: sums for name, sums in (ablations or {}).items() if name.endswith(("_zero", "_mean"))}
    wants_mean, wants_zero = mean_D is not None and "ce_mean" not in known, "ce_zero" not in known
    for tokens, lengths, opens in token_batches(token_rows, batch_size, context_size):
        tokens = np.pad(tokens, ((0, 0), (0, 1))) if tokens.shape[1] < 2 else tokens  # single tokens predict nothing, and shapes stay sound
        keep = left_out(tokens, skip_first, drop_tokens)
        found = jax.device_get(splice_rows(cfg, params, d, tokens, lengths, keep, mean_D if wants_mean else None, zero=wants_zero))
        for name, values in (found | {"predictions": np.maximum(lengths - 1, 0)}).items():
            parts.setdefault(name, []).append(np.asarray(values, np.float64))
        numbers.append(seen + np.cumsum(opens) - 1)
        seen += int(opens.sum())
    if not sum(part.sum() for part in parts.get("predictions", [])):
        raise SAEError("ce_recovered: no row has two tokens; nothing is predicted")
    sums = {name: np.bincount(np.concatenate(numbers), np.concatenate(values), seen) for name, values in parts.items()}
    if any(len(values) != seen for values in known.values()):
        raise SAEError(f"splice_sums: the ablations are of {len(next(iter(known.values())))} documents, but there are {seen} here")
    return sums | (known if mean_D is not None else {name: values for name, values in known.items() if name.endswith("_zero")})


def splice_figures(sums: dict[str, Any]) -> dict[str, Any]:
    """Figures of all documents of `splice_sums`.

    ce_clean, ce_sae, ce_zero, ce_mean and kl_sae, kl_zero, kl_mean: means over predicted tokens, nats. ce_recovered: (ce_zero - ce_sae) /
    (ce_zero - ce_clean), ce_recovered_mean the same with the mean ablation; kl_recovered: (kl_zero - kl_sae) / kl_zero, kl_recovered_mean.
    """
    return recovered({name: float(np.sum(values)) for name, values in sums.items()})


def recovered(totals: dict[str, Any]) -> dict[str, Any]:
    """`splice_figures` of totals over documents: scalars, or arrays with an entry a resample."""
    means = {name: total / totals["predictions"] for name, total in totals.items() if name != "predictions"}
    out: dict[str, Any] = {}
    for ablation, suffix in (("zero", ""), ("mean", "_mean")):
        if f"ce_{ablation}" in means:
            base = means[f"ce_{ablation}"]
            out[f"ce_recovered{suffix}"] = ratio(base - means["ce_sae"], base - means["ce_clean"])
            base = means[f"kl_{ablation}"]
            out[f"kl_recovered{suffix}"] = ratio(base - means["kl_sae"], base)
    return out | means


def ratio(over: Any, under: Any) -> Any:
    """over / under, NaN where `under` is 0: a number, or an array for arrays."""
    out = np.asarray(over, float) / np.where(np.asarray(under, float) == 0, np.nan, under)
    return float(out) if out.ndim == 0 else out


def ce_recovered(
    d: Dictionary,
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    *,
    batch_size: int = 16,
    context_size: int | None = None,
    skip_first: int = 1,
    mean_D: Float[np.ndarray, "D"] | None = None,
    drop_tokens: Collection[int] = (),
) -> dict[str, float]:
    """Share of the cross-entropy and of the divergence lost by zeroing the SAE's tap that splicing its reconstruction in wins back, and
    the means that it is made of: `splice_figures` of `splice_sums`."""
    how = {"batch_size": batch_size, "context_size": context_size, "skip_first": skip_first, "mean_D": mean_D, "drop_tokens": drop_tokens}
    return splice_figures(splice_sums(d, cfg, params, token_rows, **how))
