"""The curated set survives each layout exactly, and other programs read the layouts without us."""

import json
import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from jaxrl_llm.curation import curated_set
from jaxrl_llm.curation.curated_set import FORMATS, SIGNALS, CuratedSet
from jaxrl_llm.errors import UserError

ROWS = [
    {"id": "a", "prompt": "one\nline é ∑", "answer": "1", "level": 3, "score": 0.1, "tags": ["x", "y"], "difficulty": 5.0},
    {"id": "b", "prompt": "two", "answer": "", "level": 1, "score": 2.0, "tags": [], "difficulty": 1.0},
    {"id": "c", "prompt": "three", "answer": None, "level": 2, "score": 1e-300, "tags": None, "difficulty": 2.0, "only_here": {"k": 1}},
    {"id": "d", "prompt": "", "answer": "4", "level": -7, "score": float(1 / 3), "tags": [1, "z"], "difficulty": 4.0},
]


def curated(**changes):
    arguments = {
        "rows": ROWS,
        "cluster": np.array([0, 1, 1, 0]),
        "difficulty": np.array([0.0, 1.0, 1 / 3, 0.25]),
        "quality": np.array([-3.5, 0.0, 2.0, np.pi]),
        "keep": np.array([True, False, True, True]),
        "order": np.array([2, -1, 0, 1]),
        "manifest": {"data": {"hash": "abc"}, "version": "0"},
    }
    return CuratedSet(**{**arguments, **changes})


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_is_exact(tmp_path, format):
    before = curated()
    folder = before.write(tmp_path / "set", formats=[format])
    after = CuratedSet.read(folder)
    assert after.rows == before.rows, "every column of every row, absent ones absent, None None"
    for name, dtype in SIGNALS.items():
        assert getattr(after, name).dtype == dtype and (getattr(after, name) == getattr(before, name)).all(), name
    assert after.manifest == before.manifest
    assert [p.name for p in (tmp_path / "set").iterdir() if p.name.startswith(".")] == [], "no temporary files stay"


def test_all_layouts_side_by_side_and_written_again(tmp_path):
    curated().write(tmp_path)
    curated(quality=np.zeros(4)).write(tmp_path)
    for format in FORMATS:
        assert CuratedSet.read(tmp_path, format).quality.tolist() == [0.0] * 4


def test_pandas_and_datasets_read_it(tmp_path):
    import datasets
    import pandas

    curated().write(tmp_path)
    frame = pandas.read_parquet(tmp_path / "curated.parquet")
    assert frame["prompt"].tolist() == [r["prompt"] for r in ROWS] and frame["keep"].dtype == bool
    assert frame["input_difficulty"].tolist() == [5.0, 1.0, 2.0, 4.0] and frame["difficulty"][1] == 1.0
    data = datasets.load_from_disk(str(tmp_path / "hf_dataset"))
    assert data[2]["order"] == 0 and data[0]["level"] == 3 and json.loads(data[0]["tags"]) == ["x", "y"]
    assert data.filter(lambda row: row["keep"]).sort("order")["id"][:] == ["c", "d", "a"], "as the README says to train on it"


def test_tfds_data_source_without_tensorflow(tmp_path, run_python):
    curated().write(tmp_path)
    out = run_python(
        "import sys, json\n"
        "import tensorflow_datasets as tfds\n"
        "source = tfds.builder_from_directory(sys.argv[1]).as_data_source('train')\n"
        "print(json.dumps([[e['id'].decode(), e['prompt'].decode(), int(e['order']), float(e['difficulty'])] for e in source]))\n"
        "assert 'tensorflow' not in sys.modules",
        (str(tmp_path / "array_record"),),
    )
    assert json.loads(out.splitlines()[-1]) == [
        ["a", "one\nline é ∑", 2, 0.0],
        ["b", "two", -1, 1.0],
        ["c", "three", 0, float(np.float32(1 / 3))],
        ["d", "", 1, 0.25],
    ]


def test_values_that_no_layout_knows(tmp_path):
    odd = [{**r, "big": 2**70 + i, "lone": "\ud800 half a character"} for i, r in enumerate(ROWS)]
    curated(rows=odd).write(tmp_path)
    assert all(CuratedSet.read(tmp_path, format).rows == odd for format in FORMATS)


def test_array_record_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(curated_set, "ROWS_PER_SHARD", 3)
    curated().write(tmp_path, formats=["array_record"])
    first, _ = shards = sorted((tmp_path / "array_record").glob("*-of-00002"))
    assert len(shards) == 2
    # Fields stand in the order of their names, so that the same set is the same bytes from every process.
    record = ArrayRecordReader(str(first)).read(0, 1)[0]
    places = [record.index(name.encode()) for name in sorted(("id", "cluster", "difficulty", "quality", "keep", "order"))]
    assert places == sorted(places)
    assert CuratedSet.read(tmp_path).rows == ROWS


def test_curriculum_is_the_kept_rows_in_order():
    assert [row["id"] for row in curated().curriculum()] == ["c", "d", "a"]


def test_a_failed_write_leaves_no_half_set(tmp_path, monkeypatch):
    curated().write(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="disk is full"):
        curated(quality=np.zeros(4)).write(tmp_path)
    with pytest.raises(UserError, match="no readable manifest"):
        CuratedSet.read(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cluster": np.zeros(3)}, "cluster has shape"),
        ({"difficulty": np.array([0, 0, 0, 1.5])}, "difficulty must lie"),
        ({"difficulty": np.array([0, 0, 0, np.nan])}, "difficulty must lie"),
        ({"order": np.array([0, -1, 0, 1])}, "order must number"),
        ({"order": np.array([0, 3, 1, 2])}, "order must number"),
    ],
)
def test_inconsistent_sets_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        curated(**change)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no format 'csv'"):
        curated().write(tmp_path, formats=["csv"])
    with pytest.raises(UserError, match="holds no curated set"):
        CuratedSet.read(tmp_path)
    curated().write(tmp_path, formats=["parquet"])
    with pytest.raises(UserError, match="no 'hf_dataset' layout"):
        CuratedSet.read(tmp_path, "hf_dataset")
    with pytest.raises(UserError, match="rename one of them"):
        curated(rows=[{**r, "input_difficulty": 1} for r in ROWS]).write(tmp_path)
