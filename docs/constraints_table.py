"""Writes the table of docs/constraints.md from the table of constraints: `python docs/constraints_table.py`."""

import random
from pathlib import Path

from jaxrl_llm.rewards.constraints import describe, example, names
from jaxrl_llm.rewards.constraints.kinds import Optional
from jaxrl_llm.rewards.constraints.table import TABLE

DOCUMENT = Path(__file__).with_name("constraints.md")
HEAD = "| name | parameters | a sentence that asks for it | read |\n|---|---|---|---|\n"
LONGEST = 150


def table() -> str:
    """The rows, by group."""
    rows = []
    for name in names():
        kwargs, _, _ = example(name, random.Random(0))
        parameters = ", ".join(f"{key}?" if isinstance(kind, Optional) else key for key, kind in TABLE[name].parameters.items())
        said = describe(name, **kwargs).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")
        said = said if len(said) <= LONGEST else said[:LONGEST] + " ..."
        rows.append(f"| `{name}` | {parameters} | {said} | {'yes' if TABLE[name].derive else ''} |")
    return HEAD + "\n".join(rows) + "\n"


def document(text: str) -> str:
    """The document with the table of now."""
    return text[: text.index(HEAD)] + table() if HEAD in text else text.rstrip("\n") + "\n\n" + table()


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
