"""Tokenizers of Hugging Face folders and hub ids, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from models.errors import ModelError
from models.hub import resolve

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: str | os.PathLike) -> Any:
    """The `transformers` fast tokenizer of a folder or hub id.

    Where the checkpoint names no padding token, the end-of-sequence token serves: padding is only ever recognised by
    lengths, never by this id. Raises ModelError when there is no tokenizer or it cannot be read.
    """
    folder = resolve(source, TOKENIZER_FILES + ("config.json",))
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(f"{folder}: no tokenizer (none of {', '.join(_VOCABULARIES)})")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that torch is missing
    import transformers

    try:
        # tokenizer.json says everything. AutoTokenizer may put the model family's own class over it (a Qwen2 checkpoint
        # with a word-level tokenizer then loses words without a sound), so it serves only where that file is missing.
        exact = (folder / "tokenizer.json").is_file()
        reader = transformers.PreTrainedTokenizerFast if exact else transformers.AutoTokenizer
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception for a broken file
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: tokenizer cannot be read: {type(error).__name__}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files that `folder` has."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
