"""`jaxrl-llm plan`: what generation and a step of GRPO, DPO or SFT need on a mesh that need not be here, by compiling them without data."""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.commands import plan_programs as programs
from jaxrl_llm.commands.doctor import memory_gib
from jaxrl_llm.commands.plan_cost import CHIPS, GIB, Chip, roofline
from jaxrl_llm.commands.plan_target import choose_layout, choose_rollout_layout, resolve_model, target_sizes
from jaxrl_llm.config import check_fields
from jaxrl_llm.errors import UserError, nearest

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
    """Compiles the programs of the config and prints what they need."""
    sizes = target_sizes(config)
    found = plan(sizes)
    print(json.dumps(found) if sizes["json"] else table(found))


def plan(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Memory, FLOPs and least time of the sizes in configs/plan.py, as one JSON object.

    Bytes are a device's and come from the compiler, beside those that a run holds meanwhile (`held_bytes`): the policy that it started
    from, where a reference, other arms or judges read it, and while it samples the training state. FLOPs are the whole step's. `collectives`
    are the bytes that a device receives of others in a step, by kind; `roofline` the seconds of a step at the chip's published rates (None
    where the chip is none of `CHIPS`). `memory_gib` is None where the device does not tell. `compiler` is that of the devices that the programs
    were compiled for: "cpu" for a GPU's mesh, whose working memory and collectives are then indicative.

    Raises:
      UserError: an unknown model or mesh, sizes out of range or that do not fit the mesh or the model's context, or no TPU compiler here.
    """
    _need(sizes)
    devices, room, chip = resolve_devices(sizes["mesh"])
    if chip is not None and not chip.tpu and sizes["attention"] != "plain":
        told = f"mesh '{sizes['mesh']}' is compiled by the CPU's compiler, which has no kernel of attention={sizes['attention']!r}"
        raise UserError(f"{told}: plan with --config.attention=plain, which needs more memory than the kernel")
    from jaxrl_llm.runtime import parse_axes
    from jaxrl_llm.train.config import PreferenceLossConfig
    from models.sharding import make_mesh, relaid

    mesh = make_mesh(parse_axes(choose_layout(sizes, len(devices))), devices)
    rollout = choose_rollout_layout(sizes, len(devices))
    sampler_mesh = relaid(mesh, parse_axes(rollout)) if rollout else mesh
    model = resolve_model(sizes["model"], sizes["dtype"])
    if (width := sizes["prompt_tokens"] + sizes["max_new_tokens"]) > model.max_position:
        told = f"prompt_tokens={sizes['prompt_tokens']} and max_new_tokens={sizes['max_new_tokens']} make {width}"
        raise UserError(f"{told}, the context of {sizes['model']} is {model.max_position}: lower one of them")
    kind = getattr(devices[0], "device_kind", "device") if chip is None or chip.tpu else sizes["mesh"].partition(":")[0]
    found, held = {}, programs.held(model, sizes, mesh, sampler_mesh)
    pairs = isinstance(sizes["loss"], PreferenceLossConfig)
    update = programs.update_pairs if pairs else programs.update_texts if sizes["texts"] else programs.update
    move = lambda model, sizes, where: programs.move(model, sizes, mesh, where)  # noqa: E731
    wanted = [("move", move, sampler_mesh)] if sizes["sampled"] and sampler_mesh is not mesh else []
    wanted += [("generate", programs.generate, sampler_mesh)] if sizes["sampled"] else []
    wanted += [("train_step", update, mesh)]
    wanted += [("sae_encode", programs.sae_encode, mesh), ("sae_train", programs.sae_train, mesh)] if sizes["sae"] else []
    for name, compile_program, where in wanted:
        print(f"compiling {name} for {len(devices)} x {kind} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        program = compile_program(model, sizes, where) | {"compile_seconds": time.perf_counter() - began, "held_bytes": held[name]}
        program["fits"] = False if program["refused"] else None if room is None else program["total_bytes"] + held[name] <= room * GIB
        parts = (len(devices), program["flops"], program["read_bytes"], program["collectives"])
        program["roofline"] = None if chip is None else roofline(chip, *parts)
        program["try"] = "" if program["fits"] in (True, None) else _smaller(name, program, sizes, where)
        found[name] = program
        print(f"{_HEADER}\n{_row(name, program)}", file=sys.stderr, flush=True)  # the next program may compile for long, or not to its end
    shape = lambda mesh: {name: int(size) for name, size in mesh.shape.items()}  # noqa: E731
    return {
        "model": sizes["model"],
        "parameters": model.param_count(),
        "dtype": model.dtype,
        "kl": getattr(sizes["loss"], "kl", None),
        "critic": programs.critic(sizes),
        "lora_rank": sizes["lora_rank"],
        "mesh": sizes["mesh"],
        "devices": len(devices),
        "device_kind": kind,
        "compiler": devices[0].platform,
        "layout": shape(mesh),
        "rollout_layout": shape(sampler_mesh),
        "memory_gib": room,
        **found,
    }


def _smaller(name: str, program: Mapping[str, Any], sizes: Mapping[str, Any], mesh: Any) -> str:
    """The setting that would take the most memory off a program that does not fit."""
    from jaxrl_llm.train.config import PreferenceLossConfig
    from models.sharding import batch_ways

    ways, rows = batch_ways(mesh), program["rows"]
    if name == "train_step" and not sizes["remat"]:
        return "--config.remat=True (layers are recomputed: less memory, a third more work)"
    unit = 2 if isinstance(sizes["loss"], PreferenceLossConfig) else 1  # micro-batches of preferences count pairs
    if name == "train_step" and rows > unit * ways:
        return f"--config.micro_batch_rows={max(rows // unit // 2, ways)} (half the rows at once)"
    if name == "generate" and rows > ways * sizes["num_samples"]:
        return f"--config.rollout_rows={rows // 2} (half the completions at once)"
    axis = "--config.rollout_layout" if name in ("generate", "move") else "--config.layout"
    return f"{axis} with tensor={2 * mesh.shape['tensor']} (each device has half the widths), a larger slice, or larger chips"


def resolve_devices(name: str) -> tuple[list[Any], float | None, Chip | None]:
    """(devices, GiB of memory a device, what is known of the chip) of "here", "cpu:N", a TPU slice such as "v5e:2x4" or GPUs such as "h200:8",
    in whose place devices of the CPU stand.

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
    if kind not in CHIPS:
        raise UserError(f"unknown mesh '{name}': {nearest(kind, ['here', 'cpu', *CHIPS])}; such as cpu:4, v5e:2x4 or h200:8")
    if not CHIPS[kind].tpu:
        return _cpu_devices(shape, kind), CHIPS[kind].memory_gib, CHIPS[kind]
    if not all(side.isdigit() and int(side) for side in shape.split("x")):
        raise UserError(f"mesh '{name}': give the slice's shape in chips, such as {kind}:2x4")
    return _tpu_devices(name), CHIPS[kind].memory_gib, CHIPS[kind]


def _memory_here(devices: list[Any]) -> float | None:
    """GiB that each device of this machine has; CPU devices share the machine's memory."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit / GIB
    memory = memory_gib() if devices[0].platform == "cpu" else None
    return memory[0] / len(devices) if memory else None


def _cpu_devices(count: str, kind: str = "cpu") -> list[Any]:
    if not count.isdigit() or not int(count):
        raise UserError(f"mesh '{kind}:{count}': give the number of devices, such as {kind}:4")
    _plan_on_cpu()
    import jax

    if int(count) > 1 and not jax._src.xla_bridge.backends_are_initialized():
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise UserError(f"mesh '{kind}:{count}': JAX already runs here with {len(devices)} CPU devices; plan in a process of its own")
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
    counts = ("prompts", "num_samples", "prompt_tokens", "max_new_tokens", "rollout_rows", "inner_epochs", "updates_per_epoch")
    ranges = dict.fromkeys(counts, (1, endless))
    ranges |= dict.fromkeys(("micro_batch_rows", "samples_together", "lora_rank"), (0, endless))
    check_fields(sizes, {"dtype": ("float32", "bfloat16"), "remat_keep": ("nothing", "products"), "attention": ("plain", "splash", "cudnn")}, ranges)


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
    if found["rollout_layout"] != found["layout"]:
        layout += "; while sampling " + ", ".join(f"{name}={size}" for name, size in found["rollout_layout"].items())
    adapter = f", an adapter of rank {found['lora_rank']} is trained" if found["lora_rank"] else ""
    lines = [
        f"model  {found['model']}: {found['parameters'] / 1e9:.3f} B parameters in {found['dtype']}{adapter}",
        f"mesh   {found['mesh']}: {found['devices']} x {found['device_kind']}{room}; {layout}",
        "",
        _HEADER,
    ]
    names = [name for name in ("move", "generate", "train_step", "sae_encode", "sae_train") if name in found]  # of given texts nothing is generated
    lines += [_row(name, found[name]) for name in names]
    lines.append("held: the policy that training started from, where something still reads it, and while sampling the training state")
    if found["compiler"] == "cpu" != found["device_kind"]:
        lines.append(f"compiled by the CPU's compiler, not by that of {found['device_kind']}: working memory and what the links carry are indicative")
    lines.append("")
    for name in names:
        program, what = found[name], "micro_batches" if name == "train_step" else "batches"
        split = f"{program[what]} x {program['rows']} rows" + (f", {updates} times" if (updates := program.get("updates", 1)) > 1 else "")
        lines.append(f"{name:<16}{program['flops'] / 1e12:.1f} TFLOP a step in {split}; compiled in {program['compile_seconds']:.0f} s")
        if (least := program["roofline"]) is not None:
            parts = f"arithmetic {least['compute']:.2f}, memory {least['memory']:.2f}, links {least['links']:.2f}"
            moved = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted((program["collectives"] or {}).items(), key=lambda item: -item[1]))
            lines.append(f"{'':<16}at least {least['seconds']:.2f} s: {parts}" + (f"; GB to a device: {moved}" if moved else ""))
    lines += [f"{name} was refused: {found[name]['refused']}" for name in names if found[name]["refused"]]
    lines += [f"{name} does not fit; try {found[name]['try']}" for name in names if found[name]["try"]]
    stages = found["generate"]["stages"] if "generate" in found else 1
    if stages > 1:
        lines.append(f"generate was compiled with one cache for all new tokens; a run's {stages} stages compile for longer, and need no more")
    return "\n".join(lines)
