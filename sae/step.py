"""One update of a dictionary: the jitted step, what it starts from, how its state lies on a mesh. The loss is in sae.objective.

Letters: B rows, W their width, D d_in, F d_sae.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sae.base import Context, Params, centred, decoded
from sae.config import SAEConfig
from sae.dictionary import Dictionary, architecture, init, param_axes, training_pair
from sae.errors import SAEError
from sae.objective import loss
from sae.train_config import Numbers, SAETrainConfig, Scale

MESH_AXES = {"d_sae": "tensor", "d_in": None, "out": None}  # logical axis of a parameter -> mesh axis


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. moments: Adam's; idle_F: rows since each latent fired; bad_step: the first step whose
    loss was not finite, or -1."""

    params: Params
    moments: Any
    idle_F: Int[Array, "F"]
    step: Int[Array, ""]
    bad_step: Int[Array, ""]


class StepForm(NamedTuple):
    """What shapes the compiled step. aux_k: 0 leaves AuxK out. unit: decoder rows are kept at norm 1. The rest as in `sae.base.Context` and
    SAETrainConfig."""

    aux_k: int
    unit: bool
    method: str
    shards: int
    penalty: str
    matmul_dtype: str


def unit_rows(rows_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Rows scaled to norm 1; zero rows stay."""
    norms = jnp.linalg.norm(rows_FD, axis=1, keepdims=True)
    return rows_FD / jnp.where(norms > 0, norms, 1.0)


def without_parallel(gradient_FD: Array, unit_FD: Array) -> Array:
    """Each row's gradient less its part along the (unit) row: what renormalising would undo anyway, kept out of
    Adam's moments."""
    return gradient_FD - jnp.sum(gradient_FD * unit_FD, axis=1, keepdims=True) * unit_FD


@functools.partial(jax.jit, static_argnames=("cfg", "form"), donate_argnames="state")
def train_step(
    state: TrainState, rows_BW: Float[Array, "B W"], numbers: Numbers, *, cfg: SAEConfig, form: StepForm
) -> tuple[TrainState, dict[str, Array]]:
    """One update on one batch of raw activations ([x], or [x | y] for a transcoder): (new state, metrics). A batch whose loss or gradient is
    not finite leaves parameters and moments as they were; its number is kept in `bad_step`, and `step` and the counters `idle_F` move on."""
    (x, target), old = training_pair(cfg, rows_BW), state.params
    dead = state.idle_F >= numbers.dead_after
    context = Context(
        variance=numbers.variance, unit=numbers.unit_out, bandwidth=numbers.bandwidth, target_l0=numbers.target_l0, tanh_scale=numbers.tanh_scale,
        pre_act=numbers.pre_act, threshold_decay=numbers.threshold_decay, dead_F=dead, method=form.method, shards=form.shards, penalty=form.penalty,
    )  # fmt: skip

    def objective(params):
        params = params | {name: params[name].astype(form.matmul_dtype) for name in params if name.startswith("W_")}
        return loss(params, cfg, x, target, dead, context, sparsity=numbers.sparsity, aux=numbers.aux, aux_k=form.aux_k)

    (value, parts), gradient = jax.value_and_grad(objective, has_aux=True)(old)
    if form.unit:
        gradient["W_dec"] = without_parallel(gradient["W_dec"], old["W_dec"])
    sizes = typical_sizes(cfg, numbers.unit, numbers.unit_out)
    gradient = {name: g * sizes[name] for name, g in gradient.items()}
    norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, numbers.grad_clip / norm), gradient)
    updates, moments = optax.scale_by_adam(numbers.beta1, numbers.beta2).update(gradient, state.moments)
    params = {name: p - numbers.learning_rate * sizes[name] * updates[name] for name, p in old.items()}
    if form.unit:
        params["W_dec"] = unit_rows(params["W_dec"])
    if "threshold" in params:
        params["threshold"] = jnp.maximum(params["threshold"], 0.0)
    for name, measured in parts.pop("buffers").items():
        params[name] = jnp.broadcast_to(measured, params[name].shape).astype(params[name].dtype)
    good = jnp.isfinite(value + norm)
    params, moments = jax.tree.map(lambda new, kept: jnp.where(good, new, kept), (params, moments), (old, state.moments))
    idle = jnp.where(parts.pop("fired"), 0, jnp.minimum(state.idle_F, 2**30) + x.shape[0])
    bad = jnp.where((state.bad_step < 0) & ~good, state.step, state.bad_step)
    return TrainState(params, moments, idle, state.step + 1, bad), {"loss": value, **parts, "dead_share": jnp.mean(dead)}


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def resample(
    state: TrainState, rows_BW: Float[Array, "B W"], key: Array, dead_after: Array | int, threshold: Array | float, *, cfg: SAEConfig
) -> TrainState:
    """Dead latents begin anew as rows that are reconstructed badly (Bricken et al. 2023, "neuron resampling").

    A row is drawn with probability in proportion to its squared error squared. The latent then writes the direction of that row's error
    (a transcoder) or of the row itself, reads along the row with a fifth of the mean norm of the living encoder columns, and has biases of
    0, the threshold `threshold` and moments of 0.
    """
    params, dead = state.params, state.idle_F >= dead_after
    x, target = training_pair(cfg, rows_BW)
    d = Dictionary(params, cfg)
    reads = encoder_rows(d, x)
    x_hat = decoded(params, architecture(cfg).encode(params, reads, cfg), x)
    errors = jnp.sum((target - x_hat) ** 2, axis=1) ** 2
    steps = jnp.cumsum(errors)
    chosen = jnp.searchsorted(steps, jax.random.uniform(key, dead.shape) * steps[-1])
    chosen = jnp.minimum(chosen, len(x) - 1)
    columns_FD = unit_rows(reads)[chosen]
    writes_FE = columns_FD if cfg.d_out is None else unit_rows(target - x_hat)[chosen]
    norms = jnp.linalg.norm(params["W_enc"], axis=0)
    typical = 0.2 * jnp.sum(jnp.where(dead, 0.0, norms)) / jnp.maximum(jnp.sum(~dead), 1)
    fresh = {"W_enc": (columns_FD * jnp.where(typical > 0, typical, 1.0)).T, "W_dec": writes_FE}
    fresh |= {name: jnp.full_like(params[name], threshold if name == "threshold" else 0.0) for name in params if axes_of(cfg, name) == ("d_sae",)}

    def replaced(name, old, new):
        at = axes_of(cfg, name).index("d_sae")
        return jnp.where(jnp.expand_dims(dead, tuple(i for i in range(old.ndim) if i != at)), new, old)

    def cleared(tree):
        return {name: replaced(name, value, 0.0) if "d_sae" in axes_of(cfg, name) else value for name, value in tree.items()}

    moments = state.moments._replace(mu=cleared(state.moments.mu), nu=cleared(state.moments.nu))
    params = params | {name: replaced(name, params[name], new) for name, new in fresh.items()}
    return state.replace(params=params, moments=moments, idle_F=jnp.where(dead, 0, state.idle_F))


def typical_sizes(cfg: SAEConfig, unit: Array | float, unit_out: Array | float) -> dict[str, Array | float]:
    """By how much each parameter grows with the activations' scale (`Scale`): latents are on the target's, with decoder rows of norm 1.

    Adam's updates have one size for all parameters. Measured in these sizes, training is the same at any scale of the activations: what
    it gives for rows times c is what it gives for the rows, times c.
    """
    latents, arch = unit_out, architecture(cfg)
    grow: dict[str, Array | float] = dict.fromkeys((*arch.norm_scaled, "b_dec"), latents)
    grow |= {"W_enc": latents / unit, "W_skip": latents / unit}
    return {name: grow.get(name, 1.0) for name in param_axes(cfg)}


def axes_of(cfg: SAEConfig, name: str) -> tuple[str, ...]:
    """The logical axes of one parameter."""
    return param_axes(cfg)[name]


def encoder_rows(d: Dictionary, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Normalised rows as the encoder reads them."""
    return centred(d.params, x, bool(d.cfg.apply_b_dec_to_input))


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


def start(cfg: SAEConfig, train: SAETrainConfig, sample: np.ndarray, key: Array) -> tuple[Dictionary, Scale]:
    """The dictionary before its first step and the scale of what it sees, from a sample of raw rows."""
    if cfg.normalize_activations == "expected_average_only_in":
        if cfg.input_scale == 1.0:
            cfg = cfg.replace(input_scale=scale_to_root(sample[:, : cfg.d_in]))
        if cfg.d_out is not None and cfg.output_scale == 1.0:
            cfg = cfg.replace(output_scale=scale_to_root(sample[:, cfg.d_in :]))
    scale = scale_of(cfg, sample)
    target = np.asarray(training_pair(cfg, jnp.asarray(sample))[1])
    d = init(cfg.replace(dtype="float32"), key)
    centres = {"geometric_median": geometric_median, "mean": lambda r: r.mean(axis=0), "zero": lambda r: np.zeros(cfg.out)}
    params = d.params | {"b_dec": jnp.asarray(centres[train.b_dec_init](target), jnp.float32)}
    further = architecture(cfg).start
    if further is not None:
        params |= further(cfg, scale.unit_out, train.threshold_init)
    params["W_enc"] = params["W_enc"] * (scale.unit_out / scale.unit)  # latents on the target's scale, the input's own in most autoencoders
    return d.replace(params=params), scale


def scale_of(cfg: SAEConfig, sample: np.ndarray) -> Scale:
    """The scale of a sample of raw rows ([x], or [x | y] for a transcoder). Raises SAEError where they are all equal."""
    x, target = (np.asarray(rows) for rows in training_pair(cfg, jnp.asarray(sample)))
    variance = float(np.square(target - target.mean(axis=0)).sum(axis=1).mean())
    unit, unit_out = (float(np.sqrt(np.square(rows - rows.mean(axis=0)).mean())) for rows in (x, target))
    if min(unit, unit_out) <= 0:
        raise SAEError("SAE training: the first activations are all equal; there is nothing to learn")
    return Scale(variance, unit, unit_out)


def scale_to_root(rows: np.ndarray) -> float:
    """What makes the mean norm of `rows` the square root of their width."""
    return rows.shape[1] ** 0.5 / max(float(np.linalg.norm(rows, axis=1).mean()), 1e-12)


def init_state(d: Dictionary) -> TrainState:
    """The state before the first step, from fp32 parameters."""
    moments = optax.scale_by_adam().init(d.params)
    return TrainState(d.params, moments, jnp.zeros(d.cfg.d_sae, jnp.int32), jnp.int32(0), jnp.int32(-1))


def step_for(cfg: SAEConfig, train: SAETrainConfig, mesh: Mesh | None = None) -> Callable[..., Any]:
    """`train_step` with its static settings: (state, batch, numbers) -> (state, metrics)."""
    method = train.method
    if method == "sparse" and not architecture(cfg).gathers_from:
        raise SAEError(f"SAE training: method is 'sparse', but {cfg.architecture} has dense products only; choose 'auto'")
    if method == "sparse" and train.matmul_dtype != "float32":
        raise SAEError(f"SAE training: method is 'sparse', which is fp32, and matmul_dtype {train.matmul_dtype!r}; choose method 'dense'")
    if method == "auto":
        one_cpu = jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1)
        gathers = architecture(cfg).gathers_from if train.matmul_dtype == "float32" else 0
        method = "sparse" if one_cpu and gathers and cfg.d_sae >= gathers * (cfg.k or 0) else "dense"
    aux = architecture(cfg).aux if train.aux_coefficient is None else train.aux_coefficient
    form = StepForm(
        aux_k=(train.aux_k or max(1, cfg.d_in // 2)) if aux else 0,
        unit=train.decoder_norm == "unit",
        method=method,
        shards=1 if mesh is None else dict(mesh.shape).get(MESH_AXES["d_sae"], 1),
        penalty=train.penalty,
        matmul_dtype=train.matmul_dtype,
    )
    return functools.partial(train_step, cfg=cfg, form=form)


def state_shardings(state: TrainState, cfg: SAEConfig, mesh: Mesh) -> TrainState:
    """Where each array of the state lives: latents over the mesh axis of MESH_AXES, the rest on every device."""
    specs = {}
    for name, axes in param_axes(cfg).items():
        where = [MESH_AXES[a] if MESH_AXES[a] in mesh.axis_names else None for a in axes]
        if "d_sae" in axes and "tensor" in mesh.axis_names and cfg.d_sae % mesh.shape["tensor"]:
            raise SAEError(f"SAE training: d_sae {cfg.d_sae} does not divide over {mesh.shape['tensor']} devices")
        specs[name] = PartitionSpec(*where)

    def place(path, leaf):
        name = next((p.key for p in reversed(path) if isinstance(p, jax.tree_util.DictKey)), None)
        return NamedSharding(mesh, specs[name] if name in specs and np.ndim(leaf) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


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
