import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.report import summarise
from jaxrl_llm.report.arms import Arms
from jaxrl_llm.report.charts_data import effective_clusters, histogram, pool_schedule, schedule_charts
from jaxrl_llm.report.charts_lines import panel_chart, running_mean, thin
from jaxrl_llm.report.sections_detail import features, flatten
from jaxrl_llm.report.svg import Scale, clip, domain, duration, interval, line_path, number, spread, ticks


@pytest.mark.parametrize(
    ("value", "how", "shown"),
    [
        (0.42345, {"percent": True}, "42.3%"),
        (0.0341, {"percent": True, "signed": True}, "+3.4"),
        (-0.016, {"percent": True, "signed": True}, "−1.6"),
        (-0.0001, {"percent": True, "signed": True}, "0.0"),
        (None, {}, "–"),
        (1204, {}, "1,204"),
        (0.7154, {}, "0.715"),
        (0.00001, {}, "1e−5"),
        (2.0, {"digits": 3}, "2.000"),
    ],
)
def test_numbers_are_written_for_people(value, how, shown):
    assert number(value, **how) == shown


def test_intervals_durations_and_clipping():
    assert interval(0.021, 0.034, percent=True) == "2.1 to 3.4%"
    assert interval(None, 0.3) == ""
    assert (duration(8.21), duration(245), duration(11520)) == ("8.2 s", "4 min 05 s", "3 h 12 min")
    assert clip("abcdef", 4) == "abc…" and clip("abcd", 4) == "abcd"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_inside_even_and_few(low, span, count):
    values = ticks(low, low + span, count)
    assert all(low - 1e-6 * span <= v <= low + span * (1 + 1e-6) for v in values)
    assert len(values) <= count + 1
    gaps = np.diff(values)
    assert gaps.size == 0 or np.allclose(gaps, gaps[0], rtol=1e-3)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=14))
def test_spread_labels_never_overlap_and_keep_their_order(wanted):
    placed = spread(wanted, 17, 0, 300)
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(np.array(placed)[order]) >= 17 - 1e-6)
    assert min(placed) >= -1e-9 and max(placed) <= 300 + 1e-9


def test_spread_leaves_labels_that_have_room_where_they_belong():
    assert spread([10.0, 200.0, 100.0], 17, 0, 300) == [10.0, 200.0, 100.0]


def test_scales_map_both_ends_and_logs():
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 100, log=True)(10) == pytest.approx(50)


def test_domains_hold_the_values_and_never_start_below_zero_without_need():
    assert domain([0.0, 1.0], pad=0.1) == (0.0, 1.1)
    low, high = domain([3.0, 3.0, None])
    assert low < 3.0 < high
    assert domain([]) == (0.0, 1.0)


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    assert line_path([(0, 1), (1, 2), (2, None), (3, 4)]) == "M0 1L1 2M3 4h.01"


def test_the_running_mean_and_thinning_keep_gaps_and_means():
    assert running_mean([1.0, 2.0, None, 5.0], 1) == [1.5, 1.5, None, 5.0]
    steps, values = thin(list(range(1000)), [float(i) for i in range(1000)], 10)
    assert len(steps) == 10 and values[0] == pytest.approx(49.5) and steps[-1] == pytest.approx(949.5)
    assert thin([0, 1], [1.0, None], 10) == ([0, 1], [1.0, None])


def test_a_log_panel_with_a_zero_falls_back_to_a_linear_axis():
    def drawn(values):
        return panel_chart({"title": "p", "log": True, "series": [{"label": "x", "steps": [1, 2], "values": values}]})

    logged = [re.search(r'data-hover="([^"]*)"', drawn(values))[1].split()[-1] for values in ([1e-6, 1e-3], [0.0, 1e-3])]
    assert logged == ["1", "0"]


def test_histogram_puts_outliers_into_the_outer_bins():
    assert histogram([-5, 0.1, 0.6, 0.9, 7], 0, 1, 2) == [2, 3]


def test_effective_clusters_of_even_and_single_batches():
    assert effective_clusters([[8, 8, 8, 8]]) == pytest.approx(4)
    assert effective_clusters([[8, 0], [4, 4]]) == pytest.approx(1.5)
    assert effective_clusters([[0, 0]]) is None


def test_long_schedules_are_pooled_without_losing_prompts():
    batches = [np.arange(4) + i % 5 for i in range(150)]
    cluster = np.array([0, 1, 0, 1, 2, 2, 0, 1])
    record = summarise.schedule("a", batches, np.linspace(0, 1, 8), cluster)
    pooled = pool_schedule(record)
    assert len(pooled["from"]) == 60 and pooled["from"][0] == 0 and pooled["to"][-1] == 149
    assert np.sum(pooled["counts"]) == 600
    assert len(schedule_charts([record], Arms([]))) == 1


def test_a_schedule_is_summarised_by_hand_checked_quantiles_and_counts():
    difficulty = np.array([0.0, 0.25, 0.5, 0.75, 1.0, np.nan])
    record = summarise.schedule("a", [[0, 1, 2, 3, 4, 5], [5]], difficulty, [7, 7, 9, 9, 9, -1], steps=[3, 6])
    assert record["steps"] == [3, 6] and record["clusters"] == ["7", "9"] and record["counts"] == [[2, 3], [0, 0]]
    assert record["quantiles"]["50"][0] == 0.5 and record["quantiles"]["25"][0] == 0.25
    assert math.isnan(record["quantiles"]["50"][1])


def test_calibration_bins_by_hand():
    bins = summarise.calibration_bins([0.1, 0.15, 0.9, 1.0], [0.0, 0.5, 1.0, 0.8], bins=2)
    assert [(b["count"], round(b["predicted"], 3), b["observed"]) for b in bins] == [(2, 0.125, 0.25), (2, 0.95, 0.9)]
    half = 1.96 * np.std([1.0, 0.8], ddof=1) / np.sqrt(2)
    assert bins[1]["low"] == pytest.approx(0.9 - half) and bins[1]["high"] == 1.0
    assert len(summarise.calibration_bins([0.5], [1.0], bins=4)) == 1
    section = summarise.calibration({"SAE": [0.1, 0.9]}, [0.0, 1.0], bins=2, spearman={"SAE": {"value": 1.0}})
    assert section["series"][0]["spearman"] == {"value": 1.0} and len(section["series"][0]["bins"]) == 2


def test_arms_keep_their_colours_and_the_main_arm_lies_on_top():
    arms = Arms([{"name": "a", "role": "baseline"}, {"name": "b", "label": "Bee", "role": "main"}, {"name": "c"}])
    assert [arms.colour(n) for n in "abc"] == ["var(--baseline)", "var(--main)", "var(--c0)"]
    assert arms.drawing_order(["b", "a", "c"]) == ["c", "a", "b"] and arms.reading_order(["a", "c", "b"]) == ["b", "a", "c"]
    assert arms.label("b") == "Bee" and arms.baseline == "a" and arms.main == "b"
    many = Arms([{"name": str(i)} for i in range(14)])
    styles = {(many.colour(str(i)), many.dash(str(i))) for i in range(14)}
    assert len(styles) == 14


def test_tokens_are_tinted_by_their_share_of_the_strongest():
    item = {"id": 3, "drives": "difficulty", "contexts": [{"tokens": ["▁a", "<b>", "c"], "activations": [4.0, 1.0, 0.0]}]}
    html = features([item])
    assert re.findall(r"--a:([\d.]+)", html) == ["1.00", "0.25"]
    assert "<mark" in html and "&lt;b&gt;</mark>c</code>" in html and "> a</mark>" in html


def test_flatten_makes_dotted_keys_in_order():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == [("a.b", 1), ("a.c.d", [2]), ("e", {})]
