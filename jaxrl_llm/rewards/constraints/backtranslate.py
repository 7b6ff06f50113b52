"""Back-translation: from a response, constraints that it satisfies, so that any text becomes an answer to a constrained prompt.

The construction of VerInstruct (Peng et al. 2025, arXiv:2506.09942) for what code can check: parameters are read off the response, and
what is proposed is kept only where the check then says PASS.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.constraints.table import TABLE, describe, evaluate, validate
from jaxrl_llm.rewards.verdict import Status

# Kept by nearly any text: asked for only where they say something, they come after the others.
_COMMON_LIST = (
    "punctuation:balanced keywords:no_doubled_word keywords:no_repeated_sentence change_case:sentence_starts format:plain tools:none "
    "numbers:no_digits language:without_script keywords:forbidden_phrases keywords:forbidden_words punctuation:forbidden"
)
_COMMON = frozenset(_COMMON_LIST.split())
COMMON_SHARE = 0.3  # of the chance that another type has


def back_translate(response: str, number: int, seed: int = 0, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Up to `number` constraints that a response satisfies, of different types: {"name", "kwargs", "text"}, the sentence that asks for it.

    seed: which are drawn, and with which parameters; the same for the same response and table.
    only: names of the types to draw from; None means all that can be read off a text.
    Raises UserError for an unknown name, and for one that cannot be read off a text.
    """
    for name in only or ():
        if name not in TABLE:
            raise UserError(f"unknown constraint {name!r}; {nearest(name, TABLE)}")
        if TABLE[name].derive is None:
            raise UserError(f"constraint {name} cannot be read off a response: leave it out of `only`")
    rng = _random(seed, response)
    candidates = sorted(name for name in (TABLE if only is None else only) if TABLE[name].derive is not None)
    candidates.sort(key=lambda name: rng.random() ** (1 / (COMMON_SHARE if name in _COMMON else 1.0)), reverse=True)
    found: list[dict[str, Any]] = []
    for name in candidates:
        if len(found) >= number:
            break
        derive = TABLE[name].derive
        kwargs = derive(response, _random(seed, name, response)) if derive else None
        if kwargs is None or not _kept(name, kwargs, response):
            continue
        found.append({"name": name, "kwargs": kwargs, "text": describe(name, **kwargs)})
    return found


def _random(*parts: Any) -> random.Random:
    return random.Random(" ".join(map(str, parts)).encode("utf-8", "surrogatepass"))


def _kept(name: str, kwargs: dict[str, Any], response: str) -> bool:
    try:
        accepted = validate(name, kwargs)
    except UserError:  # read off a text that this type cannot ask for
        return False
    return evaluate(name, response, accepted).status is Status.PASS
