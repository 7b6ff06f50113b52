"""Curation from the command to the files, on a small world whose truth is known."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_curation import ROLLOUTS, N, config_of, save_model, save_world
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
from jaxrl_llm.commands import curate as command
from jaxrl_llm.commands import grpo
from jaxrl_llm.config import load_config
from jaxrl_llm.curation import judging, passes, pipeline
from jaxrl_llm.curation import likelihood as policy_view
from jaxrl_llm.curation.curated_set import FORMATS, CuratedSet
from jaxrl_llm.curation.trainability import TrainabilityBand
from jaxrl_llm.data.lab_world import build_tokenizer
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random model and its tokenizer, and a file of problems with faults in known places."""
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def curated(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("curated")
    command.run(config_of(world), str(workdir))
    return workdir, json.loads((workdir / "signals.json").read_text())


def test_the_set_is_whole_and_says_what_happened(curated):
    workdir, signals = curated
    sets = [CuratedSet.read(workdir / "curated", f) for f in FORMATS]
    found = sets[0]
    assert len(found) == N and all(s.rows == found.rows and (s.order == found.order).all() for s in sets)
    assert not found.keep[[5, 7]].any() and found.keep.sum() == signals["filter"]["kept"]
    assert signals["data"]["skipped"] == {"malformed": 1, "empty prompt": 1}
    assert signals["data"]["faults"] == {"not_read": 0, "duplicate": 1, "near_duplicate": 0, "empty_answer": 1}
    assert signals["data"]["longer_than_context"]["windowed"] == 1
    dropped = signals["filter"]["dropped"]
    assert dropped["duplicate"] == 1 and dropped["empty_answer"] == 1 and dropped["low_quality"] == round(0.1 * (N - 2))
    assert found.manifest["config"]["clusters"]["k"] == 6 and len(found.manifest["data"]["hash"]) == 32
    assert np.load(workdir / "vectors.npz")["vectors"].shape[0] == N


def test_order_is_the_schedules_first_epoch(curated):
    workdir, _ = curated
    found = CuratedSet.read(workdir / "curated")
    schedule = pipeline.make_schedule(
        "published", batch_size=8, rho=0.125, difficulty=found.difficulty.astype(np.float64), cluster=found.cluster, keep=found.keep
    )
    first = [found.rows[i]["id"] for i in schedule.batch(0)]
    assert set(first) == {row["id"] for row in found.curriculum()[:8]}


def test_every_signal_stands_beside_its_baselines(curated):
    _, signals = curated
    designs = {"sae", "random_sae", "dense_mean", "dense_max", "length_tfidf"}
    free = {"surprisal", "active_count", "length"}
    assert set(signals["difficulty"]["probes"]) == {f"{d}/ridge" for d in designs | {"sae+length"}} | free
    assert set(signals["quality"]["probes"]) == designs | {"logp", "sae+logp", "answer_logp_mean"}
    assert signals["quality"]["used"] == "sae+logp"
    assert {"garble", "wrong_answer"} <= set(signals["quality"]["probes"]["sae"]["by_kind"])
    assert all("nmi" in signals["diversity"][name] for name in ("sae", "random_sae", "dense_mean", "tfidf"))
    entropy = {name: figures["cluster_entropy"]["mean"] for name, figures in signals["schedule"]["diversity"].items()}
    assert set(entropy) == {"published", "shuffled", "round_robin"} and entropy["published"] < entropy["round_robin"]
    text = "\n".join(command.summary_lines(signals))
    assert "<- used" in text and "1 duplicate" in text and "NMI" in text


def test_a_second_run_reuses_sae_and_features(world, curated, monkeypatch, capsys):
    workdir, signals = curated
    monkeypatch.setattr(pipeline, "train_dictionary", lambda *a: pytest.fail("the SAE is there already"))
    from jaxrl_llm.curation import streaming

    monkeypatch.setattr(streaming, "_run_shard", lambda *a: pytest.fail("the features are there already"))
    command.run(config_of(world), str(workdir))
    again = json.loads((workdir / "signals.json").read_text())
    assert {**again, "seconds": 0} == {**signals, "seconds": 0}
    assert "written:" in capsys.readouterr().out


def test_the_page_says_what_was_kept_and_how_far_to_trust_it(curated, tmp_path, repo, monkeypatch):
    from jaxrl_llm.cli import main
    from jaxrl_llm.report import run_report

    workdir, signals = curated
    data = run_report(workdir)
    probes = signals["difficulty"]["probes"]
    used, reference = (probes[signals["difficulty"][name]]["value"] for name in ("used", "reference"))
    assert data["headline"].startswith(f"{signals['filter']['kept']} of {N} rows are kept. Difficulty by ")
    assert f"Spearman {used:.2f}, by length + TF-IDF {reference:.2f}" in data["headline"]
    assert ("which says more" in data["headline"].partition("Quality")[0]) == (reference > used)
    kept = CuratedSet.read(workdir / "curated").keep
    assert all(np.sum(schedule["counts"]) == kept.sum() for schedule in data["schedules"])
    assert {row["name"] for row in data["signals"][-2]["rows"]} == set(probes)
    (workdir / "report.html").unlink()
    assert main(["report", f"--workdir={workdir}"]) in (None, 0)
    (tmp_path / "cut").mkdir()
    shutil.copy(workdir / "config.json", tmp_path / "cut")
    with pytest.raises(UserError, match="did not finish: the same command goes on"):
        run_report(tmp_path / "cut")

    monkeypatch.syspath_prepend(repo / "tests" / "report")
    from browser import assert_whole

    assert_whole(workdir / "report.html", tmp_path / "profile", {"map", "schedule", "stages"}, data["headline"].split(".")[0])


def test_another_config_trains_its_own_sae(world, curated, tmp_path, monkeypatch):
    """Nothing of the set before is left when its own features are asked for, which is where this run ends."""
    workdir, signals = curated
    shutil.copytree(workdir, tmp_path / "out")

    def extract(model, dictionary, *_):
        assert dictionary.cfg.k == 3 and not {"signals.json", "vectors.npz", "curated", "features"} & {p.name for p in (tmp_path / "out").iterdir()}
        raise InterruptedError

    monkeypatch.setattr(pipeline, "extract", extract)
    with pytest.raises(InterruptedError):
        command.run(config_of(world, overwrite="True", **{"train_sae.k": "3"}), str(tmp_path / "out"))
    again = json.loads((tmp_path / "out" / "sae" / "metrics.json").read_text())
    assert again["k"] == 3 and again["key"] != signals["sae"]["key"]


def test_label_free_no_controls_given_sae_and_no_answers(world, curated, tmp_path):
    workdir, _ = curated
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()[:N]]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": r["id"], "prompt": r["prompt"]}) for r in rows))
    changes = {"data.source": str(prompts), "data.topic": "", "sae": str(workdir / "sae"), "controls": "False"}
    changes |= {"difficulty.labels": "", "formats": "parquet", "difficulty.free": "active_count"}
    command.run(config_of(world, **changes), str(tmp_path / "out"))
    signals = json.loads((tmp_path / "out" / "signals.json").read_text())
    assert signals["sae"]["trained"] is False and signals["difficulty"]["used"] == "active_count"
    assert set(signals["quality"]["probes"]) == {"sae", "length_tfidf"} and signals["quality"]["used"] == "sae"
    assert "wrong_answer" not in signals["quality"]["probes"]["sae"]["by_kind"]
    assert CuratedSet.read(tmp_path / "out" / "curated").keep.sum() > 70


def test_rollout_labels(world, curated, tmp_path, capsys):
    workdir, _ = curated
    changes = {"sae": str(workdir / "sae"), "controls": "False", "formats": "parquet", "quality.samples": "10"}
    changes |= {"difficulty.labels": "rollouts", "difficulty.samples": "2", "difficulty.max_new_tokens": "2", "difficulty.reward": "exact"}
    changes |= {"difficulty.max_labels": "90", "difficulty.batch_prompts": "20", "difficulty.max_prompt_tokens": "20"}
    with pytest.raises(UserError, match="different"):  # a random model never answers right: all labels are equal
        command.run(config_of(world, **changes), str(tmp_path))
    assert "rollouts: 1 of 90 prompts are longer than difficulty.max_prompt_tokens=20" in capsys.readouterr().out
    (file,) = tmp_path.glob("pass_rates-*.jsonl")
    rates = [json.loads(line)["rate"] for line in file.read_text().splitlines()]
    assert len(rates) == 90 and set(rates) <= {0.0, None}


def test_another_model_as_policy_reads_with_its_own_tokenizer(world, curated, tmp_path, monkeypatch):
    """Its likelihoods and rollouts are used; features stay those of the feature model."""
    workdir, before = curated
    words = sorted(build_tokenizer().get_vocab())
    core = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate([*words, "<more>"])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    save_model(tmp_path / "policy", seed=5, d_model=8, layers=1, tokenizer=own)
    generated, scored = [], []

    def generate(cfg, params, prompts, **options):
        generated.append((cfg, prompts))
        return sampled(cfg, params, prompts, **options)

    def answer_likelihood(cfg, params, tokens_of, n, **options):
        scored.append((cfg, tokens_of(0, 1)[0][0]))
        return likelihood(cfg, params, tokens_of, n, **options)

    sampled, likelihood = models.generate, policy_view.answer_likelihood
    monkeypatch.setattr(models, "generate", generate)
    monkeypatch.setattr(policy_view, "answer_likelihood", answer_likelihood)
    changes = {"sae": str(workdir / "sae"), "controls": "False", "formats": "parquet", "quality.samples": "10", "data.on_bad": "skip"}
    command.run(config_of(world, policy=str(tmp_path / "policy"), **changes, **ROLLOUTS), str(tmp_path / "out"))

    row = json.loads((world / "rows.jsonl").read_text().splitlines()[0])
    assert {cfg for cfg, _ in (*generated, *scored)} == {models.load(tmp_path / "policy")[0]} and len(generated) == 3
    assert scored[0][1] == [own.bos_token_id, *own(f"{row['prompt']} {row['answer']}")["input_ids"]]
    known = {tuple(own(line["prompt"])["input_ids"]) for line in map(json.loads, (world / "rows.jsonl").read_text().splitlines()[:N])}
    assert all(tuple(prompt) in known or len(prompt) == 16 for _, prompts in generated for prompt in prompts)
    signals = json.loads((tmp_path / "out" / "signals.json").read_text())
    (rates,) = (tmp_path / "out").glob("pass_rates-*.jsonl")
    assert len({json.loads(line)["rate"] for line in rates.read_text().splitlines()}) > 1
    assert signals["features"] == before["features"] and signals["difficulty"]["labels"]["count"] == 40
    assert signals["quality"]["probes"]["logp"]["value"] != before["quality"]["probes"]["logp"]["value"]


@pytest.fixture(scope="module")
def told(world, curated, tmp_path_factory):
    """(the file of problems with a column that says of 64 of them whether their answer is right, the workdir of a curate run on it)."""
    folder = tmp_path_factory.mktemp("told")
    rows, rng = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()[:N]], np.random.default_rng(0)
    for i, wrong in enumerate(rng.random(N) < 0.4):
        if wrong and rows[i]["answer"]:
            rows[i]["answer"] = rows[(i + 11) % N]["answer"] or "red"
        if i < 64:
            rows[i]["sound"] = int(not wrong)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command.run(told_config(world, curated, folder / "rows.jsonl"), str(folder / "out"))
    return folder / "rows.jsonl", folder / "out"


def told_config(world, curated, source, **changes):
    given = {"data.source": str(source), "sae": str(curated[0] / "sae"), "controls": "False", "formats": "parquet", "quality.labels": "sound"}
    return config_of(world, **given, **changes)


def test_told_rows_say_how_many_to_drop_and_let_the_policy_be_tuned(world, curated, told, tmp_path, monkeypatch):
    source, workdir = told
    signals, found = json.loads((workdir / "signals.json").read_text()), CuratedSet.read(workdir / "curated")
    assert set(signals["quality"]["probes"]) == {"sae", "length_tfidf", "logp", "tuned", "sae+logp", "sae+tuned"}
    assert signals["quality"]["used"] == "sae+tuned" == found.manifest["quality"]["used"] and signals["quality"]["measure"] == "auroc"
    sound = [row["sound"] for row in found.rows if row.get("sound") is not None]
    bad = 1 - np.mean(sound)
    assert len(sound) == 64 and signals["filter"]["drop_share"] == pytest.approx(min(1.5 * bad, 0.6))
    fit = N - 2  # a duplicate and an empty answer go before
    assert signals["filter"]["dropped"]["low_quality"] == round(min(1.5 * bad, 0.6) * fit)

    stage, given = pipeline.filter_stage, []
    monkeypatch.setattr(pipeline, "filter_stage", lambda *args: given.append(args[:-1]) or stage(*args))
    untuned = told_config(world, curated, source, **{"quality.tuned": "False", "quality.drop_per_bad": "1.0"})
    command.run(untuned, str(tmp_path))
    plain, set_of = json.loads((tmp_path / "signals.json").read_text()), CuratedSet.read(tmp_path / "curated")
    assert plain["quality"]["used"] == "sae+logp" and "tuned" not in plain["quality"]["probes"]
    assert plain["filter"]["dropped"]["low_quality"] == round(bad * fit)
    (judged,) = given  # by which other settings keep other rows

    def kept(**changes):
        config = told_config(world, curated, source, **{f"quality.{name}": value for name, value in changes.items()})
        filtered, _, share = stage(*judged, config)
        return filtered, share

    assert (kept(drop_per_bad="1.0")[0].keep == set_of.keep).all()
    assert kept(drop_most="0.2")[1] == 0.2
    whole, share = kept(drop_per_bad="0", drop_fraction="0.3", strata="0")
    assert share == 0.3 and whole.cut is not None and plain["filter"]["cut"] is None
    assert set_of.quality[whole.keep].min() >= whole.cut - 1e-6, "without strata the cut is one for all"
    inside = kept(drop_per_bad="0", drop_fraction="0.3", strata="2")[0].keep
    assert inside.sum() == whole.keep.sum() and (inside != whole.keep).any()


def test_grpo_judges_the_rows_anew_as_curate_did(world, curated, told, tmp_path, monkeypatch):
    """By the policy that curate asked, the same rows are kept; by one that has learnt, others; rows with a fault never come back."""
    source, workdir = told
    found, asked = CuratedSet.read(workdir / "curated"), []
    settings = {"model": str(world / "model"), "data.curated": str(workdir), "reward.name": "short_words", "max_prompt_tokens": "16"}
    settings |= {"overflow": "drop", "schedule.kind": "band", "schedule.batch_prompts": "4", "train.steps": "5", "train.num_samples": "4"}
    settings |= {"train.max_new_tokens": "3", "train.checkpoint_every": "1", "train.optimizer.learning_rate": "3e-2"}
    settings |= {"schedule.band.refilter_every": "2", "schedule.band.epoch_share": "1.0"}
    config = load_config("configs/grpo.py", settings)
    judged = judging.Refilter.__call__
    monkeypatch.setattr(judging.Refilter, "__call__", lambda self, params: asked.append((self, judged(self, params))) or asked[-1][1])
    grpo.run(config, str(tmp_path / "run"))
    assert len(asked) == 2
    refilter, faulty = asked[0][0], np.zeros(N, bool)
    again = judged(refilter, models.load(world / "model")[1])
    faulty[[5, 7]] = True
    assert (again == found.keep).all() and (refilter.faulty == faulty).all()
    later = [keep for _, keep in asked]
    assert all(keep.sum() == found.keep.sum() and not keep[faulty].any() for keep in later) and any((keep != found.keep).any() for keep in later)
    rows, _ = grpo._training_rows(config)
    drawn = {rows[i]["id"] for record in RunDir(tmp_path / "run", config, kind="grpo").metrics() for i in record["rows"]}
    assert drawn <= {row["id"] for row, bad in zip(found.rows, faulty, strict=True) if not bad} and len(rows) == N - 2

    for changes, message in (
        ({"data.limit": "5"}, "data.limit.*no meaning with schedule.band.refilter_every"),
        ({"data.curated": str(curated[0])}, "refilter_every.*does not say which rows are sound.*quality.labels"),
        ({"schedule.band.balance": "even"}, "balance is one of"),
    ):
        with pytest.raises(UserError, match=message):
            grpo.run(load_config("configs/grpo.py", {**settings, **changes}), str(tmp_path / "refused"))
    with pytest.raises(UserError, match="asks no policy.*quality.use=auto"):
        dataclasses.replace(refilter, used="length_tfidf")


def test_grpo_follows_the_policy_over_a_curated_set_and_goes_on(world, curated, tmp_path, monkeypatch):
    workdir, _ = curated
    settings = {"model": str(world / "model"), "data.curated": str(workdir), "reward.name": "short_words", "max_prompt_tokens": "16"}
    settings |= {"overflow": "drop", "schedule.kind": "band", "schedule.batch_prompts": "4", "train.steps": "4", "train.num_samples": "4"}
    settings |= {"train.max_new_tokens": "3", "train.checkpoint_every": "1", "train.optimizer.learning_rate": "1e-3"}
    config = load_config("configs/grpo.py", settings)
    drawn = lambda name: [record["rows"] for record in RunDir(tmp_path / name, config, kind="grpo").metrics()]  # noqa: E731
    final = lambda name: jax.tree.leaves(models.load(tmp_path / name / grpo.FOLDER)[1])  # noqa: E731
    grpo.run(config, str(tmp_path / "whole"))

    log = RunDir.log

    def full_at_step_3(self, record):
        if record["step"] == 3:
            raise UserError("the disk is full")
        log(self, record)

    monkeypatch.setattr(RunDir, "log", full_at_step_3)
    with pytest.raises(UserError, match="disk is full"):
        grpo.run(config, str(tmp_path / "stopped"))
    monkeypatch.setattr(RunDir, "log", log)
    restored, restore = [], TrainabilityBand.restore
    monkeypatch.setattr(TrainabilityBand, "restore", lambda self, state: restored.append(int(state["step"])) or restore(self, state))
    grpo.run(config, str(tmp_path / "stopped"))
    assert restored == [2] and drawn("stopped") == drawn("whole")
    assert all((a == b).all() for a, b in zip(final("stopped"), final("whole"), strict=True))

    found = CuratedSet.read(workdir / "curated")
    kept = [row["id"] for row in found.curriculum() if len(build_tokenizer()(row["prompt"])["input_ids"]) <= 16]
    vectors = np.load(workdir / "vectors.npz")
    at = [vectors["ids"].tolist().index(name) for name in kept]
    band = TrainabilityBand(
        1 - found.difficulty[at], vectors["vectors"][at], 4, cluster=found.cluster[at], samples_per_prompt=4,
        temperature=0.5, easy_floor=0.125, epoch_share=0.3,
    )  # fmt: skip
    assert drawn("whole")[0] == band.batch(0).tolist()


def test_pass_rates_of_other_rows_are_not_taken(world, tmp_path, monkeypatch):
    """Rows of another file often have the same ids."""
    policy, paths = pipeline.LanguageModel(None, {}, build_tokenizer(), "policy"), []
    monkeypatch.setattr(pipeline, "pass_rates", lambda rows, *_, path, **__: paths.append(path) or (np.zeros(len(rows)), 0))
    for prompt in ("one", "one", "another"):
        rows = [{"id": "0", "prompt": prompt, "answer": "1"}]
        pipeline.difficulty_labels(rows, lambda: policy, config_of(world, **ROLLOUTS), None, tmp_path, pipeline.Stages())
    assert paths[0] == paths[1] != paths[2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": ""}, "no model"),
        ({"data.source": ""}, "no data"),
        ({"data.on_bad": "error"}, "rows.jsonl:91"),
        ({"formats": "parket"}, "formats.*did you mean parquet"),
        ({"formats": ()}, "formats.*empty"),
        ({"schedule.kind": "publishd"}, "schedule.kind.*did you mean published"),
        ({"difficulty.use": "sea"}, "difficulty.use.*'sea'"),
        ({"difficulty.free": "suprisal"}, "difficulty.free.*surprisal"),
        ({"difficulty.labels": "lvel"}, "'lvel'.*did you mean level"),
        ({"difficulty.labels": "rollouts", "difficulty.reward": "mats"}, "mats.*maths"),
        ({"quality.labels": "goood"}, "'goood'"),
        ({"quality.use": "sae+tuned"}, "quality.use.*quality.labels"),
        ({"quality.use": "random_sae", "controls": "False"}, "quality.use.*controls=True"),
        ({"quality.corruptions": "garbl"}, "did you mean garble"),
        ({"data.topic": "topik"}, "data.topic.*did you mean topic"),
        ({"features.pooling": "maximum"}, "features.pooling"),
        ({"features.shard_rows": "0"}, "features.shard_rows' is 0: give 1 or more"),
        ({"quality.drop_fraction": "1.0"}, "quality.drop_fraction"),
        ({"difficulty.batch_prompts": "0"}, "difficulty.batch_prompts"),
        ({"bootstrap": "-1"}, "bootstrap"),
        ({"seed": "-1"}, "'seed' is -1"),
        ({"features.context": "1"}, "features.context' is 1: give 2 or more, or 0"),
        ({"difficulty.models": ()}, "difficulty.models.*empty"),
        ({"data.fields": "cluster=topic,input_cluster=level", "data.topic": ""}, "both 'input_cluster' and 'cluster'"),
        ({"train_sae.buffer_rows": "127"}, "train_sae.buffer_rows' is 127: give 128 or more"),
        ({"data.limit": "0"}, "data.limit"),
    ],
)
def test_mistakes_are_named_before_any_work(world, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        command.run(config_of(world, **change), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["difficulty", "quality"])
def test_labels_that_do_not_differ_are_told_before_any_work(world, key):
    rows = [{"id": str(i), "prompt": "p", "level": 3} for i in range(4)]
    with pytest.raises(UserError, match=f"{key}.labels' is 'level'.*the same, 3:"):
        command.check_rows(rows, config_of(world, **{"difficulty.labels": "", "data.topic": "", f"{key}.labels": "level"}))
    command.check_rows([*rows, {"level": 4}], config_of(world, **{"difficulty.labels": "", "data.topic": "", f"{key}.labels": "level"}))


def test_a_prompt_longer_than_the_context_is_named_with_its_line_before_training(world, tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:10: the prompt has \d+ tokens, more than the context of 24: .*features.overflow"):
        command.run(config_of(world, **{"features.overflow": "error"}), str(tmp_path))
    assert not (tmp_path / "sae").exists() and not any((tmp_path / "checkpoints").iterdir())


def test_the_summary_where_a_figure_has_no_value(curated):
    """No resamples, no interval; activations that are all equal have no variance to explain; one topic has nothing to tell of."""
    signals = json.loads(json.dumps(curated[1]))
    signals["sae"]["explained_variance"] = None
    for figures in [*signals["difficulty"]["probes"].values(), *signals["quality"]["probes"].values()]:
        figures |= {"low": None, "high": None}
    for figures in signals["diversity"].values():
        if isinstance(figures, dict):
            figures.pop("nmi", None)
    text = "\n".join(command.summary_lines(signals))
    assert "explained variance none" in text and "no NMI" in text and "<- used" in text and "nan" not in text.lower().replace("none", "")


def test_a_topic_of_one_value_has_no_nmi(world):
    vectors = np.random.default_rng(0).normal(size=(20, 4))
    view = type("View", (), {"reduce": lambda self, *_, **__: vectors})()
    views = passes.Views(type("Results", (), {"lengths": np.arange(1, 21)})(), {"sae": view})
    for topics, there in ((1, False), (2, True)):
        rows = [{"prompt": f"red ball {i}", "topic": i % topics} for i in range(20)]
        _, _, report = pipeline.cluster_stage(views, rows, config_of(world, **{"clusters.k": "3"}), None, lambda: None)
        assert ("nmi" in report["sae"]) == there and report["topic"]["different"] == topics


@pytest.mark.parametrize("variant, label", [("gsm8k", "steps:answer"), ("math", "difficulty")])
def test_variants(variant, label):
    assert load_config(f"configs/curate.py:{variant}", {}).difficulty.labels == label


@pytest.mark.parametrize(
    ("variant", "checkpoint", "source"),
    [("gsm8k", "stories260k", "gsm8k/train.jsonl"), ("math", "babyllama-0.9m", "math_train/train_math.json")],
)
def test_real_problems_with_a_real_model(assets, tmp_path, variant, checkpoint, source):
    """The first 150 rows of the real files: long rows are read in pieces, every figure stands beside its baselines, the set is whole."""
    small = {
        "data.limit": 150, "train_sae.steps": 20, "train_sae.batch_size": 256, "train_sae.buffer_rows": 2048, "clusters.k": 6, "clusters.dims": 16,
        "quality.samples": 40, "difficulty.models": ("ridge",), "bootstrap": 20, "schedule.batch_size": 16, "features.batch_tokens": 2048,
    }  # fmt: skip
    given = {"model": str(assets / "checkpoints" / checkpoint), "data.source": str(assets / "data" / source)}
    command.run(load_config(f"configs/curate.py:{variant}", {**given, **{key: str(value) for key, value in small.items()}}), str(tmp_path))
    signals, found = json.loads((tmp_path / "signals.json").read_text()), CuratedSet.read(tmp_path / "curated")
    assert len(found) == 150 and 120 <= found.keep.sum() <= 135
    probes = signals["difficulty"]["probes"]
    assert {"sae/ridge", "sae+length/ridge", "length_tfidf/ridge", "dense_mean/ridge", "random_sae/ridge", "length"} <= set(probes)
    assert all(np.isfinite(probe["value"]) for probe in probes.values())
    tokenizer, context = models.load_tokenizer(given["model"]), 512 if checkpoint == "stories260k" else 256
    lengths = [len(tokenizer(row["prompt"], add_special_tokens=False).input_ids) + 1 for row in found.rows]
    assert signals["data"]["longer_than_context"]["windowed"] == sum(length > context for length in lengths)
    if variant == "math":
        assert signals["diversity"]["topic"]["column"] == "type"
