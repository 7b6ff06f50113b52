"""Edits of single latents inside a running model: ablate, set, add, scale, clamp.

By default what the dictionary cannot reconstruct is kept: h' = h + (z'_f - z_f) W_dec[f], on the input's scale, so that an edit which
changes no latent changes no bit of h. With `passthrough` h is replaced by the decoded code, decode(z'), whose control is the edit of
nothing: the reconstruction alone. A latent that does not fire may be set or added to; no other latent gives way for it, also where the
dictionary keeps only k (some wrappers overwrite the weakest kept one, so that "set to 0" deletes an unrelated latent).
A transcoder's latents are of what it reads, x, and the edit is of what it writes, y: y' = y + (z'_f(x) - z_f(x)) W_dec[f], on the output's
scale; with `passthrough` y is replaced by decode(z'), the skip included.
Letters: B rows, T tokens, D d_in, E width of what is edited (d_in, or a transcoder's d_out), F d_sae, N edited latents, M interventions,
S positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae.config import choice
from sae.dictionary import Dictionary, architecture, check_width, denormalise, encode, encode_topk, reconstruct
from sae.errors import SAEError

WHERE = ("all", "prompt", "generated")
# Architectures whose latents do not look at each other: single ones are encoded by their own columns.
SEPARATE = ("relu", "jumprelu", "gated")


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One edit of latents: each z of `features` becomes clip(factor * z + shift, lower, upper).

    features: [n] ids, each once; the other fields are numbers or arrays [n], which may be traced. Made by `ablate`, `set_to`, `add`,
    `scale` and `clamp`.
    """

    features: tuple[int, ...]
    factor: Any = 1.0
    shift: Any = 0.0
    lower: Any = -np.inf
    upper: Any = np.inf


def ablate(features: int | Sequence[int]) -> Intervention:
    """The latents become 0: what they add to the reconstruction is taken out wherever they fire."""
    return Intervention(_ids(features), factor=0.0)


def set_to(features: int | Sequence[int], values: Any) -> Intervention:
    """The latents become `values` at every token chosen, whether they fire there or not."""
    return Intervention(_ids(features), factor=0.0, shift=values)


def add(features: int | Sequence[int], values: Any) -> Intervention:
    """`values` are added, whether the latents fire or not; a sum below 0 stays (a step against the decoder row), unless `clamp` follows."""
    return Intervention(_ids(features), shift=values)


def scale(features: int | Sequence[int], factors: Any) -> Intervention:
    """The latents are multiplied by `factors` where they fire."""
    return Intervention(_ids(features), factor=factors)


def clamp(features: int | Sequence[int], lower: Any = None, upper: Any = None) -> Intervention:
    """The latents are kept within [lower, upper]; None leaves a side open. A lower bound above 0 makes them fire everywhere.

    Raises SAEError where no bound is given or, of bounds that can be looked at, the lower one is above the upper.
    """
    if lower is None and upper is None:
        raise SAEError("clamp: give a lower or an upper bound")
    lower, upper = -np.inf if lower is None else lower, np.inf if upper is None else upper
    if not any(isinstance(bound, jax.core.Tracer) for bound in (lower, upper)) and np.any(np.asarray(lower) > np.asarray(upper)):
        raise SAEError(f"clamp: the lower bound {lower} is above the upper bound {upper}")
    return Intervention(_ids(features), lower=lower, upper=upper)


@flax.struct.dataclass
class FeatureEdit:
    """The function that `models` calls in place of an activation (`interventions={d.cfg.place: edit}`); made by `intervene`.

    A pytree: another `dictionary`, other latents or values of the same shapes need no new compilation of what it is an argument of.
    features_N: the latents; factor, shift, lower, upper: [M, N], the interventions in their order (one that leaves a latent alone has
    1, 0, -inf, inf there). mask: [S] of positions or [texts, S], True = edited, past its end nothing is; or None. start: the first
    position that is edited.
    """

    dictionary: Dictionary
    features_N: Int[Array, " N"]
    factor_MN: Float[Array, "M N"]
    shift_MN: Float[Array, "M N"]
    lower_MN: Float[Array, "M N"]
    upper_MN: Float[Array, "M N"]
    mask: Bool[Array, "*texts S"] | None
    start: Int[Array, ""]
    where: str = flax.struct.field(pytree_node=False, default="all")
    passthrough: bool = flax.struct.field(pytree_node=False, default=False)
    takes_place = True  # what `models.taps` asks for: it is called with the tokens' places

    @property
    def reads(self) -> str | None:
        """The activation that `models.taps` hands over beside the edited one: a transcoder's input."""
        return None if self.dictionary.cfg.d_out is None else self.dictionary.cfg.hook_name

    def __call__(self, x_BTE: Float[Array, "B T E"], place: Any, read_BTD: Float[Array, "B T D"] | None = None) -> Float[Array, "B T E"]:
        """The edited activation, in its dtype. place: `models.taps.Place`; read_BTD: what a transcoder reads."""
        check_width("the activation that an intervention edits", x_BTE, self.dictionary.cfg.out)
        x = x_BTE.astype(jnp.float32)
        given = x if read_BTD is None else read_BTD.astype(jnp.float32)
        check_width("the activation that an intervention reads", given, self.dictionary.cfg.d_in)
        edited = (reconstruct(self.dictionary, given) if self.passthrough else x) + self.difference(given)
        return jnp.where(self.chosen(place)[..., None], edited.astype(x_BTE.dtype), x_BTE)

    def difference(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """(z' - z) W_dec over the edited latents of x, fp32, on the scale of what is edited."""
        z = self.latents(x)
        new = z
        for factor, shift, lower, upper in zip(self.factor_MN, self.shift_MN, self.lower_MN, self.upper_MN, strict=True):
            new = jnp.clip(factor * new + shift, lower, upper)
        d = self.dictionary
        rows_NE = d.params["W_dec"][self.features_N].astype(jnp.float32)
        return on_output_scale(d, jnp.einsum("...n,ne->...e", new - z, rows_NE), x)

    def latents(self, x: Float[Array, "... D"]) -> Float[Array, "... N"]:
        """The activations of the edited latents, fp32."""
        return latents_of(self.dictionary, x, self.features_N)

    def chosen(self, place: Any) -> Bool[Array, "B T"]:
        """Which tokens are edited."""
        at_BT = place.positions_BT
        chosen_BT = at_BT >= self.start
        if self.where != "all":
            generated_BT = place.generated_BT()
            chosen_BT &= generated_BT if self.where == "generated" else ~generated_BT
        if self.mask is not None:
            texts, at = (jnp.zeros_like(place.texts_B) if self.mask.ndim == 1 else place.texts_B)[:, None], jnp.maximum(at_BT, 0)
            chosen_BT &= jnp.atleast_2d(self.mask).at[texts, at].get(mode="fill", fill_value=False)
        return chosen_BT


def intervene(
    d: Dictionary,
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    where: str = "all",
    mask: Any = None,
    start: int = 0,
    passthrough: bool = False,
) -> FeatureEdit:
    """The edit for `models.forward`, `models.apply` or `models.generate`: interventions={d.cfg.place: intervene(d, ...)}, place being the
    dictionary's tap, or the one that a transcoder writes.

    interventions are applied in their order, also to the same latent. where: "all", "prompt" or "generated" tokens (the last two need
    to know where prompts end: `forward(..., prompt_lengths=)`; generation does). mask: bools [positions], the same for every text, or
    [texts, positions] (in generation a text is a prompt, and its positions go on into what is generated). start: leave positions before
    it alone, such as 1 for a dictionary that was trained without the beginning-of-text token. passthrough: replace the chosen tokens'
    activation by the decoded code rather than add the difference.

    Raises SAEError for an unknown `where`, a latent that the dictionary has not, one named twice in an intervention, values that are
    not one a latent or not finite, a mask of another kind, and a transcoder that does not name the tap that it reads.
    """
    listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    choice("where of an intervention", where, WHERE)
    if d.cfg.d_out is not None and d.cfg.hook_name is None:
        raise SAEError("intervene: the transcoder's config names no hook_name; set it to the tap that it reads")
    ids = sorted({f for one in listed for f in one.features})
    for one in listed:
        _check(d, one)
    column, n = {f: i for i, f in enumerate(ids)}, len(ids)

    def table(field: str, neutral: float) -> Array:
        rows = jnp.full((len(listed), n), neutral, jnp.float32)
        for i, one in enumerate(listed):
            rows = rows.at[i, np.array([column[f] for f in one.features], np.int32)].set(getattr(one, field))
        return rows

    tables = table("factor", 1.0), table("shift", 0.0), table("lower", -np.inf), table("upper", np.inf)
    return FeatureEdit(d, jnp.asarray(ids, jnp.int32), *tables, _mask(mask), jnp.int32(start), where, passthrough)


def on_output_scale(d: Dictionary, difference: Float[Array, "... E"], x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """What a difference of two reconstructions of x before the normalisation is undone becomes after it: its scale without its shift."""
    return jax.jvp(lambda x_hat: denormalise(d.cfg, x_hat, x), (jnp.zeros_like(difference),), (difference,))[1]


def latents_of(d: Dictionary, x: Float[Array, "... D"], features_N: Int[Array, " N"]) -> Float[Array, "... N"]:
    """The activations of some latents, fp32: those of `encode`, up to rounding, without a dense code where there is a shorter way."""
    kind = architecture(d.cfg)
    if d.cfg.architecture in SEPARATE:
        take = lambda name: jnp.take(d.params[name], features_N, axis=kind.axes[name].index("d_sae"))  # noqa: E731
        some = {name: take(name) if "d_sae" in kind.axes.get(name, ()) else value for name, value in d.params.items()}
        return encode(Dictionary(some, d.cfg.replace(d_sae=max(len(features_N), 1))), x) if len(features_N) else x[..., :0]
    if kind.encode_sparse is None:
        return encode(d, x)[..., features_N]
    values, indices = encode_topk(d, x)
    return jnp.sum(jnp.where(indices[..., None] == features_N, values[..., None], 0.0), axis=-2)


def _ids(features: Any) -> tuple[int, ...]:
    ids = np.atleast_1d(np.asarray(features))
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise SAEError(f"intervention: features are {features!r}; give a latent's number, or a list of them")
    return tuple(map(int, ids))


def _check(d: Dictionary, one: Intervention) -> None:
    """Raises SAEError for what could not mean anything."""
    for f in one.features:
        if not 0 <= f < d.cfg.d_sae:
            raise SAEError(f"intervention: there is no latent {f}; the dictionary has 0 to {d.cfg.d_sae - 1}")
    if twice := [f for f in set(one.features) if one.features.count(f) > 1]:
        raise SAEError(f"intervention: latent {twice[0]} is named twice; give two interventions, which are applied in their order")
    for name in ("factor", "shift", "lower", "upper"):
        value = getattr(one, name)
        if np.shape(value) not in ((), (len(one.features),)):
            raise SAEError(f"intervention: {name} has shape {np.shape(value)}; give a number, or one for each of {len(one.features)} latents")
        # Bounds may be infinite, on their side; nothing may be NaN.
        bad = np.isnan if name in ("lower", "upper") else lambda a: ~np.isfinite(a)
        if not isinstance(value, jax.core.Tracer) and bad(np.asarray(value, np.float32)).any():
            raise SAEError(f"intervention: {name} is {value}; give finite numbers")


def _mask(mask: Any) -> Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != bool or mask.ndim not in (1, 2) or not mask.size:
        raise SAEError(f"intervene: the mask is {mask.dtype} of shape {mask.shape}; give bools [positions] or [texts, positions]")
    return mask
