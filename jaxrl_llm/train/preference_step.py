"""The jitted update on preferences, for fixed pairs and for pairs that the policy just sampled; on one device or a mesh.

A batch is a dict of host or device arrays with a leading micro-batch axis M; g prompts and 2 g completions a micro-batch, the two of a
prompt adjacent: (chosen, rejected), or for KTO (the row's own completion, one that belongs to another prompt):
  prompts [M, g, P] int32, prompt_lengths [M, g]; completions [M, 2g, C] int32, lengths [M, 2g] (0 = padding);
  and, where used, ref_sums [M, 2g] fp32, the reference's summed log-probabilities; labels [M, g] bool (KTO: desirable);
  sampler_logps [M, 2g, C] fp32, to be compared with.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm.losses import preference
from jaxrl_llm.train.checks import remat_of, trained_as
from jaxrl_llm.train.config import DPOConfig, OnlineDPOConfig, OptimizerConfig, PairLossConfig
from jaxrl_llm.train.forward import policy_logprobs
from jaxrl_llm.train.state import (
    State,
    apply_gradients,
    frozen_shardings,
    resolve_decay,
    state_shardings,
    whole,
    whole_shardings,
)
from jaxrl_llm.train.step import Batch, batch_shardings, chunk_on, cut_to_length
from models import ModelConfig
from models.lora import LoraConfig

# Prompts and completions each have their width, so that every finer step of one multiplies the programs to be compiled.
LEAST_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class PreferenceSpec:
    """All that shapes the compiled update: one compilation a distinct value, batch shape and mesh."""

    model: ModelConfig
    loss: PairLossConfig
    optimizer: OptimizerConfig
    temperature: float = 1.0
    shared_prefix: bool = True
    remat: bool | str = False  # as of `models.forward`
    logprob_chunk: int | None = None
    lora: LoraConfig | None = None
    length_buckets: int = 1  # widths that a micro-batch may be cut to: see `step.cut_to_length`


def preference_spec(model: ModelConfig, config: DPOConfig | OnlineDPOConfig) -> PreferenceSpec:
    """The static part of a run's settings."""
    return PreferenceSpec(
        model=trained_as(model, config),
        loss=config.loss,
        optimizer=resolve_decay(config.optimizer, config.steps),
        temperature=config.temperature,
        shared_prefix=config.shared_prefix,
        remat=remat_of(config),
        logprob_chunk=config.logprob_chunk,
        lora=config.lora.adapter,
        length_buckets=config.length_buckets,
    )


def preference_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], rows: int = 0, multiple: int = 1, **columns: np.ndarray
) -> dict[str, np.ndarray]:
    """G prompts with two completions each, as token ids, to a batch in micro-batches.

    A prompt without tokens, and its completions, are padding. rows: prompts a micro-batch, rounded up to `multiple` (the devices that
    share the rows); 0 = all. columns: more arrays, [G, ...] or [G, 2, ...]. Widths are rounded up to a few sizes, so that steps share
    compilations. Rows stay in their order: give them sorted by length (`by_length`) where micro-batches are cut to theirs.
    """
    G = len(prompts)
    g = -(-min(rows or G, G) // multiple) * multiple
    M = -(-G // g)
    flat = [tokens for pair in completions for tokens in pair]

    def blocks(array, size, fill=0):
        """[G * size, ...] -> [M, g * size, ...], padding at the end."""
        pad = [(0, M * g * size - len(array))] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, pad, constant_values=fill).reshape(M, g * size, *array.shape[1:])

    batch = {
        "prompts": blocks(_padded(prompts), 1),
        # A padding prompt has one token, so that there is a state to read.
        "prompt_lengths": blocks(np.array([max(len(p), 1) for p in prompts], np.int32), 1, fill=1),
        "completions": blocks(_padded(flat), 2),
        "lengths": blocks(np.array([len(c) for c in flat], np.int32), 2),
    }
    for name, column in columns.items():
        paired = column.ndim > 1
        batch[name] = blocks(column.reshape(2 * G, *column.shape[2:]) if paired else column, 2 if paired else 1)
    return batch


def by_length(lengths_G2: np.ndarray) -> np.ndarray:
    """[G] int: the order in which prompts come by the longer of their two completions, so that a micro-batch has pairs of similar lengths."""
    return np.argsort(np.max(lengths_G2, axis=1), kind="stable")


def _padded(rows):
    """int32 [N, width], right-padded with 0. The width is the least power of two from LEAST_WIDTH on that holds the longest row."""
    longest = max(LEAST_WIDTH, *map(len, rows))
    tokens = np.zeros((len(rows), 1 << (longest - 1).bit_length()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def preference_loss(loss: PairLossConfig, sums_P2, lengths_P2, ref_sums_P2=None, labels_P=None, totals=None, baseline=None):
    """(loss, metrics) of `losses.preference` that `loss.kind` names, on summed log-probabilities: a whole batch's, or a micro-batch's
    with the batch's totals and, for KTO, its baseline."""
    if loss.kind == "simpo":
        options = dict(beta=loss.beta, gamma=loss.gamma, label_smoothing=loss.label_smoothing, totals=totals)
        return preference.simpo_loss(sums_P2, lengths_P2, **options)
    if loss.kind == "orpo":
        return preference.orpo_loss(sums_P2, lengths_P2, beta=loss.beta, totals=totals)
    if loss.kind == "kto":
        if baseline is None:
            baseline = preference.kto_baseline(sums_P2[:, 1], lengths_P2[:, 1], ref_sums_P2[:, 1])
        return preference.kto_loss(
            sums_P2[:, 0],
            lengths_P2[:, 0],
            ref_sums_P2[:, 0],
            labels_P,
            baseline,
            beta=loss.beta,
            desirable_weight=loss.desirable_weight,
            undesirable_weight=loss.undesirable_weight,
            totals=totals,
        )
    options = dict(kind=loss.kind, beta=loss.beta, label_smoothing=loss.label_smoothing, totals=totals)
    return preference.dpo_loss(sums_P2, lengths_P2, ref_sums_P2 if loss.needs_reference else None, **options)


def _mask(micro: Batch) -> jax.Array:
    return jnp.arange(micro["completions"].shape[-1]) < micro["lengths"][..., None]


def _sums(spec: PreferenceSpec, params, micro: Batch) -> jax.Array:
    return preference.sequence_logprobs(policy_logprobs(spec, params, micro)[0], _mask(micro))[0]


def _each_sums(spec: PreferenceSpec, params, batch: Batch, slot: int | None = None) -> jax.Array:
    """`_sums` of each micro-batch cut to its length; slot: of the first or the second completions alone."""

    def one(micro):
        micro = micro if slot is None else _only(micro, slot)
        return cut_to_length(spec, lambda cut: (_sums(spec, params, cut), None), micro)[0]

    return jax.lax.map(one, batch)


def _only(micro: Batch, slot: int) -> Batch:
    """A micro-batch with the first or the second completion of each prompt alone."""
    return micro | {name: micro[name].reshape(-1, 2, *micro[name].shape[1:])[:, slot] for name in ("completions", "lengths")}


def micro_loss(trained, spec: PreferenceSpec, micro: Batch, totals, baseline, frozen=None):
    """(loss, metrics) of one micro-batch; those of all micro-batches add up, except "logp_diff_max", of which the largest counts."""
    params = whole(spec.lora, trained, frozen)
    pairs = lambda x: x.reshape(-1, 2)  # noqa: E731
    lengths_P2 = pairs(micro["lengths"])
    ref_P2 = pairs(micro["ref_sums"]) if "ref_sums" in micro else None
    if spec.loss.kind == "kto":  # the unrelated completions are in the baseline, which has no gradient
        own_P = _sums(spec, params, _only(micro, 0))
        sums_P2 = jnp.stack([own_P, jnp.zeros_like(own_P)], axis=-1)
        return preference_loss(spec.loss, sums_P2, lengths_P2, ref_P2, micro["labels"], totals, baseline)
    logps, mask = policy_logprobs(spec, params, micro)[0], _mask(micro)
    sums, _ = preference.sequence_logprobs(logps, mask)
    loss, metrics = preference_loss(spec.loss, pairs(sums), lengths_P2, ref_P2, totals=totals)
    if "sampler_logps" in micro:
        difference = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(logps) - micro["sampler_logps"]), 0.0)
        metrics |= {"logp_diff_max": jnp.max(difference)}
    return loss, metrics


def loss_and_grads(spec: PreferenceSpec, params, batch: Batch, frozen=None):
    """(loss, metrics, gradients) of the whole batch, one micro-batch in memory at a time. params: what is trained; frozen: what an adapter
    is put into (see `train.state`)."""
    lengths_P2 = batch["lengths"].reshape(-1, 2)
    totals, baseline = preference.pair_totals(lengths_P2), None
    if spec.loss.kind == "kto":
        totals = preference.row_totals(lengths_P2[:, 0], batch["labels"].reshape(-1))
        policy = jax.lax.stop_gradient(whole(spec.lora, params, frozen))
        unrelated_P = _each_sums(spec, policy, batch, slot=1).reshape(-1)
        baseline = preference.kto_baseline(unrelated_P, lengths_P2[:, 1], batch["ref_sums"].reshape(-1, 2)[:, 1])
    grad_fn = jax.value_and_grad(functools.partial(micro_loss, spec=spec, totals=totals, baseline=baseline, frozen=frozen), has_aux=True)

    def run(micro):
        (loss, metrics), grads = grad_fn(params, micro=micro)
        return ({"loss": loss, **metrics}, grads), None

    def one(micro):
        return cut_to_length(spec, run, micro)[0]

    if batch["prompts"].shape[0] == 1:
        metrics, grads = one(jax.tree.map(lambda x: x[0], batch))
        return metrics.pop("loss"), metrics, grads

    def body(total, micro):
        metrics, grads = one(micro)
        return jax.tree.map(jnp.add, total, grads), metrics

    grads, metrics = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch)
    metrics = {name: jnp.max(x) if name.endswith("_max") else jnp.sum(x) for name, x in metrics.items()}
    return metrics.pop("loss"), metrics, grads


def _update(spec: PreferenceSpec, state: State, batch: Batch, frozen=None):
    loss, metrics, grads = loss_and_grads(spec, state["params"], batch, frozen)
    state, moved = apply_gradients(spec.optimizer, state, grads)
    return state, metrics | {"loss": loss} | moved


@functools.lru_cache(maxsize=64)
def compiled_update(spec: PreferenceSpec, mesh=None):
    """jitted (state, batch, frozen parameters or None) -> (state, metrics); the state is donated. Cached, so runs share compilations."""
    spec = chunk_on(spec, mesh)
    if mesh is None:
        return jax.jit(functools.partial(_update, spec), donate_argnums=0)
    shardings = state_shardings(spec.model, spec.optimizer, mesh, lora=spec.lora)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        functools.partial(_update, spec),
        in_shardings=(shardings, batch_shardings(mesh), frozen_shardings(spec.model, mesh, spec.lora)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


@functools.lru_cache(maxsize=64)
def compiled_sums(spec: PreferenceSpec, mesh=None):
    """jitted (params, batch) -> [M, 2g] summed log-probabilities, on every device: for held-out figures, of the whole policy, and for
    references, of a spec without an adapter."""
    spec = chunk_on(spec, mesh)

    run = functools.partial(_each_sums, spec)
    if mesh is None:
        return jax.jit(run)
    params = whole_shardings(spec.model, mesh, lora=spec.lora)
    return jax.jit(run, in_shardings=(params, batch_shardings(mesh)), out_shardings=NamedSharding(mesh, PartitionSpec()))


def to_host(metrics: Mapping[str, Any]) -> dict[str, float]:
    """An update's metrics as numbers, with "finite": whether loss and gradient norm are."""
    host = {name: float(x) for name, x in jax.device_get(metrics).items()}
    return host | {"finite": bool(np.isfinite([host["loss"], host["grad_norm"]]).all())}
