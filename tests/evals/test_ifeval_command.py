"""`jaxrl-llm eval` on IFEval: figures by hand, responses of every origin, going on where it stopped, what is refused, that settings matter."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import policy_spy
import pytest

import models
from jaxrl_llm import cli
from jaxrl_llm.commands import eval as dispatch
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals import ifeval
from jaxrl_llm.evals.statistics import wilson
from jaxrl_llm.rewards.constraints import accuracies
from jaxrl_llm.rewards.verdict import Status, Verdict

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
import tiny_server

FEW = {"relation": "less than", "num_words": 4}
PROMPTS = [
    {"key": 1, "prompt": "No comma, a title.", "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]},
    {"key": 2, "prompt": "No comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 3, "prompt": "Say river.", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["river"]}]},
    {"key": 4, "prompt": "Few words.", "instruction_id_list": ["length_constraints:number_words"], "kwargs": [FEW]},
]  # fmt: skip
RESPONSES = ["<<Rivers>> ran by", "Sure, here it is:\nNo pauses at all", "<think>river, river</think>\n\nA mill.", "One two."]
# Strict: both; not; not (its reasoning does not count); yes. Loose: the second passes without its first line.
FIGURES = {"prompt_strict": (2, 4), "instruction_strict": (3, 5), "prompt_loose": (3, 4), "instruction_loose": (4, 5)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "prompts.jsonl", PROMPTS)
    write(tmp_path / "answers.jsonl", [{"prompt": p["prompt"], "response": r} for p, r in zip(PROMPTS, RESPONSES)])
    return tmp_path


def call(folder, workdir="run", **changes):
    how = {"data.source": folder / "prompts.jsonl", "bootstrap": 50} | changes
    flags = [f"--config.{key}={value}" for key, value in how.items()]
    return cli.main(["eval", "--config=configs/ifeval.py", f"--workdir={folder / workdir}", *flags])


def total(folder, workdir="run"):
    return json.loads((folder / workdir / "eval.json").read_text())


def counts(record):
    return {name: (figure["passed"], figure["counted"]) for name, figure in record["figures"].items()}


def test_responses_of_a_file(files, capsys):
    assert call(files, **{"responses.source": files / "answers.jsonl"}) == 0
    record = total(files)
    assert counts(record) == FIGURES and record["prompts"] == record["answered"] == 4 and record["instructions"] == 5
    span = wilson(2, 4)
    assert [record["figures"]["prompt_strict"][key] for key in ("low", "high")] == [span.low, span.high]
    assert record["types"]["punctuation:no_comma"]["strict"]["passed"] == 1 and record["types"]["punctuation:"]["loose"]["passed"] == 2
    lines = [json.loads(line) for line in (files / "run" / "verdicts.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["1", "2", "3", "4"]
    told = {"name": "punctuation:no_comma", "strict": "fail", "loose": "pass", "reason": "punctuation:no_comma: 1 commas"}
    assert lines[1]["instructions"] == [told]
    out = capsys.readouterr().out
    assert "4 of 4 prompts: prompt strict 50.0% (" in out and "instruction loose 80.0%" in out
    page = (files / "run" / "report.html").read_text()
    assert "50.0% of the prompts are followed as a whole and 60.0% of the instructions" in page
    assert cli.main(["report", f"--workdir={files / 'run'}"]) == 0 and (files / "run" / "report.html").read_text() == page
    assert call(files, "kept", thinking="keep", **{"responses.source": files / "answers.jsonl"}) == 0
    assert counts(total(files, "kept"))["prompt_strict"] == (3, 4)  # the word stands in the reasoning


def test_figures_are_those_of_the_scoring_module():
    rng, status = np.random.default_rng(0), [Status.PASS, Status.FAIL, Status.TIMEOUT]
    judged = []
    for _ in range(60):
        number = rng.integers(1, 4)
        verdicts = {way: [Verdict(status[rng.choice(3, p=(0.6, 0.35, 0.05))]) for _ in range(number)] for way in ifeval.WAYS}
        judged.append(({"instructions": [("punctuation:no_comma", {})] * number}, verdicts))
    found = ifeval.figures(judged, draws=200)
    for way in ifeval.WAYS:
        told = accuracies([verdicts[way] for _, verdicts in judged])
        for level in ("prompt", "instruction"):
            figure = found[f"{level}_{way}"]
            assert figure["value"] == pytest.approx(told[level]) and figure["counted"] == told[f"{level}s"]
            assert figure["low"] < figure["value"] < figure["high"]


def test_instructions_of_one_prompt_are_no_independent_draws():
    """Prompts whose four instructions stand or fall together: four times the instructions, and no narrower interval."""
    def of(number):
        rows = [{"instructions": [("punctuation:no_comma", {})] * number}] * 100
        told = [{way: [Verdict(Status.PASS if i % 2 else Status.FAIL)] * number for way in ifeval.WAYS} for i in range(100)]
        return ifeval.figures(list(zip(rows, told)), draws=400)["instruction_strict"]

    one, four = of(1), of(4)
    assert (four["low"], four["high"]) == pytest.approx((one["low"], one["high"])) and four["counted"] == 400
    assert four["high"] - four["low"] > 1.5 * (wilson(200, 400).high - wilson(200, 400).low)
    told = {way: [Verdict(Status.PASS)] for way in ifeval.WAYS}
    sure = ifeval.figures([({"instructions": [("punctuation:no_comma", {})]}, told)] * 12)["instruction_strict"]
    assert sure["value"] == 1.0 and sure["low"] == wilson(12, 12).low < 0.8  # that all are right is no certainty


def test_prompts_without_a_response_count_in_nothing(files):
    write(files / "few.jsonl", [{"prompt": p["prompt"], "response": r} for p, r in zip(PROMPTS[:2], RESPONSES)])
    assert call(files, **{"responses.source": files / "few.jsonl"}) == 0
    record = total(files)
    assert counts(record)["prompt_strict"] == (1, 2) and record["unanswered"] == {"no response yet": 2}
    assert "2 of 4 prompts have no response" in (files / "run" / "report.html").read_text()


def test_other_forms_of_responses(files):
    write(files / "named.jsonl", [{"instruction": p["prompt"] + "\n", "output": r} for p, r in zip(PROMPTS, RESPONSES)])
    log = [{"doc_id": i, "doc": {"prompt": p["prompt"]}, "resps": [[r]], "filtered_resps": [r]} for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES))]
    write(files / "samples_ifeval.jsonl", log)
    assert call(files, "a", **{"responses.source": files / "named.jsonl", "responses.fields": "prompt=instruction,response=output"}) == 0
    assert call(files, "b", **{"responses.source": files / "samples_ifeval.jsonl"}) == 0
    assert counts(total(files, "a")) == counts(total(files, "b")) == FIGURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_server.write_model(tmp_path_factory.mktemp("model"))


def samples(folder, workdir):
    return {record["id"]: record["response"] for record in map(json.loads, (folder / workdir / "samples.jsonl").read_text().splitlines())}


@pytest.mark.usefixtures("quick_compilation")
def test_a_policy_answers_here_and_behind_a_server_alike_and_goes_on(files, folder):
    how = {"policy.model": folder, "policy.max_new_tokens": 8, "policy.batch_prompts": 2}
    assert call(files, "own", **how) == 0
    own = samples(files, "own")
    assert own.keys() == {"1", "2", "3", "4"} and len(set(own.values())) > 1
    before = total(files, "own")
    path = files / "own" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + '{"id": "3", "resp')
    assert call(files, "own", **how) == 0 and samples(files, "own") == own
    assert {**total(files, "own"), "seconds": 0} == {**before, "seconds": 0}
    with tiny_server.served(folder, places=4, max_tokens=16) as server:
        url = {"policy.url": f"http://127.0.0.1:{server.port}/v1", "policy.name": "policy", "policy.max_new_tokens": 8}
        assert call(files, "served", **url) == 0
    assert samples(files, "served") == own and counts(total(files, "served")) == counts(before)
    assert total(files, "served")["answered_by"].startswith("policy at http://127.0.0.1")


@pytest.mark.usefixtures("quick_compilation")
def test_an_adapter_changes_the_answers(files, folder):
    from models.lora import LoraConfig, init_lora, save_lora

    cfg, _ = models.load(folder)
    config = LoraConfig(rank=2)
    adapter = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.5, init_lora(cfg, config, jax.random.key(0)))
    save_lora(files / "adapter", cfg, adapter, config)
    how = {"policy.model": folder, "policy.max_new_tokens": 8, "policy.batch_prompts": 2, "data.limit": 2}
    assert call(files, "plain", **how) == 0 and call(files, "adapted", **how, **{"policy.adapter": files / "adapter"}) == 0
    assert samples(files, "plain") != samples(files, "adapted") and total(files, "adapted")["answered_by"] == f"{folder} + {files / 'adapter'}"


def test_a_server_that_is_gone_and_one_that_refuses(files, capsys):
    from label_server import FakeServer

    server = FakeServer()
    try:
        server.answer = lambda body: "A river."
        server.script = [400, 401]
        how = {"policy.url": server.url, "policy.name": "p", "policy.workers": 1}
        assert call(files, **how) == 2 and "refuses: HTTP 401" in capsys.readouterr().err
        server.script = [400]
        assert call(files, **how) == 0
        record = total(files)
        assert record["answered"] == 3 and list(record["unanswered"].values()) == [1] and "HTTP 400" in next(iter(record["unanswered"]))
        asked = len(server.seen)
        assert call(files, **how, **{"policy.timeout": 5.0}) == 0 and len(server.seen) == asked  # all is settled
        server.script = [406] * 4
        assert call(files, "none", **how) == 2 and not (files / "none" / "eval.json").exists()  # nothing at all is no success
        assert re.search(f"{server.url} answered none of 4 prompts .*406.*the same command asks again", capsys.readouterr().err)
        assert call(files, "none", **how) == 0 and total(files, "none")["answered"] == 4
    finally:
        server.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": ""}, "no prompts: name IFEval's file"),
        ({}, "nobody answers; give --config.policy.model=FOLDER_OR_HUB_ID, --config.policy.url=http://... or --config.responses.source=FILE"),
        ({"policy.model": "a", "policy.url": "http://x"}, "both policy.model and policy.url"),
        ({"policy.url": "http://x"}, "policy.url without policy.name"),
        ({"policy.url": "http://x", "policy.name": "p", "policy.adapter": "a"}, "policy.adapter is of a model of ours"),
        ({"responses.source": "a.jsonl", "policy.model": "m"}, "both responses.source and a policy"),
        ({"policy.model": "m", "policy.max_new_tokens": 0}, "'policy.max_new_tokens' is 0"),
        ({"policy.model": "m", "policy.overflow": "cut"}, "'policy.overflow' is 'cut'"),
        ({"policy.model": "m", "thinking": "droop"}, "did you mean drop?"),
        ({"responses.source": "{f}/prompts.jsonl"}, "prompts.jsonl:1: field 'response' is missing; it must be a text; responses.fields renames"),
        ({"responses.source": "{f}/two.jsonl"}, "two.jsonl:2: another response to the prompt of {f}/two.jsonl:1"),
        ({"responses.source": "{f}/foreign.jsonl"}, "foreign.jsonl holds no response to any of the 4 prompts"),
        ({"data.source": "{f}/unknown.jsonl", "responses.source": "{f}/two.jsonl"}, "unknown.jsonl:1: row 1: unknown constraint"),
        ({"data.source": "{f}/empty.jsonl", "responses.source": "{f}/two.jsonl"}, "empty.jsonl:1: field 'instruction_id_list' is empty"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_in_one_line(files, capsys, changes, message):
    write(files / "two.jsonl", [{"prompt": "No comma.", "response": r} for r in ("a", "b")])
    write(files / "foreign.jsonl", [{"prompt": "Else.", "response": "a"}])
    write(files / "unknown.jsonl", [PROMPTS[1] | {"key": 1, "instruction_id_list": ["punctuation:no_coma"]}])
    write(files / "empty.jsonl", [PROMPTS[1] | {"instruction_id_list": [], "kwargs": []}])
    assert call(files, **{key: str(value).replace("{f}", str(files)) for key, value in changes.items()}) == 2
    err = capsys.readouterr().err
    assert message.replace("{f}", str(files)) in err and err.count("\n") == 1 and not (files / "run").exists()


OTHER = {  # field -> (another value, what else it needs)
    "data.source": ("{f}/less.jsonl", {}), "data.fields": ("id=key,note=prompt,prompt=also", {}), "data.split": ("test", {}), "data.limit": ("2", {}),
    "responses.source": ("{f}/others.jsonl", {"policy.model": "", "responses.source": "{f}/answers.jsonl"}),
    "responses.fields": ("response=prompt", {"policy.model": "", "responses.source": "{f}/answers.jsonl"}),
    "thinking": ("keep", {"policy.model": "", "responses.source": "{f}/answers.jsonl"}),
    "bootstrap": ("9", {}), "seed": ("3", {}), "shown": ("1", {}),
    **{f"policy.{name}": (value, {f"policy.{key}": other for key, other in needs.items()}) for name, (value, needs) in policy_spy.POLICY.items()},
}  # fmt: skip


def test_no_setting_is_forgotten_here():
    """`kind` is the dispatch's, `overwrite` the run directory's."""
    assert set(OTHER) == set(field_names(load_config("configs/ifeval.py"))) - {"kind", "overwrite"}


@pytest.mark.parametrize("field", OTHER)
def test_every_setting_matters(tmp_path, field):
    rows = [row | {"also": f"{row['prompt']} Please."} for row in PROMPTS]
    write(tmp_path / "prompts.jsonl", rows)
    write(tmp_path / "less.jsonl", rows[:3])
    for file, responses in (("answers", RESPONSES), ("others", RESPONSES[::-1])):
        write(tmp_path / f"{file}.jsonl", [{"prompt": p["prompt"], "response": r} for p, r in zip(PROMPTS, responses)])

    def outcome(name, changes):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            policy_spy.install(patch, seen)

            def read(source, fields, **how):
                seen.append(("read", repr(sorted(how.items()))))
                return read_prompts(source, fields, **{**how, "split": "train"})

            patch.setattr(ifeval, "read_prompts", read)
            base = {"data.source": "{f}/prompts.jsonl", "policy.model": "m", "bootstrap": "30"}
            settings = {key: value.replace("{f}", str(tmp_path)) for key, value in (base | changes).items()}
            dispatch.run(load_config("configs/ifeval.py", settings), str(tmp_path / name))
        return seen, {key: value for key, value in total(tmp_path, name).items() if key not in ("seconds", "data")}

    read_prompts = ifeval.read_prompts
    value, needs = OTHER[field]
    assert outcome("a", needs) != outcome("b", needs | {field: value})


def test_the_real_file(assets, tmp_path):
    """541 prompts and 834 instructions of 25 types. A model that repeats the prompt follows few of them."""
    source = assets / "data/ifeval/input_data.jsonl"
    rows = ifeval.read_prompts(str(source), {"id": "key"})
    assert len(rows) == 541 and sum(len(row["instructions"]) for row in rows) == 834
    write(tmp_path / "answers.jsonl", [{"prompt": row["prompt"], "response": row["prompt"]} for row in rows])
    assert call(tmp_path, **{"data.source": source, "responses.source": tmp_path / "answers.jsonl"}) == 0
    record = total(tmp_path)
    assert {name: counted for name, (_, counted) in counts(record).items()} == {
        "prompt_strict": 541, "instruction_strict": 834, "prompt_loose": 541, "instruction_loose": 834,
    }  # fmt: skip
    assert sum(not name.endswith(":") for name in record["types"]) == 25 and len(record["shown"]) == 40
    assert 0.05 < record["figures"]["prompt_strict"]["value"] < record["figures"]["prompt_loose"]["value"] < 0.5


def test_a_response_that_never_ends_its_reasoning_has_said_nothing():
    told = [ifeval.answer_text(text) for text in ("<think>a", "a</think> b", "<think>a</think>\n\nb</think>c", "plain")]
    assert told == ["", "b", "c", "plain"] and ifeval.answer_text("<think>a", "keep") == "<think>a"
    with pytest.raises(UserError, match="is 3; it must be a text"):
        ifeval._pair({"prompt": "a", "response": 3}, {}, "x:1")
