"""Pieces of stories, and what they are about: soft constraints whose truth is known.

A theme is kept by a text that holds one of its words. The list is the truth by which a judge is taught and measured; neither a judge nor a policy
is ever shown it, so that to them "Write about an animal." is as soft as any other request.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from jaxrl_llm.errors import UserError

_ENDS = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<=[.!?])[\"”']?(?=\s)")
_WORD = re.compile(r"[^\W\d_]+")

# What a prompt asks for -> the words of which a text needs one.
_WORDS = {
    "Write about an animal.": (
        "animal animals bear bears bee bees bird birds bug bugs bunny butterfly cat cats chicken cow cows crab dinosaur dog dogs duck ducks "
        "elephant fish fox frog frogs giraffe goat hen horse kitten kitty lion lizard monkey mouse owl parrot penguin pet pig pony puppy "
        "rabbit rat shark sheep snail snake spider squirrel tiger turtle whale wolf worm zebra"
    ),
    "Write about something to eat.": (
        "apple apples banana bananas beans berries bread breakfast butter cake cakes candy carrot carrots cereal cheese cherries chocolate "
        "cookie cookies cream delicious dinner egg eggs feast food fruit fruits grapes honey hungry jam juice lemon lunch meal meat milk "
        "mushroom nuts orange oranges pancakes pasta pepper pie pizza popcorn potato potatoes rice salad salt sandwich sandwiches snack "
        "snacks soup spaghetti spinach strawberries sugar sweets tasty toast tomato vegetables yummy"
    ),
    "Write about a family.": (
        "aunt brother brothers dad daddy family father grandma grandmother grandpa mom mommy mother mum mummy papa parents sister sisters "
        "uncle"
    ),
    "Let someone be sad.": (
        "cried cries cry crying lonely sad sadly sob sobbed tear tears unhappy upset wept"
    ),
    "Write about a toy.": (
        "ball balls balloon balloons bike block blocks crayons doll dolls game games kite marbles puzzle robot swing teddy toy toys trains "
        "yoyo"
    ),
    "Let it happen outdoors.": (
        "backyard beach bush cave clouds farm field flower flowers forest garden grass hill hills jungle lake leaf leaves mountain mountains "
        "ocean outside park pond rain rainbow river rocks sand sea sky snow stars sun tree trees wind woods yard"
    ),
}
THEMES: dict[str, frozenset[str]] = {sentence: frozenset(words.split()) for sentence, words in _WORDS.items()}


def keeps_theme(sentence: str, text: str) -> bool:
    """Whether a text is about what the sentence asks for. Raises KeyError for a sentence that is no theme."""
    return not THEMES[sentence].isdisjoint(word.casefold() for word in _WORD.findall(text))


def themes_of(text: str) -> list[str]:
    """The themes that a text keeps, in an order of its own (the same for the same text)."""
    found = [sentence for sentence in THEMES if keeps_theme(sentence, text)]
    random.Random(text.encode("utf-8", "surrogatepass")).shuffle(found)
    return found


def split_sentences(text: str) -> list[str]:
    """The sentences of a story, closing quotes kept with them."""
    text = " ".join(text.split()) + " "
    starts = [0, *(match.end() for match in _ENDS.finditer(text))]
    return [piece for a, b in zip(starts, [*starts[1:], len(text)], strict=True) if (piece := text[a:b].strip())]


def story_pieces(stories: Sequence[str], *, pieces: int, least_words: int, most_words: int, seed: int = 0) -> list[str]:
    """From each story, in order, up to `pieces` runs of whole sentences of least_words to most_words words, one behind the other; each text once.

    How long each is to become is drawn, so that lengths that are asked for spread evenly. A run ends where no quotation is open.
    Raises UserError for lengths without room.
    """
    if not 1 <= least_words <= most_words or pieces < 1:
        raise UserError(f"pieces of {least_words} to {most_words} words, {pieces} a story: give at least 1 of each, the least first")
    found: dict[str, None] = {}
    for number, story in enumerate(stories):
        rng = random.Random(f"{seed} {number}")
        sentences, at = split_sentences(story), 0
        for _ in range(pieces):
            wanted = rng.uniform(least_words, most_words)
            run: list[str] = []
            while at < len(sentences) and len(" ".join(run).split()) < wanted:
                run.append(sentences[at])
                at += 1
            while run and len(" ".join(run).split()) > most_words:
                run.pop()
            text = " ".join(run)
            if len(text.split()) >= least_words and text.count('"') % 2 == 0:
                found[text] = None
    return list(found)
