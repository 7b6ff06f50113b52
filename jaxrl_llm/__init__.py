"""Post-training of language models in JAX: data curation by sparse autoencoders, GRPO, rewards, reports."""

import importlib.util
import os
import sys

__version__ = "0.1.0"

# `models` and `sae` are the names of many packages. Ours stand beside this one; another one found first would fail later, in
# some far place, with a message about a missing attribute.
_SIBLINGS = ("models", "sae", "configs", "experiments")


def foreign_packages() -> str | None:
    """One line about a sibling package that is not ours and where it came from; None when all are ours. Imports nothing."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in _SIBLINGS:
        found, ours = _place_of(name), os.path.realpath(os.path.join(root, name))
        if found and os.path.realpath(found) != ours:
            return (
                f"package '{name}' is imported from {found}, but jaxrl_llm needs its own, {ours}: "
                f"run from another folder, or take {os.path.dirname(found)} off PYTHONPATH, or use a virtual environment of its own"
            )
    return None


def _place_of(name: str) -> str:
    """Folder or file that `import name` gives, or has given; "" where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that some code made by hand
        return getattr(sys.modules[name], "__file__", None) or "code that made it by hand"
    return "" if spec is None else next(iter(spec.submodule_search_locations or ()), spec.origin or "")


def _is_command_line() -> bool:
    """Whether this is `jaxrl-llm ...` or `python -m jaxrl_llm ...`, which say it themselves, as one line without a traceback."""
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    return program == "jaxrl-llm" or (program == "-m" and not {"jaxrl_llm", "jaxrl_llm.cli"}.isdisjoint(sys.orig_argv))


if not _is_command_line():
    _problem = foreign_packages()
    if _problem:
        raise ImportError(_problem)
