"""The SAERL experiment end to end at toy size: every stage runs, a stopped run goes on, and arms differ only as stated."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

import models
import sae
from experiments import _saerl_checks as checks
from experiments import saerl
from jaxrl_llm.config import load_config
from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.likelihood import answer_likelihood
from jaxrl_llm.curation.passes import LanguageModel
from jaxrl_llm.curation.signals import ALONE, KINDS, POLICY_KINDS, Signals
from jaxrl_llm.curation.texts import answer_tokens
from jaxrl_llm.data import lab_world
from jaxrl_llm.errors import UserError

TINY = {
    "policy.clean_steps": 60, "policy.mixed_steps": 10, "policy.batch": 64, "policy.d_model": 48, "policy.d_ff": 96, "policy.n_layers": 2,
    "policy.n_heads": 2, "sae.steps": 6, "sae.d_sae": 64, "sae.k": 8, "sae.batch": 128, "grpo.steps": 3, "grpo.eval_every": 1,
    "grpo.prompts_per_step": 8, "grpo.num_samples": 4, "grpo.max_new_tokens": 4, "data.test_rows": 24, "data.rows": 240,
    "curation.labels": 120, "curation.quality_labels": 60, "curation.clusters": 4, "curation.dims": 8, "map_prompts": 60,
    "curation.refilter_every": 2,
}  # fmt: skip


def tiny(variant="demo", **changes):
    return load_config(f"configs/saerl.py:{variant}", TINY | changes)


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """A hundred resamples an interval: ten times as many take seconds a run."""
    options = saerl.signal_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saerl, "signal_options", lambda bench: dataclasses.replace(options(bench), draws=100))
        yield


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


def test_the_page_is_whole_in_a_browser_and_can_be_drawn_anew(workdir, tmp_path, repo, monkeypatch):
    """The one that the run made, not a fixture's: charts, width, what is said of the quality probes; `report` draws the same one again."""
    from jaxrl_llm.cli import main

    copy = tmp_path / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("cells", "policies"))
    page = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert main(["report", f"--workdir={copy}"]) in (None, 0) and (copy / "report.html").read_bytes() == page
    data = json.loads((copy / "report.json").read_text())
    quality = next(table for table in data["signals"] if table["title"] == "Quality")
    names = [row["name"] for row in quality["rows"]]
    assert {"sae", "random_sae", "dense", "tfidf", "tfidf_alone", "logprob", "length"} <= set(names) and len(names) == len(set(names))
    assert all(row["cells"][0]["low"] is not None for row in quality["rows"]), "every probe on the rows told, with its interval"
    difficulty = next(table for table in data["signals"] if table["title"] == "Difficulty")["rows"]
    assert len({json.dumps(row["cells"]) for row in difficulty}) == len(difficulty), "no baseline stands there twice"

    monkeypatch.syspath_prepend(repo / "tests" / "report")
    from browser import assert_whole

    charts = {"curves", "map", "schedule", "calibration", "quality", "rollouts", "stages"}
    assert_whole(copy / "report.html", tmp_path / "profile", charts, data["headline"].split(".")[0])


def test_arms_start_from_one_policy_and_one_pool(workdir):
    cell = workdir / "cells" / "wrong-base0-seed0"
    records = {arm: [json.loads(line) for line in (cell / arm / "metrics.jsonl").open()] for arm in ("vanilla", "full")}
    first = {arm: next(r for r in lines if r["kind"] == "eval") for arm, lines in records.items()}
    assert first["vanilla"]["rates"] == first["full"]["rates"] and first["vanilla"]["step"] == 0
    rows = {arm: [r["rows"] for r in lines if r["kind"] == "train"] for arm, lines in records.items()}
    assert rows["vanilla"] != rows["full"]
    kept = CuratedSet.read(cell / "curated", "parquet").keep
    assert kept[np.concatenate(rows["full"][:2])].all() and not kept.all()  # up to the step that filters anew


def test_a_killed_stage_is_made_again_and_finished_ones_are_not(workdir, tmp_path):
    """Signals, SAE and curated set come back as they were; what was cut off (here: rollouts and one arm's end) is made."""
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    cell = copy / "cells" / "wrong-base0-seed0"
    (cell / "rollouts.json").unlink()
    (cell / "full" / "result.json").unlink()
    shutil.rmtree(cell / "full" / "policy")
    kept = {name: (cell / name).stat().st_mtime_ns for name in ("signals.npz", "sae.json", "page.json", "vanilla/result.json")}
    saerl.run(tiny(), copy)
    assert kept == {name: (cell / name).stat().st_mtime_ns for name in kept}
    assert (cell / "rollouts.json").read_text() == (workdir / "cells" / cell.name / "rollouts.json").read_text()
    assert (cell / "full" / "result.json").exists() and (cell / "full" / "policy").exists()


def test_told_arms_start_from_a_policy_tuned_on_the_rows_told_to_be_sound(workdir):
    """Plain fine-tuning on those rows and no others, as long as the config says; every other arm starts from the base policy."""
    config, cell = tiny(), saerl.Cell("wrong", 0, 0)
    policy = LanguageModel.load(str(workdir / "policies" / "base0"), "float32", None)
    pool, evals, reward = saerl.make_data(config, cell, policy)
    truth = saerl.known_truth(pool)
    bench = saerl.Bench(config, cell, workdir, None, policy, pool, evals, reward, truth, False)
    answers = answer_tokens(pool.rows, policy.tokenizer)
    mean = lambda params: answer_likelihood(policy.cfg, params, answers, len(pool))[0][:, 0]  # noqa: E731
    assert saerl.start_policy(bench, "full") is policy.params
    told, started = saerl.told_quality(bench), saerl.start_policy(bench, "vanilla_told")
    gain = mean(started) - mean(policy.params)
    assert gain[told == 1].mean() > max(0.0, gain[told == 0].mean(), gain[np.isnan(told)].mean())
    jax.tree.map(np.testing.assert_array_equal, started, saerl.start_policy(bench, "full_told"))
    bench.config = tiny(**{"curation.told_epochs": 30})
    assert (mean(saerl.start_policy(bench, "full_told")) - mean(started))[told == 1].mean() > 0.01


def test_overwrite_starts_over(workdir, tmp_path, monkeypatch):
    """Nothing of the run before is found; the signals, which would take longest and be the same, are given from it."""
    copy, left = tmp_path / "run", []

    def signals_of_before(bench, *_):
        left.append([path.name for name in ("signals.json", "signals.npz", "vanilla") if (path := bench.folder / name).exists()])
        found = Signals.load(workdir / "cells" / bench.cell.name)
        bench.truth |= found.truth
        found.save(bench.folder)
        return found

    shutil.copytree(workdir, copy)
    config = tiny(**{"grpo.steps": 2, "arms": ("vanilla", "full"), "overwrite": True})
    monkeypatch.setattr(saerl, "make_signals", signals_of_before)
    saerl.run(config, copy)
    assert left == [[]]
    lines = [json.loads(line) for line in (copy / "cells" / "wrong-base0-seed0" / "full" / "metrics.jsonl").open()]
    assert max(r["step"] for r in lines) == 2


@pytest.fixture(scope="module")
def real_run(workdir, tmp_path_factory):
    """The same experiment on rows of a file, with a policy from a folder and an SAE of another model with another tokenizer."""
    root = tmp_path_factory.mktemp("real")
    rows = lab_world.generate_problems(160, 5)
    plain = [{"question": r["prompt"], "gold": r["answer"]} for r in rows]
    (root / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in plain[:120]))
    (root / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in plain[120:140]))
    (root / "two.jsonl").write_text("".join(json.dumps({"q": r["question"], "a": r["gold"]}) + "\n" for r in plain[140:]))
    policy = workdir / "policies" / "base0"
    other_words = sorted({w for r in rows for w in r["prompt"].split()} | set("0123456789"), reverse=True)
    tokenizer = word_tokenizer(["<unk>", "<bos>", *other_words])
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(tokenizer), d_model=24, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=12, d_ff=48, max_position=64,
        bos_token_id=1,
    )  # fmt: skip
    models.save(root / "feature_model", cfg, models.init(cfg, jax.random.key(3)), tokenizer_from=tokenizer)
    changes = {
        "data.source": str(root / "pool.jsonl"), "data.fields": "prompt=question,answer=gold", "policy.model": str(policy),
        "sae.model": str(root / "feature_model"), "curation.quality_labels": 0, "curation.copies": 60, "curation.labels": 60,
        "data.evals.test.source": str(root / "one.jsonl"), "data.rows": 120,
    }  # fmt: skip
    config = tiny("own", **changes, **{"data.reward": "exact", "data.max_prompt_tokens": 24})
    with config.unlocked():
        config.data.evals.other = {"source": str(root / "two.jsonl"), "fields": "prompt=q,answer=a", "split": "test"}
    saerl.run(config, root / "run")
    # The same rows with a column that tells of the first 60 whether they are sound.
    wrong = np.random.default_rng(0).random(60) < 0.4
    marked = [r | ({"sound": int(not wrong[i])} if i < 60 else {}) for i, r in enumerate(plain[:120])]
    (root / "told.jsonl").write_text("".join(json.dumps(r | ({"gold": "red"} if r.get("sound") == 0 else {})) + "\n" for r in marked))
    arms = {"arms": ("vanilla_told", "full_tuned"), "main_arm": "full_tuned", "curation.told_epochs": 1}
    saerl.run(tiny(**(changes | arms | {"data.source": str(root / "told.jsonl"), "data.told": "sound"})), root / "told")
    return root


def word_tokenizer(words):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>")


def test_real_rows_run_without_any_truth(real_run):
    """Quality from corrupted copies, two held-out sets with field maps of their own, a report."""
    cell = real_run / "run" / "cells" / "data-base0-seed0"
    report = json.loads((cell / "signals.json").read_text())
    assert report["quality"]["told"] is False and report["quality"]["counts"]["copies"] > 0 and "clusters" not in report
    sets = {json.loads(line).get("set") for line in (cell / "full" / "metrics.jsonl").open()}
    assert {"test", "other"} <= sets
    assert "Held-out accuracy" in (real_run / "run" / "report.html").read_text()


def test_real_rows_may_tell_which_are_sound(real_run):
    """The probe learns from the column, policies are tuned on the sound rows, the filter knows how many to drop."""
    root, cell = real_run, real_run / "told" / "cells" / "wrong-base0-seed0"
    report = json.loads((cell / "signals.json").read_text())
    assert report["quality"]["told"] is True and report["quality"]["counts"]["labels"] == 60 and "tuned" in report["quality"]["probes"]
    told = [json.loads(line).get("sound") for line in (root / "told.jsonl").open()]
    kept = CuratedSet.read(cell / "curated").keep
    bad = 1 - np.mean([t for t in told if t is not None])
    assert (~kept).sum() == round(min(1.5 * bad, 0.6) * 120)
    start = json.loads((cell / "vanilla_told" / "metrics.jsonl").read_text().splitlines()[0])
    other = json.loads((cell / "full_tuned" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["step"] == other["step"] == 0 and start != other, "one starts from the tuned policy"
    assert not (cell / "features").exists() and not (real_run / "run" / "cells" / "data-base0-seed0" / "features").exists()


def test_prompts_that_mostly_do_not_fit_are_told_with_the_setting(real_run, workdir):
    policy = LanguageModel.load(str(workdir / "policies" / "base0"), "float32", None)
    prompts = [json.loads(line)["question"] for line in (real_run / "pool.jsonl").open()]
    limit = sorted(map(len, policy.tokenizer(prompts)["input_ids"]))[40]
    fields = {"data.source": str(real_run / "pool.jsonl"), "data.fields": "prompt=question,answer=gold", "data.max_prompt_tokens": limit}
    with pytest.raises(UserError, match=rf"pool: \d+ of 120 prompts are longer than config.data.max_prompt_tokens={limit}: raise it.*saerl.py:own"):
        saerl.make_data(tiny(**fields, **{"data.evals.test.source": str(real_run / "one.jsonl")}), saerl.Cell("wrong", 0, 0), policy)


def test_the_feature_model_reads_its_own_tokens(real_run):
    """Features of the run equal those of the prompts in the feature model's tokenizer, not in the policy's."""
    from jaxrl_llm.curation.passes import LanguageModel
    from jaxrl_llm.curation.signals import SignalOptions, feature_views

    cell = real_run / "run" / "cells" / "data-base0-seed0"
    rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in CuratedSet.read(cell / "curated", "parquet").rows]
    model = LanguageModel.load(str(real_run / "feature_model"), "float32", None)
    options = SignalOptions(pooling=("max_log1p", "last"), remove_length=True, dims=8, clusters=4)
    views = feature_views(rows, model, sae.load(cell / "sae"), options)
    found = Signals.load(cell).reduced["dense"]
    np.testing.assert_allclose(views["dense"].reduce(8), found, rtol=1e-4, atol=1e-4)
    assert sae.load(cell / "sae").cfg.d_in == 24


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo.eval_samples": 0}, "eval_samples"),
        ({"formats": ("parket",)}, "formats.*parquet"),
        ({"sae.pooling": ("maxx",)}, "sae.pooling"),
        ({"grpo.aggregation": "token_sum"}, "grpo.aggregation"),
        ({"curation.band_balance": "even"}, "band_balance"),
        ({"data.reward": "exakt"}, "exact"),
        ({"policy.n_heads": 5}, "n_heads=5"),
        ({"data.rows": 0}, "data.rows' is 0: give 1 or more"),
        ({"grpo.num_samples": 1}, "num_samples"),
        ({"grpo.overlap_rewards": True, "grpo.rollout_tries": 2}, "overlap_rewards needs config.grpo.rollout_tries=1 and one process"),
        ({"grpo.overlap_rewards": True}, "arm 'full' follows the policy.*overlap_rewards=False"),
        ({"curation.rho": 0.7}, "rho.*0 to 0.5"),
        ({"seeds": ()}, "name at least one"),
        ({"data.source": "rows.jsonl"}, "data.evals.test.source"),
        ({"data.source": "r", "data.evals.test.source": "t", "arms": ("vanilla", "full_oracle_filter"), "main_arm": "vanilla"}, "truth"),
        ({"arm_table.full.filter": "sea"}, "filter is 'sea'.*sae"),
        ({"main_arm": "published"}, "main_arm"),
        ({"arms": ("vanilla", "full_tuned"), "main_arm": "vanilla", "curation.quality_labels": 0}, "'full_tuned' .* told to be sound"),
        ({"arms": ("vanilla", "vanilla_told"), "main_arm": "vanilla", "curation.quality_labels": 0}, "'vanilla_told' .* told to be sound"),
        ({"arms": ("vanilla", "full_tuned"), "main_arm": "vanilla", "curation.tuned": False}, "config.curation.tuned"),
    ],
)
def test_what_would_be_noticed_after_hours_is_refused_at_once(changes, message):
    with pytest.raises(UserError, match=message):
        saerl.check(tiny(**changes))


def bench_of(config, n=64):
    """A Bench with a pool of n nameless rows, every fourth with a wrong answer."""
    kinds = np.where(np.arange(n) % 4 == 0, "wrong_answer", "none")
    return saerl.Bench(config, saerl.Cell("mixed", 0, 0), None, None, None, range(n), {}, None, {"corruption": kinds}, False, lambda: None)


@pytest.fixture(scope="module")
def signals():
    rng, n = np.random.default_rng(0), 64
    good = np.arange(n) % 4 > 0
    quality = {k: good + 0.01 * rng.random(n) for k in ("logprob", "tuned", "sae_alone", "tfidf_alone", *checks.FEATURES)}
    reduced = {k: rng.normal(size=(n, 4)).astype(np.float32) for k in checks.FEATURES}
    clusters = {k: rng.integers(0, 4, n) for k in checks.FEATURES}
    difficulty = {k: rng.random(n) for k in (*checks.FEATURES, "oracle")}
    return Signals(reduced, clusters, difficulty, quality)


def test_every_arm_of_the_table_makes_its_own_schedule(signals):
    """Arms differ in their rows or, where they start from another policy or run for longer, in that."""
    config = tiny()
    batches = {}
    for name in config.arm_table:
        schedule = saerl.make_arm_schedule(bench_of(config), name, signals)
        rows = tuple(schedule.batch(0))
        batches[name] = (config.arm_table[name].start, config.arm_table[name].length, rows)
        assert len(set(rows)) == config.grpo.prompts_per_step
    assert len(set(batches.values())) == len(batches)


def test_the_tables_names_are_those_of_the_signals():
    """Listed in the experiment too, which must not import them before the check of a config."""
    assert checks.FEATURES == KINDS and set(checks.FILTERS) == {"none", "oracle", *KINDS, *POLICY_KINDS, *ALONE}


def test_filters_drop_what_they_should(signals):
    config = tiny()
    bench = bench_of(config)
    bad = bench.truth["corruption"] != "none"
    oracle = saerl.keep_rows(bench, config.arm_table.full_oracle_filter, signals)
    assert not oracle[bad].any() and oracle[~bad].all()
    kept = saerl.keep_rows(bench, config.arm_table.filter, signals)
    # All 64 rows are told: as many are dropped as are bad, and half as many again inside strata.
    assert (~kept).sum() == 16 and bad[~kept].all()
    assert saerl.keep_rows(bench, config.arm_table.vanilla, signals).all()
    inside = saerl.keep_rows(bench, config.arm_table.full, signals)
    assert (~inside).sum() == 24
    sizes = np.bincount(signals.clusters["sae"])
    lost = np.bincount(signals.clusters["sae"][~inside], minlength=4)
    assert np.abs(lost - 24 / 64 * sizes).max() <= 2
    for changes, dropped in (
        ({"curation.drop_per_bad": 0.5}, 8), ({"curation.drop_most": 0.125}, 8), ({"curation.quality_labels": 0, "curation.drop": 0.25}, 16),
    ):  # fmt: skip
        changed = dataclasses.replace(bench, config=tiny(**changes))
        assert (~saerl.keep_rows(changed, config.arm_table.filter, signals)).sum() == dropped
    changed = dataclasses.replace(bench, config=tiny(**{"curation.strata_drop_per_bad": 0.5}))
    assert (~saerl.keep_rows(changed, config.arm_table.full, signals)).sum() == 8


@pytest.mark.parametrize("name", ["curriculum", "published", "mixing"])
def test_an_order_spans_what_the_run_visits(signals, name):
    """3 steps of 8 out of 64 rows: twice the steps visit twice the rows, and the hardest tenth of what is kept is met as often as its share
    (over 20 draws), where an order over the whole pool would end before it."""
    config, hard, met, share = tiny(), signals.difficulty["sae"], [], []
    for seed in range(20):
        bench = dataclasses.replace(bench_of(config), cell=saerl.Cell("mixed", 0, seed))
        keep = saerl.keep_rows(bench, config.arm_table[name], signals)
        hardest = keep & (hard > np.quantile(hard[keep], 0.9))
        for length in (1, 2) if seed < 3 else (1,):
            config.arm_table[name].length = float(length)
            schedule = saerl.make_arm_schedule(bench, name, signals)
            rows = np.concatenate([schedule.batch(step) for step in range(3 * length)])
            assert len(set(rows)) == 24 * length and keep[rows].all()
            if name == "curriculum":
                assert (np.diff(hard[rows]) >= 0).all()
            if length == 1:
                met.append(hardest[rows].mean())
                share.append(hardest.sum() / keep.sum())
    assert np.mean(met) == pytest.approx(np.mean(share), abs=0.03) and np.count_nonzero(met) >= 17


def test_no_held_out_problem_is_in_the_pool_or_in_pre_training(monkeypatch, tmp_path):
    """Corrupted rows included: a garbled or reworded problem could be a held-out one."""
    config = tiny(**{"data.test_seed": 7, "data.rows": 600})
    held_out = {row["prompt"] for row in saerl.lab_test(config)}
    assert held_out != {row["prompt"] for row in saerl.lab_test(tiny(**{"data.test_seed": 8}))}
    seen = []
    monkeypatch.setattr(lab_world, "sft_batches", lambda rows, *_: seen.extend(rows) or [])
    monkeypatch.setattr("jaxrl_llm.train.sft.train_sft", lambda cfg, params, *_, **__: (params, None))
    saerl.pretrain(config, tmp_path / "policy", 0, False)
    assert len(seen) == 70 * 64 and not held_out & {row["prompt"] for row in seen}
    policy = LanguageModel.load(str(tmp_path / "policy"), "float32", None)
    for pool in ("mixed", "web"):
        batch, evals, _ = saerl.make_data(config, saerl.Cell(pool, 0, 0), policy)
        assert not held_out & {row["prompt"] for row in batch.rows} and len(evals["test"]) == 24


def test_a_pool_that_the_reward_cannot_judge_is_refused_first(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b", "constraints": [{"kind": "no_such_rule"}]}\n')
    config = tiny(**{"data.source": str(rows), "data.reward": "constraints", "data.evals.test.source": str(rows)})
    with pytest.raises(UserError, match="no_such_rule"):
        saerl.make_data(config, saerl.Cell("mixed", 0, 0), types.SimpleNamespace(tokenizer=None))


@pytest.mark.parametrize(
    "changes",
    [
        {"curation.band_temperature": 5.0}, {"curation.band_easy_floor": 0.5}, {"curation.band_epoch_share": 0.2},
        {"curation.band_balance": "none"},
    ],
)  # fmt: skip
def test_the_bands_settings_change_its_batches(signals, changes):
    def stream(config):
        schedule = saerl.make_arm_schedule(bench_of(config), "full", signals)
        out = []
        for step in range(6):
            out.append(tuple(schedule.batch(step)))
            schedule.observe(step, np.array(out[-1]), np.random.default_rng(step).random(8))
        return out

    assert stream(tiny(**changes)) != stream(tiny())


@pytest.mark.parametrize(
    "changes",
    [
        {"policy.clean_levels": (1.0, 0.0, 0.0, 0.0, 0.0)}, {"policy.mixed_levels": (1.0, 0.0, 0.0, 0.0, 0.0)},
        {"policy.mistakes": (1.0,) * 5}, {"policy.clean_steps": 61}, {"policy.mixed_steps": 11}, {"policy.batch": 32},
    ],
)  # fmt: skip
def test_the_pre_trainings_settings_change_its_rows(monkeypatch, tmp_path, changes):
    def rows_of(config):
        seen = []
        monkeypatch.setattr(lab_world, "sft_batches", lambda rows, *_: seen.extend(rows) or [])
        monkeypatch.setattr("jaxrl_llm.train.sft.train_sft", lambda cfg, params, *_, **__: (params, None))
        saerl.pretrain(config, tmp_path / str(len(list(tmp_path.iterdir()))), 0, False)
        return seen

    assert rows_of(tiny(**changes)) != rows_of(tiny())


def test_the_steps_settings_reach_grpo():
    """Every field of config.grpo is one of GRPOConfig's, the loss's or the optimizer's, under its own value."""
    config = tiny()
    cell, arm = saerl.Cell("mixed", 0, 3), config.arm_table.vanilla
    assert saerl.grpo_settings(config, cell, config.arm_table.vanilla_double)["steps"] == 6
    plain = saerl.grpo_settings(config, cell, arm)
    for name, value in config.grpo.items():
        if name == "prompts_per_step":
            continue
        named = {"aggregation": "dr_grpo", "advantage_scale": "none", "baseline": "leave_one_out", "rollout_mesh": "data=1", "attention": "splash"}
        other = named[name] if name in named else (not value) if isinstance(value, bool) else value + 1
        changed = tiny(**{f"grpo.{name}": other})
        found = saerl.grpo_settings(changed, cell, arm)
        assert found != plain and (name not in found or name == "steps" or found[name] == other), name


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("full", True), ("full_logprob", True), ("full_tuned", True), ("full_tfidf", True), ("full_words", False),
        ("full_oracle_filter", False), ("full_told", False),
    ],
)  # fmt: skip
def test_band_arms_filter_anew_by_the_policy_as_it_is(signals, name, asks):
    """`full` asks the probe again at every `refilter_every`-th step; arms whose quality knows no policy do not."""
    config, asked = tiny(**{"curation.refilter_every": 3}), []

    class Probe:
        def fit(self, kind, params):
            asked.append((kind, params))
            return np.random.default_rng(len(asked)).random(64)

    bench = dataclasses.replace(bench_of(config), quality_probe=lambda: Probe())
    schedule = saerl.make_arm_schedule(bench, name, signals)
    seen = []
    for step in range(7):
        schedule.see_policy(step, f"policy {step}")
        seen.append(schedule.state()["kept"])
        rows = schedule.batch(step)
        assert seen[-1][rows].all()
        schedule.observe(step, rows, np.full(len(rows), 0.5))
    kind = config.arm_table[name].filter
    assert asked == ([(kind, "policy 3"), (kind, "policy 6")] if asks else [])
    assert ((seen[2] != seen[3]).any() and (seen[3] != seen[6]).any()) == asks
