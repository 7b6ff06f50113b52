"""Our own layout: sae.json with SAEConfig's fields, sae.safetensors with its parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sae.config import SAEConfig
from sae.dictionary import Dictionary, param_shapes
from sae.errors import SAEError
from sae.formats.arrays import safetensors_arrays
from sae.formats.common import Layout, checked, converted, make_config, read_object

CONFIG, WEIGHTS = "sae.json", "sae.safetensors"


def read(folder: Path, dtype: str | None) -> Dictionary:
    """The dictionary in `folder`."""
    where = folder / CONFIG
    fields = read_object(where).get("sae")
    if not isinstance(fields, dict):
        raise SAEError(f"{where}: no object named 'sae'; this is not a dictionary saved by sae.save")
    known = {f.name for f in dataclasses.fields(SAEConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise SAEError(f"{where}: unknown field sae.{unknown[0]}; known: {', '.join(sorted(known))}")
    if fields.get("normalize_activations") == "expected_average_only_in" and "input_scale" not in fields:
        raise SAEError(f"{where}: sae.input_scale is missing; normalize_activations 'expected_average_only_in' needs it")
    cfg = make_config(fields | ({"dtype": dtype} if dtype else {}), where)
    arrays = safetensors_arrays(folder / WEIGHTS)
    whole = {name: converted(array, cfg.dtype) if name in param_shapes(cfg) else array for name, array in arrays.items()}
    return checked(cfg, whole, where)


def write(d: Dictionary) -> dict[str, dict[str, Any]]:
    """The files' contents."""
    return {WEIGHTS: dict(d.params), CONFIG: {"format": "jaxrl_llm.sae", "version": 1, "sae": dataclasses.asdict(d.cfg)}}


NATIVE = Layout(
    holds=f"{CONFIG} and {WEIGHTS}", found=lambda path: (path / CONFIG).exists(), read=read, hub_files=(CONFIG, WEIGHTS), write=write
)
