"""The dictionaries that a run of `jaxrl-llm eval` judges: which taps they read and write, and whether they fit the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError

HELD_BYTES = 1 << 30  # of all dictionaries that stay in memory between the check and the evaluation; others are read again

# Field that a dictionary leaves empty -> what it is, and what of the run's config stands in.
NAMELESS = {"hook_name": ("tap", "hook", "blocks.N.resid_post"), "hook_name_out": ("output tap", "hook_out", "blocks.N.mlp_out")}


@dataclasses.dataclass(frozen=True)
class Source:
    """A dictionary that can be read and fits the model: the folder or hub id, its taps (one, or a transcoder's input and output), the
    fingerprint of its parameters, and the dictionary itself where it is small."""

    source: str
    taps: tuple[str, ...]
    fingerprint: str
    held: Any = None

    def load(self) -> Any:
        """The dictionary, with its taps in its config."""
        import sae

        d = sae.load(self.source) if self.held is None else self.held
        return d.replace(cfg=d.cfg.replace(**dict(zip(("hook_name", "hook_name_out"), self.taps))))


def check_saes(config: Any, cfg: Any) -> dict[str, Source]:
    """Short name -> each SAE that can be read and fits the model. Raises UserError naming the SAE that does not; one that was trained
    on another model is told of."""
    import jax

    import sae
    from jaxrl_llm.curation.features import tell_transfer, tree_fingerprint

    found, widths, held = {}, {}, 0
    for source, name in zip(config.saes, short_names(config.saes), strict=True):
        try:
            d = sae.load(source)
        except sae.SAEError as error:
            raise UserError(f"SAE {source}: {str(error).removeprefix(f'{source}: ')}") from None
        taps = tuple(_tap(config, cfg, source, field, value, widths) for field, value in _taps(config, d.cfg).items())
        for tap, field, what in zip(taps, ("d_in", "d_out"), ("reads", "writes")):
            if getattr(d.cfg, field) != widths[tap]:
                raise UserError(
                    f"SAE {source} {what} {getattr(d.cfg, field)} dimensions ({field}), but {tap} of {config.model} has {widths[tap]}"
                )
        tell_transfer([d], config.model)
        held += sum(leaf.nbytes for leaf in jax.tree.leaves(d.params))
        found[name] = Source(source, taps, tree_fingerprint(d.params), d if held <= HELD_BYTES else None)
    return found


def _taps(config: Any, of: Any) -> dict[str, str]:
    """Config field of a dictionary -> the tap: its own, or else the run's."""
    own = {"hook_name": of.hook_name or config.hook}
    return own if of.d_out is None else own | {"hook_name_out": of.hook_name_out or config.hook_out}


def _tap(config: Any, cfg: Any, source: str, field: str, hook: str, widths: dict[str, int]) -> str:
    """The tap, its width added to `widths`; UserError where there is none, or none in the model."""
    import jax

    from models import ModelError, abstract_params
    from models.taps import parse_name
    from sae.harvest import tap

    if not hook:
        what, flag, example = NAMELESS[field]
        raise UserError(f"SAE {source} names no {what} ({field}): give the one it was trained on with --config.{flag}={example}")
    try:
        kind, _ = parse_name(cfg, hook, "tap")
    except ModelError as error:
        raise UserError(f"SAE {source}: its {field} is no activation of {config.model}: {error}") from None
    if kind == "attn_probs":
        raise UserError(f"SAE {source}: {hook} is no vector a token; choose another tap")
    if hook not in widths:
        shape = jax.ShapeDtypeStruct((1, 2), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
        widths[hook] = jax.eval_shape(lambda p, t, n: tap(cfg, p, t, n, (hook,)), abstract_params(cfg), *shape).shape[-1]
    return hook


def short_names(sources: tuple[str, ...]) -> list[str]:
    """A file name for each: its last folders, as many as tell it from the others."""
    parts = [[part for part in str(source).replace("\\", "/").split("/") if part not in ("", ".", "..")] for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{i + 1}" for i, name in enumerate(names)]


def described(d: Any) -> dict[str, Any]:
    """What the SAE is, without its parameters."""
    keys = ("architecture", "d_in", "d_sae", "k", "normalize_activations", "hook_name", "model_name", "context_size", "dtype")
    return {key: getattr(d.cfg, key, None) for key in (*keys, *(("d_out", "hook_name_out", "skip") if d.cfg.d_out is not None else ()))}
