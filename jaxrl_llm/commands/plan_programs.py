"""The programs that `plan` compiles, with shapes in the place of arrays: sampling, the updates, and of SAERL its sparse autoencoder's.

Each function returns what `plan_cost.compiled` tells and: "rows" that it takes at once, "batches" or "micro_batches" of a step, "flops" of a
step over all devices by the model's formulas, and "read_bytes", what a device at least reads from its memory in a step. Of the GRPO update
"epochs" says how often a step runs it; the numbers of a step count all of them.
"""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.commands.plan_cost import bytes_a_device, compiled

SAE_ROWS = 256  # rows of text whose activations are read at once


def _params(model: Any, mesh: Any) -> Any:
    """The policy as it computes, as shapes with their shardings."""
    import jax

    import models
    from models import sharding

    shaped = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(shaped, models.abstract_params(model), sharding.param_shardings(model, mesh))


def _policy(model: Any, sizes: Mapping[str, Any], mesh: Any) -> Any:
    """The policy that samples, as shapes with their shardings: with the adapter that is trained, if one is."""
    from jaxrl_llm.train.config import OptimizerConfig
    from jaxrl_llm.train.state import abstract_state, trunk, whole

    base, lora = _params(model, mesh), sizes["lora"].adapter
    return base if lora is None else whole(lora, trunk(abstract_state(model, OptimizerConfig(), mesh, lora=lora)["params"]), base)


def _frozen(model: Any, sizes: Mapping[str, Any], mesh: Any) -> Any:
    """What an update reads and does not train, as shapes; None without an adapter."""
    return None if sizes["lora"].adapter is None else _params(model, mesh)


def _train_settings(model: Any, sizes: Mapping[str, Any]) -> Any:
    """The StepSpec of the update that is planned."""
    from jaxrl_llm.train.checks import check_grpo
    from jaxrl_llm.train.config import GRPOConfig
    from jaxrl_llm.train.step import step_spec

    names = ("num_samples", "max_new_tokens", "micro_batch_rows", "remat", "remat_keep", "attention", "loss", "lora")
    config = GRPOConfig(**{name: sizes[name] for name in names})
    check_grpo(config)
    return step_spec(model, config)


def critic(sizes: Mapping[str, Any]) -> bool:
    """Whether the loss has a value head beside the policy."""
    return getattr(sizes["loss"], "critic", False)


def held(model: Any, sizes: Mapping[str, Any], mesh: Any, sampler_mesh: Any) -> dict[str, int]:
    """Bytes a device of what a run keeps while each program runs, beside that program's own arguments."""
    from jaxrl_llm.train.config import OptimizerConfig
    from jaxrl_llm.train.state import abstract_state

    lora = sizes["lora"].adapter
    start = bytes_a_device(_params(model, mesh))
    state = bytes_a_device(abstract_state(model, OptimizerConfig(), mesh, critic(sizes), lora))
    # In float32 the sampler's parameters are the state's own; what an adapter is put into is an argument of both programs, and the reference.
    # Where it lies otherwise while it samples, nothing is shared.
    kept = start if sizes["keeps_start"] and lora is None else 0
    shared = start if model.dtype == "float32" else 0
    if lora is not None:
        shared = bytes_a_device(_policy(model, sizes, mesh)) - start
    if sampler_mesh is not mesh:
        shared, kept = 0, kept + (start if lora is not None else 0)
    copies = _prompt_copies(model, sizes, sampler_mesh) if sizes["rollout_refill"] else 0
    found = {"generate": kept + copies + state - shared, "train_step": 0 if lora is not None else kept}
    # While the SAE learns, the policy gives it activations.
    return found | {"move": found["generate"] - copies, "sae_encode": 0, "sae_train": start}


def _prompt_copies(model: Any, sizes: Mapping[str, Any], mesh: Any) -> int:
    """Bytes a device of the prompts' keys and values where each place of the sampler has its own (see `models.refill`)."""
    import functools

    import jax

    from models.sharding import batch_ways
    from models.transformer import init_cache

    places = min(sizes["prompts"] * sizes["num_samples"], sizes["rollout_rows"])
    cache = jax.eval_shape(functools.partial(init_cache, model, places, sizes["prompt_tokens"]))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in (cache.k, cache.v)) // batch_ways(mesh)


def move(model: Any, sizes: Mapping[str, Any], mesh: Any, sampler_mesh: Any) -> dict[str, Any]:
    """The policy's way from where training has it to where it samples."""
    import jax

    from jaxrl_llm.train.state import laid_out

    policy = _policy(model, sizes, mesh)
    found = compiled(laid_out(model, mesh, sampler_mesh, sizes["lora"].adapter), policy)
    here = bytes_a_device(jax.tree.leaves(policy))
    return {"rows": 0, "batches": 1, "flops": 0, "read_bytes": here, **found}


def generate(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The sampling program: as many prompts at once as the rollout takes, each prefilled once for all its samples."""
    import functools

    import jax
    import jax.numpy as jnp

    import models
    from models import sharding

    samples, new = sizes["num_samples"], sizes["max_new_tokens"]
    ways = sharding.batch_ways(mesh)
    prompts = _round_up(min(sizes["prompts"], max(sizes["rollout_rows"] // samples, 1)), ways)
    batches = math.ceil(sizes["prompts"] / prompts)
    rows = sharding.batch_sharding(mesh)
    params = _policy(model, sizes, mesh)
    tokens = jax.ShapeDtypeStruct((prompts, sizes["prompt_tokens"]), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((prompts,), jnp.int32, sharding=rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sample = functools.partial(models.sample_tokens, model, num_samples=samples, max_new_tokens=new)
    with _one_stage(new) as stages:
        found = compiled(jax.jit(sample), params, tokens, lengths, key, endless=new)
    # Each prompt is read once, each new token once by each sample; the mean context of a new token is the prompt and half of the rest.
    per_prompt = sizes["prompt_tokens"] * model.flops_per_token(sizes["prompt_tokens"] // 2)
    per_prompt += samples * new * model.flops_per_token(sizes["prompt_tokens"] + new // 2)
    flops = sizes["prompts"] * per_prompt
    # Each new token reads the parameters, and each row's keys and values so far.
    cache = _cache_bytes(model, prompts * samples // ways, sizes["prompt_tokens"] + new // 2, mesh)
    read = batches * new * (_weight_bytes(model, mesh, prompts * samples // ways) + cache)
    if found["collectives"] is not None:
        found["collectives"] = {kind: size * batches for kind, size in found["collectives"].items()}
    return {"rows": prompts * samples, "batches": batches, "flops": flops, "read_bytes": read, "stages": stages, **found}


def _weight_bytes(model: Any, mesh: Any, tokens: int) -> int:
    """What a device reads of the parameters in one pass over so many tokens: whole along "fsdp", its part along "tensor" and "expert"; of
    experts no more than the tokens that it gathers can go to, of an embedding that is no unembedding the tokens' rows, which are left out."""
    import jax

    params, total = _params(model, mesh), 0
    if not model.tie_embeddings:
        params = params | {"embed": {}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = bytes_a_device(leaf) * (mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec else 1)
        if model.mlp == "experts" and path[-1].key in ("gate", "up", "down"):
            here = leaf.sharding.shard_shape(leaf.shape)[1]
            size = size * min(here, tokens * mesh.shape["expert"] * model.experts_per_token) // here
        total += size
    return total


def _cache_bytes(model: Any, rows: int, context: int, mesh: Any) -> int:
    """The keys and values of `rows` rows of `context` tokens, of the heads that a device has."""
    ways = mesh.shape["tensor"] if model.n_kv_heads % mesh.shape["tensor"] == 0 else 1
    itemsize = 4 if model.dtype == "float32" else 2
    return rows * context * model.n_layers * 2 * model.n_kv_heads * model.head_dim * itemsize // ways


@contextlib.contextmanager
def _one_stage(new: int):
    """Inside, sampling has one stage of `new` tokens; yields how many it would have.

    Sampling adds caches in stages, and each is a loop over all layers to compile. The last stage reads the caches of all, which are
    together as large as the one of a single stage: the others add to the compiler's work, not to its answer.
    """
    module = importlib.import_module("models.generate")
    first, stages = module.STAGE, len(module._stages(new))
    module.STAGE = new
    module._sample_tokens.clear_cache()  # its traces do not know that the stages differ
    try:
        yield stages
    finally:
        module.STAGE = first
        module._sample_tokens.clear_cache()


def update(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The GRPO update on the step's completions, or on each of its parts, `inner_epochs` times: gradients by micro-batches, AdamW, the target's
    loss.

    A reference's log-probabilities, a critic's values and, of parts, the old log-probabilities come from passes before it, without gradients,
    that take less.
    """
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.train.checks import TOKEN_BASELINES
    from jaxrl_llm.train.rollout import samples_together
    from jaxrl_llm.train.state import abstract_state
    from jaxrl_llm.train.step import batch_shardings, compiled_update
    from models.sharding import batch_ways

    samples, new, width = sizes["num_samples"], sizes["max_new_tokens"], sizes["prompt_tokens"]
    micro_rows = sizes["micro_batch_rows"]
    spec, ways = _train_settings(model, sizes), batch_ways(mesh)
    together = samples_together(samples, micro_rows, ways, sizes["samples_together"])
    blocks, parts = sizes["prompts"] * samples // together, sizes["updates_per_epoch"]  # a prompt is forwarded once for each block
    of_part = math.ceil(blocks / parts)
    per_device = math.ceil(of_part / ways)
    prompts = ways * (min(per_device, max(micro_rows // together // ways, 1)) if micro_rows else per_device)
    micros, rows = math.ceil(of_part / prompts), prompts * together
    place = batch_shardings(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((micros, *shape), dtype, sharding=place)

    batch = {
        "prompts": array((prompts, width), jnp.int32),
        "prompt_lengths": array((prompts,), jnp.int32),
        "completions": array((rows, new), jnp.int32),
        "lengths": array((rows,), jnp.int32),
        "sampler_logps": array((rows, new), jnp.float32),
        "rewards": array((rows,), jnp.float32),
        "valid": array((rows,), jnp.bool_),
        "group_ids": array((rows,), jnp.int32),
    }
    if spec.loss.kl:
        batch["ref_logps" if spec.loss.kl_place == "loss" else "kl"] = batch["sampler_logps"]
    if spec.loss.critic:
        batch["values"] = batch["sampler_logps"]
    if (epochs := sizes["inner_epochs"]) * parts > 1:
        batch["old_logps"] = batch["sampler_logps"]  # which the first epoch gives the others, or a pass before it the parts
    if parts > 1:
        by_token = spec.loss.baseline in TOKEN_BASELINES
        batch |= {"advantages": batch["sampler_logps" if by_token else "rewards"]} | ({"returns": batch["values"]} if spec.loss.critic else {})
    state = abstract_state(model, spec.optimizer, mesh, spec.loss.critic, spec.lora)
    found = compiled(compiled_update(spec, mesh), state, batch, _frozen(model, sizes, mesh))
    forward = blocks * width * model.flops_per_token(width // 2)
    forward += sizes["prompts"] * samples * new * model.flops_per_token(width + new // 2)
    passes = epochs * _passes(sizes) + _passes_before(spec.loss) + (parts > 1)
    read = micros * parts * passes * _weight_bytes(model, mesh, rows // ways * (width // together + new))
    if found["collectives"] is not None:
        found["collectives"] = {kind: size * epochs * parts for kind, size in found["collectives"].items()}
    updates = {"epochs": epochs, "updates": epochs * parts}
    return {"rows": rows, "micro_batches": micros, **updates, "flops": forward * passes, "read_bytes": read, **found}


def _passes(sizes: Mapping[str, Any]) -> int:
    """Forward passes that an update is worth: itself; backward two, one of them for gradients by the matrices, of which an adapter needs
    none; and one more to recompute each layer, where the products of its matrices are not kept."""
    return 3 + (sizes["remat"] and sizes["remat_keep"] == "nothing") - (sizes["lora"].adapter is not None)


def _passes_before(loss: Any) -> int:
    """Forward passes over the batch before the update: the reference's, the policy's where KL is taken from the reward, the critic's."""
    return (0 if not loss.kl else 1 if loss.kl_place == "loss" else 2) + loss.critic


def update_pairs(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The update on pairs, one a prompt: gradients by micro-batches, AdamW."""
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.train.config import OptimizerConfig
    from jaxrl_llm.train.preference_step import PreferenceSpec, compiled_update
    from jaxrl_llm.train.state import abstract_state
    from jaxrl_llm.train.step import batch_shardings
    from models.sharding import batch_ways

    new, width, kto = sizes["max_new_tokens"], sizes["prompt_tokens"], sizes["loss"].kind == "kto"
    loss = sizes["loss"]
    trained, remat = dataclasses.replace(model, attention=sizes["attention"]), sizes["remat"] and sizes["remat_keep"]
    spec = PreferenceSpec(trained, loss, OptimizerConfig(), remat=remat, lora=sizes["lora"].adapter)
    pairs = _round_up(min(sizes["micro_batch_rows"] or sizes["prompts"], sizes["prompts"]), batch_ways(mesh))
    micros, place = math.ceil(sizes["prompts"] / pairs), batch_shardings(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((micros, *shape), dtype, sharding=place)

    batch = {
        "prompts": array((pairs, width), jnp.int32),
        "prompt_lengths": array((pairs,), jnp.int32),
        "completions": array((2 * pairs, new), jnp.int32),
        "lengths": array((2 * pairs,), jnp.int32),
    }
    batch |= {"labels": array((pairs,), jnp.bool_)} if kto else {}
    batch |= {"ref_sums": array((2 * pairs,), jnp.float32)} if loss.needs_reference else {}
    batch |= {"sampler_logps": array((2 * pairs, new), jnp.float32)} if sizes["sampled"] else {}
    state = abstract_state(model, spec.optimizer, mesh, lora=spec.lora)
    found = compiled(compiled_update(spec, mesh), state, batch, _frozen(model, sizes, mesh))
    prompt, completion = width * model.flops_per_token(width // 2), new * model.flops_per_token(width + new // 2)
    passes = _passes(sizes)  # KTO's unrelated completions are only read, as the reference's pair is
    flops = (prompt + completion) * (passes + 1) if kto else (prompt + 2 * completion) * passes
    if loss.needs_reference and sizes["sampled"]:
        flops += prompt + 2 * completion
    read = micros * passes * _weight_bytes(model, mesh, 2 * pairs // batch_ways(mesh) * (width // 2 + new))
    return {"rows": 2 * pairs, "micro_batches": micros, "flops": sizes["prompts"] * flops, "read_bytes": read, **found}


def update_texts(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The update of supervised training on rows of prompt_tokens + max_new_tokens: gradients by micro-batches, AdamW. Packed rows are fewer than
    the texts in them; as many are planned."""
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.train.config import OptimizerConfig
    from jaxrl_llm.train.sft import SFTSpec, compiled_update
    from jaxrl_llm.train.state import abstract_state
    from jaxrl_llm.train.step import batch_shardings
    from models.sharding import batch_ways

    width, ways, texts = sizes["prompt_tokens"] + sizes["max_new_tokens"], batch_ways(mesh), sizes["texts"]
    trained, remat = dataclasses.replace(model, attention=sizes["attention"]), sizes["remat"] and sizes["remat_keep"]
    spec = SFTSpec(trained, OptimizerConfig(), remat, None, sizes["lora"].adapter, texts["router_balance"])
    rows = _round_up(min(sizes["micro_batch_rows"] or sizes["prompts"], sizes["prompts"]), ways)
    micros, place = math.ceil(sizes["prompts"] / rows), batch_shardings(mesh)
    dtypes = {"tokens": jnp.int32, "mask": jnp.bool_} | ({"segments": jnp.int32} if texts["packed"] else {})
    batch = {name: jax.ShapeDtypeStruct((micros, rows, width), dtype, sharding=place) for name, dtype in dtypes.items()}
    state = abstract_state(model, spec.optimizer, mesh, lora=spec.lora)
    found = compiled(compiled_update(spec, mesh), state, batch, _frozen(model, sizes, mesh))
    flops = sizes["prompts"] * width * model.flops_per_token(width // 2) * _passes(sizes)
    read = micros * _passes(sizes) * _weight_bytes(model, mesh, rows // ways * width)
    return {"rows": rows, "micro_batches": micros, "flops": flops, "read_bytes": read, **found}


def sae_encode(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The texts' activations and their latents, SAE_ROWS rows of the SAE's context at once, as `curate` reads them."""
    import jax
    import jax.numpy as jnp

    from models.sharding import batch_sharding, batch_ways, replicated
    from sae.dictionary import encode_topk
    from sae.harvest import blocks_needed, tap

    model, hook = _feature_model(model, sizes)
    dictionary, context = _dictionary(model, sizes, hook), min(sizes["sae"]["context"], model.max_position)
    rows, where = _round_up(SAE_ROWS, batch_ways(mesh)), batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32, sharding=where)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=where)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), dictionary)
    encode = jax.jit(lambda params, d, tokens, lengths: encode_topk(d, tap(model, params, tokens, lengths, (hook,))))
    found = compiled(encode, _params(model, mesh), placed, tokens, lengths)
    needed = blocks_needed(hook)
    blocks = 1.0 if needed is None else needed / model.n_layers
    each = blocks * (model.flops_per_token(context // 2) - 2 * model.d_model * model.vocab_size) + 2 * model.d_model * sizes["sae"]["d_sae"]
    read = int(blocks * _weight_bytes(model, mesh, rows // batch_ways(mesh) * context)) + bytes_a_device(placed)
    return {"rows": rows, "batches": 1, "flops": int(each * rows * context), "read_bytes": read, **found}


def sae_train(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """One update of the SAE on a batch of activations."""
    import jax
    import jax.numpy as jnp

    from models.sharding import batch_sharding
    from sae.step import abstract_state, step_for
    from sae.train_config import SAETrainConfig, Scale, numbers_at

    model, hook = _feature_model(model, sizes)
    cfg, rows = _dictionary(model, sizes, hook).cfg, sizes["sae"]["batch"]
    settings = SAETrainConfig(method="dense")  # as on any mesh of accelerators
    state = abstract_state(cfg, mesh)
    batch = jax.ShapeDtypeStruct((rows, cfg.d_in), jnp.float32, sharding=batch_sharding(mesh))
    step = step_for(cfg, settings, mesh)
    found = compiled(jax.jit(lambda *given: step(*given), donate_argnums=0), state, batch, numbers_at(1, cfg.d_sae, settings, Scale(1.0, 1.0, 1.0)))
    flops = 3 * 4 * cfg.d_in * cfg.d_sae * rows
    return {"rows": rows, "batches": 1, "flops": flops, "read_bytes": 3 * bytes_a_device(state), **found}


def _feature_model(model: Any, sizes: Mapping[str, Any]) -> tuple[Any, str]:
    """(the model whose activations the SAE reads, which of them): the policy's middle block where the target names none."""
    from jaxrl_llm.commands.plan_target import resolve_model
    from jaxrl_llm.curation.features import middle_hook

    model = resolve_model(sizes["sae"]["model"], model.dtype) if sizes["sae"]["model"] else model
    return model, sizes["sae"]["hook"] or middle_hook(model)


def _dictionary(model: Any, sizes: Mapping[str, Any], hook: str) -> Any:
    """The target's SAE, as shapes."""
    import jax

    from jaxrl_llm.curation.features import hook_width
    from sae.config import SAEConfig
    from sae.dictionary import init

    cfg = SAEConfig(d_in=hook_width(model, hook), d_sae=sizes["sae"]["d_sae"], k=sizes["sae"]["k"])
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
