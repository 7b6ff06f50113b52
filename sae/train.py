"""Training dictionaries: the loop around sae.step's update, for one of them or for several on one stream of activations."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from tqdm import tqdm

from models.sharding import BATCH_AXES
from sae.config import SAEConfig
from sae.dictionary import Dictionary, architecture, cast, fold_decoder_norm
from sae.errors import SAEError
from sae.resume import CheckpointFolder, Member, Position, described, restore, save
from sae.step import TrainState, abstract_state, check_finite, init_state, resample, start, state_shardings, step_for
from sae.train_config import SAETrainConfig, numbers_at

Trained = tuple[Dictionary, list[dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class SAETask:
    """One dictionary of several that learn from the same stream: what it is, how it is trained, and its columns of each row: those of its
    input, of width d_in, and a transcoder's output, of width d_out. None: the first ones."""

    cfg: SAEConfig
    train: SAETrainConfig
    reads: int = 0  # the column that its input begins at
    writes: int | None = None  # the column that a transcoder's output begins at; None: behind its input

    @property
    def width(self) -> int:
        """Columns that a row must have at least."""
        return max(self.reads + self.cfg.d_in, 0 if self.cfg.d_out is None else self._writes() + self.cfg.d_out)

    def _writes(self) -> int:
        return self.reads + self.cfg.d_in if self.writes is None else self.writes

    def rows(self, batch: np.ndarray) -> np.ndarray:
        """Its part of the rows of a batch, [B, d_in] or [B, d_in + d_out]."""
        inputs = batch[:, self.reads : self.reads + self.cfg.d_in]
        if self.cfg.d_out is None:
            return inputs
        begin = self._writes()
        if begin == self.reads + self.cfg.d_in:
            return batch[:, self.reads : begin + self.cfg.d_out]
        return np.concatenate([inputs, batch[:, begin : begin + self.cfg.d_out]], axis=1)


class Stopped(Exception):
    """Training was asked to stop after `step` steps, and did. saved: whether a checkpoint was written to go on from."""

    def __init__(self, step: int, saved: bool):
        super().__init__(f"stopped after step {step}")
        self.step, self.saved = step, saved


def train_sae(
    cfg: SAEConfig,
    batches: Iterable[np.ndarray],
    train: SAETrainConfig,
    key: Array,
    *,
    mesh: Mesh | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
    progress: bool | None = None,
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int = 200,
    allow_changes: Collection[str] = (),
) -> Trained:
    """Trains a dictionary on `batches` of raw activations [B, d_in] ([B, d_in + d_out] for a transcoder): (dictionary, history).

    The first train.init_rows rows set the decoder's bias, the input scale ("expected_average_only_in") and the
    loss's scale, and are trained on too. A record of the history, every train.log_every steps and at the end, holds
    step, rows, learning_rate and that step's loss, fvu, l0, sparsity, aux, dead_share. mesh: rows over its batch
    axes, latents over "tensor". progress: a bar (default: on a terminal).
    checkpoints: saved every `checkpoint_every` steps (0: only at the end) once the rows read ahead are used up, and at the
    end. Where it holds some, training goes on from the newest and ends bit for bit like a run that was not stopped;
    `on_log` is first given the records of before. `batches` must be fresh and, if no ActivationBuffer, the same again.
    allow_changes: fields of SAETrainConfig with other values of which it goes on, such as "steps"; others must be as they were.
    Raises SAEError when the batches end too early, have another width, or hold a NaN, or the checkpoints are of another run.
    """

    def without_name(record):
        if on_log is not None:
            on_log({name: value for name, value in record.items() if name != "sae"})

    tasks = {"": SAETask(cfg, train)}
    how = {"mesh": mesh, "on_log": without_name, "progress": progress, "checkpoint_every": checkpoint_every, "allow_changes": allow_changes}
    return train_saes(tasks, batches, key, checkpoints=checkpoints, **how)[""]


def train_saes(
    tasks: Mapping[str, SAETask],
    batches: Iterable[np.ndarray],
    key: Array,
    *,
    mesh: Mesh | None = None,
    on_log: Callable[[dict], None] | None = None,
    progress: bool | None = None,
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int = 200,
    stop: Callable[[], object] | None = None,
    allow_changes: Collection[str] = (),
    on_start: Callable[[int], None] | None = None,
) -> dict[str, Trained]:
    """`train_sae` for several dictionaries on one stream, so that the model runs once for all: name -> (dictionary, history).

    A row of `batches` holds the activations of every tap that the tasks read, one behind the other (`harvest_activations` of several taps
    gives them); a task says at which column its own begin. All take as many steps. Records given to `on_log` say whose they are, under "sae".
    The first task starts from `key`, as `train_sae` does, the i-th from fold_in(key, i).
    stop: asked after each step; where its answer is true a checkpoint is written, to its end, and Stopped raised. While the rows read ahead
    are being used up there is none to write: Stopped says so. on_start: told the step after which training goes on (0: it begins), once
    the records of before have been given again.
    """
    steps = _common_steps(tasks)
    run = described(tasks, key, batches)
    shapes = [abstract_state(task.cfg, mesh) for task in tasks.values()]
    found = None if checkpoints is None else restore(checkpoints, tasks, run, shapes, batches, allow_changes)
    if found is None:
        at, states = _begin(tasks, batches, key, mesh)
    else:
        at, states = found
    loop = _Loop(tasks, at, states, key, mesh, on_log or (lambda record: None))
    for name, member in at.members.items():
        for record in member.history:
            loop.log({"sae": name} | record)
    if on_start is not None:
        on_start(at.step)
    hidden = None if progress is None else not progress
    with tqdm(total=steps, initial=at.step, desc="SAE", unit="step", mininterval=0.5, disable=hidden) as bar:
        while at.step < steps:
            loop.update(steps, bar)
            ends = stop is not None and bool(stop()) and at.step < steps
            due = ends or (checkpoint_every and at.step % checkpoint_every == 0)
            into = checkpoints if at.step >= at.ahead or at.step == steps else None
            if into is not None and (at.step == steps or due):
                for state in loop.states:
                    check_finite(state, at.step)
                save(into, at, run, loop.states, batches)
            bar.update()
            if ends:
                if into is not None:
                    into.finish()
                raise Stopped(at.step, saved=into is not None)
    if checkpoints is not None:
        checkpoints.finish()
    return {name: (_finished(task, member.cfg, state), member.history) for (name, task), member, state in loop.each()}


def _common_steps(tasks: Mapping[str, SAETask]) -> int:
    numbers = {name: task.train.steps for name, task in tasks.items()}
    if not numbers:
        raise SAEError("train_saes: no dictionaries to train; give at least one task")
    if len(set(numbers.values())) > 1:
        raise SAEError(f"train_saes: tasks ask for different numbers of steps, {numbers}; they share the stream, so give all the same")
    return next(iter(numbers.values()))


def _begin(tasks, batches, key, mesh) -> tuple[Position, list[TrainState]]:
    stream = iter(batches)
    width = max(task.width for task in tasks.values())
    sample, taken = read_ahead(stream, max(task.train.init_rows for task in tasks.values()), width, exact=len(tasks) == 1)
    members, states = {}, []
    for number, (name, task) in enumerate(tasks.items()):
        own = key if number == 0 else jax.random.fold_in(key, number)
        d, scale = start(task.cfg, task.train, task.rows(sample)[: task.train.init_rows], own)
        state = init_state(d)
        states.append(state if mesh is None else jax.device_put(state, state_shardings(state, d.cfg, mesh)))
        members[name] = Member(d.cfg, scale)
    return Position(members, itertools.chain(taken, stream), ahead=len(taken)), states


def _finished(task: SAETask, cfg: SAEConfig, state: TrainState) -> Dictionary:
    """The trained dictionary as it is used: norms folded, BatchTopK become JumpReLU, in its own dtype."""
    d, arch = Dictionary(state.params, cfg), architecture(cfg)
    if arch.finish is not None:
        d = Dictionary(*arch.finish(d.params, d.cfg))
    if task.train.decoder_norm == "free" and architecture(d.cfg).encode_sparse is None:  # else latents compete, by what folding changes
        d = fold_decoder_norm(d)
    return cast(d, task.cfg.dtype)


class _Loop:
    """The states of all tasks and one update of each on the next batch."""

    def __init__(self, tasks, at: Position, states: list[TrainState], key: Array, mesh: Mesh | None, log: Callable[[dict], None]):
        self.tasks, self.at, self.states, self.key, self.log = tasks, at, states, key, log
        self.steps = [step_for(member.cfg, task.train, mesh) for task, member in zip(tasks.values(), at.members.values(), strict=True)]
        self.put: Callable = jnp.asarray
        if mesh is not None:
            rows_over = NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.axis_names) or None))
            self.put = functools.partial(jax.device_put, device=rows_over)

    def each(self):
        """((name, task), member, state) of every dictionary."""
        return zip(self.tasks.items(), self.at.members.values(), self.states, strict=True)

    def update(self, steps: int, bar: tqdm) -> None:
        """Takes the next batch and logs what is due."""
        at = self.at
        batch = next(at.stream, None)
        if batch is None:
            raise SAEError(f"SAE training: the activations ended after {at.step} of {steps} steps; give more text or fewer steps")
        batch = np.asarray(batch, np.float32)
        fvu = []
        done, rows = at.step + 1, at.rows + len(batch)
        for i, ((name, task), member, _) in enumerate(self.each()):
            own = self.put(task.rows(batch))
            numbers = numbers_at(at.step, task.cfg.d_sae, task.train, member.scale)
            self.states[i], metrics = self.steps[i](self.states[i], own, numbers)
            self._resample(i, task, member, own, done)
            if done % task.train.log_every == 0 or done == steps:
                record = {"step": done, "rows": rows, "learning_rate": numbers.learning_rate}
                record |= {key: float(value) for key, value in jax.device_get(metrics).items()}
                check_finite(self.states[i], done)
                member.history.append(record)
                self.log({"sae": name} | record)
                fvu.append((record["fvu"], record["l0"], record["dead_share"]))
        at.step, at.rows = done, rows
        if fvu:
            means = np.mean(fvu, axis=0)
            bar.set_postfix(fvu=f"{means[0]:.3f}", l0=f"{means[1]:.1f}", dead=f"{means[2]:.1%}")

    def _resample(self, i: int, task: SAETask, member: Member, rows: Array, done: int) -> None:
        every, train = task.train.resample_every, task.train
        decay = train.steps - round(train.steps * train.decay_share)
        if every and done % every == 0 and done < decay:  # a latent that begins while the rate falls would not be learned
            key = jax.random.fold_in(jax.random.fold_in(self.key, i), done)
            threshold = train.threshold_init * member.scale.unit_out
            self.states[i] = resample(self.states[i], rows, key, train.dead_after, threshold, cfg=member.cfg)


def read_ahead(batches: Iterator[np.ndarray], rows: int, width: int, exact: bool = True) -> tuple[np.ndarray, list[np.ndarray]]:
    """(the first `rows` rows, the batches that were drawn for them). exact: rows have `width` columns and no more.
    Raises SAEError on wrong widths or NaN."""
    taken, count = [], 0
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 2 or batch.shape[1] < width or (exact and batch.shape[1] != width):
            raise SAEError(f"SAE training: a batch has shape {batch.shape}; the SAE's d_in is {width}, a transcoder's with its d_out")
        taken.append(batch)
        count += len(batch)
        if count >= rows:
            break
    if not count:
        raise SAEError("SAE training: no activations to train on")
    sample = np.concatenate(taken)[:rows].astype(np.float32)
    if not np.isfinite(sample).all():
        bad = int(np.argmin(np.isfinite(sample).all(axis=1)))
        raise SAEError(f"SAE training: activation row {bad} holds a NaN or an infinity")
    return sample, taken
