"""What a sparse autoencoder is: one frozen, hashable description."""

from __future__ import annotations

import dataclasses
import difflib

from sae.errors import SAEError

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """A dictionary of `d_sae` latents over activations of width `d_in`. Hashable: a static argument of jitted functions.

    architecture: a row of `sae.architectures.ARCHITECTURES`. `k` is the number of latents kept a row ("topk" only).
    normalize_activations, with SAELens's names: "none"; "expected_average_only_in" multiplies inputs by `input_scale`,
    which makes their mean norm sqrt(d_in); "constant_norm_rescale" gives every row the norm sqrt(d_in); "layer_norm"
    subtracts a row's mean and divides by its standard deviation. All are undone on the reconstruction.
    apply_b_dec_to_input: subtract the decoder's bias from the (normalised) input before encoding.
    hook_name, model_name, context_size: where the activations come from; `hook_name` is a tap of `models.forward`.
    """

    architecture: str = "topk"
    d_in: int = 0
    d_sae: int = 0
    k: int | None = None
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    input_scale: float = 1.0
    hook_name: str | None = None
    model_name: str | None = None
    context_size: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        from sae.architectures import ARCHITECTURES  # the table's rows are functions of this class

        choice("architecture", self.architecture, ARCHITECTURES)
        choice("normalize_activations", self.normalize_activations, NORMALISATIONS)
        choice("dtype", self.dtype, DTYPES)
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise SAEError(f"SAE config: {name} is {getattr(self, name)}; give a positive width")
        if ARCHITECTURES[self.architecture].needs_k and not 1 <= (self.k or 0) <= self.d_sae:
            raise SAEError(f"SAE config: k is {self.k}; a {self.architecture} SAE needs 1 <= k <= d_sae = {self.d_sae}")
        if not self.input_scale > 0:
            raise SAEError(f"SAE config: input_scale is {self.input_scale}; give a positive number")

    def replace(self, **changes) -> SAEConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def choice(field: str, value: str, allowed) -> None:
    """Raises SAEError naming the nearest allowed value when `value` is none of them."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(allowed)}"
        raise SAEError(f"SAE config: unknown {field} {value!r}; {hint}")
