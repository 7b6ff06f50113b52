"""Sampling completions: each prompt is prefilled once for all its samples, then one jitted loop decodes every row.

`generate` takes lists of token ids and returns a `Rollout`; `sample_tokens` is its jitted core on device arrays. The
keys and values of the P prompts are kept once and read by the G samples of each; a row's own tokens go to caches that
follow each other in stages, so that early steps do not attend to slots that are still empty and a full cache is never
copied. Randomness belongs to a row (key, row number, step): the same seed gives the same completions however rows are
padded or split into batches.
Letters: P prompts, G samples a prompt, B = P * G rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from models.checks import check_prompts
from models.config import ModelConfig
from models.decode import (
    FINISH_LENGTH,
    FINISH_STOP_STRING,
    FINISH_STOP_TOKEN,
    STAGE,
    Knobs,
    Plan,
    Rows,
    bucket,
    draw_next,
    pad_prompts,
    stop_string_cut,
)
from models.errors import ModelError
from models.refill import decode_refilled
from models.sharding import batch_ways, fetch, place_rows
from models.taps import Interventions, as_edits
from models.transformer import KV, KVCache, Params, forward, fused, init_cache, unembed, unstacked

UNROLLED_LAYERS = 8  # up to so many, a Python loop over the layers; above, a scan, whose program is one layer's, however many there are


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts and their sampled completions, N = P * num_samples rows; all arrays numpy, tokens right-padded.

    completion_lengths count the stop token where one was produced. logps are fp32, of the full vocabulary at the
    sampling temperature (1 where greedy), 0 past a row's length. group_ids say which prompt a row belongs to.
    finish_reason: 0 length, 1 stop token, 2 stop string.
    """

    prompt_tokens_NT: Int[np.ndarray, "N T"]
    prompt_lengths_N: Int[np.ndarray, " N"]
    completion_tokens_NT: Int[np.ndarray, "N T"]
    completion_lengths_N: Int[np.ndarray, " N"]
    logps_NT: Float[np.ndarray, "N T"]
    group_ids_N: Int[np.ndarray, " N"]
    finish_reason_N: Int[np.ndarray, " N"]

    def completions(self) -> list[list[int]]:
        """The completions as lists of token ids, stop token included."""
        return [row[:n].tolist() for row, n in zip(self.completion_tokens_NT, self.completion_lengths_N, strict=True)]


class Samples(NamedTuple):
    """What `sample_tokens` returns: device arrays, rows of one prompt adjacent; see Rollout for the meaning."""

    tokens_BT: Int[Array, "B T"]
    lengths_B: Int[Array, " B"]
    logps_BT: Float[Array, "B T"]
    finish_reason_B: Int[Array, " B"]


class _State(NamedTuple):
    """The decode loop's carry beside the stage's cache. `step` tokens of every row are decided, all but the last cached."""

    step: Int[Array, ""]
    tokens_BT: Int[Array, "B T"]
    logps_BT: Float[Array, "B T"]
    lengths_B: Int[Array, " B"]
    stopped_B: Bool[Array, " B"]
    done_B: Bool[Array, " B"]


def _stages(max_new_tokens: int) -> list[tuple[int, int]]:
    """(slots of the cache, tokens decided at the end) of each stage: up to STAGE tokens, twice that, ..., max_new_tokens.

    The second has as many slots as the first, and each later one as many as all before it.
    """
    ends = [*itertools.takewhile(lambda n: n < max_new_tokens, (STAGE * 2**i for i in itertools.count())), max_new_tokens]
    return [(end - start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _record(plan: Plan, state: _State, logits_BV: Array, rows: Rows, knobs: Knobs) -> _State:
    """Samples the next token of every unfinished row and writes it at column `step`."""
    live = ~state.done_B
    drawn = draw_next(plan, knobs, rows, logits_BV, jnp.broadcast_to(state.step, live.shape), live)
    put = lambda buffer, column: lax.dynamic_update_slice(buffer, column[:, None], (0, state.step))  # noqa: E731
    return state._replace(
        step=state.step + 1,
        tokens_BT=put(state.tokens_BT, drawn.tokens_B),
        logps_BT=put(state.logps_BT, drawn.logps_B),
        lengths_B=state.lengths_B + live,
        stopped_B=state.stopped_B | drawn.hit_B,
        done_B=state.done_B | drawn.ended_B,
    )


def _start(plan: Plan, params: Params, prompt_tokens_PT, prompt_lengths_P, rows, knobs) -> tuple[KV, _State]:
    """Prefills every prompt once and samples the first token of its G rows. Rows of empty prompts start finished."""
    cfg, G = plan.cfg, plan.num_samples
    edits = {"interventions": knobs.edits, "prompt_lengths": prompt_lengths_P, "texts": rows.ids_B[::G] // G}
    out = forward(cfg, params, prompt_tokens_PT, lengths=prompt_lengths_P, unroll=plan.unroll, return_kv=True, **edits)
    last = jnp.maximum(prompt_lengths_P - 1, 0)
    hidden_PD = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    logits_BV = jnp.repeat(unembed(cfg, params, hidden_PD), G, axis=0)
    B, T = logits_BV.shape[0], plan.max_new_tokens
    state = _State(
        step=jnp.int32(0),
        tokens_BT=jnp.zeros((B, T), jnp.int32),
        logps_BT=jnp.zeros((B, T), jnp.float32),
        lengths_B=jnp.zeros(B, jnp.int32),
        stopped_B=jnp.zeros(B, bool),
        done_B=jnp.repeat(prompt_lengths_P == 0, G),
    )
    return out.kv, _record(plan, state, logits_BV, rows, knobs)


def _advance(
    plan: Plan, params: Params, earlier: tuple[KV, ...], state: _State, prompt_lengths_P, rows, knobs, stage: tuple[int, int]
) -> tuple[KV, _State]:
    """Decodes until `stage`'s tokens are decided or every row has finished: (the keys and values it wrote, the state)."""
    slots, upto = stage
    prompt_lengths_B = jnp.repeat(prompt_lengths_P, plan.num_samples)
    edits = {"interventions": knobs.edits, "prompt_lengths": prompt_lengths_B, "texts": rows.ids_B // plan.num_samples}
    # Outside the loop, which would do it again for every token.
    layers = unstacked(params) if plan.unroll else fused(params)

    def step(carry: tuple[KVCache, _State]) -> tuple[KVCache, _State]:
        cache, state = carry
        token_B1 = lax.dynamic_slice_in_dim(state.tokens_BT, state.step - 1, 1, axis=1)
        positions_B1 = (prompt_lengths_B + state.step - 1)[:, None]
        out = forward(plan.cfg, layers, token_B1, positions=positions_B1, prefix=earlier, cache=cache, unroll=plan.unroll, **edits)
        logits_BV = unembed(plan.cfg, params, out.hidden[:, 0])
        return out.cache, _record(plan, state, logits_BV, rows, knobs)

    cache = init_cache(plan.cfg, state.done_B.shape[0], slots, unrolled=plan.unroll)
    cache, state = lax.while_loop(lambda carry: (carry[1].step < upto) & ~carry[1].done_B.all(), step, (cache, state))
    return KV(cache.k, cache.v, cache.positions), state


@functools.partial(jax.jit, static_argnums=0)
def _sample_tokens(plan: Plan, params, prompt_tokens_PT, prompt_lengths_P, rows, knobs) -> Samples:
    prompt, state = _start(plan, params, prompt_tokens_PT, prompt_lengths_P, rows, knobs)
    earlier = (prompt,)
    for stage in _stages(plan.max_new_tokens):
        kv, state = _advance(plan, params, earlier, state, prompt_lengths_P, rows, knobs, stage)
        earlier += (kv,)
    return _samples(state)


def _samples(state: _State) -> Samples:
    reason = jnp.where(state.stopped_B, FINISH_STOP_TOKEN, FINISH_LENGTH).astype(jnp.int32)
    return Samples(state.tokens_BT, state.lengths_B, state.logps_BT, reason)


_jitted_start = jax.jit(_start, static_argnums=0)
_jitted_advance = jax.jit(_advance, static_argnums=(0, 7), donate_argnums=3)


def _plan_of(cfg, num_samples, max_new_tokens, temperature, top_k, top_p, stop_tokens) -> Plan:
    """Checks the sampling arguments and splits off what is static."""

    def need(ok: bool, message: str):
        if not ok:
            raise ModelError(message)

    need(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    need(num_samples >= 1, f"num_samples is {num_samples}; it must be at least 1")
    need(temperature >= 0, f"temperature is {temperature}; it must be 0 (greedy) or above")
    need(top_k >= 0, f"top_k is {top_k}; it must be 0 (no limit) or above")
    need(0 < top_p <= 1, f"top_p is {top_p}; it must be above 0 and at most 1 (no limit)")
    stop = tuple(sorted(set(cfg.eos_token_ids if stop_tokens is None else (int(t) for t in stop_tokens))))
    need(all(0 <= t < cfg.vocab_size for t in stop), f"stop_tokens {stop} name ids outside the vocabulary of {cfg.vocab_size}")
    greedy = temperature == 0
    unroll = cfg.n_layers <= UNROLLED_LAYERS
    return Plan(cfg, num_samples, max_new_tokens, greedy, 0 if greedy else top_k, top_p < 1 and not greedy, stop, unroll)


def sample_tokens(
    cfg: ModelConfig,
    params: Params,
    prompt_tokens: Int[Array, "P T"],
    prompt_lengths: Int[Array, " P"],
    key: Array,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    row_ids: Int[Array, " B"] | None = None,
    interventions: Interventions | None = None,
) -> Samples:
    """Completions of right-padded prompts as device arrays, without a copy to the host: `generate` for a trainer.

    One compilation for each cfg, num_samples, max_new_tokens, greedy or not, top_k, top-p or not, stop_tokens and
    prompt shape: pad prompts to few shapes (`bucket`). A prompt of length 0 is padding: its rows come back empty.
    row_ids [P * num_samples] number the rows for the random stream (default 0, 1, 2, ...).
    interventions: as of `generate`.

    Raises ModelError where an argument is out of range or prompt width + max_new_tokens exceeds the context.
    """
    plan = _plan_of(cfg, num_samples, max_new_tokens, temperature, top_k, top_p, stop_tokens)
    P, width = prompt_tokens.shape
    if width + max_new_tokens > cfg.max_position:
        raise ModelError(
            f"the prompts are {width} tokens wide and max_new_tokens is {max_new_tokens}, but the model's context is "
            f"{cfg.max_position}; shorten one of them"
        )
    row_ids = jnp.arange(P * num_samples, dtype=jnp.int32) if row_ids is None else row_ids
    rows = Rows(row_ids, jnp.full(P * num_samples, max_new_tokens, jnp.int32))
    knobs = Knobs(key, jnp.float32(temperature), jnp.float32(top_p), as_edits(interventions))
    return _sample_tokens(plan, params, prompt_tokens, prompt_lengths, rows, knobs)


def as_key(seed: int | Array) -> Array:
    """A jax random key from an int seed or a key (typed or raw uint32)."""
    return jax.random.key(seed) if isinstance(seed, (int, np.integer)) else seed


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    seed: int | Array = 0,
    max_rows: int = 256,
    refill: bool = False,
    first_prompt: int = 0,
    mesh: Mesh | None = None,
    interventions: Interventions | None = None,
) -> Rollout:
    """Samples `num_samples` completions of each prompt (a list of token ids); rows of one prompt are adjacent.

    max_new_tokens: most tokens a completion may have, stop token included; or a list of them, one a prompt.
    temperature: 0 is greedy. top_k (0 = off) and top_p (1 = off) restrict what is drawn; the log-probabilities
      returned stay those of the full vocabulary at `temperature`.
    stop_tokens: ids that end a completion; default the model's end-of-text ids; () for none.
    stop_strings: a completion ends with the token that completes one of them (needs `tokenizer`, anything with
      `decode(list of ids) -> str`).
    seed: an int or a jax random key; the same seed gives the same completions.
    max_rows: prompts are decoded in batches of at most this many rows (but at least one prompt's samples a device),
      longest prompts together.
    refill: a row that has finished gives its place to the next one at once (see `models.refill`), rather than wait for the last of
      its batch: the same completions, up to rounding, and sooner where their lengths differ much. A place keeps its own copy of its
      prompt's keys and values, and all places are as wide as the longest prompt.
    first_prompt: number of the first prompt in the random stream: parts of a list, each with its own, get the samples of the whole.
    mesh: of `models.sharding.make_mesh`, with `params` on it: rows are spread over its batch axes. Every process calls
      with the same prompts and gets all completions: the same as on one device, up to rounding.
    interventions: {tap: function}, edits of activations in the prefill and in every step, as `forward` takes them; for those that take a
      `taps.Place`, positions go on from the prompt's and a text's number is its prompt's, from first_prompt on. A plain function is
      compiled once for each function object; a pytree that can be called (`jax.tree_util.Partial(function, value)`, `sae.FeatureEdit`)
      once for each structure, whatever its values.

    Raises ModelError for a prompt that is text or no list of whole numbers, an empty one, an id outside the vocabulary, a prompt that
    with max_new_tokens does not fit the context, stop strings without a tokenizer, or a sampling argument out of range.
    """
    limits = _limits(max_new_tokens, len(prompts))
    T = int(limits.max(initial=1 if np.ndim(max_new_tokens) else max_new_tokens))
    plan = _plan_of(cfg, num_samples, T, temperature, top_k, top_p, stop_tokens)
    check_prompts(cfg, prompts, limits)
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else [s for s in stop_strings if s]
    if odd := [s for s in stop_strings if not isinstance(s, str)]:
        raise ModelError(f"stop_strings hold {odd[0]!r}, which is no text; ids belong into stop_tokens")
    if stop_strings and tokenizer is None:
        raise ModelError("stop_strings needs the tokenizer: pass tokenizer=models.load_tokenizer(folder)")
    P, G = len(prompts), num_samples
    knobs = Knobs(as_key(seed), jnp.float32(temperature), jnp.float32(top_p), as_edits(interventions))
    how = (knobs, stop_strings, tokenizer, mesh)
    decode = decode_refilled if refill else _decode_batches
    tokens, lengths, logps, reasons = decode(plan, params, prompts, limits, max_rows, first_prompt * G, *how)
    prompt_tokens, prompt_lengths = pad_prompts(prompts, max((len(p) for p in prompts), default=1), P)
    return Rollout(
        np.repeat(prompt_tokens, G, axis=0),
        np.repeat(prompt_lengths, G),
        tokens,
        lengths,
        logps,
        np.repeat(np.arange(P, dtype=np.int32), G),
        reasons,
    )


def _limits(max_new_tokens: int | Sequence[int], n: int) -> np.ndarray:
    """[n] most new tokens of each prompt."""
    if np.ndim(max_new_tokens) == 0:
        return np.full(n, max_new_tokens, np.int32)
    limits = np.asarray(max_new_tokens, None if len(max_new_tokens) else np.int32)
    if limits.shape != (n,) or not np.issubdtype(limits.dtype, np.integer):
        raise ModelError(f"max_new_tokens is {limits.dtype} of shape {limits.shape}; give one whole number, or one for each of {n} prompts")
    if n and limits.min() < 1:
        raise ModelError(f"max_new_tokens of prompt {limits.argmin()} is {limits.min()}; it must be at least 1")
    return limits.astype(np.int32)


def _decode_batches(plan, params, prompts, limits_P, max_rows, first_row, knobs, stop_strings, tokenizer, mesh):
    """(tokens [N, T], lengths [N], logps [N, T], reasons [N]): batches of prompts one after the other, each until its last row ends."""
    P, G, T = len(prompts), plan.num_samples, plan.max_new_tokens
    tokens, logps = np.zeros((P * G, T), np.int32), np.zeros((P * G, T), np.float32)
    lengths, reasons = np.zeros(P * G, np.int32), np.zeros(P * G, np.int32)
    order = sorted(range(P), key=lambda i: len(prompts[i]))
    ways = 1 if mesh is None else batch_ways(mesh)
    per_batch = -(-max(max_rows // G, 1) // ways) * ways
    for start in range(0, P, per_batch):
        chosen = np.asarray(order[start : start + per_batch])
        rows = (chosen[:, None] * G + np.arange(G)).reshape(-1)
        n_pad = min(-(-bucket(len(chosen)) // ways) * ways, per_batch)
        width = min(bucket(max(len(prompts[i]) for i in chosen), 16), plan.cfg.max_position)
        none = (0, n_pad * G - len(rows))
        of_rows = Rows(np.pad(rows + first_row, none).astype(np.int32), np.pad(np.repeat(limits_P[chosen], G), none))
        placed = [place_rows(a, mesh) for a in (*pad_prompts([prompts[i] for i in chosen], width, n_pad), *of_rows)]
        out = _run(plan, params, placed[0], placed[1], Rows(*placed[2:]), knobs, stop_strings, tokenizer, mesh)
        tokens[rows], lengths[rows], logps[rows], reasons[rows] = (a[: len(rows)] for a in fetch(out, mesh))
    return tokens, lengths, logps, reasons


def _run(plan, params, tokens, lengths, rows, knobs, stop_strings, tokenizer, mesh) -> Samples:
    """One batch. With stop strings the host looks at the text after each stage and ends the rows that have one."""
    if not stop_strings:
        return _sample_tokens(plan, params, tokens, lengths, rows, knobs)
    prompt, state = _jitted_start(plan, params, tokens, lengths, rows, knobs)
    earlier = (prompt,)
    cut = np.zeros(state.done_B.shape[0], np.int32)  # a row's length up to its first stop string; 0 = none yet
    for stage in _stages(plan.max_new_tokens):
        kv, state = _jitted_advance(plan, params, earlier, state, lengths, rows, knobs, stage)
        earlier += (kv,)
        row_tokens, row_lengths, done = fetch((state.tokens_BT, state.lengths_B, state.done_B), mesh)
        for row in np.flatnonzero((cut == 0) & (row_lengths > 0)):
            cut[row] = stop_string_cut(row_tokens[row, : row_lengths[row]].tolist(), stop_strings, tokenizer)
        if np.all(done | (cut > 0)):
            break
        state = state._replace(done_B=place_rows(done | (cut > 0), mesh))
    out = Samples(*(np.array(a) for a in fetch(_samples(state), mesh)))
    ended = cut > 0
    lengths_B = np.where(ended, cut, out.lengths_B)
    beyond = np.arange(plan.max_new_tokens) >= lengths_B[:, None]
    out.tokens_BT[beyond], out.logps_BT[beyond] = 0, 0.0
    return Samples(out.tokens_BT, lengths_B, out.logps_BT, np.where(ended, FINISH_STOP_STRING, out.finish_reason_B))
