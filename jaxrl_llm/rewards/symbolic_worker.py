"""The child process of symbolic.py: compares two LaTeX answers with math-verify, one JSON line in, one out.

It is started as a script, by path and with `python -P`, so that it imports neither the caller's main module nor jaxrl_llm: no JAX, no
accelerator, half a second to start. Its limits are the kernel's: an address-space limit, and an alarm whose default action ends
the process even inside a C loop, in case the parent died and nobody is left to kill it.

Arguments: memory limit in MiB, seconds after which one comparison ends the process.
"""

import contextlib
import json
import os
import re
import resource
import signal
import sys

NUMBER = re.compile(r"\s*(\d+)\s*|\s*(\d*\.\d+|\d+\.)\s*")


def read_number(text, *_args, **_kwargs):
    """Stands in for sympy's parse_expr, through which sympify reads strings and which is eval underneath.

    The text under comparison was written by a model and is never run: a plain number is all that is read here.
    """
    import sympy

    match = NUMBER.fullmatch(text)
    if match is None:
        raise ValueError("not a plain number")
    return sympy.Integer(int(match[1])) if match[1] else sympy.Float(match[2])


def limit_memory(mebibytes: int) -> None:
    """Bounds the address space, so that a huge integer ends in MemoryError and not in the machine's out-of-memory killer."""
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS; the time limits still hold
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))


def make_comparer():
    """Returns compare(gold, answer) -> outcome; imports sympy and math-verify."""
    import logging

    import sympy.parsing.sympy_parser as sympy_parser
    import sympy.physics.units  # noqa: F401  (simplify imports it late, and it reads strings of its own while it loads)
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    sympy_parser.parse_expr = read_number
    # Only the LaTeX grammar: the plain-expression reader of math-verify goes through sympy's parse_expr, which is eval.
    # Units are off the text already (maths.normalise), and its own unit stripping takes the t of \\sin t for tonnes.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False)
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]

    def read(latex: str):
        # None switches the library's signal-based timeout off; its annotation says int only.
        return parse(f"\\boxed{{{latex}}}", config, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def compare(gold: str, answer: str) -> str:
        gold_values = read(gold)
        if not gold_values:
            return "gold_unparsed"
        answer_values = read(answer)
        if not answer_values:
            return "answer_unparsed"
        return "equal" if verify(gold_values, answer_values, timeout_seconds=None, raise_on_error=True) else "different"

    return compare


def outcome_of(compare, gold: str, answer: str) -> str:
    """One comparison's outcome, whatever the comparison raises."""
    try:
        return compare(gold, answer)
    except (MemoryError, RecursionError):
        return "exhausted"
    except Exception as error:  # sympy raises almost anything on odd input
        return f"uncomparable: {type(error).__name__}"


def main() -> int:
    """Answers requests from standard input until it closes."""
    limit_memory(int(sys.argv[1]))
    seconds = int(sys.argv[2])
    # Whatever a library prints must not mix with the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        compare = make_comparer()
    except ImportError as error:
        replies.write(json.dumps({"fatal": f"math-verify cannot be imported ({error}); pip install 'math-verify[antlr4_13_2]'"}) + "\n")
        return 1
    replies.write(json.dumps({"ready": True}) + "\n")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        job = json.loads(line)
        signal.alarm(seconds)
        outcome = outcome_of(compare, job["gold"], job["answer"])
        signal.alarm(0)
        replies.write(json.dumps({"outcome": outcome}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
