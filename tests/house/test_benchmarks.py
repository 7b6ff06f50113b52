"""What the benchmarks share: the JSON line, the ratio's direction, peers that are there, absent or broken, the record."""

import json
import sys

import pytest

from benchmarks import common
from benchmarks.common import Figure


def test_a_figure_has_the_agreed_keys_and_its_ratio_favours_us():
    figure = Figure("generation", 12345.678, "tokens/s", peer="tunix", peer_value=4600.0, compile_s=1.5, shape="batch 64")
    assert figure.record() == {
        "name": "generation",
        "value": 12350.0,
        "unit": "tokens/s",
        "peer": "tunix",
        "peer_value": 4600.0,
        "ratio": 2.684,
        "compile_s": 1.5,
        "shape": "batch 64",
    }
    assert Figure("step", 1.5, "s", peer="tunix", peer_value=3.0, better="lower").ratio == 2.0
    assert Figure("step", 1.5, "s", peer="tunix").ratio is None


def test_timed_waits_and_keeps_the_first_call_apart():
    calls = []
    compile_s, seconds = common.timed(lambda: calls.append(1), repeats=3, warm_up=2)
    assert len(calls) == 6 and len(seconds) == 3 and compile_s >= 0
    assert common.median([3, 1, 2]) == 2 and common.median([4, 1, 2, 3]) == 2.5


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A repository with one peer environment (this Python) and the scripts that the test writes."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / ".venvs" / "here" / "bin").mkdir(parents=True)
    (tmp_path / ".venvs" / "here" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "benchmarks" / "peers").mkdir(parents=True)
    return tmp_path


def test_a_peer_gets_its_arguments_and_none_of_our_path(environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    script = "import json, os, sys\nprint('talk')\nprint(json.dumps({'value': len(sys.argv), 'path': os.environ.get('PYTHONPATH')}))\n"
    (environment / "benchmarks" / "peers" / "ok.py").write_text(script)
    found = common.run_peer("here", "ok", ["--batch", 64])
    assert found == {"value": 3, "path": None}
    assert common.peer_value(found) == 3


def test_a_peer_that_is_absent_broken_or_slow_is_not_measured(environment, capsys):
    peers = environment / "benchmarks" / "peers"
    (peers / "bad.py").write_text("raise ValueError('no such thing')\n")
    (peers / "slow.py").write_text("import time; time.sleep(60)\n")
    assert common.run_peer("absent", "ok") is None
    assert capsys.readouterr().err == ""
    assert common.run_peer("here", "bad") is None
    assert "no such thing" in capsys.readouterr().err
    assert common.run_peer("here", "slow", timeout=0.5) is None
    assert "no result after" in capsys.readouterr().err
    assert common.peer_value(None) is None


def test_figures_are_printed_and_recorded(tmp_path, monkeypatch, capsys):
    results = tmp_path / "RESULTS.md"
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(common.append_results, "__defaults__", (results,))
    monkeypatch.setattr(sys, "argv", ["benchmarks/generation.py", "--record", "--rows", "8"])

    def measure(args):
        assert args.peers and args.repeats == 5
        yield Figure("generation", float(args.rows), "tokens/s")

    for _ in range(2):
        common.run_benchmark(measure, "A benchmark.", lambda parser: parser.add_argument("--rows", type=int))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["value"] for line in lines] == [8.0, 8.0] and lines[0]["ratio"] is None
    text = results.read_text()
    assert text.count("# Results of the benchmarks") == 1
    assert text.count("`python -m benchmarks.generation --record --rows 8`") == 2
    assert text.count("| generation | 8.0 | tokens/s |") == 2
    assert " cores, " in text and "jax 0." in text


def test_without_record_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(common.append_results, "__defaults__", (tmp_path / "RESULTS.md",))
    monkeypatch.setattr(sys, "argv", ["benchmarks/generation.py"])
    common.run_benchmark(lambda args: [Figure("x", 1.0, "s")], "A benchmark.")
    assert not (tmp_path / "RESULTS.md").exists()
