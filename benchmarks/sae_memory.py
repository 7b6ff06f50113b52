"""The memory of one training step of a wide TopK SAE (d_in 768, d_sae 65,536, batch 4096): peak resident GiB of a process of its own.

    python -m benchmarks.sae_memory [--no-peers] [--record]
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.common import Figure, peer_value, run_benchmark, run_peer
from benchmarks.sae_train import PEER

SIZES = {"d_in": 768, "d_sae": 65536, "k": 32, "batch": 4096}

OURS = """
import resource
import numpy as np
import jax, sae
from sae.step import init_state, start, step_for
from sae.train_config import numbers_at
d_in, d_sae, k, batch = {sizes}
rows = np.random.default_rng(0).standard_normal((batch, d_in), dtype=np.float32)
cfg, train = sae.SAEConfig(d_in=d_in, d_sae=d_sae, k=k), sae.SAETrainConfig()
d, scale = start(cfg, train, rows, jax.random.key(0))
state, step = init_state(d), step_for(cfg, train)
del d
for i in range(3):
    state, metrics = step(state, jax.numpy.asarray(rows), numbers_at(i, d_sae, train, scale))
    jax.block_until_ready(metrics)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    """Peak of three steps of ours and of the peer's trainer."""
    code = OURS.format(sizes=tuple(SIZES.values()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    peer = run_peer("saelens", "saelens_sae", ["train", "topk", *SIZES.values(), 2]) if args.peers else None
    theirs = peer_value(peer, "peak_gib")
    shape = ", ".join(f"{name} {value}" for name, value in SIZES.items())
    yield Figure("sae_memory", float(done.stdout.split()[-1]), "GiB", PEER, theirs, None, shape, better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
