"""Tokens to text as they come: letters of several tokens, stop strings across pieces, and that parts add up to the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_server import tokenizer_of

from jaxrl_llm.serve.text import Spelling, Text

TOKENIZER = tokenizer_of(None)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def told(text, tokens, size):
    parts = []
    for i in range(0, len(tokens), size):
        parts.append(text.add(tokens[i : i + size], last=i + size >= len(tokens)))
        if text.stopped:
            break
    return parts


def test_half_a_letter_is_not_told():
    text = Text(TOKENIZER, ids("hi"))
    assert told(text, ids("aä€😀"), 1) == ["a", "", "ä", "", "", "€", "", "", "", "😀"]
    broken = Text(TOKENIZER, ids("hi"))
    assert told(broken, ids("€")[:2], 1)[-1] == "\ufffd"  # the last token: what there is


def test_what_may_begin_a_stop_string_is_held_back():
    text = Text(TOKENIZER, ids("hi"), ["stop", "end"])
    assert told(text, ids("a sto es en stop x"), 1) == ["a", " ", "", "", "", "sto ", "", "e", "s ", "", "", "en ", "", "", "", ""]
    assert text.stopped and text.tokens == ids("a sto es en stop")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_stop_string_that_is_whole_first_counts(size):
    text = Text(TOKENIZER, ids("hi"), ["zz", "cd", "bcde"])
    assert "".join(told(text, ids("abcdefzz"), size)) == "ab" and text.tokens == ids("abcd")


@settings(max_examples=200, deadline=None)
@given(st.text("abä€ <", max_size=30), st.integers(1, 7), st.lists(st.text("abä", min_size=1, max_size=3), max_size=3))
def test_parts_add_up(said, size, stops):
    text = Text(TOKENIZER, ids("prompt"), stops)
    whole = "".join(told(text, ids(said), size))
    assert whole == "".join(told(Text(TOKENIZER, ids("prompt"), stops), ids(said), 1))
    met = [said.find(stop) for stop in stops if stop in said]
    if not met:
        assert whole == said and not text.stopped
    elif said:
        assert text.stopped and said.startswith(whole) and not any(stop in whole for stop in stops)


def test_spelling_of_tokens():
    spell = Spelling(TOKENIZER).of
    assert [spell(token) for token in ids("a b")] == ["a", " ", "b"] and spell(0) == "</s>"
