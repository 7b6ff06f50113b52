"""The script behind make: too old a Python, no venv, a failing pip, and nothing to do the second time."""

import ast
import importlib.util
import re
import sys

import pytest


@pytest.fixture
def script(repo, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("venv_script", repo / ".ci" / "venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_too_old_a_python_says_so(script, monkeypatch):
    monkeypatch.setattr(script, "NEEDED", (99, 0))
    monkeypatch.setattr(sys, "argv", ["venv.py", ".venv", "-e", "."])
    with pytest.raises(SystemExit, match=r"is too old: install Python 3\.11 or newer"):
        script.main()


def test_a_newer_python_on_the_path_is_used(script, monkeypatch):
    assert script.newer_python() is not None
    monkeypatch.setenv("PATH", "")
    assert script.newer_python() is None


def test_no_venv_says_what_to_install_and_leaves_nothing(script, tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nmkdir -p .venv\necho 'No module named ensurepip'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(SystemExit, match=r"(?s)no working venv or pip.*apt-get install python3-venv.*No module named ensurepip"):
        script.make(".venv")
    assert not (tmp_path / ".venv").exists()


def test_a_failing_pip_shows_its_last_words(script, tmp_path, capsys):
    (tmp_path / "pip").write_text("#!/bin/sh\necho 'Collecting thing'\necho 'ERROR: no such thing'\nexit 1\n")
    (tmp_path / "pip").chmod(0o755)
    with pytest.raises(SystemExit, match=r"could not install thing"):
        script.install(str(tmp_path), str(tmp_path / "pip"), ["thing"])
    assert "ERROR: no such thing" in capsys.readouterr().err
    assert "ERROR: no such thing" in (tmp_path / "pip.log").read_text()


def test_the_second_call_does_nothing_until_setup_changes(script, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "make", lambda folder: (tmp_path / folder).mkdir(exist_ok=True) or "python")
    monkeypatch.setattr(script, "install", lambda folder, python, arguments: calls.append(arguments))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["venv.py", ".venv", *arguments])
        script.main()

    (tmp_path / "setup.py").write_text("one")
    call("-e", ".", "--", "torch==2.13.0")
    assert calls == [["-e", "."], ["torch==2.13.0"]]
    call("-e", ".", "--", "torch==2.13.0")
    assert len(calls) == 2
    call("-e", ".")
    assert len(calls) == 3
    call("-e", ".", "--", "torch==2.13.0")
    assert len(calls) == 3
    (tmp_path / "setup.py").write_text("two")
    call("-e", ".")
    assert len(calls) == 4


# Import name -> the name to install, where they differ by more than - for _.
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def imported(path):
    """The top-level packages that a file imports, also those it looks up by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
            names = [node.args[0].value]
        yield from (name.partition(".")[0] for name in names)


def test_what_the_packages_import_is_what_setup_installs(repo):
    declared = {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z][\w.-]*)[^"\s]*[<>]=?', (repo / "setup.py").read_text())}
    ours, wanted = {"models", "sae", "jaxrl_llm", "configs", "experiments"}, {}
    for file in (file for folder in ours for file in (repo / folder).rglob("*.py")):
        for name in set(imported(file)) - ours - set(sys.stdlib_module_names):
            wanted[DISTRIBUTIONS.get(name, name.replace("_", "-"))] = str(file)
    declared |= {"jax"}  # its bound is a variable there
    assert not set(wanted) - declared, {name: wanted[name] for name in set(wanted) - declared}


def test_ci_calls_the_readmes_test_command(repo):
    text = (repo / ".ci" / "run").read_text()
    assert "make test" in text and "make lint" in text and "torch==2.13.0" in text
