"""Decoding in places: a row that has finished gives its place to the next one (continuous batching, Yu et al. 2022), in fixed shapes.

B places decode together, each at its own step. A place keeps its prompt's keys and values, copied from the block of prompts that was
prefilled last; its own tokens' go to a ring of slots that all places write at the same index, so that a step writes one column, as the
plain loop does, and a new row has only to forget the positions of the one before. A row starts by decoding its prompt's last token,
which the prefill leaves out: so a place that is filled needs no logits from the prefill. The device decodes until a few places
are free; the host then takes out what has finished, fills the places, and when no rows are left to fill them with, goes on with
half as many whenever half are free.
Letters: B places, R slots of the ring, S slots of a prompt, E prompts prefilled at once, G samples a prompt, N rows in all, T tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

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
from models.sharding import batch_ways, fetch, place_rows
from models.transformer import KV, KVCache, Params, forward, fused, init_cache, unembed, unstacked

FREE = 32  # places are filled again when one in so many is free: to fill costs about a twentieth of a step
FEWEST = 8  # places are not halved below this: fewer rows are hardly faster, and each number of places is a program of its own


class _Places(NamedTuple):
    """What B places hold. A place without a row is done. tokens and logps lie in the ring's order: those of step i at slot i mod R."""

    prompt: KV
    ring: KVCache  # next: the slot that the next step writes
    tokens_BR: Int[Array, "B R"]
    logps_BR: Float[Array, "B R"]
    last_B: Int[Array, " B"]  # the token to decode next, and its position
    positions_B: Int[Array, " B"]
    rows: Rows
    lengths_B: Int[Array, " B"]
    stopped_B: Bool[Array, " B"]
    done_B: Bool[Array, " B"]


class _Entering(NamedTuple):
    """Rows that enter, by place: from_B is the prompt's number in the block, -1 where the place keeps what it has."""

    from_B: Int[Array, " B"]
    last_B: Int[Array, " B"]
    positions_B: Int[Array, " B"]
    rows: Rows


@functools.partial(jax.jit, static_argnums=0)
def _layers(plan: Plan, params: Params) -> Params:
    """The parameters as decoding reads them, made once a call."""
    return unstacked(params) if plan.unroll else fused(params)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(plan: Plan, layers: Params, tokens_ES, lengths_E, texts_E, edits) -> KV:
    """Keys and values of all but the last token of each prompt."""
    told = {"interventions": edits, "prompt_lengths": lengths_E, "texts": texts_E}
    kv = forward(plan.cfg, layers, tokens_ES, lengths=lengths_E, unroll=plan.unroll, return_kv=True, **told).kv
    return kv._replace(positions=jnp.where(kv.positions == lengths_E[:, None] - 1, -1, kv.positions))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(plan: Plan, n: int, prompt_slots: int, ring_slots: int) -> _Places:
    """n places without a row."""
    cache = functools.partial(init_cache, plan.cfg, n, unrolled=plan.unroll)
    prompt, zeros, no = cache(prompt_slots), jnp.zeros(n, jnp.int32), jnp.zeros(n, bool)
    grid = jnp.zeros((n, ring_slots), jnp.int32)
    kept = KV(prompt.k, prompt.v, prompt.positions)
    return _Places(kept, cache(ring_slots), grid, grid.astype(jnp.float32), zeros, zeros, Rows(zeros, zeros), zeros, no, ~no)


def _row_axis(plan: Plan) -> int:
    return 0 if plan.unroll else 1


def _of_kv(plan: Plan, kv: tuple[Any, Any], change) -> tuple[Any, Any]:
    """Keys and values after `change(array, axis of the rows)`."""
    return jax.tree.map(lambda array: change(array, _row_axis(plan)), kv)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _enter(plan: Plan, places: _Places, block: KV, entering: _Entering) -> _Places:
    """Puts rows into places; their prompts are of `block`."""
    new, at = entering.from_B >= 0, jnp.maximum(entering.from_B, 0)
    pick = lambda given, kept: jnp.where(new.reshape(-1, *(1,) * (kept.ndim - 1)), given, kept)  # noqa: E731

    def copied(of_block, kept):
        axis = _row_axis(plan)
        mask = new.reshape(-1, *(1,) * (kept.ndim - axis - 1))
        return jnp.where(mask, jnp.take(of_block, at, axis=axis), kept)

    k, v = jax.tree.map(copied, (block.k, block.v), (places.prompt.k, places.prompt.v))
    return places._replace(
        prompt=KV(k, v, pick(block.positions[at], places.prompt.positions)),
        ring=places.ring._replace(positions=pick(-1, places.ring.positions)),
        last_B=pick(entering.last_B, places.last_B),
        positions_B=pick(entering.positions_B, places.positions_B),
        rows=jax.tree.map(pick, entering.rows, places.rows),
        lengths_B=pick(0, places.lengths_B),
        stopped_B=places.stopped_B & ~new,
        done_B=places.done_B & ~new,
    )


@functools.partial(jax.jit, static_argnums=0)
def _keep(plan: Plan, places: _Places, which_B: Int[Array, " B"]) -> _Places:
    """The places `which_B` alone."""
    some = lambda kv: _of_kv(plan, kv, lambda array, axis: jnp.take(array, which_B, axis=axis))  # noqa: E731
    prompt, ring = places.prompt, places.ring
    rest = jax.tree.map(lambda array: array[which_B], places._replace(prompt=None, ring=None))
    return rest._replace(
        prompt=KV(*some((prompt.k, prompt.v)), prompt.positions[which_B]),
        ring=KVCache(*some((ring.k, ring.v)), ring.positions[which_B], ring.next),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(plan: Plan, layers: Params, places: _Places, knobs: Knobs, enough: Array, most: Array) -> _Places:
    """Steps until `enough` places are done, or `most` steps."""
    slots = places.tokens_BR.shape[1]

    def step(carry):
        places, steps = carry
        slot, live = places.ring.next, ~places.done_B
        out = forward(
            plan.cfg, layers, places.last_B[:, None], positions=places.positions_B[:, None], prefix=places.prompt, cache=places.ring,
            unroll=plan.unroll, interventions=knobs.edits, texts=places.rows.ids_B // plan.num_samples,
            prompt_lengths=places.positions_B - places.lengths_B + 1,  # a row begins with its prompt's last token
        )  # fmt: skip
        drawn = draw_next(plan, knobs, places.rows, unembed(plan.cfg, layers, out.hidden[:, 0]), places.lengths_B, live)

        def put(buffer, column):  # a row that has finished keeps what it has until the host takes it
            kept = lax.dynamic_slice_in_dim(buffer, slot, 1, axis=1)
            return lax.dynamic_update_slice(buffer, jnp.where(live[:, None], column[:, None], kept), (0, slot))

        places = places._replace(
            ring=out.cache._replace(next=(slot + 1) % slots),
            tokens_BR=put(places.tokens_BR, drawn.tokens_B),
            logps_BR=put(places.logps_BR, drawn.logps_B),
            last_B=drawn.tokens_B,
            positions_B=places.positions_B + live,
            lengths_B=places.lengths_B + live,
            stopped_B=places.stopped_B | drawn.hit_B,
            done_B=places.done_B | drawn.ended_B,
        )
        return places, steps + 1

    return lax.while_loop(lambda carry: (carry[0].done_B.sum() < enough) & (carry[1] < most), step, (places, jnp.int32(0)))[0]


class _Queue:
    """The rows that wait, in order: row p * G + g is sample g of prompt p; their prompts are prefilled a block at a time."""

    def __init__(self, prompts: Sequence[Sequence[int]], limits_P: np.ndarray, samples: int, block: int, width: int, first_row: int):
        self.prompts, self.limits_P, self.samples, self.width, self.first_row = prompts, limits_P, samples, width, first_row
        self.block, self.next, self.rows = block, 0, len(prompts) * samples

    def prompts_of_next(self) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(number of the block that the next row's prompt is in, its padded prompts, their lengths and numbers)."""
        number = self.next // self.samples // self.block
        first = number * self.block
        padded = pad_prompts(self.prompts[first : first + self.block], self.width, self.block)
        return number, (*padded, np.arange(first, first + self.block, dtype=np.int32) + self.first_row // self.samples)

    def take(self, free: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray, _Entering]:
        """(rows, the places they go to, what enters): as many rows of the next one's block as there are free places."""
        end = min((self.next // self.samples // self.block + 1) * self.block * self.samples, self.rows)
        begin, self.next = self.next, min(self.next + len(free), end)
        rows = np.arange(begin, self.next)
        at = free[: len(rows)]
        of_prompt = rows // self.samples
        from_B = np.full(places, -1, np.int32)
        last_B, positions_B, ids_B, limits_B = (np.zeros(places, np.int32) for _ in range(4))
        from_B[at] = np.remainder(of_prompt, self.block)
        last_B[at] = [self.prompts[p][-1] for p in of_prompt.tolist()]
        positions_B[at] = [len(self.prompts[p]) - 1 for p in of_prompt.tolist()]
        ids_B[at], limits_B[at] = rows + self.first_row, self.limits_P[of_prompt]
        return rows, at, _Entering(from_B, last_B, positions_B, Rows(ids_B, limits_B))


def decode_refilled(
    plan: Plan,
    params: Params,
    prompts: Sequence[Sequence[int]],
    limits_P: np.ndarray,
    max_rows: int,
    first_row: int,
    knobs: Knobs,
    stop_strings: Sequence[str],
    tokenizer: Any,
    mesh: Mesh | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [N, T], lengths [N], logps [N, T], reasons [N]) of all samples of all prompts, in at most `max_rows` places.

    limits_P: most new tokens of each prompt. first_row: the number of the first row in the random stream. With stop strings the host
    looks at the text every STAGE steps and ends the rows that have one. What `models.generate` has checked is taken as right.
    """
    N, T, ways = len(prompts) * plan.num_samples, plan.max_new_tokens, 1 if mesh is None else batch_ways(mesh)
    tokens, logps = np.zeros((N, T), np.int32), np.zeros((N, T), np.float32)
    lengths, reasons = np.zeros(N, np.int32), np.zeros(N, np.int32)
    if not N:
        return tokens, lengths, logps, reasons
    round_up = lambda n, multiple=ways: -(-n // multiple) * multiple  # noqa: E731
    B, R = round_up(max(min(bucket(N), max_rows), 1)), bucket(T, STAGE)
    width = min(bucket(max(map(len, prompts)), 16), plan.cfg.max_position)
    queue = _Queue(prompts, limits_P, plan.num_samples, round_up(max(B // plan.num_samples, 1)), width, first_row)
    layers, places, block_number, block = _layers(plan, params), _empty(plan, B, width, R), -1, None
    row_of, entered, slot = np.full(B, -1), np.zeros(B, np.int32), 0  # of each place: its row, -1 = none; the slot of its first token
    while True:
        while queue.next < N and (row_of < 0).any():
            number, padded = queue.prompts_of_next()
            if number != block_number:
                block_number, block = number, _prefill(plan, layers, *(place_rows(a, mesh) for a in padded), knobs.edits)
            rows, at, entering = queue.take(np.flatnonzero(row_of < 0), B)
            places = _enter(plan, places, block, jax.tree.map(lambda a: place_rows(a, mesh), entering))
            row_of[at], entered[at] = rows, slot
        if not (row_of >= 0).any():
            return tokens, lengths, logps, reasons
        halves = queue.next == N and B % (2 * ways) == 0 and B // 2 >= FEWEST
        if halves and (row_of >= 0).sum() <= B // 2:
            B //= 2
            kept = np.argsort(row_of < 0, kind="stable")[:B]
            places, row_of, entered = _keep(plan, places, place_rows(kept.astype(np.int32), mesh)), row_of[kept], entered[kept]
            continue
        enough = math.ceil(B / FREE) if queue.next < N else B // 2 if halves else B
        places = _decode(plan, layers, places, knobs, np.int32(enough), np.int32(STAGE if stop_strings else R))
        state = places.tokens_BR, places.logps_BR, places.lengths_B, places.stopped_B, places.done_B, places.ring.next
        tokens_BR, logps_BR, lengths_B, stopped_B, done_B, slot = fetch(state, mesh)
        slot, cut_off = int(slot), False
        for b in np.flatnonzero(row_of >= 0):
            n, reason = int(lengths_B[b]), FINISH_STOP_TOKEN if stopped_B[b] else FINISH_LENGTH
            in_ring = (entered[b] + np.arange(n)) % R
            cut = stop_string_cut(tokens_BR[b, in_ring].tolist(), stop_strings, tokenizer) if stop_strings else 0
            if cut:
                n, reason, cut_off = cut, FINISH_STOP_STRING, cut_off or not done_B[b]
            if cut or done_B[b]:
                row, row_of[b] = row_of[b], -1
                tokens[row, :n], logps[row, :n] = tokens_BR[b, in_ring[:n]], logps_BR[b, in_ring[:n]]
                lengths[row], reasons[row] = n, reason
        if cut_off:
            places = places._replace(done_B=place_rows(row_of < 0, mesh))
