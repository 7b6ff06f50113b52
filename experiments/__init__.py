"""One readable script for each system: a verb of the command line each, with a config of the same name."""

import jaxrl_llm  # noqa: F401  (refuses another package's `models` or `sae`, which scripts import later and by name)
