"""A controlled world of verifiable problems in which topic, level and corruption of every row are known.

Ten topics x five levels x three templates. Text is words and digits separated by spaces ("4 7 + 8 ="), one token
each, so a model of under a million parameters can learn it in minutes and every answer can be checked exactly. Each
topic has a *systematic mistake* (carries forgotten, list returned unsorted, ...): the pre-trained policy mixes right and
mistaken procedures, which is what reinforcement learning then re-weights, and a wrong gold answer that equals such
a mistake is rewarded often, which is what makes bad labels harmful.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrl_llm.data.prompts import pad_answers
from jaxrl_llm.errors import UserError, nearest

LEVELS = (1, 2, 3, 4, 5)
CORRUPTIONS = ("wrong_answer", "missing_clause", "garbled", "near_duplicate")
NAMES = ("tom", "ana", "li", "sam", "eva", "bo")
THINGS = ("apples", "books", "coins", "shells", "cards", "pens")
SYMBOLS = ("red", "blue", "green", "pink", "gray")


def spell(number: int) -> str:
    """A number as the world writes it: its digits separated by spaces."""
    return " ".join(str(number))


def spell_list(items: Sequence[int]) -> str:
    """A list as the world writes it: its items separated by spaces."""
    return " ".join(str(i) for i in items)


@dataclasses.dataclass(frozen=True)
class Problem:
    """operands fill the templates; answer is right, mistake is what the topic's faulty procedure gives."""

    operands: dict[str, str]
    answer: str
    mistake: str


def _columns(a: int, b: int, op: Callable[[int, int], int]) -> int:
    """Column by column without carrying or borrowing: the classical mistake."""
    x, y = str(a)[::-1], str(b)[::-1].ljust(len(str(a)), "0")
    x = x.ljust(len(y), "0")
    return int("".join(str(op(int(i), int(j)) % 10) for i, j in zip(x, y, strict=True))[::-1])


_TOPS = {1: (9, 9), 2: (19, 9), 3: (49, 9), 4: (99, 29), 5: (99, 99)}  # largest operands of sums and differences


def _add(rng, level) -> Problem:
    a, b = (int(rng.integers(1, top + 1)) for top in _TOPS[level])
    return Problem({"a": spell(a), "b": spell(b)}, spell(a + b), spell(_columns(a, b, lambda i, j: i + j)))


def _sub(rng, level) -> Problem:
    a, b = sorted((int(rng.integers(1, top + 1)) for top in _TOPS[level]), reverse=True)
    return Problem({"a": spell(a), "b": spell(b)}, spell(a - b), spell(_columns(a, b, lambda i, j: abs(i - j))))


def _mul(rng, level) -> Problem:
    top = {1: (5, 3), 2: (9, 5), 3: (9, 9), 4: (15, 9), 5: (30, 9)}[level]
    a, b = int(rng.integers(1, top[0] + 1)), int(rng.integers(2, top[1] + 1))
    return Problem({"a": spell(a), "b": spell(b)}, spell(a * b), spell(a + b))


def _mod(rng, level) -> Problem:
    top, m = {1: (9, 3), 2: (15, 5), 3: (30, 7), 4: (60, 9), 5: (99, 9)}[level]
    a, b = int(rng.integers(1, top + 1)), int(rng.integers(2, m + 1))
    return Problem({"a": spell(a), "b": spell(b)}, spell(a % b), spell(a // b))


def _list(rng, n: int) -> list[int]:
    return [int(i) for i in rng.integers(0, 10, n)]


def _max(rng, level) -> Problem:
    items = _list(rng, 2 * level)
    return Problem({"a": spell_list(items)}, str(max(items)), str(items[-1]))


def _count(rng, level) -> Problem:
    items = [SYMBOLS[i] for i in rng.integers(0, 2 + level // 2, 2 * level + 1)]
    target = items[int(rng.integers(len(items)))]
    n = items.count(target)
    return Problem({"a": " ".join(items), "b": target}, spell(n), spell(n + 1))


def _reverse(rng, level) -> Problem:
    items = _list(rng, level + 1)
    return Problem({"a": spell_list(items)}, spell_list(items[::-1]), spell_list(items))


def _sort(rng, level) -> Problem:
    items = _list(rng, level + 1)
    return Problem({"a": spell_list(items)}, spell_list(sorted(items)), spell_list(sorted(items, reverse=True)))


def _story(rng, level) -> Problem:
    top = {1: 5, 2: 9, 3: 15, 4: 25, 5: 50}[level]
    a, b = int(rng.integers(2, top + 1)), int(rng.integers(1, top + 1))
    c = int(rng.integers(1, a + b))
    who, thing = NAMES[int(rng.integers(len(NAMES)))], THINGS[int(rng.integers(len(THINGS)))]
    operands = {"a": spell(a), "b": spell(b), "c": spell(c), "who": who, "thing": thing}
    return Problem(operands, spell(a + b - c), spell(a + b))


def _sequence(rng, level) -> Problem:
    step, start = int(rng.integers(1, 2 + 2 * level)), int(rng.integers(0, 10 * level))
    terms = [start + step * i for i in range(3)]
    operands = {k: spell(t) for k, t in zip("abc", terms, strict=True)}
    return Problem(operands, spell(start + 3 * step), spell(terms[-1] + 1 if step != 1 else terms[-1]))


# Templates: "|" marks a clause that the missing-clause corruption may remove.
TOPICS: dict[str, tuple[Callable[..., Problem], tuple[str, ...]]] = {
    "add": (_add, ("{a} |+ {b} =", "add {a} |and {b} =", "what is {a} |plus {b} ? =")),
    "sub": (_sub, ("{a} |- {b} =", "take {b} |from {a} =", "what is {a} |minus {b} ? =")),
    "mul": (_mul, ("{a} |* {b} =", "{a} times |{b} =", "{b} groups |of {a} . total =")),
    "mod": (_mod, ("{a} |mod {b} =", "remainder of {a} |by {b} =", "divide {a} |by {b} . rest =")),
    "max": (_max, ("max |{a} =", "largest of |{a} =", "from {a} |take the largest =")),
    "count": (_count, ("count {b} |in {a} =", "{a} |. how many {b} =", "in {a} |count {b} =")),
    "reverse": (_reverse, ("reverse |{a} =", "{a} |backwards =", "read |{a} from the end =")),
    "sort": (_sort, ("sort |{a} =", "{a} |in order =", "from small to large |{a} =")),
    "story": (
        _story,
        (
            "{who} has {a} {thing} |, gets {b} |, loses {c} . total =",
            "{who} had {a} {thing} |and bought {b} |and sold {c} . now =",
            "{a} {thing} |and {b} more |less {c} =",
        ),
    ),
    "sequence": (_sequence, ("{a} , {b} |, {c} , next =", "after {a} , {b} |, {c} comes =", "continue {a} , {b} |, {c} =")),
}


def make_row(rng: np.random.Generator, topic: str, level: int, template: int | None = None) -> dict:
    """One clean problem: id, prompt, answer, topic, level, template, corruption "none", and the topic's mistake."""
    make, templates = TOPICS[topic]
    template = int(rng.integers(len(templates))) if template is None else template
    problem = make(rng, level)
    text = templates[template].format(**problem.operands)
    return {
        "prompt": " ".join(text.replace("|", "").split()),
        "answer": problem.answer,
        "topic": topic,
        "level": level,
        "template": template,
        "corruption": "none",
        "mistake": problem.mistake,
        "clauses": [" ".join(clause.split()) for clause in text.split("|")],
        "operands": problem.operands,
    }


def generate_problems(
    n: int,
    seed: int,
    level_shares: Sequence[float] = (0.2,) * 5,
    *,
    topic_skew: float = 0.0,
    exclude: frozenset[str] | set[str] = frozenset(),
    prefix: str = "p",
) -> list[dict]:
    """`n` distinct clean rows, levels by `level_shares`; no prompt in `exclude` or twice.

    topic_skew: 0 = topics equally likely; else the r-th topic of an order drawn from the seed has a share that falls with
    r^-topic_skew (Zipf), as in pools scraped from the web. A topic that has too few distinct problems at a level has less.
    """
    rng, rows, seen = np.random.default_rng(seed), [], set(exclude)
    topics, shares, misses = list(TOPICS), np.asarray(level_shares, float) / np.sum(level_shares), 0
    if topic_skew:
        topics = [topics[i] for i in np.random.default_rng([seed, 0x21F]).permutation(len(topics))]
    topic_shares = np.arange(1, len(topics) + 1) ** -float(topic_skew)
    topic_shares /= topic_shares.sum()
    while len(rows) < n:
        if misses == 2000:
            raise UserError(f"the world has no {n} distinct problems at level shares {tuple(level_shares)}, {len(rows)} were found; ask for fewer")
        topic = topics[int(rng.choice(len(topics), p=topic_shares) if topic_skew else rng.integers(len(topics)))]
        row = make_row(rng, topic, int(rng.choice(LEVELS, p=shares)))
        if row["prompt"] in seen:
            misses += 1
            continue
        misses = 0
        seen.add(row["prompt"])
        rows.append({"id": f"{prefix}{len(rows)}", **row})
    return rows


def corrupt(rows: Sequence[dict], shares: Mapping[str, float], seed: int, *, exclude: frozenset[str] | set[str] = frozenset()) -> list[dict]:
    """A copy of `rows` with the given share of each corruption kind planted (field `corruption` tells the truth).

    wrong_answer: gold replaced, 75% by the topic's systematic mistake, 25% by a near miss. missing_clause: a clause
    with an operand removed from the prompt. garbled: half of the prompt's words shuffled or replaced. near_duplicate:
    the row is another row's problem in another template. No corrupted prompt is in `exclude` (the held-out ones, say): another is
    drawn, and after ten the row's answer is made wrong instead.
    """
    unknown = set(shares) - set(CORRUPTIONS)
    if unknown:
        raise UserError(f"unknown corruption {', '.join(sorted(unknown))}: {nearest(min(unknown), CORRUPTIONS)}")
    # A stream of its own: with the bare seed, a schedule that shuffles by the same seed would meet the corrupted rows first.
    rng, out = np.random.default_rng([seed, 0xBAD]), [dict(r) for r in rows]
    order, start = rng.permutation(len(out)), 0
    victims = {}
    for kind, share in shares.items():
        stop = start + round(share * len(out))
        victims.update({int(i): kind for i in order[start:stop]})
        start = stop
    clean = [i for i in range(len(out)) if i not in victims]
    vocabulary = sorted({w for r in rows for w in r["prompt"].split()})
    for i, kind in sorted(victims.items()):
        row, source = out[i], rows[clean[int(rng.integers(len(clean)))]]
        new = _CORRUPTORS[kind](rng, row, source, vocabulary)
        for _ in range(10):
            if new["prompt"] not in exclude:
                break
            new = _CORRUPTORS[kind](rng, row, rows[clean[int(rng.integers(len(clean)))]], vocabulary)
        else:
            kind, new = "wrong_answer", _wrong_answer(rng, row, source, vocabulary)
        out[i] = {**new, "id": row["id"], "corruption": kind}
    return out


def _wrong_answer(rng, row, source, vocabulary) -> dict:
    if row["mistake"] != row["answer"] and rng.random() < 0.75:
        return {**row, "answer": row["mistake"]}
    digits = row["answer"].split()
    at = int(rng.integers(len(digits)))
    digits[at] = str((int(digits[at]) + int(rng.choice([-2, -1, 1, 2]))) % 10)
    return {**row, "answer": " ".join(digits)}


def _missing_clause(rng, row, source, vocabulary) -> dict:
    clauses = row["clauses"]
    # The clause that goes is never the whole question: its trailing "=" stays.
    drop = int(rng.integers(1, len(clauses))) if len(clauses) > 1 else 0
    kept = clauses[:drop] + clauses[drop + 1 :]
    text = " ".join(kept)
    return {**row, "prompt": text if text.endswith("=") else f"{text} ="}


def _garbled(rng, row, source, vocabulary) -> dict:
    words = row["prompt"].split()[:-1]
    picked = rng.choice(len(words), size=max(2, len(words) // 2), replace=False) if len(words) > 1 else np.array([0])
    moved = rng.permutation(picked)
    new = list(words)
    for a, b in zip(picked, moved, strict=True):
        new[a] = words[b] if rng.random() < 0.5 else vocabulary[int(rng.integers(len(vocabulary)))]
    return {**row, "prompt": " ".join([*new, "="])}


def _near_duplicate(rng, row, source, vocabulary) -> dict:
    templates = TOPICS[source["topic"]][1]
    template = (source["template"] + 1 + int(rng.integers(len(templates) - 1))) % len(templates)
    text = templates[template].format(**source["operands"])
    clauses = [" ".join(c.split()) for c in text.split("|")]
    return {**source, "prompt": " ".join(text.replace("|", "").split()), "template": template, "clauses": clauses}


_CORRUPTORS = {
    "wrong_answer": _wrong_answer,
    "missing_clause": _missing_clause,
    "garbled": _garbled,
    "near_duplicate": _near_duplicate,
}


def demonstrations(n: int, seed: int, level_shares: Sequence[float], mistake_rates: Sequence[float], exclude=frozenset()) -> list[dict]:
    """Rows for supervised pre-training: {prompt, response}; at level l the response is the mistake with rate l."""
    rng, topics = np.random.default_rng(seed), list(TOPICS)
    shares, rows = np.asarray(level_shares, float) / np.sum(level_shares), []
    while len(rows) < n:
        level = int(rng.choice(LEVELS, p=shares))
        row = make_row(rng, topics[int(rng.integers(len(topics)))], level)
        if row["prompt"] in exclude:
            continue
        wrong = rng.random() < mistake_rates[level - 1]
        rows.append({"prompt": row["prompt"], "response": row["mistake"] if wrong else row["answer"]})
    return rows


def vocabulary() -> list[str]:
    """Every word of the world, special tokens first."""
    words = {str(d) for d in range(10)} | set(NAMES) | set(THINGS) | set(SYMBOLS)
    for _, templates in TOPICS.values():
        for template in templates:
            words |= {w for w in template.replace("|", " ").split() if "{" not in w}
    return ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(words)]


def build_tokenizer():
    """The world's word-level tokenizer as a transformers fast tokenizer (BOS prepended, save_pretrained works)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


WIDTHS = (12, 16, 22, 32)  # of the world's rows in tokens


def sft_batches(rows: Sequence[dict], tokenizer, batch: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`answer_batches` of rows with a prompt and a response."""
    encoded = []
    for row in rows:
        response = tokenizer(row["response"], add_special_tokens=False).input_ids
        prompt = tokenizer(row["prompt"]).input_ids
        encoded.append(([*prompt, *response, tokenizer.eos_token_id], len(prompt)))
    return answer_batches(encoded, batch, seed, WIDTHS)


def answer_batches(
    encoded: Sequence[tuple[Sequence[int], int]], batch: int, seed: int, widths: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches (tokens [batch, T], mask [batch, T]) for `train_sft` of rows (tokens, where the answer begins): mask on the answers.

    Rows of alike length share a batch (sorted inside windows of 16 batches, batches then shuffled), so little is padding;
    widths are the few sizes of T, so that few programs are compiled.
    """
    rng, out = np.random.default_rng(seed), []
    for start in range(0, len(encoded), 16 * batch):
        window = sorted(encoded[start : start + 16 * batch], key=lambda row: len(row[0]))
        batches = [window[i : i + batch] for i in range(0, len(window) - batch + 1, batch)]
        longest = [max(len(tokens) for tokens, _ in rows) for rows in batches]
        batches = [pad_answers(rows, min(w for w in widths if w >= n)) for rows, n in zip(batches, longest, strict=True)]
        out += [batches[i] for i in rng.permutation(len(batches))]
    return out
