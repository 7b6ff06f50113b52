"""How a dictionary is trained: the settings, and the numbers that they give each step."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from sae.config import choice
from sae.errors import SAEError


@dataclasses.dataclass(frozen=True)
class SAETrainConfig:
    """How a dictionary is trained."""

    steps: int = 1000  # updates; each takes one batch
    learning_rate: float | None = None  # peak; None: 2e-4 / sqrt(d_sae / 2^14)
    warmup_steps: int = 50  # linear rise from 0
    decay_share: float = 0.2  # last share of the steps, over which the rate falls linearly to 0
    beta1: float = 0.9  # Adam's moments
    beta2: float = 0.999
    grad_clip: float = 1.0  # global norm; 0: none
    sparsity_coefficient: float = 0.0  # weight of the penalty ("relu", "gated": L1; "jumprelu": see penalty)
    sparsity_warmup_steps: int = 0  # linear rise of that weight
    penalty: str = "step"  # "jumprelu": "step" counts active latents, "tanh" sums tanh(tanh_scale z |W_dec|)
    target_l0: float | None = None  # "jumprelu" with "step": penalise (L0 / target_l0 - 1)^2 instead of L0
    tanh_scale: float = 4.0  # "jumprelu" with "tanh"
    bandwidth: float = 0.05  # "jumprelu": width around a threshold in which it gets a gradient, in root mean squares of a target's coordinate
    threshold_init: float = 0.01  # "jumprelu": in the same unit
    pre_act_coefficient: float = 0.0  # "jumprelu": weight of what draws dead latents up to their threshold
    threshold_decay: float = 0.99  # "batchtopk", "matryoshka": of the running mean that becomes the threshold
    aux_coefficient: float | None = None  # weight of AuxK; 0: off; None: as published, 1/32 of the architectures with a k, 0 of the others
    resample_every: int = 0  # steps between replacements of dead latents by badly reconstructed rows; 0: never
    aux_k: int | None = None  # dead latents that AuxK lets into each row; None: d_in / 2
    dead_after: int = 1_000_000  # rows without firing after which a latent counts as dead
    decoder_norm: str = "unit"  # "unit": rows kept at norm 1; "free": unconstrained, norms folded into the encoder last
    b_dec_init: str = "geometric_median"  # of the first rows; or "mean", "zero"
    init_rows: int = 32_768  # rows read ahead for b_dec, the input scale and the variance (they are trained on too)
    matmul_dtype: str = "float32"  # of the products' operands ("bfloat16" for accelerators); parameters and sums stay float32
    method: str = "auto"  # "dense" or "sparse" products; auto: the faster one (`gathers_from` of its architecture)
    log_every: int = 50  # steps between records of the history

    def __post_init__(self):
        choice("decoder_norm", self.decoder_norm, ("unit", "free"))
        choice("b_dec_init", self.b_dec_init, ("geometric_median", "mean", "zero"))
        choice("method", self.method, ("auto", "dense", "sparse"))
        choice("penalty", self.penalty, ("step", "tanh"))
        choice("matmul_dtype", self.matmul_dtype, ("float32", "bfloat16"))
        least = dict.fromkeys(("steps", "log_every", "init_rows", "dead_after", "aux_k"), 1)
        zeros = ("warmup_steps", "sparsity_warmup_steps", "grad_clip", "sparsity_coefficient", "aux_coefficient", "resample_every")
        least |= dict.fromkeys((*zeros, "pre_act_coefficient", "threshold_init"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise SAEError(f"SAE training: {name} is {value}; give {low} or more")
        for name in ("learning_rate", "target_l0", "tanh_scale", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise SAEError(f"SAE training: {name} is {value}; give a positive number")
        if self.target_l0 is not None and self.penalty != "step":
            raise SAEError(f"SAE training: target_l0 is a form of the 'step' penalty, but penalty is {self.penalty!r}; leave one of them out")
        if not 0.0 <= self.decay_share <= 1.0:
            raise SAEError(f"SAE training: decay_share is {self.decay_share}; give a share between 0 and 1")
        for name in ("beta1", "beta2", "threshold_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SAEError(f"SAE training: {name} is {getattr(self, name)}; give a number from 0 to below 1")


class Numbers(NamedTuple):
    """The settings that are arguments of the compiled step, so that other values compile nothing anew."""

    learning_rate: float
    sparsity: float
    aux: float
    grad_clip: float
    beta1: float
    beta2: float
    dead_after: int
    variance: float
    unit: float
    unit_out: float
    bandwidth: float
    target_l0: float
    tanh_scale: float
    pre_act: float
    threshold_decay: float


class Scale(NamedTuple):
    """What a sample of activations says of their scale: variance of a (normalised) target row; root mean square of a coordinate of the
    encoder's input, and of the target, each about its mean."""

    variance: float
    unit: float
    unit_out: float


def default_learning_rate(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14) (Gao et al. 2024, section 3)."""
    return 2e-4 / math.sqrt(d_sae / 2**14)


def numbers_at(step: int, d_sae: int, train: SAETrainConfig, scale: Scale) -> Numbers:
    """The numbers of the update after `step` others: the rate rises linearly, stays, and falls linearly to zero."""
    rate = train.learning_rate or default_learning_rate(d_sae)
    rise = min(1.0, (step + 1) / max(train.warmup_steps, 1))
    fall = min(1.0, (train.steps - step) / max(round(train.steps * train.decay_share), 1))
    return Numbers(
        learning_rate=rate * rise * fall,
        sparsity=train.sparsity_coefficient * min(1.0, (step + 1) / max(train.sparsity_warmup_steps, 1)),
        aux=1 / 32 if train.aux_coefficient is None else train.aux_coefficient,  # of no account where the step leaves AuxK out
        grad_clip=train.grad_clip or math.inf,
        beta1=train.beta1,
        beta2=train.beta2,
        dead_after=train.dead_after,
        variance=scale.variance,
        unit=scale.unit,
        unit_out=scale.unit_out,
        bandwidth=train.bandwidth,
        target_l0=train.target_l0 or 0.0,
        tanh_scale=train.tanh_scale,
        pre_act=train.pre_act_coefficient,
        threshold_decay=train.threshold_decay,
    )


