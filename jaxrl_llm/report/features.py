"""The features of a dictionary on one self-contained page: a list to search and sort, and all that is known of the one that is open.

The data comes as plain values (`sae.feature_data.collect` and the tokens' texts, see `FIELDS`). It travels in the page in two parts: what the
list shows, and one line of JSON for each feature, which is read only when that feature is opened or contexts are searched. Contexts are
packed: ids of tokens in two bytes, or four, and activations as 255ths of the feature's largest.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.report.page import document
from jaxrl_llm.report.svg import esc, number, tag
from jaxrl_llm.run_dir import write_text

# What the page reads: name -> kind; of a feature and of a context below. What else there is is passed over.
FIELDS = {"title": str, "hook": str, "d_sae": int, "tokens": int, "texts": int, "vocabulary": dict, "features": list}
OF_FEATURE = {"id": int, "count": int, "density": float, "mean": float, "max": float, "histogram": dict}
OF_FEATURE |= dict.fromkeys(("contexts", "near", "together"), list)
OF_CONTEXT = {"kind": str, "text": int, "first": int, "tokens": list, "fires": list, "peak": int}
LONGEST = 24  # letters of a word that is put together from its tokens
HINTS = 3  # words that stand for a feature without a label: at the peaks of its strongest contexts


def build_features_page(data: Any) -> str:
    """The page, as one HTML text without any outside reference.

    Raises:
      UserError: the data lacks a field, or one is of another kind; the message names the place.
    """
    _check(data)
    texts, column = _vocabulary(data)
    lines = [_json(_details(feature, column, len(texts))) for feature in data["features"]]
    index = {"list": [_row(feature, data["vocabulary"]) for feature in data["features"]], "vocabulary": texts, "wide": len(texts) > 65536}
    islands = tag("script", _json(index), type="application/json", id="index") + tag("script", "\n".join(lines), type="text/plain", id="details")
    return document(data["title"], _frame(data) + islands, ("page.css", "features.css"), "features.js")


def write_features_page(path: str | os.PathLike[str], data: Any) -> None:
    """Writes the page atomically.

    Raises:
      UserError: the data does not fit, or the disk refuses.
    """
    write_text(path, build_features_page(data))


def _check(data: Any) -> None:
    _fields("data", data, FIELDS)
    if not data["features"]:
        raise UserError("feature page: there is no feature to show")
    for i, feature in enumerate(data["features"]):
        _fields(f"features[{i}]", feature, OF_FEATURE)
        for j, context in enumerate(feature["contexts"]):
            place = f"features[{i}].contexts[{j}]"
            _fields(place, context, OF_CONTEXT)
            unknown = [t for t in context["tokens"] if str(t) not in data["vocabulary"]]
            if unknown:
                raise UserError(f"feature page: {place} has token {unknown[0]}, of which the vocabulary says nothing")


def _fields(place: str, value: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"feature page: {place} is {type(value).__name__}, not a record")
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"feature page: {place} has no field {name!r}")
        kinds = (int, float) if kind is float else kind
        if not isinstance(value[name], kinds) or isinstance(value[name], bool):
            raise UserError(f"feature page: {place}.{name} is {type(value[name]).__name__}; {kind.__name__} is needed")


def _vocabulary(data: Mapping[str, Any]) -> tuple[list[str], dict[int, int]]:
    """(texts of the tokens that the page shows, their places by token id)."""
    used = {token for feature in data["features"] for context in feature["contexts"] for token in context["tokens"]}
    for feature in data["features"]:
        used |= {pair[0] for side in (feature.get("logits") or {}).values() for pair in side}
    known = [token for token in sorted(used) if str(token) in data["vocabulary"]]
    return [data["vocabulary"][str(token)] for token in known], {token: i for i, token in enumerate(known)}


def _row(feature: Mapping[str, Any], vocabulary: Mapping[str, str]) -> list[Any]:
    """[id, label or None, words, density, largest activation, score or None]: what the list shows of a feature."""
    peaks = [_word([vocabulary[str(t)] for t in c["tokens"]], c["peak"]) for c in feature["contexts"] if c["kind"] == "top" and c["tokens"]]
    words = list(dict.fromkeys(filter(None, peaks)))[:HINTS]
    return [feature["id"], feature.get("label"), words, _short(feature["density"]), _short(feature["max"]), feature.get("score")]


def _word(texts: list[str], at: int) -> str:
    """The word that a token is a part of; the token alone where it is no letters, or the word very long."""
    whole = texts[at]
    if not whole.strip().isalnum():
        return whole.strip()
    first, last = at, at
    while first and len(whole) < LONGEST and not whole[0].isspace() and texts[first - 1][-1:].isalnum():
        first -= 1
        whole = texts[first] + whole
    while last + 1 < len(texts) and len(whole) < LONGEST and texts[last + 1][:1].isalnum():
        last += 1
        whole += texts[last]
    return (whole if len(whole) < LONGEST else texts[at]).strip()


def _details(feature: Mapping[str, Any], column: Mapping[int, int], size: int) -> dict[str, Any]:
    contexts = feature["contexts"]
    logits = feature.get("logits")
    side = lambda name: [[column[t], _short(v)] for t, v in logits[name] if t in column] if logits else None  # noqa: E731
    ids = np.array([column[t] for c in contexts for t in c["tokens"]], "<u4" if size > 65536 else "<u2")
    return {
        "count": feature["count"], "mean": _short(feature["mean"]), "histogram": feature["histogram"],
        "near": [[f, round(c, 3)] for f, c in feature["near"]], "together": [[f, round(j, 3), round(p, 3)] for f, j, p in feature["together"]],
        "raised": side("raised"), "lowered": side("lowered"), "judged": feature.get("judged"),
        "contexts": [[c["kind"], c["text"], c["first"], len(c["tokens"]), c["peak"]] for c in contexts],
        "tokens": _packed(ids), "fires": _packed(_fires(contexts, feature["max"])),
    }  # fmt: skip


def _fires(contexts: list[Mapping[str, Any]], largest: float) -> np.ndarray:
    """Activations of all contexts' tokens, one after the other, as 255ths of the largest; what fires at all is at least one."""
    parts = []
    for context in contexts:
        shown = np.zeros(len(context["tokens"]), np.uint8)
        for place, value in context["fires"]:
            shown[place] = min(max(round(255 * value / largest), 1), 255) if largest > 0 else 0
        parts.append(shown)
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _json(value: Any) -> str:
    """JSON that cannot end the script element which it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _frame(data: Mapping[str, Any]) -> str:
    """What stands on the page before a feature is opened."""
    shown = len(data["features"])
    of = f"{number(shown)} of {number(data['d_sae'])} features" if shown < data["d_sae"] else f"{number(shown)} features"
    alive = data.get("alive")
    dead = f", {number(data['d_sae'] - alive)} never fire here" if alive is not None else ""
    facts = f"{of}{dead} · {data['hook']} · {number(data['tokens'])} tokens in {number(data['texts'])} texts"
    if data.get("model"):
        facts = f"{data['model']} · {facts}"
    toggle = tag("button", "", type="button", id="theme", aria_label="Switch between light and dark")
    bar = tag("div", tag("h1", esc(data["title"])) + tag("p", esc(facts), cls="facts-line") + toggle, cls="bar")
    search = tag("input", "", type="search", id="search", placeholder="number, label or text", autocomplete="off", spellcheck="false")
    orders = [("id", "by number"), ("density", "most often"), ("rare", "most rarely"), ("max", "strongest")]
    if any(feature.get("score") is not None for feature in data["features"]):
        orders.append(("score", "best label"))
    sort = tag("select", "".join(tag("option", esc(text), value=key) for key, text in orders), id="sort", aria_label="Order")
    find = tag("div", tag("label", "Search", cls="hidden", **{"for": "search"}) + search + sort, cls="find")
    listed = tag("div", tag("div", "", id="spacer"), id="list", role="listbox", tabindex="0", aria_label="Features")
    side = tag("div", find + tag("p", "", id="found", role="status") + listed, cls="side")
    keys = tag("p", "Keys: / searches, arrow keys or j and k go through the list.", cls="note keys")
    main = tag("main", tag("article", "", id="open", tabindex="-1") + keys)
    return bar + tag("div", side + main, cls="columns") + tag("div", "", id="tip", role="status", hidden="")
