"""Which latents of a dictionary speak for a signal, what they fire on, and a plane to see prompts in feature space."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import models
import sae
from jaxrl_llm.curation.processes import on_host
from sae.harvest import tap


def telling_latents(
    cfg: models.ModelConfig,
    params: Any,
    dictionary: sae.Dictionary,
    tokens: Sequence[Sequence[int]],
    targets: Mapping[str, np.ndarray],
    tokenizer: Any,
    *,
    latents: int = 4,
    contexts: int = 4,
    min_share: float = 0.01,
    batch_rows: int = 128,
) -> list[dict[str, Any]]:
    """For each target (name -> [N] values of the rows), the `latents` whose pooled activation correlates most with it.

    tokens: N token lists. A latent is pooled as log(1 + max over the row); those active in less than `min_share` of the rows
    are left out. Each record has id, drives, effect (Pearson correlation, signed), density (share of rows) and contexts: the
    rows where it fires most, with one activation a token.
    """
    codes = [_codes(cfg, params, dictionary, tokens[i : i + batch_rows]) for i in range(0, len(tokens), batch_rows)]
    values, indices = (np.concatenate([_widen(c[k], codes) for c in codes]) for k in (0, 1))  # [N, T, K]
    pooled = np.zeros((len(tokens), dictionary.cfg.d_sae), np.float32)
    np.maximum.at(pooled, (np.arange(len(tokens))[:, None, None], indices), values)
    density = (pooled > 0).mean(axis=0)
    x = np.log1p(pooled)
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)
    records = []
    for name, target in targets.items():
        y = np.asarray(target, float)
        correlation = x.T @ ((y - y.mean()) / max(y.std(), 1e-12)) / len(y)
        correlation[density < min_share] = 0.0
        for latent in np.argsort(-np.abs(correlation))[:latents]:
            top = np.argsort(-pooled[:, latent], kind="stable")[:contexts]
            shown = [_context(tokenizer, tokens[row], values[row], indices[row], latent) for row in top if pooled[row, latent] > 0]
            records.append(
                {
                    "id": int(latent),
                    "drives": name,
                    "effect": float(correlation[latent]),
                    "effect_label": "correlation",
                    "density": float(density[latent]),
                    "contexts": shown,
                }
            )
    return records


def plane(vectors: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """{"x", "y", "method"}: the rows of [N, d] on a plane, by t-SNE from a PCA start (PCA alone for under 50 rows)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    vectors = np.asarray(vectors, np.float32)
    if len(vectors) < 50:
        xy, method = PCA(2, random_state=seed).fit_transform(vectors), "PCA of SAE features"
    else:
        xy = TSNE(2, init="pca", perplexity=30, random_state=seed, max_iter=500).fit_transform(vectors)
        method = "t-SNE of SAE features (distances between far groups mean little)"
    return {"x": xy[:, 0], "y": xy[:, 1], "method": method}


def _codes(cfg, params, dictionary, rows) -> tuple[np.ndarray, np.ndarray]:
    """(values, latent indices) [B, T, K] of the rows' tokens; padding has value 0."""
    width = max(len(r) for r in rows)
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    lengths = np.array([len(r) for r in rows], np.int32)
    hook = dictionary.cfg.hook_name
    x = tap(cfg, params, jnp.asarray(padded), jnp.asarray(lengths), (hook,))
    values, indices = map(on_host, sae.encode_topk(dictionary, x.astype(jnp.float32)))
    counted = np.arange(width) < lengths[:, None]
    counted[:, 0] &= np.array([row[0] != cfg.bos_token_id for row in rows])
    return np.where(counted[..., None], values, 0.0), indices


def _widen(array: np.ndarray, codes) -> np.ndarray:
    """[B, T, K] padded with zeros to the widest batch."""
    width = max(values.shape[1] for values, _ in codes)
    return np.pad(array, ((0, 0), (0, width - array.shape[1]), (0, 0)))


def _context(tokenizer, tokens, values, indices, latent) -> dict[str, Any]:
    fired = np.where(indices == latent, values, 0.0).max(axis=-1)[: len(tokens)]
    return {"tokens": _token_texts(tokenizer, tokens), "activations": fired.astype(float)}


def _token_texts(tokenizer, tokens) -> list[str]:
    """What each token adds to the text, spaces included, which a token decoded alone may lack."""
    upto = [tokenizer.decode(tokens[:i]) for i in range(len(tokens) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(upto)]
