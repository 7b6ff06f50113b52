"""The lab's world tells the truth: answers are right, mistakes are wrong in the stated way, corruption does what it says."""

import collections

import numpy as np
import pytest

from jaxrl_llm.data import lab_world as world
from jaxrl_llm.errors import UserError


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def operands(row: dict) -> dict[str, int]:
    return {k: number(v) for k, v in row["operands"].items() if v.replace(" ", "").isdigit()}


# An independent solver for each topic, from the operands alone.
SOLVERS = {
    "add": lambda o, r: number(o["a"]) + number(o["b"]),
    "sub": lambda o, r: number(o["a"]) - number(o["b"]),
    "mul": lambda o, r: number(o["a"]) * number(o["b"]),
    "mod": lambda o, r: number(o["a"]) % number(o["b"]),
    "max": lambda o, r: max(o["a"].split()),
    "count": lambda o, r: o["a"].split().count(o["b"]),
    "reverse": lambda o, r: " ".join(o["a"].split()[::-1]),
    "sort": lambda o, r: " ".join(sorted(o["a"].split())),
    "story": lambda o, r: number(o["a"]) + number(o["b"]) - number(o["c"]),
    "sequence": lambda o, r: 2 * number(o["c"]) - number(o["b"]),
}


@pytest.fixture(scope="module")
def rows():
    return world.generate_problems(2000, 3)


def test_every_answer_is_right(rows):
    assert {r["topic"] for r in rows} == set(SOLVERS) == set(world.TOPICS)
    for row in rows:
        truth = SOLVERS[row["topic"]](row["operands"], row)
        expected = truth if isinstance(truth, str) else world.spell(truth)
        assert row["answer"] == expected, row


def test_generation_is_deterministic_distinct_and_covers_levels(rows):
    assert world.generate_problems(50, 3) == rows[:50] != world.generate_problems(50, 4)
    assert len({r["prompt"] for r in rows}) == len(rows) == len({r["id"] for r in rows})
    assert set(collections.Counter(r["level"] for r in rows)) == set(world.LEVELS)
    assert len({(r["topic"], r["template"]) for r in rows}) == 3 * len(world.TOPICS)
    held_out = world.generate_problems(300, 9, exclude={r["prompt"] for r in rows})
    assert not {r["prompt"] for r in held_out} & {r["prompt"] for r in rows}


def test_level_shares_are_kept():
    rows = world.generate_problems(1500, 0, (0.0, 0.0, 0.0, 0.5, 0.5))
    counts = collections.Counter(r["level"] for r in rows)
    assert set(counts) == {4, 5} and abs(counts[4] - counts[5]) < 200


def test_asking_for_too_many_problems_says_so(monkeypatch):
    monkeypatch.setattr(world, "TOPICS", {name: topic for name, topic in world.TOPICS.items() if name != "story"})  # which has very many
    with pytest.raises(UserError, match="no 100000 distinct problems.*ask for fewer"):
        world.generate_problems(100000, 0, (1.0, 0, 0, 0, 0))


def test_corruption_plants_what_it_says(rows):
    shares = {"wrong_answer": 0.1, "missing_clause": 0.1, "garbled": 0.05, "near_duplicate": 0.05}
    bad = world.corrupt(rows, shares, 1)
    assert [r["id"] for r in bad] == [r["id"] for r in rows]
    counts = collections.Counter(r["corruption"] for r in bad)
    assert counts == {"none": 1400, "wrong_answer": 200, "missing_clause": 200, "garbled": 100, "near_duplicate": 100}
    clean_prompts = {r["prompt"]: r["answer"] for r in rows}
    systematic = 0
    for before, after in zip(rows, bad, strict=True):
        kind = after["corruption"]
        if kind == "none":
            assert after == before
        elif kind == "wrong_answer":
            assert after["prompt"] == before["prompt"] and after["answer"] != before["answer"]
            systematic += after["answer"] == before["mistake"]
        elif kind == "missing_clause":
            assert len(after["prompt"].split()) < len(before["prompt"].split()) and after["prompt"].endswith("=")
        elif kind == "garbled":
            assert after["answer"] == before["answer"] and len(after["prompt"].split()) == len(before["prompt"].split())
        else:
            assert after["prompt"] not in clean_prompts or clean_prompts[after["prompt"]] == after["answer"]
            solved = SOLVERS[after["topic"]](after["operands"], after)
            assert after["answer"] == (solved if isinstance(solved, str) else world.spell(solved))
    # Three quarters of the wrong answers are the topic's mistake, where the mistake is wrong at all.
    assert 0.5 < systematic / counts["wrong_answer"] < 0.8


def test_unknown_corruption_is_named(rows):
    with pytest.raises(UserError, match="unknown corruption typo"):
        world.corrupt(rows, {"typo": 0.1}, 0)


def test_demonstrations_mix_in_mistakes_at_the_asked_rate():
    clean = world.demonstrations(600, 1, (0.2,) * 5, (0.0,) * 5)
    wrong = world.demonstrations(600, 1, (0.2,) * 5, (1.0,) * 5)
    differ = np.mean([a["response"] != b["response"] for a, b in zip(clean, wrong, strict=True)])
    assert [a["prompt"] for a in clean] == [b["prompt"] for b in wrong] and differ > 0.7


def test_tokenizer_round_trip_and_no_unknown_word(rows):
    tokenizer = world.build_tokenizer()
    for row in rows[:300]:
        ids = tokenizer(row["prompt"]).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"]


def test_sft_batches_mask_exactly_the_response():
    tokenizer = world.build_tokenizer()
    rows = world.demonstrations(64, 2, (0.2,) * 5, (0.0,) * 5)
    batches = world.sft_batches(rows, tokenizer, 16, seed=0)
    assert len(batches) == 4
    seen = collections.Counter()
    for tokens, mask in batches:
        assert tokens.shape == mask.shape and tokens.shape[1] in (12, 16, 22, 32)
        for t, m in zip(tokens, mask, strict=True):
            response = t[m].tolist()
            assert response[-1] == tokenizer.eos_token_id
            seen[tokenizer.decode(t[~m], skip_special_tokens=True), tokenizer.decode(response[:-1])] += 1
    assert seen == collections.Counter((r["prompt"], r["response"]) for r in rows)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_corruption_is_independent_of_a_shuffle_with_the_same_seed(rows, seed):
    from jaxrl_llm.curation.schedule import make_schedule

    bad = np.array([r["corruption"] != "none" for r in world.corrupt(rows, {"wrong_answer": 0.2}, seed)])
    schedule = make_schedule("shuffled", batch_size=40, seed=seed, difficulty=np.zeros(len(rows)))
    early = bad[np.concatenate([schedule.batch(step) for step in range(10)])].mean()
    assert 0.1 < early < 0.3


def test_skewed_topics_follow_the_seed():
    """With a skew some topics rule, and which ones depends on the seed; without, shares are even and nothing else has changed."""
    shares = {}
    for seed in (0, 1):
        topics = [r["topic"] for r in world.generate_problems(600, seed, topic_skew=1.0)]
        shares[seed] = {t: topics.count(t) / 600 for t in world.TOPICS}
        assert max(shares[seed].values()) > 0.2 and min(shares[seed].values()) < 0.07
    assert max(shares[0], key=shares[0].get) != max(shares[1], key=shares[1].get)
    even = [r["topic"] for r in world.generate_problems(600, 0)]
    assert max(even.count(t) for t in world.TOPICS) < 0.16 * 600
    assert world.generate_problems(50, 3) == world.generate_problems(50, 3, topic_skew=0.0)


def test_no_corrupted_prompt_is_an_excluded_one(rows):
    """Another is drawn; a row whose every corruption is excluded gets a wrong answer instead, and keeps its prompt."""
    shares = {"missing_clause": 0.3, "garbled": 0.2, "near_duplicate": 0.2}
    first = world.corrupt(rows, shares, 5)
    taken = {row["prompt"] for row in first if row["corruption"] != "none"}
    again = world.corrupt(rows, shares, 5, exclude=taken)
    bad = [row for row in again if row["corruption"] != "none"]
    assert len(bad) == len([row for row in first if row["corruption"] != "none"])
    assert not [row for row in bad if row["prompt"] in taken and row["corruption"] != "wrong_answer"]
    fallen = [row for row in bad if row["corruption"] == "wrong_answer"]
    prompts = {row["id"]: row for row in rows}
    assert fallen and all(prompts[row["id"]]["prompt"] == row["prompt"] and prompts[row["id"]]["answer"] != row["answer"] for row in fallen)
