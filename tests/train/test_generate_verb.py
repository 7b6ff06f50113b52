"""`jaxrl-llm generate`: samples in a run directory, going on after a stop, and rows spread over a mesh."""

import json

import jax
import pytest

import models
from jaxrl_llm.commands import generate
from jaxrl_llm.config import load_config
from jaxrl_llm.data.lab_world import build_tokenizer, generate_problems


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random model, its tokenizer and rows.jsonl."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), build_tokenizer()
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
        tie_embeddings=True, max_position=48, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
    )  # fmt: skip
    models.save(folder / "model", cfg, models.init(cfg, jax.random.key(0)), tokenizer_from=tokenizer)
    rows = [json.dumps({"id": r["id"], "prompt": r["prompt"]}) for r in generate_problems(10, seed=0)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
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
    out = run_python(ON_A_MESH, (str(world), str(tmp_path)), devices=4, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    assert out.strip().endswith("equal")
