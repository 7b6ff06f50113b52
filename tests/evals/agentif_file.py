"""Rows in AgentIF's published schema, with its dirty spots, and what the published code makes of them. The texts are ours."""

import json

GOOD = "import re\ndef check_following(response):\n    return bool(re.search('river', response))\n"
STEP = {
    "cond": {"type": "llm_conditional_check", "exec": "Does the text speak of water? Answer YES or NO.\n{response}"},
    "llm": {"type": "llm", "required_keys": ["response"], "exec": "Is the text polite? Answer YES or NO.\nText: {response}\nAnswer:"},
    "extract": {"type": "llm", "exec": "Give all names in the text as a list.\n{response}"},
    "code": {"type": "code", "exec": GOOD},
}
SEQUENCES = {
    "llm": ["llm"], "code": ["code"], "cond-llm": ["cond", "llm"], "llm-code": ["extract", "code"], "cond-code": ["cond", "code"],
    "llm-llm": ["extract", "llm"], "cond": ["cond"], "cond-llm-code": ["cond", "extract", "code"],
}  # fmt: skip


def constraint(sequence="code", score=..., dimension="unconditional", kind="formatting", code=None, **more):
    """One constraint; score=... leaves the key out."""
    steps = [dict(STEP[name]) for name in SEQUENCES[sequence]]
    if code is not None:
        steps[-1]["exec"] = code
    made = {"id": 0, "desc": f"a constraint by {sequence}", "other_info": {"from": "system_para_1"}, "dimension": dimension, "type": kind}
    made |= {"is_meta": False, "evaluation": steps} | more
    return made if score is ... else made | {"score": score}


def row(*constraints, text="Write about a river.", output="A river ran by.", **more):
    made = {"domain": "lawglm", "query_id": 0, "turn_id": 0, "prompt_type": "Thought_prompt", "agent_name": "writer"}
    made["input"] = [{"role": "system", "content": "You write."}, {"role": "user", "content": text}]
    made["constraints"] = list(constraints)
    if output is not None:
        made["output"] = {"content": output, "model_name": "some-model", "dump": output}
    return made | more


def misspelt(made, wrong, value):
    """A constraint whose is_meta or other_info stands under a wrong key."""
    right = "other_info" if wrong == "other info" else "is_meta"
    return {key: entry for key, entry in made.items() if key != right} | {wrong: value}


def dirty():
    """A result file with every dirty spot: (rows, the published figures by hand)."""
    broken = "def check_following(response)\n    return True\n"
    rows = [
        row(constraint(score=True), constraint("llm", True, kind="semantic", llm_output="YES"), constraint("cond-llm", None, "conditional")),
        row(
            constraint(score=True, kind=["formatting"]), constraint("llm-code", False, kind=["semantic", "resource"], dimension="example_driven"),
            text="Another.",
        ),
        # The published code crashed at the second one: it and what follows have no score.
        row(constraint(score=True, kind=[]), constraint("cond-code", dimension="conditional"), constraint("code"), text="A third."),
        row(
            constraint(score=None, code=broken), constraint("llm", None, kind="semantic", llm_output="Perhaps."), constraint(score=True),
            text="A fourth.", id=17, output="A <think>hm</think>\nriver.",
        ),
        row(constraint("cond-code", None, "conditional"), constraint("cond", None, "conditional"), text="A fifth."),
        row(constraint("code", 1), misspelt(constraint(score=True), "is meta", True), misspelt(constraint(score=False), "is_meat", True)),
        row(misspelt(constraint(score=True, is_meta=True, kind="semantic"), "other info", {}), constraint("code", None), text="A sixth."),
    ]  # fmt: skip
    # CSR: 2 of 2, 1 of 2, 1 of 1, 1 of 1, none, 1 of 3 (a score of 1 is not True), 1 of 1.
    published = {
        "CSR": (7, 10), "ISR": (4, 6), "vanilla": (7, 9), "condition": (0, 0), "example": (0, 1), "formatting": (4, 6), "semantic": (2, 3),
        "tool": (0, 1), "meta": (1, 1),
    }  # fmt: skip
    crashed = published | {"CSR": (7, 12), "ISR": (3, 6), "vanilla": (7, 10), "condition": (0, 1), "formatting": (4, 8), "meta": (2, 3)}
    # Also the reply "Perhaps.", the score that is a number, and the code that gave nothing.
    strict = crashed | {"CSR": (7, 14), "ISR": (1, 6), "vanilla": (7, 12), "formatting": (4, 9), "semantic": (2, 4)}
    return rows, {"published": published, "crashed": crashed, "strict": strict}


def write(path, rows, lines=False):
    """As the published files are: a list over many lines; or one row a line."""
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=4, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
