"""Preferences and runs on them small enough for a test; run as a program, it writes the curves that tests/golden keeps."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import tiny_grpo as tiny

import models
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.config import DPOConfig, OnlineDPOConfig, OptimizerConfig, PairLossConfig, PreferenceLossConfig
from jaxrl_llm.train.dpo import Preferences, train_dpo, with_unrelated
from jaxrl_llm.train.online_dpo import train_online_dpo

CONFIG = dataclasses.replace(tiny.CONFIG, n_layers=1)  # compiled in half the time
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "preference_curves.json"
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
QUICK = DPOConfig(steps=4, optimizer=OPTIMIZER, forward_rows=16)
ONLINE = OnlineDPOConfig(
    steps=4, num_samples=4, max_new_tokens=6, optimizer=OPTIMIZER, checkpoint_every=1, sample_every=1, loss=PairLossConfig(beta=0.5)
)  # fmt: skip
# Every kind with settings at which a few steps show.
LOSSES = {
    "sigmoid": PreferenceLossConfig(beta=0.5),
    "conservative": PreferenceLossConfig(beta=0.5, label_smoothing=0.1),
    "robust": PreferenceLossConfig(kind="robust", beta=0.5, label_smoothing=0.1),
    "hinge": PreferenceLossConfig(kind="hinge", beta=0.5),
    "ipo": PreferenceLossConfig(kind="ipo", beta=0.5),
    "simpo": PreferenceLossConfig(kind="simpo", beta=2.0),
    "orpo": PreferenceLossConfig(kind="orpo", beta=0.5),
    "kto": PreferenceLossConfig(kind="kto", beta=0.5, undesirable_weight=1.2),
}


def params(seed=0):
    return models.init(CONFIG, jax.random.key(seed))


def pairs(rows=12, seed=0):
    """The chosen completion counts up from the prompt's last token, the rejected one down; both are ragged and end."""
    rng = np.random.default_rng(seed)
    prompts, completions = [], []
    for _ in range(rows):
        start, length = int(rng.integers(2, 16)), int(rng.integers(1, 5))
        prompts.append([2 + (start + i) % 14 for i in range(length)])
        ups, downs = rng.integers(2, 6, 2)
        last = prompts[-1][-1]
        completions.append(
            ([2 + (last - 1 + i) % 14 for i in range(ups)] + [tiny.STOP], [2 + (last - 3 - i) % 14 for i in range(downs)] + [tiny.STOP])
        )
    return Preferences(prompts, completions, [f"r{i}" for i in range(rows)])


def labelled(rows=12, seed=0):
    """The same for KTO: chosen and rejected completions by turns, with a label."""
    paired = pairs(rows, seed)
    labels = np.arange(rows) % 3 > 0
    own = [pair[0 if label else 1] for pair, label in zip(paired.completions, labels, strict=True)]
    return Preferences(paired.prompts, with_unrelated(paired.prompts, own, 32), paired.ids, labels)


def rows_for(kind, rows=12, seed=0):
    return labelled(rows, seed) if kind == "kto" else pairs(rows, seed)


def train(config=QUICK, data=None, folder=None, start=None, held_out=None, batch=6, **kwargs):
    """(parameters, history)."""
    data = rows_for(config.loss.kind) if data is None else data
    run_dir = None if folder is None else RunDir(folder, {"name": "dpo"}, kind="dpo")
    start = params() if start is None else start
    schedule = ShuffledSchedule(len(data), min(batch, len(data)), 3)
    return train_dpo(CONFIG, start, data, schedule, config, run_dir, held_out, progress=False, **kwargs)


def train_online(folder, config=ONLINE, *, reward=tiny.reward, schedule=None, evals=None, data=None, start=None, **kwargs):
    """(parameters, summary)."""
    data = tiny.prompts() if data is None else data
    schedule = ShuffledSchedule(len(data), 4, seed=3) if schedule is None else schedule
    run_dir = RunDir(folder, {"name": "online"}, kind="online_dpo")
    start = params() if start is None else start
    return train_online_dpo(CONFIG, start, tiny.Tokenizer(), data, reward, schedule, config, run_dir, evals, progress=False, **kwargs)


def curve(recipe, folder):
    """The records of a recipe's steps: {"loss": [...], "margin": [...], ...} of training. Accuracy is from the second step on: at the
    first, policy and reference are the same, and the sign of a margin of 0 is that of its rounding."""
    if recipe == "online_dpo":
        train_online(folder)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names, records = ("loss", "margin", "logp_chosen", "reward", "pairs", "tied"), [r for r in records if r["kind"] == "train"]
    else:
        _, records = train(dataclasses.replace(QUICK, loss=LOSSES[recipe]))
        names = ("loss", "margin", "accuracy", "logp_chosen", "logp_rejected", "grad_norm")
    return {name: [record[name] for record in records[name == "accuracy" :]] for name in names}


if __name__ == "__main__":  # PYTHONPATH=. python tests/train/tiny_preferences.py
    import tempfile

    jax.config.update("jax_disable_most_optimizations", True)  # as the tests have it
    found = {}
    for recipe in (*LOSSES, "online_dpo"):
        with tempfile.TemporaryDirectory() as name:
            found[recipe] = curve(recipe, Path(name) / "run")
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    command = "PYTHONPATH=. JAX_PLATFORMS=cpu python tests/train/tiny_preferences.py"
    GOLDEN.write_text(json.dumps({"command": command, "versions": versions, "curves": found}, indent=1) + "\n")
    for recipe, curves in found.items():
        print(recipe, [round(x, 4) for x in curves["loss"]], [round(x, 4) for x in curves["margin"]])
