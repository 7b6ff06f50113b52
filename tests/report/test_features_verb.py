"""`jaxrl-llm features`: from a text file, a model and a dictionary to the page, with labels added later, each field at work."""

import json

import jax
import pytest

import models
import sae
from jaxrl_llm.commands import features
from jaxrl_llm.commands._saes import check_saes
from jaxrl_llm.commands._steer import edits_of
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.curation import features as curation_features
from jaxrl_llm.data.lab_world import build_tokenizer, generate_problems
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals import feature_labels
from models.hf import read_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = {"top": "3", "sampled": "3", "random": "9", "features": "12", "batch_rows": "8", "before": "4", "after": "3", "context_size": "24"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("world"), build_tokenizer()
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
        tie_embeddings=True, max_position=48, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    for name, seed in (("model", 0), ("other", 1)):
        models.save(folder / name, cfg, models.init(cfg, jax.random.key(seed)), tokenizer_from=tokenizer)
    d = sae.init(sae.SAEConfig("topk", 16, 24, 3, hook_name="blocks.0.resid_post"), jax.random.key(2))
    sae.save(folder / "sae", d)
    sae.save(folder / "sae2", d.replace(params=jax.tree.map(lambda a: -a, d.params)))
    sae.save(folder / "homeless", d.replace(cfg=d.cfg.replace(hook_name=None)))
    rows = [json.dumps({"prompt": r["prompt"], "hint": r["topic"] + " " + r["prompt"][:9]}) for r in generate_problems(40, seed=0)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "bad.jsonl").write_text("\n".join([*rows[:20], "{"]))
    (folder / "texts.txt").write_text("\n--\n".join(json.loads(row)["prompt"] + "\n\n1" for row in rows))
    return folder


def config_of(world, **changes):
    paths = {"model": "model", "sae": "sae", "data.source": "rows.jsonl"} | {k: changes[k] for k in ("model", "sae", "data.source") if k in changes}
    located = {key: str(world / value) if value else value for key, value in paths.items()}
    return load_config("configs/features.py", SMALL | changes | located)


def made(world, folder, **changes):
    """The data of a run, or its message."""
    try:
        features.run(config_of(world, **changes), str(folder))
    except UserError as error:
        return str(error)
    return json.loads((folder / "features.json").read_text())


def test_makes_the_page_and_labels_it_later(world, tmp_path, capsys, label_server):
    data = made(world, tmp_path)
    assert data["title"] == f"Features of {world.name}/sae" and data["model"] == "model" and len(data["features"]) <= 12 and data["tokens"] > 100
    page, summary = (tmp_path / "features.html").read_text(), json.loads((tmp_path / "summary.json").read_text())
    assert data["title"] in page and summary["labelled"] == 0 and summary["mean_score"] is None
    assert "open it in a browser" in capsys.readouterr().out
    text = "".join(data["vocabulary"][str(t)] for t in data["features"][0]["contexts"][0]["tokens"])
    sources = [json.loads(line)["prompt"] for line in (world / "rows.jsonl").read_text().splitlines()]
    assert any(text.removeprefix(data["vocabulary"].get("1", "")).strip() in source for source in sources)
    before = (tmp_path / "features.json").read_bytes()
    label_server.script = ['{"label": "sums"}', '{"matches": [1]}', *[500] * 20]
    labels = {"labels.url": label_server.url, "labels.model": "m", "labels.workers": "1", "labels.retries": "0"}
    message = made(world, tmp_path, **labels)
    assert "the labels so far are saved" in message
    records = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [r["label"] for r in records] == ["sums"] and records[0]["by"] == "m"
    assert '"sums"' in (tmp_path / "features.html").read_text()  # an outage leaves a page with what there is
    with open(tmp_path / "labels.jsonl", "a") as file:
        file.write('{"id": 3, "lab')  # as a kill would leave it
    label_server.script, label_server.answer = [], lambda body: '{"label": "more"}' if "Description" not in str(body) else '{"matches": [1, 2]}'
    assert made(world, tmp_path, **labels)["features"]
    records = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [r["label"] for r in records] == ["sums"] + ["more"] * (len(data["features"]) - 1)
    assert (tmp_path / "features.json").read_bytes() == before
    made(world, tmp_path, **labels | {"labels.model": "n"})  # another model's labels take their place
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["labelled"] == len(data["features"]) and '"sums"' not in (tmp_path / "features.html").read_text()


@pytest.fixture
def label_server():
    from importlib import util
    from pathlib import Path

    spec = util.spec_from_file_location("label_server", Path(__file__).parent.parent / "evals" / "label_server.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fake = module.FakeServer()
    yield fake
    fake.close()


# Field -> (what the run is otherwise, another value); of labels below.
OTHER = {
    "model": ({}, "other"), "dtype": ({}, "bfloat16"), "sae": ({}, "sae2"),
    "hook": ({"sae": "homeless", "hook": "blocks.0.resid_pre"}, "blocks.0.mlp_out"),
    "data.source": ({}, "texts.txt"), "data.fields": ({}, "prompt=hint"), "data.separator": ({"data.source": "texts.txt"}, "--"),
    "data.limit": ({}, "9"), "data.on_bad": ({"data.source": "bad.jsonl"}, "skip"), "data.template": ({}, "{prompt} {hint}"),
    "features": ({}, "5"), "ids": ({}, "3,5"), "top": ({}, "2"), "sampled": ({}, "1"), "random": ({}, "2"), "before": ({}, "1"), "after": ({}, "0"),
    "related": ({}, "2"), "context_size": ({}, "6"), "skip_first": ({}, "0"),
    "drop_special": ({"data.template": "{prompt} <eos> 1 plus"}, "False"), "seed": ({"features": "5"}, "3"),
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER)
def test_another_value_of_a_field_changes_the_data(world, tmp_path, field):
    base, value = OTHER[field]
    assert made(world, tmp_path / "one", **base) != made(world, tmp_path / "other", **base | {field: value})


def test_no_field_is_left_out():
    known = {name for name in field_names(load_config("configs/features.py")) if not name.startswith("labels.")}
    assert known - set(OTHER) == {"overwrite", "batch_rows", "data.split"}  # batch_rows changes nothing, data.split is read_rows's own


def test_the_other_fields_reach_what_they_are_for(world, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(features, "read_rows", lambda *_, **how: seen.update(how) or [{"prompt": "1 plus 2"}] * 3)
    from sae import feature_data

    collect = feature_data.collect
    monkeypatch.setattr(feature_data, "collect", lambda *args, **how: seen.update(rows=args[4].batch_rows) or collect(*args, **how))
    made(world, tmp_path, **{"data.split": "test", "batch_rows": "5"})
    assert (seen["split"], seen["rows"]) == ("test", 5)
    fields = {"url": "http://h/v1", "model": "m", "key_variable": "", "timeout": 3.0, "retries": 5, "workers": 2, "max_tokens": 9}
    config = config_of(world, seed="4", **{f"labels.{key}": str(value) for key, value in fields.items()})
    assert features.check(config) == feature_labels.LabelConfig(seed=4, **fields)
    assert {f"labels.{key}" for key in fields} == {name for name in field_names(config) if name.startswith("labels.")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "--config.model="),
        ({"sae": ""}, "the folder of a dictionary with --config.sae="),
        ({"data.source": ""}, "--config.data.source="),
        ({"top": "0"}, "'top' is 0"),
        ({"related": "-1"}, "'related' is -1"),
        ({"labels.timeout": "0"}, "'labels.timeout' is 0"),
        ({"labels.model": "m"}, "'labels.url' is empty"),
        ({"labels.url": "localhost", "labels.model": "m"}, "the url is 'localhost'"),
        ({"labels.url": "http://h", "labels.key_variable": "NO_SUCH_KEY", "labels.model": "m"}, "NO_SUCH_KEY"),
        ({"labels.url": "http://127.0.0.1:9", "labels.model": "m", "random": "0"}, "'random' is 0"),
        ({"ids": "24"}, "no latent 24"),
        ({"sae": "homeless"}, "does not record the tap"),
    ],
)
def test_mistakes_name_the_field(world, tmp_path, changes, message):
    with pytest.raises((UserError, sae.SAEError), match=message):
        features.run(config_of(world, **changes), str(tmp_path / "run"))


def test_tokens_keep_their_spaces(assets):
    tokenizer = models.load_tokenizer(assets / "checkpoints" / "stories260k")
    ids = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    texts = features.token_texts(tokenizer, ids)
    assert "".join(texts[str(t)] for t in ids).strip() == "Once upon a time"


def test_a_dictionary_is_named_by_its_folder(tmp_path, monkeypatch):
    """And by its run where train_sae named it."""
    monkeypatch.chdir(tmp_path)
    for source, name in (("runs/a/sae", "a/sae"), ("runs/a/sae/k16", "k16"), ("owner/layers.3", "layers.3"), (".", tmp_path.name)):
        assert features.told_name(source) == name


@pytest.mark.parametrize("verb", ["features", "eval", "generate"])
def test_a_dictionary_of_another_model_is_told_of(world, capsys, monkeypatch, verb):
    """Of equal width, no shape tells."""
    d, folder, model = sae.load(world / "sae"), world / "foreign", str(world / "model")
    cfg = read_config(world / "model")

    def asked(trained_on):
        sae.save(folder, d.replace(cfg=d.cfg.replace(model_name=trained_on)))
        curation_features._tell_transfer.cache_clear()
        if verb == "features":
            features._gather(config_of(world, sae="foreign"))
        elif verb == "eval":
            check_saes(load_config("configs/sae_eval.py", {"model": model, "saes": str(folder)}), cfg)
        else:
            edits_of(load_config("configs/generate.py", {"steer.sae": str(folder), "steer.features": "3=ablate"}).steer, cfg, model)
        return capsys.readouterr().err

    monkeypatch.setattr("sae.feature_data.collect", lambda *_, **__: {"features": [], "random": []})
    assert f"warning: the SAE was trained on org/elsewhere, the model here is {model}" in asked("org/elsewhere")
    assert "warning" not in asked(model) and "warning" not in asked(None)
