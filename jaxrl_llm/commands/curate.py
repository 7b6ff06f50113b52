"""`jaxrl-llm curate`: filter, cluster and order a prompt set by SAE features."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError


def run(config: Any, workdir: str) -> None:
    """Curates the rows of the config; see configs/curate.py for the fields.

    Raises:
      UserError: no model or data named; and what reading, loading, extracting and fitting raise.
    """
    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not config.data.source:
        raise UserError("no data: name a file or data set with --config.data.source=...")
    data = config.data
    rows = read_rows(data.source, parse_fields(data.fields), split=data.split, limit=data.limit, on_bad=data.on_bad)
    from jaxrl_llm.curation.pipeline import curate
    from jaxrl_llm.curation.processes import is_writer

    curated, signals = curate(rows, config, workdir)
    if is_writer():
        print("\n".join([*summary_lines(signals), f"written: {workdir}/curated ({len(curated)} rows), {workdir}/signals.json"]))


def summary_lines(signals: dict[str, Any]) -> list[str]:
    """The figures of signals.json that a person wants to see first."""
    data, faults = signals["data"], signals["data"]["faults"]
    odd = {**faults, **data["longer_than_context"], **data["skipped"]}
    lines = [
        f"rows: {data['rows']}, {data['tokens']['mean']:.0f} tokens on average, longest {data['tokens']['longest']}; "
        + (", ".join(f"{n} {name}" for name, n in odd.items() if n) or "nothing unusual"),
    ]
    if signals["sae"]["trained"]:
        figures = signals["sae"]
        lines.append(f"SAE: {figures['d_sae']} latents on {figures['hook']}, explained variance {figures['explained_variance']:.3f}")
    kept, width = signals["features"]["kept"], signals["features"]["width"]
    lines.append(f"features: {kept} of {width} used; active features and length correlate at {signals['features']['spearman_active_length']:.2f}")
    clusters = {name: f for name, f in signals["diversity"].items() if isinstance(f, dict) and "nmi" in f}
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
        lines.append(f"  {name:<{width}}  {figures['value']:+.3f}  [{figures['low']:+.3f}, {figures['high']:+.3f}]{mark}")
    return lines
