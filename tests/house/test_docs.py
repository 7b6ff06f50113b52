"""Documents name files and make targets that exist."""

import re


def test_paths_in_the_documents_exist(repo):
    missing = []
    for document in [repo / "CONTRIBUTING.md", *sorted((repo / "docs").glob("*.md"))]:
        for name in re.findall(r"`((?:models|sae|jaxrl_llm|configs|experiments|tests|benchmarks|docs)/[\w./-]*\w)`", document.read_text()):
            if "NAME" not in name and not (repo / name).exists() and not name.endswith("RESULTS.md"):
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
