"""What the page of a SAERL experiment computes from its arms' records."""

import json

import numpy as np
import pytest

from jaxrl_llm.report import saerl


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
    vanilla = arm(tmp_path, "vanilla", [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4], [0.4] * 4)
    full = arm(tmp_path, "full", [0.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4], [0.5] * 4)
    row = saerl._arm_row(full, vanilla)
    # Trailing means of three: vanilla is at .4 at step 60, full (0 + .4 + .4) / 3 at 20, .4 at 30.
    assert row["steps_saved"]["value"] == pytest.approx(1 - 30 / 60)
    assert row["difference"]["value"] == pytest.approx(0.1) and row["steps_to_target"] == pytest.approx(30)


def test_no_steps_are_saved_on_the_way_to_where_the_baseline_began(tmp_path):
    vanilla = arm(tmp_path, "vanilla", [0.4, 0.4, 0.4, 0.4], [0.4] * 4)
    worse = arm(tmp_path, "full", [0.4, 0.37, 0.37, 0.37], [0.37] * 4)
    row = saerl._arm_row(worse, vanilla)
    assert row["steps_saved"] is None and row["steps_to_target"] is None and row["difference"]["value"] == pytest.approx(-0.03)
    assert "did not improve" in saerl._verdict(row, "full", "vanilla", "")


def test_an_item_without_a_verdict_is_left_out_of_the_difference(tmp_path):
    vanilla = arm(tmp_path, "vanilla", [0.0, 0.2], [0.0, 0.5, 0.0])
    full = arm(tmp_path, "full", [0.0, 0.3], [1.0, 0.5, None])
    row = saerl._arm_row(full, vanilla)
    assert row["difference"]["value"] == pytest.approx(0.5) and np.isfinite(row["difference"]["low"])
