"""Where the training of a dictionary begins: at step 0, or at a checkpoint, bit for bit as if it had never stopped.

A checkpoint holds the train state (parameters, moments, dead-latent counters) and, of an `ActivationBuffer`, the window of rows
and the place in the stream. Any other stream of batches must be the same when it is opened again: it is wound on by drawing and
dropping as many batches as were trained on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array

from sae.config import SAEConfig
from sae.errors import SAEError
from sae.harvest import ActivationBuffer


class CheckpointFolder(Protocol):
    """What training needs of a folder of checkpoints (jaxrl_llm.checkpoint.Checkpoints). `save` may return as soon as it has copied what is
    to be written; `finish` waits until that is written."""

    def save(self, step: int, state: Any, host: dict[str, np.ndarray]) -> None: ...

    def finish(self) -> None: ...

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, np.ndarray]] | None: ...


@dataclasses.dataclass
class Position:
    """Everything of a run that is not the train state.

    ahead: batches that were read ahead of training; there is no checkpoint before they are trained on, since the stream is
    further on than its state would say.
    """

    cfg: SAEConfig  # with its input scale
    variance: float  # of the sample, which scales the loss
    stream: Iterator[np.ndarray]
    step: int = 0
    rows: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    ahead: int = 0


def described(cfg: SAEConfig, train: Any, key: Array, batches: Iterable[np.ndarray]) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values."""
    out = {"sae": dataclasses.asdict(cfg), "train": dataclasses.asdict(train), "key": np.asarray(jax.random.key_data(key)).tolist()}
    if isinstance(batches, ActivationBuffer):
        out["buffer"] = {"batch_size": batches.batch_size, "buffer_size": batches.buffer_size}
    return json.loads(json.dumps(out))


def save(checkpoints: CheckpointFolder, position: Position, run: dict[str, Any], state: Any, batches: Iterable[np.ndarray]) -> None:
    """A checkpoint of `state` at `position`; run: `described`."""
    arrays, host = {"train": state}, {}
    if isinstance(batches, ActivationBuffer):
        arrays["window"], host = batches.state()
    figures = {"rows": position.rows, "variance": position.variance, "input_scale": position.cfg.input_scale, "history": position.history}
    host["run"] = np.frombuffer(json.dumps({"run": run, **figures}).encode(), np.uint8)
    checkpoints.save(position.step, arrays, host)


def restore(
    checkpoints: CheckpointFolder, cfg: SAEConfig, run: dict[str, Any], abstract: Any, batches: Iterable[np.ndarray]
) -> tuple[Position, Any] | None:
    """(position, train state) of the newest checkpoint, `batches` wound on to it; None where there is none.

    abstract: the train state's shapes, with shardings on a mesh. Raises SAEError where the checkpoints are of another run.
    """
    arrays = {"train": abstract}
    if isinstance(batches, ActivationBuffer):
        arrays["window"] = np.zeros((batches.buffer_size, cfg.d_in), np.float32)
    found = checkpoints.restore(arrays)
    if found is None:
        return None
    step, arrays, host = found
    told = json.loads(host["run"].tobytes())
    for part, fields in run.items():
        if told["run"].get(part) != fields:
            was = told["run"].get(part)
            name = next((f"{part}.{n}" for n in fields if was.get(n) != fields[n]), part) if isinstance(fields, dict) and was else part
            raise SAEError(f"SAE training: the checkpoints are of a run with another {name}: train in another folder, or remove them")
    stream = iter(batches)
    if isinstance(batches, ActivationBuffer):
        batches.restore(np.asarray(arrays["window"]), host)
    else:
        next(itertools.islice(stream, step, step), None)
    cfg = cfg.replace(input_scale=told["input_scale"])
    return Position(cfg, told["variance"], stream, step, told["rows"], told["history"]), arrays["train"]
