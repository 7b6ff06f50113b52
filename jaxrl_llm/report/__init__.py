"""Run directory -> one self-contained HTML page. The input is described in `schema.py`."""

from jaxrl_llm.report.page import build_report, write_report
from jaxrl_llm.report.run import run_report, save_data
from jaxrl_llm.report.schema import ReportData, validate

__all__ = ["ReportData", "build_report", "run_report", "save_data", "validate", "write_report"]
