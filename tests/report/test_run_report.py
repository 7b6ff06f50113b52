import json

import pytest
from fake_run import write_run
from fake_saerl import saerl_data

from jaxrl_llm.cli import main
from jaxrl_llm.errors import UserError
from jaxrl_llm.report import build_report, run_report, save_data
from jaxrl_llm.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", steps=30)
    return tmp_path / "run"


def test_a_grpo_run_becomes_curves_panels_samples_and_config(run):
    data = run_report(run)
    assert data["title"] == "grpo: run"
    assert data["headline"].startswith("Accuracy on test went from 39.8% at step 15 to 45.8% at step 30")
    first, by_level = data["curves"]
    assert [s["arm"] for s in first["series"]] == ["test", "test, avg@4"] and first["series"][0]["steps"] == [15, 30]
    assert [s["arm"] for s in by_level["series"]] == [f"level {k}" for k in range(1, 6)]
    titles = [panel["title"] for panel in data["panels"]]
    assert {"Reward", "Pass rate", "Groups of equal rewards", "Entropy of the policy", "Gradient norm", "My own metric"} <= set(titles)
    times = next(panel for panel in data["panels"] if panel["title"] == "Seconds a step")
    assert [series["label"] for series in times["series"]] == ["rollout", "update"]
    assert data["panels_note"] == "The same at every step: clip_share 0, seconds_reward 0.05, errors 0."
    assert [item["prompt"] for item in data["rollouts"]] == ["Question 30?", "Question 15?"]
    assert [r["status"] for r in data["rollouts"][0]["responses"]] == ["FAIL", "PASS", "FAIL", "PASS"]
    assert data["config"]["optimizer"]["clip_norm"] == 1.0 and data["provenance"]["seeds"] == [7]
    assert sum(stage["seconds"] for stage in data["provenance"]["stages"]) > 0
    assert "My own metric" in build_report(data)


def test_judging_beside_the_next_rollout_is_not_counted_twice(tmp_path):
    for name, waited in (("plain", None), ("overlapped", 1.0)):
        run = RunDir(tmp_path / name, {}, kind="grpo")
        times = {"seconds_rollout": 4.0, "seconds_reward": 3.0, "seconds_update": 2.0}
        for step in (1, 2):
            run.log({"kind": "train", "step": step, "reward": 0.5} | times | ({} if waited is None else {"seconds_reward_waited": waited}))
        run.summary({})
        stages = {stage["name"]: stage["seconds"] for stage in run_report(tmp_path / name)["provenance"]["stages"]}
        assert stages == {"rollout": 8.0, "update": 4.0} | ({"reward": 6.0} if waited is None else {"waited for the reward": 2.0})


def test_the_held_out_reward_is_drawn_where_it_says_more_than_accuracy(tmp_path):
    for name, reward in (("same", 0.5), ("graded", 0.75)):  # a verdict of 0 or 1, and one of degrees
        run = RunDir(tmp_path / name, {}, kind="grpo")
        for step in (0, 10):
            record = {"kind": "eval", "step": step, "set": "new", "accuracy": 0.5, "reward": reward, "k": 4, "avg_at_k": 0.4}
            run.log(record | {"reward_at_k": reward - 0.1})
    assert [chart["title"] for chart in run_report(tmp_path / "same")["curves"]] == ["Held-out accuracy"]
    chart = run_report(tmp_path / "graded")["curves"][1]
    assert [(s["arm"], s["mean"]) for s in chart["series"]] == [("new", [0.75, 0.75]), ("new, avg@4", [0.65, 0.65])]
    assert chart["percent"] is False and chart["y_label"] == "reward"


def test_title_and_number_of_samples_are_the_callers(run):
    data = run_report(run, title="Mine", samples=1)
    assert data["title"] == "Mine" and [item["prompt"] for item in data["rollouts"]] == ["Question 30?"]


def test_a_reward_of_zero_or_one_has_one_panel(tmp_path):
    run = RunDir(tmp_path / "r", {}, kind="grpo")
    for step in (1, 2, 3):
        run.log({"kind": "train", "step": step, "reward": step / 10, "pass_rate": step / 10})
    assert [panel["title"] for panel in run_report(tmp_path / "r")["panels"]] == ["Pass rate"]


def test_an_sft_run_and_a_generate_run_are_pages_too(tmp_path):
    sft = RunDir(tmp_path / "sft", {"seed": 1}, kind="sft")
    for step in range(1, 21):
        sft.log({"kind": "sft", "step": step, "loss": 3.0 / step, "learning_rate": 1e-3 / step})
    data = run_report(tmp_path / "sft")
    assert data["headline"].startswith("Loss went from 2.25 to 0.154") and "curves" not in data["left_out"]
    build_report(data)
    generated = RunDir(tmp_path / "gen", {}, kind="generate")
    for i in range(3):
        generated.sample({"id": "a", "sample": i, "prompt": "<p>", "completion": "<c>", "finish": "length"})
    data = run_report(tmp_path / "gen")
    assert [r["status"] for r in data["rollouts"][0]["responses"]] == ["UNJUDGED"] * 3
    html = build_report(data)
    assert "&lt;c&gt;" in html and "unjudged" not in html


def test_an_experiments_own_data_wins(run):
    save_data(run, saerl_data(prompts=30))
    assert run_report(run)["title"] == "SAERL on the lab world"
    assert run_report(run, title="Other")["title"] == "Other"
    assert '<section id="prompt_map">' in build_report(run_report(run))


def test_missing_and_empty_directories_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        run_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds nothing to report"):
        run_report(tmp_path)
    RunDir(tmp_path / "new", {}, kind="grpo")
    with pytest.raises(UserError, match="no records in metrics.jsonl"):
        run_report(tmp_path / "new")


@pytest.mark.parametrize(("line", "what"), [("{broken", "is not JSON"), ("[1, 2]", "must be a JSON object, it is a list")])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_broken_line_is_named_with_file_and_line(run, name, line, what):
    lines = (run / name).read_text().splitlines()
    (run / name).write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=f"{name}:2 {what}"):
        run_report(run)


def test_a_last_line_cut_by_a_kill_is_left_out_but_not_another(run):
    whole = run_report(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert run_report(run) == whole
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:33 is not JSON"):
        run_report(run)


@pytest.mark.parametrize(("text", "what"), [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_config_is_named(run, text, what):
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json {what}"):
        run_report(run)


def test_a_report_json_that_does_not_fit_names_the_place(run):
    (run / "report.json").write_text(json.dumps({"title": "t"}))
    with pytest.raises(UserError, match="headline is missing"):
        run_report(run)


def test_the_verb_writes_the_page_and_tells_its_mistakes(run, tmp_path, capsys):
    assert main(["report", f"--workdir={run}"]) == 0
    assert "report.html" in capsys.readouterr().out and (run / "report.html").read_text().startswith("<!doctype html>")
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
