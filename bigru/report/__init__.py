"""The documents, each a function of files alone: `results_bigru.md` of a run, `PERFORMANCE.md` of the records."""

from bigru.report.document import write_report
from bigru.report.fields import RunError
from bigru.report.performance import write_performance

__all__ = ["RunError", "write_performance", "write_report"]
