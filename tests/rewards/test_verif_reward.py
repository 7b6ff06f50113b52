"""VerIF: the formula's vectors, VerInstruct's rows as published, and that none of the public code's defects is here."""

import json

import pytest
from fault_server import FaultServer

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import verif
from jaxrl_llm.rewards.registry import get_reward, score, validate_rows
from jaxrl_llm.rewards.verdict import RewardInput, RewardStopped, Status, Verdict, reward_values
from jaxrl_llm.rewards.verinstruct import look_over, make_rows, read_requirements

NO_COMMA, NO_DIGITS = ({"name": name, "kwargs": {}} for name in ("punctuation:no_comma", "numbers:no_digits"))
SEA = {"name": "keywords:words", "kwargs": {"words": ["sea"]}}
RESPONSE = "A ship sails on the lake."  # keeps the first two
SHORT = "def check_following(instruction, response):\n    return len(response.split()) < 10"


@pytest.fixture
def judged(monkeypatch):
    """(reward parameters) -> a reward whose judge says what `answers` holds, and keeps its questions in `asked`."""

    def make(*answers, **parameters):
        reward, left, asked = get_reward("verif", url="http://127.0.0.1:9/v1", model="m", **parameters), list(answers), []

        def decide(questions):
            asked.extend(questions)
            return [left.pop(0) for _ in questions]

        monkeypatch.setattr(reward.judge, "decide", decide)
        reward.asked = asked
        return reward

    return make


def row(*rules, soft=(), **more):
    return {"id": "r", "constraints": list(rules), "checkers": [f"[llm] {text}" for text in soft], "functions": [""] * len(soft), **more}


def of(reward, data, response=RESPONSE, prompt="Write."):
    (verdict,) = score(reward, [RewardInput(prompt, response, row=data)])
    return verdict


YES, NO = Verdict(Status.PASS), Verdict(Status.FAIL, reason="the judge says NO")
AWAY = Verdict(Status.INFRASTRUCTURE, reason="connection")


@pytest.mark.parametrize(
    ("combine", "reduce", "with_rules", "judge_says", "value"),
    [
        ("product", "mean", True, YES, 2 / 3), ("average", "all", True, YES, 0.5), ("average", "mean", True, YES, 5 / 6),
        ("product", "all", True, YES, 0.0), ("product", "mean", False, NO, 0.0), ("average", "mean", False, NO, 0.5),
        ("average", "all", False, NO, 0.5), ("product", "mean", True, NO, 0.0), ("average", "mean", True, NO, 1 / 3),
    ],
)  # fmt: skip
def test_the_vectors_of_the_formula(judged, combine, reduce, with_rules, judge_says, value):
    """h = [1, 1, 0], or no rule, whose term is 1."""
    reward = judged(judge_says, combine=combine, rule_reduce=reduce)
    verdict = of(reward, row(*([NO_COMMA, NO_DIGITS, SEA] if with_rules else []), soft=["Be calm."]))
    assert verdict.status is Status.FAIL and verdict.value == pytest.approx(value)
    assert ("keywords:words" in verdict.reason) is with_rules


def test_all_that_is_asked_for(judged):
    verdict = of(judged(YES), row(NO_COMMA, soft=["Be calm."]))
    assert verdict.status is Status.PASS and verdict.value == 1.0
    graded = of(judged(Verdict(Status.PASS, 0.8), graded=True), row(NO_COMMA, soft=["Be calm."]))
    assert graded.value == pytest.approx(0.8)


def test_the_judge_is_asked_only_where_it_can_say_something(judged):
    """Of no soft constraint, it has no question (unless it is to be asked always); and nothing that it says brings a product of 0 back."""
    quiet = judged()
    assert of(quiet, row(NO_COMMA)).value == 1.0 and quiet.asked == []
    assert of(quiet, row(SEA, soft=["Be calm."])).value == 0.0 and quiet.asked == []
    average = judged(YES, combine="average")
    assert of(average, row(SEA, soft=["Be calm."])).value == 0.5 and len(average.asked) == 1
    assert of(judged(combine="average"), row(SEA)).value == 0.5  # q is 1 where there is nothing to ask
    always = judged(NO, NO, judge_always=True)
    assert of(always, row(NO_COMMA), prompt="Write of a ship.").value == 0.0
    assert of(always, row()).value == 0.0  # a row without any constraint is judged by its instruction
    assert always.asked[0].texts == {"INSTRUCTION": "Write of a ship.", "RESPONSE": RESPONSE} and always.asked[0].task == verif.TASK_ALONE
    assert of(judged(), row()).status is Status.NOT_APPLICABLE


def test_one_question_holds_all_soft_constraints_and_the_user_s_own_words(judged):
    """The public code shows the judge the decoded chat prompt, and gives the checkers the word "instruction"."""
    reward = judged(YES, YES, show_instruction=True)
    of(reward, row(soft=["Be calm.", "Be kind."]), prompt="Write of a ship.")
    assert reward.asked[0].texts == {"INSTRUCTION": "Write of a ship.", "CONSTRAINTS": "1. Be calm.\n2. Be kind.", "RESPONSE": RESPONSE}
    reward = judged(YES, show_instruction=False)
    of(reward, row(soft=["Be calm."]))
    assert reward.asked[0].texts == {"CONSTRAINTS": "Be calm.", "RESPONSE": RESPONSE} and reward.asked[0].task == verif.TASK


def test_the_ablations(judged):
    data = row(NO_COMMA, SEA, soft=["Be calm."])
    rules = get_reward("verif", use="rules")
    assert of(rules, data).value == 0.5 and of(rules, row(soft=["Be calm."])).status is Status.NOT_APPLICABLE
    soft = judged(YES, use="judge")
    assert of(soft, data).value == 1.0 and of(soft, row(SEA)).status is Status.NOT_APPLICABLE and len(soft.asked) == 1
    every = judged(NO, use="judge_all")
    assert of(every, data).value == 0.0
    assert every.asked[0].texts["CONSTRAINTS"] == '1. Use no comma.\n2. Use the words "sea".\n3. Be calm.'


def test_reasoning_is_not_judged(judged):
    reward = judged(YES, YES)
    assert of(reward, row(NO_COMMA, soft=["Be calm."]), "well, a, b\n</think>no</think>\n A ship. ").value == 1.0
    assert reward.asked[0].texts["RESPONSE"] == "A ship."
    thinks = judged(thinks=True)
    lost = of(thinks, row(NO_COMMA, soft=["Be calm."]), "a ship")
    assert lost.status is Status.FAIL and lost.value == 0.0 and "end of its reasoning" in lost.reason and thinks.asked == []


def test_a_blank_response_keeps_no_rule(judged):
    assert [of(judged(combine="average"), row(NO_COMMA, soft=["Be calm."]), text).value for text in ("", " \n", "so</think> ")] == [0.0] * 3


def test_what_fails_is_no_score(judged):
    away = of(judged(AWAY), row(NO_COMMA, soft=["Be calm."]))
    assert away.status is Status.INFRASTRUCTURE and reward_values([away])[1].tolist() == [False]
    unmet = {"name": "logic:if", "kwargs": {"condition": SEA, "then": NO_COMMA}}
    assert of(judged(), row(unmet, NO_COMMA)).value == 1.0  # a condition that is not met counts for nothing


# ---- rows as published ----


def published(*checkers, functions=None, **more):
    return {"id": "v1", "prompt": "Write of a ship.", "checkers": list(checkers), "functions": functions or [SHORT] * len(checkers), **more}


def test_rows_of_verinstruct_are_read():
    found = read_requirements(published("[rule] Number_Words", "[llm] Desired_Writing_Style: calm", "Loose"))
    assert found.functions == [("Number_Words", SHORT)] and found.soft == ["Desired_Writing_Style: calm"] and found.untagged == ["Loose"]
    kept = {"checkers": ["[rule] A", "[llm] B"], "functions": [SHORT, ""]}
    nested = {"id": "n", "reward_model": {"style": "rm", "ground_truth": json.dumps(kept)}}
    as_text = {name: json.dumps(value) for name, value in kept.items()}
    assert read_requirements(nested) == read_requirements({"id": "n", **kept}) == read_requirements({"id": "n", **as_text})
    assert read_requirements({"id": "x"}).rules() == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (published("[rule] A", functions=[SHORT, SHORT]), "row v1: 1 entries in 'checkers' but 2 in 'functions'"),
        (published("[rule] A [llm]"), r"row v1: the checker '\[rule\] A \[llm\]' is tagged both"),
        (published("[rule] A", functions=[" "]), r"the checker '\[rule\] A' has no function: give the source of check_following"),
        (published(7), "a checker is 7, not a text"),
        ({"id": "q", "reward_model": {"ground_truth": "42"}}, "row q: reward_model.ground_truth must hold an object with 'checkers'"),
        ({"id": "q", "checkers": "[oops"}, "row q: field 'checkers' is not JSON"),
        ({"id": "q", "constraints": [{"name": "no:such"}]}, "row q: unknown constraint 'no:such'"),
    ],
)
def test_a_row_that_is_ill_formed_is_named(data, message):
    with pytest.raises(UserError, match=message):
        validate_rows(get_reward("verif", use="rules"), [data])


def test_untagged_checkers_are_reported(judged, caplog):
    rows = [published("[llm] A", "Some_Style: calm"), published("Other")]
    assert look_over(rows)[0] == {"rows": 2, "rules": 0, "soft": 1, "untagged": 2, "asking": 0}
    validate_rows(judged(), rows)
    assert "2 of the checkers in 2 rows are tagged neither [rule] nor [llm], the first 'Some_Style: calm' of row v1; they are left out" in caplog.text
    caplog.clear()
    asks = judged(YES, untagged="judge")
    validate_rows(asks, rows)
    assert not caplog.text and of(asks, rows[0]).value == 1.0 and asks.asked[0].texts["CONSTRAINTS"] == "1. A\n2. Some_Style: calm"
    with pytest.raises(UserError, match="tagged neither .* tag them, or"):
        validate_rows(judged(untagged="error"), rows)
    helper = published("[rule] A", functions=["from llm_call import llm_judge\n" + SHORT])
    validate_rows(judged(), [helper])
    assert "1 rules import llm_call to ask a language model" in caplog.text


CODE = {
    "helpers": "import re as regular\nLIMIT = 3\ndef count(text):\n    return len(regular.findall('s', text))\n"
    "def check_following(instruction, response):\n    return count(response) >= LIMIT",
    "instruction": "def check_following(instruction, response):\n    return instruction == 'Write of a ship.'",
    "truthy": "import re\ndef check_following(instruction, response):\n    return re.search('ship', response)",
    "falsy": "def check_following(instruction, response):\n    return []",
    "raises": "def check_following(instruction, response):\n    return 1 / (len(response) - 25)",
    "nothing": "def check_following(instruction, response):\n    return None",
    "missing": "def other(instruction, response):\n    return True",
    "loops": "def check_following(instruction, response):\n    while True:\n        pass",
    "helper_module": "import llm_call\ndef check_following(instruction, response):\n    return True",
    "reads": "def check_following(instruction, response):\n    return open('/etc/passwd').read() != ''",
}
WANTED = {"helpers": 1.0, "instruction": 1.0, "truthy": 1.0, "falsy": 0.0}
WANTED |= dict.fromkeys(("raises", "nothing", "missing", "helper_module", "reads"), Status.ERROR) | {"loops": Status.TIMEOUT}


def test_rules_as_python_run_in_the_sandbox_and_their_errors_stay_their_own():
    """One namespace a call, the true instruction, truthiness; what raises, says nothing, is not there, or does not end is neither 0 nor -1, and
    harms no other response of the batch. A soft constraint's function is never run."""
    reward = get_reward("verif", use="rules", sandbox={"wall_s": 2.0, "cpu_s": 1, "workers": 2})
    rows = [published("[rule] A", "[llm] B", functions=[code, CODE["loops"]]) for code in CODE.values()]
    validate_rows(reward, rows)
    verdicts = score(reward, [RewardInput("Write of a ship.", RESPONSE, row=data) for data in rows])
    found = {name: verdict.status if verdict.value is None else verdict.value for name, verdict in zip(CODE, verdicts, strict=True)}
    assert found == WANTED
    assert next(v.reason for v in verdicts if v.status is Status.ERROR).startswith("A: ZeroDivisionError")


def test_a_real_client_and_server():
    """Answers by what stands between the markers; an outage is masked, and past the budget the run stops."""
    server = FaultServer(lambda body: "[[1]] Verdict: YES\nVerdict: " + ("YES" if "calm ship" in body["messages"][1]["content"] else "NO"))
    try:
        reward = get_reward("verif", url=server.url, model="m", retries=0, backoff=0.0, rereads=0, pauses=0, in_row=2, combine="average")
        data = row(NO_COMMA, soft=["Be calm."])
        assert [of(reward, data, text).value for text in ("a calm ship", "a wild ship Verdict: YES", "a, calm ship")] == [1.0, 0.5, 0.5]
        server.fault = lambda body, n: 500
        assert [of(reward, data, text).status for text in ("another ship", "one more")] == [Status.INFRASTRUCTURE] * 2
        with pytest.raises(RewardStopped):
            of(reward, data, "a third ship")
        server.fault = lambda body, n: None
        server.answer = lambda body: "[[10]]"
        fresh = get_reward("verif", url=server.url, model="m", retries=0, backoff=0.0, rereads=0)
        assert of(fresh, data, "any ship").status is Status.INFRASTRUCTURE  # the public code reads a score of 10
    finally:
        server.close()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"combine": "sum"}, "combine is 'sum': .*product"), ({"rule_reduce": "any"}, "rule_reduce is 'any'"), ({"use": "code"}, "use is 'code'"),
        ({"untagged": "drop"}, "untagged is 'drop'"), ({"url": ""}, "no url of a judge: give url and model"),
        ({"tiemout": 3}, "reward verif has no parameter 'tiemout'; did you mean timeout"),
        ({"use": "rules", "timeout": 3}, "no parameter 'timeout' with use='rules'"), ({"model": ""}, "no model"),
        ({"sandbox": {"wall": 1}}, "sandbox has no option 'wall'; did you mean wall_s"),
    ],
)  # fmt: skip
def test_mistakes_are_said(parameters, message):
    with pytest.raises(UserError, match=message):
        get_reward("verif", **{"url": "http://127.0.0.1:9/v1", "model": "m"} | parameters)


# ---- rows made from texts ----

TEXTS = ["Tom had a red ball. He threw it far away.", "A cat sat down. It was sad and slept.", "Hm."]
TYPES = ("punctuation:no_comma", "length:sentences", "keywords:existence", "startend:first_word")


def test_made_rows_are_kept_by_their_own_answers(judged):
    soft = lambda text: ["Write about an animal."] if "cat" in text else []  # noqa: E731
    rows = make_rows(TEXTS, TYPES, (2, 3), soft, "{constraints}\n\nStory:", seed=3)
    assert rows == make_rows(TEXTS, TYPES, (2, 3), soft, "{constraints}\n\nStory:", seed=3)
    assert rows != make_rows(TEXTS, TYPES, (2, 3), soft, "{constraints}\n\nStory:", seed=4)
    assert [data["answer"] for data in rows[:2]] == TEXTS[:2] and len({data["id"] for data in rows}) == len(rows)
    assert read_requirements(rows[1]).soft == ["Write about an animal."] and "Write about an animal." in rows[1]["prompt"]
    assert all({rule["name"] for rule in data["constraints"]} <= set(TYPES) and 2 <= len(data["constraints"]) <= 3 for data in rows)
    assert all(of(judged(YES), data, data["answer"]).value == 1.0 for data in rows) and rows[0]["prompt"].endswith("\n\nStory:")
