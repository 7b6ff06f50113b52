"""Time and memory of the whole curation, from rows to the written set, as the number of prompts grows.

    python -m benchmarks.curation_scale [--sizes 1000,10000,100000] [--record]

Each size runs in a process of its own: seconds of `jaxrl_llm.curation.pipeline.curate` with its default settings (SAE training,
features with all controls, clusters, difficulty, quality on prompt + answer, three layouts) and the peak of resident memory. The
prompts are synthetic, the model is small (2 layers, width 32), so that what is measured is curation and not the model.
`growth` is the largest size's time over ten times the time of a tenth of it: at most 1.1 is the goal. What a run costs whatever its
size (SAE training, probes on so many labels) flatters that, so `further` is the time that each prompt beyond the size before adds, with
the same of one size less as its peer: constant where time grows in proportion.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT, Figure, progress, run_benchmark

SETTINGS = {
    "difficulty.labels": "level",
    "train_sae.steps": "200",
    "train_sae.batch_size": "1024",
    "train_sae.buffer_rows": "16384",
}


def synthetic_rows(n: int) -> list[dict]:
    """n different rows of 10 to 40 words with an answer, a topic that shows in the words and a level that shows in the length."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(400)])
    rows = []
    for i in range(n):
        topic, level = int(rng.integers(8)), int(rng.integers(1, 6))
        chosen = np.where(rng.random(5 + 7 * level) < 0.5, words[topic * 50 + rng.integers(0, 50, 5 + 7 * level)], rng.choice(words, 5 + 7 * level))
        rows.append({"id": str(i), "prompt": f"{' '.join(chosen)} {i} ?", "answer": str(int(rng.integers(1000))), "topic": topic, "level": level})
    return rows


def build_model(folder: Path, rows: list[dict]) -> None:
    """A small random model with a word tokenizer."""
    import jax
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    import models

    words = ["<unk>", "<bos>", "<eos>", "?", *(f"w{i}" for i in range(400))]
    tokenizer = Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    shape = dict(model_type="llama", vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    cfg = models.ModelConfig.from_hf({**shape, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True})
    models.save(folder, cfg, models.init(cfg, jax.random.key(0)))
    fast.save_pretrained(folder)


def one(n: int) -> None:
    """The child's part: curate n rows and print a JSON object."""
    from jaxrl_llm.config import load_config
    from jaxrl_llm.curation.pipeline import curate

    with tempfile.TemporaryDirectory() as folder:
        rows = synthetic_rows(n)
        build_model(Path(folder) / "model", rows)
        overrides = {"model": f"{folder}/model", "data.source": "synthetic", "data.topic": "topic", **SETTINGS}
        config = load_config("configs/curate.py", overrides)
        start = time.perf_counter()
        _, signals = curate(rows, config, Path(folder) / "out")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "stages": signals["seconds"]}))


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    """Time and memory of each size, and how they grow."""
    sizes, seconds = [int(size) for size in args.sizes.split(",")], {}
    for n in sizes:
        progress(f"curating {n} prompts")
        command = [sys.executable, "-m", "benchmarks.curation_scale", "--one", str(n)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # its bars and errors go to our standard error
        if done.returncode:
            sys.exit(f"curation of {n} rows failed")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        seconds[n] = result["seconds"]
        stages = ", ".join(f"{name} {value:.0f}" for name, value in result["stages"].items())
        yield Figure(f"curation_seconds_{n}", result["seconds"], "s", shape=f"{n} prompts: {stages}", better="lower")
        yield Figure(f"curation_peak_{n}", result["peak_gib"], "GiB", shape=f"{n} prompts, resident", better="lower")
    further = None
    for smaller, larger in itertools.pairwise(sorted(seconds)):
        cost = 1000 * (seconds[larger] - seconds[smaller]) / (larger - smaller)
        shape, peer = f"each prompt from {smaller} to {larger}", further and "one size less"
        yield Figure(f"curation_further_{larger}", cost, "ms/prompt", peer, further, shape=shape, better="lower")
        further = cost if cost > 0 else None  # below zero at sizes so small that noise decides
    largest = max(sizes)
    if largest // 10 in seconds:
        growth = seconds[largest] / (10 * seconds[largest // 10])
        yield Figure("curation_growth", growth, "x", shape=f"time of {largest} over 10 x time of {largest // 10}; goal at most 1.1", better="lower")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--sizes", default="1000,10000,100000", help="numbers of prompts, comma-separated")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "--one" in sys.argv:
        one(int(sys.argv[sys.argv.index("--one") + 1]))
    else:
        run_benchmark(measure, __doc__, add_arguments)
