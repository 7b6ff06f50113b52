"""Sparse autoencoders ("dictionaries") on a model's activations, and k-means."""

import importlib.util
import os


def _check_models() -> None:
    """`models` is the name of many packages; another one than the one beside this would fail later, by a missing module."""
    spec, here = importlib.util.find_spec("models"), os.path.dirname(os.path.abspath(__file__))
    found = next(iter((spec and spec.submodule_search_locations) or ()), (spec and spec.origin) or "")
    ours = os.path.join(os.path.dirname(here), "models")
    if found and os.path.realpath(found) != os.path.realpath(ours):
        raise ImportError(
            f"package 'models' is imported from {found}, but sae needs its own, {ours}: run from another folder, "
            f"or take {os.path.dirname(found)} off PYTHONPATH, or use a virtual environment of its own"
        )


_check_models()  # before the imports below, which need it

# ruff: noqa: E402
from sae.attribution import Attribution, ablation_effects, attribute, logit_difference
from sae.config import SAEConfig
from sae.dictionary import (
    Dictionary,
    cast,
    decode,
    decode_topk,
    encode,
    encode_topk,
    fold_decoder_norm,
    fold_input_scale,
    init,
    reconstruct,
    unfold_input_scale,
)
from sae.end_to_end import FinetuneConfig, finetune
from sae.errors import SAEError
from sae.formats import load, save
from sae.harvest import ActivationBuffer, array_batches, harvest_activations
from sae.interventions import FeatureEdit, Intervention, ablate, add, clamp, intervene, scale, set_to
from sae.kmeans import KMeans, kmeans
from sae.metrics import Statistics, activation_statistics, evaluate, geometry, max_cosines, token_counts
from sae.splice import ce_recovered, splice_figures, splice_sums
from sae.train import SAETask, Stopped, train_sae, train_saes
from sae.train_config import SAETrainConfig

__all__ = [
    "ActivationBuffer",
    "Attribution",
    "Dictionary",
    "FeatureEdit",
    "FinetuneConfig",
    "Intervention",
    "KMeans",
    "SAEConfig",
    "SAEError",
    "SAETask",
    "SAETrainConfig",
    "Statistics",
    "Stopped",
    "ablate",
    "ablation_effects",
    "activation_statistics",
    "add",
    "array_batches",
    "attribute",
    "cast",
    "ce_recovered",
    "clamp",
    "decode",
    "decode_topk",
    "encode",
    "encode_topk",
    "evaluate",
    "finetune",
    "fold_decoder_norm",
    "fold_input_scale",
    "geometry",
    "harvest_activations",
    "init",
    "intervene",
    "kmeans",
    "load",
    "logit_difference",
    "max_cosines",
    "reconstruct",
    "save",
    "scale",
    "set_to",
    "splice_figures",
    "splice_sums",
    "token_counts",
    "train_sae",
    "train_saes",
    "unfold_input_scale",
]
