"""`jaxrl-llm curate`: filter, cluster and order a prompt set by SAE features."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

from jaxrl_llm.config import check_fields
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError, nearest


def run(config: Any, workdir: str) -> None:
    """Curates the rows of the config; see configs/curate.py for the fields.

    Raises:
      UserError: no model or data named; and what reading, loading, extracting and fitting raise.
    """
    check(config)
    data = config.data
    rows = read_rows(data.source, parse_fields(data.fields), split=data.split, limit=data.limit, on_bad=data.on_bad)
    check_rows(rows, config)
    from jaxrl_llm.curation.pipeline import curate
    from jaxrl_llm.curation.processes import is_writer
    from jaxrl_llm.train.sft import fine_tuner

    curated, signals = curate(rows, config, workdir, fine_tuner)
    if is_writer():
        from jaxrl_llm.report import run_report, write_report

        page = Path(workdir) / "report.html"
        write_report(page, run_report(workdir))
        written = f"written: {workdir}/curated ({len(curated)} rows), {workdir}/signals.json"
        print("\n".join([*summary_lines(signals), written, f"report: {page}"]))


def check(config: Any) -> None:
    """Raises UserError for a config that could not be run to its end, before anything is read."""
    from jaxrl_llm.curation import corruptions, curated_set, difficulty, features, judging, orders, probes, streaming
    from jaxrl_llm.rewards.registry import get_reward

    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not config.data.source:
        raise UserError("no data: name a file or data set with --config.data.source=...")
    choices = {
        "dtype": ("float32", "bfloat16"),
        "data.on_bad": ("error", "skip"),
        "features.pooling": features.POOLINGS,
        "features.overflow": streaming.OVERFLOWS,
        "difficulty.use": difficulty.USES,
        "difficulty.free": difficulty.FREE,
        "difficulty.models": probes.MODELS[:2],
        "quality.use": judging.USES,
        "quality.corruptions": tuple(corruptions.CORRUPTIONS),
        "schedule.kind": tuple(orders.KINDS),
        "formats": curated_set.FORMATS,
    }
    counts = (
        "data.limit", "features.min_rows", "features.batch_tokens", "features.shard_rows", "train_sae.expansion", "train_sae.k", "train_sae.steps",
        "train_sae.batch_size", "clusters.k", "clusters.dims", "clusters.restarts", "difficulty.samples",
        "difficulty.max_new_tokens", "difficulty.max_prompt_tokens", "difficulty.batch_prompts", "quality.samples", "schedule.batch_size",
    )  # fmt: skip
    tiny = 1e-6  # where 0 itself has no meaning
    ranges = dict.fromkeys(counts, (1, inf)) | {
        "features.context": (0, inf),
        "features.max_share": (tiny, 1),
        "difficulty.max_labels": (2, inf),
        "difficulty.folds": (2, inf),
        "difficulty.temperature": (tiny, inf),
        "quality.drop_fraction": (0, 1 - tiny),
        "quality.drop_per_bad": (0, inf),
        "quality.drop_most": (0, 1 - tiny),
        "quality.strata": (0, inf),
        "quality.duplicate_threshold": (tiny, 1),
        "schedule.rho": orders.ALLOWED["rho"],
        "bootstrap": (0, inf),
        "seed": (0, inf),
        "train_sae.buffer_rows": (2 * config.train_sae.batch_size, inf),
    }
    check_fields(config, choices, ranges)
    if config.features.context == 1:  # of which a beginning-of-text token leaves nothing
        raise UserError("config key 'features.context' is 1: give 2 or more, or 0 for what the model can")
    for key, value in (("formats", config.formats), ("difficulty.models", config.difficulty.models)):
        if not value:
            raise UserError(f"config key '{key}' is empty: name some of {', '.join(choices[key])}")
    if config.quality.use.endswith("tuned") and not (config.quality.labels and config.quality.tuned):
        raise UserError(f"config key 'quality.use' is {config.quality.use!r}, which needs quality.labels and quality.tuned=True")
    controls = ("random_sae", "dense_mean", "dense_max")
    for key, use in (("difficulty.use", config.difficulty.use), ("quality.use", config.quality.use)):
        if use in controls and not config.controls:
            raise UserError(f"config key '{key}' is {use!r}, which is only made with controls=True")
    if config.difficulty.labels == "rollouts":
        get_reward(config.difficulty.reward)


def check_rows(rows: Any, config: Any) -> None:
    """Raises UserError for columns that the config names and no row has, labels that do not differ, and columns that the curated set
    cannot hold, before any model is loaded."""
    import numpy as np

    from jaxrl_llm.curation.curated_set import renamed_columns
    from jaxrl_llm.curation.labels import labels_from_rows

    renamed_columns({name for row in rows for name in row})

    topic = config.data.topic
    if topic and all(row.get(topic) is None for row in rows):
        known = sorted({name for row in rows[:100] for name in row})
        raise UserError(f"config key 'data.topic': no row has a column {topic!r}; {nearest(topic, known)}")
    for key in ("difficulty", "quality"):
        if config[key].labels not in ("", "rollouts"):
            labels = labels_from_rows(rows, config[key].labels)
            different = np.unique(labels[np.isfinite(labels)])
            if len(different) < 2:
                raise UserError(
                    f"config key '{key}.labels' is {config[key].labels!r}, where all rows that have a label have the same, {different[0]:g}: "
                    "a probe learns from rows that differ; label others, or leave the key empty"
                )


def summary_lines(signals: dict[str, Any]) -> list[str]:
    """The figures of signals.json that a person wants to see first."""
    data, faults = signals["data"], signals["data"]["faults"]
    odd = {**faults, **data["longer_than_context"], **data["skipped"]}
    lines = [
        f"rows: {data['rows']}, {data['tokens']['mean']:.0f} tokens on average, longest {data['tokens']['longest']}; "
        + (", ".join(f"{n} {name}" for name, n in odd.items() if n) or "nothing unusual"),
    ]
    if signals["sae"]["trained"]:
        figures, explained = signals["sae"], signals["sae"]["explained_variance"]
        told = "none to explain, its held-out activations are all equal" if explained is None else f"{explained:.3f}"
        lines.append(f"SAE: {figures['d_sae']} latents on {figures['hook']}, explained variance {told}")
    kept, width = signals["features"]["kept"], signals["features"]["width"]
    lines.append(f"features: {kept} of {width} used; active features and length correlate at {signals['features']['spearman_active_length']:.2f}")
    clusters = {name: f for name, f in signals["diversity"].items() if isinstance(f, dict) and "nmi" in f}
    topic = signals["diversity"].get("topic")
    if topic and not clusters:
        lines.append(f"clusters: no NMI with topic, all rows have the same {topic['column']!r}")
    if clusters:
        lines.append("clusters, NMI with topic: " + ", ".join(f"{name} {f['nmi']:.3f}" for name, f in clusters.items()))
    lines += _probe_lines("difficulty, Spearman", signals["difficulty"])
    lines += _probe_lines("quality, AUROC" if signals["quality"].get("measure") != "spearman" else "quality, Spearman", signals["quality"])
    lines.append(f"kept {signals['filter']['kept']}; dropped " + ", ".join(f"{n} {name}" for name, n in signals["filter"]["dropped"].items()))
    spread = {name: f["cluster_entropy"]["mean"] for name, f in signals["schedule"]["diversity"].items()}
    lines.append("batches, cluster entropy: " + ", ".join(f"{name} {value:.2f}" for name, value in spread.items()))
    lines.append("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in signals["seconds"].items()))
    return lines


def _probe_lines(title: str, report: dict[str, Any]) -> list[str]:
    if not report.get("probes"):
        return [f"{title}: {report.get('why') or 'no labels, ' + str(report['used'])}"]
    width = max(map(len, report["probes"]))
    lines = [f"{title} (95% interval):"]
    for name, figures in sorted(report["probes"].items(), key=lambda item: -item[1]["value"]):
        mark = "  <- used" if name == report["used"] else ""
        known = figures["low"] is not None  # bootstrap=0 gives no interval
        interval = f"  [{figures['low']:+.3f}, {figures['high']:+.3f}]" if known else ""
        lines.append(f"  {name:<{width}}  {figures['value']:+.3f}{interval}{mark}")
    return lines
