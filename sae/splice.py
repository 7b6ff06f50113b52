"""What a language model loses when a dictionary's reconstruction takes the place of an activation: cross-entropy and divergence.

Letters: B rows of tokens, T tokens, D width of the tap, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import models
from sae.dictionary import Dictionary, reconstruct
from sae.errors import SAEError
from sae.harvest import TokenRows, token_batches


@functools.partial(jax.jit, static_argnames="cfg")
def splice_rows(
    cfg: Any,
    params: Any,
    d: Dictionary,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    keep_BT: Bool[Array, "B T"],
    mean_D: Float[Array, "D"] | None,
) -> dict[str, Float[Array, "B"]]:
    """Sums over the predicted tokens of each row, in nats: "ce_MODE", the negative log-likelihood, and "kl_MODE", KL(clean || MODE).

    MODE: "clean" changes nothing (it has no kl), "sae" puts the reconstruction in the tap's place, "zero" zeros, "mean" mean_D (where it is
    given). Positions in keep_BT stay.
    """
    edits = {"sae": lambda x: reconstruct(d, x), "zero": jnp.zeros_like}
    if mean_D is not None:
        edits["mean"] = lambda x: jnp.broadcast_to(mean_D.astype(x.dtype), x.shape)

    def hidden(edit):
        kept = None if edit is None else {d.cfg.hook_name: lambda x: jnp.where(keep_BT[..., None], x, edit(x))}
        return models.forward(cfg, params, tokens_BT, lengths=lengths_B, interventions=kept).hidden

    def log_probabilities(hidden_TD):
        return jax.nn.log_softmax(models.unembed(cfg, params, hidden_TD[:-1]).astype(jnp.float32), axis=-1)

    def row(inputs):
        hiddens, tokens_T, length = inputs
        predicted = jnp.arange(1, tokens_T.shape[0]) < length

        def ce(logp):
            own = jnp.take_along_axis(logp, tokens_T[1:, None], axis=-1)[:, 0]
            return jnp.sum(jnp.where(predicted, -own, 0.0))

        clean = log_probabilities(hiddens["clean"])
        out = {"ce_clean": ce(clean)}
        for mode in edits:
            logp = log_probabilities(hiddens[mode])
            divergence = jnp.sum(jnp.where(clean > -jnp.inf, jnp.exp(clean) * (clean - logp), 0.0), axis=-1)
            out |= {f"ce_{mode}": ce(logp), f"kl_{mode}": jnp.sum(jnp.where(predicted, divergence, 0.0))}
        return out

    # A row at a time: the logits of a batch are large.
    return lax.map(row, ({"clean": hidden(None), **{name: hidden(edit) for name, edit in edits.items()}}, tokens_BT, lengths_B))


def splice_sums(
    d: Dictionary,
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    *,
    mean_D: Float[np.ndarray, "D"] | None = None,
    batch_size: int = 16,
    context_size: int | None = None,
    skip_bos: bool = True,
) -> dict[str, Float[np.ndarray, "N"]]:
    """Sums of `splice_rows` for each document (non-empty row of token ids), float64, and "predictions", their number.

    Rows longer than context_size (default: the dictionary's) are cut into pieces. mean_D: the tap's mean, for the mean ablation; without
    it there is none. skip_bos leaves the tap as it is where a row opens with BOS, for dictionaries trained without it.
    Raises SAEError for a dictionary that names no tap, and where nothing is predicted.
    """
    if d.cfg.hook_name is None:
        raise SAEError("ce_recovered: the SAE's config names no hook_name; set it to the tap it was trained on")
    context_size = min(context_size or d.cfg.context_size or cfg.max_position, cfg.max_position)
    parts: dict[str, list[np.ndarray]] = {}
    numbers, seen = [], 0
    for tokens, lengths, opens in token_batches(token_rows, batch_size, context_size):
        tokens = np.pad(tokens, ((0, 0), (0, 1))) if tokens.shape[1] < 2 else tokens  # single tokens predict nothing, and shapes stay sound
        keep = np.zeros(tokens.shape, bool)
        if skip_bos and cfg.bos_token_id is not None:
            keep[:, 0] = opens & (tokens[:, 0] == cfg.bos_token_id)
        found = jax.device_get(splice_rows(cfg, params, d, tokens, lengths, keep, mean_D))
        for name, values in (found | {"predictions": np.maximum(lengths - 1, 0)}).items():
            parts.setdefault(name, []).append(np.asarray(values, np.float64))
        numbers.append(seen + np.cumsum(opens) - 1)
        seen += int(opens.sum())
    if not sum(part.sum() for part in parts.get("predictions", [])):
        raise SAEError("ce_recovered: no row has two tokens; nothing is predicted")
    return {name: np.bincount(np.concatenate(numbers), np.concatenate(values), seen) for name, values in parts.items()}


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
            out[f"ce_recovered{suffix}"] = share(base - means["ce_sae"], base - means["ce_clean"])
            base = means[f"kl_{ablation}"]
            out[f"kl_recovered{suffix}"] = share(base - means["kl_sae"], base)
    return out | means


def share(part: Any, whole: Any) -> Any:
    """part / whole, NaN where the whole is 0: nothing was lost that could be won back."""
    out = np.asarray(part, float) / np.where(np.asarray(whole, float) == 0, np.nan, whole)
    return float(out) if out.ndim == 0 else out


def ce_recovered(
    d: Dictionary,
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    *,
    batch_size: int = 16,
    context_size: int | None = None,
    skip_bos: bool = True,
    mean_D: Float[np.ndarray, "D"] | None = None,
) -> dict[str, float]:
    """Share of the cross-entropy and of the divergence lost by zeroing the SAE's tap that splicing its reconstruction in wins back, and
    the means that it is made of: `splice_figures` of `splice_sums`."""
    how = {"batch_size": batch_size, "context_size": context_size, "skip_bos": skip_bos, "mean_D": mean_D}
    return splice_figures(splice_sums(d, cfg, params, token_rows, **how))
