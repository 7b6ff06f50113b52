"""The run directory: what it writes, whom it refuses, what a kill or a full disk leaves."""

import json
import os

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


def test_a_config_json_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="is not the config of a run of ours"):
        RunDir(tmp_path, CONFIG, kind="grpo")
    assert "Llama" in (tmp_path / "config.json").read_text()


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
    assert not (tmp_path / "run").exists()
