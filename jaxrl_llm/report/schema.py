"""What a report page is made of: one TypedDict a section, and the check that data fits them.

A caller fills a plain dict (`ReportData`); every section but `title` and `headline` may be left out, and the page then says so
in one line. Shares, accuracies, rates and differences are fractions (0.423, not 42.3): the page turns them into percent and
points. Lists that are described as parallel must have equal lengths. NumPy arrays and scalars are welcome everywhere; NaN and
infinity count as a gap (None). Arms are named once in `arms` and referred to by `name`; "base" (the policy before GRPO) may be
used without being listed.

`validate(data)` returns the data as plain JSON types and raises `UserError` naming the exact place, such as
`curves[0].series[1].mean`.
"""

import types
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.run_dir import to_plain

Gap = float | None  # a number, or None where there is none


class Estimate(TypedDict):
    """A figure with its interval (95% unless the table's note says otherwise)."""

    value: float
    low: NotRequired[Gap]
    high: NotRequired[Gap]


class Fact(TypedDict):
    """One of the large figures under the headline, as text: label "final accuracy", value "+3.4 points", detail "95% 2.6 to 4.1"."""

    label: str
    value: str
    detail: NotRequired[str]


class ArmInfo(TypedDict):
    """An arm of the experiment. `role` sets its colour and weight: the baseline is grey, the main arm blue, on every chart."""

    name: str
    label: NotRequired[str]  # shown name; default: name
    role: NotRequired[Literal["baseline", "main", "control", "other"]]
    about: NotRequired[str]  # one sentence: what this arm does


class CurveSeries(TypedDict):
    """One line: parallel lists. `low` and `high` make the band."""

    arm: str  # an arm's name (any label where the page has no `arms`)
    steps: list[float]
    mean: list[Gap]
    low: NotRequired[list[Gap]]
    high: NotRequired[list[Gap]]


class CurveTarget(TypedDict):
    """The "steps to the baseline's final accuracy" mark. `steps`: arm -> first step at which it gets there, None if never."""

    arm: str  # whose final value it is
    value: float
    steps: dict[str, Gap]


class CurveChart(TypedDict):
    """Accuracy by step, one line an arm, at equal steps."""

    title: str
    series: list[CurveSeries]
    x_label: NotRequired[str]  # default "GRPO step"
    y_label: NotRequired[str]  # default "accuracy"
    percent: NotRequired[bool]  # default True: values are fractions
    band: NotRequired[str]  # what the band is: "95% t-interval over 5 seeds"
    target: NotRequired[CurveTarget | None]
    note: NotRequired[str]


class ArmRow(TypedDict):
    """A row of the arms' table. A key left out shows as a dash; `steps_to_target: None` shows as "not reached"."""

    arm: str
    accuracy: Estimate  # final
    difference: NotRequired[Estimate | None]  # to the baseline, paired
    steps_to_target: NotRequired[Gap]
    steps_saved: NotRequired[Estimate | None]  # share of steps saved against the baseline: 0.31
    per_level: NotRequired[dict[str, Gap]]  # level -> difference to the baseline
    main_minus: NotRequired[Estimate | None]  # the main arm's difference to this one, paired; shown where there are controls
    mixed_groups: NotRequired[Gap]  # share of groups with mixed rewards
    seeds: NotRequired[int]
    rollouts: NotRequired[float]  # a step; shown where it is above 1 for some arm


class ArmsTable(TypedDict):
    """One table a setting (pool, base model)."""

    title: str
    rows: list[ArmRow]
    level_name: NotRequired[str]  # default "level"
    percent: NotRequired[bool]  # default True
    note: NotRequired[str]


class MapField(TypedDict):
    """One way to colour the map; parallel to its points. None is drawn grey ("unknown")."""

    name: str  # "cluster", "topic", "difficulty", "quality", "kept", "corruption"
    kind: Literal["category", "number"]
    values: list[str | float | bool | None]
    label: NotRequired[str]  # default: name
    percent: NotRequired[bool]  # numbers are fractions; default False
    order: NotRequired[list[str]]  # of categories; default: by number, then by name


class PromptMap(TypedDict):
    """Prompts as points: parallel lists. More than 5,000 points are thinned evenly, and the page says so."""

    x: list[float]
    y: list[float]
    prompts: list[str]
    fields: list[MapField]  # the first is shown at the start
    method: NotRequired[str]  # "UMAP of max-pooled SAE features"
    note: NotRequired[str]


class Schedule(TypedDict):
    """What one arm's batches held over time. `summarise.schedule` makes it from batches of indices."""

    arm: str
    steps: list[float]
    quantiles: dict[str, list[Gap]]  # "10", "25", "50", "75", "90" -> difficulty, parallel to steps
    clusters: NotRequired[list[str]]
    counts: NotRequired[list[list[float]]]  # [steps][clusters]: prompts of the cluster in the step's batches


class CalibrationBin(TypedDict):
    """Rows of alike prediction: their mean prediction, what was observed, how many, and its interval."""

    predicted: float
    observed: float
    count: int
    low: NotRequired[Gap]
    high: NotRequired[Gap]


class CalibrationSeries(TypedDict):
    """One predictor's calibration curve."""

    name: str
    bins: list[CalibrationBin]
    spearman: NotRequired[Estimate | None]
    main: NotRequired[bool]  # drawn in the main colour; default: the first


class Calibration(TypedDict):
    """Predicted against observed difficulty. `summarise.calibration_bins` makes the bins."""

    series: list[CalibrationSeries]
    quantity: NotRequired[str]  # default "fail rate"
    note: NotRequired[str]


class Quality(TypedDict):
    """Raw quality scores by kind of corruption ("clean" first); the page bins them and counts what the cut drops."""

    scores: dict[str, list[Gap]]
    cut: float
    label: NotRequired[str]  # default "quality score"
    clean: NotRequired[str]  # which kind is uncorrupted; default "clean"
    note: NotRequired[str]


class SignalRow(TypedDict):
    """`kind`: "ours" is marked; "bound" (oracle, noise ceiling) is set apart and cannot be best."""

    name: str
    cells: list[Estimate | None]  # parallel to the table's columns
    kind: NotRequired[Literal["ours", "baseline", "bound"]]


class SignalTable(TypedDict):
    """One property against the truth, or against what it must be read beside: the best cell of each column is bold."""

    title: str  # "Difficulty"
    metric: str  # "Spearman with held-out pass rate"
    columns: list[str]
    rows: list[SignalRow]
    higher_is_better: NotRequired[bool | None]  # default True; None: columns of several kinds, none has a best
    marks: NotRequired[bool]  # a dot on a scale beside each figure; default True
    percent: NotRequired[bool]  # values are fractions, shown as percent; default False
    note: NotRequired[str]


class Response(TypedDict):
    """One policy's answer to a prompt, with its verdict."""

    text: str
    status: str  # PASS, FAIL, ERROR, TIMEOUT, NOT_APPLICABLE; UNJUDGED shows no verdict
    arm: NotRequired[str]
    step: NotRequired[int | None]
    score: NotRequired[Gap]
    reason: NotRequired[str | None]


class RolloutItem(TypedDict):
    """A prompt and what the policies answered: put "base" first, then the trained arms."""

    prompt: str
    responses: list[Response]
    answer: NotRequired[str | None]  # the gold answer
    tags: NotRequired[dict[str, Any]]  # {"topic": "sort", "level": 3}


class FeatureContext(TypedDict):
    """A text on which a feature is active."""

    tokens: list[str]
    activations: list[Gap]  # parallel to tokens
    note: NotRequired[str]


class Feature(TypedDict):
    """An SAE feature. `drives`: the signal it moves ("difficulty", "quality", "cluster 3"); `effect`: signed weight or correlation."""

    id: int
    drives: str
    contexts: list[FeatureContext]
    effect: NotRequired[Gap]
    effect_label: NotRequired[str]  # default "weight"
    density: NotRequired[Gap]  # share of tokens or prompts on which it is active
    about: NotRequired[str]  # a plain reading: "fires on the operand before a minus sign"


class PanelSeries(TypedDict):
    """One arm's line in a panel; steps and values are parallel."""

    label: str
    steps: list[float]
    values: list[Gap]


class Panel(TypedDict):
    """A small chart of a training metric."""

    title: str
    series: list[PanelSeries]
    percent: NotRequired[bool]  # default False
    log: NotRequired[bool]  # logarithmic y axis; default False
    note: NotRequired[str]


class PlotPoint(TypedDict):
    """A point of a plot with its interval; `tip` is what a hover says beside the figures."""

    x: float
    value: Gap
    low: NotRequired[Gap]
    high: NotRequired[Gap]


class PlotSeries(TypedDict):
    """Points of one kind, joined by a line where there are several; `kind` sets the colour as in a SignalRow."""

    label: str
    points: list[PlotPoint]
    kind: NotRequired[Literal["ours", "baseline", "bound", "other"]]  # default "other": a colour of its own


class PlotLevel(TypedDict):
    """A level line across the whole plot."""

    label: str
    value: float


class Plot(TypedDict):
    """Figures over a quantity that is not time: probing accuracy over k, explained variance over L0."""

    title: str
    x_label: str
    series: list[PlotSeries]
    levels: NotRequired[list[PlotLevel]]
    x_log: NotRequired[bool]  # default False
    percent: NotRequired[bool]  # values are fractions; default False
    note: NotRequired[str]


class Density(TypedDict):
    """Latents of an SAE by how often they fire: `counts` lie between neighbouring `log10_edges` (one more) of the share of tokens."""

    label: str
    log10_edges: list[float]
    counts: list[float]
    dead: int  # latents that never fire
    latents: int  # all of them


class Stage(TypedDict):
    """One stage of the run and its wall time."""

    name: str
    seconds: float


class Provenance(TypedDict):
    """Where the figures come from: versions, seeds, times."""

    versions: NotRequired[dict[str, Any]]
    seeds: NotRequired[list[int]]
    stages: NotRequired[list[Stage]]  # the wall time by stage, drawn as one bar
    seconds: NotRequired[Gap]  # total wall time
    other: NotRequired[dict[str, Any]]  # device, date, command, hashes


class ReportData(TypedDict):
    """A whole page. `kind` decides which absent sections the page names as left out; `left_out` gives reasons for them."""

    title: str
    headline: str  # one or two plain sentences: which arm was better, and why
    kind: NotRequired[Literal["saerl", "run", "eval"]]  # default "saerl"
    subtitle: NotRequired[str]  # small line over the title: "SAERL, demo"
    facts: NotRequired[list[Fact]]
    arms: NotRequired[list[ArmInfo]]
    curves: NotRequired[list[CurveChart]]
    arms_tables: NotRequired[list[ArmsTable]]
    prompt_map: NotRequired[PromptMap]
    schedules: NotRequired[list[Schedule]]
    calibration: NotRequired[Calibration]
    quality: NotRequired[Quality]
    signals: NotRequired[list[SignalTable]]
    tables: NotRequired[list[SignalTable]]  # of a single run: before, after and what they are compared with
    plots: NotRequired[list[Plot]]
    densities: NotRequired[list[Density]]
    rollouts: NotRequired[list[RolloutItem]]
    features: NotRequired[list[Feature]]
    panels: NotRequired[list[Panel]]
    panels_note: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    provenance: NotRequired[Provenance]
    left_out: NotRequired[dict[str, str]]  # section key -> why it is not there


# Lists that must be as long as another list of the same record.
PARALLEL: dict[str, tuple[str, tuple[str, ...]]] = {
    "CurveSeries": ("steps", ("mean", "low", "high")),
    "PromptMap": ("x", ("y", "prompts")),
    "Schedule": ("steps", ("counts",)),
    "FeatureContext": ("tokens", ("activations",)),
    "PanelSeries": ("steps", ("values",)),
}


def validate(data: Any) -> ReportData:
    """`data` in plain JSON types, checked against `ReportData`.

    Raises:
      UserError: a key is missing, unknown or of the wrong type, parallel lists differ in length, or an arm is not in `arms`.
    """
    if isinstance(data, Mapping) and hasattr(data.get("config"), "to_dict"):
        data = {**data, "config": data["config"].to_dict()}  # an ml_collections ConfigDict
    cleaned = to_plain(data)
    _check(cleaned, ReportData, "")
    _check_arms(cleaned)
    for key in cleaned.get("left_out", {}):
        if key not in ReportData.__annotations__:
            raise _fail(f"left_out.{key}", f"is not a section, {nearest(key, ReportData.__annotations__)}")
    for key in ("signals", "tables"):
        for i, table in enumerate(cleaned.get(key, [])):
            for j, row in enumerate(table["rows"]):
                _same_length(f"{key}[{i}].rows[{j}].cells", row["cells"], "columns", table["columns"])
    for i, field in enumerate(cleaned.get("prompt_map", {}).get("fields", [])):
        _same_length(f"prompt_map.fields[{i}].values", field["values"], "x", cleaned["prompt_map"]["x"])
    for i, density in enumerate(cleaned.get("densities", [])):
        _same_length(f"densities[{i}].counts", density["counts"], "the gaps of log10_edges", density["log10_edges"][1:])
    for i, schedule in enumerate(cleaned.get("schedules", [])):
        for name, values in schedule["quantiles"].items():
            _same_length(f"schedules[{i}].quantiles.{name}", values, "steps", schedule["steps"])
        for j, row in enumerate(schedule.get("counts", [])):
            _same_length(f"schedules[{i}].counts[{j}]", row, "clusters", schedule.get("clusters", []))
    return cleaned


def _fail(where: str, what: str) -> UserError:
    return UserError(f"report data: {where or 'the data'} {what} (see jaxrl_llm/report/schema.py)")


def _same_length(where: str, values: list, other_name: str, other: list) -> None:
    if len(values) != len(other):
        raise _fail(where, f"has {len(values)} entries, but {other_name} has {len(other)}")


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise unless `value` is of the annotated type `kind`; `where` is its path in the data."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if is_typeddict(kind):
        _check_record(value, kind, where)
    elif origin is Literal:
        if value not in args:
            raise _fail(where, f"is {value!r}; it must be one of {', '.join(map(repr, args))}")
    elif origin in (Union, types.UnionType):
        _check_union(value, args, where)
    elif origin is list:
        if not isinstance(value, list):
            raise _fail(where, f"must be a list, not {_type_name(value)}")
        for i, item in enumerate(value):
            _check(item, args[0], f"{where}[{i}]")
    elif origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise _fail(where, f"must be a dict, not {_type_name(value)}")
        for key, item in value.items():
            _check(item, args[1] if args else Any, f"{where}.{key}")
    elif not _is_scalar(value, kind):
        wanted = {str: "text", float: "a finite number", int: "a whole number", bool: "true or false"}[kind]
        raise _fail(where, f"must be {wanted}, not {_type_name(value)}")


def _is_scalar(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_union(value: Any, args: tuple, where: str) -> None:
    if value is None and type(None) in args:
        return
    choices = [kind for kind in args if kind is not type(None)]
    if len(choices) == 1:
        _check(value, choices[0], where)
    elif not any(_is_scalar(value, kind) for kind in choices):
        raise _fail(where, f"must be text, a number, true or false or None, not {_type_name(value)}")


def _check_record(value: Any, kind: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _fail(where, f"must be a dict ({kind.__name__}), not {_type_name(value)}")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise _fail(f"{where}.{key}".lstrip("."), f"is an unknown key, {nearest(key, hints)}")
    for key in sorted(kind.__required_keys__):
        if key not in value:
            raise _fail(f"{where}.{key}".lstrip("."), f"is missing: a {kind.__name__} needs it")
    for key, item in value.items():
        _check(item, hints[key], f"{where}.{key}".lstrip("."))
    if kind.__name__ in PARALLEL:
        first, others = PARALLEL[kind.__name__]
        for key in others:
            if key in value:
                _same_length(f"{where}.{key}", value[key], first, value[first])


def _check_arms(data: dict) -> None:
    """Every arm that a section speaks of is in `arms`, where the page has `arms`."""
    if "arms" not in data:
        return
    known = [arm["name"] for arm in data["arms"]]
    if len(set(known)) != len(known):
        raise _fail("arms", "holds the same name twice")
    used: list[tuple[str, str]] = []
    for i, chart in enumerate(data.get("curves", [])):
        used += [(f"curves[{i}].series[{j}].arm", series["arm"]) for j, series in enumerate(chart["series"])]
        target = chart.get("target") or {"steps": {}}
        used += [(f"curves[{i}].target.steps", arm) for arm in target["steps"]]
    for i, table in enumerate(data.get("arms_tables", [])):
        used += [(f"arms_tables[{i}].rows[{j}].arm", row["arm"]) for j, row in enumerate(table["rows"])]
    used += [(f"schedules[{i}].arm", schedule["arm"]) for i, schedule in enumerate(data.get("schedules", []))]
    for i, item in enumerate(data.get("rollouts", [])):
        used += [(f"rollouts[{i}].responses[{j}].arm", r["arm"]) for j, r in enumerate(item["responses"]) if "arm" in r]
    for where, arm in used:
        if arm not in known and arm != "base":
            raise _fail(where, f"is {arm!r}, which is not in arms ({', '.join(known)})")


def _type_name(value: Any) -> str:
    return {
        "NoneType": "None (or a number that is not finite)",
        "str": f"the text {value!r:.40}",
        "list": "a list",
        "dict": "a dict",
        "float": f"{value!r}",
        "int": f"{value!r}",
        "bool": f"{value!r}",
    }.get(type(value).__name__, type(value).__name__)
