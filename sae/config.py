"""What a sparse autoencoder is: one frozen, hashable description."""

from __future__ import annotations

import dataclasses
import difflib

from sae.errors import SAEError

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "layer_norm_eps")
ROW_WISE = ("constant_norm_rescale", "layer_norm", "layer_norm_eps")  # each row by figures of its own
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """A dictionary of `d_sae` latents over activations of width `d_in`. Hashable: a static argument of jitted functions.

    architecture: a row of `sae.architectures.ARCHITECTURES`. `k` is the number of latents kept a row ("topk"; "batchtopk" and "matryoshka",
    which are "jumprelu" once they are trained: on average). prefixes: the numbers of latents that must reconstruct alone ("matryoshka");
    empty: d_sae / 16, / 8, / 4, / 2.
    d_out: None for an autoencoder; for a transcoder, which reads one tap and reconstructs another (Dunefsky et al. 2024), the width of that
    one, which is `hook_name_out`. skip: a transcoder with a linear path beside the latents.
    normalize_activations, with SAELens's names: "none"; "expected_average_only_in" multiplies inputs by `input_scale`,
    which makes their mean norm sqrt(d_in); "constant_norm_rescale" gives every row the norm sqrt(d_in); "layer_norm"
    subtracts a row's mean and divides by its standard deviation plus 1e-5, which is undone by the deviation alone (SAELens, OpenAI), or by
    what it was divided by ("layer_norm_eps": OpenSAE). All are undone on the reconstruction, unless undo_normalization is False:
    then raw activations are reconstructed from normalised ones (OpenSAE without shift_back). A transcoder's target is multiplied by
    `output_scale` ("expected_average_only_in").
    apply_b_dec_to_input: subtract the decoder's bias from the (normalised) input before encoding; None: in autoencoders.
    hook_name, model_name, context_size: where the activations come from; `hook_name` is a tap of `models.forward`.
    """

    architecture: str = "topk"
    d_in: int = 0
    d_sae: int = 0
    k: int | None = None
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool | None = None
    input_scale: float = 1.0
    hook_name: str | None = None
    model_name: str | None = None
    context_size: int | None = None
    dtype: str = "float32"
    prefixes: tuple[int, ...] = ()
    d_out: int | None = None
    skip: bool = False
    hook_name_out: str | None = None
    output_scale: float = 1.0
    undo_normalization: bool = True

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
        for name in ("input_scale", "output_scale"):
            if not getattr(self, name) > 0:
                raise SAEError(f"SAE config: {name} is {getattr(self, name)}; give a positive number")
        if self.apply_b_dec_to_input is None:
            object.__setattr__(self, "apply_b_dec_to_input", self.d_out is None)
        if self.architecture == "matryoshka" and not self.prefixes:
            shares = sorted({self.d_sae // n for n in (16, 8, 4, 2)} - {0})
            object.__setattr__(self, "prefixes", tuple(shares))
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if not self.undo_normalization and self.normalize_activations not in ROW_WISE:
            raise SAEError(f"SAE config: undo_normalization is off, which {self.normalize_activations!r} leaves no use for; leave it on")
        self._check_prefixes()
        self._check_transcoder()

    def _check_prefixes(self) -> None:
        if self.prefixes and self.architecture != "matryoshka":
            raise SAEError(f"SAE config: prefixes are {self.prefixes}, but a {self.architecture} SAE has none; leave them empty")
        rising = all(isinstance(n, int) for n in self.prefixes) and list(self.prefixes) == sorted(set(self.prefixes))
        if self.prefixes and (not rising or self.prefixes[0] < 1 or self.prefixes[-1] >= self.d_sae):
            raise SAEError(f"SAE config: prefixes are {self.prefixes}; give rising whole numbers from 1 to below d_sae = {self.d_sae}")

    def _check_transcoder(self) -> None:
        if self.d_out is None:
            wrong = [name for name in ("skip", "hook_name_out") if getattr(self, name)]
            if wrong or self.output_scale != 1.0:
                raise SAEError(f"SAE config: {(wrong or ['output_scale'])[0]} is for transcoders; give d_out too, the width of what is reconstructed")
            return
        if self.d_out < 1:
            raise SAEError(f"SAE config: d_out is {self.d_out}; give a positive width")
        if self.apply_b_dec_to_input:
            raise SAEError("SAE config: apply_b_dec_to_input is set, but a transcoder's b_dec belongs to its output; leave it off")
        if self.normalize_activations in ROW_WISE:
            raise SAEError(f"SAE config: a transcoder cannot undo {self.normalize_activations!r} of its input on its output; choose 'none'")

    @property
    def out(self) -> int:
        """Width of what is reconstructed."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def place(self) -> str | None:
        """The tap in whose place its output stands: a transcoder's `hook_name_out`, an autoencoder's `hook_name`."""
        return self.hook_name if self.d_out is None else self.hook_name_out

    def replace(self, **changes) -> SAEConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def choice(field: str, value: str, allowed) -> None:
    """Raises SAEError naming the nearest allowed value when `value` is none of them."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(allowed)}"
        raise SAEError(f"SAE config: unknown {field} {value!r}; {hint}")
