"""Chats as a tokenizer's template writes them, and which of their tokens the assistant said."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError


def assistant_tokens(messages: Sequence[Mapping[str, str]], tokenizer: Any, where: str) -> tuple[list[int], np.ndarray]:
    """(token ids, bool [T]: which belong to a turn of the assistant, the token that ends it included) of a chat.

    A template that marks generated text ({% generation %}) is taken at its word. Elsewhere a turn is what the template writes between the
    opening of the assistant's turn and the next message; a template that rewrites earlier turns when later ones follow (some drop their
    reasoning) has no such place.

    Raises UserError, naming `where`: no chat template, no turn of the assistant, a template that cannot write these messages, or one that
    rewrites earlier turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{getattr(tokenizer, 'name_or_path', '') or 'this tokenizer'} has no chat template: loss_on=assistant needs one")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError(f"{where} has no turn of the assistant to train on: roles are {', '.join(m['role'] for m in messages)}")
    if re.search(r"\{%-?\s*generation\b", tokenizer.chat_template):
        found = _applied(tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        counts = np.asarray(found["assistant_masks"], bool)
        if not counts.any():
            raise UserError(f"{where}: the chat template marks none of its tokens as the assistant's")
        return list(found["input_ids"]), counts

    def written(count: int, opening: bool = False) -> str:
        return _applied(tokenizer, messages[:count], where, tokenize=False, add_generation_prompt=opening)

    text = written(len(messages))
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]])
    counts = np.zeros(len(starts), bool)
    for turn in turns:
        head, upto = written(turn, opening=True), written(turn + 1)
        if not (upto.startswith(head) and text.startswith(upto)):
            raise UserError(
                f"{where}: the chat template rewrites message {turn + 1} when others follow, so that nothing says which tokens are the "
                "assistant's: give a template with {% generation %} marks, or chats with one answer and loss_on=response"
            )
        counts |= (starts >= len(head)) & (starts < len(upto))
    return encoded["input_ids"], counts


def answer_end(tokenizer: Any, stops: Sequence[int], template: str) -> list[int]:
    """The tokens that end an answer behind a prompt of `template` (see `data.prompts.tokenise_prompts`). stops: where the model stops.

    With "chat" they are what the chat template writes behind an answer, up to the first stop or special token: where a model stops at
    several, as an instructed one does, its template uses one of them. A template that writes no such token, and any other `template`, has
    the first of `stops`; none where there is none.

    Raises UserError for a chat template that cannot write a question with an answer.
    """
    if template != "chat":
        return list(stops[:1])
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = _applied(tokenizer, chat, "a question with an answer", tokenize=False)
    tokens = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    special = {*stops, *tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    at = next((i for i, token in enumerate(tokens) if token in special), None)
    return list(stops[:1]) if at is None else tokens[: at + 1]


def _applied(tokenizer: Any, messages: Sequence[Mapping[str, str]], where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # templates raise what they like
        raise UserError(f"{where}: the chat template refuses it: {error}") from error
