"""Evaluation: greedy and avg@k against a count by hand, breakdown, errors, batches."""

import numpy as np
import pytest
import tiny_grpo as tiny

import models
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.train.evaluate import evaluate


def odd(text):
    return sum(map(int, text.split())) % 2 == 1


def reward(inputs):
    """PASS when the written numbers add up to an odd one: some do, whatever the policy."""
    return [Verdict(Status.PASS if odd(i.response) else Status.FAIL) for i in inputs]


def run(reward=reward, **kwargs):
    return evaluate(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), tiny.prompts(), reward, max_new_tokens=6, **kwargs)


def test_greedy_accuracy_and_breakdown_by_hand():
    prompts = tiny.prompts()
    rollout = models.generate(tiny.CONFIG, tiny.params(), prompts.token_lists(), max_new_tokens=6, temperature=0.0)
    passed = [odd(tiny.Tokenizer().decode(c)) for c in rollout.completions()]
    record = run(by=("level", "no such field"))
    assert 0 < np.mean(passed) < 1
    assert record["accuracy"] == pytest.approx(np.mean(passed)) and record["n"] == 12 and record["errors"] == 0
    assert record["passed"] == [int(p) for p in passed]
    assert record["by"]["level"] == {"0": pytest.approx(np.mean(passed[0::2])), "1": pytest.approx(np.mean(passed[1::2]))}
    assert record["by"]["no such field"] == {} and "avg_at_k" not in record


def test_avg_at_k_counts_every_sample_and_seed_matters():
    calls = []

    def counting(inputs):
        calls.append(len(inputs))
        return reward(inputs)

    record = run(counting, samples=5, by=("level",))
    assert calls == [12, 60] and record["k"] == 5 and 0 < record["avg_at_k"] < 1
    assert np.mean(list(record["by_avg_at_k"]["level"].values())) == pytest.approx(record["avg_at_k"])
    assert run(samples=5)["avg_at_k"] == record["avg_at_k"]
    assert run(samples=5, seed=1)["avg_at_k"] != record["avg_at_k"]
    assert run(samples=5, temperature=1e-4)["avg_at_k"] == pytest.approx(record["accuracy"])


def test_the_reward_is_the_mean_value_of_the_verdicts():
    """Beside accuracy, where a verdict has degrees: here the share of odd numbers, PASS where all are; errors are left out of both."""

    def graded(inputs):
        shares = [np.mean([int(word) % 2 for word in i.response.split()] or [0]) for i in inputs]
        made = [Verdict(Status.PASS if share == 1 else Status.FAIL, score=float(share)) for share in shares]
        return [Verdict(Status.ERROR) if i.prompt == "prompt 0" else v for i, v in zip(inputs, made, strict=True)]

    record = run(graded, samples=3)
    rollout = models.generate(tiny.CONFIG, tiny.params(), tiny.prompts().token_lists(), max_new_tokens=6, temperature=0.0)
    texts = [tiny.Tokenizer().decode(c) for c in rollout.completions()][1:]
    shares = [np.mean([int(word) % 2 for word in text.split()] or [0]) for text in texts]
    assert record["reward"] == pytest.approx(np.mean(shares)) and record["accuracy"] == np.mean(np.equal(shares, 1)) != record["reward"]
    assert record["avg_at_k"] < record["reward_at_k"] < 1 and record["reward_at_k"] != record["reward"]
    plain = run(samples=2)
    assert (plain["reward"], plain["reward_at_k"]) == (plain["accuracy"], plain["avg_at_k"]) and "reward_at_k" not in run()


def test_batch_size_changes_nothing():
    assert run(samples=2, batch_rows=4) == run(samples=2)


def test_errors_are_left_out_and_counted():
    def broken_on_odd(inputs):
        return [Verdict(Status.ERROR) if int(i.prompt.split()[1]) % 2 else v for i, v in zip(inputs, reward(inputs), strict=True)]

    record, whole = run(broken_on_odd), run()
    assert record["errors"] == 6 and record["n"] == 6
    assert record["accuracy"] == pytest.approx(np.mean(whole["passed"][0::2])) and record["passed"][1] is None
