"""Every field of configs/curate.py arrives where it acts, or changes what comes out."""

import itertools
import json

import numpy as np
import pytest
import tiny_curation as tiny

import models
import sae
from jaxrl_llm.commands import curate as command
from jaxrl_llm.config import load_config
from jaxrl_llm.curation import judging, passes, pipeline
from jaxrl_llm.curation.probes import ArrayDesign
from jaxrl_llm.data.lab_world import build_tokenizer

ROWS = [
    {"id": "a", "prompt": "Tom has three red balls and buys two more balls at the shop", "answer": "5"},
    {"id": "b", "prompt": "Tom has three red balls and buys two more balls at the mall", "answer": "5"},
    {"id": "c", "prompt": "How many sides does a triangle of paper have", "answer": " "},
]


def config_of(**changes):
    return load_config("configs/curate.py", {key.replace("__", "."): value for key, value in changes.items()})


class Recorder:
    """Stands in for a function and keeps what it was called with."""

    def __init__(self, result=None):
        self.calls, self.result = [], result

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.result


@pytest.mark.parametrize(
    ("field", "argument", "value", "arrives"),
    [
        ("features.hook", "hook", "blocks.0.mlp_act", "blocks.0.mlp_act"), ("features.pooling", "pooling", "mean", "mean"),
        ("features.context", "context", "7", 7), ("features.overflow", "overflow", "truncate", "truncate"),
        ("features.batch_tokens", "batch_tokens", "99", 99), ("features.shard_rows", "shard_rows", "9", 9), ("controls", "dense", "False", ()),
    ],
)  # fmt: skip
def test_settings_of_the_features_reach_the_extraction(monkeypatch, field, argument, value, arrives):
    extraction = Recorder()
    monkeypatch.setattr(passes, "extract_features", extraction)
    monkeypatch.setattr(passes, "random_dictionary", lambda dictionary, seed: ("random", seed))
    model = passes.LanguageModel("cfg", "params", None, "model")
    for config in (config_of(), config_of(**{field: value})):
        passes.extract(model, "sae", [[1]], 1, config, None, None, None)
    (one, before), (other, after) = extraction.calls
    assert {name for name in before if before[name] != after[name]} == {argument} and after[argument] == arrives
    assert (set(one[2]), set(other[2])) == ({"sae", "random_sae"}, {"sae"} if field == "controls" else {"sae", "random_sae"})


@pytest.mark.parametrize(
    ("field", "value"), [("min_rows", 9), ("max_share", 0.25), ("remove_length", False)], ids=lambda x: str(x)
)  # fmt: skip
def test_settings_of_the_features_reach_their_space(monkeypatch, field, value):
    """What the space makes of them: test_feature_space.py."""

    class Space(Recorder):
        def fit(self, *args, **kwargs):
            self(*args, **kwargs)
            return self

        view = None

    space, dense = Space(), Recorder()
    space.view = lambda *_: space
    results = type("Results", (), {"widths": {"sae": 3, "dense_mean": 2}, "lengths": None, "blocks": lambda self, name: name})()
    monkeypatch.setattr(passes, "FeatureSpace", space)
    monkeypatch.setattr(passes, "dense_space", dense)
    for config in (config_of(), config_of(**{f"features.{field}": str(value)})):
        passes.pooled_views(results, config)
    (_, before), (_, after) = space.calls
    assert {name for name in before if before[name] != after[name]} == {field} and after[field] == value
    assert [args[2] for args, _ in dense.calls] == [True, field != "remove_length"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_sae.expansion", "5"), ("train_sae.k", "5"), ("train_sae.steps", "5"), ("train_sae.batch_size", "5"),
        ("train_sae.buffer_rows", "5"), ("features.hook", "blocks.0.mlp_act"), ("features.context", "5"), ("features.batch_tokens", "24"),
        ("seed", "5"),
    ],
)  # fmt: skip
def test_settings_of_the_sae_reach_its_training(monkeypatch, field, value):
    """The rows held out and the order of the others depend on the seed, all else on the fields of the same name."""
    sizes = {"vocab_size": 24, "d_model": 4, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 2, "d_ff": 6, "max_position": 24}
    model = passes.LanguageModel(models.ModelConfig(family="qwen3", **sizes), {}, None, "model")

    def trained(config):
        seen = []
        monkeypatch.setattr(passes, "with_bos", lambda tokenizer, texts: [[int(text)] for text in texts])
        monkeypatch.setattr(sae, "harvest_activations", lambda cfg, params, texts, *how, mesh: seen.append((list(texts), how)))
        monkeypatch.setattr(sae, "ActivationBuffer", lambda source, *how: (source(), seen.append(how)))
        monkeypatch.setattr(sae, "train_sae", lambda cfg, buffer, options, key, mesh, checkpoints: (seen.append((cfg, options, str(key))), None))
        monkeypatch.setattr(sae, "evaluate", lambda dictionary, activations: {})
        passes.train_dictionary(model, [{"prompt": str(i)} for i in range(20)], config, None)
        return seen

    other = trained(config_of(**{field: value}))
    assert trained(config_of()) == trained(config_of()) != other
    (cfg,) = [entry[0] for entry in other if isinstance(entry[0], sae.SAEConfig)]
    assert cfg.d_in == (6 if "mlp_act" in value else 4) and cfg.d_sae == cfg.d_in * (5 if field == "train_sae.expansion" else 16)


STAGES = [
    ("clusters.k", "3", {"cluster"}), ("clusters.dims", "3", {"reduce"}), ("clusters.restarts", "3", {"cluster"}),
    ("difficulty.use", "dense_max", {"difficulty"}), ("difficulty.models", "ridge", {"difficulty"}),
    ("difficulty.max_labels", "3", {"difficulty"}), ("difficulty.folds", "3", {"difficulty"}), ("difficulty.free", "active_count", {"label-free"}),
    ("quality.use", "dense_mean", {"quality"}), ("quality.samples", "3", {"copies"}), ("quality.corruptions", "garble", {"copies"}),
    ("quality.separator", "|", {"tokens", "opinions"}), ("features.batch_tokens", "99", {"opinions"}), ("features.shard_rows", "9", {"opinions"}),
    ("bootstrap", "3", {"difficulty", "quality"}), ("seed", "3", {"cluster", "reduce", "difficulty", "copies", "quality", "opinions"}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "reached"), STAGES, ids=[field for field, *_ in STAGES])
def test_settings_of_the_stages_reach_them_and_no_other(monkeypatch, field, value, reached):
    rows = [{"id": str(i), "prompt": f"{i} red balls and {i % 5} blue", "answer": str(i)} for i in range(40)]

    def seen_with(config):
        seen = {}

        def keep(name, result=None):
            return lambda *args, **named: (seen.setdefault(name, []).append(repr((args, sorted(named.items())))), result)[1]

        class View(ArrayDesign):
            def reduce(self, dims, seed):
                return keep("reduce", np.eye(40))(dims, seed)

        space = type("Space", (), {"view": lambda self, *_: View(np.eye(40))})
        clusters = pipeline.diversity.Clusters(np.arange(40) % 4, np.eye(4), 0.0)
        results = type("Results", (), {"lengths": np.arange(40), "widths": {"sae": 40}, "blocks": lambda *_: type("Blocks", (), {"blocks": None})})()
        views = passes.Views(results, {"sae": View(np.eye(40))})
        monkeypatch.setattr(pipeline.FeatureSpace, "fit", lambda *_, **__: space())
        monkeypatch.setattr(pipeline.diversity, "cluster", lambda x, *how, **named: keep("cluster", clusters)(*how, **named))
        monkeypatch.setattr(pipeline, "surprisal", lambda *_: np.arange(40))
        monkeypatch.setattr(pipeline, "active_count", lambda *_: -np.arange(40))
        skip = ("free_scores", "tick")
        fit = lambda *_, **named: keep("difficulty")({k: v for k, v in named.items() if k not in skip})  # noqa: E731
        monkeypatch.setattr(pipeline, "fit_difficulty", fit)
        pipeline.cluster_stage(views, rows, config, None, lambda: None)
        pipeline.difficulty_stage(views, rows, np.arange(40.0), config, None)
        keep("label-free")(pipeline.difficulty_stage(views, rows, None, config, None).values.tolist())

        model = passes.LanguageModel(None, {}, None, "m")
        judge = judging.Judge(model, lambda: model, None, config, None, None, passes.Stages(), True)
        monkeypatch.setattr(judging, "answer_tokens", lambda rows, tokenizer, separator: keep("tokens")(separator))
        monkeypatch.setattr(judging, "extract", keep("extract"))
        monkeypatch.setattr(judging, "opinion_columns", lambda rows, *how, progress, **named: keep("opinions")(*how, **named))
        judge.features(rows, "answers")
        judge.opinions(rows, "answers", None)
        seen.pop("extract")

        copies, sources = rows[:2], np.arange(2)
        made = lambda rows, chosen, kinds, seed: keep("copies", (copies, sources, None))(chosen.tolist(), kinds, seed)  # noqa: E731
        monkeypatch.setattr(judging, "corrupt_rows", made)
        monkeypatch.setattr(judging, "pooled_views", lambda *_: views)
        monkeypatch.setattr(judging, "fit_quality", lambda *_, free_scores, tick, **named: keep("quality")(named))
        monkeypatch.setattr(judging.Judge, "features", lambda *_: None)
        monkeypatch.setattr(judging.Judge, "designs", lambda *_: ({"sae": None}, None))
        judging.quality_stage(judge, rows, views)
        monkeypatch.undo()
        return seen

    before, again, after = seen_with(config_of()), seen_with(config_of()), seen_with(config_of(**{field: value}))
    assert before == again and {name for name in before if before[name] != after[name]} == reached


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, {"duplicate": 0, "not_read": 0, "near_duplicate": 0, "empty_answer": 1}),
        ({"quality.duplicate_threshold": "0.7"}, {"duplicate": 0, "not_read": 0, "near_duplicate": 1, "empty_answer": 1}),
        ({"quality.duplicate_threshold": "0.7", "quality.near_duplicates": "False"}, {"duplicate": 0, "not_read": 0, "empty_answer": 1}),
        ({"data.needs_answer": "False"}, {"duplicate": 0, "not_read": 0, "near_duplicate": 0}),
    ],
)
def test_settings_of_the_faults(changes, faults):
    """Two prompts share 9 of 11 runs of three words (Jaccard 0.82); one answer is blank."""
    results = type("Results", (), {"dropped": np.zeros(3, bool)})()
    found = pipeline.row_faults(ROWS, results, config_of(**changes))
    assert {name: int(hit.sum()) for name, hit in found.items()} == faults


def test_settings_of_the_schedule_change_the_order():
    rng, n = np.random.default_rng(0), 48
    rows = np.ones(n, bool), rng.integers(0, 4, n), rng.random(n), rng.normal(size=(n, 3))

    def order(**changes):
        found, report = pipeline.order_stage(*rows, config_of(**{"schedule.batch_size": "8"} | changes))
        assert sorted(found) == list(range(n))
        return found.tolist(), report["batch_size"]

    settings = ({}, {"schedule.kind": "global_sort"}, {"schedule.batch_size": "6"}, {"schedule.rho": "0.5"}, {"seed": "1"})
    found = [order(**changes) for changes in settings]
    assert all(one != other for one, other in itertools.combinations(found, 2)) and found[2][1] == 6
    assert order(**{"schedule.kind": "random_clusters", "schedule.rho": "0.5"}) != order(**{"schedule.kind": "random_clusters"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward", "exact"), ("samples", "3"), ("temperature", "0.7"), ("max_new_tokens", "9"), ("template", "Q: {prompt}"),
        ("max_prompt_tokens", "9"), ("batch_prompts", "9"), ("max_labels", "2"), ("labels", "level"), ("labels", ""), ("seed", "5"),
    ],
)  # fmt: skip
def test_settings_of_the_labels_reach_the_rollouts(monkeypatch, tmp_path, field, value):
    """Each field and no other; with labels from elsewhere nothing is rolled out."""
    rows = [{"id": str(i), "prompt": str(i), "answer": "1", "level": i} for i in range(9)]
    policy = pipeline.LanguageModel(None, {}, build_tokenizer(), "policy")

    def rolled_out(config):
        roll_out, rates = Recorder(), Recorder((np.zeros(9), 0))
        monkeypatch.setattr(pipeline, "policy_roll_out", roll_out)
        monkeypatch.setattr(pipeline, "pass_rates", rates)
        pipeline.difficulty_labels(rows, lambda: policy, config, None, None, pipeline.Stages())
        if not rates.calls:
            return None
        ((args, options),), ((rated, batches),) = roll_out.calls, rates.calls
        return options | {"reward": str(args[3]), "labels": "rollouts", "rows": rated[1].tolist(), "batch_prompts": batches["batch_prompts"]}

    base = {"difficulty.labels": "rollouts", "difficulty.max_labels": "6"}
    before = rolled_out(config_of(**base))
    after = rolled_out(config_of(**base | {field if field == "seed" else f"difficulty.{field}": value}))
    if field == "labels":
        assert after is None
        return
    different = {name for name in before if before[name] != after[name] and name != "reward"}
    assert different == {"max_labels": {"rows"}, "seed": {"rows", "seed"}, "reward": set()}.get(field, {field})
    assert ("maths" in before["reward"].lower()) and ("maths" in after["reward"].lower()) == (field != "reward")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Signals of the tiny world with settings that each show in a figure of their own."""
    world, workdir = tiny.save_world(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("curated")
    changes = {
        "data.limit": "60", "data.topic": "level", "clusters.k": "4", "clusters.dims": "5", "difficulty.models": "elastic_net,ridge",
        "difficulty.use": "length_tfidf", "difficulty.max_labels": "30", "quality.samples": "20", "quality.corruptions": "garble",
        "quality.use": "length_tfidf", "quality.drop_fraction": "0.3", "schedule.batch_size": "5", "schedule.kind": "round_robin",
        "controls": "False", "formats": "parquet", "bootstrap": "5", "data.needs_answer": "False",
    }  # fmt: skip
    command.run(tiny.config_of(world, **changes), str(workdir))
    return workdir, json.loads((workdir / "signals.json").read_text())


def test_settings_show_in_the_figures(figures):
    workdir, found = figures
    assert found["data"]["rows"] == 60 and found["diversity"]["topic"]["column"] == "level"
    assert found["diversity"]["k"] == 4 and found["diversity"]["sae"]["dims"] == 5
    assert {"sae/elastic_net", "sae/ridge"} <= set(found["difficulty"]["probes"]) and found["difficulty"]["used"].startswith("length_tfidf")
    assert found["difficulty"]["labels"]["count"] == 60 and "random_sae" not in found["diversity"]
    assert set(found["quality"]["probes"]["sae"]["by_kind"]) == {"garble"} and found["quality"]["counts"]["copies"] <= 20
    assert found["quality"]["used"] == "length_tfidf"
    sound = 60 - sum(found["data"]["faults"].values())
    assert found["filter"]["dropped"]["low_quality"] == round(0.3 * sound) and "empty_answer" not in found["data"]["faults"]
    assert found["schedule"]["kind"] == "round_robin" and found["schedule"]["batch_size"] == 5
    assert [path.name for path in (workdir / "curated").iterdir() if path.suffix == ".parquet"] and len(list((workdir / "curated").iterdir())) == 2


def test_settings_of_the_data_and_the_models_reach_what_reads_them(monkeypatch, tmp_path):
    rows, loaded = Recorder(ROWS), []

    def load(*how):
        loaded.append(how)
        raise InterruptedError

    monkeypatch.setattr(command, "read_rows", rows)
    monkeypatch.setattr(pipeline.LanguageModel, "load", load)
    given = {"data.fields": "prompt=question", "data.split": "test", "data.limit": "7", "data.on_bad": "skip", "dtype": "bfloat16"}
    with pytest.raises(InterruptedError):
        command.run(config_of(model="folder", **{"data.source": "rows.jsonl"}, **given), str(tmp_path))
    ((args, options),) = rows.calls
    assert args[0] == "rows.jsonl" and args[1]["prompt"] == "question" and options == {"split": "test", "limit": 7, "on_bad": "skip"}
    assert loaded == [("folder", "bfloat16", None)]
    with pytest.raises(InterruptedError):
        command.run(config_of(model="folder", mesh="data=1", **{"data.source": "rows.jsonl"}), str(tmp_path / "mesh"))
    assert loaded[1][:2] == ("folder", "float32") and dict(loaded[1][2].shape)["data"] == 1
