"""Multi-controller JAX on localhost: two processes of one device each curate, train an SAE and sample as one process does."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_curation as tiny

from jaxrl_llm.config import load_config
from jaxrl_llm.curation.curated_set import SIGNALS, CuratedSet

CURATE = {**tiny.ROLLOUTS, "data.limit": "40", "features.shard_rows": "32", "bootstrap": "2", "formats": "parquet", "controls": "False"}
CURATE |= {"difficulty.max_labels": "32", "quality.samples": "20", "quality.corruptions": "garble,wrong_answer"}
# In the shapes of curation's own SAE, so that its programs are compiled once.
SAE = {"batch_size": "64", "harvest.buffer_rows": "256", "harvest.context_size": "24", "train.steps": "4", "sae.expansion": "3", "sae.k": "4"}
SAE |= {"harvest.batch_rows": "21", "train.init_rows": "256"}
SAMPLES = {"data.limit": "16", "data.on_bad": "skip", "num_samples": "4", "max_new_tokens": "3", "overflow": "truncate", "max_prompt_tokens": "16"}

SCRIPT = """
import sys; sys.path.insert(0, "tests/curation")
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import pathlib
import numpy as np
from jax.experimental import multihost_utils
import models
import test_two_processes_curate as tests
from jaxrl_llm.curation import pipeline, streaming
assert jax.process_count() == 2 and jax.device_count() == 2
world, out, mine = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]), jax.process_index()
written = []

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if "/checkpoints" in str(arguments[0] if arguments else ""):
        return  # each process writes its shards there
    if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.truncate")) and str(arguments[0]).startswith(str(out)):
        written.append((event, arguments[0]))

sys.addaudithook(watch)
curated, signals = tests.run_all(world, out, "fsdp=2")
assert bool(written) == (mine == 0), written
multihost_utils.sync_global_devices("all is written")

def done_before(*_, **__):
    raise AssertionError("this was done before and is on disk")

models.generate = pipeline.train_dictionary = streaming._run_shard = done_before
again, _ = tests.curate(world, out, "fsdp=2")
for name in tests.SIGNALS:
    np.testing.assert_array_equal(getattr(again, name), getattr(curated, name))
np.savez(f"{sys.argv[5]}_{mine}.npz", **{name: getattr(curated, name) for name in tests.SIGNALS})
"""


def curate(world, out, mesh):
    from jaxrl_llm.curation.pipeline import curate
    from jaxrl_llm.data.sources import read_rows

    config = tiny.config_of(world, mesh=mesh, **CURATE)
    rows = read_rows(config.data.source, limit=config.data.limit, on_bad="skip")
    return curate(rows, config, out / "curate")


def run_all(world, out, mesh):
    """Curation with an SAE trained here and rollout labels, and the verbs train_sae and generate."""
    from jaxrl_llm.commands import generate, train_sae

    curated = curate(world, out, mesh)
    common = {"model": str(world / "model"), "data.source": str(world / "rows.jsonl"), "data.on_bad": "skip", "mesh": mesh}
    train_sae.run(load_config("configs/train_sae.py", {**common, **SAE}), str(out / "sae"))
    generate.run(load_config("configs/generate.py", {**common, **SAMPLES}), str(out / "samples"))
    return curated


def test_two_processes_curate_as_one_does(repo, tmp_path):
    world = tiny.save_world(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"  # as in this process: `quick_compilation`
    command = [sys.executable, "-c", SCRIPT, address]
    files = [str(world), str(two), str(tmp_path / "process")]
    started = [subprocess.Popen([*command, str(i), *files], env=env, cwd=repo, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        alone, _ = run_all(world, one, "")
        errors = [process.communicate(timeout=1200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors[0][-3000:] + errors[1][-3000:]

    first, second = (np.load(tmp_path / f"process_{i}.npz") for i in range(2))
    for name in SIGNALS:
        np.testing.assert_array_equal(first[name], second[name])
    written = CuratedSet.read(two / "curate" / "curated")
    assert written.rows == alone.rows and (written.cluster == alone.cluster).all() and (written.keep == alone.keep).all()
    np.testing.assert_array_equal(written.difficulty, first["difficulty"])
    np.testing.assert_allclose(written.difficulty, alone.difficulty, atol=1e-3)
    np.testing.assert_allclose(written.quality, alone.quality, rtol=1e-3, atol=1e-3)
    (rates,), (expected,) = ([lines(path) for path in (folder / "curate").glob("pass_rates-*.jsonl")] for folder in (two, one))
    assert rates == expected and len(rates) == 32 and len({line["rate"] for line in rates}) > 1
    vectors = [np.load(folder / "curate" / "vectors.npz")["vectors"] for folder in (one, two)]
    np.testing.assert_allclose(*vectors, atol=1e-3)
    figures = [json.loads((folder / "curate" / "signals.json").read_text())["sae"]["explained_variance"] for folder in (one, two)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)

    summaries = [json.loads((folder / "sae" / "summary.json").read_text()) for folder in (one, two)]
    assert {name: pytest.approx(value, abs=2e-3) if isinstance(value, float) else value for name, value in summaries[0].items()} == summaries[1]
    assert len(lines(two / "sae" / "metrics.jsonl")) == len(lines(one / "sae" / "metrics.jsonl"))
    samples = [lines(folder / "samples" / "samples.jsonl") for folder in (one, two)]
    assert len(samples[0]) == 64 and [s["completion"] for s in samples[0]] == [s["completion"] for s in samples[1]]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
