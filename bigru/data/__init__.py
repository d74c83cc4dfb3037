"""Clips, windows and a generator of synthetic clips."""

from bigru.command import require_forecaster

require_forecaster(__name__)

from bigru.data.hdf5 import ClipError, DataError  # noqa: E402
from bigru.data.index import Skipped  # noqa: E402
from bigru.data.windows import Batch, Dataset, NoWindowsError, Windows, load_dataset  # noqa: E402

__all__ = ["Batch", "ClipError", "DataError", "Dataset", "NoWindowsError", "Skipped", "Windows", "load_dataset"]
