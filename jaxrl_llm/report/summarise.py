"""From raw arrays to the records of a page: the batches of a schedule, and calibration bins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.report.schema import Calibration, Schedule

QUANTILES = (10, 25, 50, 75, 90)


def schedule(
    arm: str, batches: Sequence[Any], difficulty: Any, cluster: Any | None = None, *, steps: Sequence[int] | None = None
) -> Schedule:
    """What an arm's batches held.

    Args:
      arm: the arm's name.
      batches: one array of row indices a step.
      difficulty: [rows] in [0, 1], higher is harder; NaN where unknown.
      cluster: [rows] cluster numbers, negative where a row has none; None leaves the clusters out.
      steps: the step of each batch; default 0, 1, 2, ...
    """
    difficulty = np.asarray(difficulty, np.float64)
    rows = [np.asarray(batch, np.int64) for batch in batches]
    found = [difficulty[r][np.isfinite(difficulty[r])] for r in rows]
    table = np.array([np.percentile(values, QUANTILES) if values.size else [np.nan] * len(QUANTILES) for values in found])
    table = table.reshape(len(rows), len(QUANTILES))
    out: dict[str, Any] = {
        "arm": arm,
        "steps": list(range(len(rows))) if steps is None else [int(s) for s in steps],
        "quantiles": {str(q): table[:, i].tolist() for i, q in enumerate(QUANTILES)},
    }
    if cluster is not None:
        numbers = np.asarray(cluster, np.int64)
        names = np.unique(numbers[numbers >= 0])
        out["clusters"] = [str(name) for name in names]
        out["counts"] = [[int((numbers[r] == name).sum()) for name in names] for r in rows]
    return out  # pyright: ignore[reportReturnType]


def calibration_bins(predicted: Any, observed: Any, *, bins: int = 10) -> list[dict[str, Any]]:
    """Prompts in equal bins of the prediction: mean prediction, mean observation, its 95% normal interval, count.

    Args:
      predicted: [n] predictions in [0, 1].
      observed: [n] observed values for the same prompts.
      bins: how many equal bins of [0, 1]; empty ones are left out.
    """
    predicted, observed = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
    place = np.clip((predicted * bins).astype(np.int64), 0, bins - 1)
    out = []
    for b in range(bins):
        inside = place == b
        count = int(inside.sum())
        if count == 0:
            continue
        mean = float(observed[inside].mean())
        entry: dict[str, Any] = {"predicted": float(predicted[inside].mean()), "observed": mean, "count": count}
        if count > 1:
            half = 1.96 * float(observed[inside].std(ddof=1)) / np.sqrt(count)
            entry |= {"low": max(mean - half, 0.0), "high": min(mean + half, 1.0)}
        out.append(entry)
    return out


def calibration(predictions: dict[str, Any], observed: Any, *, bins: int = 10, spearman: dict[str, Any] | None = None) -> Calibration:
    """A whole calibration section: name of the predictor -> its predictions, all against the same observations."""
    series: list[dict[str, Any]] = []
    for name, values in predictions.items():
        entry = {"name": name, "bins": calibration_bins(values, observed, bins=bins)}
        series.append(entry | ({"spearman": spearman[name]} if spearman and name in spearman else {}))
    return {"series": series}  # pyright: ignore[reportReturnType]
