"""Curation from the command to the files, on a small world whose truth is known."""

import json
import shutil

import jax
import numpy as np
import pytest

import models
from jaxrl_llm.commands import curate as command
from jaxrl_llm.config import load_config
from jaxrl_llm.curation import pipeline
from jaxrl_llm.curation.curated_set import FORMATS, CuratedSet
from jaxrl_llm.data.lab_world import build_tokenizer, generate_problems
from jaxrl_llm.errors import UserError

N = 90


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random model and its tokenizer, and a file of problems with faults in known places."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = build_tokenizer()
    hf = dict(model_type="llama", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    hf |= dict(intermediate_size=24, max_position_embeddings=24, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    cfg = models.ModelConfig.from_hf(hf)
    models.save(folder / "model", cfg, models.init(cfg, jax.random.key(0)))
    tokenizer.save_pretrained(folder / "model")
    rows = [{k: r[k] for k in ("id", "prompt", "answer", "topic", "level")} for r in generate_problems(N, seed=0)]
    rows[5]["prompt"] = rows[4]["prompt"]
    rows[7]["answer"] = ""
    rows[9]["prompt"] = " ".join(["count red in"] + ["red blue"] * 20 + ["="])
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"id": "blank", "prompt": " "})]) + "\n")
    return folder


SMALL = {
    "data.on_bad": "skip",
    "data.topic": "topic",
    "features.min_rows": "2",
    "features.max_share": "1.0",
    "features.batch_tokens": "512",
    "features.shard_rows": "40",
    "train_sae.steps": "4",
    "train_sae.batch_size": "64",
    "train_sae.buffer_rows": "256",
    "train_sae.expansion": "3",
    "train_sae.k": "4",
    "clusters.k": "6",
    "clusters.dims": "8",
    "clusters.restarts": "1",
    "difficulty.labels": "level",
    "difficulty.models": "ridge",
    "difficulty.folds": "2",
    "quality.samples": "40",
    "schedule.batch_size": "8",
    "bootstrap": "20",
}


def config_of(world, **changes):
    overrides = {"model": str(world / "model"), "data.source": str(world / "rows.jsonl"), **SMALL, **changes}
    return load_config("configs/curate.py", overrides)


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


def test_another_config_trains_its_own_sae(world, curated, tmp_path):
    workdir, signals = curated
    shutil.copytree(workdir, tmp_path / "out")
    changes = {"overwrite": "True", "controls": "False", "train_sae.k": "3", "formats": "parquet", "quality.samples": "10"}
    command.run(config_of(world, **changes), str(tmp_path / "out"))
    again = json.loads((tmp_path / "out" / "signals.json").read_text())
    assert again["sae"]["k"] == 3 and again["sae"]["key"] != signals["sae"]["key"]


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


def test_rollout_labels(world, curated, tmp_path):
    workdir, _ = curated
    changes = {"sae": str(workdir / "sae"), "controls": "False", "formats": "parquet", "quality.samples": "10"}
    changes |= {"difficulty.labels": "rollouts", "difficulty.samples": "2", "difficulty.max_new_tokens": "2", "difficulty.reward": "exact"}
    changes |= {"difficulty.max_labels": "20", "difficulty.batch_prompts": "20", "difficulty.max_prompt_tokens": "20"}
    with pytest.raises(UserError, match="different"):  # a random model never answers right: all labels are equal
        command.run(config_of(world, **changes), str(tmp_path))
    (file,) = tmp_path.glob("pass_rates-*.jsonl")
    rates = [json.loads(line)["rate"] for line in file.read_text().splitlines()]
    assert len(rates) == 20 and set(rates) <= {0.0, None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": ""}, "no model"),
        ({"data.source": ""}, "no data"),
        ({"data.on_bad": "error"}, "rows.jsonl:91"),
    ],
)
def test_mistakes_are_named_before_any_work(world, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        command.run(config_of(world, **change), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant, label", [("gsm8k", "steps:answer"), ("math", "difficulty")])
def test_variants(variant, label):
    assert load_config(f"configs/curate.py:{variant}", {}).difficulty.labels == label
