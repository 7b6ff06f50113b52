"""The sections to read closely: sample rollouts, telling SAE features, the config, provenance."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.report.arms import Arms
from jaxrl_llm.report.sections import note, scrolling
from jaxrl_llm.report.svg import clip, duration, esc, number, tag

MAX_ROLLOUTS = 200  # prompts on the page
ROLLOUTS_AT_ONCE = 6  # shown before "show more"
MAX_TEXT = 4000  # characters of a prompt or a response
MAX_CONTEXTS = 6  # of a feature
VERDICT_SIGNS = {"PASS": "✓", "FAIL": "✗", "ERROR": "!", "TIMEOUT": "…", "NOT_APPLICABLE": "–"}


# ---- rollouts ----


def rollouts(items: list[dict], arms: Arms) -> str:
    """Prompt by prompt, what each arm answered and how it was judged, with filters."""
    shown = items[:MAX_ROLLOUTS]
    names = list(dict.fromkeys(r["arm"] for item in shown for r in item["responses"] if "arm" in r))
    statuses = [s for s in VERDICT_SIGNS if any(r["status"] == s for item in shown for r in item["responses"])]
    controls = ""
    if len(names) > 1:
        options = [(name, arms.swatch(name) + esc("base (before GRPO)" if name == "base" else arms.label(name)), True) for name in names]
        controls += _controls("arms", "arm", options)
    outcomes = [(s, esc(s.lower().replace("_", " ")), False) for s in statuses]
    if any(_changed(item) for item in shown):
        outcomes.append(("changed", "verdict changed by training", False))
    if len(outcomes) > 1:
        controls += _controls("verdict", "show only", outcomes)
    cards = "".join(_rollout(item, arms, i) for i, item in enumerate(shown))
    body = controls + tag("div", cards, cls="rollouts", data_page=ROLLOUTS_AT_ONCE)
    body += tag("p", "No rollout fits these filters.", cls="note none-fit", hidden="")
    body += tag("button", "Show more", type="button", cls="more", hidden="")
    if len(items) > MAX_ROLLOUTS:
        body += note(f"The first {MAX_ROLLOUTS} of {len(items)} prompts.")
    return tag("div", body, cls="rollout-block", data_chart="rollouts")


def _controls(group: str, label: str, options: list[tuple[str, str, bool]]) -> str:
    buttons = "".join(
        tag("button", content, type="button", data_filter=group, data_value=value, aria_pressed="true" if on else "false")
        for value, content, on in options
    )
    return tag("div", tag("span", esc(label), cls="control-name") + buttons, cls="controls", role="group", aria_label=label)


def _changed(item: dict) -> bool:
    """Whether the base policy and a trained one were judged differently."""
    base = {r["status"] for r in item["responses"] if r.get("arm") == "base"}
    trained = {r["status"] for r in item["responses"] if r.get("arm") != "base"}
    return bool(base) and bool(trained - base)


def _rollout(item: dict, arms: Arms, place: int) -> str:
    tags = "".join(tag("span", f"{esc(k)} {esc(v)}", cls="pill") for k, v in (item.get("tags") or {}).items() if v is not None)
    answer = item.get("answer")
    gold = tag("span", "answer " + tag("b", esc(clip(str(answer), 200))), cls="gold") if answer is not None else ""
    head = tag("pre", esc(clip(item["prompt"], MAX_TEXT)), cls="prompt") + tag("div", gold + tags, cls="meta")
    responses = "".join(_response(response, arms) for response in item["responses"])
    return tag(
        "article",
        head + tag("ul", responses, cls="responses"),
        cls="rollout",
        data_changed="1" if _changed(item) else "0",
        data_hide="1" if place >= ROLLOUTS_AT_ONCE else None,
    )


def _response(response: dict, arms: Arms) -> str:
    status, name = response["status"], response.get("arm")
    who = (arms.swatch(name) + tag("span", esc(arms.label(name)), cls="who")) if name is not None else ""
    if response.get("step") is not None:
        who += tag("span", f"step {number(response['step'])}", cls="step")
    verdict = "" if status == "UNJUDGED" else f"{VERDICT_SIGNS.get(status, '·')} {esc(status.lower().replace('_', ' '))}"
    if response.get("score") is not None and response["score"] not in (0, 1):
        verdict += f" {number(response['score'])}"
    kind = status.lower() if status in VERDICT_SIGNS else "other"
    reason = tag("span", esc(clip(response["reason"], 240)), cls="reason") if response.get("reason") else ""
    shown = esc(clip(response["text"], MAX_TEXT)) or '<i class="quiet">(empty)</i>'
    line = tag("div", who + tag("span", verdict, cls=f"verdict {kind}") + reason, cls="response-head")
    return tag("li", line + tag("pre", shown), data_arm=name, data_status=status)


# ---- features ----


def features(items: list[dict]) -> str:
    """The most telling SAE features with their top contexts."""
    return tag("div", "".join(_feature(item) for item in items), cls="features")


def _feature(item: dict) -> str:
    effect = item.get("effect")
    facts = [tag("span", f"drives {esc(item['drives'])}", cls="pill")]
    if effect is not None:
        facts.append(tag("span", f"{esc(item.get('effect_label', 'weight'))} {tag('b', number(effect, signed=True))}"))
    if item.get("density") is not None:
        facts.append(tag("span", f"active on {tag('b', number(item['density'], percent=True))}"))
    head = tag("header", tag("h3", f"#{item['id']}") + "".join(facts))
    about = tag("p", esc(item["about"])) if item.get("about") else ""
    strongest = max((a for c in item["contexts"] for a in c["activations"] if a is not None), default=0.0)
    contexts = "".join(_context(context, strongest) for context in item["contexts"][:MAX_CONTEXTS])
    return tag("article", head + about + tag("ol", contexts, cls="contexts"), cls="feature", data_chart="feature")


def _context(context: dict, strongest: float) -> str:
    """The tokens on a tint as strong as the activation, against the feature's strongest."""
    out = []
    for token, activation in zip(context["tokens"], context["activations"], strict=True):
        shown = esc(_visible(token))
        share = 0.0 if not activation or strongest <= 0 else max(activation, 0.0) / strongest
        if share > 0.02:
            out.append(tag("mark", shown, style=f"--a:{share:.2f}", data_tip=f"activation {number(activation)}"))
        else:
            out.append(shown)
    extra = tag("small", esc(context["note"])) if context.get("note") else ""
    return tag("li", tag("code", "".join(out)) + extra)


def _visible(token: str) -> str:
    """Byte-level and SentencePiece marks as the characters they stand for."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "↵").replace("\n", "↵")


# ---- config and provenance ----


def flatten(config: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values, in the config's order; an empty dict stays a value."""
    out: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            out += flatten(value, f"{prefix}{key}.")
        else:
            out.append((prefix + str(key), value))
    return out


def config(data: dict) -> str:
    """The run's config, a row a field."""
    rows = "".join(
        tag("tr", tag("th", tag("code", esc(key)), scope="row") + tag("td", tag("code", esc(clip(_show(value), 600)))))
        for key, value in flatten(data)
    )
    count = rows.count("<tr>")
    search = f'<input type="search" class="filter" placeholder="filter {count} fields" aria-label="Filter the fields of the config">'
    table = scrolling(tag("table", tag("tbody", rows), cls="pairs"), "Config")
    return tag("div", search + table, cls="config-block") if count > 12 else table


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float) and len(str(value)) > 10:
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return str(value)


def provenance(data: dict) -> str:
    """Wall time by stage, versions, seeds."""
    stages, total = data.get("stages", []), data.get("seconds")
    body = ""
    if stages:
        total = total if total is not None else sum(stage["seconds"] for stage in stages)
        body += _stage_bar(stages)
    pairs = [("wall time", duration(total))] if total is not None else []
    if data.get("seeds"):
        pairs.append(("seeds", ", ".join(map(str, data["seeds"]))))
    pairs += [(key, _show(value)) for key, value in flatten(data.get("other", {}))]
    pairs += [(key, _show(value)) for key, value in data.get("versions", {}).items()]
    rows = "".join(tag("tr", tag("th", esc(key), scope="row") + tag("td", tag("code", esc(clip(value, 600))))) for key, value in pairs)
    return body + scrolling(tag("table", tag("tbody", rows), cls="pairs"), "Provenance")


def _stage_bar(stages: list[dict]) -> str:
    """Where the time went: one bar, with each stage's name and time under it."""
    total = sum(stage["seconds"] for stage in stages) or 1.0
    parts, items = "", ""
    for i, stage in enumerate(stages):
        share = 100 * stage["seconds"] / total
        tip = f"{stage['name']}: {duration(stage['seconds'])} ({share:.0f}%)"
        parts += tag("span", "", style=f"width:{share:.2f}%;background:var(--k{i % 12})", data_tip=tip)
        key = f'<i class="key" style="background:var(--k{i % 12})"></i>'
        items += tag("li", f"{key}{esc(stage['name'])} {tag('b', duration(stage['seconds']))}")
    return tag("div", parts, cls="stage-bar", data_chart="stages") + tag("ul", items, cls="legend stages")
