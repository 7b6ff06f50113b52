"""Imports go down only: the floors of docs/architecture.md, read from the source without importing it."""

import ast
import re
import sys

import pytest

OURS = ("models", "sae", "jaxrl_llm", "configs", "experiments", "benchmarks", "tests")

# Package (longest prefix wins) -> what it may import of ours.
FLOORS = {
    "models": {"models"},
    "sae": {"sae", "models"},
    "configs": set(),
    "jaxrl_llm": {"jaxrl_llm", "models", "sae", "configs"},
    "jaxrl_llm.losses": {"jaxrl_llm.losses", "jaxrl_llm.errors"},
    "jaxrl_llm.rewards": {"jaxrl_llm.rewards", "jaxrl_llm.errors"},
    # What a word and a sentence are is said once, where rewards count them; made prompts must mean the same.
    "jaxrl_llm.data": {"jaxrl_llm.data", "jaxrl_llm.errors", "jaxrl_llm.rewards.text_measures"},
    "jaxrl_llm.report": {f"jaxrl_llm.{name}" for name in ("report", "curation", "evals", "data", "errors", "run_dir", "config")},
    # A dictionary's figures get their intervals there.
    "jaxrl_llm.evals": {f"jaxrl_llm.{name}" for name in ("evals", "train", "data", "rewards", "errors")} | {"models", "sae"},
    # Of curation, the loop knows only what a schedule is.
    "jaxrl_llm.train": {
        f"jaxrl_llm.{name}" for name in ("train", "losses", "rewards", "data", "errors", "run_dir", "checkpoint", "config", "runtime")
    }
    | {"models", "jaxrl_llm.curation.schedule"},
    "jaxrl_llm.curation": {f"jaxrl_llm.{name}" for name in ("curation", "data", "errors", "run_dir", "checkpoint", "config", "runtime", "rewards")}
    | {"models", "sae"},
    "jaxrl_llm.serve": {"jaxrl_llm.serve", "jaxrl_llm.errors", "jaxrl_llm.__version__", "models"},
    "experiments": {"experiments", "jaxrl_llm", "models", "sae", "configs"},
}

# Rooms that need no JAX: rewards run where only Python is; configs are read for --help; rows are read before JAX starts.
NO_JAX = ("jaxrl_llm.rewards", "configs", "jaxrl_llm.data.sources", "jaxrl_llm.data.readers", "jaxrl_llm.data.prompts")
NO_JAX += ("jaxrl_llm.data.sampler", "jaxrl_llm.cli", "jaxrl_llm.config", "jaxrl_llm.config_help", "jaxrl_llm.errors")


def module_name(path, repo):
    parts = path.relative_to(repo).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """(line, module) of every import in the file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def inside(name, package):
    return name == package or name.startswith(package + ".")


def sources(repo):
    found = [path for package in ("models", "sae", "jaxrl_llm", "configs", "experiments") for path in sorted((repo / package).rglob("*.py"))]
    assert len(found) > 30
    return found


def test_imports_go_down_only(repo):
    wrong = []
    for path in sources(repo):
        name = module_name(path, repo)
        floor = max((package for package in FLOORS if inside(name, package)), key=len)
        for line, other in imported(path):
            if other == "jaxrl_llm.__version__":
                continue
            if other.split(".")[0] in OURS and not any(inside(other, allowed) for allowed in FLOORS[floor]):
                wrong.append(f"{path.relative_to(repo)}:{line} ({floor}) imports {other}")
    assert not wrong, "\n".join(wrong)


def test_sae_uses_models_only_to_harvest(repo):
    users = {
        path.stem
        for path in (repo / "sae").glob("*.py")
        for _, other in imported(path)
        if inside(other, "models") and not any(inside(other, f"models.{room}") for room in ("config", "errors", "hub", "sharding"))
    }
    # A dictionary is spliced into the model to measure what the model loses by it and to be trained on that, and differentiated in its place.
    assert users <= {"harvest", "splice", "end_to_end", "attribution"}


def test_losses_hold_no_model(repo):
    for path in (repo / "jaxrl_llm" / "losses").glob("*.py"):
        assert not [other for _, other in imported(path) if inside(other, "models")]


def test_rooms_without_jax(repo):
    wrong = []
    for path in sources(repo):
        name = module_name(path, repo)
        if any(inside(name, room) for room in NO_JAX):
            wrong += [f"{path.relative_to(repo)}:{line} imports {other}" for line, other in imported(path) if inside(other, "jax")]
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_a_wrong_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from jaxrl_llm import errors\n    import sae.train\n")
    assert list(imported(path)) == [(2, "jaxrl_llm.errors"), (3, "sae.train")]


@pytest.mark.parametrize("room", ["jaxrl_llm.rewards", "jaxrl_llm.data.sources", "jaxrl_llm.data.prompts"])
def test_rooms_without_jax_import_without_jax(run_python, room):
    assert "jax" not in run_python(f"import sys, {room}; print(sorted(m for m in sys.modules if m in ('jax', 'jaxlib', 'flax')))")


PACKAGE_OF = {"sklearn": "scikit-learn", "orbax": "orbax-checkpoint", "ml_collections": "ml-collections", "absl": "absl-py"}
PACKAGE_OF |= {"tensorflow_datasets": "tensorflow-datasets", "array_record": "array-record", "math_verify": "math-verify"}
PACKAGE_OF |= {"jaxlib": "jax", "ml_dtypes": "ml-dtypes"}
OPTIONAL = {"torch"}  # imported only where it is installed


def test_whatever_is_imported_is_declared(repo):
    declared = set(re.findall(r'"([A-Za-z][\w-]*)(?:\[[\w-]+\])?[><={]', (repo / "setup.py").read_text())) | {"jax"}
    missing = set()
    for path in sources(repo):
        for _, other in imported(path):
            top = other.split(".")[0]
            if top not in sys.stdlib_module_names and top not in OURS and top not in OPTIONAL:
                name = PACKAGE_OF.get(top, top)
                if name not in declared:
                    missing.add(f"{path.relative_to(repo)} imports {top}")
    assert not missing, f"not in setup.py: {sorted(missing)}"


def test_packages_are_listed_and_every_folder_is_a_package(repo):
    text = (repo / "setup.py").read_text()
    for top in ("models", "sae", "jaxrl_llm", "configs", "experiments"):
        for folder in [repo / top, *(path for path in (repo / top).rglob("*") if path.is_dir())]:
            if any(folder.glob("*.py")):
                package = ".".join(folder.relative_to(repo).parts)
                assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"
                assert f'"{package}"' in text, f"setup.py does not list {package}"
