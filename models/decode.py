"""What both ways of decoding share (`models.generate`'s stages, `models.refill`'s places): the static plan of a call, one step's draw,
and where a stop string cuts a completion. Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig
from models.sampling import sample

FINISH_LENGTH, FINISH_STOP_TOKEN, FINISH_STOP_STRING = 0, 1, 2
STAGE = 32  # tokens that are decoded before the host may look; of the plain loop's caches, the slots of the first


class Plan(NamedTuple):
    """The static part of a call: one compilation a distinct value (and shapes)."""

    cfg: ModelConfig
    num_samples: int
    max_new_tokens: int  # the most that any row may have
    greedy: bool
    top_k: int
    use_top_p: bool
    stop_tokens: tuple[int, ...]
    unroll: bool  # a Python loop over layers, their caches apart, rather than a scan over all of them stacked


class Knobs(NamedTuple):
    """The part of a call that is not compiled in: the key of its randomness, the sampling settings, and edits of activations by name."""

    key: Array
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    edits: dict[str, Any] | None = None


class Rows(NamedTuple):
    """What is known of each row before it is decoded: its number in the random stream, and the most tokens it may have."""

    ids_B: Int[Array, " B"]
    limits_B: Int[Array, " B"]


class Draw(NamedTuple):
    """One step's tokens: 0 where a row is not live. ended: live, and that was its last one; hit: for it was a stop token."""

    tokens_B: Int[Array, " B"]
    logps_B: Float[Array, " B"]
    hit_B: Bool[Array, " B"]
    ended_B: Bool[Array, " B"]


def uniforms(key: Array, row_ids_B: Int[Array, " B"], steps_B: Int[Array, " B"]) -> Float[Array, "B 2"]:
    """Two numbers in [0, 1) a row that depend on the key, the row's number and how many tokens it has, and on nothing else."""
    row_key = lambda row, step: jax.random.fold_in(jax.random.fold_in(key, row), step)  # noqa: E731
    return jax.vmap(lambda row, step: jax.random.uniform(row_key(row, step), (2,)))(row_ids_B, steps_B)


def draw_next(
    plan: Plan, knobs: Knobs, rows: Rows, logits_BV: Float[Array, "B V"], lengths_B: Int[Array, " B"], live_B: Bool[Array, " B"]
) -> Draw:
    """Samples the next token of each live row, which has lengths_B so far."""
    noise = None if plan.greedy else uniforms(knobs.key, rows.ids_B, lengths_B)
    top_p = knobs.top_p if plan.use_top_p else None
    tokens, logps = sample(logits_BV, noise, temperature=knobs.temperature, greedy=plan.greedy, top_k=plan.top_k, top_p=top_p)
    tokens, logps = jnp.where(live_B, tokens, 0), jnp.where(live_B, logps, 0.0)
    hit = live_B & functools.reduce(jnp.logical_or, (tokens == s for s in plan.stop_tokens), jnp.zeros_like(live_B))
    return Draw(tokens, logps, hit, hit | (live_B & (lengths_B + 1 >= rows.limits_B)))


def stop_string_cut(tokens: list[int], stop_strings: Sequence[str], tokenizer: Any) -> int:
    """How many tokens it takes until the text holds a stop string; 0 where it never does."""
    holds = lambda n: any(s in tokenizer.decode(tokens[:n]) for s in stop_strings)  # noqa: E731
    if not holds(len(tokens)):
        return 0
    low, high = 1, len(tokens)
    while low < high:  # a text that holds it still does when longer, so the first such length can be bisected
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def bucket(n: int, minimum: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (powers of two and halfway between) not below n or minimum."""
    n = max(n, minimum, 1)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def pad_prompts(prompts: Sequence[Sequence[int]], width: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, width] right-padded tokens and [n] lengths; rows past the prompts have length 0."""
    tokens, lengths = np.zeros((n, width), np.int32), np.zeros(n, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    return tokens, lengths
