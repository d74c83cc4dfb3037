"""A run's folder: where it may be, what it is called, whose it is, and its log."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from bigru.config import ConfigError, TrainConfig
from bigru.files import named, write_json

try:
    import fcntl
except ImportError:
    # Windows has none.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("bigru.train")

STAMP = "%Y%m%d_%H%M%S"


def check_writable(out: Path) -> None:
    """Raises ConfigError where no run can begin, before the data are read."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ConfigError(f"out: expected a folder that can be written, got {nearest}")


def create_run_dir(config: TrainConfig) -> Path:
    """A new folder named after this second, with the settings in it."""
    while True:
        folder = config.run.out / datetime.now().strftime(STAMP)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not config.run.out.is_dir():
                raise
            time.sleep(0.1)
    write_json(folder / "config.json", config.as_dict())
    return folder


def start_of(folder: Path) -> datetime:
    """When a run began: its folder's name, or what that name begins with, since the folder may be a copy."""
    # The report takes letters, digits and underscores only.
    match = re.fullmatch(r"(\d{8}_\d{6})\w*", folder.name, re.ASCII)
    try:
        return datetime.strptime(match[1] if match else "", STAMP)
    except ValueError as error:
        raise ConfigError(
            "resume: a run's folder is named after its start, as 20250522_023917 or "
            f"20250522_023917_copy, got {folder.name}"
        ) from error


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run's folder for as long as the block runs.

    The lock is the system's and goes with the process, however it ends; the file run.lock stays.

    Raises:
        ConfigError: another process has the folder.
        OSError: the folder cannot be written.
    """
    with (folder / "run.lock").open("a+", encoding="utf-8") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise ConfigError(
                    f"{folder} is in use by another run, process {lock.read().strip() or 'unknown'}; "
                    "wait for it, or stop it first"
                ) from error
            except OSError:
                # Some network file systems have no locks: a run without one is better than none.
                log.warning("%s cannot be locked here; do not start a second run in it", folder)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


class RunLog(logging.FileHandler):
    """A log whose lines are written or the run stops: a disk that is full is no small matter."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            raise named(error, Path(self.baseFilename)) from error
        super().handleError(record)


@contextmanager
def log_to(handler: logging.Handler) -> Iterator[None]:
    """Sends the log's lines to a handler too, for as long as the block runs."""
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
