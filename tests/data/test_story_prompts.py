"""Story prompts: openings, the words that must come back, the split, and that every row's real story can follow its rules."""

import pytest

from jaxrl_llm.data.story_prompts import (
    OpeningFilter,
    StoryRules,
    document_frequency,
    make_story_prompts,
    read_stories,
    rule_list,
    split_opening,
)
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import constraints
from jaxrl_llm.rewards.verdict import Status

NAMES = ["Ann", "Ben", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"]
THINGS = ["needle", "pumpkin", "wagon", "lantern"]
STORIES = [f"One day {name} found a {thing}. {name} hid the {thing}. They went home." for name in NAMES for thing in THINGS]
LOOSE = OpeningFilter(min_stories=2, max_share=0.5)


def test_openings_are_first_sentences():
    assert split_opening("A cat sat. It ran.") == ("A cat sat.", " It ran.")
    assert split_opening('"Why?" asked Mr. Fox. He left.') == ('"Why?"', " asked Mr. Fox. He left.")
    assert split_opening("There was Mrs. Fox\nin a box! Ha.") == ("There was Mrs. Fox\nin a box!", " Ha.")
    assert split_opening("no end") == ("", "no end")


def test_document_frequency_counts_texts():
    assert document_frequency(["a cat, a cat", "A dog"]) == {"a": 2, "cat": 1, "dog": 1}


def test_rows_require_the_rarest_words_of_the_opening():
    train, held_out = make_story_prompts(STORIES, openings=LOOSE, held_out=8)
    assert (len(train), len(held_out)) == (24, 8)
    for row in train + held_out:
        story = STORIES[row["story"]]
        assert story.startswith(row["prompt"]) and row["prompt"].endswith(".")
        assert row["words"] == [story.split()[2]]  # a name is in 4 stories, a thing in 8
        assert row["constraints"] == rule_list(StoryRules(), row["words"])
    two, _ = make_story_prompts(STORIES, rules=StoryRules(words=2), openings=LOOSE, held_out=8)
    assert two[0]["words"] == [STORIES[two[0]["story"]].split()[2], STORIES[two[0]["story"]].split()[5].strip(".")]


@pytest.mark.parametrize(
    "openings, count",
    [
        (OpeningFilter(min_stories=2, max_share=0.5), 32),
        (OpeningFilter(min_stories=5, max_share=0.5), 32),  # things instead of names
        (OpeningFilter(min_stories=9, max_share=0.5), 0),
        (OpeningFilter(min_stories=2, max_share=0.1), 0),
        (OpeningFilter(min_stories=2, max_share=0.5, min_letters=7), 16),  # pumpkin and lantern
        (OpeningFilter(min_stories=2, max_share=0.5, min_words=7), 0),
        (OpeningFilter(min_stories=2, max_share=0.5, max_words=5), 0),
    ],
)
def test_each_setting_of_the_filter_matters(openings, count):
    if count == 0:
        with pytest.raises(UserError, match="32 stories give 0 openings"):
            make_story_prompts(STORIES, openings=openings, held_out=0)
    else:
        assert len(make_story_prompts(STORIES, openings=openings, held_out=0)[0]) == count


def test_unusable_stories_are_left_out():
    extra = [
        "One day Ann found a wagon. She went home.",  # the name does not come back
        'One day Ann said "go on. Ann went home.',  # an open quotation
        "one day ann found a needle. Ann went home.",  # an opening that is there already
        "One day Ann had no end",
    ]
    train, _ = make_story_prompts(STORIES + extra, openings=LOOSE, held_out=0)
    assert len(train) == len({row["prompt"].casefold() for row in train}) == len(STORIES)


def test_the_split_is_by_seed_and_shares_nothing():
    first = make_story_prompts(STORIES, openings=LOOSE, held_out=8, seed=1)
    assert first == make_story_prompts(STORIES, openings=LOOSE, held_out=8, seed=1)
    other = make_story_prompts(STORIES, openings=LOOSE, held_out=8, seed=2)
    assert [row["id"] for row in first[1]] != [row["id"] for row in other[1]]
    assert not {row["prompt"] for row in first[0]} & {row["prompt"] for row in first[1]}
    limited, held_out = make_story_prompts(STORIES, openings=LOOSE, held_out=8, seed=1, limit=3)
    assert limited == first[0][:3] and held_out == first[1]


def test_too_few_openings():
    with pytest.raises(UserError, match="give 32 openings that can be used, too few to hold out 32"):
        make_story_prompts(STORIES, openings=LOOSE, held_out=32)


@pytest.mark.parametrize("off", ["words", "no_comma", "at_least_words", "fewer_than_words", "full_sentence"])
def test_each_rule_can_be_left_out(off):
    every = rule_list(StoryRules(), ["Ann"])
    rules = StoryRules(**{off: 0})
    fewer = rule_list(rules, ["Ann"][: rules.words])
    assert len(every) == 5 and len(fewer) == 4 and all(entry in every for entry in fewer)


def test_stories_are_read_from_text_and_tables(tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("A cat.\nIt ran.\n<|endoftext|>\nA dog.\n<|endoftext|>\nA cat.\nIt ran.\n")
    assert read_stories(str(text), separator="<|endoftext|>") == ["A cat.\nIt ran.", "A dog."]
    table = tmp_path / "stories.jsonl"
    table.write_text('{"story": "A cat."}\n')
    assert read_stories(str(table), {"prompt": "story"}) == ["A cat."]


def test_real_stories(assets):
    stories = read_stories(str(assets / "data/tinystories/tinystories_sample.txt"), separator="<|endoftext|>")
    train, held_out = make_story_prompts(stories)
    assert len(stories) == 2317 and len(held_out) == 200 and len(train) > 1000
    for row in train + held_out:
        whole = stories[row["story"]]
        continuation = whole[len(split_opening(whole)[0]) :]
        assert constraints.check("keywords:words", continuation, words=row["words"]).status is Status.PASS
        assert len(constraints.read_constraints(row)) == 5
