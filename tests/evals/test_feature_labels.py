"""Labels from a server: what it is shown, how its answers are read and scored, and that nothing that fails becomes a score."""

import json

import numpy as np
import pytest
from label_server import FakeServer, is_labelling

from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.feature_labels import (
    HOPELESS,
    LabelConfig,
    balanced_accuracy,
    label_features,
    negatives,
    read_label,
    read_matches,
    split_contexts,
)
from jaxrl_llm.rewards.chat import Unreadable

WORDS = ["the ", "ball ", "cup ", "red ", "dog ", "hat ", "is ", "ran "]


def data(n=3):
    """n features, of which feature i fires on word i + 1; random contexts without those words and with them."""

    def context(kind, text, own):
        return {"kind": kind, "text": text, "tokens": [0, own, 6, text % 2 * 7], "fires": [[1, 2.0]], "peak": 1, "first": 0}

    features = [
        {"id": 10 * i, "max": 4.0, "contexts": [context("top", k, i + 1) for k in range(6)] + [context("sampled", k, i + 1) for k in range(6, 12)]}
        for i in range(n)
    ]
    random = [{"kind": "random", "text": 50 + k, "tokens": [0, 6, 0, 7], "fired": []} for k in range(6)]
    random += [{"kind": "random", "text": 60, "tokens": [1, 1], "fired": [0]}]
    return {"features": features, "random": random, "vocabulary": {str(i): word for i, word in enumerate(WORDS)}}


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.close()


def settings(server, **changes):
    return LabelConfig(**{"url": server.url, "model": "m", "wait": 0.0, "timeout": 5.0, "retries": 1, "workers": 1} | changes)


def label(server, of=None, done=(), **changes):
    records = []
    label_features(of or data(), settings(server, **changes), records.append, done=done)
    return records


def test_labels_and_scores_of_a_judge_that_follows_them(server):
    records = label(server)
    found = [(r["id"], r["label"], r["score"], r["judged"]) for r in records]
    assert found == [(10 * i, f"the word {w}", 1.0, 8) for i, w in enumerate(("ball", "cup", "red"))]


def test_the_judge_is_shown_other_contexts_without_marks(server):
    label(server, data(1))
    shown, judged = [body["messages"][1]["content"] for body in server.seen]
    told, held = split_contexts(data()["features"][0])
    assert len(told) == 8 and len(held) == 4 and not {c["text"] for c in told} & {c["text"] for c in held}
    assert shown.count("«ball »") == 8 and shown.startswith('50: "the «ball »is ')  # half of the feature's largest
    assert "«" not in judged and judged.count("ball") == 5 and judged.count("the is the ran") == 4  # its label and the held-out texts
    assert server.headers[0] == ("/v1/chat/completions", None)
    body = server.seen[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 256)


def test_the_order_of_what_is_judged_is_drawn(server):
    label(server, data(1))
    label(server, data(1), seed=1)
    one, other = (body["messages"][1]["content"] for body in server.seen if not is_labelling(body))
    assert one != other and sorted(one.replace(".", "")) == sorted(other.replace(".", ""))


def test_balanced_accuracy_by_hand():
    true = np.array([1, 1, 1, 1, 0, 0], bool)
    assert balanced_accuracy(np.array([1, 1, 1, 0, 0, 1], bool), true) == (3 / 4 + 1 / 2) / 2
    assert balanced_accuracy(np.ones(6, bool), true) == balanced_accuracy(np.zeros(6, bool), true) == 0.5


def test_a_judge_that_finds_nothing_scores_one_half(server):
    rule = server.answer
    server.answer = lambda body: rule(body) if is_labelling(body) else '{"matches": []}'
    assert {r["score"] for r in label(server)} == {0.5}


def test_negatives_are_where_the_feature_does_not_fire():
    assert {c["text"] for c in negatives(data(), data()["features"][0])} == set(range(50, 56))
    assert len(negatives(data(), data()["features"][1])) == 7


LONG = json.dumps({"label": "x" * 300})


@pytest.mark.parametrize("answer", ["", "ball", '{"label": ""}', '{"label": 3}', '{"label": "a", "why": "b"}', '["ball"]', LONG])
def test_labels_that_cannot_be_read(answer):
    with pytest.raises(Unreadable):
        read_label(answer)


@pytest.mark.parametrize("matches", ["1", [0], [9], [1, 1], [True], [1.0], None])
def test_matches_that_cannot_be_read(matches):
    with pytest.raises(Unreadable):
        read_matches(json.dumps({"matches": matches}), 8)
    with pytest.raises(Unreadable):
        read_matches("1, 2", 8)


def test_answers_that_can_be_read():
    assert read_label('```json\n{"label": " a\\nball "}\n```') == "a ball" and read_matches(' {"matches": [8, 1]}', 8) == [8, 1]


def test_an_unreadable_label_is_an_error_of_its_feature(server):
    server.script = ["a ball", "a ball"]  # the answer and its retry
    records = label(server)
    assert records[0] == {"id": 0, "error": "the answer is no JSON: 'a ball'"} and [r.get("score") for r in records[1:]] == [1.0, 1.0]


def test_an_unreadable_judgement_leaves_the_label_without_a_score(server):
    server.script = ['{"label": "balls"}', '{"matches": [99]}', "I think 1 and 2"]
    record = label(server, data(1))[0]
    assert record["label"] == "balls" and record["score"] is None and "no JSON" in record["unscored"]


def test_a_second_answer_that_can_be_read_counts(server):
    server.script = ["balls", '{"label": "the word ball"}', "garbage"]
    assert label(server, data(1))[0]["score"] == 1.0
    assert len(server.seen) == 4


def test_too_few_contexts_give_a_label_without_a_score(server):
    few = data(1)
    few["features"][0]["contexts"] = few["features"][0]["contexts"][:5]
    record = label(server, few)[0]
    assert record["score"] is None and record["unscored"] == "1 held-out and 6 other contexts; 2 of each are needed"


@pytest.mark.parametrize("fault", [500, 503, 429, "cut"])
def test_a_fault_that_passes_is_waited_out(server, fault):
    server.script = [fault]
    assert [r["score"] for r in label(server)] == [1.0] * 3


@pytest.mark.parametrize("fault", [500, "cut", "slow"])
def test_an_outage_ends_the_run_with_what_was_saved(server, fault):
    """Two features are labelled, by two requests each, before the server fails for good; the same command goes on with the third."""
    server.script, records = [None] * 4 + [fault] * 20, []
    with pytest.raises(UserError, match="does not answer .* 2 tries; the labels so far are saved"):
        label_features(data(4), settings(server, timeout=1.0 if fault == "slow" else 20.0), records.append)
    assert [(r["id"], r["score"]) for r in records] == [(0, 1.0), (10, 1.0)]
    server.script = []
    assert {r["id"] for r in label(server, data(4), done=[0, 10])} == {20, 30}


def test_nobody_at_the_url():
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1 does not answer \(.*refused.*\), after 1 tries"):
        label_features(data(), LabelConfig("http://127.0.0.1:9/v1", "m", retries=0, wait=0.0), lambda record: pytest.fail("a record"))


@pytest.mark.parametrize("code", [400, 401, 404])
def test_a_refusal_is_told_at_once(server, code):
    server.script = [code]
    with pytest.raises(UserError, match=f"refuses: HTTP {code}: the server says no; check labels.url, labels.model"):
        label(server)
    assert len(server.seen) == 1


def test_a_model_that_never_answers_in_form_is_given_up(server):
    server.answer = lambda body: "no idea"
    with pytest.raises(UserError, match=f"of the first {HOPELESS} features none got a readable label: the answer is no JSON"):
        label(server, data(5) | {"features": data(5)["features"] * 3}, retries=0)


def test_several_at_once_are_the_same(server):
    by_id = lambda records: sorted(records, key=lambda r: r["id"])  # noqa: E731
    assert by_id(label(server, data(5), workers=4)) == label(server, data(5))


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    label(server, data(1), key_variable="A_KEY")
    assert server.headers[0][1] == "Bearer secret"
    with pytest.raises(UserError, match="environment variable NO_KEY.*is not set"):
        settings(server, key_variable="NO_KEY")
    with pytest.raises(UserError, match="the url is 'localhost'"):
        settings(server, url="localhost")
    with pytest.raises(UserError, match="no model"):
        settings(server, model="")
