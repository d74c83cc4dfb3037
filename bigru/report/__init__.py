"""The document of a run, `results_bigru.md`, made from run folders alone."""

import os
import sys
from contextlib import suppress

from bigru.command import require_forecaster

require_forecaster(__name__)

# matplotlib reads MPLBACKEND as it is imported and stops at a backend that is not installed, such as one inherited from
# a notebook. Figures here are drawn with Agg's own classes: the variable concerns pyplot's users alone.
if "matplotlib" not in sys.modules:
    _backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = _backend

from bigru.report.document import write_report  # noqa: E402
from bigru.report.record import RunError  # noqa: E402

__all__ = ["RunError", "write_report"]
