"""`jaxrl-llm eval --config=configs/agentif.py`: AgentIF of any policy, of a result file's stored scores, or on rows made anew."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxrl_llm import __version__
from jaxrl_llm.commands import _answers
from jaxrl_llm.config import check_fields
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.agentif import figures, fresh, rows, sequences
from jaxrl_llm.evals.agentif.outcomes import Outcome, Result, absent_outcome, stored_outcome
from jaxrl_llm.evals.agentif.rows import FUNCTION, LLM, Row, Rows
from jaxrl_llm.rewards.chat import ChatClient, ChatConfig
from jaxrl_llm.rewards.judge import MODES
from jaxrl_llm.rewards.sandbox import layers
from jaxrl_llm.rewards.sandbox.pool import Job, Limits, Sandbox
from jaxrl_llm.run_dir import RunDir, to_plain, write_json, write_text

TOTAL, RESULTS, MADE, REFERENCES, CACHE = "eval.json", "results.jsonl", "rows.json", "references.jsonl", "judge.sqlite"
INF = float("inf")
MOST_TEXT = 4000  # characters of a prompt or response on the page
MOST_TOLD = 50  # broken constraints and disagreements that eval.json names


def run(config: Any, workdir: str) -> None:
    """Evaluates every row that is not finished and writes figures, results and page; see configs/agentif.py for the fields.

    Raises:
      UserError: no rows, or ones that cannot be read (file, line and field are named); no outputs and nobody who answers; a setting out of its
        range; and what loading, asking and the sandbox raise.
    """
    from jaxrl_llm.report import write_report
    from jaxrl_llm.report.agentif import agentif_page

    check(config)
    start = time.monotonic()
    made = fresh.make_rows(config.make.rows, config.make.seeds, config.make.words) if config.make.rows else []
    found = _read(made) if made else rows.read_agentif(config.data.source, limit=config.data.limit, on_bad=config.data.on_bad)
    whole = rows.read_agentif(config.data.whole, on_bad=config.data.on_bad) if config.data.whole else Rows()
    stored = is_stored(config, found)
    sandbox = None if stored else make_sandbox(config)  # a host that cannot isolate code is refused before anybody answers
    run_dir = RunDir(workdir, config, kind="eval_agentif", owns=(TOTAL, RESULTS, MADE, REFERENCES, f"{CACHE}*", f"{_answers.CACHE}*"))
    if made and run_dir.is_writer:
        write_made(run_dir, made)
    outputs = {row_id(row): row.output for row in found} if stored else read_outputs(config, found, run_dir)
    if not run_dir.is_writer:
        return
    if sandbox is None:
        judged = [(row, [stored_outcome(row, constraint) for constraint in row.constraints]) for row in found]
        again = replay(config, judged) if config.replay else None
    else:
        with sandbox:
            judged, again = evaluate(config, found, outputs, run_dir, sandbox), None
        write_results(run_dir, judged, outputs, answered_by(config, found))
    there = {row.key for row in found}
    absent = [row for row in whole if row.key not in there]
    judged += [(row, [absent_outcome(constraint) for constraint in row.constraints]) for row in absent]
    record = describe(config, found, judged, outputs, stored) | {"absent": len(absent), "replay": again}
    record |= {"seconds": round(time.monotonic() - start, 2), "versions": {"jaxrl_llm": __version__}}
    write_json(run_dir.path / TOTAL, record)
    page = run_dir.path / "report.html"
    write_report(page, agentif_page(to_plain(record), config.to_dict()))
    print(summary_line(record))
    if record["infrastructure"]:
        print(f"{record['infrastructure']} constraints have no verdict yet ({record['waiting']}); the same command asks again", file=sys.stderr)
    print(f"{run_dir.path / TOTAL}\nreport: {page}")


def check(config: Any) -> None:
    """Raises UserError for a config that could not be run to its end, before anything is read."""
    if bool(config.data.source) == bool(config.make.rows):
        told = "both data.source and make.rows are given: leave one out" if config.make.rows else "no rows"
        raise UserError(f"{told}; name AgentIF's file with --config.data.source=..., or make rows with configs/agentif.py:fresh")
    choices = {"data.on_bad": ("error", "skip"), "scores": ("auto", "stored", "fresh"), "judge.prompts": sequences.PROMPTS, "judge.mode": MODES}
    choices |= {"sandbox.isolation": layers.ISOLATIONS}
    ones = ("data.limit", "judge.workers", "judge.max_tokens", "sandbox.workers", "batch_rows", "bootstrap")
    ranges = dict.fromkeys(ones, (1, INF)) | dict.fromkeys(("make.rows", "seed", "shown"), (0, INF))
    ranges |= {"judge.timeout": (0.001, INF), "sandbox.wall_s": (0.001, INF)}
    check_fields(config, choices | _answers.CHOICES, ranges | _answers.RANGES)
    if config.policy.model or config.policy.url or config.make.rows:
        _answers.check_policy(config.policy, "a source that holds outputs")
    if config.judge.url and not config.judge.model:
        raise UserError("judge.url without judge.model: name the model that the server is to use")


def is_stored(config: Any, found: Rows) -> bool:
    """Whether the source's own scores are told. Raises UserError where they are to be and are not there, or a policy is to answer beside them."""
    there = any(row.scored for row in found)
    if config.scores == "stored" and not there:
        raise UserError(f"{config.data.source} holds no scores, which config key 'scores' asks for: set it to 'fresh', or name a result file")
    stored = there and config.scores != "fresh"
    if stored and (config.policy.model or config.policy.url):
        raise UserError(f"{config.data.source} holds scores of other responses: leave the policy out, or set --config.scores=fresh")
    if not stored:
        for row in found:
            for constraint in row.constraints:
                if constraint.unreadable and config.data.on_bad == "error":
                    raise UserError(f"{constraint.broken}; data.on_bad=skip leaves such constraints out")
    return stored


def _read(made: Sequence[fresh.Made]) -> Rows:
    """Made rows, read as a file's are."""
    found = Rows()
    for place, one in enumerate(made):
        found.append(rows.parse_row(one.row, f"made row {place}", place, found.notes))
    return found


def write_made(run_dir: RunDir, made: Sequence[fresh.Made]) -> None:
    """The rows in the published schema, and the responses that keep and break their rules."""
    write_json(run_dir.path / MADE, [one.row for one in made])
    lines = [json.dumps({"id": one.row["id"], "reference": one.reference, "violations": one.violations}) for one in made]
    write_text(run_dir.path / REFERENCES, "\n".join(lines) + "\n")


def row_id(row: Row) -> str:
    """By its place and its content: names are not unique in the published file."""
    return f"{row.index}-{row.key}"


def read_outputs(config: Any, found: Rows, run_dir: RunDir) -> dict[str, str | None]:
    """{row id: response} of the rows whose response is settled; None where there is none."""
    if not config.policy.model and not config.policy.url:
        if all(row.output is None for row in found):
            raise UserError(f"{config.data.source} holds no outputs: let a model answer with --config.policy.model=... or --config.policy.url=...")
        return {row_id(row): row.output for row in found}
    asked = [
        {"id": row_id(row), "prompt": "\n\n".join(message["content"] for message in row.messages), "messages": list(row.messages)} for row in found
    ]
    return {name: record["response"] for name, record in _answers.answers(config.policy, asked, run_dir).items()}


def evaluate(config: Any, found: Rows, outputs: Mapping[str, str | None], run_dir: RunDir, sandbox: Sandbox) -> list[figures.Judged]:
    """The outcomes of every row. A row is written down when it is done; one with a constraint that nobody has judged is judged again."""
    client = asker = None
    if config.judge.url:
        client = ChatClient(ChatConfig(
            config.judge.url, config.judge.model, config.judge.key_variable, timeout=config.judge.timeout, workers=config.judge.workers,
            max_tokens=config.judge.max_tokens, cache=str(run_dir.path / CACHE),
        ))  # fmt: skip
        asker = sequences.Asker(client, config.judge.prompts, config.judge.mode)
    done = {record["id"]: record["outcomes"] for record in run_dir.samples() if "outcomes" in record}
    known = {name: [Outcome(Result(one.pop("result")), **one) for one in outcomes] for name, outcomes in done.items()}
    known = {name: outcomes for name, outcomes in known.items() if not any(one.result is Result.INFRASTRUCTURE for one in outcomes)}
    left = [row for row in found if row_id(row) not in known]
    chunks = [left[i : i + config.batch_rows] for i in range(0, len(left), config.batch_rows)]
    try:
        for chunk in tqdm(chunks, desc="evaluating", unit=f"{config.batch_rows} rows", disable=None, mininterval=0.5):
            settled = [row for row in chunk if row_id(row) in outputs]
            tasks = [(constraint, outputs[row_id(row)]) for row in settled for constraint in row.constraints]
            outcomes = iter(sequences.evaluate(tasks, asker, sandbox, exec_text=config.sandbox.exec_text))
            for row in chunk:
                if row_id(row) in outputs:
                    known[row_id(row)] = [next(outcomes) for _ in row.constraints]
                    told = [dataclasses.asdict(one) | {"said": clean(one.said)} for one in known[row_id(row)]]
                    run_dir.sample({"id": row_id(row), "outcomes": told})
                else:
                    known[row_id(row)] = [Outcome(Result.INFRASTRUCTURE, reason="no response yet") for _ in row.constraints]
    finally:
        if client is not None:
            client.close()
    return [(row, known[row_id(row)]) for row in found]


def make_sandbox(config: Any) -> Sandbox:
    """The sandbox of a config. Raises UserError where the host cannot isolate code."""
    return Sandbox(config.sandbox.workers, Limits(wall_s=config.sandbox.wall_s), isolation=config.sandbox.isolation)


def replay(config: Any, judged: Sequence[figures.Judged]) -> dict[str, Any]:
    """{"run", "agree", "undecided": counts; "differ": places} of stored scores that code alone gave, against that code run again. A table of stored
    scores needs no code: where the host cannot isolate any, "refused" says so."""
    again = [
        (constraint, row.output, outcome) for row, outcomes in judged for constraint, outcome in zip(row.constraints, outcomes, strict=True)
        if constraint.sequence == "code" and not constraint.broken and isinstance(outcome.published, bool) and row.output
        and (config.sandbox.exec_text or not constraint.executes)
    ]  # fmt: skip
    told: dict[str, Any] = {"run": len(again), "agree": 0, "undecided": 0, "differ": []}
    step = 32 * config.sandbox.workers
    try:
        with make_sandbox(config) as sandbox:
            for i in tqdm(range(0, len(again), step), desc="checking code again", unit=f"{step} checks", disable=None, mininterval=0.5):
                part = again[i : i + step]
                calls = [(constraint.steps[0].text, sequences.spoken(output)) for constraint, output, _ in part]
                ran = sandbox.run([Job(code, FUNCTION, [text], group=hash(text)) for code, text in calls])
                for (constraint, _, outcome), one in zip(part, ran, strict=True):
                    if not isinstance(one.value, bool):
                        told["undecided"] += 1
                    elif one.value is outcome.published:
                        told["agree"] += 1
                    else:
                        told["differ"].append({"where": constraint.where, "stored": outcome.published, "now": one.value})
    except UserError as error:
        print(f"stored scores are told as they are, their code is not run again: {error}", file=sys.stderr)
        return told | {"run": 0, "refused": str(error)}
    return told


def answered_by(config: Any, found: Rows) -> str:
    """Whose responses are judged."""
    if config.policy.model or config.policy.url:
        return _answers.named(config.policy)
    models = {str(output["model_name"]) for row in found if isinstance(output := row.raw.get("output"), Mapping) and output.get("model_name")}
    return ", ".join(sorted(models)) or "the source's outputs"


def describe(config: Any, found: Rows, judged: Sequence[figures.Judged], outputs: Mapping[str, str | None], stored: bool) -> dict[str, Any]:
    """What eval.json tells of the rows and their outcomes."""
    how = {"draws": config.bootstrap, "seed": config.seed}
    counts = figures.tally(judged)
    flat = [(constraint, outcome) for row, outcomes in judged for constraint, outcome in zip(row.constraints, outcomes, strict=True)]
    waiting = sorted({outcome.reason for _, outcome in flat if outcome.result is Result.INFRASTRUCTURE})
    return {
        "kind": "eval_agentif", "source": config.data.source or f"made, seeds {', '.join(map(str, config.make.seeds))}",
        "answered_by": answered_by(config, found),
        "judged_by": "the source's scores" if stored else " and ".join(filter(None, ("code", config.judge.model))),
        "rows": len(found), "instructions": len({row.key for row in found}), "constraints": len(flat), "agents": len({row.agent for row in found}),
        "words": {"mean": sum(row.words for row in found) / len(found), "most": max(row.words for row in found)},
        "ways": figures.table(judged, **how), "lengths": figures.by_length(judged, **how), "outcomes": counts,
        "places": figures.by_place(judged, **how), "contamination": figures.fresh_difference(judged, seed=config.seed),
        "notes": dict(sorted(found.notes.items())),
        "skipped": found.skipped, "infrastructure": counts["all"].get("infrastructure", 0), "waiting": "; ".join(waiting)[:300],
        "broken": [{"where": c.where, "why": o.reason} for c, o in flat if o.result is Result.BROKEN][:MOST_TOLD],
        "errors": [{"where": c.where, "why": o.reason} for c, o in flat if o.result in (Result.ERROR, Result.TIMEOUT)][:MOST_TOLD],
        "executing": sum(constraint.executes for constraint, _ in flat), "shown": shown(judged, outputs, config.shown),
    }  # fmt: skip


def shown(judged: Sequence[figures.Judged], outputs: Mapping[str, str | None], most: int) -> list[dict[str, Any]]:
    """Rows for the page, spread evenly over the set."""
    answered = [(row, outcomes) for row, outcomes in judged if outputs.get(row_id(row)) is not None]
    chosen = answered if len(answered) <= most else [answered[i * len(answered) // most] for i in range(most)]
    told = []
    for row, outcomes in chosen:
        counted = [outcome.counts("strict") for outcome in outcomes if outcome.counts("strict") is not None]
        failing = [constraint.desc for constraint, outcome in zip(row.constraints, outcomes, strict=True) if outcome.counts("strict") is False]
        told.append({
            "name": row.name, "agent": row.agent, "words": row.words, "prompt": clip(row.messages[-1]["content"]),
            "response": clip(outputs[row_id(row)] or ""), "satisfied": sum(counted), "counted": len(counted),
            "failing": [clip(text, 200) for text in failing[:8]],
        })  # fmt: skip
    return told


def clean(text: str | None) -> str | None:
    """A text without halves of surrogate pairs, which no file may hold."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def clip(text: str, most: int = MOST_TEXT) -> str:
    """A text for the page."""
    whole = clean(text) or ""
    return whole if len(whole) <= most else f"{whole[:most]} ... [{len(whole) - most} characters more]"


def write_results(run_dir: RunDir, judged: Sequence[figures.Judged], outputs: Mapping[str, str | None], model: str) -> None:
    """The rows in the schema of the published results: a score where there is one, null for a closed gate or an error, and none where the judge is
    still to be asked."""
    lines = []
    for row, outcomes in judged:
        verdicts = []
        for constraint, outcome in zip(row.constraints, outcomes, strict=True):
            verdict: dict[str, Any] = {} if outcome.result is Result.INFRASTRUCTURE else {"score": None}
            if outcome.result in (Result.PASSED, Result.FAILED):
                verdict["score"] = outcome.result is Result.PASSED
            if outcome.said is not None and constraint.steps[-1].kind == LLM and "score" in verdict and outcome.result is not Result.CLOSED:
                verdict["llm_output"] = outcome.said
            verdicts.append(verdict)
        # Texts stay as they came, halves of surrogate pairs too: escapes hold them.
        lines.append(json.dumps(rows.with_results(row, outputs.get(row_id(row)), model, verdicts)))
    write_text(run_dir.path / RESULTS, "\n".join(lines) + "\n")


def summary_line(record: Mapping[str, Any]) -> str:
    """CSR and ISR in every way."""
    told = []
    for way, found in record["ways"].items():
        parts = [f"{name} {100 * found[name]['value']:.1f}%" for name in ("CSR", "ISR") if found[name]["value"] is not None]
        told.append(f"{way} {' '.join(parts) or 'nothing counts'}")
    return f"{record['rows']} rows, {record['constraints']} constraints: {', '.join(told)}"
