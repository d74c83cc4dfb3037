"""Clips, windows and a generator of synthetic clips."""

from bigru.data.clips import Skipped
from bigru.data.hdf5 import ClipError, DataError
from bigru.data.windows import Batch, Dataset, NoWindowsError, Windows, load_dataset

__all__ = ["Batch", "ClipError", "DataError", "Dataset", "NoWindowsError", "Skipped", "Windows", "load_dataset"]
