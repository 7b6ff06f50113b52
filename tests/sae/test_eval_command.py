"""`jaxrl-llm eval` on dictionaries: figures, pages, going on where it stopped, what is refused, and that every setting matters."""

import json
import shutil

import jax
import numpy as np
import pytest

import models
import sae
import sae.absorption
from jaxrl_llm import cli
from jaxrl_llm.commands import _saes
from jaxrl_llm.commands import eval as dispatch
from jaxrl_llm.commands import eval_sae as command
from jaxrl_llm.commands._saes import short_names
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.data.lab_world import build_tokenizer, vocabulary
from jaxrl_llm.data.sources import read_rows
from jaxrl_llm.data.texts import token_rows
from sae.absorption import feature_absorption

D, F = 8, 24
WORDS = [word for word in vocabulary() if word.isalpha()]


def a_model(folder, seed):
    tokenizer = build_tokenizer()
    cfg = models.ModelConfig(
        vocab_size=len(tokenizer), d_model=D, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=16, max_position=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_ids=(tokenizer.eos_token_id,), initializer_range=1.0,
    )  # fmt: skip
    models.save(folder, cfg, models.init(cfg, jax.random.key(seed)))
    tokenizer.save_pretrained(folder)


def a_dictionary(folder, seed, hook="blocks.0.resid_post", d_in=D, **fields):
    cfg = sae.SAEConfig(architecture="topk", d_in=d_in, d_sae=F, k=4, hook_name=hook, **fields)
    sae.save(folder, sae.init(cfg, jax.random.key(seed)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two random models, dictionaries, texts and labelled texts (the label is which third of the words they use)."""
    root = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("model", "other")):
        a_model(root / name, seed)
    for seed, name in enumerate(("one", "two")):
        a_dictionary(root / name / "sae", seed)
    a_dictionary(root / "bare", 3, hook=None)
    a_dictionary(root / "transcoder", 4, hook="blocks.0.resid_mid", d_out=D, hook_name_out="blocks.0.mlp_out")
    a_dictionary(root / "bare_transcoder", 4, hook="blocks.0.resid_mid", d_out=D)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 20))) for _ in range(14)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    thirds = np.array_split(np.array(WORDS), 3)
    rows = [{"text": " ".join(rng.choice(thirds[i % 3], 9)), "topic": "abc"[i % 3]} for i in range(66)]
    rows += [{"text": " ".join(rng.choice(WORDS, 9)), "topic": "rare"} for _ in range(3)]
    (root / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


SMALL = {
    "data.fields": "prompt=text", "batch_rows": 4, "context_size": 16, "bootstrap": 50, "probe.fields": "prompt=text,label=topic",
    "probe.ks": "1,3", "probe.ns": "2,500", "absorption.enabled": True, "absorption.least": 2, "absorption.max_k": 3,
}  # fmt: skip


def settings(world, **changes):
    base = {"model": world / "model", "saes": f"{world / 'one/sae'},{world / 'two/sae'}", "data.source": world / "texts.jsonl"}
    return {key: str(value) for key, value in (base | SMALL | {"probe.source": world / "labelled.jsonl"} | changes).items()}


def call(world, workdir, **changes):
    flags = [f"--config.{key}={value}" for key, value in settings(world, **changes).items()]
    return cli.main(["eval", "--config=configs/sae_eval.py", f"--workdir={workdir}", *flags])


def test_writes_every_figure_and_a_page_each_and_goes_on(world, tmp_path, capsys, monkeypatch):
    assert call(world, tmp_path) == 0
    assert "one-sae: 24 latents on blocks.0.resid_post; l0 4.000" in capsys.readouterr().out
    total = json.loads((tmp_path / "eval.json").read_text())
    assert [record["name"] for record in total["saes"]] == ["one-sae", "two-sae"]
    record = total["saes"][0]
    assert record["sae"]["hook_name"] == "blocks.0.resid_post" and record["data"]["documents"] == 14 and record["versions"]["jax"]
    d, model = sae.load(world / "one/sae"), models.load(str(world / "model"))
    rows = [build_tokenizer()(row["prompt"])["input_ids"] for row in read_rows(str(world / "texts.jsonl"), {"prompt": "text"})]
    rows = [[1, *(token for token in row if token != 1)] for row in rows]
    acts = list(sae.harvest_activations(*model, rows, "blocks.0.resid_post", context_size=16))
    expected = sae.activation_statistics(d, acts)
    figures = expected.figures() | sae.ce_recovered(d, *model, rows, context_size=16, mean_D=expected.mean_D) | sae.geometry(d)
    for name in figures.keys() - {"rows"}:
        assert record["figures"][name]["value"] == pytest.approx(figures[name], rel=1e-3, abs=1e-5), name
    assert record["figures"].keys() == figures.keys() - {"rows"} and record["data"]["tokens"] == figures["rows"]
    spread = record["figures"]["explained_variance"]
    assert spread["low"] < spread["value"] < spread["high"]
    np.testing.assert_allclose(np.load(tmp_path / "saes" / "one-sae.density.npy"), expected.density_F, rtol=1e-6)
    low, high = np.load(tmp_path / "saes" / "one-sae.density_limits.npy")
    fires = expected.density_F > 0
    assert (low[fires] <= expected.density_F[fires] + 1e-6).all() and (low[fires] < high[fires]).any() and np.isnan(low[~fires]).all()
    for name in ("dead_share", "freq_over_1_percent", "normalized_freq_over_10_percent"):
        assert record["figures"][name]["low"] <= record["figures"][name]["value"] <= record["figures"][name]["high"]
    assert sum(record["density"]["counts"]) + record["density"]["dead"] == F
    assert record["probe"]["classes"] == ["a", "b", "c"] and record["tpp"].keys() == {"2", "24", "diff_mean"}
    assert {row["method"] for row in record["probe"]["methods"]} == {"sae_top_k", "llm_top_k", "diff_mean", "dense", "majority"}
    assert 0 <= record["absorption"]["figures"]["mean_full_absorption_score"]["value"] <= 1
    for page in ("report.html", "saes/one-sae.html", "saes/two-sae.html"):
        assert (tmp_path / page).read_text().startswith("<!doctype html>")
    page = (tmp_path / "report.html").read_text()
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 0 and (tmp_path / "report.html").read_text() == page

    # A second start evaluates only what is missing, and a dictionary that has changed.
    evaluated = []
    evaluate = command.Job.evaluate
    monkeypatch.setattr(command.Job, "evaluate", lambda job, name, *how: evaluated.append(name) or evaluate(job, name, *how))
    assert call(world, tmp_path) == 0 and evaluated == []
    (tmp_path / "saes" / "two-sae.json").unlink()
    assert call(world, tmp_path) == 0 and evaluated == ["two-sae"]
    again = json.loads((tmp_path / "eval.json").read_text())
    strip = lambda records: [{key: value for key, value in r.items() if key != "seconds"} for r in records]  # noqa: E731
    assert strip(again["saes"]) == strip(total["saes"])
    assert call(world, tmp_path, seed=1) == 2
    assert "config key 'seed' is 0 there and 1 here" in capsys.readouterr().err


def test_a_changed_dictionary_is_evaluated_anew(world, tmp_path):
    shutil.copytree(world / "one", tmp_path / "one")
    how = {"saes": tmp_path / "one/sae", "probe.source": "", "absorption.enabled": False, "model_part": False, "geometry": False}
    assert call(world, tmp_path / "w", **how) == 0
    before = json.loads((tmp_path / "w" / "eval.json").read_text())["saes"][0]
    assert not {"ce_recovered", "decoder_norm"} & before["figures"].keys() and not {"probe", "tpp", "absorption"} & before.keys()
    a_dictionary(tmp_path / "one" / "sae", 7)
    assert call(world, tmp_path / "w", **how) == 0
    after = json.loads((tmp_path / "w" / "eval.json").read_text())["saes"][0]
    assert before["figures"]["mse"] != after["figures"]["mse"] and before["name"] == after["name"] == "sae"


def test_a_transcoder_is_judged_by_what_it_writes_and_probed_by_what_it_reads(world, tmp_path, capsys):
    assert call(world, tmp_path, saes=world / "transcoder") == 0
    assert "24 latents on blocks.0.resid_mid to blocks.0.mlp_out; l0 4.000" in capsys.readouterr().out
    record = json.loads((tmp_path / "eval.json").read_text())["saes"][0]
    assert record["sae"].items() >= {"hook_name": "blocks.0.resid_mid", "hook_name_out": "blocks.0.mlp_out", "d_out": D, "skip": False}.items()
    d, model = sae.load(world / "transcoder"), models.load(str(world / "model"))
    rows = token_rows([row["prompt"] for row in read_rows(str(world / "texts.jsonl"), {"prompt": "text"})], build_tokenizer())
    both = np.concatenate(list(sae.harvest_activations(*model, rows, ("blocks.0.resid_mid", "blocks.0.mlp_out"), context_size=16)))
    found = sae.activation_statistics(d, [both])
    figures = found.figures() | sae.ce_recovered(d, *model, rows, context_size=16, mean_D=found.mean_D) | sae.geometry(d)
    for name in figures.keys() - {"rows"}:
        assert record["figures"][name]["value"] == pytest.approx(figures[name], rel=1e-3, abs=1e-5), name
    assert {row["method"] for row in record["probe"]["methods"]} >= {"sae_top_k", "llm_top_k", "dense"}
    assert not {"tpp", "absorption"} & record.keys() and record["left_out"].keys() == {"tpp", "absorption"}
    page = (tmp_path / "saes" / "transcoder.html").read_text()
    assert "hook_name_out" in page and "left out: tpp" in page and "blocks.0.mlp_out" in page
    # The same latents on the same input, as an autoencoder of it: probes are of what is read.
    a_dictionary(tmp_path / "auto", 4, hook="blocks.0.resid_mid", apply_b_dec_to_input=False)
    auto = sae.load(tmp_path / "auto")
    sae.save(tmp_path / "auto", auto.replace(params=auto.params | {name: d.params[name] for name in ("W_enc", "b_enc")}))
    assert call(world, tmp_path / "w", saes=tmp_path / "auto") == 0
    other = json.loads((tmp_path / "w" / "eval.json").read_text())["saes"][0]
    assert other["probe"] == record["probe"] and other["tpp"] and "left_out" not in other


def test_special_tokens_are_left_out_as_in_training(world, tmp_path):
    rng, tokenizer = np.random.default_rng(1), build_tokenizer()
    texts = [" <eos> ".join(" ".join(rng.choice(WORDS, 4)) for _ in range(3)) for _ in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    how = {"data.source": tmp_path / "texts.jsonl", "saes": world / "one/sae", "probe.source": "", "absorption.occurrences": 3}
    records = []
    for name, changes in (("without", {}), ("with", {"drop_special": False})):
        assert call(world, tmp_path / name, **how, **changes) == 0
        records += json.loads((tmp_path / name / "eval.json").read_text())["saes"]
    without, plain = (record["data"] for record in records)
    assert without["tokens"] == plain["tokens"] - 12 and without["predictions"] == plain["predictions"]
    d, model, rows, eos = sae.load(world / "one/sae"), models.load(str(world / "model")), token_rows(texts, tokenizer), tokenizer.eos_token_id
    for record, drop in zip(records, ([eos], [])):
        found = sae.activation_statistics(d, sae.harvest_activations(*model, rows, "blocks.0.resid_post", context_size=16, drop_tokens=drop))
        kept = sae.ce_recovered(d, *model, rows, context_size=16, mean_D=found.mean_D, drop_tokens=drop)
        for name, value in (found.figures() | kept).items():
            assert name == "rows" or record["figures"][name]["value"] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert records[0]["figures"]["mse"] != records[1]["figures"]["mse"] and records[0]["figures"]["ce_sae"] != records[1]["figures"]["ce_sae"]
    assert records[0]["absorption"] == records[1]["absorption"]  # asks at places, which are of words


@pytest.mark.parametrize("kept", [1 << 20, 0])
def test_what_no_sae_changes_is_done_once_a_tap(world, tmp_path, monkeypatch, kept):
    """The harvest and the ablations; where activations are too many for memory, and weights too large, they are read anew, with one result."""
    seen = {"harvest": 0, "load": 0, "ablations": []}
    harvest, load, sums = sae.harvest_activations, sae.load, sae.splice_sums
    monkeypatch.setattr(command, "KEPT_BYTES", kept)
    monkeypatch.setattr(_saes, "HELD_BYTES", kept)
    monkeypatch.setattr(sae, "harvest_activations", lambda *a, **k: seen.update(harvest=seen["harvest"] + 1) or harvest(*a, **k))
    monkeypatch.setattr(sae, "load", lambda *a, **k: seen.update(load=seen["load"] + 1) or load(*a, **k))
    monkeypatch.setattr(sae, "splice_sums", lambda *a, **k: seen["ablations"].append(k["ablations"] is not None) or sums(*a, **k))
    saes = [world / "one/sae", world / "transcoder", world / "two/sae"]
    assert call(world, tmp_path / "w", saes=",".join(map(str, saes))) == 0
    records = json.loads((tmp_path / "w" / "eval.json").read_text())["saes"]
    assert [record["source"] for record in records] == [str(path) for path in saes]  # in the config's order, whatever was first
    # Texts, labelled texts and tokens of one tap, and texts and labelled texts of the other.
    assert seen == {"harvest": 3 + 2 if kept else 2 * 3 + 2, "load": 3 if kept else 6, "ablations": [False, False, True]}
    assert call(world, tmp_path / "alone", saes=world / "two/sae") == 0
    (alone,) = json.loads((tmp_path / "alone" / "eval.json").read_text())["saes"]
    for name, figure in alone["figures"].items():
        assert records[2]["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-5, abs=1e-6), name
    assert records[2]["probe"] == alone["probe"] and records[2]["absorption"] == alone["absorption"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "no model"),
        ({"saes": ""}, "no SAE"),
        ({"saes": "{w}/one/sae,{w}/one/sae"}, "named twice"),
        ({"data.source": ""}, "no text"),
        ({"saes": "{w}/nowhere"}, "SAE {w}/nowhere: no such folder, and not a hub id"),
        ({"saes": "{w}/model"}, "SAE {w}/model: no dictionary"),
        ({"saes": "{w}/one/sae,{w}/wide"}, "SAE {w}/wide reads 5 dimensions (d_in), but blocks.0.resid_post of {w}/model has 8"),
        ({"saes": "{w}/deep"}, "SAE {w}/deep: its hook_name is no activation of {w}/model: unknown tap 'blocks.7.resid_post'"),
        ({"saes": "{w}/probs"}, "blocks.0.attn_probs is no vector a token"),
        ({"saes": "{w}/bare"}, "SAE {w}/bare names no tap (hook_name): give the one it was trained on with --config.hook="),
        ({"saes": "{w}/bare_transcoder"}, "SAE {w}/bare_transcoder names no output tap (hook_name_out): give the one it was trained on with"),
        ({"saes": "{w}/wide_out"}, "SAE {w}/wide_out writes 5 dimensions (d_out), but blocks.0.mlp_out of {w}/model has 8"),
        ({"saes": "{w}/wide_in"}, "SAE {w}/wide_in reads 5 dimensions (d_in), but blocks.0.resid_mid of {w}/model has 8"),
        ({"saes": "{w}/deep_out"}, "SAE {w}/deep_out: its hook_name_out is no activation of {w}/model: unknown tap 'blocks.7.mlp_out'"),
        ({"probe.min_rows": 70}, "fewer than two classes with 70 texts (probe.min_rows): a (22), b (22), c (22), rare (3)"),
        ({"probe.fields": "prompt=text"}, "no field 'label'"),
        ({"context_size": 1}, "'context_size' is 1: give 2 or more"),
        ({"probe.ks": "0,1"}, "'probe.ks' is (0, 1)"),
        ({"probe.ns": ""}, "'probe.ns' is ()"),
        ({"probe.test_share": 1.0}, "probe.test_share"),
        ({"absorption.cosine": 2.0}, "absorption.cosine"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_what_does_not_fit_is_named_before_the_model_is_read(world, tmp_path, capsys, monkeypatch, changes, message):
    a_dictionary(world / "wide", 0, d_in=5)
    a_dictionary(world / "deep", 0, hook="blocks.7.resid_post")
    a_dictionary(world / "probs", 0, hook="blocks.0.attn_probs")
    for name, fields in {"wide_out": {"d_out": 5}, "wide_in": {"d_in": 5}, "deep_out": {"hook_name_out": "blocks.7.mlp_out"}}.items():
        a_dictionary(world / name, 0, **{"hook": "blocks.0.resid_mid", "hook_name_out": "blocks.0.mlp_out", "d_out": D, **fields})
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the weights were read"))
    filled = {key: value.replace("{w}", str(world)) if isinstance(value, str) else value for key, value in changes.items()}
    assert call(world, tmp_path / "w", **filled) == 2
    err = capsys.readouterr().err
    assert message.replace("{w}", str(world)) in err and err.count("\n") == 1
    assert not (tmp_path / "w").exists()


OTHER = {  # field -> another value
    "hook_out": "blocks.1.mlp_out", "drop_special": "False",
    "model": "{w}/other", "dtype": "bfloat16", "saes": "{w}/two/sae", "hook": "blocks.1.resid_post", "data.source": "{w}/labelled.jsonl",
    "data.fields": "prompt={text} . {text}", "data.separator": "--", "data.split": "test", "data.limit": "5", "data.on_bad": "skip",
    "data.template": "{prompt} {prompt}", "batch_rows": "3", "context_size": "5", "skip_first": "0", "model_part": "False", "geometry": "False",
    "bootstrap": "9", "seed": "4", "probe.source": "", "probe.fields": "prompt={text} {text},label=topic", "probe.split": "test",
    "probe.limit": "60", "probe.context_size": "4", "probe.min_rows": "2", "probe.test_share": "0.4", "probe.ks": "2", "probe.perturb": "False",
    "probe.ns": "3", "absorption.enabled": "False", "absorption.words_only": "False", "absorption.occurrences": "2", "absorption.test_share": "0.3",
    "absorption.max_k": "1", "absorption.f1_jump": "0.9", "absorption.cosine": "0.0", "absorption.full_cosine": "0.9",
    "absorption.share": "0.99", "absorption.max_absorbing": "0", "absorption.least": "3",
}  # fmt: skip


def test_no_setting_is_forgotten_here():
    """`kind` is the dispatch's, `overwrite` the run directory's."""
    assert set(OTHER) == set(field_names(load_config("configs/sae_eval.py"))) - {"kind", "overwrite"}


@pytest.fixture(scope="module")
def outcomes(world, tmp_path_factory):
    """What a run reads, harvests and tells, once for each set of changes."""
    root, known = tmp_path_factory.mktemp("outcomes"), {}

    def outcome(**changes):
        key = json.dumps(changes)
        if key in known:
            return known[key]
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            def read(source, fields, **how):
                seen.append(("read", str(source), repr(fields), repr(sorted(how.items()))))
                return read_rows(source, fields, **{**how, "split": "train", "separator": None})

            def harvest(cfg, params, rows, hook, *how, **named):
                seen.append(("harvest", hook, repr(how), repr(named)))
                return sae.harvest.harvest_activations(cfg, params, rows, hook, *how, **named)

            def absorption(d, x, letters, tokens, **named):
                seen.append(("absorption", repr(named["cfg"])))  # what its settings do: test_sae_absorption.py
                return feature_absorption(d, x, letters, tokens, **named)

            patch.setattr(command, "read_rows", read)
            patch.setattr(sae.absorption, "feature_absorption", absorption)
            patch.setattr(sae, "harvest_activations", harvest)
            base = settings(world, saes=world / "one/sae", **{"probe.perturb": True})
            config = load_config("configs/sae_eval.py", base | {k: v.replace("{w}", str(world)) for k, v in changes.items()})
            dispatch.run(config, str(root / str(len(known))))
        (record,) = json.loads((root / str(len(known)) / "eval.json").read_text())["saes"]
        known[key] = seen, {name: value for name, value in record.items() if name != "seconds"}
        return known[key]

    return outcome


@pytest.mark.parametrize("field", OTHER)
def test_every_setting_matters(world, outcomes, field):
    how = {"saes": "{w}/bare", "hook": "blocks.0.resid_post"} if field == "hook" else {}
    if field == "hook_out":
        how = {"saes": "{w}/bare_transcoder", "hook_out": "blocks.0.mlp_out"}
    if field == "absorption.words_only":
        marked = world / "marked"  # a vocabulary in which a space's mark opens words
        if not marked.exists():
            shutil.copytree(world / "model", marked)
            text = (marked / "tokenizer.json").read_text()
            for word in WORDS[: 2 * len(WORDS) // 3]:
                text = text.replace(f'"{word}":', f'"\\u2581{word}":')
            (marked / "tokenizer.json").write_text(text)
        how = {"model": "{w}/marked", "probe.source": ""}  # without its words the labelled texts are all alike
    assert outcomes(**how) != outcomes(**how | {field: OTHER[field]})


def test_names_of_files_tell_dictionaries_apart():
    assert short_names(("a/sae", "b/sae")) == ["a-sae", "b-sae"]
    assert short_names(("x/one", "x/two/")) == ["one", "two"]
    assert short_names(("org/repo/layer.3", "./k")) == ["layer.3", "k"]
    assert short_names(("a/b", "./a/b")) == ["a-b-1", "a-b-2"]


def test_the_kinds_of_the_command_line_are_those_of_the_dispatch():
    assert dict(cli.VERBS["eval"].kinds).keys() == dispatch.MODULES.keys()
    for kind, path in cli.VERBS["eval"].kinds:
        assert load_config(path).kind == kind


def test_overwriting_clears_what_the_run_made(world, tmp_path):
    how = {"probe.source": "", "absorption.enabled": False}
    assert call(world, tmp_path, **how) == 0
    assert call(world, tmp_path, **how | {"saes": world / "two/sae", "overwrite": True}) == 0
    assert {path.name for path in (tmp_path / "saes").iterdir()} == {"sae.json", "sae.html", "sae.density.npy", "sae.density_limits.npy"}


def test_on_a_real_model(assets, tmp_path):
    a_dictionary(tmp_path / "sae", 0, hook="blocks.2.resid_post", d_in=64)
    text = "Once upon a time, Lily had {} red balls. She gave one to Tom and was happy."
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"prompt": text.format(n)}) + "\n" for n in range(12)))
    flags = {"model": assets / "checkpoints" / "stories260k", "saes": tmp_path / "sae", "data.source": tmp_path / "texts.jsonl", "bootstrap": 20}
    arguments = [f"--config.{key}={value}" for key, value in flags.items()]
    assert cli.main(["eval", "--config=configs/sae_eval.py", f"--workdir={tmp_path / 'w'}", *arguments]) == 0
    figures = json.loads((tmp_path / "w" / "eval.json").read_text())["saes"][0]["figures"]
    assert figures["l0"]["value"] == 4 and figures["ce_clean"]["value"] < figures["ce_sae"]["value"] < figures["ce_zero"]["value"] + 5
