"""`jaxrl-llm report`: draws the page of a run directory, report.html inside it."""

from pathlib import Path
from typing import Any

from jaxrl_llm.report import run_report, write_report


def run(config: Any, workdir: str) -> None:
    """Reads the run directory and writes its report.html anew; `config` is None, for this verb takes none.

    Raises:
      UserError: the directory holds no run, a file in it is broken (named with its line), or the page cannot be written.
    """
    path = Path(workdir) / "report.html"
    write_report(path, run_report(workdir))
    print(f"{path} ({path.stat().st_size / 1e3:,.0f} kB): open it in a browser")
