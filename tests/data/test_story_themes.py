"""Themes and pieces of stories."""

import pytest

from jaxrl_llm.data.story_themes import THEMES, keeps_theme, split_sentences, story_pieces, themes_of
from jaxrl_llm.errors import UserError

STORY = 'Mr. Fox saw a cat. "Hello!" he said. The cat ran to the park. It was hot! They ate cake and then they all went home.'


def test_a_theme_is_a_word_of_its_list():
    assert keeps_theme("Write about an animal.", "A CAT.") and not keeps_theme("Write about an animal.", "A catalogue of concatenated cattle.")
    assert set(themes_of(STORY)) == {"Write about an animal.", "Let it happen outdoors.", "Write about something to eat."}
    assert themes_of(STORY) == themes_of(STORY) and themes_of("Nothing here.") == []
    assert all(words and all(word == word.lower() for word in words) for words in THEMES.values())
    with pytest.raises(KeyError):
        keeps_theme("Write about a ship.", "a ship")


def test_sentences_keep_their_quotes_and_titles():
    assert split_sentences(STORY)[:3] == ["Mr. Fox saw a cat.", '"Hello!"', "he said."]
    assert split_sentences("No end") == ["No end"] and split_sentences(" \n") == []


def test_pieces_are_whole_sentences_of_the_length_asked_for():
    found = story_pieces([STORY, STORY, "Too short."], pieces=3, least_words=4, most_words=9, seed=1)
    assert found and len(set(found)) == len(found) and all(4 <= len(text.split()) <= 9 and text in STORY for text in found)
    assert found == story_pieces([STORY, STORY, "Too short."], pieces=3, least_words=4, most_words=9, seed=1)
    assert story_pieces([STORY], pieces=1, least_words=4, most_words=9) != story_pieces([STORY], pieces=3, least_words=4, most_words=9)
    assert not any(text.count('"') % 2 for text in story_pieces(['She said "Go. Now." and left.'], pieces=4, least_words=1, most_words=3))
    for lengths in ((0, 3), (4, 3)):
        with pytest.raises(UserError, match="the least first"):
            story_pieces([STORY], pieces=1, least_words=lengths[0], most_words=lengths[1])
