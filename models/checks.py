"""What callers hand to a model, looked at before it runs: tokens and prompts that would fail far from their cause, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from models.config import ModelConfig
from models.errors import ModelError


def check_tokens(cfg: ModelConfig, tokens, lengths=None, positions=None) -> None:
    """Raises ModelError for ids outside the vocabulary and rows past the context; padding may hold anything.

    tokens [B, T], lengths [B] or None, positions [B, T] (-1 = padding) or None: see `models.forward`.
    Only of arrays that are there to be looked at: inside jit they are tracers, and this costs nothing.
    """
    given = [a for a in (tokens, lengths, positions) if a is not None]
    if any(isinstance(a, jax.core.Tracer) or not getattr(a, "is_fully_addressable", True) for a in given):
        return
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ModelError(f"tokens are {tokens.dtype} of shape {tokens.shape}; give whole numbers, [rows, tokens]")
    if tokens.size == 0:
        raise ModelError(f"tokens are of shape {tokens.shape}: there is nothing to run")
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape != tokens.shape[:1]:
            raise ModelError(f"lengths are of shape {lengths.shape}; {tokens.shape[0]} rows of tokens have one each")
        odd = lengths[(lengths < 0) | (lengths > tokens.shape[1])]
        if len(odd):
            raise ModelError(f"lengths hold {odd[0]}; rows are {tokens.shape[1]} tokens wide")
    places = np.broadcast_to(np.arange(tokens.shape[1]) if positions is None else np.asarray(positions), tokens.shape)
    real = places >= 0
    if positions is None and lengths is not None:
        real = places < lengths[:, None]
    wrong = np.argwhere(real & ((tokens < 0) | (tokens >= cfg.vocab_size)))
    if len(wrong):
        row, column = wrong[0]
        told = f"token id {tokens[row, column]} (row {row}, column {column}) is outside the vocabulary of {cfg.vocab_size}"
        raise ModelError(f"{told}: is the tokenizer this model's?")
    past = np.argwhere(real & (places >= cfg.max_position))
    if len(past) and cfg.rope_scaling.kind != "dynamic":  # which is made for longer rows
        row = past[0][0]
        told = f"row {row} reaches position {places[row][real[row]].max()}, the model's context ends at {cfg.max_position - 1}"
        raise ModelError(f"{told} (max_position): cut the row, or run it in pieces")


def check_prompts(cfg: ModelConfig, prompts: Sequence[Sequence[int]], limits: Sequence[int] | np.ndarray) -> None:
    """Raises ModelError for the first prompt that is no list of token ids of this model, is empty, or does not fit the context with
    the most new tokens that it may have. prompts: as `models.generate` takes them; limits: [P], those numbers of tokens."""
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise ModelError('prompts are text; give lists of token ids: tokenizer(texts)["input_ids"]')
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (Sequence, np.ndarray, jax.Array)) or np.ndim(prompt) != 1:
            raise ModelError(f"prompt {i} is {prompt!r:.60}; give a list of token ids for each prompt")
        if len(prompt) == 0:
            raise ModelError(f"prompt {i} is empty; give at least one token (the model's beginning-of-text id, say)")
        if len(prompt) + limits[i] > cfg.max_position:
            raise ModelError(
                f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {limits[i]}, but the model's context is "
                f"{cfg.max_position}; shorten one of them"
            )
        if not np.issubdtype(np.asarray(prompt).dtype, np.integer):
            raise ModelError(f"prompt {i} holds {np.asarray(prompt).dtype} numbers; token ids are whole numbers")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= cfg.vocab_size:
            raise ModelError(f"prompt {i} holds token id {low if low < 0 else high}, outside the vocabulary of {cfg.vocab_size}")


