"""A run's folder: its name, its settings and data, whether a resume would lose anything, its lock and its log."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bigru.config import OWNER, ConfigError, TrainConfig, latest_run, read_settings
from bigru.data.windows import Dataset
from bigru.files import ESCAPE, as_json, lock, named, printable, shell_line, write_json, write_lines
from bigru.model.weights import WEIGHTS
from bigru.training.checkpoint import Progress

log = logging.getLogger("bigru.train")

STAMP = "%Y%m%d_%H%M%S"
CHECKPOINT, METRICS, SUMMARY = "checkpoint.pt", "metrics.jsonl", "summary.json"


def create(config: TrainConfig, dataset: Dataset) -> Path:
    """Makes a folder named after this second, with the settings and the data's digest in it."""
    while True:
        folder = config.run.out / datetime.now().strftime(STAMP)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not config.run.out.is_dir():
                raise
            time.sleep(0.1)
    write_data(folder, dataset)
    # Last, since it makes the folder a run.
    write_json(folder / "config.json", config.as_dict())
    return folder


def write_data(folder: Path, dataset: Dataset) -> None:
    """Writes data.json: where a run's data are, and the digest of their content, by which they are known elsewhere."""
    found = {"root": str(dataset.root), "index": str(dataset.index)}
    write_json(folder / "data.json", found | {"digest": dataset.digest, "windows": dataset.windows})


def find(folder: Path) -> Path:
    """Returns the folder of a run that goes on, by its own name; `folder`, as typed, may be a link to it.

    `latest`, where nothing has that name, is the last run in the folder around, or in `runs`.

    Raises:
        ConfigError: it holds no run.
    """
    folder = latest_run(folder)
    if not folder.name or folder.name == ".." or folder.is_symlink():
        folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"resume: {printable(folder)} holds no run (no config.json in it)")
    return folder


def read_config(folder: Path) -> TrainConfig:
    """Reads a run's settings; the folder around it is `out`, since it may have moved.

    Raises:
        ConfigError: they are damaged, or the folder's name is no start.
    """
    if not (folder / SUMMARY).is_file():
        # Asked now, not after the last epoch.
        start_of(folder)
    config = read_settings(folder / "config.json")
    return replace(config, run=replace(config.run, out=folder.parent))


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Returns the settings with other values, by name."""
    for name, value in changes.items():
        section = getattr(config, OWNER[name])
        config = replace(config, **{OWNER[name]: replace(section, **{name: value})})
    return config


def with_absolute_data(config: TrainConfig) -> TrainConfig:
    """Returns the settings with absolute paths of what is read, so that they hold in any working directory."""
    paths = {name: getattr(config.data, name) for name in ("data_root", "index", "cache")}
    data = replace(config.data, **{name: path.absolute() for name, path in paths.items() if path is not None})
    weights = None if config.run.weights is None else config.run.weights.absolute()
    return replace(config, data=data, run=replace(config.run, weights=weights))


def read_digest(folder: Path) -> str | None:
    """Returns the digest of the data that a run was trained on; None where it is not recorded."""
    try:
        content = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    digest = content.get("digest") if isinstance(content, dict) else None
    return digest if isinstance(digest, str) else None


def check_data(folder: Path, dataset: Dataset) -> None:
    """Raises ConfigError where a run was trained on data of other content."""
    recorded = read_digest(folder)
    if recorded is not None and recorded != dataset.digest:
        raise ConfigError(
            f"resume: {printable(folder)} began with other data than {printable(dataset.root)} holds now: the clips, "
            f"their frames or their rates differ (digest {recorded[:12]}, now {dataset.digest[:12]}); --data-root "
            "names the folder where its own data are"
        )


def check_resumable(folder: Path) -> None:
    """Raises ConfigError where epochs were finished and the checkpoint is gone, since a resume would overwrite them."""
    if (folder / CHECKPOINT).is_file():
        return
    epochs = count_epochs(folder)
    finished = [f"{METRICS} with {epochs} epoch{'s' * (epochs > 1)}"] * (epochs > 0)
    finished += [WEIGHTS] * (folder / WEIGHTS).is_file()
    if finished:
        raise ConfigError(
            f"resume: {printable(folder)} holds {' and '.join(finished)} but no {CHECKPOINT}, without which it cannot "
            f"go on; copy it from where the run was trained, or begin a new run, from these weights with --weights "
            f"{shell_line([folder / WEIGHTS])}"
        )


def check_progress(folder: Path, progress: Progress, epochs: int) -> None:
    """Raises ConfigError where going on from a checkpoint's progress would lose epochs that were finished after it."""
    # An older version wrote the row first, so that a kill left one more.
    if (rows := count_epochs(folder)) > progress.epoch + 1:
        raise ConfigError(
            f"resume: {printable(folder)} holds {rows} epochs in {METRICS}, but its {CHECKPOINT} is an older one, "
            f"of epoch {progress.epoch}; copy the newest from where the run was trained"
        )
    if epochs < (done := max(rows, progress.epoch)):
        raise ConfigError(f"epochs: expected at least {done}, which {printable(folder)} has done, got {epochs}")


def count_epochs(folder: Path) -> int:
    """Returns how many whole lines metrics.jsonl has."""
    try:
        return (folder / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl whole, a line an epoch, so that a kill leaves no torn line."""
    write_lines(folder / METRICS, map(as_json, history))


def start_of(folder: Path) -> datetime:
    """Returns when a run began, from its folder's name; a copy's may go on after the start, as in `..._copy`."""
    # The report takes letters, digits and underscores only.
    match = re.fullmatch(r"(\d{8}_\d{6})\w*", folder.name, re.ASCII)
    try:
        return datetime.strptime(match[1] if match else "", STAMP)
    except ValueError as error:
        raise ConfigError(
            "resume: a run's folder is named after its start, as 20250522_023917 or "
            f"20250522_023917_copy, got {printable(folder.name)}"
        ) from error


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run's folder for as long as the block runs.

    The lock is the system's and goes with the process, however it ends; the file run.lock stays.

    Raises:
        ConfigError: another process has the folder.
        OSError: the folder cannot be written.
    """
    with (folder / "run.lock").open("a+", encoding="utf-8") as file:
        try:
            if not lock(file, wait=False):
                # A run without a lock is better than none.
                log.warning("%s cannot be locked here; do not start a second run in it", printable(folder))
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{printable(folder)} is in use by another run, process {file.read().strip() or 'unknown'}; "
                "wait for it, or stop it first"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class RunLog(logging.FileHandler):
    """A log file; a line that cannot be written, as on a full disk, stops the run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors=ESCAPE)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            raise named(error, Path(self.baseFilename)) from error
        super().handleError(record)
