"""The pages of `jaxrl-llm eval` for IFEval and AgentIF: what they say of their figures, of what is missing, and what a browser makes of them."""

import copy

from browser import assert_whole

from jaxrl_llm.report import build_report, validate, write_report
from jaxrl_llm.report.agentif import agentif_page
from jaxrl_llm.report.ifeval import ifeval_page

CONFIG = {"kind": "x", "seed": 0}
NONE = {"value": None, "low": None, "high": None, "passed": 0, "counted": 0}


def figure(value, counted=100):
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "passed": round(value * counted), "counted": counted}


IFEVAL = {
    "answered_by": "a model", "data": "p.jsonl", "prompts": 12, "instructions": 20, "answered": 10, "unanswered": {"too long": 2}, "undecided": 1,
    "figures": {"prompt_strict": figure(0.5), "instruction_strict": figure(0.6), "prompt_loose": figure(0.55), "instruction_loose": figure(0.65)},
    "types": {name: {"strict": figure(v), "loose": figure(v)} for name, v in (("keywords:", 0.4), ("keywords:a", 0.4), ("keywords:b", 0.2))}
    | {"keywords:c": {"strict": NONE, "loose": NONE}},
    "shown": [{"id": "7", "prompt": "Say <b>.", "response": "b", "followed": False, "instructions": ["keywords:a"], "reasons": ["no <b>"]}],
    "seconds": 3.0, "versions": {"jaxrl_llm": "1"},
}  # fmt: skip


def way(value):
    names = {"vanilla": figure(value), "condition": NONE, "example": figure(value)}
    return {"CSR": figure(value), "ISR": figure(value / 2), "dimension": names, "type": {"formatting": figure(value)}, "meta": NONE}


AGENTIF = {
    "answered_by": "a model", "source": "r.json", "judged_by": "the source's scores", "rows": 7, "instructions": 6, "constraints": 1018, "agents": 2,
    "words": {"mean": 1723.4, "most": 15630}, "ways": {"published": way(0.6), "crashed": way(0.55), "strict": way(0.5)}, "absent": 1,
    "skipped": ["x"],
    "lengths": [{"low": 0, "high": 250, "words": 120.0, "rows": 3, "CSR": figure(0.8), "ISR": figure(0.3)},
                {"low": 12000, "high": None, "words": 15000.0, "rows": 4, "CSR": figure(0.4), "ISR": NONE}],
    "outcomes": {"all": {"passed": 7, "failed": 1000, "closed": 11}, "cond-llm-code": {"passed": 7}, "none": {"broken": 1}},
    "places": [{"place": "manual, middle"} | figure(0.3)],
    "contamination": [{"seed": 0, "other": 1, "rows": 40, "value": 0.1, "low": 0.05, "high": 0.15}], "notes": {"key 'is meta' for 'is_meta'": 150},
    "infrastructure": 0, "waiting": "", "broken": [], "errors": [], "executing": 10,
    "replay": {"run": 2015, "agree": 2014, "undecided": 0, "differ": [{"where": "r.json:1", "stored": True, "now": False}]},
    "shown": [{"name": "a/0", "agent": "b", "words": 120, "prompt": "Do.", "response": "Done.", "satisfied": 2, "counted": 3, "failing": ["this"]},
              {"name": "x", "agent": "y", "words": 1, "prompt": "p", "response": "r", "satisfied": 0, "counted": 0, "failing": []}],
    "seconds": 3.0, "versions": {"jaxrl_llm": "1"},
}  # fmt: skip


def test_ifevals_page():
    page = validate(ifeval_page(IFEVAL, CONFIG))
    assert page["headline"] == "50.0% of the prompts are followed as a whole and 60.0% of the instructions, by the strict reading. " \
        "2 of 12 prompts have no response and count in nothing."  # fmt: skip
    assert page["facts"][0] == {"label": "prompt, strict", "value": "50.0%", "detail": "50 of 100, 95% 45.0 to 55.0%"}
    assert [(table["title"], [row["name"] for row in table["rows"]]) for table in page["tables"][1:]] == [
        ("By group", ["keywords (100)"]), ("By type", ["keywords:b (100)", "keywords:a (100)"]),
    ]  # fmt: skip
    html = build_report(page)
    assert "no response: too long" in html and "instructions without a verdict" in html and "Say &lt;b&gt;." in html and "20.0%" in html
    none = copy.deepcopy(IFEVAL) | {"figures": dict.fromkeys(IFEVAL["figures"], NONE), "types": {}, "shown": [], "answered": 0}
    bare = validate(ifeval_page(none, CONFIG))
    assert bare["headline"] == "None of the 12 prompts has a response that could be judged." and "facts" not in bare
    build_report(bare)


def test_agentifs_page():
    page = validate(agentif_page(AGENTIF, CONFIG))
    assert page["headline"].startswith("50.0% of the constraints are satisfied and 25.0% of the instructions as a whole")
    assert [fact["label"] for fact in page["facts"]] == ["CSR, published", "ISR, published", "CSR, strict", "ISR, strict"]
    titles = [table["title"] for table in page["tables"]]
    assert titles == ["Success rates", "CSR by dimension", "CSR by type", "Content seen before", "Outcomes", "By length", "By place of the rule"]
    assert [row["name"] for row in page["tables"][4]["rows"]] == ["all", "condition, then llm, then code", "no evaluation"]
    assert [row["name"] for row in page["tables"][5]["rows"]] == ["0 to 250 words (3 rows)", "from 12,000 words (4 rows)"]
    (plot,) = page["plots"]
    assert [point["x"] for point in plot["series"][0]["points"]] == [120.0, 15000.0] and plot["series"][1]["points"][1]["value"] is None
    assert [item["responses"][0]["status"] for item in page["rollouts"]] == ["FAIL", "UNJUDGED"]
    html = build_report(page)
    told = ("1 differ", "dirty spot: key", "rows that the source lacks", "checks that execute text", ">1,000<", ">7<", "not satisfied: this")
    assert all(said in html for said in told)
    waiting = validate(agentif_page(AGENTIF | {"infrastructure": 3, "replay": None}, CONFIG))
    assert waiting["headline"].endswith("3 constraints still wait for a verdict and count in nothing.")
    nothing = AGENTIF | {"ways": {name: way(0.5) | {"CSR": NONE, "ISR": NONE} for name in AGENTIF["ways"]}, "lengths": [], "contamination": []}
    assert validate(agentif_page(nothing, CONFIG))["headline"] == "Of 1,018 constraints in 7 rows none has a verdict."


def test_a_browser_shows_both_pages_whole(tmp_path):
    write_report(tmp_path / "a.html", ifeval_page(IFEVAL, CONFIG))
    assert_whole(tmp_path / "a.html", tmp_path / "profile", set(), "By type")
    write_report(tmp_path / "b.html", agentif_page(AGENTIF, CONFIG))
    assert_whole(tmp_path / "b.html", tmp_path / "profile2", {"plot"}, "Content seen before")
