"""How good a dictionary is: sparsity, reconstruction, dead latents, and what the model loses when it is spliced in."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import models
from sae.dictionary import Dictionary, architecture, decode, decode_topk, encode, encode_topk, reconstruct
from sae.errors import SAEError
from sae.harvest import TokenRows, token_batches


@jax.jit
def batch_statistics(d: Dictionary, x_BD: Float[Array, "B D"], centre_D: Float[Array, "D"]) -> dict[str, Array]:
    """Sums over one batch; x is measured from `centre_D` so that its variance loses no digits."""
    if architecture(d.cfg).encode_sparse is not None:
        values, indices = encode_topk(d, x_BD)
        x_hat = decode_topk(d, values, indices, x_BD)
        fired = jnp.zeros(d.cfg.d_sae, jnp.int32).at[indices].max((values > 0).astype(jnp.int32))
        active = jnp.sum(values > 0)
    else:
        z = encode(d, x_BD)
        x_hat = decode(d, z, x_BD)
        fired, active = jnp.any(z > 0, axis=0).astype(jnp.int32), jnp.sum(z > 0)
    x = x_BD.astype(jnp.float32)
    return {
        "active": active,
        "fired": fired,
        "error": jnp.sum((x - x_hat) ** 2),
        "shifted": jnp.sum(x - centre_D, axis=0),
        "squared": jnp.sum((x - centre_D) ** 2),
    }


def evaluate(d: Dictionary, batches: Iterable[np.ndarray], *, lm: tuple[Any, Any, TokenRows] | None = None) -> dict[str, float]:
    """Metrics over all rows of `batches` (arrays [n, D]).

    l0: mean number of active latents. explained_variance: 1 - sum |x - x_hat|^2 / sum |x - mean|^2 with the mean of
    the whole set. dead_share: share of latents that never fire on it. With lm = (model config, params, token rows),
    also `ce_recovered` and its parts. Raises SAEError for an empty set or NaN activations.
    """
    centre, rows, fired, shifted = None, 0, None, np.zeros(d.cfg.d_in)
    totals = {"active": 0.0, "error": 0.0, "squared": 0.0}
    for batch in batches:
        batch = np.asarray(batch, np.float32)
        if not len(batch):
            continue
        centre = batch.mean(axis=0) if centre is None else centre
        found = jax.device_get(batch_statistics(d, batch, centre))
        if not np.isfinite(found["error"] + found["squared"]):
            raise SAEError(f"evaluate: NaN or infinite activations or reconstructions after {rows} rows")
        fired = found["fired"] if fired is None else np.maximum(fired, found["fired"])
        shifted += found["shifted"]
        totals = {name: value + float(found[name]) for name, value in totals.items()}
        rows += len(batch)
    if fired is None:
        raise SAEError("evaluate: no activations to evaluate on")
    variance = totals["squared"] - float(np.sum(shifted**2)) / rows
    result = {
        "rows": rows,
        "l0": totals["active"] / rows,
        "explained_variance": 1.0 - totals["error"] / variance if variance > 0 else float("nan"),
        "dead_share": float(np.mean(fired == 0)),
    }
    return result if lm is None else result | ce_recovered(d, *lm)


@functools.partial(jax.jit, static_argnames=("cfg", "mode"))
def splice_nll(
    cfg: Any, params: Any, d: Dictionary, tokens_BT: Array, lengths_B: Array, keep_BT: Array, mode: str
) -> tuple[Array, Array]:
    """(summed next-token negative log-likelihood, number of predictions) with the SAE's tap replaced.

    mode: "clean" changes nothing, "sae" splices the reconstruction in, "zero" zeros. Positions in keep_BT stay.
    """
    edit = {
        "clean": lambda x: x,
        "sae": lambda x: jnp.where(keep_BT[..., None], x, reconstruct(d, x)),
        "zero": lambda x: jnp.where(keep_BT[..., None], x, jnp.zeros_like(x)),
    }[mode]
    edits = None if mode == "clean" else {d.cfg.hook_name: edit}
    hidden = models.forward(cfg, params, tokens_BT, lengths=lengths_B, interventions=edits).hidden

    def row(inputs):
        hidden_TD, tokens_T, length = inputs
        logits = models.unembed(cfg, params, hidden_TD[:-1])
        own = jnp.take_along_axis(logits, tokens_T[1:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - own
        return jnp.sum(jnp.where(jnp.arange(1, tokens_T.shape[0]) < length, nll, 0.0))

    total = jnp.sum(lax.map(row, (hidden, tokens_BT, lengths_B)))  # a row at a time: logits of a batch are large
    return total, jnp.sum(jnp.maximum(lengths_B - 1, 0))


def ce_recovered(
    d: Dictionary,
    cfg: Any,
    params: Any,
    token_rows: TokenRows,
    *,
    batch_size: int = 16,
    context_size: int | None = None,
    skip_bos: bool = True,
) -> dict[str, float]:
    """Share of the cross-entropy lost by zeroing the SAE's tap that splicing its reconstruction in wins back:
    (ce_zero - ce_sae) / (ce_zero - ce_clean), with the three means over all predicted tokens (nats).

    skip_bos leaves the tap as it is where a row opens with BOS, for dictionaries trained without it.
    """
    if d.cfg.hook_name is None:
        raise SAEError("ce_recovered: the SAE's config names no hook_name; set it to the tap it was trained on")
    context_size = min(context_size or d.cfg.context_size or cfg.max_position, cfg.max_position)
    totals, count = dict.fromkeys(("clean", "sae", "zero"), 0.0), 0
    for tokens, lengths, opens in token_batches(token_rows, batch_size, context_size):
        if tokens.shape[1] < 2:
            continue
        keep = np.zeros(tokens.shape, bool)
        if skip_bos and cfg.bos_token_id is not None:
            keep[:, 0] = opens & (tokens[:, 0] == cfg.bos_token_id)
        for mode in totals:
            nll, predictions = splice_nll(cfg, params, d, tokens, lengths, keep, mode)
            totals[mode] += float(nll)
        count += int(predictions)
    if not count:
        raise SAEError("ce_recovered: no row has two tokens; nothing is predicted")
    ce = {f"ce_{mode}": total / count for mode, total in totals.items()}
    lost = ce["ce_zero"] - ce["ce_clean"]
    return {"ce_recovered": (ce["ce_zero"] - ce["ce_sae"]) / lost if lost else float("nan"), **ce}
