"""Decoder-only language models as pure functions of a parameter pytree."""

from models.config import ModelConfig, RopeScaling
from models.errors import ModelError
from models.generate import Rollout, Samples, generate, sample_tokens
from models.head import Head, head, unembed, unembed_matrix
from models.hf import load
from models.hf_export import save
from models.tokenizer import load_tokenizer
from models.transformer import (
    KV,
    ForwardOutput,
    KVCache,
    abstract_params,
    apply,
    forward,
    init,
    init_cache,
    logical_axes,
)

__all__ = [
    "KV",
    "ForwardOutput",
    "Head",
    "KVCache",
    "ModelConfig",
    "ModelError",
    "Rollout",
    "RopeScaling",
    "Samples",
    "abstract_params",
    "apply",
    "forward",
    "generate",
    "head",
    "init",
    "init_cache",
    "load",
    "load_tokenizer",
    "logical_axes",
    "sample_tokens",
    "save",
    "unembed",
    "unembed_matrix",
]
