"""Tokens to text as they come: nothing is told that a later token could change, and nothing from a stop string on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # tokens of the prompt that are decoded along: some tokenizers drop the space that a text begins with
PENDING = "\ufffd"  # what a letter looks like of whose tokens some are still to come


class Text:
    """The text of one answer. stops: strings before which it ends. tokens: those that belong to it, the one that completes a stop string
    included. stopped: whether one was met."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._context = list(prompt[-CONTEXT:])
        self._before = tokenizer.decode(self._context, skip_special_tokens=True)
        self._told = 0
        self.tokens: list[int] = []
        self.stopped = False

    def whole(self, n: int | None = None) -> str:
        """The text of the first n tokens, stop strings and all."""
        both = self._tokenizer.decode(self._context + self.tokens[:n], skip_special_tokens=True)
        return both[len(self._before) :] if both.startswith(self._before) else self._tokenizer.decode(self.tokens[:n], skip_special_tokens=True)

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """What can be told of the text after more tokens. last: none follow, so all of it."""
        self.tokens += tokens
        text = self.whole()
        # Of several the one that was whole first, so that the same tokens end alike however they are cut into pieces.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            low, high = 1, len(self.tokens)
            while low < high:  # the text of more tokens holds it still
                middle = (low + high) // 2
                holds = any(stop in self.whole(middle) for stop in self._stops)
                low, high = (low, middle) if holds else (middle + 1, high)
            self.tokens = self.tokens[:low]
            text = text[: min(found)[1]]
        elif not last:
            text = text.rstrip(PENDING)
            held = max((k for stop in self._stops for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
            text = text[: len(text) - held]
        new, self._told = text[self._told :], max(self._told, len(text))
        return new


class Spelling:
    """What a token adds to a text, special tokens by their names."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._alone = tokenizer.decode(self._anchor)
        self.of = functools.lru_cache(65536)(self._of)

    def _of(self, token: int) -> str:
        after = self._tokenizer.decode([*self._anchor, token])
        return after.removeprefix(self._alone) if after.startswith(self._alone) else self._tokenizer.decode([token])
