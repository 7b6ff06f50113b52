"""The run directory: what it writes, whom it refuses, what a kill or a full disk leaves."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm import run_dir as module
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, read_jsonl, write_json, write_text

CONFIG = {"steps": 3, "model": {"name": "tiny", "sizes": (1, 2)}, "overwrite": False}


def test_writes_and_reopens(tmp_path):
    run = RunDir(tmp_path / "a" / "b", CONFIG, kind="grpo")
    assert not run.resumed and run.checkpoints.is_dir()
    run.log({"kind": "train", "step": 1, "reward": np.float32(0.5), "n": np.int64(3), "hist": np.arange(2), "ok": np.bool_(True)})
    run.log({"step": 2, "reward": float("nan"), "path": tmp_path})
    run.sample({"step": 1, "text": "café"})
    run.summary({"accuracy": 0.25})
    assert run.metrics()[0] == {"kind": "train", "step": 1, "reward": 0.5, "n": 3, "hist": [0, 1], "ok": True}
    assert run.metrics()[1]["reward"] is None
    again = RunDir(tmp_path / "a" / "b", CONFIG, kind="grpo")
    assert again.resumed and len(again.metrics()) == 2 and again.samples() == [{"step": 1, "text": "café"}]
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["config"]["model"]["sizes"] == [1, 2]
    assert json.loads((tmp_path / "a" / "b" / "summary.json").read_text()) == {"accuracy": 0.25}
    assert not list((tmp_path / "a" / "b").glob(".*"))


def test_refuses_another_run_and_names_the_key(tmp_path):
    run = RunDir(tmp_path, CONFIG, kind="grpo")
    run.log({"step": 1})
    other = {**CONFIG, "model": {"name": "large", "sizes": (1, 2)}}
    with pytest.raises(UserError, match=r"config key 'model.name' is \"tiny\" there and \"large\" here"):
        RunDir(tmp_path, other, kind="grpo")
    with pytest.raises(UserError, match="holds a run of 'grpo', this is 'sft'"):
        RunDir(tmp_path, CONFIG, kind="sft")
    assert RunDir(tmp_path, CONFIG, kind="grpo").metrics() == [{"step": 1}]


TRAINING = {"mesh": "", "train": {"steps": 3, "remat": False, "optimizer": {"clip_norm": 1.0}}, "allow_changes": (), "overwrite": False}


def changed(allow=(), **values):
    """TRAINING with other values of some fields."""
    config = json.loads(json.dumps(TRAINING)) | {"allow_changes": allow}
    for key, value in values.items():
        *groups, name = key.split("__")
        group = config
        for each in groups:
            group = group[each]
        group[name] = value
    return config


def head(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_run_goes_on_with_other_fields_of_how_and_with_those_that_are_named(tmp_path):
    RunDir(tmp_path, changed(), kind="sft").log({"step": 2})
    with pytest.raises(UserError, match="'train.steps' is 3 there and 4 here; to go on with it as it is here add --config.allow_changes=train.steps,"
                       "train.optimizer.clip_norm; else choose another --workdir, or set --config.overwrite=True"):  # fmt: skip
        RunDir(tmp_path, changed(train__steps=4, train__optimizer__clip_norm=0.5), kind="sft")
    with pytest.raises(UserError, match="clip_norm' is 1.0 there.*add --config.allow_changes=train.steps,train.optimizer.clip_norm;"):
        RunDir(tmp_path, changed(("train.steps",), train__steps=4, train__optimizer__clip_norm=0.5), kind="sft")
    with pytest.raises(UserError, match="names 'train.stepz', which is no field: did you mean train.steps"):
        RunDir(tmp_path, changed(("train.stepz",)), kind="sft")
    how = RunDir(tmp_path, changed(mesh="fsdp=4", train__remat=True), kind="sft")
    assert how.way_on("train.optimizer") == ", and go on with --config.allow_changes=train.optimizer"
    assert RunDir(tmp_path / "other", CONFIG, kind="lab").way_on("train.optimizer") == "", "where there is no such field"
    assert how.resumed and how.changes == {"mesh": ("", "fsdp=4"), "train.remat": (False, True)}
    what = changed(("train.steps", "train.optimizer"), mesh="fsdp=4", train__steps=4, train__optimizer__clip_norm=0.5)
    assert RunDir(tmp_path, what, kind="sft").resumed and head(tmp_path)["config"] == TRAINING | {"allow_changes": []}, "not before it has gone on"
    RunDir(tmp_path, what, kind="sft").note_changes(2)
    wanted = {"mesh": ["", "fsdp=4"], "train.steps": [3, 4], "train.optimizer.clip_norm": [1.0, 0.5]}
    assert head(tmp_path)["changes"] == [{"after_step": 2, "changed": wanted}]
    # From now on it is that run: the same command goes on as it is, the one before is another's.
    again = RunDir(tmp_path, what, kind="sft")
    again.note_changes(2)
    assert again.resumed and again.metrics() == [{"step": 2}, {"kind": "change", "step": 2, "changed": wanted}]
    assert RunDir(tmp_path, what | {"allow_changes": ()}, kind="sft").changes == {}
    with pytest.raises(UserError, match="'train.steps' is 4 there and 3 here"):
        RunDir(tmp_path, changed(), kind="sft")
    RunDir(tmp_path, changed(("train",)), kind="sft").note_changes(3)
    assert [change["after_step"] for change in head(tmp_path)["changes"]] == [2, 3]


def test_rows_are_those_that_the_run_began_with(tmp_path):
    run = RunDir(tmp_path, changed(), kind="sft")
    run.same_rows({"train": "a"})
    run.same_rows({"train": "b", "held": "c"})  # nothing was learnt from them yet
    (run.checkpoints / "1").mkdir()
    run.same_rows({"train": "b", "more": "d"})
    with pytest.raises(UserError, match="the rows of 'train' are not those that this run began with.*give it the data as it was, or choose another"):
        run.same_rows({"train": "a"})
    run.same_start("x")  # of a run that began before this was kept
    with pytest.raises(UserError, match="has changed since"):
        run.same_start("y")
    RunDir(tmp_path, changed(mesh="data=2"), kind="sft").note_changes(1)
    assert head(tmp_path)["start"] == "x"
    assert head(tmp_path)["rows"] == {"train": "b", "more": "d"} and "rows" not in head(tmp_path)["config"]
    parts = ([np.arange(4), {"a": 1}], [np.arange(4).reshape(2, 2), {"a": 1}], [np.arange(4.0), {"a": 1}], [np.arange(4), {"a": 2}], [{"a": 1}])
    assert len({module.fingerprint(part) for part in parts}) == len(parts) and module.fingerprint(parts[0]) == module.fingerprint(iter(parts[0]))


def test_a_kill_while_changes_are_noted_doubles_no_line(tmp_path, monkeypatch):
    RunDir(tmp_path, changed(), kind="sft").log({"step": 2})
    monkeypatch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        RunDir(tmp_path, changed(train__remat=True), kind="sft").note_changes(2)
    monkeypatch.undo()
    run = RunDir(tmp_path, changed(train__remat=True), kind="sft")
    run.note_changes(2)
    assert [record.get("kind") for record in run.metrics()] == [None, "change"] and len(head(tmp_path)["changes"]) == 1


def test_overwrite_clears_our_files_only_and_never_its_own_run(tmp_path):
    run = RunDir(tmp_path, CONFIG, kind="grpo")
    run.log({"step": 1})
    (run.checkpoints / "1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    same = RunDir(tmp_path, {**CONFIG, "overwrite": True}, kind="grpo")
    assert same.resumed and same.metrics() == [{"step": 1}]
    new = RunDir(tmp_path, {**CONFIG, "steps": 4, "overwrite": True}, kind="grpo")
    assert not new.resumed and new.metrics() == [] and not list(new.checkpoints.iterdir())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert RunDir(tmp_path, {**CONFIG, "steps": 4}, kind="grpo").resumed


def make(folder, *names):
    """A file at each name, with the folders it takes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_overwrite_clears_what_a_run_owns_and_nothing_else(tmp_path):
    owns = {"kind": "lab", "owns": ("cells", "rates-*.jsonl")}
    RunDir(tmp_path, CONFIG, **owns)
    make(tmp_path, "cells/a/result.json", "rates-1.jsonl", "rates-2.jsonl", "report.json", "mine/cells/x", "rates.txt")
    assert RunDir(tmp_path, {**CONFIG, "overwrite": True}, **owns).resumed and (tmp_path / "cells/a/result.json").exists()
    assert not RunDir(tmp_path, {**CONFIG, "steps": 4, "overwrite": True}, **owns).resumed
    assert files(tmp_path) == {"config.json", "mine/cells/x", "rates.txt"}
    # A run of another kind clears what the one before owned, as config.json tells.
    make(tmp_path, "cells/b/result.json", "policy/config.json")
    RunDir(tmp_path, {**CONFIG, "overwrite": True}, kind="grpo", owns=("policy",))
    assert files(tmp_path) == {"config.json", "mine/cells/x", "rates.txt"}


def test_overwrite_in_a_folder_without_a_run_clears_nothing(tmp_path):
    make(tmp_path, "policy/weights", "report.html")
    RunDir(tmp_path, {**CONFIG, "overwrite": True}, kind="grpo", owns=("policy",))
    assert files(tmp_path) == {"config.json", "policy/weights", "report.html"}


def test_a_link_is_cleared_and_what_it_points_to_stays(tmp_path):
    make(tmp_path, "elsewhere/weights")
    RunDir(tmp_path / "run", CONFIG, kind="lab", owns=("policies",))
    (tmp_path / "run" / "policies").symlink_to(tmp_path / "elsewhere")
    RunDir(tmp_path / "run", {**CONFIG, "steps": 4, "overwrite": True}, kind="lab", owns=("policies",))
    assert not (tmp_path / "run" / "policies").exists() and (tmp_path / "elsewhere" / "weights").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "*", "a/b", "/a", "../x", "cells/"])
def test_owned_names_stay_inside_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="without slashes"):
        RunDir(tmp_path / "run", CONFIG, kind="lab", owns=(name,))
    # Nor does a config.json from elsewhere make us leave it.
    make(tmp_path, "outside", "run/inside")
    write_json(tmp_path / "run" / "config.json", {"kind": "lab", "config": {}, "owns": [name, 3]})
    RunDir(tmp_path / "run", {**CONFIG, "overwrite": True}, kind="lab")
    assert files(tmp_path) == {"outside", "run/inside", "run/config.json"}


def test_a_mistake_in_the_config_does_not_cost_the_directory(tmp_path):
    """A run that stopped at a mistake before it left anything gives way to the mended one; one that left something does not."""
    RunDir(tmp_path, {**CONFIG, "steps": 7}, kind="grpo")
    run = RunDir(tmp_path, CONFIG, kind="lab")
    assert not run.resumed and json.loads((tmp_path / "config.json").read_text())["kind"] == "lab"
    (tmp_path / "checkpoints" / "3").mkdir()
    with pytest.raises(UserError, match="holds a run of 'lab'"):
        RunDir(tmp_path, CONFIG, kind="grpo")
    (tmp_path / "checkpoints" / "3").rmdir()
    make(tmp_path, "features/shard")
    with pytest.raises(UserError, match="config key 'steps'"):
        RunDir(tmp_path, {**CONFIG, "steps": 7}, kind="lab")


def test_a_kill_while_clearing_leaves_no_rest_that_looks_new(tmp_path, monkeypatch):
    RunDir(tmp_path, CONFIG, kind="grpo").log({"step": 1})
    make(tmp_path, "checkpoints/1/state")
    monkeypatch.setattr(module.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    new = {**CONFIG, "steps": 4}
    with pytest.raises(KeyboardInterrupt):
        RunDir(tmp_path, {**new, "overwrite": True}, kind="grpo")
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds another run"):
        RunDir(tmp_path, new, kind="grpo")
    assert not RunDir(tmp_path, {**new, "overwrite": True}, kind="grpo").resumed


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("text", ['{"architectures": ["LlamaForCausalLM"]}', "[1]", "{", '{"kind": 1, "config": {}}'])
def test_a_config_json_of_something_else_is_never_overwritten(tmp_path, text, overwrite):
    (tmp_path / "config.json").write_text(text)
    make(tmp_path, "policy/weights")
    with pytest.raises(UserError, match="is not the config of a run of ours: choose another --workdir"):
        RunDir(tmp_path, {**CONFIG, "overwrite": overwrite}, kind="grpo", owns=("policy",))
    assert (tmp_path / "config.json").read_text() == text and (tmp_path / "policy" / "weights").exists()


@pytest.mark.parametrize("make_path", [str, Path])
@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///x/run"])
def test_a_url_is_refused_before_anything_is_made(tmp_path, monkeypatch, url, make_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a URL.*give --workdir a path that every host mounts"):
        RunDir(make_path(url), CONFIG, kind="grpo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_last_line_cut_by_a_kill_is_repaired(tmp_path, cut):
    run = RunDir(tmp_path, CONFIG, kind="grpo")
    run.log({"step": 1, "reward": 0.5})
    run.log({"step": 2, "reward": 0.5})
    path = tmp_path / "metrics.jsonl"
    line = len('{"step": 2, "reward": 0.5}\n')
    os.truncate(path, 2 * line - cut)
    assert len(read_jsonl(path)) == (2 if cut == 1 else 1)
    again = RunDir(tmp_path, CONFIG, kind="grpo")
    again.log({"step": 3})
    assert [record["step"] for record in again.metrics()] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_truncate_after_drops_later_steps_of_both_files(tmp_path):
    run = RunDir(tmp_path, CONFIG, kind="grpo")
    for step in (1, 2, 3):
        run.log({"step": step})
        run.sample({"step": step})
    run.log({"kind": "note"})
    run.truncate_after(2)
    assert run.metrics() == [{"step": 1}, {"step": 2}, {"kind": "note"}]
    assert run.samples() == [{"step": 1}, {"step": 2}]


def test_full_disk_is_one_clear_line_and_loses_nothing(tmp_path, monkeypatch):
    run = RunDir(tmp_path, CONFIG, kind="grpo")
    run.log({"step": 1})
    run.summary({"best": 1})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    real_open = open

    class Full:
        """A file on a disk with room for four more bytes."""

        def __init__(self, *args, **kwargs):
            self.file = real_open(*args, **{**kwargs, "encoding": None, "buffering": 0} if "b" in args[1] else kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, data):
            self.file.write(data[:4])
            self.file.flush()
            raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(module, "open", Full, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: the disk is full; free some space"):
        run.log({"step": 2})
    with pytest.raises(UserError, match=r"cannot write .*summary\.json: the disk is full"):
        run.summary({"best": 2})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "summary.json").read_text()) == {"best": 1}
    assert not list(tmp_path.glob(".*"))
    run.log({"step": 2})
    assert [record["step"] for record in run.metrics()] == [1, 2]


def test_a_really_full_device(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    run = RunDir(tmp_path, CONFIG, kind="grpo")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        run.log({"step": 1})


def test_unwritable_workdirs(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a part of the path is a file"):
        RunDir(tmp_path / "file" / "run", CONFIG, kind="grpo")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "nowhere" / "x.json", "{}")
    write_json(tmp_path / "x.json", {"a": (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/version"), reason="root may write anywhere")
def test_a_read_only_place(tmp_path, monkeypatch):
    target = "/proc/jaxrl_llm_run" if os.geteuid() == 0 else str(tmp_path / "locked" / "run")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write the run directory"):
        RunDir(target, CONFIG, kind="grpo")


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_process_index", lambda: 1)
    run = RunDir(tmp_path / "run", CONFIG, kind="grpo")
    run.log({"step": 1})
    run.sample({"step": 1})
    run.summary({})
    run.truncate_after(0)
    run.note_changes(0)
    assert not (tmp_path / "run").exists()
