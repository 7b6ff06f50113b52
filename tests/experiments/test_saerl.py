"""The SAERL experiment end to end at toy size: every stage runs, a stopped run goes on, and arms differ only as stated."""

import json

import numpy as np
import pytest

from experiments import saerl
from jaxrl_llm.config import load_config
from jaxrl_llm.errors import UserError

TINY = {
    "policy.clean_steps": 60, "policy.mixed_steps": 10, "policy.batch": 64, "policy.d_model": 48, "policy.d_ff": 96, "policy.n_layers": 2,
    "policy.n_heads": 2, "sae.steps": 6, "sae.d_sae": 64, "sae.k": 8, "sae.batch": 128, "grpo.steps": 3, "grpo.eval_every": 1,
    "grpo.prompts_per_step": 8, "grpo.num_samples": 4, "grpo.max_new_tokens": 4, "data.test_rows": 24, "data.rows": 240,
    "curation.labels": 120, "curation.quality_labels": 60, "curation.clusters": 4, "curation.dims": 8, "map_prompts": 60,
}  # fmt: skip


def tiny(**changes):
    return load_config("configs/saerl.py:demo", TINY | changes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("saerl") / "run"
    saerl.run(tiny(), path)
    return path


def test_every_stage_leaves_its_result(workdir):
    cell = workdir / "cells" / "wrong-base0-seed0"
    for name in ("sae", "curated", "signals.json", "page.json", "rollouts.json", "vanilla/result.json", "full/result.json", "full/policy"):
        assert (cell / name).exists(), name
    assert not (cell / "full" / "checkpoints").exists()
    summary = json.loads((workdir / "summary.json").read_text())
    row = summary["pools"]["wrong"]["full"]
    assert 0 <= row["accuracy"]["value"] <= 1 and row["seeds"] == 1
    vanilla = summary["pools"]["wrong"]["vanilla"]
    assert row["difference"]["value"] == pytest.approx(row["accuracy"]["value"] - vanilla["accuracy"]["value"], abs=1e-9)
    page = (workdir / "report.html").read_text()
    for text in ("Held-out accuracy", "vanilla", "Difficulty", "Quality", "Diversity"):
        assert text in page


def test_arms_start_from_one_policy_and_one_pool(workdir):
    cell = workdir / "cells" / "wrong-base0-seed0"
    records = {arm: [json.loads(line) for line in (cell / arm / "metrics.jsonl").open()] for arm in ("vanilla", "full")}
    first = {arm: next(r for r in lines if r["kind"] == "eval") for arm, lines in records.items()}
    assert first["vanilla"]["rates"] == first["full"]["rates"] and first["vanilla"]["step"] == 0
    rows = {arm: [r["rows"] for r in lines if r["kind"] == "train"] for arm, lines in records.items()}
    assert rows["vanilla"] != rows["full"]
    kept = np.load(cell / "signals.npz")["keep"]
    assert kept[np.concatenate(rows["full"])].all() and not kept.all()


def test_finished_run_is_not_trained_again(workdir, capsys):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    saerl.run(tiny(), workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")} == before
    assert "report:" in capsys.readouterr().out


def test_another_runs_directory_is_refused(workdir):
    with pytest.raises(UserError, match="grpo.steps"):
        saerl.run(tiny(**{"grpo.steps": 4}), workdir)


def test_unknown_arm_names_the_nearest():
    config = tiny()
    with config.unlocked():
        config.arms = ("vanilla", "ful")
    with pytest.raises(UserError, match="'ful'.*'?full'?"):
        saerl.check(config)


@pytest.fixture(scope="module")
def signals():
    rng, n = np.random.default_rng(0), 64
    kinds = np.where(np.arange(n) % 4 == 0, "wrong_answer", "none")
    quality = np.where(kinds == "none", 1.0, 0.0) + 0.01 * rng.random(n)
    reduced = {k: rng.normal(size=(n, 4)).astype(np.float32) for k in saerl.FEATURES}
    clusters = {k: rng.integers(0, 4, n) for k in saerl.FEATURES}
    difficulty = {k: rng.random(n) for k in (*saerl.FEATURES, "oracle")}
    return saerl.Signals(reduced, clusters, difficulty, dict.fromkeys(("logprob", *saerl.FEATURES), quality), {}, {"corruption": kinds}, {})


def test_every_arm_of_the_table_makes_its_own_schedule(signals):
    config, cell = tiny(), saerl.Cell("mixed", 0, 0)
    batches = {}
    for name in config.arm_table:
        schedule = saerl.make_arm_schedule(config, cell, name, signals, 64)
        batches[name] = tuple(schedule.batch(0))
        assert len(set(batches[name])) == config.grpo.prompts_per_step
    # quality is the same for all features here, so filters with other features coincide; all other arms differ
    assert len(set(batches.values())) >= len(batches) - 1


def test_filters_drop_what_they_should(signals):
    config, cell = tiny(), saerl.Cell("mixed", 0, 0)
    bad = signals.truth["corruption"] != "none"
    oracle = saerl.keep_rows(config, cell, config.arm_table.oracle_filter, signals, 64)
    assert not oracle[bad].any() and oracle[~bad].all()
    kept = saerl.keep_rows(config, cell, config.arm_table.filter, signals, 64)
    assert (~kept).sum() == round(config.pool_table.mixed.drop * 64) and bad[~kept].all()
    assert saerl.keep_rows(config, cell, config.arm_table.vanilla, signals, 64).all()
