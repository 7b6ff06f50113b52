"""Where the training of a dictionary begins: at step 0, or at a checkpoint, bit for bit as if it had never stopped.

A checkpoint holds the train state (parameters, moments, dead-latent counters) and, of an `ActivationBuffer`, the window of rows
and the place in the stream. Any other stream of batches must be the same when it is opened again: it is wound on by drawing and
dropping as many batches as were trained on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array

from sae.config import SAEConfig
from sae.errors import SAEError
from sae.harvest import ActivationBuffer
from sae.train_config import Scale


class CheckpointFolder(Protocol):
    """What training needs of a folder of checkpoints (jaxrl_llm.checkpoint.Checkpoints). `save` may return as soon as it has copied what is
    to be written; `finish` waits until that is written."""

    def save(self, step: int, state: Any, host: dict[str, np.ndarray]) -> None: ...

    def finish(self) -> None: ...

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, np.ndarray]] | None: ...


@dataclasses.dataclass
class Member:
    """One of the dictionaries: its description with the scales that were measured, and its records."""

    cfg: SAEConfig
    scale: Scale
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Position:
    """Everything of a run that is not the train states.

    ahead: batches that were read ahead of training; there is no checkpoint before they are trained on, since the stream is
    further on than its state would say, unless training is at its end.
    """

    members: dict[str, Member]
    stream: Iterator[np.ndarray]
    step: int = 0
    rows: int = 0
    ahead: int = 0


def described(tasks: Mapping[str, Any], key: Array, batches: Iterable[np.ndarray]) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values: all but how often it tells of itself. tasks: name -> SAETask."""
    out: dict[str, Any] = {"tasks": list(tasks), "key": np.asarray(jax.random.key_data(key)).tolist()}
    for name, task in tasks.items():
        fields = dataclasses.asdict(task)
        before = f"{name}." if name else ""
        fields["train"].pop("log_every")
        out |= {f"{before}sae": fields.pop("cfg"), f"{before}train": fields.pop("train"), f"{before}columns": fields}
    if isinstance(batches, ActivationBuffer):
        out["buffer"] = {"batch_size": batches.batch_size, "buffer_size": batches.buffer_size}
    return json.loads(json.dumps(out))


def save(checkpoints: CheckpointFolder, position: Position, run: dict[str, Any], states: list[Any], batches: Iterable[np.ndarray]) -> None:
    """A checkpoint of `states` at `position`; run: `described`."""
    arrays: dict[str, Any] = {"train": states}
    host: dict[str, np.ndarray] = {}
    if isinstance(batches, ActivationBuffer):
        arrays["window"], host = batches.state()
    members = [
        {"scale": m.scale, "input_scale": m.cfg.input_scale, "output_scale": m.cfg.output_scale, "history": m.history}
        for m in position.members.values()
    ]
    told = {"run": run, "rows": position.rows, "members": members}
    host["run"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    checkpoints.save(position.step, arrays, host)


def restore(
    checkpoints: CheckpointFolder,
    tasks: Mapping[str, Any],
    run: dict[str, Any],
    abstract: list[Any],
    batches: Iterable[np.ndarray],
    allow_changes: Collection[str] = (),
) -> tuple[Position, list[Any]] | None:
    """(position, train states) of the newest checkpoint, `batches` wound on to it; None where there is none.

    abstract: the train states' shapes, with shardings on a mesh. allow_changes: fields of SAETrainConfig that may differ from those of the run
    that wrote it. Raises SAEError where the checkpoints are of another run, or past the end of this one.
    """
    arrays: dict[str, Any] = {"train": abstract}
    if isinstance(batches, ActivationBuffer):
        arrays["window"] = np.zeros((batches.buffer_size, max(task.width for task in tasks.values())), np.float32)
    found = checkpoints.restore(arrays)
    if found is None:
        return None
    step, arrays, host = found
    told = json.loads(host["run"].tobytes())
    for part, fields in run.items():
        was = told["run"].get(part)
        if isinstance(fields, dict) and isinstance(was, dict):
            free = set(allow_changes) if part.rpartition(".")[2] == "train" else set()
            was = {name: value for name, value in was.items() if name != "log_every" and name not in free}
            fields = {name: value for name, value in fields.items() if name not in free}
        if was != fields:
            name = next((f"{part}.{n}" for n in fields if was.get(n) != fields[n]), part) if isinstance(fields, dict) and was else part
            raise SAEError(f"SAE training: the checkpoints are of a run with another {name}: train in another folder, or remove them")
    if step > (steps := min(task.train.steps for task in tasks.values())):
        raise SAEError(f"SAE training: the newest checkpoint is of step {step}, past steps = {steps}: give as many or more")
    stream = iter(batches)
    if isinstance(batches, ActivationBuffer):
        batches.restore(np.asarray(arrays["window"]), host)
    else:
        next(itertools.islice(stream, step, step), None)
    members = {}
    for (name, task), kept in zip(tasks.items(), told["members"], strict=True):
        cfg = task.cfg.replace(input_scale=kept["input_scale"], output_scale=kept["output_scale"])
        members[name] = Member(cfg, Scale(*kept["scale"]), kept["history"])
    return Position(members, stream, step, told["rows"]), arrays["train"]
