"""A policy in the shapes of Qwen2.5, with random weights: sampling beside the memory's rate, training beside the arithmetic's, a GRPO step.

    python -m benchmarks.policy [--record]                                                     0.5B, small batches, fp32: for a CPU
    python -m benchmarks.policy --dtype bfloat16 --size 1.5b --part decode --batch 256 --prompt 256 --new 512                   one H200
    python -m benchmarks.policy --dtype bfloat16 --size 1.5b --part train --batch 64 --prompt 256 --new 768 --micro 8 --attention cudnn
    python -m benchmarks.policy --dtype bfloat16 --size 0.5b --part grpo --batch 512 --samples 8 --prompt 256 --new 512 --micro 64

It runs on the first device that JAX has. All count the best of the repeats, compilation apart.

- decode: tokens/s of `models.sample_tokens` on `batch` different prompts, prefill and log-probabilities included. `decode_bound`: what the
  memory's rate allows as a share of what was taken for the tokens after the first (the whole call less a call for one token). Each of them
  reads the parameters (of an embedding that is no unembedding nothing) and every row's keys and values so far:
  (W + B c 2 L K H bytes) / rate, c the tokens before it.
- train: a step of `train_sft` on `batch` rows of prompt + new tokens, all of them counted. MFU: 3 x (2 N + 4 L n H T / 2) FLOPs a token over
  the peak, that is 6 N and attention over the T / 2 tokens that a token sees on the average; N is of the matrices, the unembedding among
  them. What `remat` computes again does not count.
- grpo: a step of `train_grpo`, batch / samples prompts, as in benchmarks/grpo_step.py, and its rollout, reward and update.

Peaks are the maker's for bfloat16 on the chips that `plan` knows, which is what percentages of an accelerator are of elsewhere; otherwise, and
on a CPU, those of a large product and a large copy (read and written) in this same run. Peak memory is the device's where it tells, else what is
resident, each time since the process began: give one --part for that of a part. A part that does not fit says so and has no figure.
"""

import argparse
import dataclasses
import functools
import itertools
import resource
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.common import AWAITED, Figure, progress, run_benchmark, timed, timed_in_turns
from benchmarks.grpo_step import train as train_grpo
from jaxrl_llm.commands.plan_cost import CHIPS
from jaxrl_llm.commands.plan_target import resolve_model

GIB = 2**30
SIZES, PARTS = ("0.5b", "1.5b", "7b"), ("decode", "train", "grpo")

# What JAX calls a device -> its chip. Boards of the same name with other rates (PCIe, NVL, 40 GB) are not here, and are measured.
KINDS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """The device: its name in figures, FLOP/s in the dtype, bytes/s from memory, and which of them are published."""

    where: str
    flops: float
    memory_rate: float
    told: str


def model_of(args: argparse.Namespace) -> Any:
    """The shape of Qwen2.5, whose completions never end early."""
    return dataclasses.replace(resolve_model(f"qwen2.5-{args.size}", args.dtype), eos_token_ids=())


def peak_of(kind: str, platform: str, dtype: str) -> Peak:
    """Published rates where there are any, else measured ones."""
    import jax
    import jax.numpy as jnp

    chip = CHIPS.get(KINDS.get(kind, ""))
    side, entries = (2048, 2**26) if platform == "cpu" else (8192, 2**29)
    flops = chip.flops if chip and dtype == "bfloat16" else None
    if flops is None:
        progress(f"a product of {side} x {side} in {dtype}")
        x = jnp.ones((side, side), dtype)
        product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
        flops = 2 * side**3 / min(timed(lambda: product(x, x))[1])
    rate = chip.memory_rate if chip else None
    if rate is None:
        progress(f"a copy of {4 * entries / GIB:.2g} GiB")
        long, copy = jnp.zeros(entries), jax.jit(lambda x: x + 1)
        rate = 2 * 4 * entries / min(timed(lambda: copy(long))[1])
    told = "published" if chip and dtype == "bfloat16" else "rate of memory published, FLOP/s measured" if chip else "measured"
    return Peak(KINDS.get(kind, platform), flops, rate, f"{told}: {flops / 1e12:.3g} TFLOP/s, {rate / 1e9:.3g} GB/s")


def bytes_read(cfg: Any, batch: int, prompt: int, new: int) -> int:
    """What the tokens after the first read: for each the parameters, and of each row the keys and values of the tokens before it."""
    itemsize = 4 if cfg.dtype == "float32" else 2
    weights = cfg.param_count() - (0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model)
    cached = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim
    contexts = sum(prompt + before for before in range(1, new))
    return itemsize * ((new - 1) * weights + batch * contexts * cached)


def decode(args: argparse.Namespace, cfg: Any, peak: Peak) -> Iterable[Figure]:
    """Tokens a second, and the bound's share."""
    import jax

    import models

    params, keys = models.init(cfg, jax.random.key(0)), map(jax.random.key, itertools.count(1))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (args.batch, args.prompt)).astype(np.int32)
    lengths = np.full(args.batch, args.prompt, np.int32)
    sample = lambda new: models.sample_tokens(cfg, params, tokens, lengths, next(keys), max_new_tokens=new, stop_tokens=())  # noqa: E731
    found = timed_in_turns({"all": lambda: sample(args.new), "first": lambda: sample(1)}, repeats=args.repeats)
    (compile_s, every), (_, first) = found["all"], found["first"]
    if (later := min(every) - min(first)) <= 0:
        raise SystemExit(f"{args.new} tokens took no longer than one: give a larger --new or --batch")
    bound = bytes_read(cfg, args.batch, args.prompt, args.new) / peak.memory_rate
    shape = f"batch {args.batch}, {args.prompt} + {args.new} tokens, {args.dtype}"
    yield Figure(f"decode_{args.size}_{peak.where}", args.batch * args.new / min(every), "tokens/s", compile_s=compile_s, shape=shape)
    name = f"decode_bound_{args.size}_{peak.where}"
    aim = goal(name, args.dtype == "bfloat16" and args.batch == 256)
    yield Figure(name, 100 * bound / later, "%", shape=f"{shape}; {1e3 * later / (args.new - 1):.3g} ms a token, bound {peak.told}{aim}")


def train(args: argparse.Namespace, cfg: Any, peak: Peak) -> Iterable[Figure]:
    """Tokens a second, and MFU."""
    import jax

    import models
    from jaxrl_llm.train.config import OptimizerConfig, SFTConfig
    from jaxrl_llm.train.sft import train_sft

    width = args.prompt + args.new
    # Of width + 1 tokens the last is only predicted.
    batch = np.random.default_rng(0).integers(0, cfg.vocab_size, (args.batch, width + 1)), np.ones((args.batch, width + 1), bool)
    config = SFTConfig(steps=args.repeats + 2, log_every=1, optimizer=OptimizerConfig(learning_rate=1e-5), **update_settings(args))
    history = train_sft(cfg, lambda: models.init(cfg, jax.random.key(0)), itertools.repeat(batch), config, progress=False)[1]
    first, *rest = (record["seconds"] for record in history)
    tokens, seconds = args.batch * width, min(rest)
    shape = f"{args.batch} x {width} tokens, {told(args)}"
    yield Figure(f"train_{args.size}_{peak.where}", tokens / seconds, "tokens/s", compile_s=max(0.0, first - seconds), shape=shape)
    name = f"train_mfu_{args.size}_{peak.where}"
    aim = goal(name, args.dtype == "bfloat16")
    yield Figure(name, 100 * tokens * train_flops(cfg, width) / seconds / peak.flops, "%", shape=f"{shape}; peak {peak.told}{aim}")


def train_flops(cfg: Any, width: int) -> int:
    """FLOPs a token of a step, forward and twice that backward."""
    return 3 * cfg.flops_per_token(width // 2)


def grpo(args: argparse.Namespace, cfg: Any, peak: Peak) -> Iterable[Figure]:
    """Seconds a step, and of its parts."""
    prompts = args.batch // args.samples
    settings = {"rollout_rows": args.batch, **update_settings(args)}
    records, gaps = train_grpo(args.repeats + 3, cfg, prompts, args.samples, args.prompt, args.new, **settings)
    seconds = min(gaps[2:])
    compile_s = max(0.0, records[0]["seconds"] + records[1]["seconds"] - 2 * seconds)
    shape, name = f"{prompts} x {args.samples} completions, {args.prompt} + {args.new} tokens, {told(args)}", f"grpo_{args.size}_{peak.where}"
    aimed_at = (args.dtype, prompts, args.samples, args.prompt, args.new) == ("bfloat16", 64, 8, 256, 512)
    yield Figure(name, seconds, "s", compile_s=compile_s, shape=f"{shape}{goal(name, aimed_at)}", better="lower")
    best = min(records[2:], key=lambda record: record["seconds"])
    for part in ("rollout", "reward", "update"):
        yield Figure(f"{name}_{part}", best[f"seconds_{part}"], "s", shape=shape, better="lower")


def update_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of the update, as both trainers name them."""
    return {"micro_batch_rows": args.micro, "remat": args.remat, "attention": args.attention}


def told(args: argparse.Namespace) -> str:
    """What the update is told, for the record."""
    return f"{args.micro or 'all'} rows a micro-batch, attention {args.attention}{', remat' if args.remat else ''}, {args.dtype}"


def goal(name: str, holds: bool) -> str:
    """The goal of a figure where its shape is that of the goal."""
    return f"; goal {AWAITED[name][1]}" if holds and name in AWAITED else ""


def peak_memory() -> tuple[float, str]:
    """(GiB, whose) since the process began."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / GIB, "of the device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "resident"


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """The parts that are asked for, and after each the peak of memory."""
    import jax

    if "grpo" in args.part and args.batch % args.samples:
        raise SystemExit(f"--batch {args.batch} is no multiple of --samples {args.samples}")
    device, cfg = jax.devices()[0], model_of(args)
    peak = peak_of(device.device_kind, device.platform, args.dtype)
    for part in args.part:
        progress(f"{part}, {cfg.param_count() / 1e9:.2f} B parameters on {device.device_kind}")
        try:
            yield from {"decode": decode, "train": train, "grpo": grpo}[part](args, cfg, peak)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            progress(f"{part} does not fit here and is not measured: lower --batch or --micro, or give --remat")
            continue
        gib, whose = peak_memory()
        shape = f"{whose}; batch {args.batch}, {args.prompt} + {args.new} tokens, {told(args)}"
        yield Figure(f"{part}_peak_{args.size}_{peak.where}", gib, "GiB", shape=shape, better="lower")


def parts(text: str) -> list[str]:
    """Of a list with commas, in the order of `PARTS`."""
    named = text.split(",")
    if wrong := [name for name in named if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no part; parts: {','.join(PARTS)}")
    return [name for name in PARTS if name in named]


def above(least: int) -> Any:
    """A whole number that is at least `least`."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags; there are no peers, so it takes the accelerator that is there."""
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--part", type=parts, default=list(PARTS), help="decode,train,grpo or some of them")
    parser.add_argument("--batch", type=above(1), default=4, help="rows that are sampled, or trained on in a step; a multiple of --samples for grpo")
    parser.add_argument("--samples", type=above(2), default=2, help="completions a prompt, of grpo")
    parser.add_argument("--prompt", type=above(1), default=16, help="tokens a prompt")
    parser.add_argument("--new", type=above(2), default=16, help="tokens a completion")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--micro", type=above(0), default=0, help="rows a micro-batch of the update, 0 = all")
    parser.add_argument("--remat", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--attention", choices=("plain", "splash", "cudnn"), default="plain", help="of the update")
    parser.set_defaults(peers=False, repeats=3)


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
