"""`jaxrl-llm generate`: samples in a run directory, going on after a stop, and rows spread over a mesh."""

import json

import datasets
import jax
import pytest

import models
import sae
from jaxrl_llm.commands import generate
from jaxrl_llm.commands._steer import parse_features
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.data.lab_world import build_tokenizer, generate_problems
from jaxrl_llm.errors import UserError
from models.lora import LoraConfig, init_lora, save_lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two random models, their tokenizer, rows.jsonl, bad.jsonl and a data set of two splits."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), build_tokenizer()
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
        tie_embeddings=True, max_position=48, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
    )  # fmt: skip
    for name, seed in (("model", 0), ("other", 1)):
        models.save(folder / name, cfg, models.init(cfg, jax.random.key(seed)), tokenizer_from=tokenizer)
    lora = LoraConfig(rank=2)
    adapter = jax.tree.map(lambda x: x + 0.3, init_lora(cfg, lora, jax.random.key(3)))
    save_lora(folder / "adapter", cfg, adapter, lora)
    for name, hook in (("sae", "blocks.0.resid_pre"), ("sae2", "blocks.0.resid_post")):
        d = sae.init(sae.SAEConfig("topk", 16, 24, 3, hook_name=hook), jax.random.key(2))
        sae.save(folder / name, d)
    sae.save(folder / "homeless", d.replace(cfg=d.cfg.replace(hook_name=None)))
    over = {"hook_name": "blocks.0.mlp_in", "hook_name_out": "blocks.0.mlp_out"}
    for name, fields in (("over", over), ("nowhere", over | {"hook_name_out": None}), ("wide", over | {"hook_name_out": "blocks.0.mlp_act"})):
        sae.save(folder / name, sae.init(sae.SAEConfig("topk", 16, 24, 3, d_out=16, **fields), jax.random.key(3)))
    problems = generate_problems(14, seed=0)
    rows = [json.dumps({"id": r["id"], "prompt": r["prompt"], "hint": r["topic"]}) for r in problems]
    (folder / "rows.jsonl").write_text("\n".join(rows[:10]))
    (folder / "bad.jsonl").write_text("\n".join([*rows[:2], "{", *rows[2:4]]))
    splits = {name: datasets.Dataset.from_list(list(map(json.loads, part))) for name, part in (("train", rows[:4]), ("test", rows[10:]))}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    return folder


def config_of(world, **changes):
    fields = {"model": str(world / "model"), "data.source": str(world / "rows.jsonl"), "num_samples": "2", "max_new_tokens": "3"}
    return load_config("configs/generate.py", fields | changes)


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_every_prompt_and_goes_on_after_a_stop(world, tmp_path, capsys):
    config = config_of(world, batch_prompts="5")
    generate.run(config, str(tmp_path))
    whole = samples(tmp_path)
    assert len(whole) == 20 and {s["sample"] for s in whole} == {0, 1} and len({s["id"] for s in whole}) == 10
    assert "20 samples of 10 prompts" in capsys.readouterr().out
    for written in (10, 3, 13):  # between batches, and inside a batch and between the samples of a prompt
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in whole[:written]))
        generate.run(config, str(tmp_path))
        assert samples(tmp_path) == whole
    generate.run(config_of(world, **{"data.source": "", "prompt": "1 plus 1 ="}))
    assert "=== prompt, sample 2" in capsys.readouterr().out


# Every field beside mesh, overwrite, model and data.source: (what the run is otherwise, another value of the field).
LONG = {"max_prompt_tokens": "4", "overflow": "truncate"}
STEER = {"steer.sae": "sae", "steer.features": "3=add:9"}
FIELDS = {
    "model": ({}, "other"), "adapter": ({}, "adapter"), "dtype": ({}, "bfloat16"),
    "prompt": ({"data.source": "", "prompt": "1 plus 1 ="}, "1 plus 2 ="),
    "data.source": ({}, "splits"), "data.fields": ({}, "prompt=hint"), "data.split": ({"data.source": "splits"}, "test"),
    "data.limit": ({}, "3"), "data.on_bad": ({"data.source": "bad.jsonl"}, "skip"), "template": ({}, "{prompt} {hint}"),
    "max_prompt_tokens": (LONG, "6"), "overflow": (LONG, "error"), "num_samples": ({}, "3"), "max_new_tokens": ({}, "5"),
    "temperature": ({}, "0.3"), "top_k": ({}, "1"), "top_p": ({}, "0.01"), "stop_strings": ({"max_new_tokens": "8"}, "'t','c','1'"),
    "batch_prompts": ({}, "3"), "seed": ({}, "7"), "steer.sae": (STEER, "sae2"), "steer.features": (STEER, "3=add:9,5=ablate,7=clamp:1:2"),
    "steer.where": (STEER, "generated"), "steer.start": (STEER, "5"), "steer.passthrough": (STEER, "True"),
    "steer.hook": (STEER | {"steer.sae": "homeless", "steer.hook": "blocks.0.resid_post"}, "blocks.0.mlp_out"),
}  # fmt: skip


def outcome(world, folder, changes):
    """The samples without their ids' names, or the message."""
    paths = ("model", "adapter", "data.source", "steer.sae")
    changes = {key: str(world / value) if key in paths and value else value for key, value in changes.items()}
    try:
        generate.run(config_of(world, **changes), str(folder))
    except UserError as error:
        return str(error)
    return samples(folder)


@pytest.fixture(scope="module")
def unchanged(world, tmp_path_factory):
    """changes -> their outcome, each run once: many fields are tried on the same run."""
    made = {}

    def get(changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = outcome(world, tmp_path_factory.mktemp("unchanged"), changes)
        return made[key]

    return get


@pytest.mark.parametrize("field", FIELDS)
def test_another_value_of_a_field_changes_the_samples(world, unchanged, tmp_path, field):
    base, value = FIELDS[field]
    one, other = unchanged(base), outcome(world, tmp_path / "other", base | {field: value})
    assert one != other
    if field in ("data.on_bad", "overflow"):
        assert any(isinstance(found, str) for found in (one, other)) and any(isinstance(found, list) for found in (one, other))
    elif field in ("top_k", "top_p"):  # what is left to draw is the most likely token: greedy, but for the temperature of the log-probability
        greedy = unchanged({"temperature": "0"})
        assert [s["completion"] for s in other] == [s["completion"] for s in greedy]
    elif field == "stop_strings":
        words = [s["completion"].split() for s in other if s["finish"] == "stop string"]
        holds = lambda word: any(stop in word for stop in "tc1")  # noqa: E731
        assert words and all(holds(row[-1]) and not any(map(holds, row[:-1])) for row in words)
    elif field in ("num_samples", "data.limit"):
        assert len(other) == {"num_samples": 30, "data.limit": 6}[field]
    elif field == "max_new_tokens":
        assert max(s["tokens"] for s in one) == 3 and max(s["tokens"] for s in other) == 5


def test_a_transcoder_steers_what_it_writes(world, tmp_path):
    plain, steered = (outcome(world, tmp_path / str(n), {**STEER, "steer.sae": "over", "steer.features": f"3=add:{n}"}) for n in (0, 90))
    assert [s["completion"] for s in plain] != [s["completion"] for s in steered]
    assert "does not record the tap it writes: set hook_name_out" in outcome(world, tmp_path / "a", {**STEER, "steer.sae": "nowhere"})
    assert "writes 16 dimensions, blocks.0.mlp_act of this model has 24" in outcome(world, tmp_path / "b", {**STEER, "steer.sae": "wide"})


def test_no_field_is_left_out():
    assert {*FIELDS, "mesh", "overwrite"} == set(field_names(load_config("configs/generate.py")))


def test_overwriting_clears_the_samples_of_another_run(world, tmp_path):
    generate.run(config_of(world), str(tmp_path))
    with pytest.raises(UserError, match="config key 'seed' is 0 there and 1 here"):
        generate.run(config_of(world, seed="1"), str(tmp_path))
    before = samples(tmp_path)
    generate.run(config_of(world, seed="1", overwrite="True"), str(tmp_path))
    assert len(samples(tmp_path)) == len(before) and samples(tmp_path) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_prompts": "0"}, "'batch_prompts' is 0: give 1 or more"),
        ({"num_samples": "-1"}, "'num_samples' is -1: give 1 or more"),
        ({"data.limit": "0"}, "'data.limit' is 0: give 1 or more"),
        ({"temperature": "nan"}, "'temperature' is nan"),
        ({"top_p": "1.5"}, "'top_p' is 1.5"),
        ({"top_k": "-1"}, "'top_k' is -1"),
        ({"overflow": "eror"}, "'overflow' is 'eror'.*did you mean error"),
        ({"dtype": "fp16"}, "'dtype' is 'fp16'.*known: bfloat16, float16, float32"),
        ({"max_new_tokens": "48"}, "'max_new_tokens' is 48, the context of .*model 48 tokens: leave room for a prompt"),
        # Before a token is sampled, by file and line: 48 tokens of context less 44.
        ({"max_new_tokens": "44"}, r"rows.jsonl:1: prompt '.*' has \d+ tokens, longer than the 4 there is room for"),
    ],
)
def test_mistakes_name_the_field(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        generate.run(config_of(world, **changes), str(tmp_path))


def test_what_steers_is_read_entry_by_entry():
    inf = float("inf")
    text = " 12=add:-4.5, 90=ablate,7=clamp:0:2.5,7=clamp::1,8=set:3,9=scale:1e1,"
    expected = [(12, "add", [-4.5]), (90, "ablate", []), (7, "clamp", [0.0, 2.5]), (7, "clamp", [-inf, 1.0]), (8, "set", [3.0]), (9, "scale", [10.0])]
    assert parse_features(text) == expected and parse_features("") == []


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        ({"features": "12=ad:3"}, "'steer.features' has '12=ad:3': no kind 'ad'; did you mean add?"),
        ({"features": "12"}, "has '12': give ID=KIND"),
        ({"features": "x=ablate"}, "has 'x=ablate': give ID=KIND"),
        ({"features": "-3=ablate"}, "has '-3=ablate': give ID=KIND"),
        ({"features": "3=add"}, "add takes 1 numbers"),
        ({"features": "3=ablate:1"}, "ablate takes 0 numbers"),
        ({"features": "3=add:x"}, "'x' is no finite number"),
        ({"features": "3=add:inf"}, "'inf' is no finite number"),
        ({"features": "24=ablate"}, "there is no latent 24; the dictionary has 0 to 23"),
        ({"features": ""}, "'steer.features' is empty"),
        ({"features": "3=ablate", "sae": ""}, "'steer.sae' is empty"),
        ({"features": "3=ablate", "where": "promt"}, "did you mean prompt"),
        ({"features": "3=ablate", "start": "-1"}, "'steer.start' is -1"),
        ({"features": "3=ablate", "sae": "homeless"}, "does not record the tap"),
        ({"features": "3=ablate", "hook": "blocks.0.mlp_out"}, "was trained on blocks.0.resid_pre"),
        ({"features": "3=ablate", "sae": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_of_steering_are_named(world, steer, message):
    fields = {f"steer.{key}": str(world / value) if key == "sae" and value else value for key, value in {"sae": "sae", **steer}.items()}
    with pytest.raises((UserError, sae.SAEError), match=message):
        generate.run(config_of(world, **fields))


def test_the_room_for_a_prompt_is_what_the_context_leaves(world, tmp_path, capsys):
    skipping = {"data.source": str(world / "bad.jsonl"), "data.on_bad": "skip"}
    generate.run(config_of(world, max_new_tokens="44", overflow="truncate", **skipping), str(tmp_path))
    assert len(samples(tmp_path)) == 8
    told = capsys.readouterr().err
    assert "bad rows left out: 1" in told and "prompts longer than 4 tokens: 0 left out, 4 shortened" in told
    assert json.loads((tmp_path / "summary.json").read_text()) == {"prompts": 4, "samples": 8, "skipped": 1, "dropped": 0, "truncated": 4}


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the weights were read"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((world / "model" / "config.json").read_text())
    with pytest.raises(models.ModelError, match="no tokenizer"):
        generate.run(config_of(world, model=str(tmp_path / "model")))


ON_A_MESH = """
import importlib, json, sys
from pathlib import Path
import jax, numpy as np
from jaxrl_llm.commands import generate as verb
from jaxrl_llm.config import load_config
sampler, held = importlib.import_module("models.generate"), []
place_rows = sampler.place_rows

def watched(array, mesh):
    placed = place_rows(array, mesh)
    held.append((placed.shape[0], [shard.data.shape[0] for shard in placed.addressable_shards]))
    return placed

sampler.place_rows = watched
found = []
for mesh, ways in (("", 1), ("fsdp=2,data=2", 4)):
    held.clear()
    folder = Path(sys.argv[2]) / str(ways)
    world = Path(sys.argv[1])
    fields = {"model": str(world / "model"), "data.source": str(world / "rows.jsonl"), "num_samples": "2", "max_new_tokens": "3", "mesh": mesh}
    verb.run(load_config("configs/generate.py", fields), str(folder))
    assert held and all(parts == [rows // ways] * ways for rows, parts in held), held
    found.append([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()])
one, four = found
assert [s["completion"] for s in one] == [s["completion"] for s in four] and len(one) == 20
np.testing.assert_allclose([s["logp"] for s in four], [s["logp"] for s in one], atol=1e-4)
print("equal")
"""


def test_the_rows_of_a_mesh_are_spread_over_its_devices(world, tmp_path, run_python):
    out = run_python(ON_A_MESH, (str(world), str(tmp_path)), devices=4)
    assert out.strip().endswith("equal")
