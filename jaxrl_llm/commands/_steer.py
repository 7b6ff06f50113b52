"""What `--config.steer...` of a verb asks for: edits of latents while a model generates."""

import math
from typing import Any

from jaxrl_llm.errors import UserError, nearest

FIELD = "config key 'steer.features'"
# Kind -> how many numbers follow it.
NUMBERS = {"ablate": 0, "set": 1, "add": 1, "scale": 1, "clamp": 2}
FORM = "give ID=KIND[:NUMBER] between commas, such as 12=add:4.0,90=ablate,7=clamp:0:2.5"


def parse_features(text: str) -> list[tuple[int, str, list[float]]]:
    """(latent, kind, its numbers) of each entry of "12=add:4.0,90=ablate"; an open side of a clamp ("7=clamp::2.5") is an infinity.

    Raises UserError naming the entry that cannot be read.
    """
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, what = entry.partition("=")
        kind, *numbers = (part.strip() for part in what.split(":"))
        if not equals or not name.strip().isdecimal():
            raise UserError(f"{FIELD} has {entry!r}: {FORM}")
        if kind not in NUMBERS:
            raise UserError(f"{FIELD} has {entry!r}: no kind {kind!r}; {nearest(kind, NUMBERS)}")
        if len(numbers) != NUMBERS[kind]:
            raise UserError(f"{FIELD} has {entry!r}: {kind} takes {NUMBERS[kind]} numbers; {FORM}")
        found.append((int(name), kind, [_number(entry, text, kind, i) for i, text in enumerate(numbers)]))
    return found


def _number(entry: str, text: str, kind: str, place: int) -> float:
    if kind == "clamp" and not text:
        return -math.inf if place == 0 else math.inf
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{FIELD} has {entry!r}: {text!r} is no finite number")
    return value


def check_steer(steer: Any) -> None:
    """Raises UserError for settings that cannot be what was meant, before anything is read."""
    entries = parse_features(steer.features)
    if steer.sae and not entries and not steer.passthrough:
        raise UserError(f"config key 'steer.sae' names a dictionary, but 'steer.features' is empty: {FORM}")
    if not steer.sae and (entries or steer.passthrough):
        raise UserError("config key 'steer.sae' is empty: name the folder of the dictionary whose latents are meant")


def edits_of(steer: Any, cfg: Any, model: str) -> dict[str, Any] | None:
    """{tap: edit} for `models.generate`; None where nothing is to be steered. cfg, model: of the model, its config and its name.

    Raises UserError where the dictionary names no tap, and what reading it, and latents that it has not, raise.
    """
    if not steer.sae:
        return None
    import sae
    from jaxrl_llm.curation.features import choose_hook, hook_width, tell_transfer

    d = sae.load(steer.sae)
    hook = choose_hook(cfg, {steer.sae: d}, steer.hook or None)
    if d.cfg.d_out is not None:
        if d.cfg.place is None:
            raise UserError(f"{steer.sae} is a transcoder that does not record the tap it writes: set hook_name_out in its config")
        if hook_width(cfg, d.cfg.place) != d.cfg.d_out:
            told = f"{d.cfg.d_out} dimensions, {d.cfg.place} of this model has {hook_width(cfg, d.cfg.place)}"
            raise UserError(f"{steer.sae} writes {told}: give the model that it was trained on")
        d = d.replace(cfg=d.cfg.replace(hook_name=hook))
    tell_transfer([d], model)
    makers = {"ablate": sae.ablate, "set": sae.set_to, "add": sae.add, "scale": sae.scale, "clamp": sae.clamp}
    listed = [makers[kind](latent, *numbers) for latent, kind, numbers in parse_features(steer.features)]
    edit = sae.intervene(d, listed, where=steer.where, start=steer.start, passthrough=steer.passthrough)
    return {d.cfg.place or hook: edit}
