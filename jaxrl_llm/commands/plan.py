"""`jaxrl-llm plan`: what generation and a step of GRPO or DPO need on a mesh that need not be here, by compiling them without data."""

import contextlib
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.commands.doctor import memory_gib
from jaxrl_llm.commands.plan_target import choose_layout, resolve_model, target_sizes
from jaxrl_llm.config import check_fields
from jaxrl_llm.errors import UserError, nearest

GIB = 2**30

# TPU generation -> (GiB of memory a chip, dense bf16 FLOP/s a chip), as Google publishes them.
TPUS = {"v4": (32, 275e12), "v5e": (16, 197e12), "v5p": (95, 459e12), "v6e": (32, 918e12)}

# The compiler runs where no TPU is: it must not ask for the machine that one is in, nor complain that it cannot.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def run(config: Any, workdir: str | None = None) -> None:
    """Compiles both programs of the config and prints what they need."""
    sizes = target_sizes(config)
    found = plan(sizes)
    print(json.dumps(found) if sizes["json"] else table(found))


def plan(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Memory and FLOPs of the sizes in configs/plan.py, as one JSON object.

    Bytes are a device's and come from the compiler, beside those that a run holds meanwhile (`held_bytes`): the policy that it started
    from, where a reference, other arms or judges read it, and while it samples the training state. FLOPs are the whole step's and come from the
    model's formulas, since the compiler's own count takes the body of a loop once. `memory_gib` is None where the device does not tell.

    Raises:
      UserError: an unknown model or mesh, sizes out of range or that do not fit the mesh or the model's context, or no TPU compiler here.
    """
    _need(sizes)
    devices, room, peak = resolve_devices(sizes["mesh"])
    from jaxrl_llm.runtime import parse_axes
    from jaxrl_llm.train.config import PreferenceLossConfig
    from models.sharding import make_mesh

    mesh = make_mesh(parse_axes(choose_layout(sizes, len(devices))), devices)
    model = resolve_model(sizes["model"], sizes["dtype"])
    if (width := sizes["prompt_tokens"] + sizes["max_new_tokens"]) > model.max_position:
        told = f"prompt_tokens={sizes['prompt_tokens']} and max_new_tokens={sizes['max_new_tokens']} make {width}"
        raise UserError(f"{told}, the context of {sizes['model']} is {model.max_position}: lower one of them")
    kind = getattr(devices[0], "device_kind", "device")
    programs, held = {}, _held(model, sizes, mesh)
    wanted = [("generate", _plan_generate)] if sizes["sampled"] else []
    for name, compile_program in [*wanted, ("train_step", _plan_pairs if isinstance(sizes["loss"], PreferenceLossConfig) else _plan_train)]:
        print(f"compiling {name} for {len(devices)} x {kind} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        program = compile_program(model, sizes, mesh) | {"compile_seconds": time.perf_counter() - began, "held_bytes": held[name]}
        program["fits"] = False if program["refused"] else None if room is None else program["total_bytes"] + held[name] <= room * GIB
        program["seconds_at_peak"] = None if peak is None else program["flops"] / (peak * len(devices))
        programs[name] = program
        print(f"{_HEADER}\n{_row(name, program)}", file=sys.stderr, flush=True)  # the next program may compile for long, or not to its end
    return {
        "model": sizes["model"],
        "parameters": model.param_count(),
        "dtype": model.dtype,
        "kl": getattr(sizes["loss"], "kl", None),
        "critic": _critic(sizes),
        "lora_rank": sizes["lora_rank"],
        "mesh": sizes["mesh"],
        "devices": len(devices),
        "device_kind": kind,
        "layout": {name: int(size) for name, size in mesh.shape.items()},
        "memory_gib": room,
        **programs,
    }


def resolve_devices(name: str) -> tuple[list[Any], float | None, float | None]:
    """(devices, GiB of memory a device, peak FLOP/s a device) of "here", "cpu:N" or a TPU slice such as "v5e:2x4".

    Raises:
      UserError: an unknown name, a shape that the slice cannot have, or no TPU compiler here.
    """
    kind, _, shape = name.partition(":")
    if name == "here":
        import jax

        return jax.devices(), _memory_here(jax.devices()), None
    if kind == "cpu":
        devices = _cpu_devices(shape)
        return devices, _memory_here(devices), None
    if kind not in TPUS:
        raise UserError(f"unknown mesh '{name}': {nearest(kind, ['here', 'cpu', *TPUS])}; such as cpu:4 or v5e:2x4")
    if not all(side.isdigit() and int(side) for side in shape.split("x")):
        raise UserError(f"mesh '{name}': give the slice's shape in chips, such as {kind}:2x4")
    return _tpu_devices(name), *TPUS[kind]


def _memory_here(devices: list[Any]) -> float | None:
    """GiB that each device of this machine has; CPU devices share the machine's memory."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit / GIB
    memory = memory_gib() if devices[0].platform == "cpu" else None
    return memory[0] / len(devices) if memory else None


def _cpu_devices(count: str) -> list[Any]:
    if not count.isdigit() or not int(count):
        raise UserError(f"mesh 'cpu:{count}': give the number of devices, such as cpu:4")
    _plan_on_cpu()
    import jax

    if int(count) > 1 and not jax._src.xla_bridge.backends_are_initialized():
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise UserError(f"mesh 'cpu:{count}': JAX already runs here with {len(devices)} CPU devices; plan in a process of its own")
    return devices[: int(count)]


def _tpu_devices(name: str) -> list[Any]:
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"mesh '{name}' needs the TPU compiler, which runs on any machine: pip install 'jaxrl-llm[tpu]'")
    for variable, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    _plan_on_cpu()
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_enable_compilation_cache", False)  # programs for a TPU that is not here cannot be read back

    try:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    except Exception as error:  # the compiler's own message is the finding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"mesh '{name}': the TPU compiler does not know this slice ({reason})") from error


def _plan_on_cpu() -> None:
    # Planning must not take hold of an accelerator that somebody is training on.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _need(sizes: Mapping[str, Any]) -> None:
    endless = float("inf")
    ranges = dict.fromkeys(("prompts", "num_samples", "prompt_tokens", "max_new_tokens", "rollout_rows"), (1, endless))
    ranges |= dict.fromkeys(("micro_batch_rows", "samples_together", "lora_rank"), (0, endless))
    check_fields(sizes, {"dtype": ("float32", "bfloat16"), "remat_keep": ("nothing", "products")}, ranges)


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
    from jaxrl_llm.train.config import GRPOConfig, check_grpo
    from jaxrl_llm.train.step import step_spec

    names = ("num_samples", "max_new_tokens", "micro_batch_rows", "remat", "remat_keep", "loss", "lora")
    config = GRPOConfig(**{name: sizes[name] for name in names})
    check_grpo(config)
    return step_spec(model, config)


def _critic(sizes: Mapping[str, Any]) -> bool:
    return getattr(sizes["loss"], "critic", False)


def _held(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, int]:
    """Bytes a device of what a run keeps while each program runs, beside that program's own arguments."""
    from jaxrl_llm.train.config import OptimizerConfig
    from jaxrl_llm.train.state import abstract_state

    lora = sizes["lora"].adapter
    start = _bytes_a_device(_params(model, mesh))
    state = _bytes_a_device(abstract_state(model, OptimizerConfig(), mesh, _critic(sizes), lora))
    # In float32 the sampler's parameters are the state's own; what an adapter is put into is an argument of both programs, and the reference.
    kept = start if sizes["keeps_start"] and lora is None else 0
    shared = start if model.dtype == "float32" else 0
    if lora is not None:
        shared = _bytes_a_device(_policy(model, sizes, mesh)) - start
    copies = _prompt_copies(model, sizes, mesh) if sizes["rollout_refill"] else 0
    return {"generate": kept + copies + state - shared, "train_step": kept}


def _prompt_copies(model: Any, sizes: Mapping[str, Any], mesh: Any) -> int:
    """Bytes a device of the prompts' keys and values where each place of the sampler has its own (see `models.refill`)."""
    import functools

    import jax

    from models.sharding import batch_ways
    from models.transformer import init_cache

    places = min(sizes["prompts"] * sizes["num_samples"], sizes["rollout_rows"])
    cache = jax.eval_shape(functools.partial(init_cache, model, places, sizes["prompt_tokens"]))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in (cache.k, cache.v)) // batch_ways(mesh)


def _plan_generate(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
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
        memory = _memory(jax.jit(sample), params, tokens, lengths, key)
    # Each prompt is read once, each new token once by each sample; the mean context of a new token is the prompt and half of the rest.
    per_prompt = sizes["prompt_tokens"] * model.flops_per_token(sizes["prompt_tokens"] // 2)
    per_prompt += samples * new * model.flops_per_token(sizes["prompt_tokens"] + new // 2)
    flops = sizes["prompts"] * per_prompt
    return {"rows": prompts * samples, "batches": batches, "flops": flops, "stages": stages, **memory}


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


def _plan_train(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The GRPO update on the whole step's completions: gradients by micro-batches, AdamW, the target's loss.

    A reference's log-probabilities and a critic's values come from passes before it, without gradients, that take less.
    """
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.train.rollout import samples_together
    from jaxrl_llm.train.state import abstract_state
    from jaxrl_llm.train.step import batch_shardings, compiled_update
    from models.sharding import batch_ways

    samples, new, width = sizes["num_samples"], sizes["max_new_tokens"], sizes["prompt_tokens"]
    micro_rows = sizes["micro_batch_rows"]
    spec, ways = _train_settings(model, sizes), batch_ways(mesh)
    together = samples_together(samples, micro_rows, ways, sizes["samples_together"])
    blocks = sizes["prompts"] * samples // together  # a prompt is forwarded once for each
    per_device = math.ceil(blocks / ways)
    prompts = ways * (min(per_device, max(micro_rows // together // ways, 1)) if micro_rows else per_device)
    micros, rows = math.ceil(blocks / prompts), prompts * together
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
    state = abstract_state(model, spec.optimizer, mesh, spec.loss.critic, spec.lora)
    memory = _memory(compiled_update(spec, mesh), state, batch, _frozen(model, sizes, mesh))
    forward = blocks * width * model.flops_per_token(width // 2)
    forward += sizes["prompts"] * samples * new * model.flops_per_token(width + new // 2)
    flops = forward * (_passes(sizes) + _passes_before(spec.loss))
    return {"rows": rows, "micro_batches": micros, "flops": flops, **memory}


def _passes(sizes: Mapping[str, Any]) -> int:
    """Forward passes that an update is worth: itself; backward two, one of them for gradients by the matrices, of which an adapter needs
    none; and one more to recompute each layer, where the products of its matrices are not kept."""
    return 3 + (sizes["remat"] and sizes["remat_keep"] == "nothing") - (sizes["lora"].adapter is not None)


def _passes_before(loss: Any) -> int:
    """Forward passes over the batch before the update: the reference's, the policy's where KL is taken from the reward, the critic's."""
    return (0 if not loss.kl else 1 if loss.kl_place == "loss" else 2) + loss.critic


def _plan_pairs(model: Any, sizes: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
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
    spec = PreferenceSpec(model, loss, OptimizerConfig(), remat=sizes["remat"] and sizes["remat_keep"], lora=sizes["lora"].adapter)
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
    found = _memory(compiled_update(spec, mesh), state, batch, _frozen(model, sizes, mesh))
    prompt, completion = width * model.flops_per_token(width // 2), new * model.flops_per_token(width + new // 2)
    passes = _passes(sizes)  # KTO's unrelated completions are only read, as the reference's pair is
    flops = (prompt + completion) * (passes + 1) if kto else (prompt + 2 * completion) * passes
    if loss.needs_reference and sizes["sampled"]:
        flops += prompt + 2 * completion
    return {"rows": 2 * pairs, "micro_batches": micros, "flops": sizes["prompts"] * flops, **found}


def _memory(program: Any, *arguments: Any) -> dict[str, Any]:
    """Bytes a device of a jitted program, compiled for arguments that are shapes; the donated state is counted once.

    A TPU's compiler refuses a program that does not fit: `refused` is then its message, and the working memory what that tells.
    """
    import jax

    try:
        found = program.lower(*arguments).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused, own = " ".join(str(error).split())[:400], _bytes_a_device(arguments)
        working = _bytes_named(refused)
        total = None if working is None else own + working
        return {"argument_bytes": own, "output_bytes": None, "temporary_bytes": working, "total_bytes": total, "refused": refused}
    own, working = int(found.argument_size_in_bytes), int(found.temp_size_in_bytes)
    outputs = int(found.output_size_in_bytes) - int(found.alias_size_in_bytes)
    total = own + outputs + working
    return {"argument_bytes": own, "output_bytes": outputs, "temporary_bytes": working, "total_bytes": total, "refused": ""}


def _bytes_a_device(arguments: Any) -> int:
    """What one device holds of arrays that are shapes with shardings; those without one are small (a random key)."""
    import jax

    placed = [leaf for leaf in jax.tree.leaves(arguments) if getattr(leaf, "sharding", None) is not None]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in placed)


def _bytes_named(message: str) -> int | None:
    """The working memory that a compiler's refusal names: "... HLO temporaries (20.82G) exceeds ..." or "... reserved 258.03M program 14.67G
    arguments 1.33G ..."; None where it names none."""
    found = re.search(r"(?:temporaries \(|\bprogram (?=[\d.]+[KMGT] arguments))([\d.]+)([KMGT])", message)
    return int(float(found.group(1)) * 1024 ** (" KMGT".index(found.group(2)))) if found else None


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


_HEADER = f"{'a device, GiB':<16}{'arguments':>10}{'outputs':>9}{'working':>9}{'held':>8}{'total':>8}  fits"


def _row(name: str, program: Mapping[str, Any]) -> str:
    """A program's memory, below `_HEADER`."""
    sizes = [program[key] for key in ("argument_bytes", "output_bytes", "temporary_bytes", "held_bytes")]
    sizes.append(None if program["total_bytes"] is None else program["total_bytes"] + program["held_bytes"])
    cells = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
    fits = {True: "yes", False: "NO", None: "(memory not known)"}[program["fits"]]
    return f"{name:<16}{cells[0]:>10}{cells[1]:>9}{cells[2]:>9}{cells[3]:>8}{cells[4]:>8}  {fits}"


def table(found: Mapping[str, Any]) -> str:
    """The plan as lines for people."""
    layout = ", ".join(f"{name}={size}" for name, size in found["layout"].items())
    room = "" if found["memory_gib"] is None else f", {found['memory_gib']:.0f} GiB each"
    adapter = f", an adapter of rank {found['lora_rank']} is trained" if found["lora_rank"] else ""
    lines = [
        f"model  {found['model']}: {found['parameters'] / 1e9:.3f} B parameters in {found['dtype']}{adapter}",
        f"mesh   {found['mesh']}: {found['devices']} x {found['device_kind']}{room}; {layout}",
        "",
        _HEADER,
    ]
    programs = [name for name in ("generate", "train_step") if name in found]  # of given texts nothing is generated
    lines += [_row(name, found[name]) for name in programs]
    lines.append("held: the policy that training started from, where something still reads it, and while sampling the training state")
    lines.append("")
    for name in programs:
        program, what = found[name], "batches" if name == "generate" else "micro_batches"
        at_peak = "" if program["seconds_at_peak"] is None else f", {program['seconds_at_peak']:.2f} s at the mesh's peak"
        split = f"{program[what]} x {program['rows']} rows"
        compiled = f"compiled in {program['compile_seconds']:.0f} s"
        lines.append(f"{name:<16}{program['flops'] / 1e12:.1f} TFLOP a step in {split}{at_peak}; {compiled}")
    lines += [f"{name} was refused: {found[name]['refused']}" for name in programs if found[name]["refused"]]
    stages = found["generate"]["stages"] if "generate" in found else 1
    if stages > 1:
        lines.append(f"generate was compiled with one cache for all new tokens; a run's {stages} stages compile for longer, and need no more")
    return "\n".join(lines)
