"""Sampling on the CPU, fp32: tokens a second of `models.generate`, log-probabilities included, no stop token.

    python -m benchmarks.generation [--no-peers] [--record]

Qwen2 shape (6.4 M parameters: hidden 256, 6 layers, 4 heads, 2 KV heads, MLP 1024, vocabulary 2048 tied), 64 different prompts of
32 tokens, 128 new tokens, temperature 1, top_p 1. The peers are tunix's Sampler, which gives log-probabilities too, and
transformers.generate, which is not asked for them. Then greedy; then 8 prompts x 8 samples beside the same 64 rows as prompts of
their own, which is what the shared prefill saves, at 32 and at 512 tokens a prompt; then 8 batches' worth of rows whose lengths are
spread over 1:8, evenly and by their logarithms, with places that are filled again beside batches that wait for their last row. Every
call draws anew and gives token ids on the host. All count the best of the repeats, since a machine that others use too slows each by
different amounts at different times.
"""

import argparse
import functools
import itertools
from collections.abc import Iterable

import numpy as np

from benchmarks.common import Figure, peer_value, progress, run_benchmark, run_peer, small_qwen2, timed, timed_in_turns

PROMPT, NEW, LONG_PROMPT, LONG_NEW, WAVES, SPREAD = 32, 128, 512, 32, 8, 8


def sampler(cfg, params, prompts: int, width: int, new: int | np.ndarray, **settings):
    """A call of `models.generate` on random prompts, with another seed each time. new: tokens of each completion, or one for all."""
    import models

    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (prompts, width)).tolist()
    copies, seeds = settings.pop("copies", 1), itertools.count()
    rows = [prompt for prompt in tokens for _ in range(copies)]

    def call():
        out = models.generate(cfg, params, rows, max_new_tokens=new, stop_tokens=(), seed=next(seeds), **settings)
        assert (out.completion_lengths_N == new).all() and (out.logps_NT[:, 0] < 0).all()

    return call


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Beside the peers, greedy, and with the prefill shared."""
    import jax

    import models

    batch, scripts = args.batch, {"tunix": "tunix_generation", "hf": "hf_generation"}
    flags = ["--batch", batch, "--prompt", PROMPT, "--new", NEW, "--repeats", args.repeats]
    peers = {name: run_peer(name, script, flags) if args.peers else None for name, script in scripts.items()}
    cfg = small_qwen2()
    params = models.init(cfg, jax.random.key(0))
    call = functools.partial(sampler, cfg, params)

    progress("sampling")
    compile_s, seconds = timed(call(batch, PROMPT, NEW), repeats=args.repeats)
    rate, shape = batch * NEW / min(seconds), f"batch {batch}, {PROMPT} + {NEW} tokens, 6.4 M parameters, fp32"
    for (name, result), goal in zip(peers.items(), ("; goal 2.5 x", "")):
        label = "transformers" if name == "hf" else name
        version = None if result is None else result["peer"]
        yield Figure(f"generation_vs_{label}", rate, "tokens/s", version, peer_value(result), compile_s, shape + goal)

    progress("greedy")
    compile_s, seconds = timed(call(batch, PROMPT, NEW, temperature=0.0), repeats=args.repeats)
    yield Figure("generation_greedy", batch * NEW / min(seconds), "tokens/s", compile_s=compile_s, shape=shape)

    for name, width, new in (("generation_shared_prefill", PROMPT, NEW), ("generation_shared_prefill_long", LONG_PROMPT, LONG_NEW)):
        progress(f"8 samples a prompt of {width} tokens")
        shared, apart = call(batch // 8, width, new, num_samples=8), call(batch // 8, width, new, copies=8)
        found = timed_in_turns({"shared": shared, "apart": apart}, repeats=args.repeats)
        (compile_s, ours), (_, theirs) = found["shared"], found["apart"]
        rates = [batch * new / min(each) for each in (ours, theirs)]
        shape = f"{batch // 8} prompts x 8 samples, {width} + {new} tokens"
        yield Figure(name, rates[0], "tokens/s", f"our {batch} prompts x 1", rates[1], compile_s, shape)

    least, rows = NEW // SPREAD, WAVES * batch
    spreads = {"uniform": np.linspace(least, NEW, rows), "log-uniform": np.geomspace(least, NEW, rows)}
    for spread, sorted_lengths in spreads.items():
        lengths = np.random.default_rng(1).permutation(sorted_lengths.round().astype(int))
        shape = f"{rows} completions of {least} to {NEW} tokens, {spread}, {batch} at once"
        progress(shape)
        ways = {refill: call(rows, PROMPT, lengths, max_rows=batch, refill=refill) for refill in (True, False)}
        found = timed_in_turns({str(refill): each for refill, each in ways.items()}, repeats=args.repeats)
        (compile_s, ours), (_, theirs) = found["True"], found["False"]
        rates = [lengths.sum() / min(each) for each in (ours, theirs)]
        yield Figure(f"generation_refill_{spread}", rates[0], "tokens/s", "our batches", rates[1], compile_s, f"{shape}; goal 1.6 x")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--batch", type=int, default=64, help="rows, a multiple of 8")


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
