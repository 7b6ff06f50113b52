"""SAEs beside what the device allows: encoding beside the peak of matrix products, harvest and training beside the model's forward pass alone.

    python -m benchmarks.sae_device [--record]                                                    a small shape, for a CPU
    python -m benchmarks.sae_device --dtype bfloat16 --d_in 4096 --d_sae 65536 --rows 8192 --size 1.5b --batch 32 --context 1024       one H200

- encode: `sae.encode` of JumpReLU and `sae.encode_topk` of TopK, 2 D F FLOPs a row (the encoder's product), as a share of the peak; parameters and
  rows are of --dtype. Peaks are as in benchmarks/policy.py: published for chips that it knows, else measured here.
- stream: tokens through a model of Qwen2.5's shape, or the speed benchmarks' small one, with random weights, and into a TopK dictionary of its
  middle layer, as train_sae does it (harvest, shuffling buffer, update). The figure is what the forward pass up to the tap takes alone, its
  activations left on the device, as a share of what all of it takes for the same tokens.
"""

import argparse
import functools
import time
from collections.abc import Iterable

import numpy as np

from benchmarks.common import Figure, progress, run_benchmark, small_qwen2, timed_in_turns
from benchmarks.policy import SIZES, Peak, above, goal, model_of, peak_of

UPDATE_ROWS = 4096  # activations an update of the streamed dictionary


def encode(args: argparse.Namespace, peak: Peak) -> Iterable[Figure]:
    """The share of the peak, of both ways to encode."""
    import jax

    import sae

    rows = jax.random.normal(jax.random.key(0), (args.rows, args.d_in)).astype(args.dtype)
    described = {"d_in": args.d_in, "d_sae": args.d_sae, "dtype": args.dtype}
    topk = sae.init(sae.SAEConfig(k=args.k, **described), jax.random.key(1))
    jumprelu = sae.init(sae.SAEConfig(architecture="jumprelu", **described), jax.random.key(1))
    calls = {"jumprelu": functools.partial(sae.encode, jumprelu, rows), "topk": functools.partial(sae.encode_topk, topk, rows)}
    for name, (compile_s, seconds) in timed_in_turns(calls, repeats=args.repeats).items():
        share = 100 * 2 * args.rows * args.d_in * args.d_sae / min(seconds) / peak.flops
        shape = f"{args.rows} x {args.d_in}, d_sae {args.d_sae}{f', k {args.k}' if name == 'topk' else ''}, {args.dtype}; peak {peak.told}"
        yield figure(f"sae_encode_{name}", args, peak, share, shape, compile_s)


def stream(args: argparse.Namespace, peak: Peak) -> Iterable[Figure]:
    """The forward pass's share of harvest and training."""
    import jax

    import models
    import sae
    from sae.harvest import tap

    cfg = small_qwen2() if args.size == "small" else model_of(args)
    params, hook = models.init(cfg, jax.random.key(0)), f"blocks.{cfg.n_layers // 2}.resid_post"
    # Without the first position a row gives context - 1 activations.
    batches = -(-args.updates * UPDATE_ROWS // (args.batch * (args.context - 1))) + 1
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batches, args.batch, args.context)).astype(np.int32)
    lengths = np.full(args.batch, args.context, np.int32)
    described = sae.SAEConfig(d_in=cfg.d_model, d_sae=8 * cfg.d_model, k=32, hook_name=hook)
    matmul = "float32" if args.dtype == "float32" else "bfloat16"

    def train(updates: int) -> None:
        harvest = sae.harvest_activations(cfg, params, (row for batch in tokens for row in batch.tolist()), hook, args.batch, args.context)
        settings = sae.SAETrainConfig(steps=updates, log_every=updates, init_rows=UPDATE_ROWS, matmul_dtype=matmul)
        sae.train_sae(described, sae.ActivationBuffer(harvest, UPDATE_ROWS, 4 * UPDATE_ROWS), settings, jax.random.key(0), progress=False)

    def forward() -> None:
        jax.block_until_ready([tap(cfg, params, batch, lengths, (hook,)) for batch in tokens])

    train(2)
    forward()
    whole, alone = [], []
    for _ in range(args.repeats):
        for call, seconds in ((functools.partial(train, args.updates), whole), (forward, alone)):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    rate = args.updates * UPDATE_ROWS / min(whole)
    shape = f"{args.size} to {hook}, {args.batch} x {args.context} tokens, d_sae {described.d_sae}, {args.dtype}; {rate:.4g} tokens/s"
    yield figure("sae_stream", args, peak, 100 * min(alone) / min(whole), shape)


def figure(name: str, args: argparse.Namespace, peak: Peak, share: float, shape: str, compile_s: float | None = None) -> Figure:
    """One in percent, with its goal where there is one: on a chip whose peak in bfloat16 is published."""
    name = f"{name}_{peak.where}"
    return Figure(name, share, "%", compile_s=compile_s, shape=f"{shape}{goal(name, args.dtype == 'bfloat16')}")


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Both parts."""
    import jax

    device = jax.devices()[0]
    peak = peak_of(device.device_kind, device.platform, args.dtype)
    progress(f"encoding on {device.device_kind}")
    yield from encode(args, peak)
    progress("streaming")
    yield from stream(args, peak)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags; there are no peers, so it takes the accelerator that is there."""
    parser.add_argument("--d_in", type=above(1), default=768, help="width that is encoded")
    parser.add_argument("--d_sae", type=above(1), default=6144, help="latents")
    parser.add_argument("--k", type=above(1), default=32, help="latents kept by TopK")
    parser.add_argument("--rows", type=above(1), default=4096, help="activations encoded at once")
    parser.add_argument("--size", choices=("small", *SIZES), default="small", help="of the model that is harvested")
    parser.add_argument("--batch", type=above(1), default=4, help="texts that it reads at once")
    parser.add_argument("--context", type=above(2), default=128, help="tokens of each")
    parser.add_argument("--updates", type=above(2), default=4, help=f"of {UPDATE_ROWS} activations")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.set_defaults(peers=False, repeats=3)


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
