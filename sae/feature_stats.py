"""Statistics of many latents over a stream of sparse activations, in bounded memory: histograms, co-firing, the best contexts of each.

None of them depends on how the stream is cut into batches. Letters: E entries (one firing of one latent), N latents, C kept contexts.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse


class Histogram:
    """Counts of positive values for each of N latents in `bins` linear bins, whose range doubles whenever a larger value comes.

    Two neighbouring bins then become one, exactly, so that the counts are those of the last range; ranges are powers of two.
    """

    def __init__(self, n: int, bins: int = 64, least: float = 2.0**-20):
        self.counts_NB = np.zeros((n, bins), np.int64)
        self.range_N = np.full(n, least)

    def add(self, slots_E: np.ndarray, values_E: np.ndarray) -> None:
        """Counts one value of each latent named."""
        n, bins = self.counts_NB.shape
        largest = np.zeros(n)
        np.maximum.at(largest, slots_E, values_E)
        while len(wide := np.flatnonzero(largest >= self.range_N)):
            pairs = self.counts_NB[wide].reshape(len(wide), bins // 2, 2).sum(axis=2)
            self.counts_NB[wide] = np.pad(pairs, ((0, 0), (0, bins - bins // 2)))
            self.range_N[wide] *= 2
        at = np.minimum((values_E / self.range_N[slots_E] * bins).astype(np.int64), bins - 1)
        self.counts_NB += np.bincount(slots_E * bins + at, minlength=n * bins).reshape(n, bins)

    def of(self, slot: int) -> dict[str, object]:
        """{"width": of a bin, "counts": of the bins from 0 up to the last that holds something}."""
        counts = self.counts_NB[slot]
        filled = np.flatnonzero(counts)
        width = float(self.range_N[slot] / len(counts))
        return {"width": width, "counts": counts[: filled[-1] + 1].tolist() if len(filled) else []}


class CoFiring:
    """At how many tokens two of N latents fire together."""

    def __init__(self, n: int):
        self.joint_NN = np.zeros((n, n), np.int32)
        self.tokens = 0

    def add(self, tokens_E: np.ndarray, slots_E: np.ndarray, n_tokens: int) -> None:
        """tokens_E: the token of each entry, counted within this call, of n_tokens."""
        n = len(self.joint_NN)
        fired = sparse.csr_matrix((np.ones(len(slots_E), np.int32), (tokens_E, slots_E)), shape=(n_tokens, n))
        both = (fired.T @ fired).tocoo()
        self.joint_NN[both.row, both.col] += both.data
        self.tokens += n_tokens

    def of(self, slot: int, most: int) -> list[tuple[int, float, float]]:
        """(other latent, Jaccard index, phi coefficient) of those that fire most together with it, by the Jaccard index.

        Jaccard: tokens with both over tokens with either. phi: the correlation of the two as 0 / 1 variables.
        """
        both, own = self.joint_NN[slot].astype(np.float64), np.diagonal(self.joint_NN).astype(np.float64)
        jaccard = both / np.maximum(own[slot] + own - both, 1)
        jaccard[slot] = 0
        spread = np.sqrt(own[slot] * (self.tokens - own[slot])) * np.sqrt(own * (self.tokens - own))
        phi = np.divide(self.tokens * both - own[slot] * own, spread, out=np.zeros_like(both), where=spread > 0)
        order = np.argsort(-jaccard, kind="stable")[:most]
        return [(int(j), float(jaccard[j]), float(phi[j])) for j in order if jaccard[j] > 0]


class Kept:
    """For each of N latents the `most` contexts with the smallest keys: (key, value, number of the text, place of the peak in it)."""

    def __init__(self, n: int, most: int):
        self.keys_NC = np.full((n, most), np.inf)
        self.values_NC = np.zeros((n, most), np.float32)
        self.texts_NC = np.full((n, most), -1, np.int64)
        self.places_NC = np.zeros((n, most), np.int32)

    def add(self, slots_E: np.ndarray, keys_E: np.ndarray, values_E: np.ndarray, texts_E: np.ndarray, places_E: np.ndarray) -> None:
        """Offers contexts, at most one for each latent and text over all calls; of equal keys the earlier text wins."""
        most = self.keys_NC.shape[1]
        if not most:
            return
        hopeful = keys_E <= self.keys_NC[slots_E, -1]
        new = [a[hopeful] for a in (slots_E, keys_E, values_E, texts_E, places_E)]
        touched = np.unique(new[0])
        tables = (self.keys_NC, self.values_NC, self.texts_NC, self.places_NC)
        slots = np.concatenate([np.repeat(touched, most), new[0]])
        columns = [np.concatenate([table[touched].reshape(-1), added]) for table, added in zip(tables, new[1:], strict=True)]
        order = np.lexsort((columns[2], columns[0], slots))
        slots = slots[order]
        first = np.searchsorted(slots, touched)
        rank = np.arange(len(slots)) - first[np.searchsorted(touched, slots)]
        kept = rank < most
        for table, column in zip(tables, columns, strict=True):
            table[slots[kept], rank[kept]] = column[order][kept]

    def of(self, slot: int) -> list[tuple[float, int, int]]:
        """(value, text, place) of a latent's contexts, by their keys."""
        there = np.flatnonzero(self.texts_NC[slot] >= 0)
        return [(float(self.values_NC[slot, i]), int(self.texts_NC[slot, i]), int(self.places_NC[slot, i])) for i in there]


def peaks(slots_E: np.ndarray, texts_E: np.ndarray, places_E: np.ndarray, values_E: np.ndarray) -> tuple[np.ndarray, ...]:
    """(slots, texts, places, values) of the strongest firing of each latent in each text; of equal ones the first."""
    order = np.lexsort((places_E, -values_E, texts_E, slots_E))
    slots, texts = slots_E[order], texts_E[order]
    first = np.ones(len(order), bool)
    first[1:] = (slots[1:] != slots[:-1]) | (texts[1:] != texts[:-1])
    chosen = order[first]
    return slots_E[chosen], texts_E[chosen], places_E[chosen], values_E[chosen]


def priorities(seed: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each pair, the same whenever it is asked for: the pairs with the smallest are a random sample of all.

    The finaliser of splitmix64 (Steele et al. 2014), twice.
    """
    with np.errstate(over="ignore"):
        x = (np.asarray(one).astype(np.uint64) << np.uint64(32)) ^ np.asarray(other).astype(np.uint64)
        for salt in (np.uint64(seed % 2**32), np.uint64(0x9E3779B97F4A7C15)):
            x = x + salt + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
