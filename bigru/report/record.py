"""Reads a run folder: config.json, metrics.jsonl, summary.json and samples.npz."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bigru.command import CommandError, training_line
from bigru.layout import MODALITY_SIZES

FORMAT = 2
"""Of summary.json."""

NETWORK = "this network"
"""The key of the run's own forecaster in `horizon`, beside the baselines."""

MODALITIES = ("hands", *MODALITY_SIZES)
SPLITS = ("train", "val", "test")
ENVIRONMENT = ("device", "backend", "precision", "python", "torch", "triton", "numpy", "bigru", "platform", "why")
TIMING = ("epoch_s_median", "train_windows_per_s_median", "total_s")
FILES = ("config.json", "metrics.jsonl", "summary.json", "samples.npz")


class RunError(CommandError, ValueError):
    """A folder that cannot be reported: no run, not finished, or broken in the place that the message names."""


@dataclass(frozen=True)
class Metric:
    """An error measure: its key in the run's files, its names in the document, its unit and how it is printed."""

    name: str
    label: str
    unit: str
    decimals: int
    short: str = ""
    """Its name in the published document; empty where that lacks it."""
    curve: str = ""
    """Its title over the learning curves."""

    def of(self, scores: Scores) -> float:
        """Returns the value in a row of scores."""
        return float(getattr(scores, self.name))

    def text(self, value: float) -> str:
        """Returns a value as it stands in every table."""
        return f"{value:,.{self.decimals}f}"


METRICS = (
    Metric("mpjpe", "MPJPE (published)", "centred units", 3, "MPJPE", "MPJPE (84-vector norm)"),
    Metric("ade", "ADE", "centred units", 3, "ADE", "ADE (centroid)"),
    Metric("fde", "FDE", "centred units", 3, "FDE", "FDE (centroid)"),
    Metric("joint_error", "per-joint error", "centred units", 3),
    Metric("joint_error_px", "per-joint error (px)", "px", 1),
)
"""Every measure in the order of the tables; the document, the comparison and the curves take theirs from here."""


def cells(scores: Scores) -> list[str]:
    """Returns a row of scores as it stands in every table."""
    return [metric.text(metric.of(scores)) for metric in METRICS]


PUBLISHED = tuple(metric for metric in METRICS if metric.short)
PUBLISHED_COLUMNS = tuple(f"{split}_{metric.name}" for metric in PUBLISHED for split in ("tr", "va"))
"""The metric columns of the published document, in its order."""
COLUMNS = ("epoch", *PUBLISHED_COLUMNS, "va_joint_error", "va_joint_error_px", "tr_loss", "va_loss", "lr")
"""What the report reads of each line of metrics.jsonl."""


@dataclass(frozen=True)
class Scores:
    """Errors over a set of windows, in centred units (half the image in each axis) unless the name says pixels."""

    mpjpe: float
    """The published definition: L2 norm over the 84-vector of a frame, averaged."""
    ade: float
    fde: float
    joint_error: float
    """Distance per joint, then the mean."""
    joint_error_px: float
    windows: int


@dataclass(frozen=True)
class Samples:
    """A few test windows to draw; coordinates are x, y pairs of 21 left joints, then 21 right ones, centred."""

    observed: np.ndarray  # (S, To, 84)
    predicted: np.ndarray  # (S, Tp, 84)
    target: np.ndarray  # (S, Tp, 84)
    observed_present: np.ndarray  # (S, To, 2) bool: left hand, right hand
    target_present: np.ndarray  # (S, Tp, 2) bool
    fps: np.ndarray  # (S,)
    error_px: np.ndarray  # (S,) mean per-joint error of the whole window
    stem: np.ndarray  # (S,) str
    label: np.ndarray  # (S,) str: which of all test windows it is, such as "best"; empty for any
    fps_assumed: np.ndarray  # (S,) bool: whether fps is assumed and not measured


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report says about one finished run."""

    folder: Path
    config: dict[str, dict[str, Any]]
    metrics: dict[str, list[float]]
    """One list for each of `COLUMNS`, with a value an epoch."""
    stamp: str
    """The folder's name, by which the document knows the run: a copy of a run is a run of its own."""
    started: str
    total_params: int
    modules: tuple[tuple[str, int], ...]
    best_epoch: int
    stopped_early: bool
    finished_before: tuple[int, ...]
    """Epochs after which the run had finished before, and was then trained on."""
    test: Scores
    baselines: dict[str, Scores]
    by_frame_rate: tuple[tuple[float, Scores], ...]
    assumed_rates: tuple[tuple[float, int], ...]
    """Frame rates that are assumed for some windows, and for how many of them."""
    by_subtask: tuple[tuple[str, Scores], ...]
    horizon: dict[str, np.ndarray]
    """Per-joint errors in pixels at each future frame, (T,): of `NETWORK`, and of the baselines by name."""
    by_joint: np.ndarray
    """(42,) errors in pixels of the 21 left joints, then the 21 right ones; NaN for one that was never there."""
    modalities: dict[str, bool]
    source: str
    split: str
    clips: dict[str, int]
    windows: dict[str, int]
    skipped: dict[str, int]
    environment: dict[str, str]
    timing: dict[str, float]
    command: str
    samples: Samples


def read_run(run: Path) -> RunRecord:
    """Reads a finished run folder.

    Args:
        run: the folder that the trainer wrote, `<out>/<stamp>`.

    Returns:
        The record, with every number in the unit that the trainer wrote.

    Raises:
        RunError: no run folder, a name that the document cannot use, an unfinished run (the message says how to resume
            it), an unknown format, or a file that is damaged; the message names the file and the entry or line in it.
    """
    folder = run.resolve()
    if not folder.is_dir():
        raise RunError(f"{run} is not a folder")
    for name in FILES:
        if not (folder / name).is_file():
            raise RunError(
                f"{run} is not a run folder: it holds no {name}"
                if name in FILES[:2]
                else f"{run} holds no {name}: the run is not finished. Resume it with: {training_line('--resume', run)}"
            )
    # The name becomes part of file names and of an HTML comment.
    if not re.fullmatch(r"\w+", folder.name, re.ASCII):
        raise RunError(f"{run}: a run folder's name should be letters, digits and underscores, got {folder.name!r}")
    with _damage_in(folder / "config.json") as path:
        config = _parse_object(path.read_text(encoding="utf-8"))
        if missing := {"data", "model", "optim", "run"} - config.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        config = {group: _Settings(f"{path}: {group}", options) for group, options in config.items()}
    with _damage_in(folder / "metrics.jsonl") as path:
        metrics = _read_metrics(path)
    samples = read_samples(folder / "samples.npz")
    with _damage_in(folder / "summary.json") as path:
        return _from_summary(_parse_object(path.read_text(encoding="utf-8")), folder, config, metrics, samples)


class _Settings(dict[str, Any]):
    """A group of config.json that says where a setting is missing once the document asks for it."""

    def __init__(self, place: str, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.place = place

    def __missing__(self, name: str) -> Any:
        raise RunError(f"{self.place}.{name} is missing")


@contextmanager
def _damage_in(path: Path) -> Iterator[Path]:
    """Turns whatever a damaged file makes Python raise into a RunError that names the file."""
    try:
        yield path
    except RunError:
        raise
    except KeyError as error:
        raise RunError(f"{path}: {error.args[0]} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: {error}") from error


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _number(values: Mapping[str, Any], name: str) -> float:
    """Returns an entry as a number; null is NaN, which strict JSON cannot say otherwise."""
    value = values[name]
    if not isinstance(value, int | float | None):
        raise ValueError(f"{name} should be a number, got {value!r}")
    return math.nan if value is None else float(value)


def _read_metrics(path: Path) -> dict[str, list[float]]:
    """Returns the epochs as columns."""
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    # Broken bytes become broken JSON here, and so are reported with their line.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        with _damage_in(Path(f"{path}:{number}")):
            values = _parse_object(line)
            if values["epoch"] != number:
                raise ValueError(f"expected epoch {number}, got epoch {values['epoch']!r}")
            for name in COLUMNS:
                columns[name].append(number if name == "epoch" else _number(values, name))
    if not columns["epoch"]:
        raise ValueError("no complete epoch")
    return columns


def _scores(values: Mapping[str, Any]) -> Scores:
    return Scores(**{metric.name: _number(values, metric.name) for metric in METRICS}, windows=values["windows"])


def _errors_px(values: Mapping[str, Any]) -> np.ndarray:
    # null becomes NaN.
    return np.array(values["joint_error_px"], dtype=float)


def _from_summary(
    summary: Mapping[str, Any],
    folder: Path,
    config: dict[str, dict[str, Any]],
    metrics: dict[str, list[float]],
    samples: Samples,
) -> RunRecord:
    if (version := summary["format"]) != FORMAT:
        raise ValueError(f"format {version} is not known; this version of the report reads {FORMAT}")
    best, epochs = summary["best_epoch"], len(metrics["epoch"])
    if not 1 <= best <= epochs:
        raise ValueError(f"best_epoch is {best}, but metrics.jsonl holds epochs 1 to {epochs}")
    by_rate, data, environment = summary["by_frame_rate"], summary["data"], summary["environment"]
    return RunRecord(
        folder=folder,
        config=config,
        metrics=metrics,
        stamp=folder.name,
        started=summary["started"],
        total_params=summary["total_params"],
        modules=tuple((entry["module"], entry["params"]) for entry in summary["modules"]),
        best_epoch=best,
        stopped_early=summary["stopped_early"],
        finished_before=tuple(summary["finished_before"]),
        test=_scores(summary["test"]),
        baselines={name: _scores(scores) for name, scores in summary["baselines"].items()},
        by_frame_rate=tuple((entry["fps"], _scores(entry)) for entry in by_rate),
        assumed_rates=tuple((entry["fps"], entry["assumed"]) for entry in by_rate if entry["assumed"]),
        by_subtask=tuple((row["subtask"], _scores(row)) for row in summary["by_subtask"]),
        horizon={name: _errors_px(values) for name, values in summary["horizon"].items()},
        by_joint=_errors_px(summary["by_joint"]),
        modalities={name: summary["modalities"][name] for name in MODALITIES},
        source=data["source"],
        split=data["split"],
        clips={name: data["clips"][name] for name in SPLITS},
        windows={name: data["windows"][name] for name in SPLITS},
        skipped=data["skipped"],
        environment={name: environment[name] or "none" for name in ENVIRONMENT},
        timing={name: summary["timing"][name] for name in TIMING},
        command=summary["command"],
        samples=samples,
    )


def read_samples(path: Path) -> Samples:
    """Reads samples.npz.

    Raises:
        RunError: it is no archive, or an array is missing in it.
    """
    # Opened here: np.load leaves a file that is no archive open.
    with _damage_in(path), path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return Samples(**{field.name: stored[field.name] for field in fields(Samples)})
