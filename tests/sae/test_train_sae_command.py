"""`jaxrl-llm train_sae`: from a text file and a real model to a dictionary with its metrics."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import models
import sae
from jaxrl_llm import checkpoint, cli
from jaxrl_llm.commands import train_sae as command
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.curation import processes
from jaxrl_llm.data.lab_world import build_tokenizer
from jaxrl_llm.data.sources import Rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, read_jsonl
from jaxrl_llm.train.signals import Interrupted

SMALL = {
    "data.limit": 24,
    "data.eval_rows": 4,
    "harvest.context_size": 32,
    "harvest.buffer_rows": 512,
    "sae.expansion": 2,
    "sae.k": 4,
    "batch_size": 64,
    "train.steps": 6,
    "train.init_rows": 256,
    "train.log_every": 3,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    lines = [json.dumps({"text": f"Once upon a time, Lily had {n} red balls. She gave one to Tom and was happy."}) for n in range(30)]
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("\n".join(lines))
    return path


def call(workdir, assets, source, **changes):
    settings = SMALL | {"data.fields": "prompt=text"} | changes
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    model = assets / "checkpoints" / "stories260k"
    return cli.main(["train_sae", f"--workdir={workdir}", f"--config.model={model}", f"--config.data.source={source}", *flags])


def test_writes_a_dictionary_and_its_metrics(tmp_path, assets, source, capsys):
    assert call(tmp_path, assets, source) == 0
    d = sae.load(tmp_path / "sae")
    assert d.cfg.hook_name == "blocks.2.resid_post" and (d.cfg.d_in, d.cfg.d_sae, d.cfg.k) == (64, 128, 4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"l0", "explained_variance", "ce_recovered", "dead_share"} <= summary.keys()
    assert summary["train_rows"] == 20 and summary["eval_rows"] == 4 and summary["l0"] <= 4
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 6] and records[0]["kind"] == "train"
    assert "explained_variance" in capsys.readouterr().out
    before = np.asarray(d.params["W_dec"])
    assert call(tmp_path, assets, source) == 0  # a finished run is only reported
    np.testing.assert_array_equal(sae.load(tmp_path / "sae").params["W_dec"], before)
    assert "explained_variance" in capsys.readouterr().out
    assert call(tmp_path, assets, source, **{"train.steps": 7}) == 2
    assert "train.steps" in capsys.readouterr().err
    assert call(tmp_path, assets, source, **{"train.steps": 7, "allow_changes": "train.steps"}) == 2
    assert "a run that is over, and its checkpoints are gone: it cannot go on with another train.steps" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from jaxrl_llm import cli
from jaxrl_llm.run_dir import RunDir

step, log = int(sys.argv[1]), RunDir.log

def logged(self, record):
    log(self, record)
    if record["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] == "SIGKILL" else signal.SIGTERM)

RunDir.log = logged
sys.exit(cli.main(sys.argv[3:]))
"""


def arguments(workdir, assets, source, **changes):
    settings = SMALL | {"data.fields": "prompt=text", "train.init_rows": 64, "train.log_every": 1, "checkpoint_every": 2} | changes
    paths = [f"--workdir={workdir}", f"--config.model={assets / 'checkpoints' / 'stories260k'}", f"--config.data.source={source}"]
    return ["train_sae", *paths, *(f"--config.{key}={value}" for key, value in settings.items())]


def in_its_own_process(repo, arguments, step=0, kind="SIGKILL"):
    """The command in a fresh process, killed at `step` (0 = never): by SIGKILL it dies, by SIGTERM it saves and leaves."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(step), kind, *arguments], env=env, cwd=repo, capture_output=True, timeout=600)
    expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM}[kind] if step else 0
    assert done.returncode == expected, done.stderr.decode()[-2000:]
    if expected > 0:
        assert f"stopped by signal 15 after step {step}; the same command goes on from there" in done.stderr.decode()


def killed(repo, step, kind, arguments):
    in_its_own_process(repo, arguments, step, kind)


def test_a_killed_run_ends_as_an_undisturbed_one(repo, tmp_path, assets, source):
    """The same command twice killed in the middle, once by SIGKILL and once by SIGTERM, then left to end. Each run has a process of its own:
    programs that other tests left in this one may be compiled otherwise, and differ in a last bit."""
    peace, disturbed = tmp_path / "peace", tmp_path / "killed"
    in_its_own_process(repo, arguments(peace, assets, source))
    killed(repo, 3, "SIGKILL", arguments(disturbed, assets, source))
    left = [p.name for p in (disturbed / "checkpoints").iterdir()]  # the write of step 2 may have been under way
    assert all(name.partition(".")[0] == "2" for name in left) and not (disturbed / "sae").exists()
    killed(repo, 5, "SIGTERM", arguments(disturbed, assets, source))
    assert sorted(p.name for p in (disturbed / "checkpoints").iterdir()) == ["4", "5"]
    in_its_own_process(repo, arguments(disturbed, assets, source))
    for name in ("metrics.jsonl", "summary.json", "sae/sae.json", "sae/sae.safetensors"):
        assert (disturbed / name).read_bytes() == (peace / name).read_bytes(), name
    assert not (disturbed / "checkpoints").exists()


def test_a_stopped_run_goes_on_with_other_settings_that_are_named(tmp_path, assets, source, monkeypatch):
    """Twice stopped in the middle, once before the first checkpoint behind the change: that one tells of the old settings, the run of the new."""
    log, base = RunDir.log, {"train.init_rows": 64, "train.log_every": 1, "checkpoint_every": 2}
    more = base | {"train.steps": 8, "train.learning_rate": 1e-3}

    def stopped_at(step, changes):
        def logged(self, record):
            log(self, record)
            if record["step"] == step and record["kind"] == "train":
                raise KeyboardInterrupt

        monkeypatch.setattr(RunDir, "log", logged)
        try:
            return call(tmp_path, assets, source, **changes)
        finally:
            monkeypatch.setattr(RunDir, "log", log)

    assert stopped_at(5, base) == 130
    assert call(tmp_path, assets, source, **more) == 2, "which must be named"
    assert stopped_at(5, more | {"allow_changes": "train"}) == 130
    assert call(tmp_path, assets, source, **more) == 0, "it is that run now"
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    changed = {"train.steps": [6, 8], "train.learning_rate": [None, 1e-3]}
    assert [r for r in records if r["kind"] == "change"] == [{"kind": "change", "step": 4, "changed": changed}]
    rates = [r["learning_rate"] for r in records if r["kind"] == "train"]
    assert rates[4] == pytest.approx(1e-3 * 5 / 50) and rates[3] == pytest.approx(sae.train_config.default_learning_rate(128) * 4 / 50)


def test_checkpoint_every_zero_keeps_none_on_the_way(repo, tmp_path, assets, source):
    killed(repo, 5, "SIGKILL", arguments(tmp_path, assets, source, checkpoint_every=0))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_other_taps_architectures_and_layouts(tmp_path, assets, source):
    changes = {"hook": "blocks.0.mlp_act", "sae.architecture": "relu", "train.sparsity_coefficient": 0.1, "sae.layout": "saelens", "sae.d_sae": 200}
    changes |= {"train.steps": 2}
    assert call(tmp_path, assets, source, **changes) == 0
    assert (tmp_path / "sae" / "cfg.json").exists()
    d = sae.load(tmp_path / "sae")
    assert d.cfg.architecture == "relu" and d.cfg.d_in == 172 and d.cfg.d_sae == 200 and d.cfg.hook_name == "blocks.0.mlp_act"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": "blocks.7.resid_post"}, "the model has 5 blocks"),
        ({"data.limit": 1}, "give at least two"),
        ({"data.fields": "prompt=story"}, "no field 'story'"),
        ({"sae.k": 999}, "needs 1 <= k"),
        ({"sae.architecture": "topkk"}, "did you mean topk?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, assets, source, capsys, changes, message):
    assert call(tmp_path, assets, source, **changes) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_no_model_and_no_text(tmp_path, capsys):
    assert cli.main(["train_sae", f"--workdir={tmp_path}"]) == 2
    assert "no model" in capsys.readouterr().err
    assert cli.main(["train_sae", f"--workdir={tmp_path}", "--config.model=x"]) == 2
    assert "no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae.layout": "saelen"}, "sae.layout.*did you mean saelens"),
        ({"sae.architecture": "relu"}, "train.sparsity_coefficient' is 0.*'relu'"),
        ({"sae.normalize_activations": "layernorm"}, "did you mean layer_norm"),
        ({"sae.dtype": "float8"}, "sae.dtype"),
        ({"dtype": "float16"}, "dtype.*float16"),
        ({"data.on_bad": "skp"}, "data.on_bad.*did you mean skip"),
        ({"data.eval_rows": "0"}, "data.eval_rows' is 0: give 1 or more"),
        ({"harvest.batch_rows": "0"}, "harvest.batch_rows' is 0"),
        ({"harvest.context_size": "1"}, "harvest.context_size' is 1: give 2 or more"),
        ({"harvest.buffer_rows": "4000"}, "harvest.buffer_rows' is 4000: give 4096 or more"),
        ({"seed": "-1"}, "seed' is -1"),
        ({"checkpoint_every": "-1"}, "checkpoint_every' is -1"),
        ({"train.decoder_norm": "one"}, "decoder_norm"),
        ({"train.beta1": "1.0"}, "beta1 is 1.0"),
        ({"sae.prefixes": "4"}, "sae.prefixes' is '4', but it is of 'matryoshka' dictionaries"),
        ({"sae.prefixes": "a", "sae.architecture": "matryoshka"}, "sae.prefixes' is 'a': give whole numbers"),
        ({"train.target_l0": "4"}, "train.target_l0' is 4.0, but it is of 'jumprelu' dictionaries"),
        ({"hook": "embed,embed"}, "names a tap twice"),
        ({"sae.hook_out": "embed"}, "reads one tap"),
        ({"finetune.steps": "3", "finetune.grad_clip": "-1"}, "grad_clip is -1"),
        ({"sae.skip": "True"}, "sae.skip' is of transcoders"),
        ({"sweep": "sae.k"}, "'sweep' has 'sae.k': give FIELD=VALUE,VALUE"),
        ({"sweep": "sae.k=2,2"}, "'sweep' names 'sae.k=2,2' twice"),
        ({"sweep": "sae.k=2 sae.k=3"}, "'sweep' names 'sae.k' twice"),
        ({"sweep": "sae.kk=2,3"}, "unknown config key 'sae.kk': did you mean sae.k"),
        ({"sweep": "batch_size=2,3"}, "'sweep' has 'batch_size': fields of sae and train can be swept"),
        ({"sweep": "train.steps=2,3"}, "can be swept, but not .*train.steps"),
        ({"sweep": "sae.architecture=topk,relu"}, "train.sparsity_coefficient' is 0.*'relu'"),
        ({"sweep": "sae.k=4,zero"}, "sae.k"),
    ],
)
def test_settings_out_of_range_are_named_before_any_work(tmp_path, changes, message):
    """No source is read: there is none."""
    with pytest.raises((UserError, sae.SAEError), match=message):
        command.run(load_config("configs/train_sae.py", {"model": "m", "data.source": "s", **changes}), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


OTHER = {  # field -> another value; those of `train`: test_sae_train.py
    "model": "other", "dtype": "bfloat16", "mesh": "data=1", "hook": "blocks.0.mlp_act", "data.source": "other.txt", "data.fields": "prompt=text",
    "data.separator": "--", "data.split": "test", "data.limit": "7", "data.on_bad": "skip", "data.template": "Q: {prompt}", "data.eval_rows": "2",
    "harvest.batch_rows": "5", "harvest.context_size": "9", "harvest.skip_first": "0", "harvest.buffer_rows": "5000", "sae.architecture": "relu",
    "sae.d_sae": "77", "sae.expansion": "5", "sae.k": "3", "sae.normalize_activations": "layer_norm", "sae.apply_b_dec_to_input": "False",
    "sae.dtype": "float16", "sae.layout": "saelens", "sae.prefixes": "3,5", "sae.hook_out": "blocks.2.mlp_out", "sae.skip": "True",
    "harvest.drop_special": "False", "finetune.steps": "3", "batch_size": "100", "checkpoint_every": "9", "seed": "4", "train.steps": "9",
    "sweep": "sae.k=3,5",
}  # fmt: skip


def test_no_setting_is_forgotten_here():
    """`overwrite` and `allow_changes` belong to the run directory, and the other fields of `train` go on as they are."""
    fields = field_names(load_config("configs/train_sae.py"))
    known = {name for name in fields if not name.startswith(("train.", "finetune."))}
    assert set(OTHER) - {"train.steps", "finetune.steps"} == known - {"overwrite", "allow_changes"}
    own = {"context_size", "skip_first", "drop_tokens", "seed"}  # of the whole run
    assert {f.name for f in dataclasses.fields(sae.FinetuneConfig)} - own == {n.split(".")[1] for n in fields if n.startswith("finetune.")}


@pytest.mark.parametrize("field", OTHER)
def test_every_setting_reaches_what_it_is_for(monkeypatch, tmp_path, field):
    def seen_with(workdir, **changes):
        seen = {}

        def keep(name, result=None):
            def call(*args, **kwargs):
                seen.setdefault(name, []).append(repr((args, sorted(kwargs.items()))))
                return result

            return call

        def read_rows(source, fields, **how):
            keep("read")(source, fields, **how)
            rows = Rows()
            rows.extend({"id": str(i), "prompt": f"red {i}"} for i in range(20))
            return rows

        def harvest_activations(cfg, params, rows, hook, *how, mesh, **named):
            keep("harvest")(rows, hook, *how, mesh is None, **named)
            return iter([np.zeros((4, 8), np.float32)])

        def train_saes(tasks, buffer, key, *, mesh, on_log, checkpoints, checkpoint_every, stop, allow_changes, on_start):
            keep("train")(tasks, np.asarray(jax.random.key_data(key)), mesh is None, checkpoint_every)
            return dict.fromkeys(tasks, ("dictionary", []))

        model = type("Cfg", (), {"n_layers": 4})()
        monkeypatch.setattr(command, "read_rows", read_rows)
        monkeypatch.setattr(models, "load", lambda name, dtype, mesh: keep("load", (model, {}))(name, dtype, mesh is None))
        monkeypatch.setattr(models, "load_tokenizer", keep("tokenizer", build_tokenizer()))
        monkeypatch.setattr(sae, "harvest_activations", harvest_activations)
        monkeypatch.setattr(sae, "ActivationBuffer", lambda source, *how: keep("buffer")(next(source()).shape, *how))
        monkeypatch.setattr(sae, "train_saes", train_saes)
        monkeypatch.setattr(sae, "cast", lambda dictionary, dtype: dictionary)
        monkeypatch.setattr(sae, "finetune", lambda d, cfg, lm, rows, how, on_log: keep("finetune", (d, []))(rows, how))
        figures = dict.fromkeys(("l0", "explained_variance", "ce_recovered", "dead_share"), 0.0)
        monkeypatch.setattr(sae, "evaluate", lambda *_, lm, **how: keep("evaluate", figures)(how))
        monkeypatch.setattr(sae, "save", lambda folder, *how, **named: keep("save")(*how, **named))
        monkeypatch.setattr(checkpoint, "until_done", lambda folder: contextlib.nullcontext())
        monkeypatch.setattr(processes, "on_this_process", lambda dictionary, mesh: dictionary)
        given = {"model": "m", "data.source": "s.txt", "train.sparsity_coefficient": "0.1", "hook": "blocks.2.resid_post"}
        given |= {"sae.hook_out": {"sae.hook_out": "", "sae.skip": "blocks.2.mlp_out"}.get(field, "")}
        given |= {"sae.architecture": "matryoshka"} if field == "sae.prefixes" else {}
        command.run(load_config("configs/train_sae.py", given | changes), str(workdir))
        return seen

    plain, again, other = seen_with(tmp_path / "a"), seen_with(tmp_path / "b"), seen_with(tmp_path / "c", **{field: OTHER[field]})
    assert plain == again != other
    reached = {name for name in plain | other if plain.get(name) != other.get(name)}
    expected = {
        "model": {"load", "tokenizer", "train"}, "dtype": {"load"}, "mesh": {"load", "harvest", "train"}, "hook": {"harvest", "train"},
        "data.template": {"harvest"}, "data.eval_rows": {"harvest"}, "harvest.batch_rows": {"harvest"}, "harvest.skip_first": {"harvest", "evaluate"},
        "harvest.context_size": {"harvest", "train"}, "harvest.buffer_rows": {"buffer"}, "batch_size": {"buffer"}, "seed": {"buffer", "train"},
        "sweep": {"train", "evaluate", "save"},
        "sae.layout": {"save"}, "harvest.drop_special": {"harvest", "evaluate"}, "finetune.steps": {"finetune"}, "sae.hook_out": {"harvest", "train"},
    }  # fmt: skip
    assert reached == expected.get(field, {"read"} if field.startswith("data.") else {"train"})


def test_the_config_has_every_training_setting():
    config = load_config("configs/train_sae.py")
    fields = {f.name: f.default for f in dataclasses.fields(sae.SAETrainConfig)}
    assert set(config.train) == set(fields)
    different = {name for name, value in fields.items() if config.train[name] != value}
    assert different == {"dead_after"}  # sized for the command's shorter runs


@pytest.mark.usefixtures("quick_compilation")
def test_a_sweep_trains_each_combination_in_one_pass(tmp_path, assets, source, monkeypatch):
    """Of each tap a dictionary for each combination, while the model reads the rows of training once for all."""
    passes = []
    harvest = sae.harvest_activations
    monkeypatch.setattr(sae, "harvest_activations", lambda cfg, lm, rows, *a, **k: passes.append(len(rows)) or harvest(cfg, lm, rows, *a, **k))
    changes = {"hook": "blocks.0.resid_post,blocks.0.attn_z", "sweep": "sae.architecture=topk,batchtopk sae.k=4", "train.steps": 2}
    assert call(tmp_path, assets, source, **changes) == 0
    assert passes.count(20) == 1 and passes.count(4) == 2  # of the rows for the metrics once a tap
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = [f"{hook}/{kind}-k4" for hook in changes["hook"].split(",") for kind in ("topk", "batchtopk")]
    assert set(summary) == {*names, "train_rows", "eval_rows"}
    for name in names:
        d = sae.load(tmp_path / "sae" / name)
        assert d.cfg.hook_name == name.partition("/")[0] and d.cfg.architecture == ("topk" if name.endswith("/topk-k4") else "jumprelu")


def test_several_taps_transcoders_and_fine_tuning(tmp_path, assets, source):
    changes = {"hook": "blocks.0.resid_post,blocks.1.resid_post", "sae.architecture": "batchtopk", "train.steps": 4, "finetune.steps": 2}
    assert call(tmp_path / "two", assets, source, **changes) == 0
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for hook in changes["hook"].split(","):
        d = sae.load(tmp_path / "two" / "sae" / hook)
        assert d.cfg.hook_name == hook and d.cfg.architecture == "jumprelu" and summary[hook]["d_sae"] == d.cfg.d_sae
        assert [line["step"] for line in lines if line["kind"] == "finetune" and line["sae"] == hook] == [1, 2]
        assert any(line["kind"] == "train" and line["sae"] == hook for line in lines)
    over = {"hook": "blocks.0.resid_mid", "sae.hook_out": "blocks.0.mlp_out", "sae.skip": True, "train.steps": 4, "finetune.steps": 1}
    assert call(tmp_path / "over", assets, source, **over) == 0
    d = sae.load(tmp_path / "over" / "sae")
    assert d.cfg.d_out == 64 and d.cfg.skip and d.cfg.hook_name_out == "blocks.0.mlp_out"
    summary = json.loads((tmp_path / "over" / "summary.json").read_text())
    assert summary["hook_out"] == "blocks.0.mlp_out" and np.isfinite(summary["ce_recovered"])


def test_a_stop_before_the_first_checkpoint_says_that_it_starts_over(tmp_path, assets, source, monkeypatch):
    def stops(*_, **__):
        raise sae.Stopped(3, saved=False)

    monkeypatch.setattr(sae, "train_saes", stops)
    fields = {key: str(value) for key, value in SMALL.items()} | {"data.fields": "prompt=text", "data.source": str(source)}
    config = load_config("configs/train_sae.py", fields | {"model": str(assets / "checkpoints" / "stories260k")})
    with pytest.raises(Interrupted) as stopped:
        command.run(config, str(tmp_path))
    assert "after step 3; the same command starts over" in str(stopped.value)
