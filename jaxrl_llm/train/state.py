"""The training state, {"params", "opt_state", "step"}: one plain pytree, made, updated and checkpointed as a whole.

"params" is what is trained: an fp32 copy of the model's parameters or, with a low-rank adapter (`models.lora`), the adapter alone, in fp32
too. The parameters that it is put into are then `frozen`: in the model's dtype, beside the state, of every run that starts from the same
model. `whole` makes the policy of both.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.train.config import OptimizerConfig
from models import ModelConfig, abstract_params
from models.adapted import bases, merged
from models.lora import LoraConfig, adapt, adapter_of, init_lora, lora_axes

State = dict[str, Any]

# The last path entry of parameters that weight decay leaves alone: norms' scales and biases.
NOT_DECAYED = ("norm", "bias", "scale")
SPIKE_DECAY, SPIKE_WARMUP = 0.98, 20  # of the running mean of gradient norms, and updates before any is left out
VALUE_HEAD = "value_head"  # beside the model's parameters while a critic is trained: {"kernel": [d_model], "bias": []}


def resolve_decay(config: OptimizerConfig, updates: int) -> OptimizerConfig:
    """The same settings with decay_steps filled in from the run's number of updates, and normalised where nothing decays (so that runs
    of different length share one compiled update)."""
    if config.schedule == "constant":
        return dataclasses.replace(config, decay_steps=0, final_share=0.0)
    return dataclasses.replace(config, decay_steps=config.decay_steps or updates)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """update count -> learning rate: linear warm-up from 0, then constant, or a linear or cosine fall to final_share of the peak."""
    peak, final = config.learning_rate, config.final_share * config.learning_rate
    fall = max(config.decay_steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, fall),
        "cosine": lambda: optax.cosine_decay_schedule(peak, fall, alpha=config.final_share),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _decays(params):
    """True for every parameter that weight decay applies to."""

    def one(path, _):
        return not any(mark in path[-1].key for mark in NOT_DECAYED)

    return jax.tree_util.tree_map_with_path(one, params)


class SpikeState(NamedTuple):
    """inner: the optimizer's own. mean: running mean of the gradient norm (weights sum to 1 - SPIKE_DECAY^count), count: of the norms in it; skipped:
    updates left out."""

    inner: Any
    mean: jax.Array
    count: jax.Array
    skipped: jax.Array


def without_spikes(inner: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """`inner`, but an update whose gradient norm is above `factor` times its running mean is left out: parameters and moments stay as they
    are. The first SPIKE_WARMUP updates are all taken. A spike enters the mean as `factor` times it, so that norms which stay high are
    believed in time. A norm that is not finite is let through, for the guard against those to see. factor: 0 = none is left out, and the
    state is there all the same, so that a run can go on with another factor."""

    def init(params):
        return SpikeState(inner.init(params), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(grads, state, params=None):
        if not factor:
            updates, moved = inner.update(grads, state.inner, params)
            return updates, state._replace(inner=moved)
        norm = optax.tree.norm(grads).astype(jnp.float32)
        limit = factor * state.mean / jnp.maximum(1 - SPIKE_DECAY ** state.count.astype(jnp.float32), 1e-6)
        spike = (state.count >= SPIKE_WARMUP) & (norm > limit)
        updates, moved = inner.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(spike, 0, u), updates)
        moved = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner, moved)
        mean = SPIKE_DECAY * state.mean + (1 - SPIKE_DECAY) * jnp.where(spike, limit, norm)
        return updates, SpikeState(moved, mean, state.count + 1, state.skipped + spike)

    return optax.GradientTransformation(init, update)


@functools.lru_cache(maxsize=64)
def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW after a global-norm clip (if any), without the updates of spikes where those are left out. The state has one structure whatever
    the settings, so that a run can go on with others."""
    adamw = optax.adamw(
        learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_decays
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return without_spikes(optax.chain(clip, adamw), config.spike_factor)


def apply_gradients(config: OptimizerConfig, state: State, grads) -> tuple[State, dict[str, jax.Array]]:
    """(the state after one update, {"grad_norm", "learning_rate" and, where spikes are left out, "spike": 1 for an update that was}). The
    learning rate follows the updates that were made: one that is left out does not move its schedule."""
    updates, opt_state = make_optimizer(config).update(grads, state["opt_state"], state["params"])
    made = state["step"] - state["opt_state"].skipped
    metrics = {"grad_norm": optax.tree.norm(grads), "learning_rate": learning_rate(config)(made)}
    if config.spike_factor:
        metrics["spike"] = (opt_state.skipped - state["opt_state"].skipped).astype(jnp.float32)
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig, mesh=None, critic: bool = False, lora: LoraConfig | None = None) -> State:
    """The state as ShapeDtypeStructs, with shardings where there is a mesh: what a checkpoint is restored into."""
    shapes = jax.eval_shape(functools.partial(_make_state, optimizer, critic * model.d_model), trained_shapes(model, lora))
    if mesh is None:
        return shapes
    shardings = state_shardings(model, optimizer, mesh, critic, lora)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def trained_shapes(model: ModelConfig, lora: LoraConfig | None = None):
    """Shapes of what is trained, without a critic's head: always fp32, since an update of 1e-6 of a weight is lost in bf16."""
    shapes = abstract_params(model) if lora is None else jax.eval_shape(lambda: init_lora(model, lora, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)


def trunk(params):
    """The model's parameters without a critic's head."""
    return {name: value for name, value in params.items() if name != VALUE_HEAD}


def whole(lora: LoraConfig | None, trained, frozen):
    """The policy's parameters: those trained or, with an adapter, the frozen ones with the trained adapter put into them. A critic's head
    stays where it is."""
    if lora is None:
        return trained
    return adapt(frozen, trunk(trained), lora.scale) | {name: value for name, value in trained.items() if name == VALUE_HEAD}


def trained_shardings(model: ModelConfig, mesh, critic: bool = False, lora: LoraConfig | None = None):
    """A sharding for each array that is trained: by `models.sharding`, a critic's head on every device."""
    from models import sharding

    if lora is None:
        by_param = sharding.param_shardings(model, mesh)
    else:
        by_param = sharding.shardings_of(trained_shapes(model, lora), lora_axes(model, lora), mesh)
    head = _value_head(model.d_model) if critic else None
    return by_param if head is None else by_param | {VALUE_HEAD: jax.tree.map(lambda _: sharding.replicated(mesh), head)}


def whole_shardings(model: ModelConfig, mesh, critic: bool = False, lora: LoraConfig | None = None):
    """A sharding for each array of `whole`."""
    return whole(lora, trained_shardings(model, mesh, critic, lora), frozen_shardings(model, mesh, lora))


@functools.lru_cache(maxsize=8)
def laid_out(model: ModelConfig, mesh, other, lora: LoraConfig | None = None):
    """jitted policy parameters that lie on `mesh` -> the same ones on `other`, which is `models.sharding.relaid` of it."""
    from models.sharding import moved

    here, there = (whole_shardings(model, each, lora=lora) for each in (mesh, other))
    return jax.jit(lambda policy: jax.tree.map(moved, policy, here, there), out_shardings=there)


def frozen_shardings(model: ModelConfig, mesh, lora: LoraConfig | None = None):
    """A sharding for each frozen parameter; None where all are trained."""
    from models import sharding

    return None if lora is None else sharding.param_shardings(model, mesh)


def state_shardings(model: ModelConfig, optimizer: OptimizerConfig, mesh, critic: bool = False, lora: LoraConfig | None = None) -> State:
    """A sharding for each leaf: parameters as of `trained_shardings`, moments like their parameters, counters on every device."""
    from models import sharding

    by_param, everywhere, tx = trained_shardings(model, mesh, critic, lora), sharding.replicated(mesh), make_optimizer(optimizer)
    shapes = trained_shapes(model, lora)
    shapes = jax.eval_shape(tx.init, shapes | {VALUE_HEAD: _value_head(model.d_model)} if critic else shapes)
    moments = optax.tree_utils.tree_map_params(tx, lambda _, s: s, shapes, by_param, transform_non_params=lambda _: everywhere)
    return {"params": by_param, "opt_state": moments, "step": everywhere}


def _value_head(d_model: int):
    """Zeros: before it has learnt anything the critic says nothing."""
    return {"kernel": jnp.zeros(d_model, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def _make_state(optimizer: OptimizerConfig, width: int, params) -> State:
    """width: of the value head, in hidden units; 0 = none."""
    # A copy: the state is donated to every update, and the caller's parameters must outlive that.
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    if width:
        params = {**params, VALUE_HEAD: _value_head(width)}
    return {"params": params, "opt_state": make_optimizer(optimizer).init(params), "step": jnp.zeros((), jnp.int32)}


@functools.lru_cache(maxsize=16)
def _compiled_init(model: ModelConfig, optimizer: OptimizerConfig, mesh, critic, lora, fresh: bool):
    shardings = None if mesh is None else state_shardings(model, optimizer, mesh, critic, lora)
    make = functools.partial(_make_state, optimizer, critic * model.d_model)
    if not fresh:
        return jax.jit(make, out_shardings=shardings)
    return jax.jit(lambda key: make(init_lora(model, lora, key)), out_shardings=shardings)


def given(params):
    """Starting parameters, or what a function gives that was passed in their place: then nothing else need keep them in memory, once the
    training state is a copy of them."""
    return params() if callable(params) else params


def init_state(
    model: ModelConfig, optimizer: OptimizerConfig, params, mesh=None, critic: bool = False, lora: LoraConfig | None = None, seed: int = 0
) -> State:
    """The state at step 0, sharded over `mesh` if there is one: an fp32 copy of `params` (any float dtype) or, with `lora`, of the adapter in
    them; where there is none (or no params), a fresh one by `seed`. critic: with a value head of zeros among what is trained."""
    adapter = adapter_of(params) if lora is not None and params is not None else {}
    start = params if lora is None else adapter or jax.random.key(seed)
    return _compiled_init(model, optimizer, mesh, critic, lora, fresh=lora is not None and not adapter)(start)


@functools.partial(jax.jit, static_argnums=0)
def _cast(dtype: str, params):
    return jax.tree.map(lambda p: p.astype(dtype), params)


def start_params(model: ModelConfig, params, mesh=None):
    """The policy that training starts from as the model computes with it, on the mesh: a reference. An adapter is merged into it."""
    from models import sharding

    params = policy_params(model, merged(params))
    return params if mesh is None else jax.device_put(params, sharding.param_shardings(model, mesh))


def frozen_params(model: ModelConfig, params, mesh=None):
    """The same without the adapter, if they have one: what one is put into."""
    return start_params(model, bases(params), mesh)


def policy_params(model: ModelConfig, params, lora: LoraConfig | None = None, frozen=None):
    """The policy as the model computes with it, without a critic's head: what was trained, a cast copy of it in bf16, or with an adapter
    the frozen parameters with the fp32 adapter in them."""
    if lora is not None:
        return trunk(whole(lora, params, frozen))
    params = trunk(params)
    return params if model.dtype == "float32" else _cast(model.dtype, params)
