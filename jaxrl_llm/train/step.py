"""The jitted GRPO update: micro-batches, gradient accumulation, AdamW, on one device or a mesh.

A batch is a dict of host or device arrays with a leading micro-batch axis M; g prompts and r = g x S completions a micro-batch:
  prompts [M, g, P] int32, prompt_lengths [M, g]; completions [M, r, C] int32, lengths [M, r] (0 = padding row);
  sampler_logps [M, r, C] fp32; rewards [M, r] fp32, valid [M, r] bool, group_ids [M, r] int32 (one value a prompt id, below M x r);
  and, where used, old_logps and ref_logps [M, r, C] fp32, or kl [M, r, C] fp32, the estimates that the rewards pay for;
  with a critic values [M, r, C] fp32, by the policy that sampled. Of a part of a rollout, which makes an update of its own, also what only
  the whole tells (`compiled_targets`): advantages [M, r] or [M, r, C] and, with a critic, returns [M, r, C].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import models
from jaxrl_llm.losses.grpo import Totals, batch_advantages, batch_totals, group_advantages, grpo_loss, kl_estimate, to_go
from jaxrl_llm.losses.logprobs import default_chunk, token_logprobs
from jaxrl_llm.losses.ppo import gae, token_values, value_loss
from jaxrl_llm.train.checks import remat_of, trained_as
from jaxrl_llm.train.config import GRPOConfig, LossConfig, OptimizerConfig
from jaxrl_llm.train.forward import completion_hidden, policy_logprobs
from jaxrl_llm.train.state import (
    VALUE_HEAD,
    State,
    apply_gradients,
    frozen_shardings,
    resolve_decay,
    state_shardings,
    trunk,
    whole,
    whole_shardings,
)
from models import ModelConfig
from models.lora import LoraConfig
from models.sharding import batch_ways, param_shardings

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """All that shapes the compiled update: one compilation a distinct value, batch shape and mesh."""

    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    temperature: float
    max_new_tokens: int  # the constant length of "dr_grpo"
    shared_prefix: bool = True
    remat: bool | str = False  # as of `models.forward`
    logprob_chunk: int | None = None
    lora: LoraConfig | None = None
    length_buckets: int = 1  # widths that a micro-batch may be cut to: equal steps up to that of the batch


def step_spec(model: ModelConfig, config: GRPOConfig) -> StepSpec:
    """The static part of a run's settings."""
    return StepSpec(
        model=trained_as(model, config),
        loss=config.loss,
        optimizer=resolve_decay(config.optimizer, config.steps * config.inner_epochs * config.updates_per_epoch),
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        shared_prefix=config.shared_prefix,
        remat=remat_of(config),
        logprob_chunk=config.logprob_chunk,
        lora=config.lora.adapter,
        length_buckets=config.length_buckets,
    )


def completion_mask(batch: Batch) -> jax.Array:
    """[..., r, C] bool: completion tokens of rows that have a verdict."""
    index_C = jnp.arange(batch["completions"].shape[-1])
    return (index_C < batch["lengths"][..., None]) & batch["valid"][..., None]


def advantages(spec: StepSpec, batch: Batch) -> jax.Array:
    """[M, r] advantages, or [M, r, C] with baseline "batch_mean", over the whole batch: a group may be spread over micro-batches."""
    loss, rewards, mask = spec.loss, batch["rewards"], completion_mask(batch)
    if loss.kl_place == "sequence_reward":
        rewards = rewards - loss.kl_coef * jnp.sum(jnp.where(mask, batch["kl"], 0.0), axis=-1)
    how = {"scale": loss.advantage_scale, "ddof": loss.advantage_ddof, "eps": loss.advantage_eps}
    if loss.baseline == "batch_mean":
        returns = jnp.broadcast_to(rewards[..., None], mask.shape)
        if loss.kl_place == "token_reward":
            returns = returns - loss.kl_coef * to_go(batch["kl"], mask)
        rows = (-1, mask.shape[-1])
        return batch_advantages(returns.reshape(rows), mask.reshape(rows), **how).reshape(mask.shape)
    ids, valid = batch["group_ids"].reshape(-1), batch["valid"].reshape(-1)
    return group_advantages(rewards.reshape(-1), ids, rewards.size, valid, baseline=loss.baseline, **how).reshape(rewards.shape)


def critic_targets(spec: StepSpec, batch: Batch) -> Batch:
    """"advantages" and "returns" [M, r, C] by the old values: the reward comes with a completion's last token, the price of KL with each."""
    loss, mask = spec.loss, completion_mask(batch)
    last = jnp.arange(mask.shape[-1]) == batch["lengths"][..., None] - 1
    rewards = jnp.where(last, batch["rewards"][..., None], 0.0)
    if loss.kl_place == "token_reward":
        rewards = rewards - loss.kl_coef * batch["kl"]
    elif loss.kl_place == "sequence_reward":
        rewards = rewards - jnp.where(last, loss.kl_coef * jnp.sum(jnp.where(mask, batch["kl"], 0.0), axis=-1, keepdims=True), 0.0)
    rows = lambda x: x.reshape(-1, mask.shape[-1])  # noqa: E731
    raw = gae(rows(rewards), rows(batch["values"]), rows(mask), gamma=loss.gamma, lam=loss.gae_lambda)
    scaled = batch_advantages(raw, rows(mask), scale=loss.advantage_scale, ddof=loss.advantage_ddof, eps=loss.advantage_eps)
    return {"advantages": scaled.reshape(mask.shape), "returns": raw.reshape(mask.shape) + batch["values"]}


def _targets(spec: StepSpec, batch: Batch) -> Batch:
    return critic_targets(spec, batch) if spec.loss.critic else {"advantages": advantages(spec, batch)}


def _entropy(spec: StepSpec) -> bool | str:
    """What `token_logprobs` is to give: the entropy is a metric, and with a coefficient a term of the loss."""
    return "gradient" if spec.loss.entropy_coef else True


def _values(spec: StepSpec, params, micro: Batch):
    """(log-probabilities, entropies, values) [r, C] by one forward pass."""
    compute = jax.tree.map(lambda p: p.astype(spec.model.dtype), trunk(params))
    hidden = completion_hidden(
        spec.model,
        compute,
        micro["prompts"],
        micro["prompt_lengths"],
        micro["completions"],
        micro["lengths"],
        remat=spec.remat,
        shared_prefix=spec.shared_prefix,
    )
    how = {"temperature": spec.temperature, "chunk": spec.logprob_chunk, "with_entropy": _entropy(spec)}
    logps, entropy = token_logprobs(hidden, models.head(spec.model, compute).spread(), micro["completions"], **how)
    head = params[VALUE_HEAD]
    return logps, entropy, token_values(hidden, head["kernel"], head["bias"])


def micro_loss(trained, spec: StepSpec, micro: Batch, totals: Totals, frozen=None):
    """(loss, (metrics, log-probabilities [r, C])) of one micro-batch; `micro` holds "advantages" [r] or [r, C] too.

    Every metric is a sum over tokens divided by the whole batch's token count, so that those of micro-batches add up, except
    "logp_diff_max", of which the largest counts."""
    params = whole(spec.lora, trained, frozen)
    if spec.loss.critic:
        logps, entropy, values = _values(spec, params, micro)
    else:
        (logps, entropy), values = policy_logprobs(spec, params, micro, with_entropy=_entropy(spec)), None
    mask = completion_mask(micro)
    loss, metrics = grpo_loss(
        logps,
        micro.get("old_logps"),
        micro["advantages"],
        mask,
        clip_low=spec.loss.clip_low,
        clip_high=spec.loss.clip_high,
        ratio=spec.loss.ratio,
        surrogate=spec.loss.surrogate,
        mismatch=spec.loss.mismatch,
        mismatch_cap=spec.loss.mismatch_cap,
        sampler_logps=micro["sampler_logps"],
        aggregation=spec.loss.aggregation,
        kl=spec.loss.kl if spec.loss.kl_place == "loss" else None,
        kl_coef=spec.loss.kl_coef,
        ref_logps=micro.get("ref_logps"),
        entropy_coef=spec.loss.entropy_coef,
        entropy=entropy,
        max_length=spec.max_new_tokens,
        totals=totals,
    )
    tokens = jnp.maximum(totals.tokens, 1.0)
    difference = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(logps) - micro["sampler_logps"]), 0.0)
    metrics |= {
        "entropy": jnp.sum(jnp.where(mask, jax.lax.stop_gradient(entropy), 0.0)) / tokens,
        "logp_diff_mean": jnp.sum(difference) / tokens,
        "logp_diff_max": jnp.max(difference),
    }
    if values is not None:
        missed = value_loss(values, micro["values"], micro["returns"], mask, clip=spec.loss.value_clip, totals=totals)
        loss = loss + spec.loss.value_coef * missed
        metrics |= {"value_loss": jax.lax.stop_gradient(missed), "value": jnp.sum(jnp.where(mask, micro["values"], 0.0)) / tokens}
    if "kl" in micro:
        metrics["kl"] = jnp.sum(jnp.where(mask, micro["kl"], 0.0)) / tokens
    return loss, (metrics, jax.lax.stop_gradient(logps))


PER_TOKEN = ("completions", "sampler_logps", "old_logps", "ref_logps", "kl", "values", "returns", "advantages")


def cut_to_length(spec: Any, run: Callable[[Batch], tuple[Any, Any]], micro: Batch) -> tuple[Any, Any]:
    """run(micro) -> (anything, [r, C] or None) on the micro-batch cut to the smallest width of `spec.length_buckets` that holds its longest
    completion.

    Each width is a branch of one program, so that only compilation grows with their number; what is cut off of the second result is 0.
    """
    width, steps = micro["completions"].shape[-1], spec.length_buckets
    widths = sorted({-(-width * step // steps) for step in range(1, steps + 1)})

    def narrow(size, micro):
        cut = {name: x[:, :size] if name in PER_TOKEN and x.ndim == 2 else x for name, x in micro.items()}
        found, tokens = run(cut)
        return found, jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, width - size))), tokens)

    if len(widths) == 1:
        return run(micro)
    which = jnp.sum(jnp.max(micro["lengths"]) > jnp.array(widths[:-1]))
    return jax.lax.switch(which, [functools.partial(narrow, size) for size in widths], micro)


def loss_and_grads(spec: StepSpec, params, batch: Batch, frozen=None):
    """(loss, metrics, gradients, log-probabilities [M, r, C]) of the whole batch, one micro-batch in memory at a time. params: what is
    trained; frozen: what an adapter is put into (see `train.state`)."""
    totals = batch_totals(completion_mask(batch).reshape(-1, batch["completions"].shape[-1]))
    micros = batch if "advantages" in batch else batch | _targets(spec, batch)
    grad_fn = jax.value_and_grad(functools.partial(micro_loss, spec=spec, totals=totals, frozen=frozen), has_aux=True)

    def run(micro):
        (loss, (metrics, logps)), grads = grad_fn(params, micro=micro)
        return ({"loss": loss, **metrics}, grads), logps

    def one(micro):
        (metrics, grads), logps = cut_to_length(spec, run, micro)
        return metrics, grads, logps

    if batch["prompts"].shape[0] == 1:
        metrics, grads, logps = one(jax.tree.map(lambda x: x[0], micros))
        return metrics.pop("loss"), metrics, grads, logps[None]

    def body(total, micro):
        metrics, grads, logps = one(micro)
        return jax.tree.map(jnp.add, total, grads), (metrics, logps)

    grads, (metrics, logps) = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), micros)
    metrics = {name: jnp.max(x) if name.endswith("_max") else jnp.sum(x) for name, x in metrics.items()}
    return metrics.pop("loss"), metrics, grads, logps


def _update(spec: StepSpec, state: State, batch: Batch, frozen=None):
    loss, metrics, grads, logps = loss_and_grads(spec, state["params"], batch, frozen)
    state, moved = apply_gradients(spec.optimizer, state, grads)
    return state, metrics | {"loss": loss} | moved, logps


def batch_shardings(mesh) -> NamedSharding:
    """Rows of every micro-batch over the batch axes of the mesh; the micro-batch axis is a loop, not sharded."""
    from models import sharding

    rows = sharding.batch_sharding(mesh).spec
    return NamedSharding(mesh, PartitionSpec(None, *rows[:1]))


def chunk_on(spec: Any, mesh: Any) -> Any:
    """The spec with a chunk of logits as large on each device as it would be on one: rows of a batch are shared by the mesh's batch axes.
    spec: has `model` and `logprob_chunk`, in tokens a device."""
    chunk = spec.logprob_chunk or default_chunk(spec.model.vocab_size)
    return spec if mesh is None else dataclasses.replace(spec, logprob_chunk=chunk * batch_ways(mesh))


@functools.lru_cache(maxsize=64)
def compiled_update(spec: StepSpec, mesh=None):
    """jitted (state, batch, frozen parameters or None) -> (state, metrics, log-probabilities); the state is donated. Cached, so runs
    share compilations."""
    spec = chunk_on(spec, mesh)
    if mesh is None:
        return jax.jit(functools.partial(_update, spec), donate_argnums=0)
    shardings, rows = state_shardings(spec.model, spec.optimizer, mesh, spec.loss.critic, spec.lora), batch_shardings(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        functools.partial(_update, spec),
        in_shardings=(shardings, rows, frozen_shardings(spec.model, mesh, spec.lora)),
        out_shardings=(shardings, everywhere, rows),
        donate_argnums=0,
    )


def _each(spec: StepSpec, per_token: Callable[[Batch], jax.Array], batch: Batch) -> jax.Array:
    """[M, r, C] of a function of one micro-batch."""
    return jax.lax.map(lambda micro: cut_to_length(spec, lambda cut: (None, per_token(cut)), micro)[1], batch)


@functools.lru_cache(maxsize=64)
def compiled_targets(spec: StepSpec, mesh=None):
    """jitted batch of a whole rollout -> (its advantages and, with a critic, returns; {"logp_diff_mean", "logp_diff_max"} of its old
    log-probabilities against the sampler's)."""

    def run(batch):
        mask = completion_mask(batch)
        difference = jnp.where(mask, jnp.abs(batch["old_logps"] - batch["sampler_logps"]), 0.0)
        mean = jnp.sum(difference) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
        return _targets(spec, batch), {"logp_diff_mean": mean, "logp_diff_max": jnp.max(difference)}

    if mesh is None:
        return jax.jit(run)
    rows = batch_shardings(mesh)
    return jax.jit(run, in_shardings=rows, out_shardings=(rows, NamedSharding(mesh, PartitionSpec())))


@functools.lru_cache(maxsize=64)
def compiled_logprobs(spec: StepSpec, mesh=None, adapted: bool = False):
    """jitted (params, batch) -> log-probabilities [M, r, C] without gradients. adapted: the params are whole ones, with the adapter of `spec`
    if it has one; else those of a reference, which has none."""
    spec = chunk_on(spec, mesh)

    def run(params, batch):
        return _each(spec, lambda micro: policy_logprobs(spec, params, micro)[0], batch)

    if mesh is None:
        return jax.jit(run)
    rows, params = batch_shardings(mesh), whole_shardings(spec.model, mesh, lora=spec.lora) if adapted else param_shardings(spec.model, mesh)
    return jax.jit(run, in_shardings=(params, rows), out_shardings=rows)


@functools.lru_cache(maxsize=64)
def compiled_kl(spec: StepSpec, mesh=None):
    """jitted (params, reference, batch) -> per-token KL estimates [M, r, C] without gradients: what is taken from the rewards. `params` are
    those that sampled, whole and in the trainer's own precision."""
    spec = chunk_on(spec, mesh)

    def run(params, reference, batch):
        logps = lambda params, micro: policy_logprobs(spec, params, micro)[0]  # noqa: E731
        return _each(spec, lambda micro: kl_estimate(logps(params, micro), logps(reference, micro), spec.loss.kl), batch)

    if mesh is None:
        return jax.jit(run)
    rows, params = batch_shardings(mesh), whole_shardings(spec.model, mesh, lora=spec.lora)
    return jax.jit(run, in_shardings=(params, param_shardings(spec.model, mesh), rows), out_shardings=rows)


@functools.lru_cache(maxsize=64)
def compiled_values(spec: StepSpec, mesh=None):
    """jitted (whole params with the value head, batch) -> values [M, r, C] without gradients: those that advantages are taken against."""
    spec = chunk_on(spec, mesh)

    def run(params, batch):
        return _each(spec, lambda micro: _values(spec, params, micro)[2], batch)

    if mesh is None:
        return jax.jit(run)
    rows, params = batch_shardings(mesh), whole_shardings(spec.model, mesh, critic=True, lora=spec.lora)
    return jax.jit(run, in_shardings=(params, rows), out_shardings=rows)
