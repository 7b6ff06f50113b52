r"""Answers of maths problems: find the answer in a text, then decide whether it equals the reference.

The answer is, in this order: the last closed `\boxed{...}`; the text after the last `####` (GSM8K); what follows the last "answer is"
or "answer:"; a text of one line is itself an answer. It is then compared in three steps, the first that can decide decides:

1. as text, after normalisation (spacing, `\left`, `\dfrac`, dollar signs, units, thousands separators; `x = 5` and 5 agree);
2. as exact numbers (integers, decimals, fractions, mixed numbers, percent): integers must be equal, anything else within a relative
   `rel_tol` (default 1e-6) of the reference; "25%" equals both 25 and 0.25;
3. symbolically by math-verify, in child processes with a hard time limit (symbolic.py).

A reference that is missing or cannot be read is an ERROR, never a wrong answer; an answer that is missing or cannot be read is a FAIL.
No text is ever evaluated as code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from jaxrl_llm.rewards.symbolic import SymbolicPool
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict

MAX_ANSWER_CHARS = 400  # the longest reference in MATH has 159

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\s#][^\n#]*)")
_PHRASE = re.compile(r"\banswer\b\W{0,4}(?:is|are|:|=)[ \t]*:?[ \t]*(?=\S)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$)")


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose brace is closed; nested and escaped braces count as LaTeX counts them. One pass."""
    open_braces: list[int | None] = []  # where the content of a box starts; None for any other brace
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token.end() if len(token[0]) > 1 else None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return text[last[0] : last[1]] if last else None


def _spoken(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", up to the end of its sentence or of its inline formula."""
    ends = [match.end() for match in _PHRASE.finditer(text)]
    if not ends:
        return None
    phrase = text[ends[-1] :].splitlines()[0].lstrip("*_ ")
    formula = re.match(r"\$([^$]+)\$|\\\((.+?)\\\)", phrase)
    if formula:
        return formula[1] or formula[2]
    return _SENTENCE_END.split(phrase, maxsplit=1)[0]


def extract_answer(text: str) -> str | None:
    """Finds the answer that a response states; None where it states none. An empty string means that it states an empty one."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashes = _HASHES.findall(text)
    if hashes:
        return hashes[-1].strip()
    spoken = _spoken(text)
    if spoken is not None:
        return spoken.strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0].strip() if len(lines) == 1 else None


def extract_reference(text: str) -> str:
    r"""The answer in a data row's reference: after `####` or in `\boxed{}` where it is a worked solution, else the text itself."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashes = _HASHES.findall(text)
    return (hashes[-1] if hashes else text).strip()


_CHARACTERS = str.maketrans({"−": "-", "‑": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "，": ",", "°": ""})
# Words after a number that change its value or join it to another one: they are no units.
_JOINING_WORDS = "and or to by than out of times plus minus over half hundred thousand million billion trillion dozen mod base pi sqrt"
_NOT_UNITS = frozenset(_JOINING_WORDS.split())
_REWRITES = [
    (re.compile(r"(?<=\d)(?:,\\!|\{,\})(?=\d{3})"), ""),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits)(?![A-Za-z])"), ""),
    (re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~|\\approx(?![A-Za-z])"), " "),
    (re.compile(r"(?<!\\)(?<=\{)\d{1,3}(?:,\d{3})+(?=\})"), lambda match: match[0].replace(",", "")),
    (re.compile(r"\\?[$£€]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\circ(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d|\\[A-Za-z]+|[A-Za-z])\s*(?=[\d{\\A-Za-z])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\})\s*(\d|\\[A-Za-z]+|[A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\d/.])(-?\d+)\s+(\d+)/(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"),
]
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(.*\d[\d.}%)]*\s*)\\(?:text|mbox|textrm|mathrm)\s*\{\s*([^{}\d]*)\}(?:\^\{?[23]\}?)?", re.DOTALL)
_PLAIN_UNIT = re.compile(r"(-?\d[\d,]*(?:\.\d+)?%?)\s+([A-Za-z][A-Za-z .'/-]*)(?:\^\{?[23]\}?)?")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ASSIGNMENT = re.compile(r"[A-Za-z]\s*=([^=]+)", re.DOTALL)
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def _is_unit(words: str) -> bool:
    return not _NOT_UNITS & set(re.findall(r"[a-z]+", words.lower()))


def normalise(text: str) -> str:
    """One spelling for answers that mean the same. A number's thousands separators and units go; single spaces between words stay."""
    text = text.translate(_CHARACTERS).strip().strip("*").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,").strip()
    unit = _UNIT.fullmatch(text)
    if unit and _is_unit(unit[2]):
        text = unit[1].strip()
    text = _TEXT.sub(r"\1", text).strip().rstrip(".,").strip()
    unit = _PLAIN_UNIT.fullmatch(text)
    if unit and _is_unit(unit[2]):
        text = unit[1]
    text = _LOOSE_SPACE.sub("", text)
    text = re.sub(r"\s+", " ", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    single = re.fullmatch(r"\(([A-Za-z])\)", text)
    return single[1] if single else text


def align(gold: str, answer: str) -> tuple[str, str]:
    """Two normalised answers, without the `x =` of one where the other is no equation: x = 5 and 5 are the same answer."""

    def bare(text: str) -> str:
        assignment = _ASSIGNMENT.fullmatch(text)
        return normalise(assignment[1]) if assignment else text

    if ("=" in gold) == ("=" in answer):
        return gold, answer
    return bare(gold), bare(answer)


_DECIMAL = r"\d{1,60}(?:\.\d{0,60})?"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?(%?)")
_FRACTION = re.compile(rf"([+-]?)(\d{{1,60}})?\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}}(%?)")


def read_number(text: str) -> tuple[Fraction, bool] | None:
    """Reads a normalised answer as (exact value, written with a percent sign); None where it is no plain number."""
    match = _NUMBER.fullmatch(text)
    if match:
        sign, top, bottom, percent = match.groups()
        value = Fraction(top.rstrip(".")) / 1
        if bottom is not None:
            divisor = Fraction(bottom.rstrip("."))
            if divisor == 0:
                return None
            value /= divisor
        return (-value if sign == "-" else value), bool(percent)
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, whole, top, bottom, percent = match.groups()
    divisor = Fraction(bottom.rstrip("."))
    if divisor == 0:
        return None
    value = Fraction(top.rstrip(".")) / divisor
    if whole is not None:
        if value < 0:
            return None
        value += int(whole)
    return (-value if sign == "-" else value), bool(percent)


def numbers_equal(gold: tuple[Fraction, bool], answer: tuple[Fraction, bool], rel_tol: float = 1e-6) -> bool:
    """Whether two numbers from read_number agree: integers exactly, others within rel_tol of gold. One percent sign is 1 or 1/100."""

    def close(a: Fraction, b: Fraction) -> bool:
        if a.denominator == 1 and b.denominator == 1:
            return a == b
        return abs(a - b) <= Fraction(repr(rel_tol)) * abs(a)  # repr: 1e-6 itself, not the nearest binary number below it

    (gold_value, gold_percent), (value, percent) = gold, answer
    if close(gold_value, value):
        return True
    if gold_percent == percent:
        return False
    return close(gold_value / 100, value) if gold_percent else close(gold_value, value / 100)


def _is_words(text: str) -> bool:
    """Whether a normalised answer is words only (a name, "even", a choice letter): then only its spelling counts."""
    return re.fullmatch(r"[A-Za-z][A-Za-z ,.'-]*", text) is not None


def compare_fast(gold: str, answer: str, rel_tol: float = 1e-6) -> Verdict | None:
    """Steps 1 and 2 on two normalised answers; None where only a symbolic comparison can tell."""
    if gold == answer:
        return Verdict(Status.PASS, reason=f"equal to {gold!r} as text")
    gold_number, number = read_number(gold), read_number(answer)
    if gold_number and number:
        equal = numbers_equal(gold_number, number, rel_tol)
        return Verdict(Status.PASS if equal else Status.FAIL, reason=f"{answer} {'equals' if equal else 'is not'} {gold} as a number")
    if _is_words(gold):
        if gold.casefold() == answer.casefold():
            return Verdict(Status.PASS, reason=f"equal to {gold!r} but for capitals")
        if len(gold) > 1:
            return Verdict(Status.FAIL, reason=f"{answer!r} is not {gold!r}")
    if gold_number and _is_words(answer):
        return Verdict(Status.FAIL, reason=f"{answer!r} is no number")
    return None


_PLAIN_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_PLAIN_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")


def to_latex(text: str) -> str:
    """Rewrites the commonest plain spellings (sqrt(2), pi, **, *, x^10) as LaTeX, which is all that step 3 reads."""
    text = _PLAIN_SQRT.sub(r"\\sqrt{\1}", text)
    text = _PLAIN_PI.sub(r"\\pi ", text)
    text = text.replace("**", "^").replace("*", r"\cdot ")
    return re.sub(r"\^(-?\d+)", r"^{\1}", text)


_OUTCOMES = {
    "equal": (Status.PASS, "equal as expressions"),
    "different": (Status.FAIL, "not equal as expressions"),
    "answer_unparsed": (Status.FAIL, "cannot be read as mathematics"),
    "gold_unparsed": (Status.ERROR, "the reference answer cannot be read as mathematics"),
    "timeout": (Status.TIMEOUT, "the comparison took too long"),
    "exhausted": (Status.TIMEOUT, "the comparison ran out of memory"),
}


def _from_outcome(outcome: str, gold: str, answer: str) -> Verdict:
    if outcome in _OUTCOMES:
        status, reason = _OUTCOMES[outcome]
    elif outcome.startswith("uncomparable"):
        status, reason = Status.FAIL, f"not comparable ({outcome.partition(': ')[2]})"
    else:
        status, reason = Status.ERROR, outcome.removeprefix("error: ")
    return Verdict(status, reason=f"{answer!r} against {gold!r}: {reason}")


class MathsReward:
    """PASS or FAIL for maths answers. Texts and numbers are compared in this process; only what is left goes to the pool.

    rel_tol: relative tolerance where either side is no integer.
    timeout_s, batch_timeout_s, workers, memory_mb: of the symbolic comparisons, see symbolic.SymbolicPool.
    """

    def __init__(
        self, rel_tol: float = 1e-6, timeout_s: float = 3.0, batch_timeout_s: float = 60.0, workers: int = 2, memory_mb: int = 2048
    ):
        self.rel_tol = rel_tol
        self.pool = SymbolicPool(workers, timeout_s, batch_timeout_s, memory_mb)

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Verdict]:
        """Judges each response against its `answer`."""
        verdicts: list[Verdict | None] = []
        undecided: dict[tuple[str, str], list[int]] = {}  # equal pairs, frequent among samples of one prompt, are compared once
        for index, item in enumerate(inputs):
            verdict, pair = self._judge_fast(item)
            verdicts.append(verdict)
            if verdict is None:
                undecided.setdefault(pair, []).append(index)
        if undecided:
            outcomes = self.pool.compare([(to_latex(gold), to_latex(answer)) for gold, answer in undecided])
            for (pair, indices), outcome in zip(undecided.items(), outcomes, strict=True):
                for index in indices:
                    verdicts[index] = _from_outcome(outcome, *pair)
        return [verdict for verdict in verdicts if verdict is not None]

    def _judge_fast(self, item: RewardInput) -> tuple[Verdict | None, tuple[str, str]]:
        gold = normalise(extract_reference(item.answer)) if item.answer is not None else ""
        if not gold:
            return Verdict(Status.ERROR, reason="the reference answer is empty"), ("", "")
        found = extract_answer(item.response)
        if found is None:
            return Verdict(Status.FAIL, reason="no answer found: no \\boxed{}, no ####, no 'answer is', more than one line"), ("", "")
        if len(found) > MAX_ANSWER_CHARS:
            return Verdict(Status.FAIL, reason=f"an answer of {len(found)} characters is none"), ("", "")
        answer = normalise(found)
        if not answer:
            return Verdict(Status.FAIL, reason="the answer is empty"), ("", "")
        gold, answer = align(gold, answer)
        return compare_fast(gold, answer, self.rel_tol), (gold, answer)


def check(response: str, answer: str | None, **options) -> Verdict:
    """Judges one response; `options` are MathsReward's. For many responses make one MathsReward: it keeps its child processes."""
    reward = MathsReward(**options)
    try:
        return reward([RewardInput(prompt="", response=response, answer=answer)])[0]
    finally:
        reward.pool.close()
