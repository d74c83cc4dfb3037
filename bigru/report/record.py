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
from bigru.layout import JOINTS, MODALITY_SIZES

FORMATS = (1, 2)
"""The known values of `format` in summary.json; 1 lacks horizon, by_joint and by_subtask."""

NETWORK = "this network"
"""The key of the run's own forecaster in `horizon`, beside the baselines."""

MODALITIES = ("hands", *MODALITY_SIZES)
SPLITS = ("train", "val", "test")
ENVIRONMENT = ("device", "backend", "precision", "python", "torch", "triton", "numpy", "bigru", "platform")
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
COLUMNS = ("epoch", *PUBLISHED_COLUMNS, "va_joint_error", "va_joint_error_px")
"""What the report reads of each line of metrics.jsonl."""
DRAWN = ("tr_loss", "va_loss", "lr")
"""What it draws too, where a run has recorded it."""


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
    label: np.ndarray  # (S,) str: which of all test windows it is, such as "best"; empty where that was not recorded
    fps_assumed: np.ndarray | None = None  # (S,) bool: whether fps is assumed and not measured; None: in no window


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report says about one finished run."""

    folder: Path
    config: dict[str, dict[str, Any]]
    metrics: dict[str, list[float]]
    """One list for each of `COLUMNS`, with a value an epoch; of `DRAWN` too, empty where that is not recorded."""
    torn_line: int | None
    """Number of the unfinished last line of metrics.jsonl, which is left out."""
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
    """Empty where the run did not record it, as are the next two."""
    horizon: dict[str, np.ndarray]
    """Per-joint errors in pixels at each future frame, (T,): of `NETWORK`, and of the baselines by name."""
    by_joint: np.ndarray | None
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
        config = {group: dict(options) for group, options in _read_object(path).items()}
        if missing := {"data", "model", "optim", "run"} - config.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        _count(config["optim"], "batch_size")
        bool(config["data"]["mask_missing"])
        predicted = _count(config["data"], "predicted")
    with _damage_in(folder / "metrics.jsonl") as path:
        metrics, torn_line = _read_metrics(path)
    samples = read_samples(folder / "samples.npz")
    with _damage_in(folder / "summary.json") as path:
        return _from_summary(_read_object(path), folder, config, metrics, torn_line, samples, predicted)


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


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(path.read_text(encoding="utf-8", errors="replace"))


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
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"{name} should be a number, got {value!r}")
    return math.nan if value is None else float(value)


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} should be a whole number, 0 or more, got {value!r}")
    return value


def _read_metrics(path: Path) -> tuple[dict[str, list[float]], int | None]:
    """Returns the epochs as columns, and the number of a last line torn by a kill (it has no line end), or None."""
    # Broken bytes become broken JSON here, and so are reported with their line.
    *lines, tail = path.read_text(encoding="utf-8", errors="replace").split("\n")
    torn_line = None
    if tail:
        try:
            json.loads(tail)
            lines.append(tail)
        except (ValueError, RecursionError):
            torn_line = len(lines) + 1
    if not lines:
        raise ValueError("no complete epoch")
    columns: dict[str, list[float]] = {name: [] for name in (*COLUMNS, *DRAWN)}
    for number, line in enumerate(lines, start=1):
        with _damage_in(Path(f"{path}:{number}")):
            values = _parse_object(line)
            if values["epoch"] != number:
                raise ValueError(f"expected epoch {number}, got epoch {values['epoch']!r}")
            for name in COLUMNS:
                columns[name].append(values["epoch"] if name == "epoch" else _number(values, name))
            if all(name in values for name in DRAWN):
                for name in DRAWN:
                    columns[name].append(_number(values, name))
    if len(columns["lr"]) < len(columns["epoch"]):
        columns |= {name: [] for name in DRAWN}
    return columns, torn_line


def _scores(values: Mapping[str, Any]) -> Scores:
    return Scores(
        **{metric.name: _number(values, metric.name) for metric in METRICS}, windows=_count(values, "windows")
    )


def _errors_px(values: Mapping[str, Any], length: int) -> np.ndarray:
    listed = values["joint_error_px"]
    if len(listed) != length:
        raise ValueError(f"joint_error_px should hold {length} numbers, got {len(listed)}")
    return np.array([_number({"joint_error_px": value}, "joint_error_px") for value in listed])


def _from_summary(
    summary: Mapping[str, Any],
    folder: Path,
    config: dict[str, dict[str, Any]],
    metrics: dict[str, list[float]],
    torn_line: int | None,
    samples: Samples,
    predicted: int,
) -> RunRecord:
    if (version := summary["format"]) not in FORMATS:
        raise ValueError(f"format {version} is not known; this version of the report reads 1 and 2")
    best, epochs = _count(summary, "best_epoch"), len(metrics["epoch"])
    if not 1 <= best <= epochs:
        raise ValueError(f"best_epoch is {best}, but metrics.jsonl holds epochs 1 to {epochs}")
    by_rate = summary["by_frame_rate"]
    rates = tuple((_number(entry, "fps"), _scores(entry)) for entry in by_rate)
    if not all(fps > 0 for fps, _ in rates):
        raise ValueError("by_frame_rate: fps should be more than 0")
    data, broken_down = summary["data"], version > 1
    horizon = {}
    if broken_down:
        horizon = {name: _errors_px(values, predicted) for name, values in summary["horizon"].items()}
    if horizon and NETWORK not in horizon:
        raise ValueError(f"horizon: {NETWORK} is missing")
    return RunRecord(
        folder=folder,
        config=config,
        metrics=metrics,
        torn_line=torn_line,
        stamp=folder.name,
        started=str(summary["started"]),
        total_params=_count(summary, "total_params"),
        modules=tuple((str(entry["module"]), _count(entry, "params")) for entry in summary["modules"]),
        best_epoch=best,
        stopped_early=bool(summary["stopped_early"]),
        # Runs of earlier versions do not say.
        finished_before=tuple(map(int, summary.get("finished_before", ()))),
        test=_scores(summary["test"]),
        baselines={name: _scores(scores) for name, scores in summary["baselines"].items()},
        by_frame_rate=rates,
        assumed_rates=tuple((_number(e, "fps"), _count(e, "assumed")) for e in by_rate if e.get("assumed")),
        by_subtask=tuple((str(row["subtask"]), _scores(row)) for row in summary["by_subtask"]) if broken_down else (),
        horizon=horizon,
        by_joint=_errors_px(summary["by_joint"], JOINTS) if broken_down else None,
        modalities={name: bool(summary["modalities"][name]) for name in MODALITIES},
        source=str(data["source"]),
        split=str(data["split"]),
        clips={name: _count(data["clips"], name) for name in SPLITS},
        windows={name: _count(data["windows"], name) for name in SPLITS},
        skipped={name: _count(data["skipped"], name) for name in data["skipped"]},
        environment={name: str(summary["environment"][name] or "none") for name in ENVIRONMENT}
        # Runs of earlier versions do not say it.
        | {"why": str(summary["environment"].get("why", ""))},
        timing={name: _number(summary["timing"], name) for name in TIMING},
        command=str(summary["command"]),
        samples=samples,
    )


def read_samples(path: Path) -> Samples:
    """Reads samples.npz.

    Raises:
        RunError: it is no archive, or an array in it is missing or of the wrong shape or type.
    """
    with _damage_in(path):
        # Opened here: np.load leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        # Runs of format 1 have none.
        arrays.setdefault("label", np.full(len(arrays["stem"]), ""))
        arrays.setdefault("fps_assumed", np.zeros(len(arrays["stem"]), dtype=bool))
        arrays = {field.name: arrays[field.name] for field in fields(Samples)}
        (count, observed, _), predicted = arrays["observed"].shape, arrays["predicted"].shape[1]
        # Shape, and kinds of dtype in NumPy's letters.
        expected = {
            "observed": ((count, observed, 84), "f"),
            "predicted": ((count, predicted, 84), "f"),
            "target": ((count, predicted, 84), "f"),
            "observed_present": ((count, observed, 2), "b"),
            "target_present": ((count, predicted, 2), "b"),
            "fps": ((count,), "fiu"),
            "error_px": ((count,), "fiu"),
            "stem": ((count,), "U"),
            "label": ((count,), "U"),
            "fps_assumed": ((count,), "b"),
        }
        for name, (shape, kinds) in expected.items():
            array = arrays[name]
            if array.shape != shape or array.dtype.kind not in kinds or 0 in shape:
                raise ValueError(
                    f"{name} should be {shape} of kind {' or '.join(kinds)}, got {array.shape} of {array.dtype}"
                )
        if not (arrays["fps"] > 0).all():
            raise ValueError(f"fps should be more than 0, got {arrays['fps']}")
        return Samples(**arrays)
