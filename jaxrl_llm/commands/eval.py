"""`jaxrl-llm eval`: what is evaluated is said by the config's field `kind`."""

import importlib
from typing import Any

MODULES = {  # kind -> the module whose run(config, workdir) does it
    "sae": "jaxrl_llm.commands.eval_sae",
    "ifeval": "jaxrl_llm.commands.eval_ifeval",
    "agentif": "jaxrl_llm.commands.eval_agentif",
}


def run(config: Any, workdir: str) -> Any:
    """Evaluates what `config.kind` names, a row of MODULES; the command line has checked that there is one."""
    return importlib.import_module(MODULES[config.kind]).run(config, workdir)
