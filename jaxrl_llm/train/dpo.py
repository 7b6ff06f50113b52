"""Training on a fixed set of preferences: DPO and its relatives on pairs, KTO on single labelled completions.

The reference's log-probabilities are a sum a completion. They are computed once, before the first step, by the parameters that training
starts from, and kept in every checkpoint, of which the first is written then: no reference model is in memory afterwards, and a run that goes
on needs none.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

import models
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.checks import check_dpo, check_keep_best
from jaxrl_llm.train.config import DPOConfig, from_mapping
from jaxrl_llm.train.metrics import Recorded
from jaxrl_llm.train.preference_step import (
    PreferenceSpec,
    by_length,
    compiled_sums,
    compiled_update,
    preference_batch,
    preference_loss,
    preference_spec,
    to_host,
)
from jaxrl_llm.train.resume import check_steps, not_finite, tokens_fingerprint
from jaxrl_llm.train.signals import Alive, Interrupted, StopRequest, stop_on_signal, watchdog
from jaxrl_llm.train.state import abstract_state, frozen_params, given, init_state, policy_params, whole
from jaxrl_llm.train.step import batch_shardings
from models.sharding import batch_ways, place

TRAINING = "training rows"  # their name among the references


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Tokenised preferences, N rows.

    prompts: token ids. completions: (chosen, rejected) of each row, each with at least one token; for KTO (its own completion, that of
    another row: see `with_unrelated`). labels_N: bool, desirable or not, for KTO only. ids: the rows' ids.
    """

    prompts: list[list[int]]
    completions: list[tuple[list[int], list[int]]]
    ids: list[str]
    labels_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Preferences":
        """The rows at `indices`, in that order."""
        pick = lambda column: [column[i] for i in indices]  # noqa: E731
        labels = None if self.labels_N is None else self.labels_N[np.asarray(indices)]
        return Preferences(pick(self.prompts), pick(self.completions), pick(self.ids), labels)

    def fingerprint(self) -> str:
        """Of tokens and labels, for `RunDir.same_rows`."""
        lists = (tokens for prompt, pair in zip(self.prompts, self.completions, strict=True) for tokens in (prompt, *pair))
        return tokens_fingerprint(lists, [self.labels_N])

    def lengths(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """int [len(indices), 2]: tokens of both completions of the rows at `indices`."""
        return np.array([[len(tokens) for tokens in self.completions[i]] for i in indices])

    def batch(self, indices: Sequence[int] | np.ndarray, rows: int = 0, multiple: int = 1, **columns: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices` as `preference_step` takes them; columns: [N, ...] arrays of which the same rows go along."""
        columns = columns if self.labels_N is None else columns | {"labels": self.labels_N}
        chosen = {name: column[indices] for name, column in columns.items()}
        return preference_batch([self.prompts[i] for i in indices], [self.completions[i] for i in indices], rows, multiple, **chosen)


def with_unrelated(prompts: Sequence[list[int]], completions: Sequence[list[int]], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Each completion with an unrelated one for KTO's baseline: that of the next row, cyclically, whose prompt is another, cut so that
    it fits behind this row's prompt. Rows that all have one prompt take their neighbour's."""
    pairs, N = [], len(prompts)
    for i in range(N):
        others = (completions[(i + k) % N] for k in range(1, N) if prompts[(i + k) % N] != prompts[i])
        other = next(others, completions[(i + 1) % N])
        pairs.append((completions[i], other[: max(max_length - len(prompts[i]), 1)]))
    return pairs


@dataclasses.dataclass
class _Run(Recorded):
    """What every part of the loop needs. references: name of a set -> fp32 [N, 2], for losses that have one."""

    data: Preferences
    held_out: Mapping[str, Preferences]
    schedule: ShuffledSchedule
    config: DPOConfig
    spec: PreferenceSpec
    run_dir: RunDir | None
    checkpoints: Checkpoints | None
    mesh: Any
    references: dict[str, np.ndarray]
    history: list[dict[str, Any]]
    frozen: Any = None  # what an adapter is put into
    progress: bool = True
    best: tuple[float, int] | None = None


def train_dpo(
    model_cfg: models.ModelConfig,
    params,
    data: Preferences,
    schedule: ShuffledSchedule,
    config: DPOConfig | Mapping[str, Any],
    run_dir: RunDir | None = None,
    held_out: Mapping[str, Preferences] | None = None,
    *,
    mesh=None,
    progress: bool = True,
):
    """Trains on preferences and returns (parameters, history).

    params: the starting policy, any float dtype, or a function that gives it (with `lora`, maybe with an adapter to go on with); it is also
    the reference. schedule: which rows of `data` go
    into which step. config: a DPOConfig or a mapping with its fields. run_dir: metrics and checkpoints go there, and a run that is found
    there goes on; None keeps nothing on disk. held_out: name -> rows whose loss, accuracy and margin are logged before the first step,
    every `eval_every` steps and at the end. With `keep_best` the parameters returned are those of least loss on that set. history: the
    logged records: of kind "dpo" (step, loss, margin, accuracy, implicit_chosen, implicit_rejected, logp_chosen, logp_rejected, grad_norm,
    learning_rate, tokens, tokens_per_s, seconds) and of kind "eval".

    Raises UserError for settings without meaning, rows that do not fit the loss or the model's context, a loss that is not finite (the
    step is named, the last checkpoint kept) or a disk that refuses; Interrupted after SIGTERM, state saved.
    """
    config = from_mapping(DPOConfig, config)
    check_dpo(config)
    check_keep_best(config.keep_best, held_out or {}, run_dir)
    for name, rows in {TRAINING: data, **(held_out or {})}.items():
        _check_rows(model_cfg, rows, config, name)
    if run_dir is not None:
        run_dir.same_rows({name: rows.fingerprint() for name, rows in {TRAINING: data, **(held_out or {})}.items()})
    spec = preference_spec(model_cfg, config)
    checkpoints = None if run_dir is None else Checkpoints(run_dir.checkpoints, config.keep_checkpoints)
    found = None if checkpoints is None else checkpoints.restore(abstract_state(model_cfg, spec.optimizer, mesh, lora=spec.lora))
    params = given(params)
    start, state, references = found or (0, init_state(model_cfg, spec.optimizer, params, mesh, lora=spec.lora, seed=config.lora.seed), {})
    frozen = None if spec.lora is None else frozen_params(model_cfg, params, mesh)
    del params  # the state has a copy
    if run_dir is not None:
        check_steps(start, config.steps, run_dir)
        run_dir.truncate_after(start or -1)  # at a checkpoint of step 0 nothing had been logged
        run_dir.note_changes(start)
    history = [] if run_dir is None else [r for r in run_dir.metrics(until=start or -1) if r["kind"] in ("dpo", "eval")]
    if found and config.loss.needs_reference and (new := [name for name in held_out or {} if name not in references]):
        raise UserError(f"{new[0]}: this run began without it, so that its checkpoints hold no figures of the reference for it: leave it out")
    run = _Run(data, held_out or {}, schedule, config, spec, run_dir, checkpoints, mesh, references, history, frozen, progress)
    with contextlib.nullcontext() if checkpoints is None else checkpoints:
        if not found and config.loss.needs_reference:
            with watchdog(config.watchdog_seconds) as alive:
                run.references = {name: _sums(run, state, rows, name, alive) for name, rows in {TRAINING: data, **run.held_out}.items()}
            if checkpoints is not None:
                checkpoints.save(0, state, run.references)
        run.see_best()
        state = _train(run, state, start)
        if run.best is not None and run.best[1] < config.steps:
            del state
            state = checkpoints.restore(abstract_state(model_cfg, spec.optimizer, mesh, lora=spec.lora), at=run.best[1])[1]
    return policy_params(model_cfg, state["params"], spec.lora, frozen), run.history


def _check_rows(model_cfg, rows: Preferences, config: DPOConfig, what: str) -> None:
    if (rows.labels_N is not None) != (config.loss.kind == "kto"):
        found, wanted = ("pairs", "single labelled completions") if rows.labels_N is None else ("single labelled completions", "pairs")
        raise UserError(f"{what}: loss.kind '{config.loss.kind}' needs {wanted}, these are {found}")
    if len(rows) == 0:
        raise UserError(f"{what}: no rows")
    for name, prompt, pair in zip(rows.ids, rows.prompts, rows.completions, strict=True):
        if (length := len(prompt) + max(map(len, pair))) > model_cfg.max_position:
            raise UserError(f"{what}: row '{name}' has {length} tokens, over the model's context of {model_cfg.max_position}; lower max_length")


def _placed(run: _Run, batch):
    return batch if run.mesh is None else jax.tree.map(lambda x: place(x, batch_shardings(run.mesh)), batch)


def _sums(run: _Run, state, rows: Preferences, name: str, alive: Alive) -> np.ndarray:
    """fp32 [N, 2]: the summed log-probability of every completion of a set, `forward_rows` prompts at a time, all of one shape a chunk
    size; sorted by length, so that short rows are not padded to the longest."""
    ways = 1 if run.mesh is None else batch_ways(run.mesh)
    size = min(run.config.forward_rows, len(rows))
    order = np.argsort([len(p) + max(map(len, c)) for p, c in zip(rows.prompts, rows.completions, strict=True)], kind="stable")
    spec = dataclasses.replace(run.spec, length_buckets=1)  # each chunk is a batch, of a width of its own
    sums, forward = np.zeros((len(rows), 2), np.float32), compiled_sums(spec, run.mesh)
    params = whole(run.spec.lora, state["params"], run.frozen)
    bar = tqdm(total=len(rows), desc=f"figures of {name}", unit="row", mininterval=0.5, disable=None if run.progress else True, leave=False)
    with bar:
        for begin in range(0, len(rows), size):
            alive()
            chosen = order[begin : begin + size]
            batch = rows.batch(chosen, multiple=-(-size // ways) * ways)  # a last chunk of fewer rows is padded to the same shape
            found = np.asarray(jax.device_get(forward(params, _placed(run, batch))))
            sums[chosen] = found.reshape(-1, 2)[: len(chosen)]
            bar.update(len(chosen))
    if not np.isfinite(sums).all():
        row = rows.ids[int(np.argmin(np.isfinite(sums).all(-1)))]
        raise UserError(f"{name}: the log-probability of row '{row}' is not finite: lower the learning rate, or look at row and starting model")
    return sums


def _train(run: _Run, state, start: int):
    """The loop. Step numbers in records and checkpoints count finished steps."""
    config, checkpoints = run.config, run.checkpoints
    ways = 1 if run.mesh is None else batch_ways(run.mesh)
    update = compiled_update(run.spec, run.mesh)
    columns = {"ref_sums": run.references[TRAINING]} if config.loss.needs_reference else {}
    if start == 0:
        with watchdog(config.watchdog_seconds) as alive:
            _evaluate(run, state, 0, alive)
    bar = tqdm(total=config.steps, initial=start, desc="dpo", unit="step", mininterval=0.5, disable=None if run.progress else True, leave=False)
    pending, since = [], time.perf_counter()
    # Without a run directory there is nothing to save: a signal is the caller's affair.
    stopping = contextlib.nullcontext(StopRequest()) if run.run_dir is None else stop_on_signal()
    with bar, stopping as stop, watchdog(config.watchdog_seconds) as alive:
        for step in range(start, config.steps):
            alive()
            indices = np.asarray(run.schedule.batch(step))
            if config.length_buckets > 1:
                indices = indices[by_length(run.data.lengths(indices))]
            batch = run.data.batch(indices, config.micro_batch_rows, ways, **columns)
            state, metrics = update(state, _placed(run, batch), run.frozen)
            trained = batch["lengths"][:, ::2] if config.loss.kind == "kto" else batch["lengths"]
            pending.append((metrics, int(trained.sum())))
            bar.update()
            done, last = step + 1, step + 1 == config.steps
            evaluate = last or (config.eval_every and done % config.eval_every == 0)
            asked = stop.agreed(waits=done % config.log_every == 0)
            save = checkpoints is not None and (last or asked or (config.checkpoint_every and done % config.checkpoint_every == 0))
            if save or evaluate or done % config.log_every == 0:
                record = _record(run, pending, done, since)
                run.log(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", accuracy=f"{record['accuracy']:.3f}", refresh=False)
                if evaluate:
                    _evaluate(run, state, done, alive)
                    save = run.see_best() or save
                pending, since = [], time.perf_counter()
            if save and checkpoints is not None:
                alive.rest()
                checkpoints.save(done, state, run.references)
                if last or asked:
                    checkpoints.finish()
            if asked and not last and checkpoints is not None:
                message = f"stopped by signal {asked} after step {done}; the same command goes on from there"
                logging.warning("%s", message)
                raise Interrupted(asked, message)
    return state


def _record(run: _Run, pending, step: int, since: float) -> dict[str, Any]:
    """The record of the steps since the last one: means over steps, gradient norm and learning rate of the last."""
    host = [to_host(metrics) for metrics, _ in pending]
    seconds = time.perf_counter() - since  # with the wait for the device
    for back, found in enumerate(reversed(host)):
        if not found.pop("finite"):
            raise not_finite(step - back, found["loss"], found["grad_norm"], run.checkpoints, run.run_dir)
    tokens = sum(count for _, count in pending)
    means = {name: float(np.mean([found[name] for found in host])) for name in host[-1]}
    last = {name: host[-1][name] for name in ("grad_norm", "learning_rate")}
    rates = {"tokens": tokens, "tokens_per_s": tokens / max(seconds, 1e-9), "seconds": seconds}
    return {"kind": "dpo", "step": step, **means, **last, **rates}


def _evaluate(run: _Run, state, step: int, alive: Alive) -> None:
    """Logs loss, accuracy, margin and log-probabilities of each held-out set: the training loss on all of it at once."""
    for name, rows in run.held_out.items():
        began = time.perf_counter()
        sums = _sums(run, state, rows, name, alive)
        lengths = rows.lengths(range(len(rows)))
        loss, metrics = preference_loss(run.config.loss, jnp.asarray(sums), jnp.asarray(lengths), run.references.get(name), rows.labels_N)
        figures = {key: float(value) for key, value in {"loss": loss, **metrics}.items()}
        run.log({"kind": "eval", "step": step, "set": name, **figures, "n": len(rows), "seconds": time.perf_counter() - began})
