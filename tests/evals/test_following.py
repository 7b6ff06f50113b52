"""What responses follow: by hand, and that what cannot be said counts nowhere."""

import numpy as np
import pytest

from jaxrl_llm.data.story_themes import keeps_theme
from jaxrl_llm.evals.following import FIGURES, agreement, by_prompt, figure_of, follow, gain_of
from jaxrl_llm.evals.statistics import wilson
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.rewards.verif import VerifReward

NO_COMMA = {"name": "punctuation:no_comma", "kwargs": {}}
TITLE = {"name": "detectable_format:title", "kwargs": {}}
UNMET = {"name": "logic:if", "kwargs": {"condition": TITLE, "then": NO_COMMA}}
ANIMAL = "Write about an animal."
ROWS = [
    {"id": "a", "constraints": [NO_COMMA, TITLE], "checkers": [f"[llm] {ANIMAL}"], "functions": [""]},
    {"id": "b", "constraints": [NO_COMMA], "checkers": [f"[llm] {ANIMAL}"], "functions": [""]},
    {"id": "c", "constraints": [UNMET]},
    {"id": "d", "checkers": ["[rule] Short"], "functions": ["def check_following(i, r):\n    return len(r) < 9"]},
]
RESPONSES = ["Well, sure:\n<<A cat>>", "so, a, b</think>a dog", "x", "A long answer\nof 4."]
JUDGED = [Verdict(Status.PASS), Verdict(Status.FAIL), Verdict(Status.NOT_APPLICABLE), Verdict(Status.INFRASTRUCTURE)]


@pytest.fixture(scope="module")
def found():
    return follow(ROWS, RESPONSES, VerifReward(use="rules"), keeps_theme, JUDGED)


def test_by_hand(found):
    """The first keeps its rules loosely (without its first line), the second strictly, the third has a condition that is not met, the fourth keeps
    its rule, which comes as Python, loosely."""
    assert found["strict"] == [[0, 1], [1], [None], [0]] and found["loose"] == [[1, 1], [1], [None], [1]]
    assert found["soft"] == [1, 1, None, None] and found["judged"] == [1, 0, None, None]
    nan = np.nan
    wanted = {
        "instructions": [0.5, 1, nan, 0], "instructions_loose": [1, 1, nan, 1], "prompts": [0, 1, nan, 0], "prompts_loose": [1, 1, nan, 1],
        "soft": [1, 1, nan, nan], "everything": [0, 1, nan, 0], "judged": [1, 0, nan, nan],
    }  # fmt: skip
    assert set(wanted) == set(FIGURES)
    for figure, values in wanted.items():
        np.testing.assert_array_equal(by_prompt(found, figure), values, figure)


def test_a_blank_response_keeps_nothing_and_no_truth_is_no_figure():
    blank = follow(ROWS[:2], ["", "so</think> "], VerifReward(use="rules"))
    assert blank["strict"] == blank["loose"] == [[0, 0], [0]] and blank["soft"] == blank["judged"] == [None, None]
    assert figure_of([blank], "soft") is None and gain_of([blank], blank, "judged") is None and agreement(blank)["accuracy"] is None


def test_figures_have_their_intervals(found):
    assert figure_of([found], "prompts") == wilson(1, 3)
    rules = figure_of([found], "instructions")
    assert rules.estimate == pytest.approx(2 / 4) and rules.low < 0.5 < rules.high  # over instructions, not the mean over prompts
    assert figure_of([found], "instructions_loose") == wilson(3, 3)  # of three prompts: that none varies is no certainty
    both = figure_of([found, follow(ROWS, ["<<a cat>>", "a dog", "x", "4"], VerifReward(use="rules"), keeps_theme)], "prompts")
    assert both.estimate == pytest.approx(4 / 6)
    better = follow(ROWS, ["<<a cat>>", "a dog", "x", "4"], VerifReward(use="rules"), keeps_theme)
    gain = gain_of([better, better], found, "prompts")
    assert gain.estimate == pytest.approx(2 / 3) and gain_of([found], found, "prompts").estimate == 0


def test_the_judge_against_the_truth(found):
    told = agreement(found)
    assert told["accuracy"] == wilson(1, 2) == told["sensitivity"] and told["specificity"] is None and (told["n"], told["without"]) == (2, 0)
    lost = agreement(found | {"judged": [None, 0, None, None]})
    assert (lost["n"], lost["without"]) == (1, 1)
