"""Training a dictionary: one jitted step and the loop around it (the loss is in sae.objective).

Letters: B rows, D d_in, F d_sae.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from models.sharding import BATCH_AXES
from sae.architectures import Params
from sae.config import SAEConfig, choice
from sae.dictionary import Dictionary, architecture, fold_decoder_norm, init, normalise
from sae.errors import SAEError
from sae.objective import default_learning_rate, loss
from sae.resume import CheckpointFolder, Position, described, restore, save
from sae.sparse import sparse_pays

MESH_AXES = {"d_sae": "tensor", "d_in": None}  # logical axis of a parameter -> mesh axis


@dataclasses.dataclass(frozen=True)
class SAETrainConfig:
    """How a dictionary is trained."""

    steps: int = 1000  # updates; each takes one batch
    learning_rate: float | None = None  # peak; None: 2e-4 / sqrt(d_sae / 2^14)
    warmup_steps: int = 50  # linear rise from 0
    decay_share: float = 0.2  # last share of the steps, over which the rate falls linearly to 0
    beta1: float = 0.9  # Adam's moments
    beta2: float = 0.999
    grad_clip: float = 1.0  # global norm; 0: none
    l1_coefficient: float = 0.0  # weight of the sparsity penalty ("relu")
    l1_warmup_steps: int = 0  # linear rise of that weight
    aux_coefficient: float = 1 / 32  # weight of AuxK; 0: off
    aux_k: int | None = None  # dead latents that AuxK lets into each row; None: d_in / 2
    dead_after: int = 1_000_000  # rows without firing after which a latent counts as dead
    decoder_norm: str = "unit"  # "unit": rows kept at norm 1; "free": unconstrained, norms folded into the encoder last
    b_dec_init: str = "geometric_median"  # of the first rows; or "mean", "zero"
    init_rows: int = 32_768  # rows read ahead for b_dec, the input scale and the variance (they are trained on too)
    method: str = "auto"  # "dense" or "sparse" products; auto: the faster one (sae.sparse.sparse_pays)
    log_every: int = 50  # steps between records of the history

    def __post_init__(self):
        choice("decoder_norm", self.decoder_norm, ("unit", "free"))
        choice("b_dec_init", self.b_dec_init, ("geometric_median", "mean", "zero"))
        choice("method", self.method, ("auto", "dense", "sparse"))
        least = dict.fromkeys(("steps", "log_every", "init_rows", "dead_after", "aux_k"), 1)
        least |= dict.fromkeys(("warmup_steps", "l1_warmup_steps", "grad_clip", "l1_coefficient", "aux_coefficient"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise SAEError(f"SAE training: {name} is {value}; give {low} or more")
        if self.learning_rate is not None and not 0.0 < self.learning_rate < math.inf:
            raise SAEError(f"SAE training: learning_rate is {self.learning_rate}; give a positive number")
        if not 0.0 <= self.decay_share <= 1.0:
            raise SAEError(f"SAE training: decay_share is {self.decay_share}; give a share between 0 and 1")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SAEError(f"SAE training: {name} is {getattr(self, name)}; give a number from 0 to below 1")


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. moments: Adam's; idle_F: rows since each latent fired; bad_step: the first step whose
    loss was not finite, or -1."""

    params: Params
    moments: Any
    idle_F: Int[Array, "F"]
    step: Int[Array, ""]
    bad_step: Int[Array, ""]


class Numbers(NamedTuple):
    """The settings that are arguments of the compiled step, so that other values compile nothing anew."""

    learning_rate: float
    l1: float
    aux: float
    grad_clip: float
    beta1: float
    beta2: float
    dead_after: int
    variance: float


def numbers_at(step: int, cfg: SAEConfig, train: SAETrainConfig, variance: float) -> Numbers:
    """The numbers of the update after `step` others: the rate rises linearly, stays, and falls linearly to zero."""
    rate = train.learning_rate or default_learning_rate(cfg.d_sae)
    rise = min(1.0, (step + 1) / max(train.warmup_steps, 1))
    fall = min(1.0, (train.steps - step) / max(round(train.steps * train.decay_share), 1))
    l1 = train.l1_coefficient * min(1.0, (step + 1) / max(train.l1_warmup_steps, 1))
    clip = train.grad_clip or math.inf
    return Numbers(rate * rise * fall, l1, train.aux_coefficient, clip, train.beta1, train.beta2, train.dead_after, variance)


def unit_rows(rows_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Rows scaled to norm 1; zero rows stay."""
    norms = jnp.linalg.norm(rows_FD, axis=1, keepdims=True)
    return rows_FD / jnp.where(norms > 0, norms, 1.0)


def without_parallel(gradient_FD: Array, unit_FD: Array) -> Array:
    """Each row's gradient less its part along the (unit) row: what renormalising would undo anyway, kept out of
    Adam's moments."""
    return gradient_FD - jnp.sum(gradient_FD * unit_FD, axis=1, keepdims=True) * unit_FD


@functools.partial(jax.jit, static_argnames=("cfg", "aux_k", "unit", "method", "shards"), donate_argnames="state")
def train_step(
    state: TrainState,
    x_BD: Float[Array, "B D"],
    numbers: Numbers,
    *,
    cfg: SAEConfig,
    aux_k: int,
    unit: bool,
    method: str,
    shards: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One update on one batch of raw activations: (new state, metrics). A batch whose loss or gradient is not finite
    changes nothing but `bad_step`. aux_k: 0 leaves AuxK out. unit: keep decoder rows at norm 1."""
    x, old = normalise(cfg, x_BD)[0], state.params
    dead = state.idle_F >= numbers.dead_after
    objective = functools.partial(
        loss, variance=numbers.variance, l1=numbers.l1, aux=numbers.aux, aux_k=aux_k, method=method, shards=shards
    )
    (value, parts), gradient = jax.value_and_grad(objective, has_aux=True)(old, cfg, x, dead)
    if unit:
        gradient["W_dec"] = without_parallel(gradient["W_dec"], old["W_dec"])
    norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, numbers.grad_clip / norm), gradient)
    updates, moments = optax.scale_by_adam(numbers.beta1, numbers.beta2).update(gradient, state.moments)
    params = jax.tree.map(lambda p, u: p - numbers.learning_rate * u, old, updates)
    if unit:
        params["W_dec"] = unit_rows(params["W_dec"])
    good = jnp.isfinite(value + norm)
    params, moments = jax.tree.map(lambda new, kept: jnp.where(good, new, kept), (params, moments), (old, state.moments))
    idle = jnp.where(parts.pop("fired"), 0, jnp.minimum(state.idle_F, 2**30) + x.shape[0])
    bad = jnp.where((state.bad_step < 0) & ~good, state.step, state.bad_step)
    return TrainState(params, moments, idle, state.step + 1, bad), {"loss": value, **parts, "dead_share": jnp.mean(dead)}


def geometric_median(rows: np.ndarray, iterations: int = 50, tolerance: float = 1e-5) -> np.ndarray:
    """The point with the smallest mean distance to `rows` (Weiszfeld's iterations): a centre that outliers do not move."""
    median = rows.mean(axis=0)
    for _ in range(iterations):
        weights = 1.0 / np.maximum(np.linalg.norm(rows - median, axis=1), 1e-8)
        moved = weights @ rows / weights.sum()
        done = np.linalg.norm(moved - median) <= tolerance * max(float(np.linalg.norm(moved)), 1e-8)
        median = moved
        if done:
            break
    return median.astype(np.float32)


def read_ahead(batches: Iterator[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(the first `rows` rows, the batches that were drawn for them). Raises SAEError on wrong widths or NaN."""
    taken, count = [], 0
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 2 or batch.shape[1] != width:
            raise SAEError(f"SAE training: a batch has shape {batch.shape}; the SAE's d_in is {width}")
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


def start(cfg: SAEConfig, train: SAETrainConfig, sample: np.ndarray, key: Array) -> tuple[Dictionary, float]:
    """The dictionary before its first step and the variance that scales the loss, from a sample of raw rows."""
    if cfg.normalize_activations == "expected_average_only_in" and cfg.input_scale == 1.0:
        mean_norm = float(np.linalg.norm(sample, axis=1).mean())
        cfg = cfg.replace(input_scale=cfg.d_in**0.5 / max(mean_norm, 1e-12))
    rows = np.asarray(normalise(cfg, jnp.asarray(sample))[0])
    variance = float(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean())
    if variance <= 0:
        raise SAEError("SAE training: the first activations are all equal; there is nothing to learn")
    d = init(cfg.replace(dtype="float32"), key)
    centres = {"geometric_median": geometric_median, "mean": lambda r: r.mean(axis=0), "zero": lambda r: np.zeros(cfg.d_in)}
    b_dec = jnp.asarray(centres[train.b_dec_init](rows), jnp.float32)
    return d.replace(params=d.params | {"b_dec": b_dec}), variance


def init_state(d: Dictionary) -> TrainState:
    """The state before the first step, from fp32 parameters."""
    moments = optax.scale_by_adam().init(d.params)
    return TrainState(d.params, moments, jnp.zeros(d.cfg.d_sae, jnp.int32), jnp.int32(0), jnp.int32(-1))


def step_for(cfg: SAEConfig, train: SAETrainConfig, mesh: Mesh | None = None) -> Callable[..., Any]:
    """`train_step` with its static settings: (state, batch, numbers) -> (state, metrics)."""
    aux_k = (train.aux_k or max(1, cfg.d_in // 2)) if train.aux_coefficient else 0
    method = train.method
    if method == "auto":
        one_cpu = jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1)
        method = "sparse" if one_cpu and architecture(cfg).needs_k and sparse_pays(cfg.d_sae, cfg.k) else "dense"
    shards = 1 if mesh is None else dict(mesh.shape).get(MESH_AXES["d_sae"], 1)
    unit = train.decoder_norm == "unit"
    return functools.partial(train_step, cfg=cfg, aux_k=aux_k, unit=unit, method=method, shards=shards)


def state_shardings(state: TrainState, cfg: SAEConfig, mesh: Mesh) -> TrainState:
    """Where each array of the state lives: latents over the mesh axis of MESH_AXES, the rest on every device."""
    specs = {}
    for name, axes in architecture(cfg).axes.items():
        where = [MESH_AXES[a] if MESH_AXES[a] in mesh.axis_names else None for a in axes]
        if "d_sae" in axes and "tensor" in mesh.axis_names and cfg.d_sae % mesh.shape["tensor"]:
            raise SAEError(f"SAE training: d_sae {cfg.d_sae} does not divide over {mesh.shape['tensor']} devices")
        specs[name] = PartitionSpec(*where)

    def place(path, leaf):
        name = next((p.key for p in reversed(path) if isinstance(p, jax.tree_util.DictKey)), None)
        return NamedSharding(mesh, specs[name] if name in specs and np.ndim(leaf) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


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
) -> tuple[Dictionary, list[dict[str, float]]]:
    """Trains a dictionary on `batches` of raw activations [B, d_in]: (dictionary, history).

    The first train.init_rows rows set the decoder's bias, the input scale ("expected_average_only_in") and the
    loss's scale, and are trained on too. A record of the history, every train.log_every steps and at the end, holds
    step, rows, learning_rate and that step's loss, fvu, l0, l1, aux, dead_share. mesh: rows over its batch
    axes, latents over "tensor". progress: a bar (default: on a terminal).
    checkpoints: saved every `checkpoint_every` steps (0: only at the end) once the rows read ahead are used up, and at the
    end. Where it holds some, training goes on from the newest and ends bit for bit like a run that was not stopped;
    `on_log` is first given the records of before. `batches` must be fresh and, if no ActivationBuffer, the same again.
    Raises SAEError when the batches end too early, have another width, or hold a NaN, or the checkpoints are of another run.
    """
    run = described(cfg, train, key, batches)
    found = None if checkpoints is None else restore(checkpoints, cfg, run, abstract_state(cfg, mesh), batches)
    if found is None:
        stream = iter(batches)
        sample, taken = read_ahead(stream, train.init_rows, cfg.d_in)
        d, variance = start(cfg, train, sample, key)
        at, state = Position(d.cfg, variance, itertools.chain(taken, stream), ahead=len(taken)), init_state(d)
        state = state if mesh is None else jax.device_put(state, state_shardings(state, d.cfg, mesh))
    else:
        at, state = found
    put, step, log = jnp.asarray, step_for(at.cfg, train, mesh), on_log or (lambda record: None)
    if mesh is not None:
        rows_over = NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.axis_names) or None))
        put = functools.partial(jax.device_put, device=rows_over)
    for record in at.history:
        log(record)
    hidden = None if progress is None else not progress
    bar = tqdm(total=train.steps, initial=at.step, desc="SAE", unit="step", mininterval=0.5, disable=hidden)
    while at.step < train.steps:
        batch = next(at.stream, None)
        if batch is None:
            raise SAEError(f"SAE training: the activations ended after {at.step} of {train.steps} steps; give more text or fewer steps")
        numbers = numbers_at(at.step, at.cfg, train, at.variance)
        state, metrics = step(state, put(np.asarray(batch, np.float32)), numbers)
        at.step, at.rows = at.step + 1, at.rows + len(batch)
        last = at.step == train.steps
        if at.step % train.log_every == 0 or last:
            record = {"step": at.step, "rows": at.rows, "learning_rate": numbers.learning_rate}
            record |= {name: float(value) for name, value in jax.device_get(metrics).items()}
            check_finite(state, at.step)
            at.history.append(record)
            log(record)
            bar.set_postfix(fvu=f"{record['fvu']:.3f}", l0=f"{record['l0']:.1f}", dead=f"{record['dead_share']:.1%}")
        if checkpoints is not None and at.step >= at.ahead and (last or (checkpoint_every and at.step % checkpoint_every == 0)):
            check_finite(state, at.step)
            save(checkpoints, at, run, state, batches)
        bar.update()
    bar.close()
    if checkpoints is not None:
        checkpoints.finish()
    d = Dictionary(state.params, at.cfg)
    d = fold_decoder_norm(d) if train.decoder_norm == "free" and not architecture(cfg).needs_k else d
    return Dictionary(jax.tree.map(lambda a: a.astype(cfg.dtype), d.params), d.cfg.replace(dtype=cfg.dtype)), at.history


def abstract_state(cfg: SAEConfig, mesh: Mesh | None = None) -> TrainState:
    """The shapes of the train state, with shardings where there is a mesh: what a checkpoint is restored into."""
    full = cfg.replace(dtype="float32")  # as `start` makes it, whatever the dictionary is rounded to at the end
    shapes = jax.eval_shape(lambda key: init_state(init(full, key)), jax.random.key(0))
    if mesh is None:
        return shapes
    placed = state_shardings(shapes, cfg, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def check_finite(state: TrainState, steps: int) -> None:
    """Raises SAEError naming the first bad step, if there was one."""
    bad = int(state.bad_step)
    if bad >= 0:
        raise SAEError(
            f"SAE training: the loss or its gradient was not finite at step {bad + 1} (noticed at step {steps}): a NaN in"
            " the activations, or a learning rate too high"
        )
