"""Documents name files and make targets that exist, and commands whose flags and config keys are there."""

import ast
import re
import shlex

import pytest

from jaxrl_llm import cli
from jaxrl_llm.config import load_config
from jaxrl_llm.run_dir import refuse_url

MADE_LATER = ("benchmarks/RESULTS.md",)  # by the benchmarks' --record


def documents(repo):
    return [repo / "README.md", repo / "CONTRIBUTING.md", *sorted((repo / "docs").glob("*.md"))]


def commands(repo):
    """(file, command) of each line that begins with jaxrl-llm, in the documents and in the docstrings of configs and experiments, and of
    each `command` with flags inside a sentence of the documents."""
    found = []
    for document in documents(repo):
        text = document.read_text().replace("\\\n", " ")
        found += [(document.name, " ".join(span.split())) for span in re.findall(r"`(jaxrl-llm \w[^`]*--[^`]*)`", text) if " VERB" not in span]
        found += [(document.name, line.partition(" #")[0]) for line in text.splitlines() if line.startswith("jaxrl-llm ")]
    for file in (*sorted((repo / "configs").glob("*.py")), *sorted((repo / "experiments").glob("*.py"))):
        lines = (ast.get_docstring(ast.parse(file.read_text())) or "").replace("\\\n", " ").splitlines()
        # What stands two spaces after a command says what it is for.
        found += [(file.name, re.split(r" {2,}(?=[^ -])", line.strip())[0]) for line in lines if line.strip().startswith("jaxrl-llm ")]
    return found


def check_command(command):
    """Reads the flags, loads the config and applies the overrides, as the command line does before it runs the verb."""
    _, name, *arguments = shlex.split(command)
    verb = cli.VERBS[name]
    flags, overrides, wants_help = cli._parse(name, verb, arguments)
    config = load_config(flags.get("config") or cli._default(name, verb), overrides) if verb.config != "none" else None
    assert wants_help or verb.workdir != "needed" or "workdir" in flags, "no --workdir"
    refuse_url(flags.get("workdir", ""))
    if config is not None and name == "plan" and config.target:
        load_config(config.target)


def test_commands_in_the_documents_are_understood(repo):
    found, wrong = commands(repo), []
    for name, command in found:
        try:
            check_command(command)
        except Exception as error:
            wrong.append(f"{name}: {command}: {error}")
    assert not wrong, "\n".join(wrong)
    assert sum(name == "README.md" for name, _ in found) >= 6 and {"pods.md", "saerl.md", "grpo.py"} <= {name for name, _ in found}


@pytest.mark.parametrize(
    "command",
    [
        "jaxrl-llm grpo --workdir=w --config.curated=c",  # once in the README
        "jaxrl-llm grpo --config.model=m",
        "jaxrl-llm saerl --config=configs/saerl.py:demi --workdir=w",
        "jaxrl-llm saerl --workdir=gs://bucket/run",
        "jaxrl-llm plan --config.target=configs/none.py",
        "jaxrl-llm plan --config.prompts=many",
    ],
)
def test_a_command_that_fails_would_be_found(command):
    with pytest.raises((Exception, AssertionError)):
        check_command(command)


def test_linked_files_exist(repo):
    missing = []
    for document in documents(repo):
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            file = target.partition("#")[0]
            if file and "://" not in file and not (document.parent / file).exists() and file not in MADE_LATER:
                missing.append(f"{document.name}: {target}")
    assert not missing, missing


def test_paths_in_the_documents_exist(repo):
    missing = []
    for document in documents(repo):
        for name in re.findall(r"`((?:models|sae|jaxrl_llm|configs|experiments|tests|benchmarks|docs)/[\w./-]*\w)`", document.read_text()):
            if "NAME" not in name and not (repo / name).exists() and name not in MADE_LATER:
                missing.append(f"{document.name}: {name}")
    assert not missing, missing


def test_the_makefile_has_the_promised_targets(repo):
    text = (repo / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", text, re.MULTILINE) for target in ("demo", "test", "lint", "bench", "peers"))


def test_nothing_names_a_path_of_one_machine(repo):
    path = re.compile(r"(?<![\w.])/(?:tmp|work|root|farm|home)/\w+")
    found = []
    for folder in ("models", "sae", "jaxrl_llm", "configs", "experiments", "tests", "benchmarks", "docs", ".ci"):
        for file in (repo / folder).rglob("*"):
            if file.suffix in (".py", ".md", ".sh", ".html", ".json") and file.is_file():
                found += [f"{file.relative_to(repo)}: {hit}" for hit in path.findall(file.read_text(encoding="utf-8"))]
    assert not found, found
