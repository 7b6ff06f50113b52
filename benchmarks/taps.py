"""What named activations cost a forward pass: tokens a second without any, and with the residual stream of every layer.

    python -m benchmarks.taps [--record]

Qwen2 shape (6.4 M parameters), 16 rows of 256 tokens, fp32, up to the final norm. `forward_no_taps` is `models.forward` with taps
not asked for; its peer is the same scan over `Block` written without any of the tap machinery. The claim is that both compile to
the same program, so `forward_no_taps_program` counts what differs between the two compiled programs (instructions, less names and
source lines): 0. They take turns, and each counts its best time.
"""

import argparse
import collections
import re
from collections.abc import Iterable

import numpy as np

from benchmarks.common import Figure, progress, run_benchmark, small_qwen2, timed_in_turns

ROWS, TOKENS = 16, 256


def bare_forward(cfg):
    """(params, tokens) -> the hidden state after the final norm, by a plain scan over the layers."""
    import jax
    import jax.numpy as jnp

    from models.attention import attention_mask
    from models.layers import Block, embed, rms_norm
    from models.rope import rope_table

    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rope, mask = rope_table(cfg, positions), attention_mask(positions, positions, None)

        def layer(x, p):
            x, _ = Block(cfg).apply({"params": p}, x, rope, lambda k, v: ([(k, v, mask)], None), lambda _, y: y)
            return x, None

        x, _ = jax.lax.scan(layer, embed(params["embed"]["embedding"], tokens), params["blocks"])
        return rms_norm(x, params["final_norm"]["scale"], cfg.norm_eps)

    return forward


def instructions(compiled) -> collections.Counter:
    """The compiled program's instructions, shapes and layouts included, without names and where they came from in the source."""
    lines = (re.sub(r", metadata=\{.*?\}", "", line) for line in compiled.as_text().splitlines() if " = " in line)
    return collections.Counter(re.sub(r"%[\w.\-]+", "%", line).strip().removeprefix("ROOT ") for line in lines)


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Without taps beside a forward that has none, then with them."""
    import jax

    import models

    cfg = small_qwen2()
    params = models.init(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (args.rows, TOKENS)).astype(np.int32)
    names = tuple(f"blocks.{i}.resid_post" for i in range(cfg.n_layers))

    def with_taps(taps):
        def forward(params, tokens):
            out = models.forward(cfg, params, tokens, taps=taps)
            return (out.hidden, out.taps) if taps else out.hidden

        return forward

    progress("compiling")
    forwards = {"bare": bare_forward(cfg), "none": with_taps(()), "all": with_taps(names)}
    programs = {name: jax.jit(forward).lower(params, tokens).compile() for name, forward in forwards.items()}
    bare, none = instructions(programs["bare"]), instructions(programs["none"])
    differing = sum(((bare - none) + (none - bare)).values())
    progress("running")
    calls = {name: (lambda program=program: program(params, tokens)) for name, program in programs.items()}
    best = {name: min(seconds) for name, (_, seconds) in timed_in_turns(calls, repeats=args.repeats).items()}
    rate = {name: args.rows * TOKENS / seconds for name, seconds in best.items()}
    shape = f"{args.rows} x {TOKENS} tokens, 6.4 M parameters, fp32"
    yield Figure("forward_no_taps", rate["none"], "tokens/s", "scan without tap machinery", rate["bare"], shape=f"{shape}; goal 1 x")
    what = f"that the two do not share, of {sum(bare.values())}; goal 0"
    yield Figure("forward_no_taps_program", differing, "instructions", shape=what, better="lower")
    yield Figure("forward_all_residuals", rate["all"], "tokens/s", "no taps", rate["none"], shape=f"{shape}, {cfg.n_layers} taps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of a batch")


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
