"""What a dictionary's latents fire on, gathered from text in a few passes: the data of feature pages and of automatic labels.

The first pass counts how often every latent fires, to choose among those that do; the second gathers statistics of the chosen ones and
remembers where their contexts are; the third reads the activations in these contexts alone. Nothing grows with the number of tokens.
Letters: B rows, T tokens, D d_in, F d_sae, K kept latents, N chosen latents, V vocabulary, E entries.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.config import BLOCK_NORMS
from sae.dictionary import Dictionary, architecture, encode, encode_topk
from sae.errors import SAEError
from sae.feature_stats import CoFiring, Histogram, Kept, peaks, priorities
from sae.harvest import left_out, tap, token_batches
from sae.interventions import latents_of

MOST_FEATURES = 8192  # on one page: their co-firing counts are a square of so many
TOKENS_SHOWN = 10  # of the logits that a latent raises and lowers most


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """features: how many latents, drawn at random among those that fire (all where there are no more), or a tuple of their ids.
    top: contexts with the strongest activations; sampled: further ones, evenly spread over the quantiles of a random sample of the texts in
    which the latent fires; random: contexts drawn from all texts. A context reaches from `before` tokens before its peak to `after` after it.
    related: nearest and co-firing latents. batch_rows, context_size (None: the model's): how texts are run; longer ones are cut into pieces.
    skip_first: leave so many first positions of each piece out, as in training; drop_tokens: and these ids, wherever they stand. seed: of draws.
    """

    features: int | tuple[int, ...] = 1000
    top: int = 12
    sampled: int = 8
    random: int = 64
    before: int = 20
    after: int = 11
    bins: int = 64
    related: int = 8
    batch_rows: int = 32
    context_size: int | None = None
    skip_first: int = 1
    drop_tokens: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        least = {"top": 1, "sampled": 0, "random": 0, "before": 0, "after": 0, "bins": 2, "related": 0, "batch_rows": 1, "context_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise SAEError(f"feature data: {name} is {value}; give {lowest} or more")
        if self.bins % 2:
            raise SAEError(f"feature data: bins is {self.bins}; give an even number, since two bins become one where values are large")
        ids = self.features if isinstance(self.features, tuple) else ()
        number = len(ids) if isinstance(self.features, tuple) else self.features
        if not 1 <= number <= MOST_FEATURES:
            raise SAEError(f"feature data: {number} features; give 1 to {MOST_FEATURES}")
        if len(set(ids)) < len(ids):
            raise SAEError("feature data: a feature is named twice")


def collect(
    cfg: Any,
    params: Any,
    d: Dictionary,
    token_rows: Sequence[Sequence[int]],
    settings: CollectConfig | None = None,
    *,
    unembed_DV: Float[Array, "D V"] | None = None,
    progress: Callable[[Any, str], Any] | None = None,
) -> dict[str, Any]:
    """Plain values (numbers, texts, lists) about the latents of `d` on `token_rows`, lists of token ids that can be read several times.

    cfg, params: of the model; d.cfg.hook_name names the tap. unembed_DV: of `models.unembed_matrix`; where the decoder writes into the
    residual stream, or before a matrix that does (`readout`), W_dec @ unembed are the logits that a latent raises and lowers directly, that
    is without the final norm and the layers between. progress: (iterable, name) -> iterable, such as tqdm.

    "features": for each latent id, count (tokens at which it fires), density (their share), mean and max (of its activations where it
    fires), histogram ({"width", "counts"}), contexts ({"kind": "top" or "sampled", "text", "first", "tokens": ids, "fires": [place,
    activation] of each firing, "peak"}), logits ({"raised", "lowered"}: [token id, logit] pairs, or None), near ([id, cosine of the decoder
    rows], of all latents), together ([id, Jaccard, phi], of those here). "random": contexts with "fired", the ids that fire in them. "tokens",
    "texts" (pieces), "alive" (latents that fire at all; None where ids were given), "d_sae", "d_in", "hook", "architecture".

    Raises SAEError for a dictionary without a tap, a latent that it has not, no text, and texts on which no latent fires.
    """
    s = settings or CollectConfig()
    if d.cfg.hook_name is None:
        raise SAEError("feature data: the SAE's config names no hook_name; set it to the tap it was trained on")
    reader = _Reader(cfg, params, d, token_rows, s, progress or (lambda items, name: items))
    ids, alive = _choose(reader, s)
    stats = _statistics(reader, ids, s)
    relations = _relations(d, ids, s, readout(cfg, params, d, unembed_DV))
    wanted = {text for kept in (stats.top, stats.sample, stats.random) for text in np.unique(kept.texts_NC).tolist() if text >= 0}
    return {
        "hook": d.cfg.hook_name, "architecture": d.cfg.architecture, "d_sae": d.cfg.d_sae, "d_in": d.cfg.d_in, "alive": alive,
        "tokens": stats.tokens, "texts": reader.texts, **_contexts(reader, ids, stats, wanted, s, relations),
    }  # fmt: skip


class _Reader:
    """Runs the model over the texts, batch by batch."""

    def __init__(self, cfg, params, d, token_rows, s: CollectConfig, progress):
        self.cfg, self.params, self.d, self.rows, self.s, self.progress = cfg, params, d, token_rows, s, progress
        self.context = min(s.context_size or cfg.max_position, cfg.max_position)
        self.texts = sum(-(-len(row) // self.context) for row in token_rows)
        if not self.texts:
            raise SAEError("feature data: there is no text")

    def batches(self, name: str, wanted: set[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens_BT, activations_BTD, which tokens count, numbers of the texts [B], -1 = none) of all texts or of those wanted."""
        pieces = (row[i : i + self.context] for row in self.rows for i in range(0, len(row), self.context))
        numbered = [n for n in range(self.texts) if wanted is None or n in wanted]
        chosen = (piece for n, piece in enumerate(pieces) if wanted is None or n in wanted)
        batches = token_batches(chosen, self.s.batch_rows, self.context)
        for i, (tokens, lengths, _) in enumerate(self.progress(batches, name)):
            group = numbered[i * self.s.batch_rows : (i + 1) * self.s.batch_rows]
            numbers = np.full(len(tokens), -1, np.int64)
            numbers[: len(group)] = group
            keep = (np.arange(tokens.shape[1]) < lengths[:, None]) & ~left_out(tokens, self.s.skip_first, self.s.drop_tokens)
            yield tokens, tap(self.cfg, self.params, tokens, lengths, (self.d.cfg.hook_name,)), keep, numbers


@jax.jit
def _counts(d: Dictionary, x_BTD: Array, keep_BT: Array) -> Array:
    """[F] at how many of the kept tokens each latent fires."""
    count = lambda row: jnp.sum((encode(d, row[0]) > 0) & row[1][:, None], axis=0)  # noqa: E731  (a row at a time: codes are large)
    return jnp.sum(lax.map(count, (x_BTD, keep_BT)), axis=0)


@jax.jit
def _some(d: Dictionary, x_BTD: Array, keep_BT: Array, ids_N: Array) -> Array:
    """[B, T, N] activations of the chosen latents, 0 where a token does not count."""
    return lax.map(lambda row: jnp.where(row[1][:, None], latents_of(d, row[0], ids_N), 0.0), (x_BTD, keep_BT))


@jax.jit
def _kept(d: Dictionary, x_BTD: Array, keep_BT: Array) -> tuple[Array, Array]:
    """Values and ids [B, T, K] of the kept latents."""
    values, ids = encode_topk(d, x_BTD)
    return jnp.where(keep_BT[..., None], values, 0.0), ids


def _entries(d: Dictionary, x, keep, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, token, slot, value) [E] of every firing of a chosen latent; a slot is a place in ids_N."""
    if architecture(d.cfg).encode_sparse is not None:
        values, found = jax.device_get(_kept(d, x, keep))
        slot_of = np.full(d.cfg.d_sae, -1, np.int64)
        slot_of[ids_N] = np.arange(len(ids_N))
        rows, tokens, k = np.nonzero((values > 0) & (slot_of[found] >= 0))
        return rows, tokens, slot_of[found[rows, tokens, k]], values[rows, tokens, k]
    z = np.asarray(_some(d, x, keep, jnp.asarray(ids_N)))
    rows, tokens, slots = np.nonzero(z > 0)
    return rows, tokens, slots, z[rows, tokens, slots]


def _choose(reader: _Reader, s: CollectConfig) -> tuple[np.ndarray, int | None]:
    """(ids of the chosen latents, rising; how many fire at all, where that was counted)."""
    width = reader.d.cfg.d_sae
    if isinstance(s.features, tuple):
        wrong = [f for f in s.features if not 0 <= f < width]
        if wrong:
            raise SAEError(f"feature data: there is no latent {wrong[0]}; the dictionary has 0 to {width - 1}")
        return np.sort(np.array(s.features, np.int64)), None
    counts = np.zeros(width, np.int64)
    for _, x, keep, _ in reader.batches("counting"):
        counts += np.asarray(_counts(reader.d, x, keep))
    alive = np.flatnonzero(counts)
    if not len(alive):
        raise SAEError("feature data: no latent fires on these texts; are they of the kind that the dictionary was trained on?")
    drawn = np.random.default_rng(s.seed).permutation(alive)[: s.features]
    return np.sort(drawn), len(alive)


@dataclasses.dataclass
class _Statistics:
    count_N: np.ndarray
    sum_N: np.ndarray
    max_N: np.ndarray
    histogram: Histogram
    together: CoFiring
    top: Kept
    sample: Kept
    random: Kept
    tokens: int = 0


def _statistics(reader: _Reader, ids: np.ndarray, s: CollectConfig) -> _Statistics:
    n = len(ids)
    sample = 4 * s.sampled + s.top if s.sampled else 0  # those that are among the top ones are left out later
    kept = Kept(n, s.top), Kept(n, sample), Kept(1, s.random)
    found = _Statistics(np.zeros(n, np.int64), np.zeros(n), np.zeros(n), Histogram(n, s.bins), CoFiring(n), *kept)
    for _, x, keep, numbers in reader.batches("statistics"):
        rows, tokens, slots, values = _entries(reader.d, x, keep, ids)
        found.tokens += int(keep.sum())
        found.count_N += np.bincount(slots, minlength=n)
        found.sum_N += np.bincount(slots, values.astype(np.float64), minlength=n)
        np.maximum.at(found.max_N, slots, values)
        found.histogram.add(slots, values)
        flat = np.cumsum(keep.reshape(-1)) - 1  # of the kept tokens, the how-manieth
        found.together.add(flat[rows * keep.shape[1] + tokens], slots, int(keep.sum()))
        slots, texts, places, values = peaks(slots, numbers[rows], tokens, values)
        found.top.add(slots, -values, values, texts, places)
        found.sample.add(slots, priorities(s.seed, texts, ids[slots]), values, texts, places)
        held = np.flatnonzero(keep.any(axis=1))
        if s.random and len(held):
            lengths = keep[held].sum(axis=1)
            first = keep[held].argmax(axis=1)
            middle = first + (priorities(s.seed + 1, numbers[held], held * 0) * lengths).astype(np.int64)
            zeros = np.zeros(len(held), np.int64)
            found.random.add(zeros, priorities(s.seed + 2, numbers[held], zeros), zeros, numbers[held], middle)
    return found


def readout(cfg: Any, params: Any, d: Dictionary, unembed_DV: Any) -> Array | None:
    """[E, V] the logits of what the decoder writes: the unembedding, behind the output projection where that is what comes next ("attn_z",
    "mlp_act"); None where a norm, an activation or nothing of the kind lies between."""
    if unembed_DV is None:
        return None
    block, _, kind = (d.cfg.place or "").rpartition(".")
    projections = {"attn_z": ("o", "attn_post_norm"), "mlp_act": ("down", "mlp_post_norm")}
    if kind in projections:
        name, norm = projections[kind]
        if norm in BLOCK_NORMS[cfg.block]:
            return None
        projection = params["blocks"][name][int(block.removeprefix("blocks."))].reshape(-1, cfg.d_model)
        unembed_DV = projection.astype(jnp.float32) @ jnp.asarray(unembed_DV, jnp.float32)
    elif kind not in ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm"):
        return None
    return unembed_DV if unembed_DV.shape[0] == d.cfg.out else None


def _relations(d: Dictionary, ids: np.ndarray, s: CollectConfig, unembed_DV: Any) -> list[dict[str, Any]]:
    """Of each chosen latent: near, and logits where there is a `readout`."""
    writes = d.params["W_dec"].astype(jnp.float32)
    units = writes / jnp.maximum(jnp.linalg.norm(writes, axis=1, keepdims=True), 1e-12)
    most = min(s.related + 1, d.cfg.d_sae)
    found = []
    for start in range(0, len(ids), 128):
        part = jnp.asarray(ids[start : start + 128])
        cosines, near = jax.device_get(_nearest(units, part, most))
        logits = None
        if unembed_DV is not None:
            logits = jax.device_get(_logits(writes, part, jnp.asarray(unembed_DV), min(TOKENS_SHOWN, unembed_DV.shape[1])))
        for i, own in enumerate(np.asarray(part).tolist()):
            pairs = lambda values, which: [[int(t), float(v)] for v, t in zip(values, which, strict=True)]  # noqa: E731
            others = [[f, c] for f, c in pairs(cosines[i], near[i]) if f != own][: s.related]
            told = None if logits is None else {"raised": pairs(logits[0][i], logits[1][i]), "lowered": pairs(-logits[2][i], logits[3][i])}
            found.append({"near": others, "logits": told})
    return found


@functools.partial(jax.jit, static_argnames="most")
def _nearest(units_FD, ids, most):
    return lax.top_k(units_FD[ids] @ units_FD.T, most)


@functools.partial(jax.jit, static_argnames="most")
def _logits(writes_FD, ids, unembed_DV, most):
    logits = jnp.einsum("nd,dv->nv", writes_FD[ids], unembed_DV.astype(jnp.float32))
    return (*lax.top_k(logits, most), *lax.top_k(-logits, most))


def _contexts(reader: _Reader, ids, stats: _Statistics, wanted: set[int], s: CollectConfig, relations) -> dict[str, Any]:
    """The records of features and random contexts, with the activations read from the texts in `wanted`."""
    places: dict[int, list[tuple[int, int, str, int]]] = {}  # of each text: (slot, peak, kind, rank) of the contexts in it
    for slot in range(len(ids)):
        top = stats.top.of(slot)
        rest = sorted(set(stats.sample.of(slot)) - set(top), reverse=True)
        spread = [rest[i] for i in np.unique(np.linspace(0, len(rest) - 1, min(s.sampled, len(rest))).round().astype(int))] if rest else []
        for kind, listed in (("top", top), ("sampled", spread)):
            for rank, (_, text, peak) in enumerate(listed):
                places.setdefault(text, []).append((slot, peak, kind, rank))
    for rank, (_, text, middle) in enumerate(stats.random.of(0)):
        places.setdefault(text, []).append((-1, middle, "random", rank))
    ranked: list[list[tuple]] = [[] for _ in ids]
    random: list[tuple] = []
    for tokens, x, keep, numbers in reader.batches("contexts", wanted):
        rows, at, slots, values = _entries(reader.d, x, keep, ids)
        lengths = keep.shape[1] - keep[:, ::-1].argmax(axis=1)  # up to the last token that counts
        for row, text in enumerate(numbers.tolist()):
            mine = rows == row
            own_at, own_slots, own_values = at[mine], slots[mine], values[mine]
            for slot, peak, kind, rank in places.get(text, ()):
                first, end = max(peak - s.before, 0), min(peak + s.after + 1, int(lengths[row]))
                inside = (own_at >= first) & (own_at < end)
                shown = {"kind": kind, "text": text, "first": first, "tokens": tokens[row, first:end].tolist()}
                if slot < 0:
                    random.append((rank, shown | {"fired": np.unique(ids[own_slots[inside]]).tolist()}))
                    continue
                inside &= own_slots == slot
                fires = [[int(i) - first, float(v)] for i, v in zip(own_at[inside], own_values[inside], strict=True)]
                ranked[slot].append((kind != "top", rank, shown | {"fires": fires, "peak": peak - first}))
    features = []
    for slot, latent in enumerate(ids.tolist()):
        count = int(stats.count_N[slot])
        record = {"id": latent, "count": count, "density": count / max(stats.tokens, 1), "max": float(stats.max_N[slot])}
        record |= {"mean": float(stats.sum_N[slot] / max(count, 1)), "histogram": stats.histogram.of(slot), **relations[slot]}
        record["together"] = [[int(ids[j]), jaccard, phi] for j, jaccard, phi in stats.together.of(slot, s.related)]
        record["contexts"] = [context for *_, context in sorted(ranked[slot], key=lambda item: item[:2])]
        features.append(record)
    return {"features": features, "random": [context for _, context in sorted(random, key=lambda item: item[0])]}
