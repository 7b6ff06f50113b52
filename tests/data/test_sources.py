"""Reading rows: each format, the field map, ids, and every kind of bad input with its file, line and field."""

import csv
import gzip
import json

import pytest

from jaxrl_llm.data import readers
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError

ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "level": i} for i in range(1, 5)]
PROMPTS = [row["question"] for row in ROWS]
MAP = {"prompt": "question"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_as(folder, kind):
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "misnamed.json":
        path.write_text(lines)
    elif kind == "wrapped.json":
        path.write_text(json.dumps({"name": "sums", "tags": ["a"], "samples": ROWS}))
    elif kind == "columns.json":
        path.write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "misnamed.json", "wrapped.json", "columns.json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = read_rows(write_as(tmp_path, kind), MAP)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["answer"] for row in rows] == ["2", "4", "6", "8"]
    assert [int(row["level"]) for row in rows] == [1, 2, 3, 4]
    assert "question" not in rows[0]


def test_txt_records_by_blank_line_or_separator(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("One.\nStill one.\n\n\nTwo.\n<|end|>\nThree.\n")
    assert [row["prompt"] for row in read_rows(str(path))] == ["One.\nStill one.", "Two.\n<|end|>\nThree."]
    assert [row["prompt"] for row in read_rows(str(path), separator="<|end|>")] == ["One.\nStill one.\n\n\nTwo.", "Three."]


def test_hf_dataset_on_disk_with_splits(tmp_path):
    import datasets

    plain, split = tmp_path / "plain", tmp_path / "split"
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(plain))
    datasets.DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(str(split))
    assert [row["prompt"] for row in read_rows(str(plain), MAP)] == PROMPTS
    assert [row["prompt"] for row in read_rows(str(split), MAP, split="test")] == [PROMPTS[2]]
    with pytest.raises(UserError, match="no split 'tset': did you mean test"):
        read_rows(str(split), MAP, split="tset")


def test_tfds_set_without_tensorflow(tmp_path, run_python):
    # tfds asks for the file of a builder's module, so this one needs a file.
    (tmp_path / "sums.py").write_text("""
import numpy as np, tensorflow_datasets as tfds
class Sums(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    def _info(self):
        features = tfds.features.FeaturesDict({'question': tfds.features.Text(), 'level': np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, dl): return {'train': self._generate_examples()}
    def _generate_examples(self):
        for i in range(3): yield i, {'question': f'q\\u00e9{i}', 'level': i}
""")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from sums import Sums
builder = Sums(data_dir=sys.argv[1], file_format='array_record')
builder.download_and_prepare()
from jaxrl_llm.data.sources import read_rows
rows = read_rows(f'tfds:{builder.data_path}', {'prompt': 'question'})
assert sorted((r['prompt'], r['level']) for r in rows) == [(f'q\\u00e9{i}', i) for i in range(3)], rows
assert 'tensorflow' not in sys.modules
print(len(rows))
"""
    assert run_python(code, (str(tmp_path),)).strip().endswith("3")


def test_field_map_renames_formats_and_ignores(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"Body": "Two apples", "Q": "How many?", "Answer": 51.0, "id": 7}])
    (row,) = read_rows(path, {"prompt": "{Body}. {Q}", "answer": "Answer"})
    assert row == {"Body": "Two apples", "Q": "How many?", "id": "7", "prompt": "Two apples. How many?", "answer": "51"}
    (row,) = read_rows(path, {"prompt": "Q", "id": None})
    assert row["id"] != "7" and len(row["id"]) == 12


def test_field_map_as_config_text():
    assert parse_fields("") == {}
    assert parse_fields("prompt=question, id=") == {"prompt": "question", "id": None}
    assert parse_fields("prompt={Body}, {Q},answer=A") == {"prompt": "{Body}, {Q}", "answer": "A"}
    with pytest.raises(UserError, match="'question' is not NAME=COLUMN"):
        parse_fields("question")
    with pytest.raises(UserError, match=r"the format '\{q' is not whole"):
        parse_fields("prompt={q")
    for format_ in ("{q!z}", "{q:>9}"):
        with pytest.raises(UserError, match="may hold"):
            parse_fields(f"prompt={format_}")


def test_made_ids_follow_the_content_not_the_place(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    other = write_jsonl(tmp_path / "b.jsonl", [ROWS[1], ROWS[0]])
    first, second, third = (row["id"] for row in read_rows(path, MAP))
    assert third == f"{first}-2"
    assert [row["id"] for row in read_rows(other, MAP)] == [second, first]


def test_a_made_id_is_never_one_that_was_given(tmp_path):
    made = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}]))[0]["id"]
    rows = read_rows(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "y", "id": made}, {"prompt": "x"}]))
    assert rows[0]["id"] == made and rows[1]["id"] == f"{made}-"
    with pytest.raises(UserError, match="stands already at"):
        read_rows(write_jsonl(tmp_path / "c.jsonl", [{"prompt": "x"}, {"prompt": "y", "id": made}]))


def test_a_parquet_file_with_a_spoilt_page_names_the_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"a long enough prompt {i}" for i in range(500)]}), path, compression="snappy")
    data = bytearray(path.read_bytes())
    data[60:400] = bytes(340)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rows\.parquet: after row 0 the parquet file cannot be read"):
        read_rows(str(path))


def test_limit_and_chat_messages(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": messages}] * 5)
    rows = read_rows(path, limit=2)
    assert len(rows) == 2
    assert rows[0]["prompt"] == "Be brief.\nHi" and rows[0]["messages"] == messages


BAD_LINES = {
    "malformed": (b'{"prompt": "a"}\n{"prompt": \n', r"rows\.jsonl:2: not JSON"),
    "no object": (b'{"prompt": "a"}\n[1, 2]\n', r"rows\.jsonl:2: a list where an object"),
    "not utf-8": (b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n', r"rows\.jsonl:3: byte 16 of the line \(0xe9\) is not UTF-8"),
    "empty prompt": (b'{"prompt": "a"}\n{"prompt": "  "}\n', r"rows\.jsonl:2: field 'prompt' is empty"),
    "missing field": (b'{"prompt": "a"}\n{"promt": "b"}\n', r"rows\.jsonl:2: no field 'prompt': did you mean promt"),
    "not text": (b'{"prompt": "a"}\n{"prompt": 3}\n', r"rows\.jsonl:2: field 'prompt' is a int, not text"),
    "bad messages": (b'{"prompt": "a"}\n{"prompt": ["x"]}\n', r"rows\.jsonl:2: field 'prompt' is a list, but not of messages"),
    "half a surrogate pair": (b'{"prompt": "a"}\n{"prompt": "b\\ud83d"}\n', r"rows\.jsonl:2: field 'prompt' holds half of a surrogate pair"),
    "same id": (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', r"rows\.jsonl:2: id '1' stands already at .*rows\.jsonl:1"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_rows_name_file_line_and_field_or_are_skipped_and_counted(tmp_path, case):
    data, message = BAD_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(path))
    assert "\n" not in str(caught.value)
    rows = read_rows(str(path), on_bad="skip")
    assert [row["prompt"] for row in rows] == ["a"]
    assert sum(rows.skipped.values()) == 1


BAD_FILES = {
    "empty.jsonl": (b" \n", r"empty\.jsonl is empty"),
    "bytes.json": (b'[{"prompt": "a"},\n {"prompt": "\xff"}]', r"bytes\.json:2: byte 32 of the file \(0xff\) is not UTF-8"),
    "cut.json": (b'[{"prompt": "a"},\n {"prompt": "b"', r"cut\.json:2: not JSON"),
    "comma.json": (b'[{"prompt": "a"}\n {"prompt": "b"}]', r"comma\.json:2: not JSON \(a comma"),
    "trailing.json": (b'[{"prompt": "a"},\n]', r"trailing\.json:2: not JSON"),
    "after.json": (b'[{"prompt": "a"}]\n[]', r"after\.json:1: something follows"),
    "object.json": (b'{"prompt": \n oops}', r"object\.json:2: not JSON"),
    "lists.json": (b'{"a": [{"prompt": "x"}], "b": [{"prompt": "y"}]}', r"several lists of rows \(a, b\)"),
    "uneven.json": (b'{"a": [1, 2], "b": [1]}', r"columns of different lengths"),
    "number.json": (b"3", r"holds a int"),
    "short.csv": (b"prompt,answer\na,1\nb\n", r"short\.csv:3: 1 fields where the header has 2"),
    "quote.csv": (b'prompt,answer\n"a" x,1\n', r"quote\.csv:2: not CSV"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a"}\n')[:-6], r"cut\.jsonl\.gz is not a whole gzip file"),
    "cut.parquet": (b"PAR1 and no more", r"cut\.parquet is not a whole parquet file"),
    "rows.xml": (b"<row/>", r"cannot tell its format from '\.xml'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_quoted_newline_keeps_csv_lines_right(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer\n"two\nlines",1\n,2\n')
    with pytest.raises(UserError, match=r"rows\.csv:4: field 'prompt' is empty"):
        read_rows(str(path))


def test_wrong_paths_and_options_name_the_nearest(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"did you mean train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="there is no folder"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(UserError, match="not one that datasets.save_to_disk wrote"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match=r"no field 'qestion' \(wanted as 'prompt'\): did you mean question"):
        read_rows(path, {"prompt": "qestion"})
    with pytest.raises(UserError, match="no field 'boddy'"):
        read_rows(path, {"prompt": "{boddy}"})
    with pytest.raises(UserError, match="on_bad 'skp': did you mean skip"):
        read_rows(path, MAP, on_bad="skp")
    with pytest.raises(UserError, match="holds no row that can be used .skipped: 4 missing field"):
        read_rows(path, {"prompt": "qestion"}, on_bad="skip")


def test_real_files(assets):
    data = assets / "data"
    gsm8k = read_rows(str(data / "gsm8k" / "train.jsonl"), {"prompt": "question"})
    assert len(gsm8k) == len({row["id"] for row in gsm8k}) == 7473
    maths = read_rows(str(data / "math_train" / "train_math.json"), {"prompt": "problem"})
    assert len(maths) == len({row["id"] for row in maths}) == 7474
    answered = read_rows(str(data / "math_train" / "train_math.json"), {"prompt": "problem"}, required=("prompt", "answer"), on_bad="skip")
    assert dict(answered.skipped) == {"empty answer": len(maths) - len(answered)} and len(answered) < len(maths)
    assert len(read_rows(str(data / "humaneval" / "HumanEval.jsonl.gz"), {"id": "task_id"})) == 164
    assert len(read_rows(str(data / "svamp" / "SVAMP.json"), {"prompt": "{Body}. {Question}", "answer": "Answer"})) == 1000
    assert len(read_rows(str(data / "hanna" / "hanna_llm_stories.csv"), {"prompt": "Prompt"})) == 576
    stories = read_rows(str(data / "tinystories" / "tinystories_sample.txt"), separator="<|endoftext|>")
    assert 2316 <= len(stories) <= 2317 and stories[0]["prompt"].startswith("One day, a little girl named Lily")


def test_bytes_of_a_tfds_row_that_are_no_text_are_told():
    record = readers._tfds_record("tfds:x: row 3", {"prompt": b"caf\xe9"})
    assert record.where == "tfds:x: row 3" and "not UTF-8" in record.problem
    assert readers._tfds_record("x", {"prompt": "caf\u00e9".encode()}).columns == {"prompt": "caf\u00e9"}


def test_a_limit_below_one_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="limit 0: give the number of rows"):
        read_rows(str(tmp_path / "rows.jsonl"), limit=0)
