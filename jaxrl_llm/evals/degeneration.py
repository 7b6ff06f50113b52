"""Is the text still text? Guards against a policy that finds its reward in a corner: repetition, lost variety, lost language.

A policy that is rewarded by rules alone may keep to them with one sentence said again and again, or with words that are none. No one
number shows that, so these are read together: variety over the samples (distinct-n, Li et al. 2016, arXiv:1510.03055), repetition
inside a sample, the share of words that the corpus knows, and how likely the samples are under the policy before training.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.train.forward import completion_logprobs

_WORD = re.compile(r"[A-Za-z']+")


def _words(text: str) -> list[str]:
    return [word.strip("'").lower() for word in _WORD.findall(text)]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all n-grams of all texts together; NaN where there is none. Compare only equally many words."""
    grams = [gram for text in texts for gram in _ngrams(_words(text), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated_share(texts: Sequence[str], n: int = 3) -> float:
    """The mean over texts of the share of a text's word n-grams that stood in it before; NaN where no text has n words."""
    shares = [1 - len(set(grams)) / len(grams) for grams in (_ngrams(_words(text), n) for text in texts) if grams]
    return float(np.mean(shares)) if shares else float("nan")


def known_word_share(texts: Sequence[str], vocabulary: Collection[str]) -> float:
    """The share of all words that are in `vocabulary` (small letters); NaN where there is no word."""
    written = [word for text in texts for word in _words(text)]
    return sum(word in vocabulary for word in written) / len(written) if written else float("nan")


def vocabulary_of(texts: Sequence[str], min_count: int = 2) -> frozenset[str]:
    """The words, in small letters, that occur at least min_count times in texts."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in _words(text):
            counts[word] = counts.get(word, 0) + 1
    return frozenset(word for word, count in counts.items() if count >= min_count)


@functools.partial(jax.jit, static_argnums=0)
def _row_logps(cfg, params, prompts_NP, prompt_lengths_N, completions_NC, lengths_N):
    logps_NC, _ = completion_logprobs(cfg, params, prompts_NP, prompt_lengths_N, completions_NC, lengths_N, shared_prefix=False)
    return jnp.sum(jnp.where(jnp.arange(completions_NC.shape[1]) < lengths_N[:, None], logps_NC, 0.0), axis=1)


def mean_nll(
    cfg: models.ModelConfig,
    params,
    prompts: PromptBatch,
    group_ids: Sequence[int] | np.ndarray,
    completions: Sequence[Sequence[int]],
    *,
    batch_rows: int = 256,
) -> float:
    """Negative log-probability of the completions given their prompts under a model at temperature 1: nats a token, over all tokens.

    group_ids: the prompt of each completion, an index into `prompts`. completions: lists of token ids, empty ones do not count.
    Raises ValueError where no completion has a token.
    """
    tokens = sum(map(len, completions))
    if not tokens:
        raise ValueError("mean_nll: no completion has a token")
    return float(row_nlls(cfg, params, prompts, group_ids, completions, batch_rows=batch_rows).sum() / tokens)


def row_nlls(
    cfg: models.ModelConfig,
    params,
    prompts: PromptBatch,
    group_ids: Sequence[int] | np.ndarray,
    completions: Sequence[Sequence[int]],
    *,
    batch_rows: int = 256,
) -> np.ndarray:
    """float64 [completions]: of each its nats, 0 of an empty one; arguments as of `mean_nll`."""
    rows = [i for i, completion in enumerate(completions) if len(completion)]
    width = max((len(completions[i]) for i in rows), default=0)
    found = np.zeros(len(completions))
    for start in range(0, len(rows), batch_rows):
        chosen = rows[start : start + batch_rows]
        count = batch_rows if len(rows) > batch_rows else len(chosen)  # one shape, one compilation; empty rows at the end
        completions_NC = np.zeros((count, width), np.int32)
        lengths_N = np.zeros(count, np.int32)
        of_prompt = np.zeros(count, np.int64)
        for row, i in enumerate(chosen):
            lengths_N[row], of_prompt[row] = len(completions[i]), group_ids[i]
            completions_NC[row, : lengths_N[row]] = completions[i]
        logps_N = _row_logps(cfg, params, prompts.tokens_NT[of_prompt], prompts.lengths_N[of_prompt], completions_NC, lengths_N)
        found[chosen] = -np.asarray(logps_N, np.float64)[: len(chosen)]
    return found
