"""The report of a run: `results_bigru.md` and its pictures, a function of the run folder alone."""

from bigru.report.document import write_report
from bigru.report.record import RunError

__all__ = ["RunError", "write_report"]
