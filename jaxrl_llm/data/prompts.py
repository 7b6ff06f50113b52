"""Rows to token ids: templates, the context limit, and right-padded batches whose mask comes from lengths."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from jaxrl_llm.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Tokenised prompts.

    tokens_NT: int32 [N, T], right-padded; what stands past a row's length has no meaning.
    lengths_N: int32 [N], tokens of each prompt.
    ids: the rows' ids, one a row. rows: the rows themselves (prompt, answer and every other column).
    dropped, truncated: rows that `tokenise_prompts` left out or shortened because they were longer than the context.
    """

    tokens_NT: np.ndarray
    lengths_N: np.ndarray
    ids: list[str]
    rows: list[dict[str, Any]]
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> "PromptBatch":
        """The rows at `indices`, in that order, with the same padded width."""
        chosen = np.asarray(indices, dtype=np.int64)
        return PromptBatch(
            tokens_NT=self.tokens_NT[chosen],
            lengths_N=self.lengths_N[chosen],
            ids=[self.ids[i] for i in chosen],
            rows=[self.rows[i] for i in chosen],
        )

    def token_lists(self) -> list[list[int]]:
        """The prompts as lists of token ids without padding, as `models.generate` takes them."""
        return [row[:length].tolist() for row, length in zip(self.tokens_NT, self.lengths_N, strict=True)]


def tokenise_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    template: str = "none",
    overflow: str = "error",
    pad_to: int | None = None,
) -> PromptBatch:
    """Tokenises the prompts of rows.

    Args:
      rows: from `read_rows`: each has "id" and "prompt" (and "messages" where the source held chat messages).
      tokenizer: a transformers fast tokenizer.
      max_length: tokens that a prompt may have.
      template: "none" takes the prompt as it is, which is refused for chats under a tokenizer that has a chat template ("{prompt}" takes
        the text of their messages, a line each, even then); "chat" applies the tokenizer's chat template with the opening of the
        assistant's turn; anything else is a format such as "Question: {prompt}\\nAnswer:" over the row's columns, in which
        {{ and }} stand for braces and an empty {} (as in \\boxed{}) for itself.
      overflow: what to do with a longer prompt: "error", "drop", or "truncate", which keeps the beginning-of-text token and the
        end of the prompt, since that is where a question stands.
      pad_to: padded width; the longest prompt where it is None.

    Raises:
      UserError: no chat template, or one that is passed over, an unknown {column}, a prompt longer than the context, or no prompt left.
    """
    if overflow not in ("error", "drop", "truncate"):
        raise UserError(f"overflow '{overflow}': {nearest(overflow, ['error', 'drop', 'truncate'])}")
    if max_length < 1:
        raise UserError(f"max_length {max_length}: a prompt needs room for at least one token")
    if not rows:
        raise UserError("no prompt: the rows are none; look at data.limit and the source")
    token_lists = _tokenise(rows, tokenizer, template)
    places = getattr(rows, "places", {})  # rows that `read_rows` read know where they stand
    kept_rows, kept_tokens, dropped, truncated = [], [], 0, 0
    for row, tokens in zip(rows, token_lists, strict=True):
        if not tokens:
            raise UserError(f"{_name(row, places)} has no token under this tokenizer: give it text, or leave it out")
        if len(tokens) > max_length:
            if overflow == "error":
                raise UserError(
                    f"{_name(row, places)} has {len(tokens)} tokens, longer than the {max_length} there is room for: "
                    "raise the prompt length, or set overflow to 'drop' or 'truncate'"
                )
            if overflow == "drop":
                dropped += 1
                continue
            truncated += 1
            head = tokens[:1] if tokens[0] == tokenizer.bos_token_id and max_length > 1 else []
            tokens = head + tokens[len(tokens) - (max_length - len(head)) :]
        kept_rows.append(dict(row))
        kept_tokens.append(tokens)
    if not kept_rows:
        raise UserError(f"no prompt is left: all {dropped} are longer than {max_length} tokens; raise the prompt length")
    return _pad(kept_rows, kept_tokens, tokenizer, pad_to, dropped, truncated)


def _name(row: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """A row as a message names it: by file and line where these are known, since an id may be a hash that stands in no file."""
    place = places.get(row["id"])
    return f"{place}: prompt '{row['id']}'" if place else f"prompt '{row['id']}'"


def _tokenise(rows: Sequence[Mapping[str, Any]], tokenizer: Any, template: str) -> list[list[int]]:
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
            raise UserError(
                f"{name} has no chat template: set the template to 'none' or to a format such as 'Question: {{prompt}}\\nAnswer:'"
            )
        chats = [row.get("messages") or [{"role": "user", "content": row["prompt"]}] for row in rows]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        # The template writes the special tokens itself; a second beginning-of-text token would be a different prompt.
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    if template == "none" and (chats := [row for row in rows if row.get("messages")]):
        told = f"{_name(chats[0], getattr(rows, 'places', {}))}{f' and {len(chats) - 1} more' if chats[1:] else ''}: a chat, of which template=none"
        if getattr(tokenizer, "chat_template", None):
            raise UserError(f"{told} would drop the roles: set the template to 'chat', or to '{{prompt}}' for the text of its messages alone")
        logging.log_first_n(logging.WARNING, "%s drops the roles, since this tokenizer has no chat template; '{prompt}' means the same", 1, told)
    texts = [row["prompt"] if template == "none" else fill_template(template, row) for row in rows]
    # Not verbose: of long texts it would say that the model fails on them, before we say what to do.
    token_lists = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    eos = getattr(tokenizer, "eos_token_id", None)
    # A prompt is to be gone on with: an end token that the tokenizer adds by itself would end it.
    return [tokens[:-1] if len(tokens) > 1 and tokens[-1] == eos else tokens for tokens in token_lists]


_SLOT = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """A template with {column} replaced by the row's columns; {{ and }} are braces, an empty {} stays.

    Raises:
      UserError: a {column} that the row does not have (the nearest is named), or no {column} at all.
    """
    if not any(match.group(1) for match in _SLOT.finditer(template)):
        raise UserError(f"template '{template}' has no {{prompt}} in it: every row would become the same text")

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return match.group()[0]
        if name not in row:
            raise UserError(f"template '{template}' names column '{name}', which row '{row.get('id')}' lacks: {nearest(name, row)}")
        return str(row[name])

    return _SLOT.sub(fill, template)


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[bool] | np.ndarray]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, width] int32 right-padded with 0, mask [N, width] bool) of rows (tokens, which of them count). width: that of the longest
    row by default."""
    width = max(len(tokens) for tokens, _ in rows) if width is None else width
    tokens_NT, mask_NT = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, (tokens, counts) in enumerate(rows):
        tokens_NT[i, : len(tokens)], mask_NT[i, : len(tokens)] = tokens, counts
    return tokens_NT, mask_NT


def pack_rows(rows: Sequence[tuple[Sequence[int], Sequence[bool] | np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (tokens, which of them count) packed into few rows of `width` tokens: (tokens [n, width] int32, mask [n, width] bool, segments
    [n, width] int32, the number of each token's row within its packed row, -1 = padding).

    The longest row goes first, each into the fullest packed row that has room (best fit, decreasing). A text's first token is predicted
    by nothing, so it does not count: a loss over the packed rows is that over the rows themselves, whose first token never counts either.
    Raises ValueError for a row longer than `width`.
    """
    packed: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):
        length = len(rows[i][0])
        if length > width:
            raise ValueError(f"pack_rows: row {i} has {length} tokens, over the width of {width}")
        fits = [b for b, left in enumerate(room) if left >= length]
        if not fits:
            packed.append([])
            room.append(width)
        at = min(fits, key=room.__getitem__) if fits else len(room) - 1
        packed[at].append(i)
        room[at] -= length
    shape = (len(packed), width)
    tokens_NT, mask_NT, segments_NT = np.zeros(shape, np.int32), np.zeros(shape, bool), np.full(shape, -1, np.int32)
    for b, members in enumerate(packed):
        start = 0
        for segment, i in enumerate(members):
            span = slice(start, start + len(rows[i][0]))
            tokens_NT[b, span], mask_NT[b, span], segments_NT[b, span] = *rows[i], segment
            mask_NT[b, start] = False
            start = span.stop
    return tokens_NT, mask_NT, segments_NT


def pad_answers(rows: Sequence[tuple[Sequence[int], int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, width] int32 right-padded with 0, mask [N, width] bool on the answers) of rows (tokens, where the answer begins), for
    supervised fine-tuning. width: that of the longest row by default."""
    return pad_rows([(tokens, np.arange(len(tokens)) >= begin) for tokens, begin in rows], width)


def _pad(
    rows: list[dict[str, Any]], token_lists: list[list[int]], tokenizer: Any, pad_to: int | None, dropped: int, truncated: int
) -> PromptBatch:
    lengths = np.array([len(tokens) for tokens in token_lists], np.int32)
    width = pad_to or int(lengths.max())
    if lengths.max() > width:
        raise UserError(f"pad_to {width} is shorter than the longest prompt, {lengths.max()} tokens")
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    tokens_NT = np.full((len(token_lists), width), pad, np.int32)
    for i, tokens in enumerate(token_lists):
        tokens_NT[i, : len(tokens)] = tokens
    return PromptBatch(tokens_NT, lengths, [str(row["id"]) for row in rows], rows, dropped, truncated)
