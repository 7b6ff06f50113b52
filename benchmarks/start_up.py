"""How long a command takes before it does its work: `jaxrl-llm --help`, and compiling on the first and on a second run.

    python -m benchmarks.start_up [--record]

`help` is the median over process starts. `compile_second_run` is the time that a `jaxrl-llm generate` (Qwen2 shape, 6.4 M
parameters, a process of its own) spends in XLA's compiler, or in reading what the persistent cache holds, when the same command has
run before; its peer is the first run, with the cache empty. `generate_second_run` is the whole of that command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import ROOT, Figure, median, progress, run_benchmark, small_qwen2

NEW = 64

# Runs the front door and, last of all, prints the seconds in the compiler and the programs taken from the cache and not.
COUNTED = """
import json, sys
from jax import monitoring
from jaxrl_llm import cli
seconds, seen = [], []
monitoring.register_event_duration_secs_listener(lambda event, s, **_: event.endswith('backend_compile_duration') and seconds.append(s))
monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition('/')[2]))
code = cli.main(sys.argv[1:])
print(json.dumps({'seconds': sum(seconds), 'hits': seen.count('cache_hits'), 'misses': seen.count('cache_misses')}))
sys.exit(code)
"""


def front_door() -> list[str]:
    """The installed command, else the module."""
    script = Path(sys.executable).parent / "jaxrl-llm"
    return [str(script)] if script.exists() else [sys.executable, "-m", "jaxrl_llm"]


def run(command: list[str], **environment: str) -> tuple[float, str]:
    """(wall seconds, standard output) of a command in the repository; a failure ends the benchmark."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(command[-4:])} failed:\n{done.stderr[-3000:]}")
    return seconds, done.stdout


def write_model(folder: str) -> None:
    """The small model with random weights and a word tokenizer, as a Hugging Face folder."""
    import jax
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    import models

    cfg = small_qwen2()
    models.save(folder, cfg, models.init(cfg, jax.random.key(0)))
    core = Tokenizer(token_models.WordLevel({f"w{i}": i for i in range(cfg.vocab_size)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(folder)


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Process starts, then the same small command twice."""
    progress("jaxrl-llm --help")
    starts = [run([*front_door(), "--help"])[0] for _ in range(args.repeats + 1)][1:]  # the first start also reads the disk
    yield Figure("help", median(starts), "s", shape=f"median of {len(starts)} starts; goal under 1 s", better="lower")
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/model")
        command = [sys.executable, "-c", COUNTED, "generate", f"--config.model={folder}/model", "--config.prompt=w1 w2 w3"]
        walls, found = [], []
        for number in ("first", "second"):
            progress(f"{number} run of generate")
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_ENABLE_COMPILATION_CACHE": "true"}
            seconds, output = run([*command, f"--config.max_new_tokens={NEW}", "--config.num_samples=8"], **cache)
            walls.append(seconds)
            found.append(json.loads(output.strip().splitlines()[-1]))
    (first, second), shape = found, f"generate, 8 samples of {NEW} tokens"
    counts = f"{second['hits']} programs from the cache, {second['misses']} not"
    yield Figure("compile_second_run", second["seconds"], "s", "first run", first["seconds"], shape=f"{shape}: {counts}", better="lower")
    yield Figure("generate_second_run", walls[1], "s", "first run", walls[0], shape=f"{shape}, the whole command", better="lower")


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
