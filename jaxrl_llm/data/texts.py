"""Texts to rows of token ids as a model saw them when it was trained: what dictionaries are trained, judged and shown on."""

from collections.abc import Sequence
from typing import Any


def token_rows(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, opened by BOS where the tokenizer has one (a text without tokens: BOS alone, or nothing)."""
    bos = tokenizer.bos_token_id
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows]


def special_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokenizer's special tokens, which harvesting drops wherever they stand: without BOS, which it treats by its place, unless BOS
    is EOS too (GPT-2, Pythia), which stands between texts."""
    opens_only = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return sorted(set(tokenizer.all_special_ids) - opens_only)
