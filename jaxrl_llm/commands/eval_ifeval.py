"""`jaxrl-llm eval --config=configs/ifeval.py`: IFEval of any policy, or of responses that are there, one JSON and one page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxrl_llm import __version__
from jaxrl_llm.commands import _answers
from jaxrl_llm.config import check_fields
from jaxrl_llm.data.sources import parse_fields
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals import ifeval
from jaxrl_llm.run_dir import RunDir, to_plain, write_json, write_text

TOTAL, VERDICTS = "eval.json", "verdicts.jsonl"  # what the workdir gets beside the run's own files
INF = float("inf")


def run(config: Any, workdir: str) -> None:
    """Judges a response to every prompt and writes figures and page; see configs/ifeval.py for the fields.

    Raises:
      UserError: no prompts, or ones with unknown instructions; nobody who answers, or several; a setting out of its range; and what reading,
        loading and asking raise.
    """
    from jaxrl_llm.report import write_report
    from jaxrl_llm.report.ifeval import ifeval_page

    check(config)
    start = time.monotonic()
    rows = ifeval.read_prompts(config.data.source, parse_fields(config.data.fields), split=config.data.split, limit=config.data.limit)
    given = None
    if config.responses.source:
        given = ifeval.read_responses(config.responses.source, parse_fields(config.responses.fields), rows)
    run_dir = RunDir(workdir, config, kind="eval_ifeval", owns=(TOTAL, VERDICTS, f"{_answers.CACHE}*"))
    if given is None:
        settled = _answers.answers(config.policy, rows, run_dir)
    else:
        settled = {name: {"id": name, "response": response, "reason": ""} for name, response in given.items()}
    if not run_dir.is_writer:
        return
    answered = [row for row in rows if settled.get(row["id"], {}).get("response") is not None]
    judged = []
    for row in tqdm(answered, desc="verdicts", unit="prompt", disable=None, mininterval=0.5):
        judged.append((row, ifeval.judge(row, ifeval.answer_text(settled[row["id"]]["response"], config.thinking))))
    record = {
        "kind": "eval_ifeval", "answered_by": config.responses.source or _answers.named(config.policy), "data": config.data.source,
        "prompts": len(rows), "instructions": sum(len(row["instructions"]) for row in rows), "answered": len(answered),
        "unanswered": unanswered(rows, settled), "undecided": undecided(judged),
        "figures": ifeval.figures(judged, draws=config.bootstrap, seed=config.seed), "types": ifeval.by_type(judged),
        "shown": shown(judged, settled, config.shown), "seconds": round(time.monotonic() - start, 2), "versions": {"jaxrl_llm": __version__},
    }  # fmt: skip
    write_text(run_dir.path / VERDICTS, "".join(_line(row, verdicts) for row, verdicts in judged))
    write_json(run_dir.path / TOTAL, record)
    page = run_dir.path / "report.html"
    write_report(page, ifeval_page(to_plain(record), config.to_dict()))
    print(summary_line(record))
    print(f"{run_dir.path / TOTAL}\nreport: {page}")


def check(config: Any) -> None:
    """Raises UserError for a config that could not be run to its end, before anything is read."""
    if not config.data.source:
        raise UserError("no prompts: name IFEval's file with --config.data.source=...")
    check_fields(config, _answers.CHOICES | {"thinking": ("drop", "keep")}, _answers.RANGES | {
        "data.limit": (1, INF), "bootstrap": (1, INF), "seed": (0, INF), "shown": (0, INF),
    })  # fmt: skip
    if not config.responses.source:
        _answers.check_policy(config.policy, "--config.responses.source=FILE")
    elif config.policy.model or config.policy.url:
        raise UserError("both responses.source and a policy are given: leave one out")


def unanswered(rows: Sequence[Mapping[str, Any]], settled: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """{reason: how many prompts have no response for it}."""
    counts: dict[str, int] = {}
    for row in rows:
        record = settled.get(row["id"], {"response": None, "reason": "no response yet"})
        if record["response"] is None:
            counts[record["reason"]] = counts.get(record["reason"], 0) + 1
    return counts


def undecided(judged: Sequence[tuple[Mapping[str, Any], ifeval.Verdicts]]) -> int:
    """Instructions without a strict verdict."""
    return sum(verdict.value is None for _, verdicts in judged for verdict in verdicts["strict"])


def shown(judged: Sequence[tuple[Mapping[str, Any], ifeval.Verdicts]], settled: Mapping[str, Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Prompts for the page, spread evenly over the set, half of them followed where there are so many."""
    kinds: dict[bool, list[Any]] = {True: [], False: []}
    for row, verdicts in judged:
        kinds[ifeval.followed(verdicts["strict"]) is True].append((row, verdicts))
    good = min(len(kinds[True]), most - min(len(kinds[False]), most // 2))
    chosen = [*_spread(kinds[True], good), *_spread(kinds[False], most - good)]
    order = {row["id"]: place for place, (row, _) in enumerate(judged)}
    return [
        {
            "id": row["id"], "prompt": row["prompt"], "response": settled[row["id"]]["response"], "followed": ifeval.followed(verdicts["strict"]),
            "instructions": [name for name, _ in row["instructions"]],
            "reasons": [verdict.reason for verdict in verdicts["strict"] if verdict.value != 1.0],
        }
        for row, verdicts in sorted(chosen, key=lambda one: order[one[0]["id"]])
    ]  # fmt: skip


def _spread(entries: list[Any], most: int) -> list[Any]:
    return entries if len(entries) <= most else [entries[i * len(entries) // most] for i in range(most)]


def _line(row: Mapping[str, Any], verdicts: ifeval.Verdicts) -> str:
    """A line of VERDICTS."""
    import json

    told = [
        {"name": name, "strict": str(strict.status), "loose": str(loose.status), "reason": strict.reason}
        for (name, _), strict, loose in zip(row["instructions"], verdicts["strict"], verdicts["loose"], strict=True)
    ]
    return json.dumps({"id": row["id"], "instructions": told}, ensure_ascii=False) + "\n"


def summary_line(record: Mapping[str, Any]) -> str:
    """The four accuracies, and what is missing."""
    told = []
    for name, figure in record["figures"].items():
        level, _, way = name.rpartition("_")
        if figure["value"] is not None:
            told.append(f"{level} {way} {100 * figure['value']:.1f}% ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})")
    missing = sum(record["unanswered"].values())
    tail = (f"; {missing} prompts without a response" if missing else "") + (f"; {record['undecided']} undecided" if record["undecided"] else "")
    return f"{record['answered']} of {record['prompts']} prompts: {', '.join(told) or 'no verdict'}{tail}"
