"""What the page of a SAERL experiment computes from its arms' records."""

import json

import numpy as np
import pytest

from jaxrl_llm.config import load_config
from jaxrl_llm.report import saerl, sections
from jaxrl_llm.report.arms import Arms


def arm(folder, name, curve, rates):
    """An arm's metrics: accuracies `curve` at steps 0, 10, 20, ...; `rates` of each item at the end."""
    (folder / name).mkdir(parents=True)
    lines = [
        {"kind": "eval", "step": 10 * i, "set": "test", "avg_at_k": a, "rates": rates, "by_avg_at_k": {"level": {"1": a}}}
        for i, a in enumerate(curve)
    ]
    lines += [{"kind": "train", "step": i + 1, "zero_spread": 0.5, "rows": [0]} for i in range(10 * (len(curve) - 1))]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return saerl.ArmRuns([folder], name)


def test_steps_saved_are_those_to_the_baselines_end(tmp_path):
    vanilla = arm(tmp_path, "vanilla", [0.0, 0.1, 0.2, 0.3, 0.4], [0.4] * 4)
    full = arm(tmp_path, "full", [0.0, 0.3, 0.5, 0.5, 0.5], [0.5] * 4)
    row = saerl._arm_row(full, vanilla, full, [0])
    assert row["steps_saved"]["value"] == pytest.approx(1 - 15 / 40) and row["steps_to_target"] == pytest.approx(15)
    assert row["difference"]["value"] == pytest.approx(0.1) and row["by_base"] == {"0": pytest.approx(0.1)}
    back = saerl._arm_row(vanilla, full, full, [0])
    assert back["steps_saved"]["value"] == pytest.approx(-(1 - 15 / 40)) and back["steps_to_target"] is None
    assert back["main_minus"]["value"] == pytest.approx(0.1) and "main_minus" not in row


def test_an_arm_of_another_length_saves_no_share_of_the_run(tmp_path):
    vanilla = arm(tmp_path, "vanilla", [0.0, 0.1, 0.2], [0.2] * 4)
    double = arm(tmp_path, "vanilla_double", [0.0, 0.1, 0.2, 0.3, 0.4], [0.4] * 4)
    row = saerl._arm_row(double, vanilla, vanilla, [0])
    assert row["steps_saved"] is None and row["steps_to_target"] == pytest.approx(20) and row["difference"]["value"] == pytest.approx(0.2)
    assert "since vanilla_double and vanilla were trained for different numbers" in saerl._verdict(row, "vanilla_double", "vanilla", "")


def test_the_best_control_starts_where_the_main_arm_does():
    """An arm from another start is no control of the features, and a gap within its interval is called noise."""

    def row(accuracy, low, high):
        return {"accuracy": {"value": accuracy}, "main_minus": {"value": 0.4 - accuracy, "low": low, "high": high}}

    config = load_config("configs/saerl.py:lab", {"arms": ("vanilla", "full", "full_told", "full_tuned", "full_dense")})
    rows = {"full": {"accuracy": {"value": 0.4}}, "full_told": row(0.5, -0.2, 0.0), "full_tuned": row(0.39, -0.01, 0.03)}
    rows["full_dense"] = row(0.3, 0.1, 0.1)
    assert saerl._attribution(config, {"wrong": rows}) == "It is within the noise of its best control, full tuned (+1.0 points, 95% -1.0 to +3.0)."
    rows["full_tuned"] = row(0.39, 0.005, 0.015)
    assert saerl._attribution(config, {"wrong": rows}).startswith("It beats its best control, full tuned")


def test_no_steps_are_saved_on_the_way_to_where_the_baseline_began(tmp_path):
    vanilla = arm(tmp_path, "vanilla", [0.4, 0.4, 0.4, 0.4], [0.4] * 4)
    worse = arm(tmp_path, "full", [0.4, 0.37, 0.37, 0.37], [0.37] * 4)
    row = saerl._arm_row(worse, vanilla, worse, [0])
    assert row["steps_saved"] is None and row["steps_to_target"] is None and row["difference"]["value"] == pytest.approx(-0.03)
    assert "since full did not improve" in saerl._verdict(row, "full", "vanilla", "")


def test_the_headline_names_the_arm_that_did_not_improve(tmp_path):
    """Whichever it is: the curve beside the sentence shows it."""
    rising, flat = arm(tmp_path, "rising", [0.1, 0.2, 0.3], [0.3] * 4), arm(tmp_path, "flat", [0.1, 0.1, 0.1], [0.1] * 4)
    for main, baseline in ((flat, rising), (rising, flat)):
        row = saerl._arm_row(main, baseline, main, [0])
        assert "since flat did not improve" in saerl._verdict(row, main.arm, baseline.arm, "")
        facts = saerl._facts({main.arm: row, baseline.arm: saerl._arm_row(baseline, baseline, main, [0])}, main.arm, baseline.arm)
        assert facts[1]["detail"] == "flat did not improve"


def test_a_run_without_controls_says_that_it_cannot_tell_what_brings_the_gain(tmp_path):
    vanilla, full = arm(tmp_path, "vanilla", [0.0, 0.2], [0.2] * 4), arm(tmp_path, "full", [0.0, 0.3], [0.3] * 4)
    rows = {runs.arm: saerl._arm_row(runs, vanilla, full, [0]) for runs in (vanilla, full)}
    rows["full_tuned"] = rows["vanilla"] | {"arm": "full_tuned"}
    demo, controlled = (load_config("configs/saerl.py:demo", changes) for changes in ({}, {"arms": ("vanilla", "full", "full_tuned")}))
    headline = saerl._headline(demo, {"wrong": rows}, 1)
    assert headline.endswith("One seed and no control of the SAE: a demonstration, not evidence.") and len(headline) < 260
    assert saerl._headline(controlled, {"wrong": rows}, 1).endswith("One seed: a demonstration, not evidence.")
    assert saerl._headline(demo, {"wrong": rows}, 6).endswith("6 paired runs and no control of the SAE.")


def test_an_item_without_a_verdict_is_left_out_of_the_difference(tmp_path):
    vanilla = arm(tmp_path, "vanilla", [0.0, 0.2], [0.0, 0.5, 0.0])
    full = arm(tmp_path, "full", [0.0, 0.3], [1.0, 0.5, None])
    row = saerl._arm_row(full, vanilla, full, [0])
    assert row["difference"]["value"] == pytest.approx(0.5) and np.isfinite(row["difference"]["low"])


def test_the_tables_count_rollouts_where_steps_take_several(tmp_path):
    """Resampling makes a step dearer; without it the column is not there."""
    vanilla, full = (arm(tmp_path, name, [0.0, 0.2], [0.2] * 4) for name in ("vanilla", "full"))
    config = load_config("configs/saerl.py:dapo", {"arms": ("vanilla", "full")})

    def tables():
        rows = {runs.arm: saerl._arm_row(runs, vanilla, full, [0]) for runs in (vanilla, full)}
        return saerl.markdown(config, {"pools": {"wrong": rows}}), sections.arms_tables([{"title": "", "rows": list(rows.values())}], Arms([]))

    assert not any("rollouts a step" in table for table in tables())
    vanilla.rollouts = 2.75
    assert all("rollouts a step" in table and "2.75" in table for table in tables())
    path = tmp_path / "full" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"rows": [0]', '"rows": [0], "rollouts": 3'))
    assert saerl.ArmRuns([tmp_path], "full").rollouts == 3
