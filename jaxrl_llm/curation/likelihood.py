"""What the policy itself thinks of a prompt and of its gold answer: inputs for the quality probe.

A wrong gold answer cannot be seen in the prompt, and hardly in SAE features of prompt + answer; the policy's log-probability of
it drops. One forward pass over prompt + answer gives all columns.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxrl_llm.curation.features import tree_fingerprint
from jaxrl_llm.curation.streaming import Results, keep_end, run_sharded
from jaxrl_llm.data.prompts import pad_answers
from jaxrl_llm.errors import UserError

COLUMNS = (
    "answer_logp_mean",  # nats a token, the gold answer given the prompt
    "answer_logp_sum",
    "answer_logp_min",  # its least likely token
    "answer_margin",  # mean of log-probability minus the best token's: 0 where greedy decoding would write the gold answer
    "answer_entropy",  # mean entropy of the predictions along it
    "prompt_logp_mean",  # minus log perplexity of the prompt
    "prompt_logp_min",
    "has_answer",  # 0 where there is none: the answer's columns are then 0
)
CHUNK_TOKENS = 64  # positions whose logits are in memory at once, for each row


@functools.partial(jax.jit, static_argnames=("cfg", "replicate"))
def likelihood_columns(cfg, params, tokens_BT, lengths_B, starts_B, marks_B, *, replicate=None) -> jax.Array:
    """[B, len(COLUMNS)] fp32. tokens_BT: prompt + answer, right-padded; the answer is at positions marks_B .. lengths_B - 1, the
    prompt's counted tokens at starts_B .. marks_B - 1. A token at position 0 has no prediction and is left out."""
    hidden_BTD = models.forward(cfg, params, tokens_BT, lengths=lengths_B).hidden
    logp_BT, margin_BT, entropy_BT = (jnp.pad(x, ((0, 0), (1, 0))) for x in _predictions(cfg, params, hidden_BTD[:, :-1], tokens_BT[:, 1:]))
    position_T = jnp.arange(tokens_BT.shape[1])
    predicted_BT = (position_T >= jnp.maximum(starts_B, 1)[:, None]) & (position_T < lengths_B[:, None])
    answer_BT = predicted_BT & (position_T >= marks_B[:, None])
    prompt_BT = predicted_BT & (position_T < marks_B[:, None])

    def mean(x_BT, mask_BT):
        return jnp.where(mask_BT, x_BT, 0.0).sum(axis=1) / jnp.maximum(mask_BT.sum(axis=1), 1)

    def least(x_BT, mask_BT):
        return jnp.where(mask_BT, x_BT, 0.0).min(axis=1)

    columns = [
        mean(logp_BT, answer_BT),
        jnp.where(answer_BT, logp_BT, 0.0).sum(axis=1),
        least(logp_BT, answer_BT),
        mean(margin_BT, answer_BT),
        mean(entropy_BT, answer_BT),
        mean(logp_BT, prompt_BT),
        least(logp_BT, prompt_BT),
        answer_BT.any(axis=1).astype(jnp.float32),
    ]
    out = jnp.stack(columns, axis=1)
    return out if replicate is None else jax.lax.with_sharding_constraint(out, replicate)


def _predictions(cfg, params, hidden_BTD, targets_BT) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probability, that minus the best token's, entropy), each [B, T], over chunks of positions."""
    B, T, D = hidden_BTD.shape
    size = min(CHUNK_TOKENS, T)
    count = -(-T // size)
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, count * size - T), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, count * size - T)))

    def chunk(args):
        logps_BCV = jax.nn.log_softmax(models.unembed(cfg, params, args[0]), axis=-1)
        logp_BC = jnp.take_along_axis(logps_BCV, args[1][..., None], axis=-1)[..., 0]
        return logp_BC, logp_BC - logps_BCV.max(axis=-1), -(jnp.exp(logps_BCV) * logps_BCV).sum(axis=-1)

    xs = (hidden_BTD.reshape(B, count, size, D).swapaxes(0, 1), targets_BT.reshape(B, count, size).swapaxes(0, 1))
    return tuple(x.swapaxes(0, 1).reshape(B, count * size)[:, :T] for x in jax.lax.map(chunk, xs))


@dataclass
class LikelihoodProgram:
    """The program of `answer_likelihood` (streaming.Program)."""

    cfg: models.ModelConfig
    params: Any
    context: int
    mesh: Any = None
    sparse: tuple[str, ...] = ()
    merge: dict[str, str] = field(default_factory=lambda: {"likelihood": "mean"})
    fingerprint: str = field(init=False)

    def __post_init__(self):
        self.bos = self.cfg.bos_token_id
        self.context = min(self.context or self.cfg.max_position, self.cfg.max_position)
        described = f"likelihood {self.cfg!r} {self.context} {COLUMNS} {tree_fingerprint(self.params)}"
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    def widths(self) -> dict[str, int]:
        return {"likelihood": len(COLUMNS)}

    def __call__(self, tokens_BT, lengths_B, starts_B, marks_B):
        replicate = None
        if self.mesh is not None:
            from models.sharding import replicated

            replicate = replicated(self.mesh)
        columns = likelihood_columns(self.cfg, self.params, tokens_BT, lengths_B, starts_B, marks_B, replicate=replicate)
        return {"likelihood": columns}


def answer_likelihood(
    cfg: models.ModelConfig,
    params: Any,
    tokens_of: Callable[[int, int], tuple[list[Sequence[int]], Sequence[int]]],
    n: int,
    *,
    context: int | None = None,
    mesh: Any = None,
    **run_options,
) -> tuple[np.ndarray, Results]:
    """([N, len(COLUMNS)] fp32, the run's counts). tokens_of(a, b) -> (prompt + answer token lists of rows a..b, the positions where
    their answers begin). Of a row longer than the context the end is kept (it holds the answer), and counted; rows without
    tokens give zeros. run_options: of streaming.run_sharded."""
    program = LikelihoodProgram(cfg, params, context or 0, mesh)
    results = run_sharded(program, n, tokens_of, mesh=mesh, **{"overflow": "truncate", **run_options})
    return results.dense("likelihood"), results


# (parameters, batches of (tokens [B, T], mask [B, T] of what is to be predicted), learning rate) -> fine-tuned parameters
Tuner = Callable[[Any, list[tuple[np.ndarray, np.ndarray]], float], Any]


@dataclass(frozen=True)
class TunedOptions:
    """How `tuned_gain` fine-tunes: a few steps, from which the procedures of the answers are learnt and not the answers."""

    folds: int = 4  # policies; a told row is judged by the one that has not seen it
    epochs: int = 5
    batch: int = 64  # rows a step
    learning_rate: float = 3e-4


def tuned_gain(
    cfg: models.ModelConfig,
    params: Any,
    tokens_of: Callable[[int, int], tuple[list[Sequence[int]], Sequence[int]]],
    told: np.ndarray,
    before: np.ndarray,
    tune: Tuner,
    options: TunedOptions | None = None,
    *,
    seed: int = 0,
    mesh: Any = None,
    folder: Path | None = None,
    **run_options,
) -> np.ndarray:
    """[N, 3] gain of each gold answer's log-probability, nats (mean, sum and least token, as COLUMNS[:3]), when the policy has been
    fine-tuned on the rows that are told to be sound.

    This is the reducible loss of Mindermann et al. (2022; minus the cross-entropy difference of Moore and Lewis 2010) with the policy
    itself as the model: fine-tuning moves it from wrong procedures to right ones, so answers that a wrong procedure gave lose. An answer
    that was certain before cannot gain: read it beside `before`.

    tokens_of: as for `answer_likelihood`. told: [N] 1 for sound rows, 0 for others, NaN unknown. before: what `answer_likelihood` gave
    under `params`. tune: fine-tunes a copy of `params`. Told rows are judged out of fold, the others by the mean over folds. Of rows
    longer than the context the end is tuned on. folder, run_options: of streaming.run_sharded, for the passes of each fold. Raises
    UserError where too few rows are told to be sound.
    """
    options, n = options or TunedOptions(), len(told)
    sound, known = np.flatnonzero(told == 1), np.flatnonzero(np.isfinite(told))
    fold_of = np.full(n, -1)
    fold_of[known] = np.random.default_rng([seed, 0x70E]).permutation(len(known)) % options.folds
    if min(np.sum(fold_of[sound] != fold) for fold in range(options.folds)) == 0 or len(sound) < 2 * options.folds:
        raise UserError(
            f"quality: {len(sound)} rows are told to be sound; tuning in {options.folds} folds needs {2 * options.folds}: "
            "tell more, or leave the tuning out (tuned=False)"
        )
    answers = [keep_end(*row, cfg.bos_token_id, cfg.max_position) for row in zip(*tokens_of(0, n), strict=True)]
    gains = np.zeros((options.folds, n, 3), np.float32)
    width = max(len(answers[i][0]) for i in sound)  # one for all folds: one compilation
    for fold in range(options.folds):
        used = sound[fold_of[sound] != fold]
        size = min(options.batch, len(used))
        rng = np.random.default_rng([seed, 0x70E, fold])
        order = np.concatenate([rng.permutation(used) for _ in range(options.epochs)])
        batches = [pad_answers([answers[j] for j in order[i : i + size]], width) for i in range(0, len(order) - size + 1, size)]
        tuned = tune(params, batches, options.learning_rate)
        where = None if folder is None else folder / f"fold-{fold}"
        gains[fold] = answer_likelihood(cfg, tuned, tokens_of, n, mesh=mesh, folder=where, **run_options)[0][:, :3] - before[:, :3]
    out = gains.mean(axis=0)
    out[known] = gains[fold_of[known], known]
    return out


def policy_opinion(
    cfg: models.ModelConfig,
    params: Any,
    tokens_of: Callable[[int, int], tuple[list[Sequence[int]], Sequence[int]]],
    n: int,
    *,
    told: np.ndarray | None = None,
    tune: Tuner | None = None,
    seed: int = 0,
    mesh: Any = None,
    folder: Path | None = None,
    **run_options,
) -> dict[str, np.ndarray]:
    """What a policy thinks of the answers of N rows: {"logp": `answer_likelihood`, [N, len(COLUMNS)]} and, where rows are told and there is
    a tuner, {"tuned": these with `tuned_gain` beside them, [N, len(COLUMNS) + 3]}. Arguments: of those two."""
    run_options |= {"mesh": mesh}
    columns, _ = answer_likelihood(cfg, params, tokens_of, n, folder=folder, **run_options)
    if told is None or tune is None:
        return {"logp": columns}
    where = None if folder is None else folder.with_name(f"{folder.name}-tuned")
    gain = tuned_gain(cfg, params, tokens_of, told, columns, tune, seed=seed, folder=where, **run_options)
    return {"logp": columns, "tuned": np.concatenate([columns, gain], axis=1)}
