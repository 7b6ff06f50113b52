"""Host memory while a checkpoint of several shards is loaded, above what stays: a few pieces of 8 MiB, which is less than its largest tensor.

    python -m benchmarks.loading [--record]

A checkpoint of 1.3 GB in fp32 (hidden 1024, 16 layers, MLP 4096, vocabulary 32,000, untied) in files of 300 MB, random weights, loaded in a
process of its own on one device, and sharded over 8 fake ones, whose shards all lie in this memory. The peak is the process's largest resident
set less that before the load (after one of a small model) and less the parameters' own bytes; it counts the pages of files that the system has
mapped. `load_rate` is parameters by seconds, from files that the system may still hold in memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import ROOT, Figure, progress, run_benchmark

GIB = 2**30
SHAPE = {"vocab_size": 32000, "d_model": 1024, "n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "head_dim": 64, "d_ff": 4096}

LOAD = """
import json, re, sys, time
import jax
import models
from models.sharding import make_mesh
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
mesh = make_mesh({"fsdp": -1}) if len(jax.devices()) > 1 else None
jax.block_until_ready(models.load(sys.argv[2], mesh=mesh))  # what the first load of any checkpoint brings along
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before, began = peak(), time.perf_counter()
cfg, params = models.load(sys.argv[1], mesh=mesh)
jax.block_until_ready(params)
seconds, held = time.perf_counter() - began, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"above": peak() - before - held, "held": held, "seconds": seconds}))
"""


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """One load on one device, one over eight."""
    import jax

    import models

    cfg = models.ModelConfig(max_position=2048, **SHAPE)
    shape = "1.3 GB in files of 300 MB, largest tensor 0.12 GiB"
    with tempfile.TemporaryDirectory() as folder:
        progress("writing the checkpoint")
        models.save(Path(folder) / "model", cfg, models.init(cfg, jax.random.key(0)), max_shard_size=300 * 10**6)
        small = models.ModelConfig(d_model=64, d_ff=64, n_layers=1, n_heads=8, n_kv_heads=8, head_dim=8, vocab_size=64)
        models.save(Path(folder) / "small", small, models.init(small, jax.random.key(0)))
        for name, devices in (("", 1), ("_sharded", 8)):
            progress(f"loading over {devices} device(s)")
            flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-c", LOAD, str(Path(folder) / "model"), str(Path(folder) / "small")]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **flags})
            if done.returncode:
                sys.exit(f"loading failed:\n{done.stderr[-3000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            where = f"{shape}, over {devices} device(s)"
            yield Figure(f"load_peak{name}", found["above"] / GIB, "GiB", shape=f"{where}; goal under 0.125 GiB", better="lower")
            yield Figure(f"load_rate{name}", found["held"] / 1e9 / found["seconds"], "GB/s", shape=where)


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
