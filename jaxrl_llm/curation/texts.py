"""Rows to the token lists that features and likelihoods are computed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

TokenSlice = Callable[[int, int], tuple[list[list[int]], list[int]]]


def with_bos(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text behind one beginning-of-text token where the tokenizer has one; no end token."""
    bos = tokenizer.bos_token_id
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows]


def prompt_tokens(rows: Sequence[dict[str, Any]], tokenizer: Any) -> Callable[[int, int], list[list[int]]]:
    """(a, b) -> token lists of the prompts of rows a..b, tokenised when asked for."""
    return lambda a, b: with_bos(tokenizer, [row["prompt"] for row in rows[a:b]])


def answer_tokens(rows: Sequence[dict[str, Any]], tokenizer: Any, separator: str = " ") -> TokenSlice:
    """(a, b) -> (token lists of prompt + separator + answer, where each answer begins). A row without an answer is its prompt.

    Prompt and answer are tokenised apart, so that the border is a token's border, as it is when the policy answers."""

    def slice_of(a: int, b: int) -> tuple[list[list[int]], list[int]]:
        prompts = with_bos(tokenizer, [row["prompt"] for row in rows[a:b]])
        answers = [(row.get("answer") or "").strip() for row in rows[a:b]]
        encoded = tokenizer([separator + answer for answer in answers], add_special_tokens=False, verbose=False)["input_ids"] if answers else []
        joined = [p + (e if answer else []) for p, e, answer in zip(prompts, encoded, answers, strict=True)]
        return joined, [len(p) for p in prompts]

    return slice_of
