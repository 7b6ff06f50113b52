"""Constraints on hostile texts: the slowest check of 10 kB; and a batch of responses with six rules each, by name and as Python.

    python -m benchmarks.constraints [--record]

Every constraint is checked on texts of 10,000 characters that are hard for searches with backtracking: one piece repeated, the same with
another end, and random pieces. A check that seems slow is timed again, and its least time counts: other processes may have had the core.
"""

import argparse
import random
import time
from collections.abc import Iterable

from tqdm import tqdm

from benchmarks.common import Figure, run_benchmark
from jaxrl_llm.rewards.constraints import ConstraintsReward, back_translate, check, example, names
from jaxrl_llm.rewards.constraints import samples as plain
from jaxrl_llm.rewards.verdict import Reward, RewardInput
from jaxrl_llm.rewards.verif import VerifReward

SIZE, SLOW_S, RESPONSES, RULES = 10_000, 0.02, 512, 6
ENTRY = "def check_following(instruction, response):\n    "
PYTHON = [  # six rules as published ones are written
    f"{ENTRY}return len(response.split()) >= 100",
    f"import re\n{ENTRY}return len(re.findall(r'\\broad\\b', response, flags=re.IGNORECASE)) >= 2",
    f"{ENTRY}parts = [p for p in response.split('\\n\\n') if p.strip()]\n    return len(parts) == 6",
    f"{ENTRY}return not any(word in response.lower() for word in ['however', 'moreover', 'in conclusion'])",
    f"import re\n{ENTRY}sentences = [s for s in re.split(r'[.!?]+', response) if s.strip()]\n    return max(len(s.split()) for s in sentences) <= 20",
    f"from collections import Counter\n{ENTRY}return Counter(response.lower())['e'] <= 400 and response.strip().endswith('.')",
]
ALONE = "import sys\n"  # what is no part of plain code: such a rule has a process of its own
PIECES = [
    "a", "A", " ", "\n", ".", "?!", "[", "]", "(", "*", "**", "* ", "- ", "-", "_", "__a", "#", "# a\n", "```\n", "`", "~", "<",
    "<<", ">", "<<a", "> a\n", "|", "|-|\n", "| a |", "1", "1,", "1,000", "-1", "1.", "1. a\n", "0.0", "[1]", "[1,", "[1] ",
    "[a](", "[a](b) ", "{", '{"a":', '"', "'", "'s ", "\\", "P.S. ", "p. ", "***", "******", "a******b", "Section 1 ",
    "<tool_call>", "<tool_call>{}</tool_call>", "<a>", "\x00", "\u0301", "é", "好", "。", "\u202e", "Dr. ", "e.g. ", "U.S. ", "a.b.",
    "... ", ". . ", '?" ', ".)", "\t", "\r\n", "\u2028", "the ", "The. ", "2024-01-01 ", "References\n", "CANNOT ", "--", "5 km ",
    "a\n\n", " \n",
]  # fmt: skip


def hostile_texts() -> list[str]:
    """Texts of SIZE characters."""
    rng = random.Random(0)
    found = [(piece * SIZE)[:SIZE] for piece in PIECES] + [(piece * SIZE)[: SIZE - 1] + end for piece in PIECES for end in "!\n"]
    return found + ["".join(rng.choice(PIECES) for _ in range(SIZE))[:SIZE] for _ in range(8)]


def seconds(name: str, text: str, kwargs: dict) -> float:
    """The least time of a check, taken up to four times where the first seems slow."""
    least = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        check(name, text, **kwargs)
        least = min(least, time.perf_counter() - start)
        if least < SLOW_S:
            break
    return least


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """The slowest check, a check's mean, and the batch."""
    texts, slowest, total, checks = hostile_texts(), (0.0, ""), 0.0, 0
    for name in tqdm(names(), desc="constraints"):
        kwargs, _, _ = example(name, random.Random(0))
        for text in texts:
            took = seconds(name, text, kwargs)
            slowest, total, checks = max(slowest, (took, name)), total + took, checks + 1
    yield Figure("constraints_slowest", 1000 * slowest[0], "ms", shape=f"10 kB hostile, {slowest[1]}; goal under 50 ms", better="lower")
    yield Figure("constraints_mean", 1000 * total / checks, "ms", shape=f"10 kB hostile, {checks} checks", better="lower")

    rng = random.Random(1)
    stories = [plain.paragraphs(rng, 6, 5) for _ in range(RESPONSES)]
    rules = [[{"name": entry["name"], "kwargs": entry["kwargs"]} for entry in back_translate(story, RULES)] for story in stories]
    inputs = [RewardInput("", story, row={"constraints": given}) for story, given in zip(stories, rules[1:] + rules[:1], strict=True)]
    shape = f"{RESPONSES} responses, {RULES} rules each"
    seconds_of = lambda reward: min(_seconds(reward, inputs) for _ in range(args.repeats))  # noqa: E731
    yield Figure("constraints_batch", seconds_of(ConstraintsReward()), "s", shape=f"{shape}, one core; goal under 2 s", better="lower")
    yield Figure("verif_batch", seconds_of(VerifReward(use="rules")), "s", shape=f"{shape}, by name, one core; goal under 2 s", better="lower")
    code = VerifReward(use="rules", sandbox={"workers": 2})
    for name, before, told in (("", "", "plain, a closed process a response"), ("_alone", ALONE, "not plain, a closed process each")):
        row = {"checkers": ["[rule] Rule"] * RULES, "functions": [before + rule for rule in PYTHON]}
        inputs = [RewardInput("", story, row=row) for story in stories]
        code(inputs[:1])  # opens the sandbox
        goal = "" if before else "; goal under 2 s"
        yield Figure(f"verif_batch_python{name}", seconds_of(code), "s", shape=f"{shape}, as Python, {told}, two rooms{goal}", better="lower")


def _seconds(reward: Reward, inputs: list[RewardInput]) -> float:
    start = time.perf_counter()
    reward(inputs)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_benchmark(measure, __doc__)
