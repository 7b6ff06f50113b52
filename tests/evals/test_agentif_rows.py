"""AgentIF's rows with every dirty spot, what a result file says of each constraint, and its figures by hand and by the published way."""

import gzip
import json
import zipfile

import numpy as np
import pytest
from agentif_file import constraint, dirty, misspelt, row, write

from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.agentif import figures
from jaxrl_llm.evals.agentif.outcomes import Outcome, Result, absent_outcome, stored_outcome, yes_no
from jaxrl_llm.evals.agentif.rows import NOTHING, SEQUENCES, read_agentif, with_results
from jaxrl_llm.evals.statistics import Interval, share_limits, wilson


def judged(rows):
    return [(one, [stored_outcome(one, part) for part in one.constraints]) for one in rows]


def flat(way):
    """A way's figures as (passed, counted) by name."""
    named = {"CSR": way["CSR"], "ISR": way["ISR"], **way["dimension"], **way["type"], "meta": way["meta"]}
    return {name: (figure["passed"], figure["counted"]) for name, figure in named.items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    made, expected = dirty()
    return read_agentif(str(write(tmp_path_factory.mktemp("rows") / "results.json", made))), expected


def test_every_dirty_spot_is_read_and_counted(stored):
    rows, _ = stored
    assert {name: count for name, count in rows.notes.items() if count} == {
        "key 'is meta' for 'is_meta'": 1, "key 'is_meat' for 'is_meta'": 1, "key 'other info' for 'other_info'": 1, "type that is a list of one": 1,
        "type that is a list of two": 1, "type that is an empty list": 1, "score of another kind: int": 1, "constraint that cannot be checked": 2,
        "input that another row has too": 1,
    }  # fmt: skip
    assert [part.types for part in rows[1].constraints] == [("formatting",), ("semantic", "resource")] and rows[2].constraints[0].types == ()
    assert [(part.meta, part.meta_published) for part in rows[5].constraints] == [(False, False), (True, False), (True, False)]
    assert rows[0].key == rows[5].key != rows[1].key and rows[0].words == 6
    assert [one.name for one in rows[:4]] == ["lawglm/0/0/Thought_prompt"] * 3 + ["17"]
    assert rows[2].constraints[1].score is NOTHING and rows[4].constraints[0].score is None
    assert "no Python" in rows[3].constraints[0].broken and rows[4].constraints[1].broken == "nothing follows the condition"


def test_the_figures_of_a_stored_file_by_hand(stored):
    rows, expected = stored
    ways = figures.table(judged(rows), draws=50)
    for way, told in expected.items():
        assert flat(ways[way]) == told, way
    csr = ways["published"]["CSR"]
    assert csr["value"] == 7 / 10 and csr["low"] < csr["value"] < csr["high"]
    assert ways["published"]["dimension"]["condition"]["value"] is None
    assert ways["published"]["dimension"]["example"]["high"] == pytest.approx(wilson(0, 1).high)  # one row and none satisfied is no certainty


def test_what_each_null_is_called(stored):
    rows, _ = stored
    found = [[str(outcome.result) for outcome in outcomes] for _, outcomes in judged(rows)]
    assert found == [
        ["passed", "passed", "closed"], ["passed", "failed"], ["passed", "unscored", "unscored"], ["broken", "unreadable", "passed"],
        ["closed", "broken"], ["error", "passed", "failed"], ["passed", "error"],
    ]  # fmt: skip
    tally = figures.tally(judged(rows))
    assert tally["all"] == {"passed": 7, "failed": 2, "closed": 2, "broken": 2, "unscored": 2, "error": 2, "unreadable": 1}
    assert tally["cond-code"] == {"closed": 1, "unscored": 1}


def published_by_the_letter(rows):
    """CSR and ISR as the published code counts them: null dropped, `is True`, all()."""
    scores = [[part["score"] for part in one["constraints"] if part.get("score") is not None] for one in rows]
    every = [score for row_scores in scores for score in row_scores]
    scored = [row_scores for row_scores in scores if row_scores]
    return (sum(s is True for s in every), len(every)), (sum(all(s) for s in scored), len(scored))


def test_the_published_way_on_random_files(tmp_path):
    rng = np.random.default_rng(0)
    options = [True, False, None, 1, 0, "YES", ..., True, False]
    for _ in range(20):
        some = lambda: [constraint(SEQUENCES[rng.integers(8)], options[rng.integers(9)]) for _ in range(rng.integers(0, 6))]  # noqa: E731
        made = [row(*some(), text=f"t{rng.integers(9)}") for _ in range(rng.integers(1, 9))]
        ways = figures.table(judged(read_agentif(str(write(tmp_path / "r.json", made)))), draws=5)
        found = flat(ways["published"])
        assert (found["CSR"], found["ISR"]) == published_by_the_letter(made)
        for way in ("crashed", "strict"):  # errors can only add what is not satisfied
            assert flat(ways[way])["CSR"][0] <= found["CSR"][0] and flat(ways[way])["CSR"][1] >= found["CSR"][1]


def test_counting_crashes_as_the_published_files_need_it():
    """3,609 satisfied of 6,561 scored and 912 without a score: 55.0% dropped, 48.3% counted."""
    counts = {"passed": 3609, "failed": 6561 - 3609, "unscored": 912}
    outcomes = [Outcome(Result(name), {"passed": True, "failed": False}.get(name)) for name, number in counts.items() for _ in range(number)]
    told = {way: [found for one in outcomes if (found := one.counts(way)) is not None] for way in ("published", "crashed")}
    assert {way: round(100 * sum(found) / len(found), 1) for way, found in told.items()} == {"published": 55.0, "crashed": 48.3}


def test_duplicates_are_drawn_together(tmp_path):
    """Ten copies of two instructions are two instructions: their interval is that of two."""
    good, bad = (row(constraint(score=score), text=text) for score, text in ((True, "a"), (False, "b")))
    few, many = (figures.table(judged(read_agentif(str(write(tmp_path / "r.json", [good, bad] * n)))), draws=400) for n in (1, 10))
    assert few["strict"]["CSR"] | {"passed": 0, "counted": 0} == many["strict"]["CSR"] | {"passed": 0, "counted": 0}


def test_a_share_that_never_varies_is_not_certain():
    assert share_limits(Interval(1.0, 1.0, 1.0), 12) == wilson(12, 12) and share_limits(Interval(0.0, 0.0, 0.0), 12) == wilson(0, 12)
    assert share_limits(Interval(0.5, 0.5, 0.5), 12) == Interval(0.5, 0.5, 0.5)


def test_lengths_and_rows_that_are_absent(tmp_path):
    made = [row(constraint(score=n % 2 == 0), text="word " * n) for n in (10, 11, 300, 5000)]
    rows = read_agentif(str(write(tmp_path / "r.json", made)))
    groups = figures.by_length(judged(rows), draws=20)
    assert [(g["low"], g["high"], g["rows"], g["CSR"]["passed"]) for g in groups] == [(0, 250, 2, 1), (250, 500, 1, 1), (4000, 8000, 1, 1)]
    whole = read_agentif(str(write(tmp_path / "w.json", [row(constraint("llm"), constraint("cond-llm"), constraint("cond"), text="absent")])))
    outcomes = [absent_outcome(part) for part in whole[0].constraints]
    assert [str(one.result) for one in outcomes] == ["unanswered", "closed", "broken"]
    assert [one.counts("strict") for one in outcomes] == [False, None, None] and not any(one.counts("published") for one in outcomes)
    assert str(stored_outcome(whole[0], whole[0].constraints[0]).result) == "unscored"
    silent = read_agentif(str(write(tmp_path / "s.json", [row(constraint("llm"), output=None)])))
    assert str(stored_outcome(silent[0], silent[0].constraints[0]).result) == "unanswered"


def test_every_form_of_the_file_is_read(tmp_path):
    made, _ = dirty()
    whole = read_agentif(str(write(tmp_path / "results.json", made)))
    assert [row.where for row in read_agentif(str(write(tmp_path / "r.jsonl", made, lines=True)))][:2] == [f"{tmp_path}/r.jsonl:{n}" for n in (1, 2)]
    (tmp_path / "r.json.gz").write_bytes(gzip.compress((tmp_path / "results.json").read_bytes()))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.write(tmp_path / "results.json", "some-model/eval/results.json")
        archive.writestr("__MACOSX/some-model/eval/results.json", "junk")
        archive.writestr("some-model/eval/accuracy.json", "{}")
    for name in ("r.json.gz", "model.zip"):
        rows = read_agentif(str(tmp_path / name))
        assert [one.constraints[0].score for one in rows] == [one.constraints[0].score for one in whole]
    assert rows[1].where.startswith(f"{tmp_path}/model.zip/some-model/eval/results.json:") and rows[1].where.rpartition(":")[2] != "1"
    assert len(read_agentif(str(tmp_path / "results.json"), limit=2)) == 2


def test_results_are_written_as_they_are_read(tmp_path):
    made, _ = dirty()
    made[0]["output"]["content"] = "half of a pair: \ud83d"  # as some published outputs hold
    (tmp_path / "r.json").write_text(json.dumps(made))
    rows = read_agentif(str(tmp_path / "r.json"))
    verdicts = [{"score": True}, {"score": None, "llm_output": "NO"}, {}]
    (tmp_path / "again.json").write_text(json.dumps([with_results(rows[0], rows[0].output, "m", verdicts)]))
    again = read_agentif(str(tmp_path / "again.json"))[0]
    assert again.output == rows[0].output and again.key == rows[0].key
    assert [part.score for part in again.constraints] == [True, None, NOTHING] and again.constraints[1].llm_output == "NO"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(constraints={}), ":2: constraints is {}; it must be a list of constraints"),
        (lambda r: r.pop("constraints"), ":2: constraints is missing; it must be a list of constraints; known:"),
        (lambda r: r.update(input="text"), ":2: input is 'text'; it must be a list of messages"),
        (lambda r: r.pop("input"), ":2: input is missing; it must be a list of messages; known:"),
        (lambda r: r["input"][1].pop("role"), ":2: input[1] is {'content'"),
        (lambda r: r.update(output=3), ":2: output is 3; it must be a text"),
        (lambda r: r["output"].pop("content"), ":2: output.content is missing"),
        (lambda r: r["constraints"].append("x"), ":2: constraints[1] is 'x'; it must be an object"),
        (lambda r: r["constraints"][0].pop("dimension"), ":2: constraints[0].dimension is missing; it must be one of unconditional"),
        (lambda r: r["constraints"][0].update(type=3), ":2: constraints[0].type is 3; it must be one of formatting"),
        (lambda r: r["constraints"][0].update(llm_output=3), ":2: constraints[0].llm_output is 3; it must be a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_file_line_and_field(tmp_path, change, message):
    bad = row(constraint(score=True))
    change(bad)
    path = write(tmp_path / "r.jsonl", [row(constraint(score=True)), bad, row(constraint(score=False))], lines=True)
    with pytest.raises(UserError) as error:
        read_agentif(str(path))
    assert f"{path}{message}" in str(error.value)
    rows = read_agentif(str(path), on_bad="skip")
    assert len(rows) == 2 and message in rows.skipped[0]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ([], "constraints[0].evaluation is []; it must be a list of one step or more"),
        ([{"type": "code"}], "constraints[0].evaluation[0].exec is missing"),
        ([{"type": "cod", "exec": "x"}], "constraints[0].evaluation[0].type is 'cod'; it must be one of llm_conditional_check, llm, code"),
        ([{"type": "llm", "exec": "x"}, {"type": "llm_conditional_check", "exec": "x"}], "it must be a sequence whose gate stands first"),
        ([{"type": "code", "exec": "def check(response): pass"}], "its code defines no check_following"),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_read_is_told_and_keeps_no_score_from_counting(tmp_path, evaluation, message):
    made = constraint(score=True, evaluation=evaluation)
    rows = read_agentif(str(write(tmp_path / "r.json", [row(made)])))
    assert message in rows[0].constraints[0].broken and str(stored_outcome(rows[0], rows[0].constraints[0]).result) == "passed"


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"input": 1},\n{"input"\n]')
    with pytest.raises(UserError, match=r"a.json:\d: .*"):
        read_agentif(str(tmp_path / "a.json"), on_bad="skip")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("result.json", "[]")
    with pytest.raises(UserError, match=r"z.zip has no results.json: did you mean result.json"):
        read_agentif(str(tmp_path / "z.zip"))
    (tmp_path / "b.zip").write_bytes((tmp_path / "z.zip").read_bytes()[:40])
    with pytest.raises(UserError, match="b.zip is not a whole zip file"):
        read_agentif(str(tmp_path / "b.zip"))
    with pytest.raises(UserError, match=r"holds no row that can be read; the first problem: .*a.jsonl:1: constraints is missing"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"input": row()["input"]}))
        read_agentif(str(tmp_path / "a.jsonl"), on_bad="skip")


def test_other_names_are_kept_and_told(tmp_path):
    made = [row(constraint(score=True, kind="tone", dimension="odd"), misspelt(constraint(score=True), "is_meat", False))]
    rows = read_agentif(str(write(tmp_path / "r.json", made)))
    assert rows.notes["type 'tone'"] == rows.notes["dimension 'odd'"] == 1
    way = figures.table(judged(rows), draws=5)["published"]
    assert flat(way)["tone"] == flat(way)["odd"] == (1, 1) and flat(way)["CSR"] == (2, 2)


def test_a_reply_is_searched_as_the_published_code_does():
    assert [yes_no(text) for text in ("YES", "NO", "NO, YES", "yes", "")] == [True, False, True, None, None]
