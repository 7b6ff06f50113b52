"""Runs of `sft` and of every variant of configs/grpo.py, small enough for a test; as a program, it writes the curves that tests/golden keeps."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import tiny_grpo as tiny
import tiny_preferences as prefs
from test_train_sft import QUICK, data

from jaxrl_llm.config import config_path, import_config, load_config
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.config import GRPOConfig, from_mapping
from jaxrl_llm.train.loop import train_grpo
from jaxrl_llm.train.sft import train_sft

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training_curves.json"
VARIANTS = import_config(config_path("configs/grpo.py")[0]).VARIANTS
STEPS = 6


def high(inputs):
    """The share of the tokens that are 9 or above; a policy that knows nothing has about a half, and soon more."""
    shares = [np.mean([int(token) >= 9 for token in item.response.split()] or [0.0]) for item in inputs]
    return [Verdict(Status.PASS if share > 0.5 else Status.FAIL, score=float(share)) for share in shares]


def settings(variant):
    """The variant's own, but for what a tiny run needs."""
    given = from_mapping(GRPOConfig, load_config(f"configs/grpo.py:{variant}").train)
    small = dict(steps=STEPS, num_samples=4, max_new_tokens=6, eval_every=0, sample_every=0, checkpoint_every=0, optimizer=prefs.OPTIMIZER)
    return dataclasses.replace(given, **small)


def curve(recipe, folder):
    """{"loss": [...], "grad_norm": [...], ...} of the steps of a recipe: "sft" or a variant of configs/grpo.py."""
    if recipe == "sft":
        _, records = train_sft(prefs.CONFIG, prefs.params(), data(), dataclasses.replace(QUICK, steps=STEPS), progress=False)
        names = ("loss", "grad_norm", "tokens")
    else:
        run_dir, rows = RunDir(folder, {"name": recipe}, kind="grpo"), tiny.prompts()
        schedule = ShuffledSchedule(len(rows), 4, seed=3)
        train_grpo(prefs.CONFIG, prefs.params(), tiny.Tokenizer(), rows, high, schedule, settings(recipe), run_dir, progress=False)
        records = [record for record in run_dir.metrics() if record["kind"] == "train"]
        names = ("loss", "reward", "entropy", "clip_share", "completion_length", "grad_norm")
        names += tuple(name for name in ("kl", "value_loss") if records[0].get(name) is not None)
    return {name: [record[name] for record in records] for name in names}


if __name__ == "__main__":  # PYTHONPATH=. python tests/train/tiny_curves.py
    import tempfile

    jax.config.update("jax_disable_most_optimizations", True)  # as the tests have it
    found = {}
    for recipe in ("sft", *VARIANTS):
        with tempfile.TemporaryDirectory() as name:
            found[recipe] = curve(recipe, Path(name) / "run")
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    command = "PYTHONPATH=. JAX_PLATFORMS=cpu python tests/train/tiny_curves.py"
    GOLDEN.write_text(json.dumps({"command": command, "versions": versions, "curves": found}, indent=1) + "\n")
    for recipe, curves in found.items():
        print(recipe, {name: [round(x, 4) for x in values] for name, values in curves.items()})
