r"""Finding and comparing maths answers: hand-made cases, every real reference against itself, and hostile input."""

import collections
import json
import sys
import threading
import time

import pytest

from jaxrl_llm.rewards import maths
from jaxrl_llm.rewards.maths import MathsReward, extract_answer, normalise
from jaxrl_llm.rewards.verdict import RewardInput, Status


@pytest.fixture(scope="module")
def reward():
    reward = MathsReward()
    yield reward
    reward.pool.close()


def judge(reward, gold, response):
    return reward([RewardInput(prompt="", response=response, answer=gold)])[0]


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{1} and then, cut off, \boxed{2", "1"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\text{a}{b}} }", r"\text{a}{b}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ 7 } #### 8", "7"),
        (r"\boxed{}", ""),
        ("#### 3\nno:\n#### 1,234\n", "1,234"),
        ("48/2 = <<48/2=24>>24 clips\n#### 24 clips", "24 clips"),
        ("The answer is 3.5. Thank you.", "3.5"),
        ("The answer is 1/2, I think. No, wait. The answer is 3", "3"),
        ("**Answer:** 5", "5"),
        ("**Answer**: 5", "5"),
        ("I add both.\nThe final answer is: $\\frac{2}{3}$ of it.", r"\frac{2}{3}"),
        ("I add both.\nThe answer is \\(x+1\\).", "x+1"),
        ("the answer is $5 per day.", "$5 per day"),
        ("  42\n", "42"),
        ("first line\nsecond line", None),
        ("", None),
        ("the answer is\n5 or so", None),
    ],
)
def test_the_stated_answer_is_found(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 30_000, "\\boxed{1}" * 30_000, "{" * 200_000, "#### " * 30_000, "answer is " * 30_000, "answer" + "*" * 200_000],
)
def test_extraction_is_linear_in_the_text(text, reward):
    began = time.process_time()
    assert judge(reward, "77", text).status is Status.FAIL
    assert time.process_time() - began < 5  # a quadratic scan of these takes minutes


@pytest.mark.parametrize(
    "text, spelling",
    [
        (r"$\dfrac 3 8$", r"\frac{3}{8}"),
        (r"\frac59", r"\frac{5}{9}"),
        (r"-\frac{17}7", r"-\frac{17}{7}"),
        (r"\frac\pi 2", r"\frac{\pi}{2}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"4,\!989,\!600", "4989600"),
        ("10{,}000", "10000"),
        ("1,234,567.50", "1234567.50"),
        ("1,2", "1,2"),
        (r"\$15.17", "15.17"),
        (r"7\text{ hours}.", "7"),
        (r"5\text{ cm}^2", "5"),
        ("18 dollars per day", "18"),
        ("3 million", "3 million"),
        ("3 or 4", "3 or 4"),
        ("3 5", "3 5"),
        (r"83^\circ", "83"),
        (r"300^{\circ}", "300"),
        ("25 \\%", "25%"),
        ("x = 5", "x=5"),
        (".039", "0.039"),
        (r"\text{(C)}", "C"),
        ("(1, 2)", "(1,2)"),
        ("2 1/2", r"2\frac{1}{2}"),
        ("−3", "-3"),
    ],
)
def test_normalised_spelling(text, spelling):
    assert normalise(text) == spelling


SAME = [
    ("1/2", "0.5"),
    (r"\frac{3}{4}", "75%"),
    (r"25\%", "0.25"),
    (r"25\%", "25"),
    ("20", "20%"),
    (r"1\frac{1}{2}", "3/2"),
    ("2 1/2", "2.5"),
    ("1/3", "0.333333"),
    ("72", "72.00"),
    ("1,000", "$1000"),
    ("Evelyn", "evelyn"),
    ("1024", "2^10"),
    (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2"),
    (r"2\pi", "2*pi"),
    ("x^2+x-2", "(x+2)(x-1)"),
    (r"\sin^2 t", r"1-\cos^2 t"),
    ("1,-1,i,-i", "i, -i, 1, -1"),
    ("y=2x-3", "2x-y=3"),
    ("x=1,000", "1000"),
    ("5", "n = 5"),
    ("k=3", "k = 3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2/2\\2\end{pmatrix}"),
    (r"(-\infty,3)\cup(4,5)", r"(4,5)\cup(-\infty,3)"),
]
DIFFERENT = [
    ("1/3", "0.333"),
    ("1000000", "1000001"),
    ("5", "5.00001"),
    ("5", "five"),
    ("3", "3 million"),
    ("3", "3 or 4"),
    ("35", "3 5"),
    ("12", "12 apples and 3 pears"),
    ("(1,8)", "[1,8]"),
    (r"\text{odd}", r"\text{even}"),
    ("x^2", "x^3"),
    ("x=5", "y=5"),
    ("5", "1/0"),
    ("5", "{{{"),
    ("5", "\\" * 50),
    ("5", ""),
    ("5", r"\boxed{}"),
    ("5", "I do not know.\nSorry."),
]


def test_equal_and_unequal_answers(reward):
    inputs = [RewardInput("", f"\\boxed{{{answer}}}" if "boxed" not in answer else answer, gold) for gold, answer in SAME]
    assert [(item.answer, item.response) for item, verdict in zip(inputs, reward(inputs), strict=True) if verdict.status != "pass"] == []
    inputs = [RewardInput("", answer, gold) for gold, answer in DIFFERENT]
    verdicts = reward(inputs)
    assert [(item, verdict) for item, verdict in zip(inputs, verdicts, strict=True) if verdict.status != "fail"] == []
    assert all(verdict.reason for verdict in verdicts)


def test_the_tolerance_is_a_knob():
    assert judge(MathsReward(rel_tol=1e-2), "1/3", "0.333").status is Status.PASS
    assert judge(MathsReward(rel_tol=1e-2), "100", "101").status is Status.FAIL  # integers are exact whatever the tolerance
    assert judge(MathsReward(rel_tol=0.0), "1/3", "0.333333").status is Status.FAIL


@pytest.mark.parametrize("gold", [None, "", "  ", r"\boxed{}", "{{{", r"\frac{1"])
def test_a_reference_that_cannot_be_read_is_an_error(reward, gold):
    verdict = judge(reward, gold, "the answer is x+1")
    assert verdict.status is Status.ERROR and "reference" in verdict.reason


def test_every_gsm8k_reference_verifies_itself(assets):
    reward = MathsReward()
    rows = [json.loads(line) for name in ("train", "test") for line in (assets / f"data/gsm8k/{name}.jsonl").open(encoding="utf-8")]
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows]
    assert sum("," in gold for gold in golds) > 50  # thousands separators
    spoken = [
        RewardInput(row["question"], f"So the answer is ${gold.replace(',', '')}.", row["answer"])
        for row, gold in zip(rows, golds, strict=True)
    ]
    worked = [RewardInput(row["question"], row["answer"], row["answer"]) for row in rows]
    wrong = [RewardInput(row["question"], f"#### {gold.replace(',', '')}1", row["answer"]) for row, gold in zip(rows, golds, strict=True)]
    assert {verdict.status for verdict in reward(worked + spoken)} == {Status.PASS}
    assert {verdict.status for verdict in reward(wrong)} == {Status.FAIL}
    assert reward.pool._alive == []  # numbers never need the child processes


def test_every_math_reference_verifies_itself(assets, reward):
    rows = json.loads((assets / "data/math_train/train_math.json").read_text(encoding="utf-8"))
    verdicts = reward([RewardInput(row["problem"], f"Hence $\\boxed{{{row['answer']}}}$.", row["answer"]) for row in rows])
    counts = collections.Counter(verdict.status for verdict in verdicts)
    assert counts == {Status.PASS: len(rows) - 4, Status.ERROR: 4}
    # Two answers are empty and two are null.
    assert [row["answer"] for row, v in zip(rows, verdicts, strict=True) if v.status is Status.ERROR].count("") == 2
    solved = json.loads((assets / "data/math500/math500_test.json").read_text(encoding="utf-8"))
    verdicts = reward([RewardInput(row["problem"], row["solution"], row["answer"]) for row in solved])
    assert {verdict.status for verdict in verdicts} == {Status.PASS}


def test_real_symbolic_references_pass_the_symbolic_step(assets, reward):
    rows = json.loads((assets / "data/math500/math500_test.json").read_text(encoding="utf-8"))
    golds = sorted({normalise(row["answer"]) for row in rows})
    golds = [gold for gold in golds if maths.read_number(gold) is None and not maths._is_words(gold)]
    assert len(golds) > 80
    outcomes = reward.pool.compare([(maths.to_latex(gold), maths.to_latex(gold)) for gold in golds])
    assert [gold for gold, outcome in zip(golds, outcomes, strict=True) if outcome != "equal"] == []


def test_huge_powers_time_out_and_the_rest_of_the_batch_is_judged():
    reward = MathsReward(timeout_s=2.0)  # in which a busy machine compares what is fine
    towers = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9^{9^{9}}}", "9**9**9**9"]
    fine = [r"\boxed{(x+2)(x-1)}", r"\boxed{x^2}"]
    inputs = [RewardInput("", text, "x^2+x-2") for text in [*towers, *fine]]
    statuses = [verdict.status for verdict in reward(inputs)]
    assert statuses[:2] == [Status.TIMEOUT] * 2 and statuses[2] in (Status.TIMEOUT, Status.FAIL)
    assert statuses[3:] == [Status.PASS, Status.FAIL]
    assert judge(reward, "x^2+x-2", fine[0]).status is Status.PASS  # killed processes were replaced
    reward.pool.close()


def test_works_in_a_thread_of_a_jax_program():
    import jax

    assert int(jax.jit(lambda x: x + 1)(1)) == 2
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(maths.check(r"\boxed{(x+2)(x-1)}", "x^2+x-2")))
    thread.start()
    thread.join()
    assert verdicts[0].status is Status.PASS


def test_nothing_a_model_writes_is_run(reward, tmp_path):
    mark = tmp_path / "ran"
    attacks = [
        f"__import__('pathlib').Path('{mark}').touch()",
        f"\\text{{__import__('pathlib').Path('{mark}').touch()}}",
        f"\\operatorname{{eval}}(open('{mark}', 'w'))",
        f"x_{{__import__('pathlib').Path('{mark}').touch()}}",
        f"'; open('{mark}', 'w'); '",
    ]
    verdicts = reward([RewardInput("", f"\\boxed{{{attack}}}", "x+1") for attack in attacks])
    assert [verdict.status for verdict in verdicts] == [Status.FAIL] * len(attacks)
    assert not mark.exists()


def test_equal_pairs_are_compared_once(monkeypatch):
    reward = MathsReward()
    sent = []
    monkeypatch.setattr(reward.pool, "compare", lambda pairs: sent.extend(pairs) or ["equal"] * len(pairs))
    verdicts = reward([RewardInput("", "(x-1)(x+2)", "x^2+x-2")] * 5 + [RewardInput("", "7", "7")])
    assert len(sent) == 1 and {verdict.status for verdict in verdicts} == {Status.PASS}


def test_the_module_does_not_import_jax(run_python):
    code = "import sys, jaxrl_llm.rewards.maths, jaxrl_llm.rewards.registry; print([m for m in ('jax', 'sympy') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


if sys.platform == "linux":

    def test_the_children_do_not_load_jax(reward):
        import pathlib

        judge(reward, "x^2+x-2", "(x+2)(x-1)")
        for worker in reward.pool._alive:
            assert "jaxlib" not in pathlib.Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert reward.pool._alive
