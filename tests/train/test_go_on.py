"""A run that goes on with other settings than it began with: on another mesh, for longer, with another optimizer."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import test_train_sft as sft
import tiny_folder
import tiny_grpo as tiny
import tiny_preferences as prefs
from test_verbs_killed import VERBS

import models
from jaxrl_llm.config import load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.train.config import OptimizerConfig

MESHES = """
import json, sys
import numpy as np
import jax
from pathlib import Path
from jaxrl_llm.cli import main
from models import load
folder, model, rows = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_disable_most_optimizations", True)
fields = {"model": model, "data.source": rows, "data.fields": "prompt=question,answer=good", "batch_rows": 8, "max_length": 16}
fields |= {"train.log_every": 1, "train.optimizer.learning_rate": 0.01, "train.optimizer.schedule": "constant"}
def sft(name, **changes):
    given = fields | {key.replace("__", "."): value for key, value in changes.items()}
    assert main(["sft", *(f"--config.{key}={value}" for key, value in given.items()), f"--workdir={folder / name}"]) == 0
sft("run", mesh="fsdp=8", train__steps=2)
sft("run", mesh="fsdp=4,tensor=2", train__steps=4, train__micro_batch_rows=4, allow_changes="train.steps")
sft("one", train__steps=4)
run, one = (jax.tree.leaves(load(folder / name / "policy")[1]) for name in ("run", "one"))
start = jax.tree.leaves(load(model)[1])
apart = lambda a, b: max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a, b, strict=True))
print(json.dumps([apart(run, one), apart(run, start)]))
"""


def test_a_verb_goes_on_on_another_mesh_and_for_longer(run_python, tmp_path):
    """Two steps of sft on fsdp=8, two more on fsdp=4,tensor=2 with other micro-batches: the policy of four steps on one device."""
    model, rows = tiny_folder.write(tmp_path)
    printed = run_python(MESHES, (str(tmp_path), str(model), str(rows)), devices=8)
    apart, moved = json.loads(printed.splitlines()[-1])
    assert apart < 1e-5 and moved > 1e-3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("sft", 1), ("sft", 2), ("change", 2), ("sft", 3), ("sft", 4)]
    wanted = {"mesh": ["fsdp=8", "fsdp=4,tensor=2"], "train.steps": [2, 4], "train.micro_batch_rows": [0, 4]}
    assert lines[2]["changed"] == wanted
    head = json.loads((tmp_path / "run" / "config.json").read_text())
    assert head["changes"] == [{"after_step": 2, "changed": wanted}] and head["config"]["train"]["steps"] == 4


def test_a_run_goes_on_with_another_optimizer(tmp_path):
    """One without clip and guard against spikes goes on with both: the state has the same structure."""
    first = dataclasses.replace(sft.QUICK, steps=2, optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=0.0))
    sft.train(first, folder=tmp_path / "run")
    other = OptimizerConfig(learning_rate=1e-3, clip_norm=0.1, spike_factor=5.0)
    trained, history = sft.train(dataclasses.replace(first, steps=4, optimizer=other), folder=tmp_path / "run")
    assert [record["learning_rate"] for record in history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    kept, _ = sft.train(dataclasses.replace(first, steps=4))
    assert np.abs(tiny.flat(trained) - tiny.flat(kept)).max() > 1e-4


def test_other_rows_under_the_same_name_are_refused(tmp_path):
    """By every loop that has them; before there is a checkpoint nothing is lost, and the run begins with them."""
    data, evals = tiny.prompts(), {"held": tiny.prompts(6, seed=5)}
    config = dataclasses.replace(tiny.TINY, steps=1)
    tiny.run(tmp_path / "grpo", config, data=data, evals=evals)
    for change in ({"answer": "other"}, {"level": 7}):  # a column that the reward may read, with the same tokens
        other = dataclasses.replace(data, rows=[data.rows[0] | change, *data.rows[1:]])
        with pytest.raises(UserError, match="rows of 'prompts' are not those that this run began with"):
            tiny.run(tmp_path / "grpo", config, data=other, evals=evals)
    with pytest.raises(UserError, match="rows of 'held' are not those"):
        tiny.run(tmp_path / "grpo", config, data=data, evals={"held": tiny.prompts(6, seed=6)})
    tiny.run(tmp_path / "grpo", config, data=data, evals=evals)
    one = dataclasses.replace(prefs.QUICK, steps=1)
    prefs.train(one, folder=tmp_path / "dpo")
    with pytest.raises(UserError, match="rows of 'training rows' are not those"):
        prefs.train(one, data=prefs.pairs(12, seed=4), folder=tmp_path / "dpo")
    with pytest.raises(UserError, match="held: this run began without it, so that its checkpoints hold no figures of the reference"):
        prefs.train(one, folder=tmp_path / "dpo", held_out={"held": prefs.pairs(4)})


@pytest.mark.parametrize(("verb", "stops_at"), [("sft", "jaxrl_llm.train.sft.train_sft"), ("train_sae", "models.load")])
def test_a_file_that_has_changed_under_its_name_is_noticed(verb, stops_at, tmp_path, monkeypatch):
    model, rows = tiny_folder.write(tmp_path)
    fields = VERBS[verb] | {"model": str(model), "data.source": str(rows)}
    monkeypatch.setattr(stops_at, lambda *_, **__: (_ for _ in ()).throw(InterruptedError))

    def run():
        importlib.import_module(f"jaxrl_llm.commands.{verb}").run(load_config(f"configs/{verb}.py", fields), str(tmp_path / "run"))

    for _ in range(2):
        with pytest.raises(InterruptedError):
            run()
        (tmp_path / "run" / "checkpoints" / "1").mkdir(exist_ok=True)
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="are not those that this run began with"):
        run()


def test_a_model_that_has_changed_under_its_name_is_noticed_where_it_is_read_anew(tmp_path, monkeypatch):
    """What an adapter is put into is in no checkpoint, nor is a reference; of a run that trains all parameters and has none, all is."""
    model, rows = tiny_folder.write(tmp_path)
    stops = lambda *_, **__: (_ for _ in ()).throw(InterruptedError)  # noqa: E731
    monkeypatch.setattr("jaxrl_llm.train.sft.train_sft", stops)
    monkeypatch.setattr("jaxrl_llm.train.loop.train_grpo", stops)
    adapter, reference = {"train.lora.rank": 2}, {"train.loss.kl": "k2", "train.loss.kl_coef": 0.1}
    runs = {"adapted": ("sft", adapter), "compared": ("grpo", reference), "whole": ("sft", {})}

    def run(name):
        verb, more = runs[name]
        fields = VERBS[verb] | {"model": str(model), "data.source": str(rows)} | more
        importlib.import_module(f"jaxrl_llm.commands.{verb}").run(load_config(f"configs/{verb}.py", fields), str(tmp_path / name))

    for _ in range(2):
        for name in runs:
            with pytest.raises(InterruptedError):
                run(name)
            (tmp_path / name / "checkpoints" / "1").mkdir(exist_ok=True)
    models.save(model, prefs.CONFIG, prefs.params(seed=1))
    for name in ("adapted", "compared"):
        with pytest.raises(UserError, match=r"the model \(or adapter\) that this run started from has changed since.*put it back, or choose another"):
            run(name)
    with pytest.raises(InterruptedError):
        run("whole")


def test_a_checkpoint_past_the_end_is_named(tmp_path):
    """Of sft, dpo and the loop of grpo: nothing is lost."""
    runs = {
        "sft": lambda folder, steps: sft.train(dataclasses.replace(sft.QUICK, steps=steps), folder=folder),
        "dpo": lambda folder, steps: prefs.train(dataclasses.replace(prefs.QUICK, steps=steps), folder=folder),
        "grpo": lambda folder, steps: tiny.run(folder, dataclasses.replace(tiny.TINY, steps=steps)),
    }
    for name, run in runs.items():
        run(tmp_path / name, 2)
        before = (tmp_path / name / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="holds a checkpoint of step 2, past setting 'steps'=1: give as many or more, or another --workdir"):
            run(tmp_path / name, 1)
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == before
