"""Difficulty labels from columns, from steps, from rollouts."""

import jax
import numpy as np
import pytest

import models
from jaxrl_llm.curation.labels import labels_from_rows, pass_rates, policy_roll_out
from jaxrl_llm.data import lab_world
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.verdict import Status, Verdict

ROWS = [
    {"id": "a", "answer": "3*4 = <<3*4=12>>12\n12+1 = <<12+1=13>>13\n#### 13", "level": "Level 3", "difficulty": 5.0},
    {"id": "b", "answer": "#### 4", "level": "Level ?", "difficulty": None},
    {"id": "c", "answer": "", "level": "1/5", "difficulty": 2},
    {"id": "d", "answer": None},
]


def test_columns_and_steps():
    assert labels_from_rows(ROWS, "steps:answer")[:2].tolist() == [2, 0]
    assert np.isnan(labels_from_rows(ROWS, "steps:answer")[2:]).all(), "an empty answer is no answer of no steps"
    np.testing.assert_array_equal(labels_from_rows(ROWS, "level"), [3, np.nan, 1, np.nan])
    np.testing.assert_array_equal(labels_from_rows(ROWS, "difficulty"), [5, np.nan, 2, np.nan])


@pytest.mark.parametrize(
    "expression, message",
    [("levle", "did you mean level"), ("count:answer", "steps:COLUMN"), ("id", "no row has a number")],
)
def test_mistakes_are_named(expression, message):
    with pytest.raises(UserError, match=message):
        labels_from_rows(ROWS, expression)


def judged(name):
    """Fixed verdicts: a passes 3 of 4, b has one error, c only errors, d a graded score."""
    verdict = {"p": Verdict(Status.PASS), "f": Verdict(Status.FAIL), "e": Verdict(Status.ERROR), "s": Verdict(Status.FAIL, 0.25)}
    return [verdict[letter] for letter in {"a": "pppf", "b": "pfee", "c": "eeee", "d": "sssp"}[name]]


def test_pass_rates_mask_errors_and_go_on_after_a_stop(tmp_path):
    calls, ticks = [], []

    def roll_out(rows, number):
        calls.append([row["id"] for row in rows])
        return [judged(row["id"]) for row in rows]

    path = tmp_path / "rates.jsonl"
    rates, errors = pass_rates(ROWS, np.array([0, 1, 3]), roll_out, path=path, batch_prompts=2, progress=ticks.append)
    np.testing.assert_allclose(rates, [0.75, 0.5, np.nan, 0.4375])
    assert errors == 2 and calls == [["a", "b"], ["d"]] and ticks == [2, 1]
    again, errors = pass_rates(ROWS, np.array([0, 1, 2, 3]), roll_out, path=path, batch_prompts=2)
    np.testing.assert_allclose(again, rates)
    assert calls[2:] == [["c", "d"]] and errors == 6, "only batches that miss a row are rolled out, but whole: the noise belongs to the batch"


@pytest.mark.parametrize("cut", [5, 1])
def test_a_last_line_that_a_full_disk_cut_is_rolled_out_again(tmp_path, cut):
    path, calls = tmp_path / "rates.jsonl", []

    def roll_out(rows, number):
        calls.append([row["id"] for row in rows])
        return [judged(row["id"]) for row in rows]

    expected, errors = pass_rates(ROWS, np.arange(4), roll_out, path=path, batch_prompts=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    for missing in ([["c", "d"]] if cut > 1 else [], []):  # where only the newline is missing the line counts
        calls.clear()
        rates, again = pass_rates(ROWS, np.arange(4), roll_out, path=path, batch_prompts=2)
        np.testing.assert_array_equal(rates, expected)
        assert calls == missing and again == errors and path.read_bytes() == whole


def test_a_run_that_goes_on_has_the_pass_rates_of_one_that_never_stopped(tmp_path):
    """The policy's own noise: rows that were done when the run stopped, inside a batch, change nothing for the others; and no batch of one
    seed has the noise of a batch of another."""
    tokenizer = lab_world.build_tokenizer()
    cfg = models.ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, max_position=64,
        eos_token_ids=(),
    )  # fmt: skip
    params = models.init(cfg, jax.random.key(0))

    def roll_out(seed):
        return policy_roll_out(cfg, params, tokenizer, coin, samples=8, seed=seed, max_new_tokens=4)

    def coin(inputs):
        return [Verdict(Status.PASS if sum(map(ord, item.response)) % 2 else Status.FAIL) for item in inputs]

    rows = [{"id": str(i), "prompt": f"{i} plus {i} =", "answer": "1"} for i in range(8)]
    path = tmp_path / "rates.jsonl"
    whole, _ = pass_rates(rows, np.arange(8), roll_out(0), path=path, batch_prompts=4)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    again, _ = pass_rates(rows, np.arange(8), roll_out(0), path=path, batch_prompts=4)
    np.testing.assert_array_equal(again, whole)
    assert [v.value for vs in roll_out(0)(rows, 1) for v in vs] != [v.value for vs in roll_out(1)(rows, 0) for v in vs]
    for size in (3, 8):  # how many prompts are rolled out at once changes nothing
        np.testing.assert_array_equal(pass_rates(rows, np.arange(8), roll_out(0), batch_prompts=size)[0], whole)
    assert len(set(whole)) > 3
