"""`jaxrl-llm eval` on AgentIF: a stored file's table, fresh verdicts that go on where they stopped, made rows, refusals, that settings matter."""

import json

import policy_spy
import pytest
from agentif_file import GOOD, constraint, dirty, row, write
from label_server import FakeServer

from jaxrl_llm import cli
from jaxrl_llm.commands import eval as dispatch
from jaxrl_llm.commands import eval_agentif as command
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.agentif import sequences
from jaxrl_llm.evals.agentif.fresh import make_rows
from jaxrl_llm.evals.agentif.outcomes import Outcome, Result
from jaxrl_llm.rewards import chat
from jaxrl_llm.rewards.sandbox import layers

needs_isolation = pytest.mark.skipif(bool(layers.missing()), reason=f"this host lets nobody isolate code: {layers.missing()}")


def call(workdir, source="", **changes):
    flags = [f"--config.{key}={value}" for key, value in ({"data.source": source, "bootstrap": 40} | changes).items()]
    return cli.main(["eval", "--config=configs/agentif.py", f"--workdir={workdir}", *flags])


def total(workdir):
    return json.loads((workdir / "eval.json").read_text())


def flat(way):
    named = {"CSR": way["CSR"], "ISR": way["ISR"], **way["dimension"], **way["type"], "meta": way["meta"]}
    return {name: (figure["passed"], figure["counted"]) for name, figure in named.items()}


@needs_isolation
def test_the_table_of_a_stored_file_without_a_judge(tmp_path, capsys):
    made, expected = dirty()
    path = write(tmp_path / "results.json", made)
    assert call(tmp_path / "run", path) == 0
    record = total(tmp_path / "run")
    assert {way: flat(found) for way, found in record["ways"].items()} == expected
    assert record["answered_by"] == "some-model" and record["judged_by"] == "the source's scores" and record["infrastructure"] == 0
    assert (record["rows"], record["instructions"], record["constraints"], record["agents"]) == (7, 6, 18, 1)
    # Code alone gave seven scores that are true or false; the one that is false speaks of an output with the word.
    where = next(entry["where"] for entry in record["replay"]["differ"])
    assert record["replay"] | {"differ": 1} == {"run": 7, "agree": 6, "undecided": 0, "differ": 1} and where.endswith("constraints[2]")
    assert {one["why"] for one in record["broken"]} >= {"nothing follows the condition"} and record["broken"][0]["where"].startswith(f"{path}:")
    out = capsys.readouterr().out
    assert "7 rows, 18 constraints: published CSR 70.0% ISR 66.7%, crashed CSR 58.3% ISR 50.0%, strict CSR 50.0% ISR 16.7%" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "50.0% of the constraints are satisfied and 16.7% of the instructions" in page and "dirty spot: key" in page
    assert cli.main(["report", f"--workdir={tmp_path / 'run'}"]) == 0 and (tmp_path / "run" / "report.html").read_text() == page
    assert not (tmp_path / "run" / "results.jsonl").exists()


@needs_isolation
def test_scores_whose_outputs_were_taken_out_give_the_same_table(tmp_path):
    made, expected = dirty()
    for one in made:
        del one["output"]
    assert call(tmp_path / "run", write(tmp_path / "results.json", made)) == 0
    record = total(tmp_path / "run")
    assert {way: flat(found) for way, found in record["ways"].items()} == expected and record["replay"]["run"] == 0 and record["shown"] == []


def test_the_table_needs_no_sandbox(tmp_path, monkeypatch, capsys):
    """Of stored scores; where code must be run, a host that cannot isolate it is refused."""
    monkeypatch.setattr(layers, "missing", lambda: {"user namespace": "not here"})
    made, expected = dirty()
    path = write(tmp_path / "results.json", made)
    assert call(tmp_path / "run", path) == 0
    assert "their code is not run again: the sandbox cannot isolate code on this host" in capsys.readouterr().err
    record = total(tmp_path / "run")
    assert {way: flat(found) for way, found in record["ways"].items()} == expected and "not here" in record["replay"]["refused"]
    assert "not here" in (tmp_path / "run" / "report.html").read_text()
    assert call(tmp_path / "fresh", path, scores="fresh") == 2 and "the sandbox cannot isolate code" in capsys.readouterr().err
    assert not (tmp_path / "fresh").exists()  # before anybody answers


@needs_isolation
def test_rows_that_the_results_lack_count_in_the_strict_way(tmp_path):
    results = write(tmp_path / "results.json", [row(constraint(score=True))])
    whole = write(tmp_path / "eval.json", [row(constraint(), output=None), row(constraint("llm"), constraint("cond-llm"), text="b", output=None)])
    assert call(tmp_path / "run", results, **{"data.whole": whole}) == 0
    record = total(tmp_path / "run")
    assert record["absent"] == 1 and {way: flat(found)["CSR"] for way, found in record["ways"].items()} == {
        "published": (1, 1), "crashed": (1, 1), "strict": (1, 2),
    }  # fmt: skip
    assert flat(record["ways"]["strict"])["ISR"] == (1, 2) and "rows that the source lacks" in (tmp_path / "run" / "report.html").read_text()


@pytest.fixture
def server():
    found = FakeServer()
    yield found
    found.close()


def polite(body):
    """YES where the text between the markers has a river; the gate is open where it has one, too."""
    text = body["messages"][1]["content"]
    if text.startswith("Give all names"):
        return "The river"
    return "So.\nVerdict: " + ("YES" if "river" in text.partition("<<<BEGIN")[2].partition("<<<END")[0] else "NO")


@needs_isolation
def test_fresh_verdicts_go_on_where_they_stopped(tmp_path, server, capsys):
    made = [
        row(constraint("llm"), constraint("code"), constraint("cond-code"), text=f"t{i}", output="A river." if i % 2 else "Half \ud83d of it.")
        for i in range(6)
    ]
    (tmp_path / "outputs.json").write_text(json.dumps(made))
    how = {"judge.url": server.url, "judge.model": "j", "judge.workers": 1, "batch_rows": 2}
    server.answer = polite
    server.script = [None, None, 403]
    assert call(tmp_path / "run", tmp_path / "outputs.json", **how) == 2  # the server refuses from the second batch on
    assert "the same command goes on" in capsys.readouterr().err
    server.script = []
    assert call(tmp_path / "run", tmp_path / "outputs.json", **how) == 0
    record = total(tmp_path / "run")
    assert flat(record["ways"]["strict"])["CSR"] == (9, 15) and record["outcomes"]["cond-code"] == {"passed": 3, "closed": 3}
    asked = len(server.seen)
    again = {**record, "seconds": 0}
    assert call(tmp_path / "run", tmp_path / "outputs.json", **how) == 0
    assert {**total(tmp_path / "run"), "seconds": 0} == again and len(server.seen) == asked
    # What was written is the published schema: read as a stored file it gives the same table.
    assert call(tmp_path / "stored", tmp_path / "run" / "results.jsonl") == 0
    stored = total(tmp_path / "stored")
    assert {way: flat(found) for way, found in stored["ways"].items()} == {way: flat(found) for way, found in record["ways"].items()}
    assert stored["outcomes"] == record["outcomes"] and stored["replay"]["agree"] == stored["replay"]["run"] == 6


@needs_isolation
def test_a_judge_that_fails_leaves_rows_to_be_asked_again(tmp_path, server, capsys):
    made = [row(constraint("llm"), constraint("code"), text=f"t{i}", output=f"A river {i}.") for i in range(3)]
    path = write(tmp_path / "outputs.json", made)
    how = {"judge.url": server.url, "judge.model": "j", "judge.workers": 1}
    server.answer = lambda body: "I cannot say." if "river 1" in body["messages"][1]["content"] else polite(body)
    assert call(tmp_path / "run", path, **how) == 0
    record = total(tmp_path / "run")
    assert record["infrastructure"] == 1 and {flat(found)["CSR"] for found in record["ways"].values()} == {(5, 5)}
    assert "1 constraints have no verdict yet (unreadable: the last line is" in capsys.readouterr().err
    assert "1 constraints still wait for a verdict" in (tmp_path / "run" / "report.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [["score" in part for part in one["constraints"]] for one in lines] == [[True, True], [False, True], [True, True]]
    server.answer, before = polite, len(server.seen)
    assert call(tmp_path / "run", path, **how) == 0
    assert total(tmp_path / "run")["infrastructure"] == 0 and len(server.seen) == before + 1  # the two others are done


@needs_isolation
def test_made_rows_need_no_judge_and_their_own_responses_score_as_they_must(tmp_path, monkeypatch):
    how = {"make.rows": 3, "make.seeds": "0,1", "make.words": "650,1000", "policy.model": "m", "policy.max_new_tokens": 1000}
    made = make_rows(3, (0, 1), (650, 1000))
    # The model knows the content of the first seed by heart, and of the second all but one rule.
    replies = [one.reference if one.row["made"]["seed"] == 0 else one.violations[0] for one in made]
    seen = []

    def answers(policy, rows, run_dir):
        seen.extend(rows)
        return {row["id"]: {"id": row["id"], "response": reply, "reason": ""} for row, reply in zip(rows, replies)}

    monkeypatch.setattr(command._answers, "answers", answers)
    flags = {f"--config.{key}={value}" for key, value in how.items()}
    assert cli.main(["eval", "--config=configs/agentif.py:fresh", f"--workdir={tmp_path}", *flags]) == 0
    record = total(tmp_path)
    assert flat(record["ways"]["strict"])["ISR"] == (3, 6) and record["infrastructure"] == 0 and record["source"] == "made, seeds 0, 1"
    (difference,) = record["contamination"]
    lost = [1 / len(one.row["constraints"]) for one in made[3:]]
    assert difference["value"] == pytest.approx(sum(lost) / 3) and difference["low"] > 0 and difference["rows"] == 3
    assert [group["rows"] for group in record["lengths"]] == [4, 2] and "Content seen before" in (tmp_path / "report.html").read_text()
    assert sum(found["counted"] for found in record["places"]) == record["constraints"] and len(record["places"]) >= 3
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == [one.row for one in made] and seen[0]["messages"][0]["role"] == "system"
    kept = [json.loads(line) for line in (tmp_path / "references.jsonl").read_text().splitlines()]
    assert kept[5]["reference"] == made[5].reference and kept[5]["violations"] == list(made[5].violations)


@needs_isolation
def test_a_prompt_that_is_too_long_counts_in_the_strict_way_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.json", [row(constraint(), constraint(), text=f"t{i}", output=None) for i in range(2)])

    def answers(policy, rows, run_dir):
        return {row["id"]: {"response": text, "reason": ""} for row, text in zip(rows, ("A river.", None))}

    monkeypatch.setattr(command._answers, "answers", answers)
    assert call(tmp_path / "run", path, **{"policy.model": "m"}) == 0
    record = total(tmp_path / "run")
    assert {way: flat(found)["CSR"] for way, found in record["ways"].items()} == {"published": (2, 2), "crashed": (2, 2), "strict": (2, 4)}
    monkeypatch.setattr(command._answers, "answers", lambda policy, rows, run_dir: dict(list(answers(policy, rows, run_dir).items())[:1]))
    assert call(tmp_path / "late", path, **{"policy.model": "m"}) == 0  # the server has not answered yet: no error of the response's
    assert total(tmp_path / "late")["infrastructure"] == 2 and flat(total(tmp_path / "late")["ways"]["strict"])["CSR"] == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": ""}, "no rows; name AgentIF's file with --config.data.source="),
        ({"make.rows": 2}, "both data.source and make.rows are given"),
        ({"data.source": "", "make.rows": 2}, "nobody answers; give --config.policy.model="),
        ({"data.source": "", "make.rows": 2, "policy.model": "m", "make.words": "50"}, "make.words is (50,): give lengths from 100"),
        ({"scores": "old"}, "'scores' is 'old'"),
        ({"scores": "stored", "data.source": "{f}/plain.json"}, "plain.json holds no scores, which config key 'scores' asks for"),
        ({"data.source": "{f}/plain.json"}, "plain.json holds no outputs: let a model answer"),
        ({"policy.model": "m"}, "results.json holds scores of other responses: leave the policy out, or set --config.scores=fresh"),
        ({"judge.url": "http://x"}, "judge.url without judge.model"),
        ({"judge.mode": "lines"}, "did you mean line?"),
        ({"judge.prompts": "plain"}, "'judge.prompts' is 'plain'"),
        ({"sandbox.isolation": "none"}, "'sandbox.isolation' is 'none'"),
        ({"data.source": "{f}/odd.json"}, "odd.json:2: constraints[0].evaluation[0].type is 'codes'; it must be one of"),
        ({"data.source": "{f}/nowhere.json"}, "no such file '{f}/nowhere.json'"),
        ({"data.source": "{f}/bad.json"}, "bad.json:2: constraints is missing"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_in_one_line(tmp_path, capsys, changes, message):
    write(tmp_path / "results.json", [row(constraint(score=True))])
    write(tmp_path / "plain.json", [row(constraint(), output=None)])
    write(tmp_path / "odd.json", [row(constraint(evaluation=[{"type": "codes", "exec": GOOD}]))])
    write(tmp_path / "bad.json", [{"input": row()["input"]}])
    filled = {key: str(value).replace("{f}", str(tmp_path)) for key, value in ({"data.source": "{f}/results.json"} | changes).items()}
    assert call(tmp_path / "run", filled.pop("data.source"), **filled) == 2
    err = capsys.readouterr().err
    assert message.replace("{f}", str(tmp_path)) in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "eval.json").exists()


STORED = {"data.source": "{f}/results.json", "policy.model": ""}
MADE = {"data.source": "", "make.rows": "2", "make.words": "650"}
OTHER = {  # field -> (another value, what else it needs)
    "data.source": ("{f}/less.json", {}), "data.limit": ("1", {}), "data.on_bad": ("skip", {"data.source": "{f}/bad.json"}),
    "data.whole": ("{f}/whole.json", STORED), "make.rows": ("3", MADE), "make.seeds": ("1", MADE), "make.words": ("900", MADE),
    "scores": ("fresh", STORED), "replay": ("False", STORED), "judge.url": ("http://127.0.0.1:9/v3", {}), "judge.model": ("k", {}),
    "judge.key_variable": ("POLICY_KEY", {}), "judge.prompts": ("published", {}), "judge.mode": ("logprobs", {}), "judge.workers": ("2", {}),
    "judge.timeout": ("7.0", {}), "judge.max_tokens": ("9", {}), "sandbox.workers": ("3", {}), "sandbox.wall_s": ("2.0", {}),
    "sandbox.isolation": (layers.WEAK, {}), "sandbox.exec_text": ("False", {}), "batch_rows": ("1", {}), "bootstrap": ("9", {}), "seed": ("3", {}),
    "shown": ("1", {}),
    **{f"policy.{name}": (value, {f"policy.{key}": other for key, other in needs.items()}) for name, (value, needs) in policy_spy.POLICY.items()},
    "policy.overflow": ("drop", {"policy.max_prompt_tokens": "60", "policy.overflow": "truncate"}),
}  # fmt: skip


def test_no_setting_is_forgotten_here():
    """`kind` is the dispatch's, `overwrite` the run directory's."""
    assert set(OTHER) == set(field_names(load_config("configs/agentif.py"))) - {"kind", "overwrite"}


@pytest.mark.parametrize("field", OTHER)
def test_every_setting_matters(tmp_path, field):
    rows = [row(constraint("llm"), constraint(), text=f"Text {i}." + 20 * i * "-", output=None) for i in range(6)]
    scored = [row(constraint(score=True), constraint(score=i > 0), text=f"s{i}") for i in range(3)]
    files = {"rows": rows, "less": rows[:2], "results": scored, "whole": scored + rows, "bad": [*rows, {"input": rows[0]["input"]}]}
    for name, made in files.items():
        write(tmp_path / f"{name}.json", made)

    def outcome(name, changes):
        seen = []

        class Box:
            def __init__(self, workers, limits, isolation):
                seen.append(("sandbox", workers, limits, isolation))

            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda *_: None  # noqa: E731

            def run(self, jobs):
                return [sequences.Ran("value", len(repr(job.args)) % 2 == 0) for job in jobs]

        def evaluate(tasks, asker, sandbox, **how):
            told = asker and (asker.prompts, asker.judge.config, {**vars(asker.client.config), "cache": ""})
            seen.append(("evaluate", len(tasks), repr(told), how))
            passed = [bool(response) and ord(response[0]) % 2 == 0 for _, response in tasks]
            return [Outcome(Result.PASSED if one else Result.FAILED, one) for one in passed]

        with pytest.MonkeyPatch.context() as patch:
            policy_spy.install(patch, seen)
            patch.setattr(command, "Sandbox", Box)
            patch.setattr(sequences, "evaluate", evaluate)
            base = {"data.source": "{f}/rows.json", "policy.model": "m", "policy.overflow": "truncate", "bootstrap": "30"}
            base |= {"judge.url": "http://127.0.0.1:9/v2", "judge.model": "j"}
            settings = {key: value.replace("{f}", str(tmp_path)) for key, value in (base | changes).items()}
            try:
                dispatch.run(load_config("configs/agentif.py", settings), str(tmp_path / name))
            except UserError as error:
                assert field == "data.on_bad", error
                return str(error)
        record = {key: value for key, value in total(tmp_path / name).items() if key not in ("seconds", "source")}
        return [entry if entry[0] != "asked" else entry[:3] + (entry[3].replace(f"{tmp_path}/{name}", ""),) for entry in seen], record

    value, needs = OTHER[field]
    assert outcome("a", needs) != outcome("b", needs | {field: value})


def test_the_client_closes_its_cache(tmp_path, monkeypatch):
    """The judge's answers so far are on disk whatever ends the run."""
    closed = []
    monkeypatch.setattr(chat.ChatClient, "close", lambda self: closed.append(self.config.cache))
    monkeypatch.setattr(sequences, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    path = write(tmp_path / "outputs.json", [row(constraint("llm"))])
    assert call(tmp_path / "run", path, **{"judge.url": "http://127.0.0.1:9/v1", "judge.model": "j"}) == 130
    assert closed == [f"{tmp_path}/run/judge.sqlite"]
