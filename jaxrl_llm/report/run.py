"""Reads a run directory of any verb (grpo, sft, train_sae, ...) into the data of a page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError, from_os_error
from jaxrl_llm.report.schema import validate
from jaxrl_llm.run_dir import write_json

DATA_FILE = "report.json"  # an experiment's own page data, beside its other files

# (title, keys of metrics.jsonl, options): one panel each, in this order; any other number gets a panel of its own after them.
PANELS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("Reward", ("reward",), {}),
    ("Pass rate", ("pass_rate",), {"percent": True}),
    ("Loss", ("loss",), {}),
    (
        "Pairs told apart",
        ("accuracy",),
        {"percent": True, "note": "The implicit reward of the chosen completion is above the other's; a tie counts half."},
    ),
    ("Margin of the implicit reward", ("margin",), {}),
    ("Implicit reward", ("implicit_chosen", "implicit_rejected"), {}),
    ("Log-probability of completions", ("logp_chosen", "logp_rejected"), {"note": "Sum over a completion, in nats."}),
    ("Pairs to learn from", ("pairs", "tied"), {"note": "Tied: all samples of a prompt have one reward, so there is no pair."}),
    (
        "Groups of equal rewards",
        ("zero_spread",),
        {"percent": True, "note": "All samples of such a group got the same reward: it teaches nothing."},
    ),
    ("Entropy of the policy", ("entropy",), {}),
    ("KL to the reference", ("kl",), {}),
    ("Clipped tokens", ("clip_share",), {"percent": True}),
    ("Ratio of new to old policy", ("ratio",), {}),
    ("Completion length", ("completion_length",), {}),
    ("Cut at the length limit", ("cut_off",), {"percent": True}),
    (
        "Sampler against trainer",
        ("logp_diff_mean", "logp_diff_max"),
        {"log": True, "note": "Difference of their log-probabilities of the sampled tokens; 0 is perfect agreement."},
    ),
    ("Gradient norm", ("grad_norm",), {}),
    ("Seconds a step", ("seconds_rollout", "seconds_reward", "seconds_reward_waited", "seconds_update", "seconds_schedule"), {}),
    ("Seconds a record", ("seconds",), {}),
    ("Tokens a second", ("tokens_per_s",), {}),
    ("Completions without a verdict", ("errors", "timeouts", "infrastructure"), {}),
)
SHORT_NAMES = {
    "logp_diff_mean": "mean",
    "logp_diff_max": "max",
    "seconds_rollout": "rollout",
    "seconds_reward": "reward",
    "seconds_reward_waited": "waited for the reward",
    "seconds_update": "update",
    "seconds_schedule": "schedule",
    "implicit_chosen": "chosen",
    "implicit_rejected": "rejected",
    "logp_chosen": "chosen",
    "logp_rejected": "rejected",
}
NOT_METRICS = {"kind", "step", "set", "n", "k", "by"}
MAX_GROUPS = 9  # of an evaluation's breakdown (levels, topics) drawn as lines


def save_data(run_dir: str | os.PathLike[str], data: Any) -> None:
    """Keeps an experiment's page data in its run directory, so that `jaxrl-llm report` can draw the page anew.

    Raises:
      UserError: the data does not fit the schema, or the disk refuses.
    """
    write_json(Path(run_dir) / DATA_FILE, validate(data))


def run_report(run_dir: str | os.PathLike[str], *, title: str = "", samples: int = 60) -> dict[str, Any]:
    """The page data (`schema.ReportData`) of a run directory.

    An experiment's own `report.json` is used where there is one; of a curate run its signals and its set (`report.curate`), of an eval run its
    eval.json (`report.sae_eval`); otherwise curves,
    panels, samples and config are read from metrics.jsonl, samples.jsonl, config.json and summary.json.

    Args:
      run_dir: the directory.
      title: the page's title; "" makes one from the kind of run and the directory's name.
      samples: at most so many prompts among the rollouts, spread evenly over the run, the latest first.

    Raises:
      UserError: the directory is not there or holds nothing to show, or a file is broken (named with its line).
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"{path} is not a run directory: there is no such folder; give the --workdir of a run")
    if (path / DATA_FILE).exists():
        own = _read_json(path / DATA_FILE)
        return dict(validate({**own, "title": title} if title else own))
    head, summary = _read_json(path / "config.json"), _read_json(path / "summary.json")
    if head.get("kind") == "curate":
        from jaxrl_llm.report.curate import curate_page

        return dict(validate(curate_page(path, head, title)))
    if head.get("kind") == "eval_sae":
        from jaxrl_llm.report.sae_eval import comparison_page

        total = _read_json(path / "eval.json")
        if not total:
            raise UserError(f"{path} holds an eval run that did not finish: the same command goes on with it")
        return dict(validate(comparison_page(total["saes"], head["config"], title or path.resolve().name)))
    metrics, sample_rows = _read_lines(path / "metrics.jsonl"), _read_lines(path / "samples.jsonl")
    if not metrics and not sample_rows:
        raise UserError(f"{path} holds nothing to report: no records in metrics.jsonl or samples.jsonl; give the --workdir of a run")
    kind = str(head.get("kind", "run"))
    sample_rows = _flat_samples(sample_rows)
    train = [r for r in metrics if r.get("kind", "train") not in ("eval", "change")]
    evals = [r for r in metrics if r.get("kind") == "eval"]
    data: dict[str, Any] = {
        "kind": "run",
        "title": title or f"{kind}: {path.resolve().name}",
        "subtitle": f"jaxrl-llm {kind}",
        "headline": _headline(train, evals),
        "facts": _facts(train, evals),
        "curves": _eval_charts(evals),
        **_panels(train),
        "rollouts": _rollouts(sample_rows, samples),
        "config": head.get("config", {}),
        "provenance": _provenance(head, summary, train),
        "left_out": {} if sample_rows else {"rollouts": "samples.jsonl is empty or not there"},
    }
    if not evals and kind in ("grpo", "run"):
        data["left_out"]["curves"] = "metrics.jsonl holds no evaluation"
    return dict(validate({key: value for key, value in data.items() if value not in ([], {})}))


# ---- files ----


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file is not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): run the command that made the directory again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file, [] where it is not there; a last line cut short by a kill is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the run was killed while writing, or is writing now
                break
            raise UserError(f"{path}:{number} is not JSON ({error}): mend or delete that line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number} must be a JSON object, it is a {type(record).__name__}: mend or delete that line")
        records.append(record)
    return records


# ---- what the records say ----


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float | None]]:
    """Steps and values of one metric over the records that have it; a record that logged None is a gap."""
    there = [r for r in records if key in r and _is_number(r.get("step"))]
    return [r["step"] for r in there], [r[key] if _is_number(r[key]) else None for r in there]


def _panels(train: list[dict[str, Any]]) -> dict[str, Any]:
    """A panel for each metric that moves, and one line for those that never do."""
    if all(r.get("reward") == r.get("pass_rate") for r in train):  # a reward of 0 or 1: one panel is enough
        train = [{key: value for key, value in r.items() if key != "reward"} for r in train]
    numeric = dict.fromkeys(key for r in train for key, value in r.items() if _is_number(value) and key not in NOT_METRICS)
    named = {key for _, keys, _ in PANELS for key in keys}
    wanted = [*PANELS, *((_title(key), (key,), {}) for key in numeric if key not in named)]
    panels, constant = [], []
    for title, keys, options in wanted:
        series = []
        for key in keys:
            steps, values = _series(train, key)
            found = {v for v in values if v is not None}
            if len(found) == 1 and len(values) > 1:
                constant.append(f"{key} {found.pop():.6g}")
            elif found:
                series.append({"label": SHORT_NAMES.get(key, key), "steps": steps, "values": values})
        if series:
            panels.append({"title": title, "series": series, **options})
    return {"panels": panels, "panels_note": f"The same at every step: {', '.join(constant)}." if constant else ""}


def _title(key: str) -> str:
    words = key.replace("_", " ").replace("/", ", ")
    return words[:1].upper() + words[1:]


def _eval_charts(evals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step: accuracy of every set, greedy and over samples; reward, where it says more; loss and margin of preferences; then each
    set's breakdowns."""
    sets = list(dict.fromkeys(str(r.get("set", "held-out")) for r in evals))
    graded = any(r.get("reward") != r.get("accuracy") for r in evals)  # else each verdict is 0 or 1 and the two are one
    wanted = [("accuracy", ("accuracy", "avg_at_k")), ("reward", ("reward", "reward_at_k") if graded else ()), ("loss", ("loss",))]
    charts = []
    for what, keys in [*wanted, ("margin", ("margin",))]:
        series = []
        for name in sets:
            records = [r for r in evals if str(r.get("set", "held-out")) == name]
            samples = next((r["k"] for r in records if r.get("k")), "k")
            series += [_curve(f"{name}, avg@{samples}" if key.endswith("_at_k") else name, records, key) for key in keys]
        charts.append(_chart(f"Held-out {what}", what, [s for s in series if s["steps"]]))
    for name in sets:
        records = [r for r in evals if str(r.get("set", "held-out")) == name]
        for field in dict.fromkeys(field for r in records for field in r.get("by") or {}):
            groups = dict.fromkeys(group for r in records for group in (r.get("by") or {}).get(field, {}))
            if 1 < len(groups) <= MAX_GROUPS:
                flat = [{"step": r.get("step"), **(r.get("by") or {}).get(field, {})} for r in records]
                charts.append(_chart(f"{name}, by {field}", "accuracy", [_curve(f"{field} {g}", flat, g, sub=True) for g in groups]))
    return [chart for chart in charts if chart["series"]]


def _curve(label: str, records: list[dict[str, Any]], key: str, *, sub: bool = False) -> dict[str, Any]:
    if sub:  # a group's value may be a number or a record with its own accuracy
        records = [{**r, key: r[key].get("accuracy") if isinstance(r.get(key), dict) else r.get(key)} for r in records]
    steps, values = _series(records, key)
    return {"arm": label, "steps": steps, "mean": values}


def _chart(title: str, what: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    values = [v for s in series for v in s["mean"] if v is not None]
    share = what == "accuracy" and bool(values) and max(values) <= 1.0 and min(values) >= 0.0
    return {"title": title, "series": series, "x_label": "step", "y_label": what, "percent": share}


def _tenths(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The means of the first and of the last tenth of a series."""
    found = [v for v in values if v is not None]
    if len(found) < 2:
        return None
    width = max(1, len(found) // 10)
    return sum(found[:width]) / width, sum(found[-width:]) / width


def _headline(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> str:
    """One sentence of what changed: held-out accuracy where measured, else reward, else loss."""
    for name in dict.fromkeys(str(r.get("set", "held-out")) for r in evals):
        records = [r for r in evals if str(r.get("set", "held-out")) == name and _is_number(r.get("accuracy"))]
        if len(records) > 1:
            first, last = records[0], records[-1]
            return (
                f"Accuracy on {name} went from {first['accuracy']:.1%} at step {first['step']} "
                f"to {last['accuracy']:.1%} at step {last['step']}."
            )
        if records:
            return f"Accuracy on {name} is {records[0]['accuracy']:.1%} at step {records[0]['step']}."
    for key, word in (("reward", "Reward"), ("loss", "Loss")):
        steps, values = _series(train, key)
        ends = _tenths(values)
        if ends:
            return f"{word} went from {ends[0]:.3g} to {ends[1]:.3g} over {len(steps)} logged steps (means of the first and last tenth)."
    return f"{len(train)} training records, {len(evals)} evaluations."


def _facts(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[dict[str, str]]:
    steps = [r["step"] for r in [*train, *evals] if _is_number(r.get("step"))]
    facts = [{"label": "steps", "value": f"{max(steps):,}"}] if steps else []
    for key, label, form in (("pass_rate", "pass rate", "{:.1%}"), ("reward", "reward", "{:.3g}"), ("loss", "loss", "{:.3g}")):
        ends = _tenths(_series(train, key)[1])
        if key == "loss" and len(facts) > 1:
            continue  # the loss of GRPO says nothing by itself
        if ends:
            facts.append({"label": f"{label}, last tenth", "value": form.format(ends[1]), "detail": f"{form.format(ends[0])} at the start"})
    speeds = [v for v in _series(train, "tokens_per_s")[1] if v is not None]
    if speeds:
        facts.append({"label": "tokens a second", "value": f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "detail": "median step"})
    return facts[:5]


def _first(record: dict[str, Any], *keys: str) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _flat_samples(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a completion: a GRPO record holds several prompts with several responses each."""
    rows = []
    for record in records:
        if not isinstance(record.get("prompts"), list):
            rows.append(record)
            continue
        for prompt in record["prompts"]:
            head = {key: value for key, value in prompt.items() if key != "responses"} | {"step": record.get("step")}
            rows += [head | response for response in prompt.get("responses", [])]
    return rows


def _rollouts(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Samples grouped by prompt, prompts with the latest samples first, a prompt's samples in order of step."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(str(_first(row, "prompt", "id") or ""), []).append(row)
    latest = sorted(by_prompt.items(), key=lambda item: -max(_step(row) for row in item[1]))
    items = []
    chosen = latest if len(latest) <= limit else [latest[i * len(latest) // limit] for i in range(limit)]
    for prompt, group in chosen:
        group = sorted(group, key=_step)
        if len(group) > 8:  # the start and the end tell the story
            group = group[:4] + group[-4:]
        answer = _first(group[0], "answer", "gold")
        items.append(
            {
                "prompt": prompt,
                "answer": None if answer is None else str(answer),
                "tags": {key: group[0][key] for key in ("set", "topic", "level", "subject") if group[0].get(key) is not None},
                "responses": [_response(row) for row in group],
            }
        )
    return items


def _step(row: dict[str, Any]) -> float:
    return row["step"] if _is_number(row.get("step")) else -1


def _response(row: dict[str, Any]) -> dict[str, Any]:
    score = _first(row, "score", "reward", "value")
    score = float(score) if _is_number(score) else None
    status = _first(row, "status", "verdict")
    if status is None:
        status = "UNJUDGED" if score is None else "PASS" if score >= 1 else "FAIL"
    reason = _first(row, "reason")
    text = str(_first(row, "response", "completion", "text") or "")
    response: dict[str, Any] = {"text": text, "status": str(status).split(".")[-1].upper(), "score": score}
    if _is_number(row.get("step")):
        response["step"] = int(row["step"])
    return response | ({} if reason is None else {"reason": str(reason)})


def _provenance(head: dict[str, Any], summary: dict[str, Any], train: list[dict[str, Any]]) -> dict[str, Any]:
    """Versions, seed, the time split of the steps, and what the run wrote into summary.json."""
    out: dict[str, Any] = {"other": dict(summary)}
    if head.get("version"):
        out["versions"] = {"jaxrl_llm": head["version"], **(summary.get("versions") or {})}
        out["other"].pop("versions", None)
    seed = head.get("config", {}).get("seed") if isinstance(head.get("config"), dict) else None
    if isinstance(seed, int):
        out["seeds"] = [seed]
    overlapped = any("seconds_reward_waited" in r for r in train)  # then the rest of the judging is in the time of the rollouts
    stages = [
        {"name": SHORT_NAMES[key], "seconds": sum(v for v in _series(train, key)[1] if v is not None)}
        for key in ("seconds_rollout", "seconds_reward_waited" if overlapped else "seconds_reward", "seconds_update")
        if any(key in r for r in train)
    ]
    if stages:
        out["stages"] = stages
    return out
