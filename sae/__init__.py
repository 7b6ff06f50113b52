"""Sparse autoencoders ("dictionaries") on a model's activations, and k-means."""

from sae.config import SAEConfig
from sae.dictionary import (
    Dictionary,
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
from sae.errors import SAEError
from sae.formats import load, save
from sae.harvest import ActivationBuffer, array_batches, harvest_activations
from sae.kmeans import KMeans, kmeans
from sae.metrics import ce_recovered, evaluate
from sae.train import SAETrainConfig, train_sae

__all__ = [
    "ActivationBuffer",
    "Dictionary",
    "KMeans",
    "SAEConfig",
    "SAEError",
    "SAETrainConfig",
    "array_batches",
    "ce_recovered",
    "decode",
    "decode_topk",
    "encode",
    "encode_topk",
    "evaluate",
    "fold_decoder_norm",
    "fold_input_scale",
    "harvest_activations",
    "init",
    "kmeans",
    "load",
    "reconstruct",
    "save",
    "train_sae",
    "unfold_input_scale",
]
