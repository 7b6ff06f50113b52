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
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        ours = os.path.realpath(os.path.join(root, name))
        if places and os.path.realpath(places[0]) != ours:
            return (
                f"package '{name}' is imported from {places[0]}, but jaxrl_llm needs its own, {ours}: "
                f"run from another folder, or take {os.path.dirname(places[0])} off PYTHONPATH, or use a virtual environment of its own"
            )
    return None


# The command line says it itself, as one line without a traceback.
if os.path.basename(sys.argv[0] if sys.argv else "") not in ("jaxrl-llm", "-m"):
    _problem = foreign_packages()
    if _problem:
        raise ImportError(_problem)
