"""What the benchmarks share: the JSON line, the ratio's direction, peers that are there, absent or broken, the record."""

import json
import os
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


def test_calls_that_take_turns_each_keep_their_first_apart():
    order = []
    found = common.timed_in_turns({"ours": lambda: order.append("ours"), "peer": lambda: order.append("peer")}, repeats=2)
    assert order == ["ours", "peer"] * 3
    assert {name: len(seconds) for name, (_, seconds) in found.items()} == {"ours": 2, "peer": 2}
    assert all(compile_s >= 0 for compile_s, _ in found.values())


def test_the_peers_run_the_model_that_we_run(repo, run_python):
    code = "import json, peer_common; print(json.dumps(vars(peer_common), default=str))"
    constants = json.loads(run_python(code, env={"PYTHONPATH": f"{repo}/benchmarks/peers"}))
    cfg = common.small_qwen2()
    ours = (cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, cfg.d_ff, cfg.vocab_size)
    assert ours == tuple(constants[name] for name in ("HIDDEN", "LAYERS", "HEADS", "KV_HEADS", "MLP", "VOCAB"))
    assert cfg.dtype == "float32" and cfg.head_dim == cfg.d_model // cfg.n_heads and cfg.tie_embeddings


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
    assert text.count("| generation | 8.0 | tokens/s |") == 3, "in both records, and once as the newest"
    assert " cores, " in text and "jax 0." in text


def test_without_record_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(common.append_results, "__defaults__", (tmp_path / "RESULTS.md",))
    monkeypatch.setattr(sys, "argv", ["benchmarks/generation.py"])
    common.run_benchmark(lambda args: [Figure("x", 1.0, "s")], "A benchmark.")
    assert not (tmp_path / "RESULTS.md").exists()


def test_a_benchmark_that_fails_records_what_it_had(tmp_path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    monkeypatch.setattr(common.append_results, "__defaults__", (results,))
    monkeypatch.setattr(sys, "argv", ["benchmarks/generation.py", "--record"])

    def measure(args):
        yield Figure("done", 1.0, "s")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        common.run_benchmark(measure, "A benchmark.")
    assert results.read_text().count("| done | 1.0 | s |") == 2


def test_the_newest_figures_stand_first_with_their_goals(tmp_path):
    row = "| {} | {} | {} | {} | {} | {} | | {} |"
    text = "\n".join([
        "# Old heading", "", "| kept | out |", "", "## 2026-01-01 `a`", "",
        row.format("speed", 1.0, "x/s", "peer 1", 1.0, 1.0, "batch 2; goal 1.5 x"),
        row.format("size", 3.0, "GiB", "", "", "", "goal under 2 GiB"), "", "## 2026-01-02 `b`", "",
        row.format("speed", 2.0, "x/s", "peer 2", 1.0, 2.0, "batch 2; goal 1.5 x"), row.format("plain", 5.0, "s", "", "", "", "no aim"),
        row.format("odd", 277.0, "x/s", "", "", "", "goal 100 a second"), "",
    ])  # fmt: skip
    common.write_results(tmp_path / "R.md", text)
    head, log = (tmp_path / "R.md").read_text().split("## 2026-01-01")
    assert "| size | 3.0 | GiB |  | under 2 GiB | NO | 2026-01-01 |" in head and "| plain | 5.0 | s |  |  |  | 2026-01-02 |" in head
    assert "| speed | 2.0 | x/s | 2.0 (peer 2) | 1.5 x | yes | 2026-01-02 |" in head and head.count("| speed |") == 1 and "kept" not in head
    assert "| odd | 277.0 | x/s |  | 100 a second |  | 2026-01-02 |" in head  # what cannot be read is neither met nor missed
    assert log.count("| speed |") == 2
    common.write_results(tmp_path / "R.md", (tmp_path / "R.md").read_text())
    assert (tmp_path / "R.md").read_text() == head + "## 2026-01-01" + log


@pytest.mark.parametrize(("flags", "platforms"), [([], "cpu"), (["--no-peers"], None)])
def test_beside_peers_jax_keeps_to_the_cpu(monkeypatch, flags, platforms):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(sys, "argv", ["benchmarks/generation.py", *flags])
    seen = []
    common.run_benchmark(lambda args: seen.append(os.environ.get("JAX_PLATFORMS")) or [], "A benchmark.")
    assert seen == [platforms]


def test_what_is_awaited_is_named_until_it_is_measured(tmp_path):
    common.write_results(tmp_path / "R.md", "")
    assert "| train_mfu_1.5b_h200 | not measured | % |  | at least 45 % |  |  |" in (tmp_path / "R.md").read_text()
    goals = {"decode_bound_1.5b_h200": 49.9, "train_mfu_1.5b_h200": 45.0, "grpo_0.5b_h200": 7.5}
    goals |= {"sae_encode_jumprelu_h200": 59.9, "sae_encode_topk_h200": 61.0, "sae_stream_h200": 49.0}
    rows = [f"| {name} | {value} | x | | | | | a shape; goal {common.AWAITED[name][1]} |" for name, value in goals.items()]
    common.write_results(tmp_path / "R.md", "\n".join(["## 2026-01-01 `a`", "", *rows, ""]))
    head = (tmp_path / "R.md").read_text().partition("## ")[0]
    assert "not measured" not in head and [line.split(" | ")[5] for line in head.splitlines() if "_h200" in line] == ["NO", "yes", "NO"] * 2
    assert set(goals) == set(common.AWAITED)


def test_the_record_names_what_is_awaited(repo):
    table = (repo / "benchmarks" / "RESULTS.md").read_text().partition("\n## ")[0]
    assert all(f"| {name} | " in table for name in common.AWAITED)
