"""Puts the sections of a report into one self-contained HTML page.

The page loads nothing: style and script are inlined, a Content-Security-Policy forbids every other source, and the only script
that may run is ours, by its hash, so that nothing in a rollout or a prompt can.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jaxrl_llm.report import charts_sae, sections, sections_detail
from jaxrl_llm.report.arms import Arms
from jaxrl_llm.report.schema import validate
from jaxrl_llm.report.svg import esc, tag
from jaxrl_llm.run_dir import write_text


@dataclass(frozen=True)
class Section:
    """Where a part of the data goes on the page, and the sentence that says how to read it."""

    key: str
    nav: str
    title: str | Callable[[dict[str, Any]], str]
    lede: str | Callable[[dict[str, Any]], str]
    draw: Callable[[dict[str, Any], Arms], str]
    kinds: tuple[str, ...] = ("saerl",)  # page kinds that name the section as left out when it is


TARGET_LEDE = " The dashed line is where the baseline ends; a dot marks when an arm first gets there."


def _curves_lede(data: dict[str, Any]) -> str:
    if _of_a_run(data):
        return "On rows that are not trained on."
    return "Held-out accuracy at equal steps." + (TARGET_LEDE if any(c.get("target") for c in data["curves"]) else "")


def _of_a_run(data: dict[str, Any]) -> bool:
    return data.get("kind", "saerl") == "run"


SECTIONS = (
    Section(
        "curves",
        "Accuracy",
        lambda data: "Held-out figures" if _of_a_run(data) else "Accuracy over training",
        _curves_lede,
        lambda data, arms: sections.curves(data["curves"], arms),
    ),
    Section(
        "tables",
        "Compared",
        "Side by side",
        "Each row beside those it must be read against. The best of a column is bold, where more or less is better; italics are no competitor.",
        lambda data, _: sections.signals(data["tables"]),
        (),
    ),
    Section(
        "plots",
        "Plots",
        "Curves and trade-offs",
        "A dot is a figure with its 95% interval; point at it to read it. Dashed: a level that does not hang on the axis.",
        lambda data, _: charts_sae.plots(data["plots"]),
        (),
    ),
    Section(
        "densities",
        "Density",
        "How often latents fire",
        "Latents by the share of tokens they fire on, on a logarithmic scale. Far left: hardly ever. Far right: latents that fire on most of "
        "the text and say little.",
        lambda data, _: charts_sae.densities(data["densities"]),
        (),
    ),
    Section(
        "panels",
        "Training",
        "Training metrics",
        "One small chart a metric. Thin: every step. Thick, in runs that are long enough: the running mean.",
        lambda data, _: sections.panels(data["panels"], data.get("panels_note")),
        ("run",),
    ),
    Section(
        "arms_tables",
        "Arms",
        "Every arm, side by side",
        "Differences are paired, in points, with their 95% interval below; a hollow dot means that the interval holds zero.",
        lambda data, arms: sections.arms_tables(data["arms_tables"], arms),
    ),
    Section(
        "prompt_map",
        "Prompt map",
        "The prompts in SAE space",
        "Each dot is a prompt; near dots have like features. Point at one to read it. A name in the legend singles out its prompts.",
        lambda data, _: sections.prompt_map(data["prompt_map"]),
    ),
    Section(
        "schedules",
        "Schedule",
        "What each arm saw, and when",
        "Above: difficulty of a step’s prompts: median, middle half, middle 80%. Below: each cluster’s share of the step, stronger is "
        "more. The effective number of clusters is exp(entropy) of a batch’s shares.",
        lambda data, arms: sections.schedules(data["schedules"], arms),
    ),
    Section(
        "calibration",
        "Difficulty",
        "Is predicted difficulty true?",
        "Prompts binned by prediction against what the policy really did. On the diagonal, the prediction holds. Numbers count prompts.",
        lambda data, _: sections.calibration(data["calibration"]),
    ),
    Section(
        "quality",
        "Quality",
        "What the quality cut removes",
        "One row a kind of corruption, each scaled to its own peak. A good score puts the corrupted left of the cut and the clean right.",
        lambda data, _: sections.quality(data["quality"]),
    ),
    Section(
        "signals",
        "Signals",
        "The signals against the truth",
        "Each signal beside the plain ways to get it. The best of a column is bold; blue is the SAE; italics are bounds, not competitors.",
        lambda data, _: sections.signals(data["signals"]),
    ),
    Section(
        "features",
        "Features",
        "The most telling SAE features",
        "The features that move a signal most, on the texts that fire them hardest. The stronger the tint, the stronger the activation.",
        lambda data, _: sections_detail.features(data["features"]),
    ),
    Section(
        "rollouts",
        "Rollouts",
        "Sample rollouts",
        "What the policies wrote and how it was judged.",
        lambda data, arms: sections_detail.rollouts(data["rollouts"], arms),
        ("saerl", "run"),
    ),
    Section(
        "config", "Config", "Config", "Every field of the run.", lambda data, _: sections_detail.config(data["config"]), ("saerl", "run")
    ),
    Section(
        "provenance",
        "Provenance",
        "Provenance",
        "With what, from which seeds, and where the time went.",
        lambda data, _: sections_detail.provenance(data["provenance"]),
        ("saerl", "run"),
    ),
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"


def build_report(data: Any) -> str:
    """The page of `schema.ReportData`, as one HTML text without any outside reference.

    Raises:
      UserError: the data does not fit the schema; the message names the place.
    """
    checked: dict[str, Any] = dict(validate(data))
    arms = Arms(checked.get("arms", []))
    bodies = {section: section.draw(checked, arms) for section in SECTIONS if checked.get(section.key)}
    bodies = {section: body for section, body in bodies.items() if body}
    nav = "".join(tag("a", esc(section.nav), href=f"#{section.key}") for section in bodies)
    main = "".join(_section(section, body, checked) for section, body in bodies.items()) + _left_out(checked, set(bodies))
    toggle = tag("button", "", type="button", id="theme", aria_label="Switch between light and dark")
    bar = tag("div", tag("nav", nav, aria_label="Sections") + toggle, cls="bar")
    top = tag("header", sections.headline(checked), cls="top", id="top")
    tip = tag("div", "", id="tip", role="status", hidden="")
    body = bar + tag("div", top + tag("main", main), cls="page") + tip
    return document(checked["title"], body, ("page.css",), "page.js")


def document(title: str, body: str, styles: tuple[str, ...], script: str) -> str:
    """A whole page around `body`, which must be safe already: the styles and the script, names of our assets, are the only ones it may use."""
    style, code = "".join(map(_asset, styles)), _asset(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    head = (
        '<meta charset="utf-8">'
        + f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(digest)}">'
        + '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        + tag("title", esc(title))
        + f"<style>{style}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}<script>{code}</script></body></html>\n'


def write_report(path: str | os.PathLike[str], data: Any) -> None:
    """Writes the page atomically: an earlier report stays whole until the new one is.

    Raises:
      UserError: the data does not fit the schema, or the disk refuses.
    """
    write_text(path, build_report(data))


def _section(section: Section, body: str, data: dict[str, Any]) -> str:
    rail = tag("div", tag("h2", esc(_words(section.title, data))) + tag("p", esc(_words(section.lede, data))), cls="rail")
    return tag("section", rail + tag("div", body, cls="body"), id=section.key)


def _words(text: str | Callable[[dict[str, Any]], str], data: dict[str, Any]) -> str:
    return text if isinstance(text, str) else text(data)


def _left_out(data: dict[str, Any], there: set[Section]) -> str:
    """One plain line for each section that a page of this kind could have and this one has not."""
    kind, reasons = data.get("kind", "saerl"), data.get("left_out", {})
    absent = [section for section in SECTIONS if section not in there and (kind in section.kinds or section.key in reasons)]
    if not absent:
        return ""
    missing = "this run has no data for it"
    items = "".join(tag("li", esc(f"{_words(section.title, data)}: {reasons.get(section.key, missing)}.")) for section in absent)
    return tag("section", tag("div", tag("h2", "Not on this page"), cls="rail") + tag("ul", items, cls="body left-out"), id="left-out")


def _asset(name: str) -> str:
    return (resources.files("jaxrl_llm.report") / "assets" / name).read_text(encoding="utf-8")
