"""`python -m jaxrl_llm VERB ...`: the same as `jaxrl-llm VERB ...`."""

import sys

from jaxrl_llm.cli import main

sys.exit(main())
